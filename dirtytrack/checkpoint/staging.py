# SPDX-License-Identifier: MIT
"""The staging buffer: bounded memory that is there already, for copies on their way to a store."""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import deque
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from ..errors import InvalidMemory
from ..kernel import core
from ..memory import allocate

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["LEAST_STAGING_NBYTES", "Room", "Staging", "default_staging_nbytes"]

MIB = 1 << 20
LEAST_STAGING_NBYTES = 64 << 10
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, of Linux 5.14
_LOOK_SECONDS = 0.5


def default_staging_nbytes(nbytes: int, held_nbytes: int = 0) -> int:
    """For buffers of so many bytes: an eighth, at least 32 and at most 256 MiB, and what the store holds of it while it
    is sent; never more than twice as many."""
    return max(2 * MIB, min(min(max(nbytes // 8, 32 * MIB), 256 * MIB) + held_nbytes, 2 * nbytes))


class Room:
    """A stretch of the staging buffer that is somebody's until it is given back."""

    __slots__ = ("free", "nbytes", "offset")

    def __init__(self, offset: int, nbytes: int) -> None:
        self.offset, self.nbytes, self.free = offset, nbytes, False


class Staging:
    """A ring: what was taken first is given back first. It takes no more memory than it is made with, and all of that
    from the beginning, so that a copy into it faults no page in.

    Args:
        nbytes: at least 64 KiB; rounded up to pages.

    Raises:
        InvalidMemory: less.
        LimitReached: there is no such memory.

    Thread safety: everything may be called from any thread; `take` by one at a time.
    """

    def __init__(self, nbytes: int) -> None:
        if nbytes < LEAST_STAGING_NBYTES:
            raise InvalidMemory(f"staging_bytes is at least {LEAST_STAGING_NBYTES}, not {nbytes}")
        memory = allocate(nbytes, name="staging of checkpoints")
        self.nbytes = memory.nbytes
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        try:
            memory.madvise(_POPULATE_WRITE)
        except OSError:  # an older kernel
            for at in range(0, self.nbytes, core.PAGE_BYTES):
                memory[at] = 0
        self.view, self._address = memoryview(memory), memory.address
        self._taken: deque[Room] = deque()
        self._mutex = threading.Lock()
        self._news = SimpleQueue[None]()
        """That there may be more room. Unlike a lock it can be told from anywhere, by a finaliser too."""

    def _free(self, least: int) -> Room:
        """A free stretch of at least so many bytes; else the longest."""
        self._taken = deque(each for each in self._taken if not each.free)
        if not self._taken:
            return Room(0, self.nbytes)
        begin, last = self._taken[0].offset, self._taken[-1]
        end = last.offset + last.nbytes
        if end <= begin:  # it has gone round
            return Room(end, begin - end)
        tail, head = Room(end, self.nbytes - end), Room(0, begin)
        return tail if tail.nbytes >= least or tail.nbytes >= head.nbytes else head

    def take(self, least: int, most: int, given_up: Callable[[], bool] | None = None) -> Room | None:
        """Take a stretch of at most ``most`` bytes.

        Args:
            least: wait until there are so many in one piece; not more than there can be.
            given_up: asked meanwhile. Left out: do not wait.

        Returns:
            None where that was not to be had without waiting, or was given up.
        """
        while True:
            while not self._news.empty():  # what comes from now on was not looked at
                self._news.get()
            with self._mutex:
                free = self._free(least)
                if free.nbytes >= least:
                    room = Room(free.offset, min(free.nbytes, most))
                    self._taken.append(room)
                    return room
            if given_up is None or given_up():
                return None
            with suppress(Empty):
                self._news.get(timeout=_LOOK_SECONDS)

    def pointer(self, room: Room) -> Any:
        """To its first byte; the caller keeps the staging buffer."""
        return core.pointer_to(self._address + room.offset)

    def at(self, offset: int) -> Any:
        """A pointer to one of its bytes, for who has all of it; the caller keeps the staging buffer."""
        return core.pointer_to(self._address + offset)

    def lend(self, room: Room) -> memoryview:
        """The bytes of a stretch, which is given back once nobody has a view of them any more."""
        lent = core.view_of(self.pointer(room), room.nbytes)
        # Not of the view: of what each view of it holds.
        weakref.finalize(lent.obj, _give_back, room, self._news, self.view).atexit = False
        return lent

    def shorten(self, room: Room, nbytes: int) -> None:
        """Give back the end of what was taken last."""
        with self._mutex:
            room.nbytes = nbytes

    def give_back(self, room: Room) -> None:
        """Give a stretch back: the one that was taken first of those that are out, or the last. Again does nothing."""
        _give_back(room, self._news)

    def clear(self) -> None:
        """All of it is free."""
        with self._mutex:
            self._taken.clear()

    def wake(self) -> None:
        """Make whoever waits ask whether it was given up."""
        self._news.put(None)


def _give_back(room: Room, news: SimpleQueue[None], *_: object) -> None:
    room.free = True
    news.put(None)

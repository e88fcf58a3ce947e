# SPDX-License-Identifier: MIT
"""Save, as who called `Checkpointer.save` sees it; and the work that is behind it."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..errors import StoreBusy, UsedAfterFork
from .bell import Bell
from .crew import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..dirtyset import DirtySet
    from ..kernel import cutting
    from .going_on import Left
    from .manifests import RegionEntry
    from .staging import Room
    from .watching import Watched

__all__ = ["Batch", "Job", "Plan", "Save"]


class Save:
    """A checkpoint on its way into the store; made by `Checkpointer.save`.

    Attributes:
        generation: its number, from the beginning; numbers of saves that failed are not used again. None where it was
            skipped.
        kind: ``"full"``, ``"increment"`` or ``"skipped"``.
        meta: as it is kept.
        stall_seconds: how long the program stood still: from before ``quiesce`` until after it, and from before the
            pages were armed again until after they were copied.
        waited_seconds: how long `Checkpointer.save` waited before that for saves that were under way.
        bytes_dirty: what was found to be written since the last save, and so had to be saved; of a full save all bytes
            are saved, whatever this is.
        bytes_written: to the store; 0 until it is committed.
        into: the save that took over its pages, where it was coalesced.

    Thread safety: everything may be called from any thread.
    """

    def __init__(self, generation: int | None, kind: Literal["full", "increment", "skipped"], meta: Any) -> None:
        self.generation, self.kind, self.meta = generation, kind, meta
        self.stall_seconds = self.waited_seconds = 0.0
        self.bytes_dirty = self.bytes_written = 0
        self.into: Save | None = None
        self._state: Literal["saving", "committed", "failed", "skipped", "coalesced"] = "saving"
        self._error: BaseException | None = None
        self._told: Callable[[], object] = int  # that the error came to somebody
        self._bell, self._pid = Bell(), os.getpid()
        if kind == "skipped":
            self._end("skipped")

    def _end(
        self, state: Literal["committed", "failed", "skipped", "coalesced"], error: BaseException | None = None
    ) -> None:
        with self._bell.mutex:
            self._state, self._error = state, error
            self._bell.ring()

    @property
    def state(self) -> Literal["saving", "committed", "failed", "skipped", "coalesced"]:
        """How far it is. Only ``"committed"`` is durable."""
        return self._state

    @property
    def done(self) -> bool:
        """Whether it is over: committed, failed, skipped or coalesced."""
        return self._state != "saving"

    @property
    def error(self) -> BaseException | None:
        """Why it failed; looking does not count as having been told."""
        return self._error

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is durable.

        Args:
            timeout: seconds.

        Returns:
            Whether it is committed; of a coalesced one, whether the one that took over its pages is. False where the
            time ran out, or it was skipped.

        Raises:
            StoreFailed, or whatever else it failed of. Its pages are in the next save.
            StoreBusy: a finaliser, or ``encrypt``, waits in the very thread that works on saves.
            UsedAfterFork: it is the parent's.
        """
        end = None if timeout is None else time.monotonic() + timeout
        save = self
        while save._over(None if end is None else max(0.0, end - time.monotonic())):
            if save._error is not None:
                save._told()
                raise save._error
            if save.into is None:
                return save._state == "committed"
            save = save.into  # not by recursion: thousands may have been coalesced, one into the next
        return False

    def _over(self, timeout: float | None) -> bool:
        if not self.done:
            if os.getpid() != self._pid:
                raise UsedAfterFork("this save is the parent's, and only the parent knows when it is over")
            if isinstance(threading.current_thread(), Worker):
                raise StoreBusy("a save was waited for in the thread that works on it, by a finaliser or encrypt")
        return self._bell.wait_for(lambda: self.done, timeout)

    def __repr__(self) -> str:
        which = "" if self.generation is None else f" of generation {self.generation}"
        return f"<Save{which}: {self.kind}, {self._state}>"


class Plan(NamedTuple):
    """A region in a save."""

    entry: RegionEntry
    """``since`` is not known here."""
    address: int
    granule: int
    unpinned: bool


class Batch(NamedTuple):
    """Frames whose bytes are staged, one behind the other."""

    room: Room
    first: int
    last: int | None
    """Of the job's cuts; None: to the end."""
    sums: Sequence[int] | None = None
    """The XXH64 of each frame's bytes, where they were added up as they were copied."""


class Job:
    """A save that is under way. Guarded by the saver's lock, but for what never changes."""

    def __init__(
        self,
        save: Save,
        *,
        full: bool,
        wanted_full: bool,
        watched: Watched,
        dirty: DirtySet,
        saved: DirtySet,
        holes: DirtySet | None = None,
        left: tuple[Left, ...] = (),
        token: int,
    ) -> None:
        self.save, self.full, self.wanted_full = save, full, wanted_full
        self.plans, self.extents = watched.plans, watched.extents
        self.numbers = frozenset(plan.entry.number for plan in self.plans)
        self.dirty, self.saved, self.token = dirty, saved, token
        self.left = left  # by saves that failed: what it does not tell again
        self.holes = holes  # of what is saved, those that are zero and were not copied
        self.created = time.time()
        self.nbytes = 0
        self.cuts: cutting.Cuts | None = None
        self.pack_seconds = 0.0
        self.batches: deque[Batch] = deque()
        self.sealed = self.failed = False
        self.aborted: BaseException | None = None
        self.touched: list[tuple[int, memoryview]] = []  # what mirrors took over

# SPDX-License-Identifier: MIT
"""Writing a segment to an object store: in parts that go out in parallel, few at a time."""

from __future__ import annotations

import mmap
import weakref
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from ...errors import CheckpointerClosed, DirtyTrackError, StoreFailed
from .bucket import Absent
from .refusals import was_cut

if TYPE_CHECKING:
    from collections.abc import Callable

    from .bucket import Bucket, Upload

__all__ = ["ObjectSink"]

_ATTEMPTS = 4
_MOST_PARTS = 8192  # the stores that allow the fewest allow 10,000
_LEAST_LENT_PARTS = 2  # one is held until it is full
_ROOM_NBYTES = 1 << 20


class ObjectSink:
    """A segment on its way: see `Sink`.

    What is lent for long enough, and `bytes`, is sent from where it is; else it is copied first. Parts are sent while
    more is written, so that of what was written as many parts are held as are in flight, and one more. A segment of one
    part is put as it is.

    Args:
        bucket, key: where to.
        part_nbytes: of a part.
        in_flight: how many parts are sent at once.
        dropped: called when it was abandoned; says whether the object may be removed.
    """

    whole_nbytes = 256 << 20

    def __init__(
        self, bucket: Bucket, key: str, part_nbytes: int, in_flight: int, dropped: Callable[[str], bool]
    ) -> None:
        self._bucket, self._key, self._dropped = bucket, key, dropped
        self._part_nbytes, self._in_flight = part_nbytes, in_flight
        self._rooms = _Rooms()
        self._first: list[Any] = []  # the pieces of the first part, until there is more
        self._upload: Upload | None = None
        self._closed = self._may_be_there = False
        self.name, self.nbytes, self.finished = key.rpartition("/")[2], 0, False

    @property
    def most_nbytes(self) -> int:
        """That a segment may have."""
        return _MOST_PARTS * self._part_nbytes

    def write(self, data: Any, lent_nbytes: int = 0) -> None:
        """Write bytes: see `Sink.write`."""
        self._require_open()
        view = memoryview(data).cast("B")
        if type(data) is bytes or lent_nbytes >= _LEAST_LENT_PARTS * self._part_nbytes:
            self._add(view)
        else:
            for at in range(0, view.nbytes, _ROOM_NBYTES):
                self._add(self._rooms.copied(view[at : at + _ROOM_NBYTES]))

    def _add(self, piece: memoryview) -> None:
        self.nbytes += piece.nbytes
        if self._upload is not None:
            self._upload.write(piece)
            return
        self._first.append(piece)
        if self.nbytes > self._part_nbytes:
            self._upload = self._begun()
            self._first.clear()

    def _begun(self) -> Upload:
        """The upload, with its first part. With that the store is asked to begin one: where its answer was cut, it is
        asked to begin another."""
        for attempt in range(_ATTEMPTS):
            upload = self._bucket.upload(self._key, self._part_nbytes, self._in_flight)
            try:
                for piece in self._first:
                    upload.write(piece)
                break
            except StoreFailed as error:
                if attempt + 1 == _ATTEMPTS or error.__cause__ is None or not was_cut(error.__cause__):
                    raise
        return upload

    def finish(self) -> None:
        """Have the object appear: see `Sink.finish`."""
        self._require_open()
        try:
            self._may_be_there = True
            if self._upload is None:
                self._bucket.put(self._key, self._first)
            else:
                self._upload.close()
        except StoreFailed:
            if not self._appeared():
                raise
        self.forget()
        self.finished = True

    def _appeared(self) -> bool:
        """Whether it is there though the store's answer was lost: nobody else has this name, and no part of it."""
        try:
            return self._bucket.nbytes(self._key) == self.nbytes
        except (Absent, DirtyTrackError):
            return False

    def abandon(self) -> None:
        """Let go of it, and remove it: see `Sink.abandon`."""
        upload = self._upload
        self.forget()
        if upload is not None:
            with suppress(Exception):  # what the store keeps of it, its rule for incomplete uploads removes
                upload.abort()
        if self._dropped(self.name) and self._may_be_there:
            with suppress(Exception):  # it is removed by who cleans
                self._bucket.delete([self._key])

    def _require_open(self) -> None:
        if self._closed:
            raise CheckpointerClosed(f"the segment {self._bucket.where(self._key)} is closed")

    def forget(self) -> None:
        """Let go of what it holds; all there is to do in a child, whose parent goes on with it."""
        self._closed, self._upload, self._first, self._rooms = True, None, [], _Rooms()


class _Rooms:
    """Room for copies, used again as soon as the library has let go of it: new memory costs more than the copy into it.

    It is mapped, so that of a small copy's room no more is there than was written.
    """

    def __init__(self) -> None:
        self._free = SimpleQueue[memoryview]()

    def copied(self, data: memoryview) -> memoryview:
        """A copy, whose room is free again once nobody has it any more."""
        try:
            room = self._free.get_nowait()
        except Empty:
            room = memoryview(mmap.mmap(-1, _ROOM_NBYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        room[: data.nbytes] = data
        copy = room[: data.nbytes]
        weakref.finalize(copy, self._free.put, room).atexit = False
        return copy

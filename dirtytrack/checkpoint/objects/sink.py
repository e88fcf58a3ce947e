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


class ObjectSink:
    """A segment on its way: see `Sink`.

    What is written is copied into a part; full ones are sent while the next one fills, so that memory holds as many
    parts as are in flight and two more. A segment of one part is put as it is.

    Args:
        bucket, key: where to.
        part_nbytes: of a part.
        in_flight: how many parts are sent at once.
        dropped: called when it was abandoned; says whether the object may be removed.
    """

    def __init__(
        self, bucket: Bucket, key: str, part_nbytes: int, in_flight: int, dropped: Callable[[str], bool]
    ) -> None:
        self._bucket, self._key, self._dropped = bucket, key, dropped
        self._part_nbytes, self._in_flight = part_nbytes, in_flight
        self._rooms = _Rooms(part_nbytes)
        self._part = self._rooms.take()
        self._used = 0
        self._upload: Upload | None = None
        self._closed = self._may_be_there = False
        self.name, self.nbytes, self.finished = key.rpartition("/")[2], 0, False

    @property
    def most_nbytes(self) -> int:
        """That a segment may have."""
        return _MOST_PARTS * self._part_nbytes

    def write(self, data: Any) -> None:
        """Write bytes: see `Sink.write`."""
        self._require_open()
        rest = memoryview(data).cast("B")
        while rest:
            if self._used == self._part_nbytes:
                self._send()
            some = rest[: self._part_nbytes - self._used]
            end = self._used + some.nbytes
            self._part[self._used : end] = some
            self._used, self.nbytes = end, self.nbytes + some.nbytes
            rest = rest[some.nbytes :]

    def _send(self) -> None:
        part = self._rooms.lent(self._part, self._used)
        if self._upload is None:
            self._upload = self._begun(part)
        else:
            self._upload.write(part)
        del part
        self._part, self._used = self._rooms.take(), 0

    def _begun(self, part: memoryview) -> Upload:
        """The upload, with its first part. With that the store is asked to begin one: where its answer was cut, it is
        asked to begin another."""
        for attempt in range(_ATTEMPTS):
            upload = self._bucket.upload(self._key, self._part_nbytes, self._in_flight)
            try:
                upload.write(part)
                break
            except StoreFailed as error:
                if attempt + 1 == _ATTEMPTS or error.__cause__ is None or not was_cut(error.__cause__):
                    raise
        return upload

    def finish(self) -> None:
        """Have the object appear: see `Sink.finish`."""
        self._require_open()
        try:
            if self._upload is not None and self._used:
                self._send()
            self._may_be_there = True
            if self._upload is None:
                self._bucket.put(self._key, self._part[: self._used])
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
        self._closed, self._upload, self._used = True, None, 0
        self._part, self._rooms = memoryview(b""), _Rooms(0)


class _Rooms:
    """Room for parts, used again as soon as the library has let go of it: new memory costs more than the copy into it.

    It is mapped, so that of a small segment's part no more is there than was written.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes, self._free = nbytes, SimpleQueue[memoryview]()

    def take(self) -> memoryview:
        """Room that nobody uses."""
        try:
            return self._free.get_nowait()
        except Empty:
            room = mmap.mmap(-1, self._nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(OSError):  # a kernel without huge pages
                room.madvise(mmap.MADV_HUGEPAGE)
            return memoryview(room)

    def lent(self, room: memoryview, nbytes: int) -> memoryview:
        """The first bytes of it; once nobody has them any more, it is free again."""
        part = room[:nbytes]
        weakref.finalize(part, self._free.put, room).atexit = False
        return part

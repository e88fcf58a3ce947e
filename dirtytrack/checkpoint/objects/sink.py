# SPDX-License-Identifier: MIT
"""Writing a segment to an object store: in parts that go out in parallel, few at a time."""

from __future__ import annotations

from contextlib import suppress
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
        self._part = bytearray()
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
            if len(self._part) == self._part_nbytes:
                self._send()
            some = rest[: self._part_nbytes - len(self._part)]
            self._part += some
            self.nbytes += some.nbytes
            rest = rest[some.nbytes :]

    def _send(self) -> None:
        part, self._part = self._part, bytearray()
        if self._upload is None:
            self._upload = self._begun(part)
        else:
            self._upload.write(part)

    def _begun(self, part: bytearray) -> Upload:
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
            if self._upload is not None and self._part:
                self._send()
            self._may_be_there = True
            if self._upload is None:
                self._bucket.put(self._key, self._part)
            else:
                self._upload.close()
        except StoreFailed:
            if not self._appeared():
                raise
        self._closed, self._upload, self._part = True, None, bytearray()
        self.finished = True

    def _appeared(self) -> bool:
        """Whether it is there though the store's answer was lost: nobody else has this name, and no part of it."""
        try:
            return self._bucket.nbytes(self._key) == self.nbytes
        except (Absent, DirtyTrackError):
            return False

    def abandon(self) -> None:
        """Let go of it, and remove it: see `Sink.abandon`."""
        self._closed = True
        upload, self._upload, self._part = self._upload, None, bytearray()
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
        """In a child, whose parent goes on with it."""
        self._closed, self._upload, self._part = True, None, bytearray()

# SPDX-License-Identifier: MIT
"""The segments of a save: how it is cut into them, and what of it is whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from .crew import Worker
from .segments import FrameKind

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from ..kernel import cutting
    from .manifests import SegmentEntry
    from .protocols import Writer
    from .segments import Codec, SegmentWriter

__all__ = ["Framed", "Parts"]

_MOST_PARTS = 64  # of one save; no more than one of them has to be sent again after a failure, and what is in flight


class Framed(NamedTuple):
    """A frame as it is to be stored."""

    cut: cutting.Cut
    kind: FrameKind
    stored: Any
    codec: Codec
    encrypted: bool
    plain_nbytes: int
    checksum: int


class Parts:
    """The segments of a save, begun as they are needed. While one is finished, the next one is written."""

    def __init__(self, writer: Writer, generation: int, staging_nbytes: int) -> None:
        self._writer, self._generation, self._lent_nbytes = writer, generation, staging_nbytes // 2
        self._parts: list[_Part] = []
        self.saved_nbytes = 0
        """By the save, about."""
        self.published = False
        """Whether that was tried."""

    @property
    def nbytes(self) -> int:
        """That were written."""
        return sum(part.entry.nbytes for part in self._parts if part.entry is not None)

    def add(self, number: int, runs: memoryview, framed: Framed, index: int = -1) -> None:
        """Write a frame.

        Args:
            number: of its region.
            runs: see `SegmentWriter.add`.
            framed: what it is.
            index: among the save's cuts; -1 for what is told again in any case.
        """
        part = self._parts[-1] if self._parts else None
        if part is None or self._is_full(part.segment, framed.cut.span_count):
            if part is not None:
                self._finish(part)
            part = _Part(self._writer.create_segment(self._generation))
            self._parts.append(part)
        part.segment.add(
            number,
            runs,
            framed.stored,
            kind=framed.kind,
            codec=framed.codec,
            encrypted=framed.encrypted,
            plain_nbytes=framed.plain_nbytes,
            checksum=None if framed.kind == FrameKind.ZEROS else framed.checksum,
            lent_nbytes=self._lent_nbytes,
        )
        if index >= 0:
            part.cuts.append(index)

    def _is_full(self, segment: SegmentWriter, run_count: int) -> bool:
        enough = max(segment.whole_nbytes, self.saved_nbytes // _MOST_PARTS)
        return not segment.has_room(run_count) or (segment.whole_nbytes > 0 and segment.nbytes >= enough)

    def _finish(self, part: _Part) -> None:
        if not part.segment.whole_nbytes:
            part.finish()
            part.wait()
            return
        if len(self._parts) > 1:
            self._parts[-2].wait()
        part.begin_to_finish()

    def finish(self) -> tuple[SegmentEntry, ...]:
        """Make all of it durable."""
        if self._parts:
            self._parts[-1].finish()
        return tuple(part.wait() for part in self._parts)

    def settle(self) -> None:
        """Wait until nothing is being finished any more."""
        for part in self._parts:
            part.join()

    def finished(self) -> Iterator[tuple[SegmentWriter, SegmentEntry, list[int]]]:
        """Those that are whole, and are worth to be left to another save."""
        for part in self._parts:
            if part.entry is not None and part.segment.whole_nbytes:
                yield part.segment, part.entry, part.cuts

    def abandon(self, but: Collection[SegmentWriter]) -> None:
        """Remove all of it but these."""
        for part in self._parts:
            if part.segment not in but:
                part.segment.abandon()


class _Part:
    """A segment of a save."""

    def __init__(self, segment: SegmentWriter) -> None:
        self.segment, self.cuts = segment, list[int]()
        self.entry: SegmentEntry | None = None
        self._thread: Worker | None = None
        self._error: BaseException | None = None

    def finish(self) -> None:
        try:
            self.entry = self.segment.finish()
        except BaseException as error:
            self._error = error

    def begin_to_finish(self) -> None:
        thread = Worker(target=self.finish, name="dirtytrack-finish", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no more threads are to be had, as when the interpreter ends
            self.finish()
        else:
            self._thread = thread

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def wait(self) -> SegmentEntry:
        self.join()
        if self._error is not None:
            raise self._error
        assert self.entry is not None
        return self.entry

# SPDX-License-Identifier: MIT
"""The frames of an image, on their way into segments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from ...kernel import cutting
from ...kernel.packing import all_zero, xxh64
from ..segments import Codec, FrameKind

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ...dirtyset import DirtySet
    from ..coding import Encoder
    from ..crew import Crew
    from ..manifests import SegmentEntry
    from ..protocols import Writer
    from ..segments import SegmentWriter
    from .space import Space

__all__ = ["Frames", "Plain"]

_HOLES_NBYTES = 64 << 30  # of zeros in a frame, which takes no room but for its runs


class Plain(NamedTuple):
    """A frame's bytes before they are encoded."""

    number: int
    """Of its region."""
    runs: Any
    """As a segment has them, in bytes."""
    data: Any


class _Encoded(NamedTuple):
    kind: FrameKind
    stored: Any
    codec: Codec
    encrypted: bool
    checksum: int


class Frames:
    """Writes the frames of one generation.

    Bytes may be told several times, by one step after the other; of one segment's frames none may overlap, so each
    step has segments of its own.

    Args:
        writer: of the store.
        generation: its number.
        encoder: compresses and encrypts.
        crew: who does that.
    """

    def __init__(self, writer: Writer, generation: int, encoder: Encoder, crew: Crew) -> None:
        self._writer, self._generation, self._encoder, self._crew = writer, generation, encoder, crew
        self._segments: list[SegmentWriter] = []
        self._entries: list[SegmentEntry] = []
        self._within = False

    @property
    def nbytes(self) -> int:
        """Of all that was finished."""
        return sum(entry.nbytes for entry in self._entries)

    def add(self, plains: Iterable[Plain]) -> None:
        """Encode and write frames. Their bytes may be overwritten afterwards."""

        def encode(plain: Plain) -> tuple[Plain, _Encoded]:
            return plain, self._encode(plain)

        for plain, encoded in self._crew.map(encode, plains):
            self._segment(len(plain.runs) // 16).add(
                plain.number,
                plain.runs,
                encoded.stored,
                kind=encoded.kind,
                codec=encoded.codec,
                encrypted=encoded.encrypted,
                plain_nbytes=memoryview(plain.data).nbytes,
                checksum=None if encoded.kind == FrameKind.ZEROS else encoded.checksum,
            )

    def _encode(self, plain: Plain) -> _Encoded:
        if all_zero(plain.data):
            return _Encoded(FrameKind.ZEROS, b"", Codec.NONE, False, 0)
        stored, codec, encrypted = self._encoder.encode(plain.data)
        return _Encoded(FrameKind.PAGES, stored, codec, encrypted, xxh64(stored))

    def add_zeros(self, pages: DirtySet, space: Space) -> None:
        """Say that these pages, all of them within the space, are zero."""
        cuts = cutting.cut(pages._set, space.extents(), _HOLES_NBYTES)
        for which in map(cuts.__getitem__, range(len(cuts))):
            segment = self._segment(which.span_count)
            segment.add(space.number(which.memory), cuts.spans(which), kind=FrameKind.ZEROS, plain_nbytes=which.nbytes)

    def _segment(self, run_count: int) -> SegmentWriter:
        if not (self._within and self._segments[-1].has_room(run_count)):
            self._segments.append(self._writer.create_segment(self._generation))
            self._within = True
        return self._segments[-1]

    def end_step(self) -> None:
        """What comes now may be told again."""
        self._within = False

    def finish(self) -> tuple[SegmentEntry, ...]:
        """Make all of it durable: at the end, so that no step of a process that runs takes longer for that."""
        self._entries = [segment.finish() for segment in self._segments]
        return tuple(self._entries)

    def abandon(self) -> None:
        """Remove all of it; never fails."""
        for segment in self._segments:
            segment.abandon()

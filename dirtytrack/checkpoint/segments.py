# SPDX-License-Identifier: MIT
"""Segments: frames of bytes, and where they belong. Their format is in docs/checkpoint-format.md."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from ..delta.encoded import most_nbytes
from ..errors import DamagedCheckpoint, InvalidCheckpoint
from ..kernel.packing import all_zero, runs_nbytes, xxh64
from .manifests import SegmentEntry, segment_of_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from types import TracebackType

    from typing_extensions import Self

    from .protocols import Sink, Source

__all__ = [
    "FRAME_NBYTES",
    "HEADER_NBYTES",
    "MOST_FRAME_NBYTES",
    "MOST_INDEX_NBYTES",
    "Codec",
    "Frame",
    "FrameKind",
    "SegmentReader",
    "SegmentWriter",
]

VERSION = 1
HEADER_NBYTES = 4096
FRAME_NBYTES = 1 << 20  # what a writer packs into one
MOST_FRAME_NBYTES = 64 << 20  # of its bytes as stored, and as they come out of the codec
MOST_INDEX_NBYTES = 64 << 20
_MAGIC = b"DTSEGMNT"
_HEAD = struct.Struct("<8sII16sQ8s")
_ENTRY = struct.Struct("<IBBBBIIQQQQ")
_WHOLE_MEMORY = 1 << 56


class FrameKind(IntEnum):
    """What a frame's bytes are."""

    PAGES = 0  # the runs' bytes, packed
    DELTA = 1  # an encoding of `dirtytrack.delta`, over the runs' bytes, packed
    ZEROS = 2  # nothing: the runs' bytes are zero


class Codec(IntEnum):
    """How a frame's bytes are compressed."""

    NONE = 0
    ZSTD = 1


@dataclass(frozen=True, slots=True)
class Frame:
    """Bytes of one region.

    Attributes:
        region: the number of its region in the manifest.
        kind, codec, encrypted: what its bytes are.
        offset, stored_nbytes: where they are in the segment.
        plain_nbytes: as they come out of the codec.
        checksum: XXH64 of them as they are stored.
        runs: (n, 2) 64-bit numbers: the offsets in the region and lengths of the runs that it tells, in order.
        packed_nbytes: of the runs together.
    """

    region: int
    kind: FrameKind
    codec: Codec
    encrypted: bool
    offset: int
    stored_nbytes: int
    plain_nbytes: int
    checksum: int
    runs: memoryview
    packed_nbytes: int


# ---- writing


class SegmentWriter:
    """Writes frames, and at the end their index.

    Args:
        sink: where to; new.
        store_id: in hexadecimal digits.

    Thread safety: one thread at a time.
    """

    def __init__(self, sink: Sink, store_id: str) -> None:
        found = segment_of_name(sink.name)
        assert found is not None  # the store named it
        self._sink, self.generation = sink, found[0]
        self._index, self._count = bytearray(8), 0
        head = _HEAD.pack(_MAGIC, VERSION, 0, bytes.fromhex(store_id), *found)
        sink.write((head + xxh64(head).to_bytes(8, "little")).ljust(HEADER_NBYTES, b"\0"))

    @property
    def name(self) -> str:
        """Of its file."""
        return self._sink.name

    @property
    def nbytes(self) -> int:
        """Written so far, and what the index will take."""
        return self._sink.nbytes + len(self._index)

    @property
    def whole_nbytes(self) -> int:
        """See `Sink.whole_nbytes`."""
        return self._sink.whole_nbytes

    def has_room(self, run_count: int) -> bool:
        """Whether the segment has room for one more frame of that many runs; else finish it, begin another."""
        index_nbytes = len(self._index) + _ENTRY.size + 16 * run_count
        most = self._sink.most_nbytes - MOST_FRAME_NBYTES
        return index_nbytes <= MOST_INDEX_NBYTES and self._sink.nbytes + index_nbytes <= most

    def add(
        self,
        region: int,
        runs: Any,
        stored: Any = b"",
        *,
        kind: FrameKind = FrameKind.PAGES,
        codec: Codec = Codec.NONE,
        encrypted: bool = False,
        plain_nbytes: int | None = None,
        checksum: int | None = None,
        lent_nbytes: int = 0,
    ) -> Frame:
        """Write a frame.

        Args:
            region: the number of its region.
            runs: a contiguous buffer of pairs of 64-bit numbers, offset in the region and length, in order, disjoint.
            stored: the bytes to store, as they are; none for `FrameKind.ZEROS`.
            kind, codec, encrypted: what they are.
            plain_nbytes: as they come out of the codec; the runs' length where it is left out.
            checksum: XXH64 of ``stored``; computed where it is left out.
            lent_nbytes: see `Sink.write`.

        Raises:
            InvalidCheckpoint: the runs or lengths make no sense, or the index has no room (see `has_room`).
            StoreFailed, PermissionDenied: it cannot be written; `abandon` the segment.
        """
        given, stored = stored, memoryview(stored).cast("B")
        view = memoryview(runs).cast("B")
        packed = runs_nbytes(view, _WHOLE_MEMORY)
        if packed is None:
            raise InvalidCheckpoint("the runs of a frame are in order, disjoint, and not empty")
        frame = Frame(
            region=region,
            kind=kind,
            codec=codec,
            encrypted=encrypted,
            offset=self._sink.nbytes,
            stored_nbytes=stored.nbytes,
            plain_nbytes=packed if plain_nbytes is None else plain_nbytes,
            checksum=xxh64(stored) if checksum is None else checksum,
            runs=_pairs(view),
            packed_nbytes=packed,
        )
        problem = _problem(frame)
        if problem or not self.has_room(len(frame.runs)):
            raise InvalidCheckpoint(f"a frame cannot be written so: {problem or 'the index has no room for it'}")
        if stored.nbytes:
            self._sink.write(given if type(given) is bytes else stored, lent_nbytes)
        self._index += _ENTRY.pack(
            frame.region,
            kind,
            codec,
            encrypted,
            0,
            len(frame.runs),
            0,
            frame.offset,
            frame.stored_nbytes,
            frame.plain_nbytes,
            frame.checksum,
        )
        self._index += view
        self._count += 1
        return frame

    def finish(self) -> SegmentEntry:
        """Write the index and make all of it durable.

        Returns:
            What a manifest says of it.

        Raises:
            StoreFailed, PermissionDenied: it cannot be written; `abandon` the segment.
        """
        self._index[:8] = self._count.to_bytes(8, "little")
        index_offset = self._sink.nbytes
        self._sink.write(bytes(self._index))
        self._sink.finish()
        digest = sha256(self._index).hexdigest()
        return SegmentEntry(self.name, self.generation, self._sink.nbytes, index_offset, len(self._index), digest)

    def abandon(self) -> None:
        """Remove it; after `finish` too, as long as no manifest that names it was published. Never fails."""
        self._sink.abandon()


# ---- reading


class SegmentReader:
    """Reads the segment that an entry of a manifest speaks of. Its header and index are checked here.

    Args:
        source: where from; closed with the reader.
        entry: what the manifest says of it.
        store_id: of the store, in hexadecimal digits.

    Raises:
        DamagedCheckpoint: header or index are not what was written, or its length is another.
        InvalidCheckpoint: of another version, or larger than any can be.
        StoreFailed: it cannot be read.

    Thread safety: everything may be called from any thread.
    """

    def __init__(self, source: Source, entry: SegmentEntry, store_id: str) -> None:
        self.entry, self._source = entry, source
        try:
            if source.nbytes != entry.nbytes:
                raise self.damaged(f"has {source.nbytes} bytes instead of {entry.nbytes}")
            self._check_header(store_id)
            if entry.index_nbytes > MOST_INDEX_NBYTES:
                raise self._invalid(f"its index has {entry.index_nbytes} bytes, {MOST_INDEX_NBYTES} are the most")
            index = bytearray(entry.index_nbytes)
            source.read_into([index], entry.index_offset)
            if sha256(index).hexdigest() != entry.index_sha256:
                raise self.damaged("has another index than what was written")
            self._index = memoryview(index).toreadonly()
        except BaseException:
            source.close()
            raise

    def _check_header(self, store_id: str) -> None:
        header = bytearray(HEADER_NBYTES)
        self._source.read_into([header], 0)
        size = _HEAD.size
        magic, version, zero, store, *which = _HEAD.unpack_from(header)
        whole = xxh64(header[:size]) == int.from_bytes(header[size : size + 8], "little")
        if magic != _MAGIC or not whole or zero or not all_zero(memoryview(header)[size + 8 :]):
            raise self.damaged("has another header than what was written")
        if version != VERSION:
            raise self._invalid(f"it is of version {version}, this library reads version {VERSION}: update it")
        if store.hex() != store_id or tuple(which) != segment_of_name(self.entry.name):
            raise self.damaged("is another segment, by its header")

    def damaged(self, how: str) -> DamagedCheckpoint:
        """The error for a segment that is not what was written."""
        damage = f"the segment {self.entry.name} {how}"
        return DamagedCheckpoint(damage, damage=(damage,))

    def _invalid(self, why: str) -> InvalidCheckpoint:
        return InvalidCheckpoint(f"the segment {self.entry.name} cannot be: {why}")

    def frames(self, region_nbytes: Mapping[int, int] | None = None) -> Iterator[Frame]:
        """The frames, in order. They follow one another without a gap, from the header to the index.

        Args:
            region_nbytes: of the regions that are looked for, by number: their frames lie within.

        Raises:
            InvalidCheckpoint: what the index says makes no sense.
        """
        index, at, offset = self._index, 8, HEADER_NBYTES
        known = region_nbytes or {}
        count = int.from_bytes(index[:8], "little") if len(index) >= 8 else -1
        while at + _ENTRY.size <= len(index):
            region, kind, codec, encrypted, zero, runs, zeros, *numbers = _ENTRY.unpack_from(index, at)
            at += _ENTRY.size
            pairs = index[at : at + 16 * runs]
            at += 16 * runs
            if kind > 2 or codec > 1 or encrypted > 1 or zero or zeros or len(pairs) != 16 * runs:
                raise self._invalid("its index has what no version has")
            packed = runs_nbytes(pairs, known.get(region, _WHOLE_MEMORY))
            if packed is None or numbers[0] != offset or not runs:
                raise self._invalid("a frame does not lie in its region, or not behind the one before it")
            at_byte, stored, plain, checksum = numbers
            what = FrameKind(kind), Codec(codec), bool(encrypted)
            frame = Frame(region, *what, at_byte, stored, plain, checksum, _pairs(pairs), packed)
            if problem := _problem(frame):
                raise self._invalid(problem)
            offset += frame.stored_nbytes
            count -= 1
            yield frame
        if at != len(index) or count or offset != self.entry.index_offset:
            raise self._invalid("its index does not end with its last frame, or its frames not with the index")

    def will_read(self, frames: Iterable[Frame]) -> None:
        """A hint: these will be read, each once."""
        self._source.will_read((frame.offset, frame.stored_nbytes) for frame in frames)

    def read_summed(self, frame: Frame, room: Any) -> int:
        """Read a frame's stored bytes into a buffer of as many; their checksum, which nobody has looked at: see
        `check`."""
        return self._source.read_summed(room, frame.offset)

    def read(self, frame: Frame) -> bytearray:
        """A frame's stored bytes, checked.

        Raises:
            DamagedCheckpoint: they are not what was written.
        """
        stored = bytearray(frame.stored_nbytes)
        self.check(frame, self.read_summed(frame, stored))
        return stored

    def check(self, frame: Frame, checksum: int) -> None:
        """Refuse stored bytes that have this checksum, where it is not that of the frame.

        Raises:
            DamagedCheckpoint: they are not what was written.
        """
        if checksum != frame.checksum:
            raise self.damaged(f"is damaged between {frame.offset} and {frame.offset + frame.stored_nbytes}")

    def close(self) -> None:
        """Close the source."""
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _pairs(view: memoryview) -> memoryview:
    return view.cast("B").cast("Q", (view.nbytes // 16, 2)) if view.nbytes else view.cast("B").cast("Q")


def _problem(frame: Frame) -> str | None:
    """What makes no sense in a frame, for itself."""
    if not len(frame.runs) or not 0 <= frame.region < 2**32:
        return "a frame has runs, of a region whose number is less than 2^32"
    if frame.kind == FrameKind.ZEROS:
        plain = not frame.stored_nbytes and frame.codec == Codec.NONE and not frame.encrypted
        return None if plain and frame.plain_nbytes == frame.packed_nbytes else "a frame of zeros stores nothing"
    if max(frame.stored_nbytes, frame.plain_nbytes) > MOST_FRAME_NBYTES:
        return f"a frame has {MOST_FRAME_NBYTES} bytes at most"
    if frame.kind == FrameKind.PAGES and frame.plain_nbytes != frame.packed_nbytes:
        return "a frame's bytes are as many as its runs'"
    if frame.kind == FrameKind.DELTA and not frame.plain_nbytes <= most_nbytes(frame.packed_nbytes):
        return "a delta is longer than one for its runs can be"
    if frame.codec == Codec.NONE and not frame.encrypted and frame.stored_nbytes != frame.plain_nbytes:
        return "a frame that is neither compressed nor encrypted is stored as it is"
    return None

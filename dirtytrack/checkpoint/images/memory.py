# SPDX-License-Identifier: MIT
"""The memory of an image: which of its bytes are kept, which are zero, which are a file's; read in bounded memory."""

from __future__ import annotations

import mmap
import os
import stat
from bisect import bisect_right
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ...errors import InvalidCheckpoint, KernelRefused, PermissionDenied
from ..reading import HeldFrames, Window, target_of
from ..segments import FRAME_NBYTES, FrameKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ..crew import Crew
    from ..manifests import RegionEntry
    from ..reading import Generation
    from .image import ImageMapping, Piece, ProcessImage

__all__ = ["HOLE_NBYTES", "ImageMemory", "Source", "Span", "require_options"]

HOLE_NBYTES = 1 << 20  # zeros that are fewer are kept in one piece with what is around them
_LEAST_MEMORY = 8 * FRAME_NBYTES
_NEAR_NBYTES = 32 << 10
_PAGE = 4096

Source = Literal["bytes", "zeros", "file", "unknown"]
"""Where the bytes of memory are: in a region; nowhere, being zero; in the file that is mapped; nobody knows."""


class Span(NamedTuple):
    """Memory, [start, end), whose bytes are all in one place."""

    start: int
    end: int
    source: Source
    mapping: ImageMapping
    region: RegionEntry | None = None
    offset: int = 0
    """Where it begins: in the region, or in the file."""

    def part(self, start: int, end: int) -> Span:
        """The part of it in [start, end)."""
        return self._replace(start=start, end=end, offset=self.offset + start - self.start)


class ImageMemory:
    """The memory of an image.

    Args:
        image: which.
        generation: that it is of, with a decoder. In use as long as this is.
        crew: who read.
        memory_bytes: how much memory reading takes, about.

    Thread safety: one thread at a time.
    """

    def __init__(self, image: ProcessImage, generation: Generation, crew: Crew, memory_bytes: int) -> None:
        self.image, self.generation, self._crew = image, generation, crew
        self.room_nbytes = max(memory_bytes // 4 // FRAME_NBYTES, 1) * FRAME_NBYTES
        """The most that is read at once."""
        self._held_nbytes = memory_bytes // 4
        self._room: mmap.mmap | None = None
        self._files: dict[tuple[str, str, int], str] = {}
        self._regions = {region.number: region for region in generation.manifest.regions}
        self.spans = tuple(self._spans())
        """By address; memory that is in none was not mapped."""
        self._starts = [span.start for span in self.spans]

    # ---- where bytes are

    def _spans(self) -> Iterator[Span]:
        told = _told(self.generation)
        for mapping in self.image.mappings:
            at = mapping.start
            for piece in mapping.pieces:
                if piece.start > at:
                    yield _rest(mapping, at, piece.start)
                yield from _of_piece(mapping, piece, self._regions[piece.region], told.get(piece.region, []))
                at = piece.end
            if at < mapping.end:
                yield _rest(mapping, at, mapping.end)

    def span_at(self, address: int) -> Span | None:
        """The span with that address, or None where nothing was mapped."""
        at = bisect_right(self._starts, address) - 1
        return self.spans[at] if at >= 0 and address < self.spans[at].end else None

    def is_still(self, mapping: ImageMapping) -> bool:
        """Whether the file that was mapped has its path still, was not written since, and can be read."""
        return self._look_at(mapping) == "still"

    def was_written(self, mapping: ImageMapping) -> bool:
        """Whether the file that was mapped has its path still, and was written since."""
        return self._look_at(mapping) == "written"

    def _look_at(self, mapping: ImageMapping) -> str:
        key = (mapping.path, mapping.device, mapping.inode)
        if key not in self._files:
            self._files[key] = _look_at(mapping, self.image.frozen_at)
        return self._files[key]

    def spans_from(self, address: int) -> Iterator[Span]:
        """The span with that address, which is mapped, and all behind it."""
        for at in range(max(bisect_right(self._starts, address) - 1, 0), len(self.spans)):
            yield self.spans[at]

    # ---- reading

    def read(self, spans: Iterable[Span]) -> Iterator[tuple[Span, memoryview]]:
        """The bytes of spans, in order; those that are longer than the memory that may be taken come in parts.

        Yields:
            What was read, and its bytes, which are good until the next is asked for.

        Raises:
            DamagedCheckpoint, InvalidCheckpoint, StoreFailed: as `Generation.read`.
            KernelRefused, PermissionDenied: a file cannot be read.
        """
        if self._room is None:
            self._room = mmap.mmap(-1, self.room_nbytes)
        held = HeldFrames(self._held_nbytes)
        room, batch, used = memoryview(self._room), list[tuple[Span, memoryview]](), 0
        for span in spans:
            start = span.start
            while start < span.end:
                nbytes = min(span.end - start, self.room_nbytes - used)
                batch.append((span.part(start, start + nbytes), room[used : used + nbytes]))
                start, used = start + nbytes, used + nbytes
                if used == self.room_nbytes:
                    self.fill(batch, held)
                    yield from batch
                    batch, used = [], 0
        self.fill(batch, held)
        yield from batch

    def fill(self, parts: Sequence[tuple[Span, memoryview]], held: HeldFrames | None = None) -> None:
        """Put the bytes of spans into buffers of as many bytes; raises as `read`."""
        windows: list[Window] = []
        copies: list[tuple[memoryview, memoryview]] = []
        apart = 0
        for group in _grouped(parts):
            span, view = group[0]
            if span.source == "file":
                _read_file(span, view)
            elif span.region is None:
                view[:] = bytes(len(view))
            elif len(group) == 1:
                windows.append(Window(span.region, span.offset, target_of(view)))
            else:
                whole = memoryview(bytearray(_end(group[-1][0]) - span.offset))
                windows.append(Window(span.region, span.offset, target_of(whole)))
                copies += ((each, whole[one.offset - span.offset :][: len(each)]) for one, each in group)
                apart += len(whole)
                if apart >= self.room_nbytes:
                    self._fill(windows, copies, held)
                    apart = 0
        self._fill(windows, copies, held)

    def _fill(
        self, windows: list[Window], copies: list[tuple[memoryview, memoryview]], held: HeldFrames | None
    ) -> None:
        if windows:
            self.generation.read(windows, self._crew, held)
        for view, data in copies:
            view[:] = data
        windows.clear()
        copies.clear()

    def held(self) -> HeldFrames:
        """For `fill` of what comes in order."""
        return HeldFrames(self._held_nbytes)

    def bytes_at(self, address: int, nbytes: int) -> bytes | None:
        """A few bytes, or None where not all of them are in one place that is known."""
        span = self.span_at(address)
        if span is None or address + nbytes > span.end or span.source == "unknown":
            return None
        if span.source == "file" and not self.is_still(span.mapping):
            return None
        data = bytearray(nbytes)
        self.fill([(span.part(address, address + nbytes), memoryview(data))])
        return bytes(data)


def _grouped(parts: Sequence[tuple[Span, memoryview]]) -> Iterator[list[tuple[Span, memoryview]]]:
    """Short parts that are near to one another in a region together: one read gets them, which decodes a frame once."""
    group: list[tuple[Span, memoryview]] = []
    for part in parts:
        span = part[0]
        if group:
            first, last = group[0][0], group[-1][0]
            near = span.region is last.region is not None and 0 <= span.offset - _end(last) <= _NEAR_NBYTES
            if not near or _end(span) - first.offset > FRAME_NBYTES:
                yield group
                group = []
        group.append(part)
    if group:
        yield group


def _end(span: Span) -> int:
    """Where it ends in its region."""
    return span.offset + span.end - span.start


def _look_at(mapping: ImageMapping, frozen_at: float) -> Literal["still", "written", "gone"]:
    """What became of a file that was mapped; it is gone, too, where it is hidden from us."""
    with suppress(OSError, ValueError):
        about = Path(mapping.path).stat()
        device = f"{os.major(about.st_dev):02x}:{os.minor(about.st_dev):02x}"
        # Behind some file systems (overlay, btrfs) /proc tells another device than stat does.
        same = about.st_ino == mapping.inode and (device == mapping.device or not os.major(about.st_dev))
        if same and stat.S_ISREG(about.st_mode) and os.access(mapping.path, os.R_OK):
            return "still" if about.st_mtime <= frozen_at else "written"
    return "gone"


def _read_file(span: Span, view: memoryview) -> None:
    try:
        with open(span.mapping.path, "rb", buffering=0) as file:
            done = 0
            while done < len(view) and (some := os.preadv(file.fileno(), [view[done:]], span.offset + done)):
                done += some
    except OSError as error:
        kind = PermissionDenied if isinstance(error, PermissionError) else KernelRefused
        raise kind(f"{span.mapping.path} cannot be read: {error.strerror}", errno=error.errno) from error
    view[done:] = bytes(len(view) - done)  # as the rest of a file's last page is


def require_options(memory_bytes: Any, threads: Any) -> None:
    """Refuse what makes no sense.

    Raises:
        InvalidCheckpoint.
    """
    if type(memory_bytes) is not int or memory_bytes < _LEAST_MEMORY:
        raise InvalidCheckpoint(f"memory_bytes= is a number from {_LEAST_MEMORY} on, not {memory_bytes!r}")
    if threads is not None and (type(threads) is not int or threads < 1):
        raise InvalidCheckpoint(f"threads= is a whole number from 1 on, not {threads!r}")


def _rest(mapping: ImageMapping, start: int, end: int) -> Span:
    """What was not saved of a mapping."""
    offset = mapping.offset + start - mapping.start
    if mapping.why == "file" or (mapping.why is None and mapping.is_file and not mapping.shared):
        return Span(start, end, "file", mapping, None, offset)
    if mapping.why == "empty" or (mapping.why is None and not mapping.is_file):
        return Span(start, end, "zeros", mapping)
    return Span(start, end, "unknown", mapping, None, offset)


def _of_piece(mapping: ImageMapping, piece: Piece, region: RegionEntry, told: list[tuple[int, int]]) -> Iterator[Span]:
    """What was saved: bytes, and zeros where a region has nothing else for a long way."""
    at, shift = piece.start, piece.start - piece.offset
    for low, high in _clipped(told, piece.offset, piece.offset + piece.end - piece.start):
        start = max((low + shift) // _PAGE * _PAGE, at)
        end = min(-(-(high + shift) // _PAGE) * _PAGE, piece.end)
        if start > at:
            yield Span(at, start, "zeros", mapping)
        if end > start:
            yield Span(start, end, "bytes", mapping, region, start - shift)
        at = max(at, end)
    if at < piece.end:
        yield Span(at, piece.end, "zeros", mapping)


def _told(generation: Generation) -> dict[int, list[tuple[int, int]]]:
    """Where regions, by number, may have bytes that are not zero; holes that are small are within."""
    spans: dict[int, list[tuple[int, int]]] = {}
    for frame in generation.frames():
        if frame.kind == FrameKind.ZEROS:
            continue
        flat = frame.runs.cast("B").cast("Q")
        within = spans.setdefault(frame.region, [])
        begin, end = flat[0], flat[-2] + flat[-1]
        if end - begin <= frame.packed_nbytes + HOLE_NBYTES:
            within.append((begin, end))
        else:
            within += [(at, at + nbytes) for at, nbytes in zip(flat[::2], flat[1::2], strict=True)]
    return {number: _joined(sorted(each)) for number, each in spans.items()}


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for low, high in spans:
        if found and low - found[-1][1] < HOLE_NBYTES:
            found[-1] = found[-1][0], max(found[-1][1], high)
        else:
            found.append((low, high))
    return found


def _clipped(spans: list[tuple[int, int]], low: int, high: int) -> Iterator[tuple[int, int]]:
    """Those within [low, high)."""
    for start, end in spans[max(bisect_right(spans, (low,)) - 1, 0) :]:
        if start >= high:
            return
        if end > low:
            yield max(start, low), min(end, high)

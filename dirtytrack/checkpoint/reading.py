# SPDX-License-Identifier: MIT
"""Reading a generation into memory: all of a region, or a window of it; in several threads, every byte checked."""

from __future__ import annotations

import errno
import os
import threading
from array import array
from bisect import bisect_left, bisect_right
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from ..delta import Delta, apply
from ..errors import DamagedCheckpoint, InvalidCheckpoint, InvalidDelta, InvalidMemory, StoreFailed
from ..kernel import core
from ..kernel.packing import pack, unpack
from .crew import let_go
from .segments import Codec, FrameKind, SegmentReader
from .sparse import HOLE_NBYTES, but_holes

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from .coding import Decoder
    from .crew import Crew
    from .manifests import Manifest, RegionEntry, SegmentEntry
    from .protocols import Source, Store
    from .segments import Frame

__all__ = ["Generation", "HeldFrames", "Target", "Window", "letting_go", "reading_threads", "target_of"]

_MOST_THREADS = 8


def reading_threads() -> int:
    """How many threads read where nobody says: the processors that this process may use, up to eight."""
    return max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0))))


class _Scratch(threading.local):
    """Room that each thread has for itself, so that no frame costs an allocation."""

    def __init__(self) -> None:
        self._rooms: dict[str, memoryview] = {}

    def room(self, what: str, nbytes: int) -> memoryview:
        """That many bytes, of what was left there."""
        room = self._rooms.get(what)
        if room is None or len(room) < nbytes:
            room = self._rooms[what] = memoryview(bytearray(max(nbytes, 1 << 20)))
        return room[:nbytes]


@contextmanager
def letting_go() -> Iterator[None]:
    """Errors that come out of here hold no buffers: see `let_go`."""
    try:
        yield
    except BaseException as error:
        let_go(error)
        raise


# ---- where bytes go


class Target(NamedTuple):
    """Memory that bytes are put into, which the caller holds."""

    address: int
    nbytes: int
    view: memoryview | None
    """None where pages may vanish: bytes are then copied there by the core, which tells it."""
    fresh: bool = False
    """Whether all of it is zero."""

    def first(self, nbytes: int) -> Target:
        """Its beginning."""
        return self._replace(nbytes=nbytes, view=None if self.view is None else self.view[:nbytes])


class Window(NamedTuple):
    """The bytes [low, low + target.nbytes) of a region, and where they go."""

    region: RegionEntry
    low: int
    target: Target


def target_of(buffer: Any, *, fresh: bool = False) -> Target:
    """A writable, contiguous buffer as a target, which it keeps."""
    pinned = core.pin(buffer, writable=True)
    return Target(core.address_of(pinned), len(pinned), core.view_of(pinned, len(pinned)), fresh)


# ---- what is read


class _Part(NamedTuple):
    """The frames of one region in one segment."""

    frames: list[Frame]
    starts: list[int]
    ends: list[int]
    ascending: bool
    """Whether each begins where none before it reaches."""

    def within(self, low: int, high: int) -> Sequence[Frame]:
        """Those that may have bytes in [low, high)."""
        if self.ascending:
            return self.frames[bisect_right(self.ends, low) : bisect_left(self.starts, high)]
        return [
            frame
            for frame, start, end in zip(self.frames, self.starts, self.ends, strict=True)
            if start < high and end > low
        ]


class _Segment(NamedTuple):
    reader: SegmentReader
    """Its source is closed: chains are longer than a process may have files open."""
    parts: dict[int, _Part]


class Generation:
    """A generation, with the frames that make it. All that its manifest and indexes can tell is checked here.

    Args:
        store: which; `Store.reading` as long as this is used.
        manifest: of the generation.
        names: of the regions that are looked for; all where left out.
        decoder: for its frames; without one no bytes can be read.

    Raises:
        DamagedCheckpoint: a segment is missing, or its header or index is not what was written. All that are are told.
        InvalidCheckpoint: what the indexes say makes no sense: bytes that no frame tells, or two of one segment do.

    Thread safety: one thread at a time.
    """

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        names: Collection[str] | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        self.manifest, self._store, self._decoder = manifest, store, decoder
        self.regions = tuple(region for region in manifest.regions if names is None or region.name in names)
        self._segments: list[_Segment] = []
        self._first: dict[int, int] = {}  # by region: the segment that its first bytes are in
        self._scratch = _Scratch()
        damage: list[str] = []
        for entry in manifest.segments:
            try:
                self._segments.append(self._segment(entry))
            except DamagedCheckpoint as error:
                damage += error.damage
            except StoreFailed as error:
                damage.append(_unreadable(error))
        if damage:
            raise _damaged(manifest, damage)
        self._require_whole()

    def _segment(self, entry: SegmentEntry) -> _Segment:
        known = {region.number: region.nbytes for region in self.manifest.regions if region.since <= entry.generation}
        wanted = {region.number for region in self.regions} & known.keys()
        parts: dict[int, _Part] = {}
        with SegmentReader(self._store.open_segment(entry.name), entry, self._store.store_id) as reader:
            for frame in reader.frames(known):
                if frame.region in wanted:
                    part = parts.get(frame.region) or parts.setdefault(frame.region, _Part([], [], [], True))
                    part.frames.append(frame)
                    part.starts.append(frame.runs[0, 0])
                    part.ends.append(frame.runs[-1, 0] + frame.runs[-1, 1])
        for number, part in parts.items():
            if any(start < end for start, end in zip(part.starts[1:], part.ends, strict=False)):
                parts[number] = part._replace(ascending=False)
        return _Segment(reader, parts)

    def _require_whole(self) -> None:
        """Each byte is told by some frame, before any delta of it; and in one segment by one frame alone: those are
        read in any order."""
        covers = {region.number: _Cover(region.nbytes) for region in self.regions}
        for index, segment in enumerate(self._segments):
            for number, part in segment.parts.items():
                if not part.ascending and _overlap(part.frames):
                    raise self._invalid(f"the segment {segment.reader.entry.name} tells bytes of region {number} twice")
                self._first.setdefault(number, index)
                cover = covers[number]
                if cover.missing is None:
                    continue
                if any(frame.kind == FrameKind.DELTA for frame in part.frames):
                    raise self._invalid(
                        f"the segment {segment.reader.entry.name} has a delta of region {number}, of which not all "
                        "bytes came before"
                    )
                cover.add(part.frames)
        for region in self.regions:
            if (missing := covers[region.number].missing) is not None:
                raise self._invalid(f"its segments have no bytes of {region.name!r} at {missing}")

    def _invalid(self, why: str) -> InvalidCheckpoint:
        return InvalidCheckpoint(
            f"generation {self.manifest.generation} of {self._store.name} cannot be restored: {why}"
        )

    def close(self) -> None:
        """Nothing is open: see `JoinedGeneration`."""

    @property
    def segment_count(self) -> int:
        """How many segments it is read from."""
        return len(self._segments)

    def frames(self) -> Iterator[Frame]:
        """Those that count, oldest segment first."""
        for segment in self._segments:
            for part in segment.parts.values():
                yield from part.frames

    def told_nbytes(self, number: int) -> int:
        """How many bytes of a region its frames tell that are not zeros; those that several tell, several times."""
        return sum(
            frame.packed_nbytes
            for segment in self._segments
            if number in segment.parts
            for frame in segment.parts[number].frames
            if frame.kind != FrameKind.ZEROS
        )

    def touched(self, number: int, low: int, high: int, since: int = 0, *, but_zeros: bool = False) -> bool:
        """Whether a frame of the segments from ``since`` on may have bytes of that window of a region; with
        ``but_zeros``, others than zeros."""
        return any(
            not but_zeros or any(frame.kind != FrameKind.ZEROS and _reaches(frame.runs, low, high) for frame in frames)
            for segment in self._segments[since:]
            if number in segment.parts and (frames := segment.parts[number].within(low, high))
        )

    # ---- reading

    def read(
        self,
        windows: Sequence[Window],
        crew: Crew,
        held: HeldFrames | None = None,
        count: Callable[[int], object] = int,
    ) -> None:
        """Put the bytes of these windows where they go, which do not overlap.

        Args:
            windows: which.
            crew: who do it.
            held: frames that the next window needs too.
            count: told of the stored bytes of each frame that is done, in this thread.

        Raises:
            DamagedCheckpoint: a frame is not what was written; some bytes have been put already.
            InvalidCheckpoint: a frame makes no sense, is encrypted without ``decrypt``, or with another key.
            StoreFailed: it cannot be read.
            RegionGone: a page vanished.
        """
        for index, segment in enumerate(self._segments):
            jobs = [
                (frame, window)
                for window in windows
                if (part := segment.parts.get(window.region.number))
                for frame in part.within(window.low, window.low + window.target.nbytes)
                if not (
                    frame.kind == FrameKind.ZEROS
                    and window.target.fresh
                    and self._first[window.region.number] == index  # nothing was put there yet
                )
            ]
            if not jobs:
                continue
            reader = segment.reader
            with self._told(), closing(self._store.open_segment(reader.entry.name)) as source:
                wanted = [frame for frame, _ in jobs if held is None or held.get(index, frame) is None]
                source.will_read((frame.offset, frame.stored_nbytes) for frame in wanted)

                def put(
                    job: tuple[Frame, Window],
                    index: int = index,
                    reader: SegmentReader = reader,
                    source: Source = source,
                ) -> int:
                    self._put(*job, index, reader, source, held)
                    return job[0].stored_nbytes

                for nbytes in crew.map(put, jobs):
                    count(nbytes)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except DamagedCheckpoint as error:
            raise _damaged(self.manifest, error.damage) from error
        except StoreFailed as error:
            raise _damaged(self.manifest, (_unreadable(error),)) from error

    def _put(
        self, frame: Frame, window: Window, index: int, reader: SegmentReader, source: Source, held: HeldFrames | None
    ) -> None:
        low, target = window.low, window.target
        if frame.codec == Codec.NONE and frame.kind == FrameKind.PAGES and not frame.encrypted and len(frame.runs) == 1:
            at, nbytes = frame.runs[0, 0] - low, frame.stored_nbytes
            if target.view is not None and 0 <= at <= target.nbytes - nbytes:
                reader.check(frame, source.read_summed(target.view[at : at + nbytes], frame.offset))
                return
        runs, begin, end = _clipped(frame.runs, low, low + target.nbytes)
        if not len(runs):
            return
        if frame.kind == FrameKind.ZEROS:
            if end - begin >= HOLE_NBYTES:
                runs = but_holes(target.address, runs)
            if len(runs):
                unpack(target.address, target.nbytes, runs, None, unpinned=target.view is None)
            return
        plain: Any = held.get(index, frame) if held is not None else None
        if plain is None:
            plain = self._plain(frame, reader, source)
        if held is not None:
            held.put(index, frame, plain if frame.runs[-1, 0] + frame.runs[-1, 1] > low + target.nbytes else None)
        unpinned = target.view is None
        if frame.kind == FrameKind.DELTA:
            packed = self._scratch.room("packed", frame.packed_nbytes)
            pack(target.address, target.nbytes, runs, packed[begin:end], unpinned=unpinned)
            try:
                apply(Delta.from_bytes(plain, target_nbytes=frame.packed_nbytes), packed)
            except (InvalidDelta, InvalidMemory) as error:
                raise self._invalid(f"the frame at {frame.offset} of {reader.entry.name}: {error}") from error
            plain = packed
        unpack(target.address, target.nbytes, runs, memoryview(plain)[begin:end], unpinned=unpinned)

    def _plain(self, frame: Frame, reader: SegmentReader, source: Source) -> Any:
        stored = self._scratch.room("stored", frame.stored_nbytes)
        reader.check(frame, source.read_summed(stored, frame.offset))
        assert self._decoder is not None, "who reads bytes has given one"
        try:
            return self._decoder.decode(frame, stored)
        except DamagedCheckpoint as error:
            raise reader.damaged(f"cannot be read: {error}") from error


class HeldFrames:
    """Frames that are needed again, as they come out of the codec; up to a bound.

    Thread safety: everything may be called from any thread.
    """

    def __init__(self, most_nbytes: int) -> None:
        self._left, self._frames = most_nbytes, dict[tuple[int, int], bytes]()
        self._mutex = threading.Lock()

    def get(self, index: int, frame: Frame) -> bytes | None:
        """One of a segment, or None where it is not held."""
        return self._frames.get((index, frame.offset))

    def put(self, index: int, frame: Frame, plain: Any | None) -> None:
        """Hold it, where there is room; or, with None, no longer."""
        key = (index, frame.offset)
        with self._mutex:
            if plain is None:
                self._left += len(self._frames.pop(key, b""))
            elif key not in self._frames and memoryview(plain).nbytes <= self._left:
                self._frames[key] = bytes(plain)
                self._left -= len(self._frames[key])


class _Cover:
    """Which bytes of a region are told."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes, self._spans = nbytes, list[tuple[int, int]]()

    @property
    def missing(self) -> int | None:
        """The first byte that is not; None where all are."""
        if not self._spans or self._spans[0][0]:
            return 0
        return self._spans[0][1] if self._spans[0][1] < self._nbytes else None

    def add(self, frames: Sequence[Frame]) -> None:
        """What these tell."""
        spans = self._spans + [(offset, offset + n) for frame in frames for offset, n in _pairs(frame.runs)]
        spans.sort()
        self._spans = spans[:1]
        for start, end in spans[1:]:
            if start <= self._spans[-1][1]:
                self._spans[-1] = self._spans[-1][0], max(end, self._spans[-1][1])
            else:
                self._spans.append((start, end))


def _pairs(runs: memoryview) -> Iterator[tuple[int, int]]:
    flat = iter(runs.cast("B").cast("Q"))
    return zip(flat, flat, strict=True)


def _overlap(frames: Sequence[Frame]) -> bool:
    spans = sorted((offset, offset + nbytes) for frame in frames for offset, nbytes in _pairs(frame.runs))
    return any(start < end for (start, _), (_, end) in zip(spans[1:], spans, strict=False))


def _reaches(runs: memoryview, low: int, high: int) -> bool:
    """Whether any of the runs has bytes in [low, high)."""
    flat = runs.cast("B").cast("Q")
    before = bisect_left(flat[::2], high)
    return before > 0 and flat[2 * before - 2] + flat[2 * before - 1] > low


def _clipped(runs: memoryview, low: int, high: int) -> tuple[Any, int, int]:
    """The runs within [low, high), offsets counted from there, flat; and which of the packed bytes are theirs."""
    flat = runs.cast("B").cast("Q")
    starts, lengths = flat[::2], flat[1::2]
    first, last = bisect_right(starts, low), bisect_left(starts, high)
    if first and starts[first - 1] + lengths[first - 1] > low:
        first -= 1
    if first >= last:
        return array("Q"), 0, 0
    total = sum(lengths[first:last])
    cut_begin = max(0, low - starts[first])
    cut_end = max(0, starts[last - 1] + lengths[last - 1] - high)
    begin = sum(lengths[:first]) + cut_begin
    end = begin + total - cut_begin - cut_end
    if not low and not cut_end:
        return flat[2 * first : 2 * last], begin, end
    clipped = array("Q", flat[2 * first : 2 * last])
    clipped[0] += cut_begin
    clipped[1] -= cut_begin
    clipped[-1] -= cut_end
    for at in range(0, len(clipped), 2):
        clipped[at] -= low
    return clipped, begin, end


def _unreadable(error: StoreFailed) -> str:
    if error.errno != errno.EIO:  # all else is not the bytes' fault
        raise error
    return str(error)


def _damaged(manifest: Manifest, damage: Sequence[str]) -> DamagedCheckpoint:
    return DamagedCheckpoint(
        f"generation {manifest.generation} is damaged: {'; '.join(damage)}",
        generation=manifest.generation,
        damage=tuple(damage),
    )

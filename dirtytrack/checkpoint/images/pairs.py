# SPDX-License-Identifier: MIT
"""Which memory of two images is the same memory, and what it differs in."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from functools import partial
from mmap import mmap
from typing import TYPE_CHECKING, Literal, NamedTuple

from ...delta import Delta, diff
from ...kernel.packing import all_zero, xxh64

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from ..reading import HeldFrames
    from .image import ImageMapping
    from .memory import ImageMemory, Span

__all__ = ["Compared", "Comparing", "Pair", "pairs"]

_PAGE = 4096
_LOOKED_NBYTES = 16 * _PAGE
_FEW_NBYTES = 16 * _PAGE  # to begin a comparison in C takes as long as one of so many pages
_CUT_NBYTES = 1 << 20  # what may have changed is found in pieces of this


class Pair(NamedTuple):
    """Memory of two images, or of one: [start, start + nbytes) in the newer one, where that has it.

    ``shift`` is how much higher it is there than in the older one.
    """

    what: Literal["same", "moved", "appeared", "vanished", "grown", "shrunk"]
    older: ImageMapping | None
    newer: ImageMapping | None
    start: int
    nbytes: int
    shift: int = 0


def pairs(before: ImageMemory, after: ImageMemory) -> list[Pair]:
    """All memory of two images, once: what is in both, by address or by content, and what is in one."""
    older, newer = before.image.mappings, after.image.mappings
    found: list[Pair] = []
    common: tuple[dict[int, list[tuple[int, int]]], ...] = (defaultdict(list), defaultdict(list))
    at = 0
    for mapping in newer:
        while at < len(older) and older[at].end <= mapping.start:
            at += 1
        for other in _until(older, at, mapping.end):
            start, end = max(other.start, mapping.start), min(other.end, mapping.end)
            if start < end and _alike(other, mapping, 0):
                found.append(Pair("same", other, mapping, start, end - start))
                common[0][other.start].append((start, end))
                common[1][mapping.start].append((start, end))
    gone = [left for mapping in older for left in _left(mapping, common[0][mapping.start])]
    come = [left for mapping in newer for left in _left(mapping, common[1][mapping.start])]
    moved_from, moved_to = dict[int, int](), dict[int, int]()  # by where it was, and is: how many bytes
    for was, now in _moved(before, gone, after, come):
        nbytes = moved_from[was.start] = moved_to[now.start] = min(was.nbytes, now.nbytes)
        found.append(Pair("moved", was.mapping, now.mapping, now.start, nbytes, now.start - was.start))
    for left in gone:
        at = moved_from.get(left.start, 0)
        if at < left.nbytes:
            what: Literal["shrunk", "vanished"] = "shrunk" if left.part or at else "vanished"
            found.append(Pair(what, left.mapping, None, left.start + at, left.nbytes - at))
    for left in come:
        at = moved_to.get(left.start, 0)
        if at < left.nbytes:
            kind: Literal["grown", "appeared"] = "grown" if left.part or at else "appeared"
            found.append(Pair(kind, None, left.mapping, left.start + at, left.nbytes - at))
    return found


def _until(mappings: Sequence[ImageMapping], at: int, end: int) -> Iterator[ImageMapping]:
    while at < len(mappings) and mappings[at].start < end:
        yield mappings[at]
        at += 1


def _alike(one: ImageMapping, other: ImageMapping, shift: int) -> bool:
    """Whether two mappings map the same: the same bytes of a file, or none."""
    if one.shared != other.shared or one.is_file != other.is_file:
        return False
    if not one.is_file:
        return True
    same = (one.path, one.inode, one.device) == (other.path, other.inode, other.device)
    return same and one.offset - one.start == other.offset - other.start + shift


class _Left(NamedTuple):
    """A mapping that the other image does not have there, or the part of one that it does not have."""

    mapping: ImageMapping
    start: int
    nbytes: int
    part: bool


def _left(mapping: ImageMapping, common: Sequence[tuple[int, int]]) -> Iterator[_Left]:
    """What of a mapping is not common, of which start and end are given, in order."""
    at = mapping.start
    for start, end in (*common, (mapping.end, mapping.end)):
        if start > at:
            yield _Left(mapping, at, start - at, bool(common))
        at = end


# ---- what was moved


def _moved(
    before: ImageMemory, gone: Sequence[_Left], after: ImageMemory, come: Sequence[_Left]
) -> list[tuple[_Left, _Left]]:
    """What is elsewhere now: of files by what is mapped, other memory by pages at its beginning."""
    files: dict[tuple[object, ...], list[_Left]] = defaultdict(list)
    for left in come:
        if left.mapping.is_file:
            files[_file_key(left)].append(left)
    found = [(left, files[_file_key(left)].pop(0)) for left in gone if left.mapping.is_file and files[_file_key(left)]]
    places: dict[tuple[object, ...], list[int]] = defaultdict(list)
    nameless = [left for left in come if not left.mapping.is_file]
    for number, page, digest in _first_pages(after, nameless):
        places[nameless[number].mapping.permissions, page, digest].append(number)
    candidates = [left for left in gone if not left.mapping.is_file] if places else []
    alike: dict[int, Counter[int]] = defaultdict(Counter)
    looked = Counter[int]()
    for number, page, digest in _first_pages(before, candidates):
        looked[number] += 1
        alike[number].update(places.get((candidates[number].mapping.permissions, page, digest), ()))
    taken = set[int]()
    for number, counted in sorted(alike.items()):
        for other, count in counted.most_common():
            if other not in taken and 2 * count >= looked[number]:
                taken.add(other)
                found.append((candidates[number], nameless[other]))
                break
    return found


def _file_key(left: _Left) -> tuple[object, ...]:
    mapping = left.mapping
    offset = mapping.offset + left.start - mapping.start
    return mapping.path, mapping.inode, mapping.device, offset, left.nbytes, mapping.permissions


def _first_pages(memory: ImageMemory, lefts: Sequence[_Left]) -> Iterator[tuple[int, int, int]]:
    """Number of what is left, number of the page in it, and a checksum: of pages at the beginning that are not zero."""
    starts = [left.start for left in lefts]

    def wanted() -> Iterator[Span]:
        for left in lefts:
            end = left.start + min(left.nbytes, _LOOKED_NBYTES)
            for span in memory.spans_from(left.start):
                if span.start >= end:
                    break
                if span.source == "bytes":
                    yield span.part(max(span.start, left.start), min(span.end, end))

    for span, data in memory.read(wanted()):
        number = bisect_right(starts, span.start) - 1
        for at in range(0, len(data), _PAGE):
            page = data[at : at + _PAGE]
            if not all_zero(page):
                yield number, (span.start + at - starts[number]) // _PAGE, xxh64(page)


# ---- what differs


class Compared(NamedTuple):
    """What memory that both images have differs in: see `MappingDifference`."""

    changed_pages: int
    changed_nbytes: int
    unknown_nbytes: int
    runs: tuple[tuple[int, int], ...]


class _Part(NamedTuple):
    """[start, end) of the newer image, which is all in one place in each."""

    start: int
    end: int
    older: Span
    newer: Span


class Comparing:
    """Compares memory of two images.

    Args:
        before, after: they.
        common: how many of their segments, from the oldest on, are the same.
        take: told of bytes that differ: their address in the newer image, those of the older and of the newer one, and
            what gives the runs of bytes that differ, as start and end in these.
        progress: see `compare_images`.

    Thread safety: one thread at a time.
    """

    def __init__(
        self,
        before: ImageMemory,
        after: ImageMemory,
        common: int,
        take: Callable[[int, memoryview, memoryview, Callable[[], Sequence[tuple[int, int]]]], object],
        progress: Callable[[int, int], object] | None,
    ) -> None:
        self._both, self._common, self._take, self._progress = (before, after), common, take, progress
        self._rooms = mmap(-1, before.room_nbytes), mmap(-1, after.room_nbytes)
        self._done = self._total = 0

    def following(self, matched: Sequence[Pair]) -> Iterator[Pair]:
        """These, of which it is told how many are done."""
        self._total = sum(pair.nbytes for pair in matched)
        for pair in matched:
            yield pair
            self._done += pair.nbytes
            if self._progress is not None:
                self._progress(self._done, self._total)

    def compare(self, pair: Pair) -> Compared:
        """What the memory of a pair differs in."""
        unknown, differing = 0, list[tuple[int, int]]()
        pages = nbytes = used = 0
        batch: list[_Part] = []
        held = [memory.held() for memory in self._both]

        def look() -> None:
            nonlocal pages, nbytes
            for each, changed in self._differing(batch, held):
                nbytes += changed
                pages += sum(n for _, n in each) // _PAGE
                differing.extend(each)

        for part in self._parts(pair):
            if "unknown" in (part.older.source, part.newer.source) or not self._readable(part):
                unknown += part.end - part.start
                continue
            if used + part.end - part.start > len(self._rooms[0]):
                look()
                batch, used = [], 0
            batch.append(part)
            used += part.end - part.start
        look()
        return Compared(pages, nbytes, unknown, _joined(differing))

    # ---- what is to be compared

    def _parts(self, pair: Pair) -> Iterator[_Part]:
        """Those that may differ, and are short."""
        for part in _overlaid(*self._both, pair):
            for start in range(part.start, part.end, _CUT_NBYTES):
                end = min(start + _CUT_NBYTES, part.end)
                older = part.older.part(start - pair.shift, end - pair.shift)
                cut = _Part(start, end, older, part.newer.part(start, end))
                if self._may_differ(cut):
                    yield cut

    def _may_differ(self, part: _Part) -> bool:
        older, newer = part.older, part.newer
        if older.source == newer.source == "zeros":
            return False
        if older.source == newer.source == "file":
            return self._both[0].was_written(older.mapping)
        one, other = older.region, newer.region
        if one is None or other is None:
            return True
        if (one.number, one.since, older.offset) != (other.number, other.since, newer.offset):
            return True
        low, high = older.offset, older.offset + part.end - part.start
        return any(memory.generation.touched(one.number, low, high, self._common) for memory in self._both)

    def _readable(self, part: _Part) -> bool:
        """Whether the file is still what it was, of what is in one."""
        return all(
            span.source != "file" or memory.is_still(span.mapping)
            for span, memory in zip((part.older, part.newer), self._both, strict=True)
        )

    # ---- comparing

    def _differing(
        self, parts: Sequence[_Part], held: Sequence[HeldFrames]
    ) -> Iterator[tuple[list[tuple[int, int]], int]]:
        """Of each part that differs: the pages, by address, as runs; and how many bytes."""
        places, used = list[tuple[_Part, memoryview, memoryview]](), 0
        views = [memoryview(room) for room in self._rooms]
        for part in parts:
            end = used + part.end - part.start
            places.append((part, views[0][used:end], views[1][used:end]))
            used = end
        self._both[0].fill([(part.older, view) for part, view, _ in places], held[0])
        self._both[1].fill([(part.newer, view) for part, _, view in places], held[1])
        for part, older, newer in places:
            if len(newer) <= _FEW_NBYTES and bytes(older) == bytes(newer):
                continue
            found = diff(newer, older, granule=_PAGE)
            if found:
                exact = diff(newer, older, granule=1)
                self._take(part.start, older, newer, partial(_runs, exact))
                yield [(part.start + start, end - start) for start, end in _runs(found)], exact.changed_nbytes


def _runs(delta: Delta) -> list[tuple[int, int]]:
    """Start and end of what it changes."""
    return [(offset, offset + len(data)) for offset, data in delta]


def _joined(runs: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    found: list[tuple[int, int]] = []
    for start, nbytes in runs:
        if found and sum(found[-1]) == start:
            found[-1] = found[-1][0], found[-1][1] + nbytes
        else:
            found.append((start, nbytes))
    return tuple(found)


def _overlaid(before: ImageMemory, after: ImageMemory, pair: Pair) -> Iterator[_Part]:
    """The spans of both images, cut so that each is in one place in both."""
    at, end = pair.start, pair.start + pair.nbytes
    ours = after.spans_from(at)
    theirs = before.spans_from(at - pair.shift)
    newer, older = next(ours), next(theirs)
    while at < end:
        stop = min(end, newer.end, older.end + pair.shift)
        yield _Part(at, stop, older, newer)
        at = stop
        if newer.end == at and at < end:
            newer = next(ours)
        if older.end + pair.shift == at and at < end:
            older = next(theirs)

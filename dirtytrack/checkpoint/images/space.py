# SPDX-License-Identifier: MIT
"""The stretches of address space that an image's regions are."""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

from ...dirtyset import DirtySet
from ...kernel import sets
from ..manifests import RegionEntry

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ...kernel.core import CData

__all__ = ["Ranges", "Space", "joined", "pages_of", "subtracted"]

Ranges = list[tuple[int, int]]
"""[start, end) addresses, sorted, disjoint, not touching."""


def joined(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Ranges in any order, which may overlap, as `Ranges`."""
    out: Ranges = []
    for start, end in sorted(ranges):
        if out and start <= out[-1][1]:
            out[-1] = out[-1][0], max(out[-1][1], end)
        elif start < end:
            out.append((start, end))
    return out


def subtracted(ranges: Ranges, taken: Ranges) -> Ranges:
    """What is in the first and not in the second."""
    return [(int(start), int(end)) for start, end in pages_of(ranges) - pages_of(taken)]


def pages_of(ranges: Ranges) -> DirtySet:
    """As a set."""
    return DirtySet.from_runs(ranges)


class _Stretch(NamedTuple):
    start: int
    end: int
    number: int
    since: int


class Space:
    """Which stretch of address space is which region. Immutable.

    A stretch may grow at its end while it keeps its number, and never shrinks: what is no longer mapped within it
    becomes zeros. It goes when nothing in it is saved any more.
    """

    def __init__(self, stretches: Iterable[_Stretch] = (), live: DirtySet | None = None, following: int = 0) -> None:
        self._stretches = tuple(stretches)
        self._starts = [each.start for each in self._stretches]
        self.live = pages_of([]) if live is None else live
        """What is saved."""
        self._following = following

    def __len__(self) -> int:
        return len(self._stretches)

    def moved_to(self, saved: DirtySet, generation: int) -> tuple[Space, DirtySet, DirtySet]:
        """What it is when these are saved.

        Returns:
            The new one; what of it was not saved before, which nobody knows the bytes of; and what of its stretches is
            no longer saved.
        """
        if saved == self.live:
            return self, pages_of([]), pages_of([])
        kept = [each for each in self._stretches if sets.intersects(saved._set, each.start, each.end)]
        following, missing = self._following, saved - pages_of(joined(each[:2] for each in kept))
        ends = {each.end: at for at, each in enumerate(kept)}
        for run in missing:
            start, end = int(run.start), int(run.end)
            at = ends.pop(start, None)
            if at is None:
                kept.append(_Stretch(start, end, following, generation))
                following += 1
            else:
                kept[at] = kept[at]._replace(end=end)
        space = Space(sorted(kept), saved, following)
        return space, saved - self.live, (self.live - saved) & pages_of(space.ranges)

    @property
    def ranges(self) -> Ranges:
        """Of all stretches."""
        return joined(each[:2] for each in self._stretches)

    def renewed(self) -> Space:
        """One that knows nothing, and goes on with the numbers."""
        return Space(following=self._following)

    def regions(self) -> tuple[RegionEntry, ...]:
        """As a manifest has them."""
        ordered = sorted(self._stretches, key=lambda each: each.number)
        return tuple(
            RegionEntry(each.number, f"{each.start:012x}", each.end - each.start, since=each.since) for each in ordered
        )

    def extents(self) -> CData:
        """As what is cut into frames; by address."""
        return sets.extents([sets.Extent(each.start, each.end - each.start, False) for each in self._stretches])

    def number(self, index: int) -> int:
        """Of the stretch at an index of `extents`."""
        return self._stretches[index].number

    def start(self, index: int) -> int:
        """Where the stretch at an index of `extents` begins."""
        return self._stretches[index].start

    def parts(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Where [start, end), all of it saved, is: region, offset in it, nbytes; in the order of the addresses."""
        at = max(0, bisect_right(self._starts, start) - 1)
        while start < end:
            stretch = self._stretches[at]
            nbytes = min(end, stretch.end) - start
            yield stretch.number, start - stretch.start, nbytes
            start += nbytes
            at += 1

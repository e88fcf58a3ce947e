# SPDX-License-Identifier: MIT
"""Which pages were written in one or several epochs: page by page, or how many in each cell of 2ⁿ pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import InvalidRecording, LimitReached
from .arrays import np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Numbers = NDArray[np.int64]

__all__ = ["Written", "require_room", "union_of"]

_MOST_CELLS = 1 << 27
"""That are looked at one by one, 8 bytes each in several arrays: 512 GiB of pages. Runs have no such limit."""


def require_room(cells: int) -> None:
    """Refuse to look at so many pages or cells one by one, rather than to take all memory.

    Raises:
        LimitReached: they are too many.
    """
    if cells > _MOST_CELLS:
        raise LimitReached(
            f"{cells} pages or cells are told as written, and no more than {_MOST_CELLS} are looked at one by one. Was "
            "a huge reservation of addresses recorded? Leave it out by exclude=",
            feature="pages",
        )


@dataclass(frozen=True, eq=False)
class Written:
    """Sorted, disjoint runs of cells; in each cell of a run as many pages were written at least once.

    Cells of one page are full resolution. ``starts`` and ``lengths`` count cells (from address 0), ``counts`` is the
    pages written in each cell of the run: from 1 to all of them. Where several epochs were put together by cells, it
    is never less than what was written, and may be more: the cell's pages of each are added up, not compared.
    """

    unit_log2: int
    starts: Numbers
    lengths: Numbers
    counts: Numbers

    @staticmethod
    def of(runs: memoryview, page_log2: int) -> Written:
        """What a set's runs, (n, 2) addresses, say: full resolution.

        Raises:
            InvalidRecording: they are no whole pages, not sorted, not coalesced, or not such numbers at all.
        """
        found = np.asarray(runs)
        if found.dtype.kind not in "iu" or found.size % 2:
            raise InvalidRecording(f"runs are pairs of addresses, not {found.size} items of type {found.dtype}")
        edges = found.reshape(-1).astype(np.int64)
        if (edges & ((1 << page_log2) - 1)).any() or (edges[1:] <= edges[:-1]).any() or (edges[:1] < 0).any():
            raise InvalidRecording(f"runs are sorted, disjoint, and of whole pages of {1 << page_log2} bytes")
        pages = edges.reshape(-1, 2) >> page_log2
        starts, lengths = np.ascontiguousarray(pages[:, 0]), pages[:, 1] - pages[:, 0]
        return Written(0, starts, lengths, np.ones(len(starts), np.int64))

    @property
    def unit_pages(self) -> int:
        """Pages in a cell."""
        return 1 << self.unit_log2

    @property
    def page_count(self) -> int:
        """Pages that were written."""
        return int((self.lengths * self.counts).sum())

    def coarser(self, unit_log2: int) -> Written:
        """The same in larger cells."""
        if unit_log2 <= self.unit_log2:
            return self
        shift = unit_log2 - self.unit_log2
        ends = self.starts + self.lengths
        first, last = self.starts >> shift, (ends - 1) >> shift
        spread = last - first + 1  # how many large cells each run touches
        require_room(int(spread.sum()))
        which = np.repeat(np.arange(len(spread)), spread)
        nth = np.arange(len(which)) - np.repeat(np.cumsum(spread) - spread, spread)
        cells = first[which] + nth
        low = np.maximum(cells << shift, self.starts[which])
        high = np.minimum((cells + 1) << shift, ends[which])
        return _summed(unit_log2, cells, (high - low) * self.counts[which])

    def __or__(self, other: Written) -> Written:
        """What was written in either: exact where both are at full resolution, else no less than that."""
        if not self.unit_log2 and not other.unit_log2:
            return _united(self, other)
        unit_log2 = max(self.unit_log2, other.unit_log2)
        cells, counts = [], []
        for part in (self.coarser(unit_log2), other.coarser(unit_log2)):
            require_room(int(part.lengths.sum()))
            which = np.repeat(np.arange(len(part.starts)), part.lengths)
            nth = np.arange(len(which)) - np.repeat(np.cumsum(part.lengths) - part.lengths, part.lengths)
            cells.append(part.starts[which] + nth)
            counts.append(part.counts[which])
        both, pages = np.concatenate(cells), np.concatenate(counts)
        order = np.argsort(both, kind="stable")
        return _summed(unit_log2, both[order], pages[order])


def union_of(parts: Sequence[Written]) -> Written:
    """What was written in any of them; at least one is given. Two by two, so that it stays near linear."""
    level = list(parts)
    while len(level) > 1:
        pairs = [a | b for a, b in zip(level[::2], level[1::2], strict=False)]
        level = pairs + level[len(pairs) * 2 :]
    return level[0]


def _united(a: Written, b: Written) -> Written:
    starts = np.concatenate((a.starts, b.starts))
    order = np.argsort(starts, kind="stable")
    starts = starts[order]
    ends = np.maximum.accumulate(np.concatenate((a.starts + a.lengths, b.starts + b.lengths))[order])
    if not len(starts):
        return a
    apart = starts[1:] > ends[:-1]
    first = starts[np.concatenate(([True], apart))]
    last = ends[np.concatenate((apart, [True]))]
    return Written(0, first, last - first, np.ones(len(first), np.int64))


def _summed(unit_log2: int, cells: Numbers, pages: Numbers) -> Written:
    """Cells in order, each perhaps several times: add up, cut off at a whole cell, join neighbours that are alike."""
    if not len(cells):
        return Written(unit_log2, cells, cells, cells)
    begins = np.flatnonzero(np.concatenate(([True], cells[1:] != cells[:-1])))
    cells = cells[begins]
    counts = np.minimum(np.add.reduceat(pages, begins), 1 << unit_log2)
    fresh = np.concatenate(([True], (cells[1:] != cells[:-1] + 1) | (counts[1:] != counts[:-1])))
    begins = np.flatnonzero(fresh)
    lengths = np.diff(np.concatenate((begins, [len(cells)])))
    return Written(unit_log2, cells[begins], lengths.astype(np.int64), counts[begins])

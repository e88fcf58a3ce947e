# SPDX-License-Identifier: MIT
"""Sample, hot pages, and the written working set: how many distinct pages are written in a window, by its length.

The working set of a window of length T, averaged over all windows in a trace, is Denning's w(T) (P. J. Denning, The
working set model for program behavior, CACM 11(5), 1968), here of writes alone. It takes one pass over the trace for
all lengths at once, since a page is missing from exactly those windows that lie between two of its writes (P. J.
Denning and S. C. Schwartz, Properties of the working-set model, CACM 15(3), 1972; made exact for the trace's ends as by
X. Xiang et al., Linear-time modeling of program working set in shared cache, PACT 2011).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ..process.mappings import named
from .arrays import np
from .selecting import GONE, exact_tail
from .written import require_room, union_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from .recording import Epoch
    from .written import Numbers, Written

__all__ = ["HotRange", "HotSet", "Rate", "Trace", "WorkingSet", "rates"]


class Rate(NamedTuple):
    """A stretch of time, and how much was written in it."""

    begun: float
    ended: float
    pages: int
    """Each once an epoch; where epochs were put together, once in all of them."""
    bytes_per_second: float
    coarse: bool
    """Whether part of it was coarsened: it is then less than it was."""


def rates(epochs: Sequence[Epoch], parts: int = 60) -> list[Rate]:
    """What was written over time, in that many equal parts of it or fewer. An epoch counts where it lies, by its share;
    a part without any (between two sessions) has none."""
    if not epochs:
        return []
    begins = np.array([epoch.begun for epoch in epochs])
    ends = np.array([epoch.ended for epoch in epochs])
    pages = np.array([epoch.page_count for epoch in epochs], np.float64)
    first, last = float(begins[0]), float(ends[-1])
    count = max(1, min(parts, len(epochs)))
    edges = np.linspace(first, max(last, first), count + 1)
    # Pages written until each moment: a line within an epoch, a step where it lasted no time.
    until = np.concatenate(([0.0], np.cumsum(pages)))
    moments, heights = np.stack((begins, ends), 1).ravel(), np.stack((until[:-1], until[1:]), 1).ravel()
    at_edges = np.interp(edges, moments, heights)
    at_edges[0], at_edges[-1] = 0.0, until[-1]
    coarse = np.array([not epoch.exact for epoch in epochs])
    result = []
    for low, high, before, after in zip(edges[:-1], edges[1:], at_edges[:-1], at_edges[1:], strict=True):
        touched = coarse[(begins < high) & (ends > low)]
        written = float(after - before)
        rate = written * epochs[0].page_bytes / (high - low) if high > low else 0.0
        result.append(Rate(float(low), float(high), round(written), float(rate), bool(touched.any())))
    return result


@dataclass(frozen=True)
class WorkingSet:
    """w(T): the mean number of distinct pages that are written in a window of T epochs, over all such windows.

    Attributes:
        epoch_seconds: how long an epoch is, on average.
        pages: w(1), w(2), … up to the whole trace.
    """

    epoch_seconds: float
    pages: NDArray[np.float64]

    @property
    def seconds(self) -> float:
        """The longest window that it knows."""
        return len(self.pages) * self.epoch_seconds

    def __call__(self, seconds: float) -> float:
        """The mean number of pages in a window of that length; between two lengths by a line.

        What is less than an epoch is taken as one, and what is more than the trace by a line that goes on as its second
        half did. Both are too large rather than too small: w grows ever more slowly, where a program does not change.
        """
        count = len(self.pages)
        at = max(seconds / self.epoch_seconds, 1.0)
        if at > count:
            half = (count + 1) // 2
            slope = (self.pages[-1] - self.pages[half - 1]) / (count - half) if count > half else self.pages[-1]
            return float(self.pages[-1] + slope * (at - count))
        low = int(at)
        high = min(low + 1, count)
        return float(self.pages[low - 1] + (self.pages[high - 1] - self.pages[low - 1]) * (at - low))


class HotRange(NamedTuple):
    """Neighbouring pages of the hot set, in one mapping."""

    start: int
    end: int
    mapping: str
    share: float
    """Of all pages that were written, each counted once an epoch."""


class HotSet(NamedTuple):
    """The fewest pages that make up a given share of what is written."""

    share: float
    pages: int
    of_pages: int
    """All that were written."""
    ranges: tuple[HotRange, ...]
    """The largest, by what was written there."""


class Trace:
    """Epochs at full resolution, as a trace of page numbers; each page that was ever written has a number of its own.

    Args:
        epochs: of a recording; only the newest ones that were not coarsened are used.

    Raises:
        LimitReached: they wrote more pages than are looked at one by one.
    """

    def __init__(self, epochs: Sequence[Epoch]) -> None:
        self.epochs = exact_tail(epochs)
        self._union = union_of([epoch.written for epoch in self.epochs]) if self.epochs else None
        lengths = self._union.lengths if self._union is not None else np.zeros(0, np.int64)
        self._before = np.cumsum(lengths) - lengths  # pages in the runs before each
        self.page_count = int(lengths.sum())
        require_room(self.page_count)
        seconds = sum(epoch.seconds for epoch in self.epochs)
        self.epoch_seconds = seconds / len(self.epochs) if seconds else 1e-9
        self.seconds = seconds

    def __len__(self) -> int:
        return len(self.epochs)

    def _numbers(self, what: Written) -> Numbers:
        """Each page of an epoch by its number in the trace."""
        assert self._union is not None
        run = np.searchsorted(self._union.starts, what.starts, "right") - 1
        first = self._before[run] + what.starts - self._union.starts[run]
        inside = np.arange(int(what.lengths.sum())) - np.repeat(np.cumsum(what.lengths) - what.lengths, what.lengths)
        return np.repeat(first, what.lengths) + inside

    def __iter__(self) -> Iterator[Numbers]:
        return (self._numbers(epoch.written) for epoch in self.epochs)

    def working_set(self) -> WorkingSet:
        """w(T) for every T, in one pass over the trace."""
        count = len(self.epochs)
        last = np.full(self.page_count, -1, np.int64)
        gaps = np.zeros(count + 1, np.int64)  # how many stretches of so many epochs a page was not written in
        for now, pages in enumerate(self):
            gaps += np.bincount(now - last[pages] - 1, minlength=count + 1)
            last[pages] = now
        gaps += np.bincount(count - last - 1, minlength=count + 1)
        # A window of T epochs misses a page if it lies in such a stretch: a stretch of g has g - T + 1 windows.
        stretches = np.cumsum(gaps[::-1])[::-1]  # of T epochs or more
        missed = np.cumsum(stretches[::-1])[::-1]
        lengths = np.arange(1, count + 1)
        return WorkingSet(self.epoch_seconds, self.page_count - missed[1:] / (count - lengths + 1))

    def largest(self, window: int) -> int:
        """The most distinct pages in any window of that many epochs."""
        window = min(window, len(self.epochs))
        times = np.zeros(self.page_count, np.int32)
        distinct = largest = 0
        entering, leaving = iter(self), iter(self)
        for now, pages in enumerate(entering):
            distinct += int(np.count_nonzero(times[pages] == 0))
            times[pages] += 1
            if now >= window:
                gone = next(leaving)
                times[gone] -= 1
                distinct -= int(np.count_nonzero(times[gone] == 0))
            largest = max(largest, distinct)
        return largest

    def tiles(self, window: int) -> NDArray[np.int64]:
        """The distinct pages of one window after another, without what is over at the end."""
        begins = range(0, len(self.epochs) - window + 1, window)
        parts = ([epoch.written for epoch in self.epochs[begin : begin + window]] for begin in begins)
        return np.array([union_of(part).page_count for part in parts], np.int64)

    def hot_set(self, share: float = 0.9, ranges: int = 10) -> HotSet:
        """The fewest pages that make up that share of what is written.

        Args:
            share: from 0 to 1.
            ranges: how many of its ranges to name at most.
        """
        times = np.zeros(self.page_count, np.int64)
        for pages in self:
            times[pages] += 1
        total = int(times.sum())
        if self._union is None or not total:
            return HotSet(share, 0, self.page_count, ())
        order = np.argsort(-times, kind="stable")
        needed = int(np.searchsorted(np.cumsum(times[order]), share * total, "left")) + 1
        chosen = np.sort(order[: min(needed, len(order))])
        run = np.searchsorted(self._before, chosen, "right") - 1
        addresses = self._union.starts[run] + chosen - self._before[run]
        table = self.epochs[-1].mappings
        starts = np.array([mapping.start // self.epochs[0].page_bytes for mapping in table], np.int64)
        owner = np.searchsorted(starts, addresses, "right") - 1
        apart = np.flatnonzero((np.diff(addresses) != 1) | (np.diff(owner) != 0))
        begins, ends = np.append(0, apart + 1), np.append(apart, len(chosen) - 1)
        sums = np.add.reduceat(times[chosen], begins)
        largest = np.argsort(-sums, kind="stable")[:ranges]
        page_bytes = self.epochs[0].page_bytes
        found = []
        for i in largest.tolist():
            start, end = int(addresses[begins[i]]) * page_bytes, (int(addresses[ends[i]]) + 1) * page_bytes
            at = int(owner[begins[i]])
            inside = at >= 0 and table[at].end > start
            found.append(HotRange(start, end, named(table[at].name) if inside else GONE, int(sums[i]) / total))
        return HotSet(share, len(chosen), self.page_count, tuple(found))

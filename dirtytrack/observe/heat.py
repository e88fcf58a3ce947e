# SPDX-License-Identifier: MIT
"""Heat maps: how much of which memory was written when, counted in cells of address x time."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from ..dirtyset import DirtySet
from ..errors import InvalidRecording
from ..kernel.core import PAGE_BYTES
from .arrays import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..process.mappings import Mapping
    from .recording import Epoch, Recording

    Counts = NDArray[np.uint32]
    Shares = NDArray[np.float32]

__all__ = ["Column", "HeatMap", "Place", "Stretch", "heat_map"]

_MOST_STRETCHES = 64
_FOLD_SHARE = 64  # a gap is folded that is more than this part of what is shown
_UNITE_RUNS = 1 << 22  # 64 MiB of them


class Place(NamedTuple):
    """Where a mapping was: the last of those that were there in the recording's time."""

    start: int
    end: int
    name: str


class Stretch(NamedTuple):
    """Memory that is shown in one piece: rows of equal length, of which the last may be cut short."""

    start: int
    end: int
    first: int
    """Its first row, counted over all stretches."""
    rows: int


class Column(NamedTuple):
    """One or several epochs of a recording."""

    begun: float
    ended: float
    """In seconds since the recording's beginning."""
    seconds: float
    """How much of that was watched."""
    epochs: int
    """Of the recording: what was put together when it was coarsened is one."""
    number: int
    """Of the first."""
    coarse: int
    """Pages per cell of the coarsest: more than 1 where pages are known to some cell only."""


@dataclass(frozen=True, eq=False)
class HeatMap:
    """Pages written, by column (time) and row (address).

    Attributes:
        stretches: what of the address space is shown, in order; the gaps between them are folded. Memory that was never
            written is in none, unless it lies in a small gap.
        places: the mappings in these.
        columns: in order of time; there may be time between them in which nothing was recorded.
        row_bytes: of a row.
        page_bytes: of a page.
        counts: (columns, rows): pages written, each once an epoch. Of coarse cells no less than that, and perhaps more.
    """

    stretches: tuple[Stretch, ...]
    places: tuple[Place, ...]
    columns: tuple[Column, ...]
    row_bytes: int
    page_bytes: int
    counts: Counts

    @property
    def rows(self) -> int:
        """How many there are."""
        return int(self.counts.shape[1])

    def spans(self) -> NDArray[np.uint64]:
        """(rows, 2): the [start, end) addresses of each row."""
        parts = []
        for stretch in self.stretches:
            starts = stretch.start + np.arange(stretch.rows, dtype=np.uint64) * np.uint64(self.row_bytes)
            ends = np.minimum(starts + np.uint64(self.row_bytes), np.uint64(stretch.end))
            parts.append(np.stack([starts, ends], axis=1))
        return np.concatenate(parts) if parts else np.zeros((0, 2), np.uint64)

    def shares(self) -> Shares:
        """(columns, rows), 0 to 1: which part of a cell an epoch wrote, on average over the column's epochs."""
        spans = self.spans()
        pages = (spans[:, 1] - spans[:, 0]) // np.uint64(self.page_bytes)
        epochs = np.array([column.epochs for column in self.columns], np.float32)
        shares: Shares = np.minimum(self.counts / (epochs[:, None] * pages[None, :].astype(np.float32)), 1)
        return shares.astype(np.float32)

    def across(self, width: int) -> Shares:
        """(width, rows): the shares in ``width`` equal parts of the time; the largest of each part, NaN of none."""
        shares, out = self.shares(), np.full((width, self.rows), np.nan, np.float32)
        if not self.columns:
            return out
        begun, ended = self.begun, self.ended
        per_second = width / max(ended - begun, 1e-9)
        for i, column in enumerate(self.columns):
            first = min(width - 1, int((column.begun - begun) * per_second + 1e-6))
            last = max(first + 1, min(width, int(np.ceil((column.ended - begun) * per_second - 1e-6))))
            out[first:last] = np.fmax(out[first:last], shares[i])
        return out

    @property
    def begun(self) -> float:
        """When the first column begins."""
        return self.columns[0].begun if self.columns else 0.0

    @property
    def ended(self) -> float:
        """When the last column ends."""
        return self.columns[-1].ended if self.columns else 0.0

    def names(self, start: int, end: int) -> list[Place]:
        """The places that [start, end) touches, in order."""
        return [place for place in self.places if place.start < end and start < place.end]


def heat_map(recording: Recording, *, rows: int, columns: int) -> HeatMap:
    """Count what a recording says, in two passes.

    Args:
        recording: an open recording.
        rows: at most so many, all stretches together (one each, where there are more stretches).
        columns: at most so many; with fewer epochs, one an epoch.

    Raises:
        InvalidRecording: nothing was written in it, so there is nothing to show; or its pages are smaller than those of
            this machine.
    """
    if recording.page_bytes < PAGE_BYTES:
        raise InvalidRecording(
            f"{recording.path} is a recording of pages of {recording.page_bytes} bytes; here they have {PAGE_BYTES}, "
            "which is too coarse to count them: draw it where pages are as small"
        )
    written, seen = _looked_through(recording)
    if not written:
        raise InvalidRecording(
            f"{recording.path} has {len(recording)} epochs in which nothing was written: there is no heat map of that"
        )
    pieces = _fold(np.asarray(written.runs))
    row_bytes, stretches = _rows(pieces, rows, recording.page_bytes)
    places = _places(seen, stretches)
    empty = HeatMap(stretches, places, (), row_bytes, recording.page_bytes, np.zeros((0, 0), np.uint32))
    spans = np.ascontiguousarray(empty.spans())
    made: list[Column] = []
    counts: list[Counts] = []
    begun = recording[0].begun
    per_second = columns / max(recording[-1].ended - begun, 1e-9)
    bin_before = -1
    for epoch in recording:
        bin_now = min(columns - 1, int(((epoch.begun + epoch.ended) / 2 - begun) * per_second))
        here = _counted(epoch, spans)
        if bin_now == bin_before:
            counts[-1] += here
            last = made[-1]
            made[-1] = last._replace(
                ended=max(last.ended, epoch.ended),
                seconds=last.seconds + epoch.seconds,
                epochs=last.epochs + 1,
                coarse=max(last.coarse, epoch.coarse),
            )
        else:
            counts.append(here)
            made.append(Column(epoch.begun, epoch.ended, epoch.seconds, 1, epoch.number, epoch.coarse))
        bin_before = bin_now
    return HeatMap(stretches, places, tuple(made), row_bytes, recording.page_bytes, np.stack(counts))


def _looked_through(recording: Recording) -> tuple[DirtySet, dict[Place, int]]:
    """All pages that some epoch wrote, and each mapping with the number of the last table that has it."""
    parts: list[DirtySet] = []
    waiting = 0
    seen: dict[Place, int] = {}
    table: tuple[Mapping, ...] | None = None
    for number, epoch in enumerate(recording):
        parts.append(DirtySet.from_runs(epoch.runs))
        waiting += len(parts[-1])
        if waiting > _UNITE_RUNS:
            parts, waiting = [DirtySet.union(parts)], 0
        if epoch.mappings is not table:
            table = epoch.mappings
            seen.update((Place(each.start, each.end, each.name), number) for each in table)
    return DirtySet.union(parts), seen


def _fold(runs: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """(n, 2) pieces of memory that have all these runs in them: the largest gaps are left out, as long as one is more
    than a 64th of what is then shown, and not more than 63."""
    gaps = runs[1:, 0] - runs[:-1, 1]
    shown = int(runs[-1, 1] - runs[0, 0])
    folded = []
    for i in np.argsort(gaps, kind="stable")[::-1][: _MOST_STRETCHES - 1].tolist():
        rest = shown - int(gaps[i])
        if int(gaps[i]) * _FOLD_SHARE <= rest:
            break
        shown = rest
        folded.append(i)
    cuts = np.sort(np.array(folded, np.intp))
    starts = np.concatenate((runs[:1, 0], runs[cuts + 1, 0]))
    ends = np.concatenate((runs[cuts, 1], runs[-1:, 1]))
    return np.stack([starts, ends], axis=1)


def _rows(pieces: NDArray[np.uint64], rows: int, page_bytes: int) -> tuple[int, tuple[Stretch, ...]]:
    """Rows for these pieces, all of one length, a multiple of the page."""
    lengths = (pieces[:, 1] - pieces[:, 0]).astype(np.int64)
    pages = -(-int(lengths.sum()) // page_bytes)
    row_bytes = max(1, -(-pages // max(1, rows - len(pieces) + 1))) * page_bytes
    stretches, first = [], 0
    for start, end in pieces.tolist():
        count = -(-(end - start) // row_bytes)
        stretches.append(Stretch(start, end, first, count))
        first += count
    return row_bytes, tuple(stretches)


def _counted(epoch: Epoch, spans: NDArray[np.uint64]) -> Counts:
    """Pages that an epoch wrote in each of these spans."""
    if epoch.coarse == 1 and epoch.page_bytes == PAGE_BYTES:
        return np.asarray(DirtySet.from_runs(epoch.runs).page_counts(spans)).astype(np.uint32)
    edges, upto = np.asarray(epoch.runs).reshape(-1), np.cumsum(np.asarray(epoch.run_pages))
    if not len(edges):
        return np.zeros(len(spans), np.uint32)
    # Pages of a coarse cell are anywhere in it: spread evenly, and rounded up, so that what was written shows.
    below = np.interp(
        spans.astype(np.float64), edges.astype(np.float64), np.repeat(np.concatenate(([0], upto)), 2)[1:-1]
    )
    counts: Counts = np.ceil(below[:, 1] - below[:, 0] - 1e-6).astype(np.uint32)
    return counts


def _places(seen: dict[Place, int], stretches: Sequence[Stretch]) -> tuple[Place, ...]:
    """The mappings in what is shown, cut where one took another's place."""
    inside = [place for place in seen if any(s.start < place.end and place.start < s.end for s in stretches)]
    return tuple(_layered(inside, seen))


def _layered(places: Iterable[Place], age: dict[Place, int]) -> list[Place]:
    """Disjoint places, sorted: where several overlap, the one of the highest age, which was there last."""
    waiting = sorted(places)
    edges = sorted({edge for place in waiting for edge in (place.start, place.end)})
    out: list[Place] = []
    open_now: list[tuple[int, int, Place]] = []
    at = 0
    for start, end in pairwise(edges):
        while at < len(waiting) and waiting[at].start <= start:
            heapq.heappush(open_now, (-age[waiting[at]], at, waiting[at]))
            at += 1
        while open_now and open_now[0][2].end <= start:
            heapq.heappop(open_now)
        if not open_now:
            continue
        top = open_now[0][2]
        if out and out[-1].end == start and out[-1].name == top.name and (top.name or out[-1].start >= top.start):
            out[-1] = out[-1]._replace(end=end)
        else:
            out.append(top._replace(start=start, end=end))
    return out

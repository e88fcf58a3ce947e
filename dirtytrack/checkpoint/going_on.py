# SPDX-License-Identifier: MIT
"""What a save that failed had in the store by then: the next one names it, and does not send it again."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..dirtyset import DirtySet
from ..kernel import core

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from ..kernel import cutting
    from .jobs import Job, Plan
    from .manifests import SegmentEntry
    from .segments import SegmentWriter

__all__ = ["Left", "left_of", "there"]


class Left(NamedTuple):
    """Whole segments of a save that failed.

    What they tell is as it was when that save was made. So these pages need not go back to the tracker: those that were
    written since are dirty again, and are told again, after them.
    """

    segments: tuple[SegmentWriter, ...]
    entries: tuple[SegmentEntry, ...]
    pages: DirtySet
    """All that any region has of these is in them."""
    numbers: frozenset[int]
    """Of the regions of that save. What another one has of the pages is not in them."""


def left_of(job: Job, finished: Iterable[tuple[SegmentWriter, SegmentEntry, Collection[int]]]) -> Left | None:
    """What a job that failed leaves.

    Args:
        job: which.
        finished: its segments that are whole: each with its entry, and which of the job's cuts are in it.
    """
    segments, entries, cuts = [], [], set[int]()
    for segment, entry, within in finished:
        segments.append(segment)
        entries.append(entry)
        cuts.update(within)
    if not entries or job.cuts is None:
        return None
    whole = _pages(job, job.cuts, cuts, inward=True)
    others = _pages(job, job.cuts, set(range(len(job.cuts))) - cuts, inward=False)
    return Left(tuple(segments), tuple(entries), whole - others, job.numbers)


def there(left: Iterable[Left], dirty: DirtySet, plans: Collection[Plan]) -> DirtySet:
    """The pages that a save of these regions need not tell, since what is left has them as they are."""
    found = DirtySet()
    for each in left:
        strange = [(plan.address, plan.entry.nbytes) for plan in plans if plan.entry.number not in each.numbers]
        found |= each.pages - _set_of(strange, inward=False)
    return found - dirty


def _pages(job: Job, cuts: cutting.Cuts, which: Iterable[int], *, inward: bool) -> DirtySet:
    by_plan: dict[int, list[tuple[int, int]]] = {}
    for index in sorted(which):
        each = cuts[index]
        address = job.plans[each.memory].address
        numbers = iter(cuts.spans(each).cast("Q"))
        by_plan.setdefault(each.memory, []).extend(
            (address + offset, nbytes) for offset, nbytes in zip(numbers, numbers, strict=True)
        )
    found = DirtySet()
    for pieces in by_plan.values():
        found |= _set_of(pieces, inward=inward)
    return found


def _set_of(pieces: Iterable[tuple[int, int]], *, inward: bool) -> DirtySet:
    """The pages that lie in these, or that these touch."""
    return DirtySet.from_runs(_merged(sorted(_joined(pieces)), inward=inward))


def _joined(pieces: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Starts and ends; pieces that follow one another are one: a frame may end within a page."""
    start = end = -1
    for address, nbytes in pieces:
        if address != end:
            if end >= 0:
                yield start, end
            start = address
        end = address + nbytes
    if end >= 0:
        yield start, end


def _merged(pieces: Iterable[tuple[int, int]], *, inward: bool) -> list[tuple[int, int]]:
    page, found = core.PAGE_BYTES, list[tuple[int, int]]()
    for start, end in pieces:
        if inward:
            start, end = -(-start // page) * page, end // page * page
        else:
            start, end = start // page * page, -(-end // page) * page
        if start >= end:
            continue
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found

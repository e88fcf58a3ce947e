# SPDX-License-Identifier: MIT
"""Which epochs and which mappings an analysis is about; and pages by mapping."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from ..errors import InvalidRecording
from ..process.mappings import named
from .arrays import np
from .recording import Epoch
from .written import Written, union_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..process.mappings import Mapping
    from .written import Numbers

__all__ = ["GONE", "MappingShare", "by_mapping", "exact_tail", "only", "require_epochs"]

GONE = "[gone]"


def require_epochs(epochs: Sequence[Epoch], name: str) -> None:
    """Refuse a recording without epochs.

    Raises:
        InvalidRecording: it has none.
    """
    if not epochs:
        raise InvalidRecording(f"{name} has no epochs: its recorder ended before its first collect")


def only(epochs: Sequence[Epoch], pattern: str) -> list[Epoch]:
    """The epochs with only those mappings whose names match, and what was written in them.

    Args:
        epochs: of a recording.
        pattern: as in a shell: ``[heap]`` itself, ``*.so*``, ``[anon]`` for those without a name.

    Raises:
        InvalidRecording: no mapping matches.
    """
    result, names = list[Epoch](), set[str]()
    last: tuple[Mapping, ...] | None = None
    for epoch in epochs:
        if epoch.mappings is not last:
            last = epoch.mappings
            names |= {named(mapping.name) for mapping in last}
            chosen = tuple(mapping for mapping in last if _matches(named(mapping.name), pattern))
        result.append(_clipped(epoch, chosen))
    if not any(epoch.mappings for epoch in result):
        known = ", ".join(sorted(names)[:12]) + (", …" if len(names) > 12 else "")
        raise InvalidRecording(f"no mapping matches {pattern!r}; there are: {known or 'none at all'}")
    return result


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)


def _clipped(epoch: Epoch, chosen: tuple[Mapping, ...]) -> Epoch:
    shift = epoch.page_bytes.bit_length() - 1 + epoch.written.unit_log2
    starts = np.array([mapping.start >> shift for mapping in chosen], np.int64)
    ends = np.array([-(-mapping.end >> shift) for mapping in chosen], np.int64)
    pages = sum(mapping.nbytes for mapping in chosen) // epoch.page_bytes
    record = replace(
        epoch.record,
        written=_within(epoch.written, *_joined(starts, ends)),
        resident_pages=min(epoch.resident_pages, pages),
    )
    return Epoch(record, epoch.page_bytes, chosen)


def _joined(starts: Numbers, ends: Numbers) -> tuple[Numbers, Numbers]:
    """Spans sorted by start, those that overlap or touch as one."""
    if not len(starts):
        return starts, ends
    ends = np.maximum.accumulate(ends)
    apart = np.flatnonzero(starts[1:] > ends[:-1])
    return starts[np.append(0, apart + 1)], ends[np.append(apart, len(ends) - 1)]


def _pieces(what: Written, starts: Numbers, ends: Numbers) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """The parts of its runs in these spans of cells, sorted and disjoint: which run, which span, from and to."""
    ends_of_runs = what.starts + what.lengths
    first = np.searchsorted(ends, what.starts, "right")
    spread = np.maximum(np.searchsorted(starts, ends_of_runs, "left") - first, 0)
    run = np.repeat(np.arange(len(spread)), spread)
    span = first[run] + np.arange(len(run)) - np.repeat(np.cumsum(spread) - spread, spread)
    return run, span, np.maximum(what.starts[run], starts[span]), np.minimum(ends_of_runs[run], ends[span])


def _within(what: Written, starts: Numbers, ends: Numbers) -> Written:
    """The part in these spans of cells, sorted and disjoint."""
    run, _, low, high = _pieces(what, starts, ends)
    return Written(what.unit_log2, low, high - low, what.counts[run])


def exact_tail(epochs: Sequence[Epoch]) -> Sequence[Epoch]:
    """The newest epochs, back to the last one that was coarsened (which is not among them)."""
    begin = len(epochs)
    while begin and epochs[begin - 1].exact:
        begin -= 1
    return epochs[begin:]


# ---- by mapping


class MappingShare(NamedTuple):
    """What was written in all mappings of one name."""

    name: str
    mappings: int
    """The most that there were at once."""
    nbytes: int
    """Of all that there were at the end; of what is gone, when it was last there."""
    pages: int
    """Written, each counted once an epoch."""
    distinct_pages: int
    """Written at least once; of coarse cells that number or less."""
    share: float
    """Of all pages, as counted for ``pages``."""
    untracked: str
    """Why part of it counts as wholly dirty in each epoch; empty where all of it is tracked."""


class _Table:
    """The mappings of some epochs, by name, as spans of cells. What is rounded to cells, or mapped twice, is its whose
    address is lower."""

    def __init__(self, mappings: Sequence[Mapping], shift: int) -> None:
        self.mappings = [mapping for mapping in mappings if mapping.state != "excluded"]
        self.names = list(dict.fromkeys(named(mapping.name) for mapping in self.mappings))
        numbers = {name: i for i, name in enumerate(self.names)}
        self.group = np.array([numbers[named(mapping.name)] for mapping in self.mappings], np.int64)
        ends = np.array([-(-mapping.end >> shift) for mapping in self.mappings], np.int64)
        self.ends = np.maximum.accumulate(ends)
        self.starts = np.array([mapping.start >> shift for mapping in self.mappings], np.int64)
        self.starts[1:] = np.maximum(self.starts[1:], self.ends[:-1])

    def pages(self, what: Written) -> Numbers:
        """How many of its pages are in the mappings of each name."""
        run, span, low, high = _pieces(what, self.starts, self.ends)
        pages = (high - low) * what.counts[run]
        return np.bincount(self.group[span], pages, len(self.names)).astype(np.int64)

    def parts(self, what: Written) -> Iterator[tuple[str, Written]]:
        """What of it is in the mappings of each name, where there is any."""
        run, span, low, high = _pieces(what, self.starts, self.ends)
        group = np.where(high > low, self.group[span], -1)  # a span that lies within the one before is empty
        for i in np.unique(group[group >= 0]).tolist():
            chosen = np.flatnonzero(group == i)
            part = Written(what.unit_log2, low[chosen], (high - low)[chosen], what.counts[run[chosen]])
            yield self.names[i], part


def by_mapping(epochs: Sequence[Epoch]) -> list[MappingShare]:
    """What was written by name of the mapping, most pages first; without those that were not to be tracked. What lies
    in none of them is ``[gone]``."""
    sums, sizes, counts = dict[str, int](), dict[str, int](), dict[str, int]()
    reasons, unions = dict[str, str](), dict[str, list[Written]]()
    for _, group in groupby(epochs, lambda epoch: (id(epoch.mappings), epoch.coarse)):
        alike = list(group)
        shift = alike[0].page_bytes.bit_length() - 1 + alike[0].written.unit_log2
        table = _Table(alike[0].mappings, shift)
        members = dict.fromkeys(table.names, 0)
        for mapping in table.mappings:
            name = named(mapping.name)
            members[name] += 1
            sizes[name] = (sizes[name] if members[name] > 1 else 0) + mapping.nbytes
            if mapping.state == "untracked":
                reasons[name] = mapping.reason
        for name, count in members.items():
            counts[name] = max(counts.get(name, 0), count)
        for epoch in alike:
            pages = table.pages(epoch.written)
            for i in np.flatnonzero(pages).tolist():
                sums[table.names[i]] = sums.get(table.names[i], 0) + int(pages[i])
            outside = epoch.page_count - int(pages.sum())
            if outside:
                sums[GONE] = sums.get(GONE, 0) + outside
        for name, part in table.parts(union_of([epoch.written for epoch in alike])):
            unions.setdefault(name, []).append(part)
    total = sum(sums.values())
    result = [
        MappingShare(
            name=name,
            mappings=counts.get(name, 0),
            nbytes=sizes.get(name, 0),
            pages=sums.get(name, 0),
            distinct_pages=union_of(unions[name]).page_count if name in unions else 0,
            share=sums.get(name, 0) / total if total else 0.0,
            untracked=reasons.get(name, ""),
        )
        for name in {**sums, **sizes}
    ]
    return sorted(result, key=lambda each: (-each.pages, each.name))

# SPDX-License-Identifier: MIT
"""Which epochs and which mappings an analysis is about; and pages by mapping."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple

from ..errors import InvalidRecording
from .arrays import np
from .recording import Epoch
from .written import Written

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..process.mappings import Mapping
    from .written import Numbers

__all__ = ["ANONYMOUS", "MappingShare", "by_mapping", "exact_tail", "name_of", "only", "require_epochs"]

ANONYMOUS = "[anon]"  # as process.attach has it


def name_of(mapping: Mapping) -> str:
    """What it is called; memory without a name is [anon]."""
    return mapping.name or ANONYMOUS


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
            names |= {name_of(mapping) for mapping in last}
            chosen = tuple(mapping for mapping in last if _matches(name_of(mapping), pattern))
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


def _within(what: Written, starts: Numbers, ends: Numbers) -> Written:
    """The part in these spans of cells, sorted and disjoint."""
    ends_of_runs = what.starts + what.lengths
    first = np.searchsorted(ends, what.starts, "right")
    spread = np.maximum(np.searchsorted(starts, ends_of_runs, "left") - first, 0)
    which = np.repeat(np.arange(len(spread)), spread)
    span = first[which] + np.arange(len(which)) - np.repeat(np.cumsum(spread) - spread, spread)
    low = np.maximum(what.starts[which], starts[span]) if len(which) else what.starts[:0]
    high = np.minimum(ends_of_runs[which], ends[span]) if len(which) else what.starts[:0]
    return Written(what.unit_log2, low, high - low, what.counts[which])


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


def by_mapping(epochs: Sequence[Epoch]) -> list[MappingShare]:
    """What was written by name of the mapping, most pages first; without those that were not to be tracked. What lies
    in none of them is ``[gone]``."""
    sums = dict[str, int]()
    unions = dict[str, Written]()
    sizes, counts, reasons = dict[str, int](), dict[str, int](), dict[str, str]()
    last: tuple[Mapping, ...] | None = None
    groups: dict[str, list[Mapping]] = {}
    for epoch in epochs:
        if epoch.mappings is not last:
            last, groups = epoch.mappings, {}
            for mapping in last:
                if mapping.state == "excluded":
                    continue
                groups.setdefault(name_of(mapping), []).append(mapping)
            for name, members in groups.items():
                sizes[name] = sum(mapping.nbytes for mapping in members)
                counts[name] = max(counts.get(name, 0), len(members))
                why = next((mapping.reason for mapping in members if mapping.state == "untracked"), "")
                reasons[name] = why or reasons.get(name, "")
        shift = epoch.page_bytes.bit_length() - 1 + epoch.written.unit_log2
        known = 0
        for name, members in groups.items():
            spans = _joined(
                np.array([mapping.start >> shift for mapping in members], np.int64),
                np.array([-(-mapping.end >> shift) for mapping in members], np.int64),
            )
            part = _within(epoch.written, *spans)
            if len(part.starts):
                known += part.page_count
                sums[name] = sums.get(name, 0) + part.page_count
                unions[name] = unions[name] | part if name in unions else part
        if known < epoch.page_count:
            sums["[gone]"] = sums.get("[gone]", 0) + epoch.page_count - known
    total = sum(sums.values())
    result = [
        MappingShare(
            name=name,
            mappings=counts.get(name, 0),
            nbytes=sizes.get(name, 0),
            pages=sums.get(name, 0),
            distinct_pages=unions[name].page_count if name in unions else 0,
            share=sums.get(name, 0) / total if total else 0.0,
            untracked=reasons.get(name, ""),
        )
        for name in {**sums, **sizes}
    ]
    return sorted(result, key=lambda each: (-each.pages, each.name))

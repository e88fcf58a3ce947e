# SPDX-License-Identifier: MIT
"""All writable memory of a process, read by other means than ours, and whether each page that differs was reported."""

from __future__ import annotations

import os
import time
from typing import NamedTuple

import numpy as np

from dirtytrack import DirtySet, PageCategory, Pagemap
from dirtytrack.process import Mapping, ProcessTracker

PAGE = os.sysconf("SC_PAGE_SIZE")
_POPULATED = PageCategory.PRESENT | PageCategory.SWAPPED


class Piece(NamedTuple):
    """A mapping and its bytes; of anonymous memory the pages that were never populated are left out."""

    mapping: Mapping
    pages: dict[int, bytes]


def is_anonymous(mapping: Mapping) -> bool:
    return not mapping.inode and mapping.permissions[3] == "p"


def _read(memory: int, start: int, end: int, pages: dict[int, bytes]) -> None:
    """Page by page where it cannot be read in one piece: guard pages, pages behind the end of a file."""
    try:
        data = os.pread(memory, end - start, start)
    except OSError:
        data = b""
    if len(data) < end - start and end - start > PAGE:
        middle = start + (end - start) // 2 // PAGE * PAGE
        _read(memory, start, middle, pages)
        _read(memory, middle, end, pages)
        return
    for at in range(0, len(data), PAGE):
        pages[start + at] = data[at : at + PAGE]


def copy(tracker: ProcessTracker) -> dict[int, Piece]:
    """By the start of the mapping: all tracked memory, by /proc/PID/mem."""
    pieces = {}
    memory = os.open(f"/proc/{tracker.pid}/mem", os.O_RDONLY)
    with Pagemap(tracker.pid) as pagemap:
        for mapping in tracker.mappings:
            if mapping.state != "tracked":
                continue
            pages: dict[int, bytes] = {}
            ranges = [(mapping.start, mapping.end)]
            if is_anonymous(mapping):
                found = pagemap.scan(
                    mapping.start, mapping.end, category_anyof_mask=_POPULATED, return_mask=PageCategory.PRESENT
                )
                ranges = [(part.start, part.end) for part in found]
            for start, end in ranges:
                for at in range(start, end, 4 << 20):
                    _read(memory, at, min(end, at + (4 << 20)), pages)
            pieces[mapping.start] = Piece(mapping, pages)
    os.close(memory)
    return pieces


def missed(before: dict[int, Piece], after: dict[int, Piece], dirty: DirtySet) -> tuple[list[int], int]:
    """Pages that differ from the copy before and were not reported; and how many differ."""
    old = {at: page for piece in before.values() for at, page in piece.pages.items()}
    was = sorted((piece.mapping.start, piece.mapping.end, is_anonymous(piece.mapping)) for piece in before.values())
    reported = np.asarray(dirty.runs).reshape(-1, 2)
    zero = bytes(PAGE)
    lost, differing = [], 0
    starts = [start for start, _, _ in was]
    for piece in after.values():
        for at, page in piece.pages.items():
            then = old.get(at)
            if then is None:
                place = int(np.searchsorted(starts, at, side="right")) - 1
                there = place >= 0 and was[place][1] > at
                # Never populated: zeroes. Not mapped then: whatever it holds now, nobody knew it.
                then = zero if there and was[place][2] and is_anonymous(piece.mapping) else None
            if page == then:
                continue
            differing += 1
            run = int(np.searchsorted(reported[:, 0], at, side="right")) - 1
            if run < 0 or reported[run, 1] <= at:
                lost.append(at)
    return lost, differing


def rounds(tracker: ProcessTracker, count: int, seconds: float) -> int:
    """Freeze, collect, copy, compare; the pages that differed in all of them. Nothing may be missed."""
    with tracker.frozen():
        tracker.collect()
        before = copy(tracker)
    total = 0
    for number in range(count):
        time.sleep(seconds)
        with tracker.frozen():
            dirty = tracker.collect()
            after = copy(tracker)
        lost, differing = missed(before, after, dirty)
        named = [next(str(m) for m in tracker.mappings if m.start <= at < m.end) for at in lost[:5]]
        assert not lost, (
            f"round {number}: {len(lost)} of {differing} pages missed, {list(map(hex, lost[:5]))} of {named}"
        )
        assert len(missed(before, after, DirtySet())[0]) == differing  # this very look finds what is not reported
        total += differing
        before = after
    return total

# SPDX-License-Identifier: MIT
"""Large reservations that are mostly empty: what was never populated is zero, and is not read to know it.

To read it would give each page a place in the page tables, after which trackers take it for written.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from ..dirtyset import DirtySet
from ..errors import DirtyTrackError
from ..kernel import core
from ..kernel.abi import PageCategory
from ..kernel.mappings import mappings
from ..pagemap import Pagemap

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ..region import Region

__all__ = ["HOLE_NBYTES", "but_holes", "is_sparse", "without_holes"]

HOLE_NBYTES = 2 << 20  # shorter ones are copied: to look for them would take longer
_POPULATED = PageCategory.PRESENT | PageCategory.SWAPPED


def is_sparse(region: Region) -> bool:
    """Whether a region may have holes that are known to be zero.

    Of what is armed only where it is populated that is so: it is private and anonymous, and has no markers of armed
    pages that were never populated, which look like swapped ones.
    """
    return region.nbytes >= HOLE_NBYTES and region.arm == "present"


def without_holes(pages: DirtySet, regions: Iterable[Region]) -> tuple[DirtySet, DirtySet | None]:
    """Part pages into those to be copied and those that are not there.

    Call this after the collect: a page that is populated later is in the next one.

    Args:
        pages: to be saved.
        regions: the sparse ones.

    Returns:
        What is to be copied; and what is zero because it is not populated, or None.
    """
    holes: list[tuple[int, int]] = []
    with Pagemap() as pagemap:
        for region in sorted(regions, key=lambda each: each.start):
            low, high = int(region.start), int(region.end)
            if holes:
                low = max(low, holes[-1][1])  # regions may overlap
            within = pages & DirtySet.from_runs([(low, high)]) if low < high else ()
            for run in within:
                if run.end - run.start >= HOLE_NBYTES:
                    holes += _holes(pagemap, int(run.start), int(run.end))
    if not holes:
        return pages, None
    found = DirtySet.from_runs(holes)
    return pages - found, found


def but_holes(address: int, runs: memoryview | array[int]) -> array[int]:
    """Runs without what is zero already, because it is private anonymous memory and not populated: to write zeros there
    would take memory for nothing.

    Args:
        address: of the memory.
        runs: pairs of numbers, offset and length, flat.
    """
    found = array("Q")
    for offset, nbytes in zip(runs[::2], runs[1::2], strict=True):
        at, end = address + offset, address + offset + nbytes
        for low, high in _absent(at, end) if nbytes >= HOLE_NBYTES else ():
            if low > at:
                found.extend((at - address, low - at))
            at = high
        if at < end:
            found.extend((at - address, end - at))
    return found


def _absent(start: int, end: int) -> list[tuple[int, int]]:
    page = core.PAGE_BYTES
    found: list[tuple[int, int]] = []
    try:
        with Pagemap() as pagemap:
            for each in mappings(start, end):
                if each.kind == "anonymous" and not each.shared:
                    low, high = -(-max(start, each.start) // page) * page, min(end, each.end) // page * page
                    found += _holes(pagemap, low, high)
    except (DirtyTrackError, OSError):  # a kernel that does not tell: then they are written
        return []
    return found


def _holes(pagemap: Pagemap, start: int, end: int) -> Iterator[tuple[int, int]]:
    found = pagemap.scan(start, end, category_anyof_mask=_POPULATED, return_mask=_POPULATED)
    for region in (*found, None):
        hole_end = end if region is None else int(region.start)
        if hole_end - start >= HOLE_NBYTES:
            yield start, hole_end
        if region is not None:
            start = int(region.end)

# SPDX-License-Identifier: MIT
"""Large reservations that are mostly empty: what was never populated is zero, and is not read to know it.

To read it would give each page a place in the page tables, after which trackers take it for written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..dirtyset import DirtySet
from ..kernel.abi import PageCategory
from ..pagemap import Pagemap

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ..region import Region

__all__ = ["HOLE_NBYTES", "is_sparse", "without_holes"]

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


def _holes(pagemap: Pagemap, start: int, end: int) -> Iterator[tuple[int, int]]:
    found = pagemap.scan(start, end, category_anyof_mask=_POPULATED, return_mask=_POPULATED)
    for region in (*found, None):
        hole_end = end if region is None else int(region.start)
        if hole_end - start >= HOLE_NBYTES:
            yield start, hole_end
        if region is not None:
            start = int(region.end)

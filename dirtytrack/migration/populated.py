# SPDX-License-Identifier: MIT
"""Which pages of a region have anything in them, without touching any."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from ..kernel.abi import PageCategory
from ..kernel.core import PAGE_BYTES
from ..kernel.mappings import mappings
from ..pagemap import Pagemap

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..region import Region

__all__ = ["populated"]


def populated(region: Region) -> list[tuple[int, int]]:
    """Runs of addresses, sorted and disjoint; outside of them the region reads as zeroes, and nobody ever wrote.

    To be asked once the region is armed: what is written afterwards the tracker tells. Of shared memory that `allocate`
    did not make, of files and of shared huge pages nobody can say without reading: all of it counts as populated.
    """
    runs: list[tuple[int, int]] = []
    with Pagemap() as pagemap:
        for mapping in mappings(region.start, region.end):
            start, end = max(mapping.start, region.start), min(mapping.end, region.end)
            if not mapping.shared and mapping.kind in ("anonymous", "hugetlb"):
                found = _private(pagemap, start, end)
            elif region._memory is not None and mapping.kind == "shared":
                found = _shared(region, start, end)
            else:
                found = iter([(start, end)])
            for run in found:
                if runs and runs[-1][1] >= run[0]:
                    runs[-1] = (runs[-1][0], max(runs[-1][1], run[1]))
                else:
                    runs.append(run)
    return runs


def _private(pagemap: Pagemap, start: int, end: int) -> Iterator[tuple[int, int]]:
    # A page that was armed and never populated looks like one in swap. Where the machine has no swap it cannot be one.
    wanted = PageCategory.PRESENT | (PageCategory.SWAPPED if _has_swap() else 0)
    found = pagemap.scan(
        start,
        end,
        category_mask=PageCategory.PFNZERO,
        category_inverted=PageCategory.PFNZERO,  # the shared page of zeroes: read, never written
        category_anyof_mask=wanted,
        return_mask=wanted,
    )
    return ((part.start, part.end) for part in found)


def _has_swap() -> bool:
    try:
        with open("/proc/swaps") as lines:
            return len(lines.readlines()) > 1
    except OSError:
        return True


def _shared(region: Region, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Of a memfd: what the file has."""
    memory = region._memory
    assert memory is not None, "the caller looked"
    at, last = start - memory.address, end - memory.address
    while at < last:
        try:
            data = os.lseek(memory.fileno(), at, os.SEEK_DATA)
            hole = os.lseek(memory.fileno(), data, os.SEEK_HOLE)
        except OSError as error:
            if error.errno != errno.ENXIO:  # nothing behind it; else nobody can say
                yield memory.address + at, end
            return
        data, hole = data // PAGE_BYTES * PAGE_BYTES, -(-hole // PAGE_BYTES) * PAGE_BYTES
        if data >= last:
            return
        yield memory.address + data, memory.address + min(hole, last)
        at = hole

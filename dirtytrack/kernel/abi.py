# SPDX-License-Identifier: MIT
"""The kernel's names for its numbers: ``<linux/fs.h>`` and ``<linux/userfaultfd.h>``.

Bits that this library does not know are kept: neither dropped nor rejected, so that a newer kernel's answers survive.
"""

from __future__ import annotations

from enum import IntFlag
from typing import NewType

__all__ = ["Address", "Fd", "PageCategory", "PageIndex", "Pid", "ScanFlag", "UffdFeature"]

Address = NewType("Address", int)
"""A virtual address, in bytes."""
PageIndex = NewType("PageIndex", int)
"""The number of a base page, counted from the start of a region's page span."""
Fd = NewType("Fd", int)
"""A file descriptor."""
Pid = NewType("Pid", int)
"""A process id."""


class PageCategory(IntFlag):
    """PAGE_IS_*: what PAGEMAP_SCAN can tell of a page (Linux 6.7)."""

    WPALLOWED = 1 << 0
    WRITTEN = 1 << 1
    FILE = 1 << 2
    PRESENT = 1 << 3
    SWAPPED = 1 << 4
    PFNZERO = 1 << 5
    HUGE = 1 << 6
    SOFT_DIRTY = 1 << 7
    GUARD = 1 << 8
    ACCESSED = 1 << 9


class ScanFlag(IntFlag):
    """PM_SCAN_*: what PAGEMAP_SCAN does beside looking (Linux 6.7)."""

    WP_MATCHING = 1 << 0
    CHECK_WPASYNC = 1 << 1


class UffdFeature(IntFlag):
    """UFFD_FEATURE_*: what a userfaultfd can do."""

    PAGEFAULT_FLAG_WP = 1 << 0
    EVENT_FORK = 1 << 1
    EVENT_REMAP = 1 << 2
    EVENT_REMOVE = 1 << 3
    MISSING_HUGETLBFS = 1 << 4
    MISSING_SHMEM = 1 << 5
    EVENT_UNMAP = 1 << 6
    SIGBUS = 1 << 7
    THREAD_ID = 1 << 8
    MINOR_HUGETLBFS = 1 << 9
    MINOR_SHMEM = 1 << 10
    EXACT_ADDRESS = 1 << 11
    WP_HUGETLBFS_SHMEM = 1 << 12
    WP_UNPOPULATED = 1 << 13
    POISON = 1 << 14
    WP_ASYNC = 1 << 15
    MOVE = 1 << 16
    RWP = 1 << 17
    RWP_ASYNC = 1 << 18

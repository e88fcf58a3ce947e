# SPDX-License-Identifier: MIT
"""PAGEMAP_SCAN in the kernel's own words, on this process or another; and the usual questions by name."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import DirtyTrackError, InvalidMemory, TargetGone
from .kernel import core, failures, mappings, scans, targets
from .kernel.abi import Fd, PageCategory, Pid, ScanFlag
from .region import Region, Run, range_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from typing_extensions import Self

    from .memory import AnyBuffer

__all__ = ["PageRegion", "Pagemap", "Scan", "huge", "present", "swapped", "written", "zero"]

_EXACT = PageCategory.WRITTEN


class PageRegion(NamedTuple):
    """Neighbouring pages of the same categories: addresses, half-open."""

    start: int
    end: int
    categories: PageCategory


class Scan:
    """What one `Pagemap.scan` found. Iterating gives `PageRegion` items; ``len`` is their number."""

    __slots__ = ("_view", "walk_end")

    walk_end: int
    """Where the walk really got: the end of the range, or of the last page found where ``max_pages`` ended it."""

    def __init__(self, view: memoryview, walk_end: int) -> None:
        self._view = view
        self.walk_end = walk_end

    @property
    def page_regions(self) -> memoryview:
        """Read-only, format ``Q``, shape (n, 3): start, end, categories; sorted and disjoint; not a copy."""
        return self._view

    @property
    def page_count(self) -> int:
        """Base pages in all of them."""
        return sum(part.end - part.start for part in self) // core.PAGE_BYTES

    def __len__(self) -> int:
        return len(self._view)

    def __iter__(self) -> Iterator[PageRegion]:
        numbers = iter(self._view.cast("B").cast("Q")) if len(self._view) else iter(())
        return (PageRegion(start, end, PageCategory(bits)) for start, end, bits in zip(*[numbers] * 3, strict=True))

    def __repr__(self) -> str:
        return f"<Scan of {len(self)} page regions up to {self.walk_end:#x}>"


class Pagemap:
    """A process's page map, /proc/PID/pagemap.

    It keeps its first descriptor, so that a target which replaced itself by exec is told (`TargetGone`), not mistaken
    for an empty one. A child of vfork has its parent's memory until it becomes a program by exec: that is waited for.

    Args:
        pid: the process; None: this one.

    Raises:
        PermissionDenied: the process is another user's, or not dumpable.
        TargetBusy: it is a child of vfork that has its parent's memory, for two seconds and more.
        TargetGone: there is no such process.
        UnsupportedKernel: no /proc/PID/pagemap here, or not Linux.

    Thread safety: `scan` may be called from any thread; `close` only when no other thread scans.
    """

    _fd = -1

    def __init__(self, pid: int | None = None) -> None:
        core.load()
        self.pid = None if pid is None else Pid(pid)
        self._owner = os.getpid()
        if self.pid is not None:
            self._fd = targets.open_page_map(self.pid)
            return
        try:
            self._fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            scans.refuse_open(error, None)

    def scan(
        self,
        start: int,
        end: int,
        *,
        category_mask: int = 0,
        category_inverted: int = 0,
        category_anyof_mask: int = 0,
        return_mask: int = 0,
        flags: int = 0,
        max_pages: int = 0,
    ) -> Scan:
        """Ask the kernel which pages of [start, end) match, and in which categories they are.

        A page matches where ``(categories ^ category_inverted) & category_mask == category_mask`` and, if
        ``category_anyof_mask`` is not 0, ``(categories ^ category_inverted) & category_anyof_mask`` is not 0.

        Args:
            start: the first address, on a page.
            end: the last address, exclusive.
            category_mask, category_inverted, category_anyof_mask, return_mask: `PageCategory` bits; unknown ones go to
                the kernel as they are.
            flags: `ScanFlag` bits. WP_MATCHING arms what matched: **it takes those pages away from every tracker of
                this process's sessions.**
            max_pages: stop after so many matching pages; 0: no limit.

        Returns:
            All that matched up to ``max_pages``: the scan is resumed by itself where the kernel's answer fills up.

        Raises:
            NotRegistered: CHECK_WPASYNC met memory that is not registered for it. ``error.partial`` has what was found.
            InvalidMemory: a question that the kernel refuses; or an arming scan over hugetlb memory, with another mask
                than exactly WRITTEN, which can hang a process for ever on some kernels, or with a ``max_pages`` that
                ends inside a huge page, which the kernel would pass over.
            TargetGone: the process ended, or replaced itself by exec.
            UsedAfterFork: this is a child of the process whose map it is.
            UnsupportedKernel: no PAGEMAP_SCAN here.

        Source: Documentation/admin-guide/mm/pagemap.rst (Linux 6.7).
        """
        if self._fd < 0:
            raise ValueError("this Pagemap is closed")
        if self.pid is None and os.getpid() != self._owner:
            raise failures.forked("Pagemap")
        for name, value in (("start", start), ("end", end), ("max_pages", max_pages)):
            if not 0 <= value < 1 << 64:
                raise InvalidMemory(f"{name} is no 64-bit number: {value}")
        exact = category_mask == return_mask == _EXACT and not category_inverted and not category_anyof_mask
        if flags & ScanFlag.WP_MATCHING and (max_pages or not exact):
            self._refuse_hugetlb(start, end, max_pages if exact else 0)
        request = {
            "start": start,
            "end": end,
            "category_mask": int(category_mask),
            "category_inverted": int(category_inverted),
            "category_anyof_mask": int(category_anyof_mask),
            "return_mask": int(return_mask),
            "flags": int(flags),
            "max_pages": max_pages,
        }
        view, walk_end, error = scans.scan(self._fd, request, self.pid)
        found = Scan(view, walk_end)
        if isinstance(error, DirtyTrackError):
            error.partial = found
        if error is not None:
            raise error
        return found

    def _refuse_hugetlb(self, start: int, end: int, max_pages: int) -> None:
        # Of another mask than the exact one: no probe can try it, on Linux 6.12.43-7.1.3 the caller is lost beyond
        # SIGKILL (measured). Of a limit inside a huge page: the kernel passes over that page in silence (6.7-7.3).
        try:
            huge_mapping = mappings.first_hugetlb("self" if self.pid is None else str(self.pid), start, end)
        except OSError as error:
            if self.pid is not None and isinstance(error, (FileNotFoundError, ProcessLookupError)):
                raise TargetGone(f"the process {self.pid} ended", errno=error.errno, pid=self.pid) from error
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise failures.unreadable_maps(error, start, end) from error
            raise InvalidMemory(
                f"cannot look for hugetlb memory, over which this scan could hang for ever: {error}. Use category_mask "
                "= return_mask = PageCategory.WRITTEN",
                errno=error.errno,
            ) from error
        if huge_mapping is None:
            return
        huge_start, huge_end, page_bytes = huge_mapping
        huge_pages = page_bytes // core.PAGE_BYTES
        if not max_pages:
            scans.refuse_hugetlb(huge_start, huge_end)
        if max_pages % huge_pages:
            raise InvalidMemory(
                f"an arming scan over the hugetlb mapping {failures.describe(huge_start, huge_end)} takes a max_pages "
                f"that is a multiple of its page, {huge_pages} base pages, not {max_pages}: the kernel passes over "
                "a huge page that does not fit",
                start=huge_start,
                end=huge_end,
            )

    def fileno(self) -> Fd:
        """The descriptor, which stays this object's; -1 when closed."""
        return Fd(self._fd)

    def close(self) -> None:
        """Close the descriptor. A second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a Pagemap cannot be pickled: it holds a descriptor")


def _ask(
    memory: Region | Run | AnyBuffer | tuple[int, int], pagemap: Pagemap | None, mask: PageCategory, **options: Any
) -> Scan:
    core.load()
    start, end, hold = range_of(memory, "memory")
    page = core.PAGE_BYTES
    start, end = start - start % page, -(-end // page) * page
    if pagemap is not None:
        return pagemap.scan(start, end, category_mask=mask, return_mask=mask, **options)
    with Pagemap() as own:
        found = own.scan(start, end, category_mask=mask, return_mask=mask, **options)
    del hold
    return found


def written(memory: Region | Run | AnyBuffer | tuple[int, int], pagemap: Pagemap | None = None) -> Scan:
    """Pages written since they were last armed; arms nothing.

    Args:
        memory: a region, a buffer, a `Run` or an (address, nbytes) pair.
        pagemap: of another process; left out, this one's.

    Raises:
        NotRegistered: part of the memory is not registered, so that nobody can say.
    """
    return _ask(memory, pagemap, PageCategory.WRITTEN, flags=ScanFlag.CHECK_WPASYNC)


def present(memory: Region | Run | AnyBuffer | tuple[int, int], pagemap: Pagemap | None = None) -> Scan:
    """Pages in memory, the shared zero page included. Arguments as for `written`."""
    return _ask(memory, pagemap, PageCategory.PRESENT)


def swapped(memory: Region | Run | AnyBuffer | tuple[int, int], pagemap: Pagemap | None = None) -> Scan:
    """Pages in swap; armed pages that were never populated count too. Arguments as for `written`."""
    return _ask(memory, pagemap, PageCategory.SWAPPED)


def zero(memory: Region | Run | AnyBuffer | tuple[int, int], pagemap: Pagemap | None = None) -> Scan:
    """Pages that are the kernel's zero page: read, never written. Arguments as for `written`."""
    return _ask(memory, pagemap, PageCategory.PFNZERO)


def huge(memory: Region | Run | AnyBuffer | tuple[int, int], pagemap: Pagemap | None = None) -> Scan:
    """Pages that are part of a huge page. Arguments as for `written`."""
    return _ask(memory, pagemap, PageCategory.HUGE)

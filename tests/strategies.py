# SPDX-License-Identifier: MIT
"""What hypothesis draws: kinds of memory, spans in them, ways to write, and sets of pages."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from hypothesis import strategies as st

from tests.oracle import PAGE

__all__ = ["Kind", "Mapped", "Span", "Way", "bit_masks", "page_sets", "spans", "ways"]


class Kind(Enum):
    """Kinds of memory that `dirtytrack.allocate` makes: (shared, huge)."""

    PRIVATE = (False, None)
    SHARED = (True, None)
    HUGE = (False, "transparent")
    SHARED_HUGE = (True, "transparent")


class Mapped(Enum):
    """Kinds of memory that the tests of all of it map, beside those: (shared, what)."""

    FILE = (False, "file")
    SHARED_FILE = (True, "file")
    MEMFD = (False, "memfd")
    HUGETLB = (False, "2M")
    SHARED_HUGETLB = (True, "2M")
    SPARSE = (False, "present")


class Way(Enum):
    """How bytes get into memory."""

    STORE = "a store"
    SAME = "a store of what is there"
    READ = "read(2) into it"
    THREAD = "a store by another thread"
    SELF = "process_vm_writev by this process"
    OTHER = "process_vm_writev by another process"
    PROC_MEM = "write(2) to /proc/self/mem"


class Span(NamedTuple):
    """Bytes, half-open, as offsets into the memory."""

    start: int
    end: int

    @property
    def pages(self) -> range:
        return range(self.start // PAGE, -(-self.end // PAGE))


@st.composite
def spans(draw: st.DrawFn, nbytes: int, max_nbytes: int | None = None) -> Span:
    """A span within memory of `nbytes`; often from page to page, often off by a little, sometimes all of it."""
    longest = min(nbytes, max_nbytes or nbytes)
    pages = -(-nbytes // PAGE)
    start_page = draw(st.integers(0, pages - 1))
    page_count = draw(st.integers(1, max(1, longest // PAGE)))
    start = start_page * PAGE + draw(st.sampled_from((0, 0, 0, 1, 8, 2048, PAGE - 1)))
    end = (start_page + page_count) * PAGE - draw(st.sampled_from((0, 0, 0, 1, 8, 2048, PAGE - 1)))
    start = min(start, nbytes - 1)
    return Span(start, max(start + 1, min(end, start + longest, nbytes)))


def ways() -> st.SearchStrategy[Way]:
    return st.sampled_from(Way)


def page_sets(pages: int) -> st.SearchStrategy[frozenset[int]]:
    """Sets of page numbers below `pages`: scattered ones, and the ones that are mostly runs."""
    scattered = st.frozensets(st.integers(0, pages - 1), max_size=pages)
    run = st.tuples(st.integers(0, pages - 1), st.integers(1, pages)).map(
        lambda pair: frozenset(range(pair[0], min(pages, pair[0] + pair[1])))
    )
    runs = st.lists(run, max_size=6).map(lambda parts: frozenset().union(*parts))
    return st.one_of(scattered, runs)


def bit_masks(known: int) -> st.SearchStrategy[int]:
    """Masks of some of the bits of `known`; few bits are more frequent, since many at once match nothing."""
    bits = [1 << i for i in range(known.bit_length()) if known >> i & 1]
    return st.lists(st.sampled_from(bits), max_size=3).map(lambda chosen: sum(set(chosen)))

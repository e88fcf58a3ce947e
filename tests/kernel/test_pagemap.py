# SPDX-License-Identifier: MIT
"""`Pagemap.scan` against an independent client that asks about one page at a time.

Proven: any question over any mixture of page states has the answer that its pages have one by one, and what the
kernel's documentation promises of the masks; what /proc/PID/pagemap shows of the same pages agrees; ``max_pages`` is
exact, arming arms what was returned and nothing else, answers of any length are complete, sorted and disjoint, and
``walk_end`` is where the walk got. Takes about 6 s of CI's 20 min.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dirtytrack
from dirtytrack import PageCategory, Pagemap, Scan, ScanFlag, UffdSession
from dirtytrack.pagemap import present
from tests import oracle
from tests.asked import fewer
from tests.oracle import PAGE
from tests.strategies import bit_masks

HUGE_PAGE = 2 << 20
MAP_NORESERVE = 0x4000
EXACT = {"category_mask": PageCategory.WRITTEN, "return_mask": PageCategory.WRITTEN}
ARMING = ScanFlag.WP_MATCHING | ScanFlag.CHECK_WPASYNC


# ---- memory in every state ------------------------------------------------------------------------------------------


class State(Enum):
    """How a page is before it is armed."""

    ABSENT = "never touched"
    STORED = "stored to"
    ZERO = "read only: the zero page"
    DISCARDED = "stored to, then discarded"
    NO_ACCESS = "stored to, then PROT_NONE"
    SHARED = "shared, stored to"
    SHARED_ABSENT = "shared, never touched"
    FILE = "private of a file, read"
    FILE_COPIED = "private of a file, stored to"
    HOLE = "not mapped"


class Later(Enum):
    """What happens to a page after it was armed."""

    NOTHING = 0
    STORE = 1
    READ = 2
    DISCARD = 3


MAP_PRIVATE_FIXED = mmap.MAP_PRIVATE | 0x10
CANNOT_BE_TOUCHED = (State.HOLE, State.NO_ACCESS)


class Arena:
    """Pages in the given states, with a huge page in front of them where asked for; as one range."""

    def __init__(self, states: list[State], huge_page: bool) -> None:
        head = HUGE_PAGE if huge_page else 0
        nbytes = head + len(states) * PAGE
        self._reserved = HUGE_PAGE + nbytes + HUGE_PAGE
        self._at = oracle.map_at(0, self._reserved, extra=MAP_NORESERVE)
        self.start = -(-self._at // HUGE_PAGE) * HUGE_PAGE
        self.end = self.start + nbytes
        self.small = self.start + head
        self.states = states
        oracle.discard(self._at, self._reserved, mmap.MADV_NOHUGEPAGE)
        self._fd = os.memfd_create("arena")
        os.ftruncate(self._fd, len(states) * PAGE)
        if huge_page:
            oracle.discard(self.start, HUGE_PAGE, mmap.MADV_HUGEPAGE)
            oracle.poke_bytes(self.start, b"\1")
        for number, state in enumerate(states):
            self._make(self.small + number * PAGE, number, state)

    def _make(self, page: int, number: int, state: State) -> None:
        if state in (State.SHARED, State.SHARED_ABSENT):
            libc_map(page, mmap.MAP_SHARED | 0x10, self._fd, number)
        elif state in (State.FILE, State.FILE_COPIED):
            os.pwrite(self._fd, b"file", number * PAGE)
            libc_map(page, MAP_PRIVATE_FIXED, self._fd, number)
        if state in (State.STORED, State.DISCARDED, State.NO_ACCESS, State.SHARED, State.FILE_COPIED):
            oracle.poke_bytes(page, b"\1")
        elif state in (State.ZERO, State.FILE):
            oracle.peek_bytes(page, 1)
        if state is State.DISCARDED:
            oracle.discard(page, PAGE)
        elif state is State.NO_ACCESS:
            oracle.protect(page, PAGE, 0)
        elif state is State.HOLE:
            oracle.unmap(page, PAGE)

    def mapped_runs(self) -> Iterator[tuple[int, int]]:
        """(address, nbytes) of what lies between the holes."""
        begin = self.start
        for number, state in enumerate(self.states):
            page = self.small + number * PAGE
            if state is State.HOLE:
                if page > begin:
                    yield begin, page - begin
                begin = page + PAGE
        if self.end > begin:
            yield begin, self.end - begin

    def arm(self, session: UffdSession) -> None:
        for run in self.mapped_runs():
            session.write_protect(session.register(run, blind_spots="accepted"))

    def happen(self, later: list[Later]) -> None:
        for number, (state, event) in enumerate(zip(self.states, later, strict=True)):
            page = self.small + number * PAGE
            if state in CANNOT_BE_TOUCHED:
                continue
            if event is Later.STORE:
                oracle.poke_bytes(page, b"\2")
            elif event is Later.READ:
                oracle.peek_bytes(page, 1)
            elif event is Later.DISCARD:
                oracle.discard(page, PAGE)

    def close(self) -> None:
        oracle.unmap(self._at, self._reserved)
        os.close(self._fd)


def libc_map(page: int, flags: int, fd: int, number: int) -> None:
    """mmap one page of a file over another."""
    rights = mmap.PROT_READ | mmap.PROT_WRITE
    assert oracle._libc.mmap(page, PAGE, rights, flags, fd, number * PAGE) == page


@contextmanager
def arena(states: list[State], huge_page: bool = False) -> Iterator[Arena]:
    made = Arena(states, huge_page)
    try:
        yield made
    finally:
        made.close()


# ---- the second opinion ---------------------------------------------------------------------------------------------


class Question(NamedTuple):
    mask: int
    inverted: int
    anyof: int
    returned: int

    @property
    def asked(self) -> dict[str, int]:
        """As the library wants it."""
        names = ("category_mask", "category_inverted", "category_anyof_mask", "return_mask")
        return dict(zip(names, self, strict=True))


class Seen(NamedTuple):
    """One page, as told by an ioctl about this page alone."""

    start: int
    categories: int


def page_by_page(fd: int, start: int, end: int, question: Question) -> list[Seen]:
    """The pages that match, each asked for by itself."""
    mask, inverted, anyof, returned = question
    seen = []
    for page in range(start, end, PAGE):
        found = oracle.scan_once(fd, page, page + PAGE, mask=mask, inverted=inverted, anyof=anyof, returned=returned)
        assert len(found) <= 1
        seen += [Seen(page, bits) for _, _, bits in found]
    return seen


def united(pages: list[Seen]) -> list[tuple[int, int, int]]:
    """Neighbours of the same categories as one."""
    out: list[tuple[int, int, int]] = []
    for page, bits in pages:
        if out and out[-1][1:] == (page, bits):
            out[-1] = (out[-1][0], page + PAGE, bits)
        else:
            out.append((page, page + PAGE, bits))
    return out


def plain(scan: Scan) -> list[tuple[int, int, int]]:
    return [(start, end, int(bits)) for start, end, bits in scan]


questions = st.builds(
    Question, bit_masks(oracle.KNOWN), bit_masks(oracle.KNOWN), bit_masks(oracle.KNOWN), bit_masks(oracle.KNOWN)
)
exact_question = st.just(Question(oracle.WRITTEN, 0, 0, oracle.WRITTEN))
states = st.lists(st.sampled_from(State), min_size=1, max_size=24)
events = st.lists(st.sampled_from(Later), min_size=24, max_size=24)


def agree(pagemap: Pagemap, made: Arena, question: Question, max_pages: int) -> None:
    truth = page_by_page(pagemap.fileno(), made.start, made.end, question)
    scan = pagemap.scan(made.start, made.end, **question.asked, max_pages=max_pages)
    wanted = truth[:max_pages] if max_pages else truth
    assert plain(scan) == united(wanted)
    assert scan.page_count == len(wanted)
    assert len(scan) == len(list(scan)) == len(scan.page_regions)
    if max_pages and len(truth) >= max_pages:
        assert scan.walk_end == wanted[-1].start + PAGE, "where the walk really got"
    else:
        assert scan.walk_end == made.end


@settings(max_examples=fewer(150))
@given(
    states,
    events,
    st.booleans(),
    st.booleans(),
    st.lists(st.one_of(questions, exact_question), min_size=1, max_size=6),
    st.one_of(st.just(0), st.integers(1, 40), st.integers(500, 540)),
)
def test_a_range_is_what_its_pages_are_one_by_one(
    given_states: list[State],
    later: list[Later],
    with_huge_page: bool,
    armed: bool,
    asked: list[Question],
    max_pages: int,
) -> None:
    with arena(given_states, with_huge_page) as made, UffdSession() as session, Pagemap() as pagemap:
        if armed:
            made.arm(session)
        made.happen(later[: len(given_states)])
        for question in asked:
            agree(pagemap, made, question, max_pages)


@settings(max_examples=fewer(100))
@given(states, events, st.booleans(), st.lists(questions, min_size=1, max_size=6))
def test_the_masks_mean_what_the_kernel_documents(
    given_states: list[State], later: list[Later], armed: bool, asked: list[Question]
) -> None:
    with arena(given_states) as made, UffdSession() as session, Pagemap() as pagemap:
        if armed:
            made.arm(session)
        made.happen(later[: len(given_states)])
        everything = page_by_page(pagemap.fileno(), made.start, made.end, Question(0, 0, 0, oracle.KNOWN))
        assert len(everything) == len(given_states) - given_states.count(State.HOLE)
        assert plain(pagemap.scan(made.start, made.end, return_mask=oracle.KNOWN)) == united(everything)
        for question in asked:
            mask, inverted, anyof, returned = question
            wanted = [
                Seen(page, bits & returned) for page, bits in everything if oracle.matches(bits, mask, inverted, anyof)
            ]
            assert plain(pagemap.scan(made.start, made.end, **question.asked)) == united(wanted)


@settings(max_examples=fewer(100))
@given(states, events, st.booleans())
def test_agrees_with_the_page_map_as_a_file(
    given_states: list[State], later: list[Later], with_huge_page: bool
) -> None:
    """/proc/PID/pagemap, by read: bit 63 present, 62 swapped (and markers), 61 of a file or shared, 57 armed."""
    with arena(given_states, with_huge_page) as made, UffdSession() as session, Pagemap() as pagemap:
        made.arm(session)
        made.happen(later[: len(given_states)])
        found = {
            page: bits
            for start, end, bits in pagemap.scan(made.start, made.end, return_mask=oracle.KNOWN)
            for page in range(start, end, PAGE)
        }
        length = (made.end - made.start) // PAGE
        raw = os.pread(pagemap.fileno(), 8 * length, made.start // PAGE * 8)
        for number, entry in enumerate(struct.unpack(f"{length}Q", raw)):
            page = made.start + number * PAGE
            if page not in found:
                assert entry == 0
                assert made.states[(page - made.small) // PAGE] is State.HOLE
                continue
            bits = found[page]
            assert bool(bits & PageCategory.PRESENT) == bool(entry >> 63 & 1)
            assert bool(bits & PageCategory.SWAPPED) == bool(entry >> 62 & 1)
            assert bool(bits & PageCategory.FILE) == bool(entry >> 61 & 1)
            if bits & (PageCategory.PRESENT | PageCategory.SWAPPED):
                assert bool(bits & PageCategory.WRITTEN) == (not entry >> 57 & 1)
            assert bits & PageCategory.WPALLOWED


@settings(max_examples=fewer(120))
@given(
    states,
    events,
    st.one_of(questions, exact_question),
    st.one_of(st.just(0), st.integers(1, 24)),
    st.sampled_from((ARMING, ScanFlag.WP_MATCHING)),
)
def test_arms_what_it_returns_and_nothing_else(
    given_states: list[State], later: list[Later], question: Question, max_pages: int, flags: ScanFlag
) -> None:
    with arena(given_states) as made, UffdSession() as session, Pagemap() as pagemap:
        made.arm(session)
        made.happen(later[: len(given_states)])
        everything = Question(0, 0, 0, oracle.WRITTEN)
        before = dict(page_by_page(pagemap.fileno(), made.start, made.end, everything))
        truth = page_by_page(pagemap.fileno(), made.start, made.end, question)
        wanted = truth[:max_pages] if max_pages else truth
        scan = pagemap.scan(made.start, made.end, **question.asked, max_pages=max_pages, flags=flags)
        assert plain(scan) == united(wanted)
        armed = {seen.start for seen in wanted}
        after = dict(page_by_page(pagemap.fileno(), made.start, made.end, everything))
        assert after == {page: 0 if page in armed else bits for page, bits in before.items()}


# ---- answers longer than the kernel's vector ------------------------------------------------------------------------


@contextmanager
def across_a_gibibyte(pages: int) -> Iterator[int]:
    """Memory without huge pages, with a multiple of 1 GiB in its middle, where the walk is cut into calls."""
    nbytes = pages * PAGE
    reserved = (1 << 30) + 2 * nbytes
    at = oracle.map_at(0, reserved, extra=MAP_NORESERVE)
    oracle.discard(at, reserved, mmap.MADV_NOHUGEPAGE)
    try:
        yield -(-(at + nbytes // 2) // (1 << 30)) * (1 << 30) - nbytes // 2 // PAGE * PAGE
    finally:
        oracle.unmap(at, reserved)


def every_second_page(address: int, pages: int) -> Any:
    """The first byte of every second page, to read from or write to."""
    buffer: Any = (ctypes.c_ubyte * (pages * PAGE)).from_address(address)
    return np.frombuffer(buffer, np.uint8)[:: 2 * PAGE]


def assert_every_second_page(scan: Scan, address: int, count: int, bits: PageCategory) -> None:
    numbers = np.asarray(scan.page_regions)
    assert numbers.shape == (count, 3)
    assert (numbers[:, 0] == address + np.arange(count, dtype=np.uint64) * (2 * PAGE)).all()
    assert (numbers[:, 1] == numbers[:, 0] + PAGE).all(), "sorted and disjoint, one page each"
    assert (numbers[:, 2] == int(bits)).all()
    assert scan.page_count == count


ALTERNATE = 110_000


def test_more_page_regions_than_one_answer_holds() -> None:
    with across_a_gibibyte(ALTERNATE) as address, Pagemap() as pagemap:
        end = address + ALTERNATE * PAGE
        every_second_page(address, ALTERNATE).sum()  # the zero page, so no memory
        scan = present((address, ALTERNATE * PAGE), pagemap)
        assert_every_second_page(scan, address, ALTERNATE // 2, PageCategory.PRESENT)
        assert scan.walk_end == end
        odd = pagemap.scan(
            address,
            end,
            category_inverted=PageCategory.PRESENT,
            category_mask=PageCategory.PRESENT,
            return_mask=PageCategory.PFNZERO,
        )
        assert_every_second_page(odd, address + PAGE, ALTERNATE // 2, PageCategory(0))


@pytest.mark.parametrize("max_pages", [1, 511, 512, 1023, 1024, 1025, 2500, ALTERNATE // 2 - 1, ALTERNATE // 2])
def test_max_pages_is_exact_over_many_answers(max_pages: int) -> None:
    with across_a_gibibyte(ALTERNATE) as address, Pagemap() as pagemap:
        every_second_page(address, ALTERNATE).sum()
        asked = {"category_mask": PageCategory.PRESENT, "return_mask": PageCategory.PRESENT, "max_pages": max_pages}
        scan = pagemap.scan(address, address + ALTERNATE * PAGE, **asked)
        assert_every_second_page(scan, address, max_pages, PageCategory.PRESENT)
        assert scan.walk_end == address + (2 * max_pages - 1) * PAGE
        rest = pagemap.scan(scan.walk_end, address + ALTERNATE * PAGE, **{**asked, "max_pages": 0})
        assert rest.page_count == ALTERNATE // 2 - max_pages


def test_a_long_answer_is_armed_once_and_whole() -> None:
    with across_a_gibibyte(ALTERNATE) as address, Pagemap() as pagemap, UffdSession() as session:
        end = address + ALTERNATE * PAGE
        session.write_protect(session.register((address, ALTERNATE * PAGE)))
        every_second_page(address, ALTERNATE)[:] = 1
        scan = pagemap.scan(address, end, **EXACT, flags=ARMING)
        assert_every_second_page(scan, address, ALTERNATE // 2, PageCategory.WRITTEN)
        assert len(pagemap.scan(address, end, **EXACT, flags=ARMING)) == 0
        every_second_page(address + PAGE, ALTERNATE - 1)[:] = 1
        scan = pagemap.scan(address, end, **EXACT, flags=ARMING, max_pages=30_000)
        assert_every_second_page(scan, address + PAGE, 30_000, PageCategory.WRITTEN)
        scan = pagemap.scan(scan.walk_end, end, **EXACT, flags=ARMING)
        assert_every_second_page(scan, address + 60_001 * PAGE, ALTERNATE // 2 - 30_000, PageCategory.WRITTEN)


def test_walk_end_where_the_kernels_own_may_lie() -> None:
    """1,500 dirty pages below page 3,000 of 16,384: after the 512th region the kernel's may point backwards."""
    pages = 16_384
    memory = dirtytrack.allocate(pages * PAGE)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    with UffdSession() as session, Pagemap() as pagemap:
        region = session.register(memory)
        session.write_protect(region)
        for _ in range(3):
            every_second_page(memory.address, 3000)[:] = 1
            scan = pagemap.scan(region.start, region.end, **EXACT, flags=ARMING)
            assert_every_second_page(scan, memory.address, 1500, PageCategory.WRITTEN)
            assert scan.walk_end == region.end
            assert len(pagemap.scan(region.start, region.end, **EXACT)) == 0, "all of them were armed"


def test_the_edges_of_a_range() -> None:
    with oracle.mapped(4 * PAGE) as address, Pagemap() as pagemap:
        oracle.poke_bytes(address, bytes(4 * PAGE))
        asked = {"category_mask": PageCategory.PRESENT, "return_mask": PageCategory.PRESENT}
        empty = pagemap.scan(address, address, **asked)
        assert (len(empty), empty.page_regions.shape, empty.walk_end) == (0, (0, 3), address)
        assert list(empty) == []
        scan = pagemap.scan(address, address + 1, **asked)
        assert plain(scan) == [(address, address + PAGE, PageCategory.PRESENT)]
        assert scan.walk_end == address + PAGE, "the end is rounded up, as the kernel does"
        for start, end in ((address + PAGE, address), (address, 1 << 63)):
            with pytest.raises(dirtytrack.InvalidMemory, match="address space"):
                pagemap.scan(start, end, **asked)
        # The last page that a process can have: nothing is there, and nothing overflows.
        last = (1 << 47) - 2 * PAGE
        assert len(pagemap.scan(last, last + PAGE, **asked)) == 0


def test_what_comes_back_outlives_the_scan() -> None:
    with oracle.mapped(4 * PAGE) as address, Pagemap() as pagemap:
        oracle.poke_bytes(address + PAGE, b"\1")
        view = pagemap.scan(address, address + 4 * PAGE, category_mask=PageCategory.PRESENT).page_regions
        assert (view.format, view.ndim, view.readonly) == ("Q", 2, True)
        numbers: list[Any] = view.tolist()
        assert numbers == [[address + PAGE, address + 2 * PAGE, 0]], "a return mask of 0 tells where, not what"


def test_what_an_arming_scan_took_before_it_failed_is_told() -> None:
    pages = 5000
    with oracle.mapped((pages + 1) * PAGE) as address, Pagemap() as pagemap, UffdSession() as session:
        oracle.discard(address, pages * PAGE, mmap.MADV_NOHUGEPAGE)
        session.write_protect(session.register((address, pages * PAGE)))
        every_second_page(address, pages)[:] = 1
        with pytest.raises(dirtytrack.NotRegistered) as caught:
            pagemap.scan(address, address + (pages + 1) * PAGE, **EXACT, flags=ARMING)
        assert caught.value.partial is not None
        assert_every_second_page(caught.value.partial, address, pages // 2, PageCategory.WRITTEN)
        assert len(pagemap.scan(address, address + pages * PAGE, **EXACT)) == 0

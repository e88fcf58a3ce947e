# SPDX-License-Identifier: MIT
"""`Pagemap` on guard pages, huge pages, memory that nobody registered and other processes; and the questions by name.

Among them: the arming question that can hang a process beyond SIGKILL is refused; a process that ended or replaced
itself by exec is told, not taken for an empty one. Takes about 3 s of CI's 20 min.
"""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import dirtytrack
from dirtytrack import PageCategory, Pagemap, Run, Scan, ScanFlag, UffdSession
from dirtytrack.pagemap import PageRegion, huge, present, swapped, written, zero
from tests import oracle
from tests.kernel.host import HUGE_PAGE
from tests.kernel.kinds import some
from tests.oracle import PAGE

MAP_NORESERVE, MAP_HUGETLB = 0x4000, 0x40000
EXACT = {"category_mask": PageCategory.WRITTEN, "return_mask": PageCategory.WRITTEN}
ARMING = ScanFlag.WP_MATCHING | ScanFlag.CHECK_WPASYNC


def plain(scan: Scan) -> list[tuple[int, int, int]]:
    return [(start, end, int(bits)) for start, end, bits in scan]


# ---- categories and kinds of memory ---------------------------------------------------------------------------------


def test_a_guard_page_where_the_kernel_has_them() -> None:
    madv_guard_install = 102
    guard = PageCategory.GUARD
    with oracle.mapped(4 * PAGE) as address, Pagemap() as pagemap:
        if dirtytrack.probe().categories & guard:
            oracle.discard(address + PAGE, PAGE, madv_guard_install)
            [page] = pagemap.scan(address, address + 4 * PAGE, category_mask=guard, return_mask=guard)
            assert page == PageRegion(address + PAGE, address + 2 * PAGE, guard)
        else:
            with pytest.raises(dirtytrack.InvalidMemory, match="does not know"):
                pagemap.scan(address, address + 4 * PAGE, return_mask=guard)


def assert_refused(pagemap: Pagemap, start: int, end: int) -> None:
    """Each arming question that is not the exact one, wherever the range touches hugetlb memory."""
    asked: tuple[dict[str, int], ...] = (
        {},
        {"category_mask": PageCategory.WRITTEN},
        {"return_mask": PageCategory.WRITTEN},
        {**EXACT, "category_anyof_mask": PageCategory.PRESENT},
        {**EXACT, "category_inverted": PageCategory.PRESENT},
        {"category_mask": PageCategory.WRITTEN, "return_mask": PageCategory.WRITTEN | PageCategory.PRESENT},
    )
    for question in asked:
        for flags in (ScanFlag.WP_MATCHING, ARMING):
            with pytest.raises(dirtytrack.InvalidMemory, match="hang") as caught:
                pagemap.scan(start, end, **question, flags=flags)
            assert caught.value.start is not None


def test_arming_is_refused_over_hugetlb_memory_that_has_no_page() -> None:
    address = oracle.map_at(0, 3 * HUGE_PAGE, extra=MAP_HUGETLB | MAP_NORESERVE)
    with Pagemap() as pagemap:
        assert_refused(pagemap, address, address + HUGE_PAGE)
    oracle.unmap(address, 3 * HUGE_PAGE)


def test_arming_over_hugetlb_memory(tmp_path: Path) -> None:
    [kind] = some("hugetlb private")
    with kind.map(3, tmp_path) as area, Pagemap() as pagemap, oracle.userfaultfd() as uffd:
        address, end = area.address, area.end
        ctypes.memset(address, 1, 2 * HUGE_PAGE)
        assert_refused(pagemap, address, end)
        assert_refused(pagemap, address - PAGE, address + PAGE)
        assert_refused(pagemap, end - PAGE, end + PAGE)
        assert plain(huge((address, end - address))) == [(address, end, PageCategory.HUGE)]
        assert plain(present((address, end - address))) == [(address, address + 2 * HUGE_PAGE, PageCategory.PRESENT)]
        oracle.register(uffd, address, end)
        assert_refused(pagemap, address, end)
        scan = pagemap.scan(address, end, **EXACT, flags=ARMING)
        assert plain(scan) == [(address, address + 2 * HUGE_PAGE, PageCategory.WRITTEN)], "the exact question is safe"
        oracle.poke_bytes(address + HUGE_PAGE + 5 * PAGE, b"\2")
        scan = pagemap.scan(address, end, **EXACT, flags=ARMING)
        assert plain(scan) == [(address + HUGE_PAGE, address + 2 * HUGE_PAGE, PageCategory.WRITTEN)]
        ctypes.memset(address, 2, 2 * HUGE_PAGE)
        for pages in (1, HUGE_PAGE // PAGE - 1, HUGE_PAGE // PAGE + 1):  # the kernel would pass over what does not fit
            with pytest.raises(dirtytrack.InvalidMemory, match="multiple"):
                pagemap.scan(address, end, **EXACT, flags=ARMING, max_pages=pages)
        scan = pagemap.scan(address, end, **EXACT, flags=ARMING, max_pages=HUGE_PAGE // PAGE)
        assert plain(scan) == [(address, address + HUGE_PAGE, PageCategory.WRITTEN)]
        assert scan.walk_end == address + HUGE_PAGE
        scan = pagemap.scan(address, end, **EXACT, flags=ARMING)
        assert plain(scan) == [(address + HUGE_PAGE, address + 2 * HUGE_PAGE, PageCategory.WRITTEN)]


def test_a_rich_question_may_arm_other_memory() -> None:
    """The refusal is for hugetlb alone, transparent huge pages are not."""
    memory = dirtytrack.allocate(2 * HUGE_PAGE, huge="transparent")
    memory[0] = memory[HUGE_PAGE] = 1
    with Pagemap() as pagemap, UffdSession() as session:
        region = session.register(memory)
        session.write_protect(region)
        memory[HUGE_PAGE + 3 * PAGE] = 1
        rich = {**EXACT, "category_anyof_mask": PageCategory.PRESENT}
        scan = pagemap.scan(region.start, region.end, **rich, flags=ARMING)
        page = region.start + HUGE_PAGE + 3 * PAGE
        assert plain(scan) == [(page, page + PAGE, PageCategory.WRITTEN)]
        assert len(written(region)) == 0


# ---- memory that is not registered ----------------------------------------------------------------------------------


def test_checking_tells_registered_from_not() -> None:
    with oracle.mapped(8 * PAGE) as address, Pagemap() as pagemap, UffdSession() as session:
        check = {**EXACT, "flags": ScanFlag.CHECK_WPASYNC}
        session.write_protect(session.register((address + 2 * PAGE, 4 * PAGE)))
        oracle.poke_bytes(address + 3 * PAGE, b"\1")
        assert plain(pagemap.scan(address + 2 * PAGE, address + 6 * PAGE, **check)) == [
            (address + 3 * PAGE, address + 4 * PAGE, PageCategory.WRITTEN)
        ]
        for first, last in ((0, 8), (0, 2), (1, 3), (5, 7), (6, 8)):
            with pytest.raises(dirtytrack.NotRegistered) as caught:
                pagemap.scan(address + first * PAGE, address + last * PAGE, **check)
            assert caught.value.partial is not None
            with pytest.raises(dirtytrack.NotRegistered):
                written((address + first * PAGE, (last - first) * PAGE))
        session.suspend()
        with pytest.raises(dirtytrack.NotRegistered):
            pagemap.scan(address + 2 * PAGE, address + 6 * PAGE, **check)


# ---- the questions by name ------------------------------------------------------------------------------------------


def test_the_questions_by_name() -> None:
    memory = dirtytrack.allocate(8 * PAGE)
    at = memory.address
    memory[0] = 1  # stored to
    assert memory[PAGE] == 0  # read: the zero page
    assert plain(present(memory)) == [(at, at + 2 * PAGE, PageCategory.PRESENT)]
    assert plain(zero(memory)) == [(at + PAGE, at + 2 * PAGE, PageCategory.PFNZERO)]
    assert len(swapped(memory)) == len(huge(memory)) == 0
    with UffdSession() as session, dirtytrack.DirtyTracker(session, [session.register(memory)]) as tracker:
        memory[PAGE] = memory[4 * PAGE] = 1
        wanted = [(at + PAGE, at + 2 * PAGE, 2), (at + 4 * PAGE, at + 5 * PAGE, 2)]
        assert plain(written(memory)) == plain(written(tracker.regions[0])) == plain(written((at, 8 * PAGE))) == wanted
        assert plain(written(Run(at + 4 * PAGE, at + 6 * PAGE))) == wanted[1:]
        assert plain(written(memoryview(memory)[5 * PAGE - 1 : 5 * PAGE])) == wanted[1:], "rounded outward"
        assert plain(swapped(memory)) == [
            (at + 2 * PAGE, at + 4 * PAGE, PageCategory.SWAPPED),
            (at + 5 * PAGE, at + 8 * PAGE, PageCategory.SWAPPED),
        ], "armed pages without content"
        assert len(zero(memory)) == 0
        assert list(tracker.collect().pages()) == [1, 4], "asking arms nothing"
    read_only = memoryview(memory).toreadonly()
    assert plain(present(read_only))[0][0] == at


def test_transparent_huge_pages_are_huge() -> None:
    memory = dirtytrack.allocate(2 * HUGE_PAGE, huge="transparent")
    memory[HUGE_PAGE] = 1
    at = memory.address
    assert plain(huge(memory)) == [(at + HUGE_PAGE, at + 2 * HUGE_PAGE, PageCategory.HUGE)]
    assert plain(huge(memoryview(memory)[HUGE_PAGE + 5 : HUGE_PAGE + 6])) == [
        (at + HUGE_PAGE, at + HUGE_PAGE + PAGE, PageCategory.HUGE)
    ]


def test_what_is_no_memory_is_refused() -> None:
    for memory in ("text", None, (0, 0), (1 << 64, 1), Run(PAGE, PAGE), bytearray()):
        with pytest.raises(dirtytrack.InvalidMemory):
            present(memory)  # type: ignore[arg-type]


# ---- other processes ------------------------------------------------------------------------------------------------

_CHILD = """
import ctypes, os, sys
import dirtytrack
memory = dirtytrack.allocate(64 * 4096)
session = dirtytrack.UffdSession()
print(memory.address, flush=True)
for line in sys.stdin:
    what, *numbers = line.split()
    for number in map(int, numbers):
        if what == "store":
            memory[number * 4096] = 1
        elif what == "read":
            memory[number * 4096]
        elif what == "arm":
            session.write_protect(session.register((memory.address + number * 4096, 4096)))
    if what == "exec":
        os.execv(sys.executable, [sys.executable, "-c", "print(0, flush=True); input()"])
    if what == "end":
        break
    print("done", flush=True)
"""


class Child:
    """A process that does with its own 64 pages what it is told."""

    def __init__(self) -> None:
        command = [sys.executable, "-W", "error", "-c", _CHILD]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self.process.pid
        self.address = int(self._answer())
        self.memory = self.address, 64 * PAGE

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def do(self, what: str, *pages: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join((what, *map(str, pages))) + "\n")
        self.process.stdin.flush()
        self._answer()

    def numbers(self, scan: Scan) -> list[int]:
        return [(page - self.address) // PAGE for start, end, _ in scan for page in range(start, end, PAGE)]


@pytest.fixture
def child() -> Iterator[Child]:
    made = Child()
    try:
        yield made
    finally:
        made.process.kill()
        made.process.communicate()


def test_another_process(child: Child) -> None:
    with Pagemap(child.pid) as pagemap:
        assert pagemap.pid == child.pid
        assert child.numbers(present(child.memory, pagemap)) == []
        child.do("store", 3, 4, 9)
        child.do("read", 5, 60)
        assert child.numbers(present(child.memory, pagemap)) == [3, 4, 5, 9, 60]
        assert child.numbers(zero(child.memory, pagemap)) == [5, 60]
        with pytest.raises(dirtytrack.NotRegistered):
            written(child.memory, pagemap)
        child.do("arm", *range(64))
        assert child.numbers(written(child.memory, pagemap)) == []
        child.do("store", 4, 30)
        child.do("read", 9)
        assert child.numbers(written(child.memory, pagemap)) == [4, 30]
        scan = pagemap.scan(child.address, child.address + 64 * PAGE, **EXACT, flags=ARMING, max_pages=1)
        assert child.numbers(scan) == [4], "armed from here"
        child.do("store", 5)
        assert child.numbers(written(child.memory, pagemap)) == [5, 30]
        raw = os.pread(pagemap.fileno(), 8 * 64, child.address // PAGE * 8)
        disarmed = [number for number, entry in enumerate(struct.unpack("64Q", raw)) if not entry >> 57 & 1]
        assert disarmed == [5, 30], "the page map as a file agrees"


def test_a_rich_arming_question_to_another_process_looks_at_its_mappings(child: Child) -> None:
    child.do("arm", *range(64))
    with Pagemap(child.pid) as pagemap:
        rich = {**EXACT, "category_anyof_mask": PageCategory.PRESENT, "flags": ARMING}
        child.do("store", 7)
        assert child.numbers(pagemap.scan(child.address, child.address + 64 * PAGE, **rich)) == [7]
        child.do("end")
        child.process.wait()
        with pytest.raises(dirtytrack.TargetGone, match="ended") as caught:
            pagemap.scan(child.address, child.address + 64 * PAGE, **rich)
        assert caught.value.pid == child.pid


def test_a_process_that_ended(child: Child) -> None:
    with Pagemap(child.pid) as pagemap:
        child.do("store", 1)
        child.do("end")
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie, whose pid is still there
        for _ in range(2):
            for question in (present, written, zero):
                with pytest.raises(dirtytrack.TargetGone) as caught:
                    question(child.memory, pagemap)
                assert caught.value.pid == child.pid
                assert isinstance(caught.value, ProcessLookupError)
            child.process.wait()
        with pytest.raises(dirtytrack.TargetGone):
            Pagemap(child.pid)


def test_a_process_that_replaced_itself_is_not_taken_for_an_empty_one(child: Child) -> None:
    with Pagemap(child.pid) as pagemap:
        child.do("store", 1)
        assert child.numbers(present(child.memory, pagemap)) == [1]
        child.do("exec")
        with pytest.raises(dirtytrack.TargetGone, match="exec"):
            present(child.memory, pagemap)
        with Pagemap(child.pid) as fresh:  # the trap: a new descriptor answers, about another program
            assert len(present(child.memory, fresh)) == 0
        with pytest.raises(dirtytrack.TargetGone):
            present(child.memory, pagemap)


# ---- the object -----------------------------------------------------------------------------------------------------


def test_descriptors_are_closed() -> None:
    pagemap = Pagemap()
    fd = pagemap.fileno()
    assert not os.get_inheritable(fd)
    del pagemap
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)
    with pytest.raises(KeyError), Pagemap() as pagemap:
        raise KeyError
    assert pagemap.fileno() == -1


def test_masks_are_numbers_of_any_kind() -> None:
    with oracle.mapped(2 * PAGE) as address, Pagemap() as pagemap:
        oracle.poke_bytes(address, b"\1")
        mask = PageCategory.PRESENT
        for flavour in (mask, int(mask), np.uint64(mask)):
            scan = pagemap.scan(address, address + 2 * PAGE, category_mask=flavour, return_mask=flavour)
            assert plain(scan) == [(address, address + PAGE, PageCategory.PRESENT)]
            assert repr(scan) == f"<Scan of 1 page regions up to {address + 2 * PAGE:#x}>"

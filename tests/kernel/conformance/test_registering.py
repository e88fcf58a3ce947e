# SPDX-License-Identifier: MIT
"""Which mappings can be registered and which cannot, whatever kind of memory is beneath; and what is true of them then.

How a session words a refusal is in failures/test_memory.py. Takes under 1 s of CI's 20 min.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pytest

import dirtytrack
from dirtytrack import DirtyTracker, UffdSession
from dirtytrack.region import OTHER_WRITERS
from tests import oracle
from tests.kernel.kinds import KINDS, Area, Kind, some
from tests.kernel.ring import Ring
from tests.kernel.watched import Watched
from tests.oracle import PAGE

PAGES = 8
PRIVATE_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
READ, WRITE = mmap.PROT_READ, mmap.PROT_WRITE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


@contextmanager
def mapping(rights: int, flags: int, fd: int = -1, nbytes: int = PAGES * PAGE) -> Iterator[Area]:
    at = oracle._libc.mmap(None, nbytes, rights, flags, fd, 0)
    assert at != oracle.MAP_FAILED
    yield Area(at, nbytes, PAGE, fd)
    oracle.unmap(at, nbytes)


# ---- private memory with flags --------------------------------------------------------------------------------------

FLAGS = {
    "not reserved": 0x4000,
    "for a stack": 0x20000,
    "locked": 0x2000,
    "populated": 0x8000,
    "growing downwards": 0x100,
}
ADVICE = {"wiped on fork": 18, "not inherited": 10, "not in a core dump": 16, "mergeable": 12}


def assert_exact(area: Area) -> None:
    with Watched(area, compare=False) as watched:
        assert watched.collect() == set()
        for unit in (2, 5):
            area.store(unit)
            area.load(1)
            assert watched.collect() == {unit}


@pytest.mark.parametrize("flag", FLAGS)
def test_private_memory_of_any_flag(flag: str) -> None:
    with mapping(READ | WRITE, PRIVATE_ANONYMOUS | FLAGS[flag]) as area:
        assert_exact(area)


@pytest.mark.parametrize("advice", ADVICE)
def test_private_memory_of_any_advice(advice: str) -> None:
    with mapping(READ | WRITE, PRIVATE_ANONYMOUS) as area:
        oracle.discard(area.address, area.nbytes, ADVICE[advice])
        assert_exact(area)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("rights", [0, READ], ids=["none", "read only"])
def test_memory_without_the_right_to_write(watched: Watched, rights: int) -> None:
    """Registered is not written: no store comes through while it may not, and afterwards each is seen."""
    area = watched.area
    area.store(1)
    oracle.protect(area.address, area.nbytes, rights)
    assert area.of_runs(watched.tracker.collect()) == {1}
    assert area.of_runs(watched.tracker.collect()) == set()
    oracle.protect(area.address, area.nbytes, READ | WRITE)
    area.store(2)
    assert area.of_runs(watched.tracker.collect()) == {2}


def test_read_only_private_mappings_register() -> None:
    """Nothing can be stored to them, and nothing is reported."""
    with (
        open(__file__, "rb") as file,
        mapping(READ, mmap.MAP_PRIVATE, file.fileno(), PAGE) as area,
        oracle.userfaultfd() as uffd,
    ):
        oracle.register(uffd, area.address, area.end)
        oracle.exact(area.address, area.end)
        assert oracle.peek_bytes(area.address, 2) == b"# "
        assert oracle.exact(area.address, area.end) == set()


def test_a_sealed_mapping() -> None:
    """mseal: it can be neither unmapped nor protected, and be registered all the same. In a child: it is for good."""
    child = os.fork()
    if not child:
        code = 1
        with suppress(BaseException):
            at = oracle.map_at(0, PAGES * PAGE)
            mseal = 462
            done = _libc.syscall(mseal, ctypes.c_void_p(at), ctypes.c_size_t(PAGES * PAGE), 0)
            assert done == 0 or ctypes.get_errno() == errno.ENOSYS
            with oracle.userfaultfd() as uffd:
                oracle.register(uffd, at, at + PAGES * PAGE)
                oracle.arm(uffd, at, at + PAGES * PAGE)
                for page in (2, 5):
                    oracle.poke_bytes(at + page * PAGE, b"\1")
                    assert oracle.exact(at, at + PAGES * PAGE) == {page}
            code = 0
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ---- shared memory that may only be read ----------------------------------------------------------------------------


def test_a_read_only_mapping_of_a_file_that_may_be_written_registers(tmp_path: Path) -> None:
    fd = os.memfd_create("writable")
    os.ftruncate(fd, PAGES * PAGE)
    with mapping(READ, mmap.MAP_SHARED, fd) as area, oracle.userfaultfd() as uffd:
        oracle.register(uffd, area.address, area.end)
        oracle.exact(area.address, area.end)
        area.load(1)
        assert oracle.exact(area.address, area.end) == set()
    os.close(fd)


@contextmanager
def file_opened_to_read() -> Iterator[int]:
    with open(__file__, "rb") as file:
        yield file.fileno()


@contextmanager
def file_sealed() -> Iterator[int]:
    fd = os.memfd_create("sealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGES * PAGE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0x10)  # F_SEAL_FUTURE_WRITE
    yield fd
    os.close(fd)


@pytest.mark.parametrize("opened", [file_opened_to_read, file_sealed])
def test_shared_memory_that_nobody_may_write_is_refused(opened: Callable[[], AbstractContextManager[int]]) -> None:
    with opened() as fd, mapping(READ, mmap.MAP_SHARED, fd, PAGE) as area:
        with oracle.userfaultfd() as uffd, pytest.raises(PermissionError):
            oracle.register(uffd, area.address, area.end)
        with UffdSession() as session, pytest.raises(dirtytrack.InvalidMemory):
            session.register(area.memory, blind_spots="accepted")


def test_one_mapping_that_is_refused_leaves_its_neighbours_alone() -> None:
    with oracle.apart(PAGES * PAGE) as at, open(__file__, "rb") as file, oracle.userfaultfd() as uffd:
        flags = mmap.MAP_SHARED | 0x10
        assert oracle._libc.mmap(at + 4 * PAGE, PAGE, READ, flags, file.fileno(), 0) == at + 4 * PAGE
        with pytest.raises(PermissionError):
            oracle.register(uffd, at, at + PAGES * PAGE)
        with pytest.raises(PermissionError):
            oracle.exact(at, at + 4 * PAGE)  # the first part is not registered either


# ---- what is no memory of a program's own ---------------------------------------------------------------------------


def named(name: str) -> tuple[int, int]:
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(name):
            start, end = (int(part, 16) for part in line.split(None, 1)[0].split("-"))
            return start, end
    pytest.fail(f"no mapping is called {name}")


def refused(uffd: int, start: int, end: int) -> int:
    with pytest.raises(OSError, match=r"Invalid argument|busy|not permitted") as caught:
        oracle.register(uffd, start, end)
    return int(caught.value.errno or 0)


def test_special_mappings_are_refused() -> None:
    """By some kernels the vdso too, which is then private memory like any other."""
    start, end = named("[vvar]")
    with oracle.userfaultfd() as uffd:
        assert refused(uffd, start, end) in (errno.EINVAL, errno.EPERM)
    with UffdSession() as session, pytest.raises(dirtytrack.InvalidMemory):
        session.register((start, end - start), blind_spots="accepted")


def test_a_ring_is_refused_or_known_to_have_other_writers() -> None:
    """Linux 6.12 lets it be registered; the kernel writes it by an address of its own."""
    with Ring(), UffdSession() as session:
        start, end = named("anon_inode:[io_uring]")
        try:
            region = session.register((start, end - start), blind_spots="accepted")
        except dirtytrack.InvalidMemory:
            return
        assert OTHER_WRITERS in region.blind_spots


def test_ranges_that_are_none_are_refused() -> None:
    with oracle.apart(PAGES * PAGE) as at, oracle.userfaultfd() as uffd:
        for start, end in ((at + 1, at + PAGE + 1), (at, at), (at, at + PAGE + 1)):
            assert refused(uffd, start, end) == errno.EINVAL
        oracle.unmap(at + 4 * PAGE, 4 * PAGE)
        assert refused(uffd, at + 4 * PAGE, at + PAGES * PAGE) == errno.EINVAL
        oracle.map_at(at + 4 * PAGE, 4 * PAGE)


def test_a_hole_in_a_range_is_passed_over() -> None:
    with oracle.apart(PAGES * PAGE) as at, oracle.userfaultfd() as uffd:
        oracle.unmap(at + 3 * PAGE, PAGE)
        oracle.register(uffd, at, at + PAGES * PAGE)
        oracle.exact(at, at + PAGES * PAGE)
        oracle.poke_bytes(at + PAGE, b"\1")
        oracle.poke_bytes(at + 4 * PAGE, b"\1")
        assert oracle.exact(at, at + PAGES * PAGE) == {1, 4}
        oracle.map_at(at + 3 * PAGE, PAGE)


FROM_RIGHT = 16  # enum dt_remedy


@pytest.mark.parametrize("remedy", [0, FROM_RIGHT])
@pytest.mark.parametrize(
    "kind", some("System V", "disk file shared", "memfd private", "private anonymous", "hugetlb System V"), ids=str
)
def test_parts_of_a_mapping_are_let_go_of(kind: Kind, area: Area, remedy: int) -> None:
    """To let go of one that could be joined to the left, but may not, ends the process on Linux 6.12: it hangs."""
    with UffdSession(_remedy=remedy) as session, UffdSession() as another:
        parts = [session.register((area.at(unit), area.granule), blind_spots="accepted") for unit in (1, 2, 3, 5, 6, 7)]
        with DirtyTracker(session, parts):
            area.store(2)
        for unit in (1, 2, 3):  # apart, and alike again: most are joined, System V's stay apart
            oracle.protect(area.at(unit), area.granule, READ)
            oracle.protect(area.at(unit), area.granule, READ | WRITE)
        for part in (parts[1], parts[3]):
            session.unregister(part)
        registered = {
            unit for unit in range(8) if oracle.categories(area.at(unit), area.at(unit) + PAGE)[0] & oracle.WPALLOWED
        }
        assert registered == {1, 3, 6, 7}, "and nothing else"
        with DirtyTracker(another, [another.register((area.at(2), area.granule), blind_spots="accepted")]) as tracker:
            area.store(2)
            assert tracker.collect().page_count == area.unit_pages
    assert not any(bits & oracle.WPALLOWED for bits in oracle.categories(area.address, area.end))


def test_memory_of_another_userfaultfd_is_busy() -> None:
    with oracle.apart(PAGES * PAGE) as at, oracle.userfaultfd() as first, oracle.userfaultfd() as second:
        oracle.register(first, at + PAGE, at + 2 * PAGE)
        assert refused(second, at, at + PAGES * PAGE) == errno.EBUSY
        oracle.register(second, at + 2 * PAGE, at + 3 * PAGE)


@pytest.mark.parametrize("kind", some("hugetlb private", "hugetlb memfd"), ids=str)
def test_a_part_of_a_huge_page_is_refused(kind: Kind, area: Area) -> None:
    with oracle.userfaultfd() as uffd:
        for start, end in ((area.address, area.address + PAGE), (area.at(1) - PAGE, area.at(2))):
            assert refused(uffd, start, end) == errno.EINVAL

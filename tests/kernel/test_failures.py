# SPDX-License-Identifier: MIT
"""Every way in which a call can fail, provoked for real; `docs/failures.md` has a row for each test here.

After each, the session is usable: the `world` fixture writes a page and finds it, and so do the children.
"""

from __future__ import annotations

import ast
import builtins
import ctypes
import errno
import mmap
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import dirtytrack
from dirtytrack import DirtyTracker, Memory, PageCategory, Pagemap, Region, ScanFlag, UffdSession, errors
from dirtytrack.kernel import core
from tests.sandbox import RESTRICTIONS, check, failing, libc, run_in_child

PAGE = core.PAGE_BYTES
PAGES = 16
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
MAP_FIXED, MAP_HUGETLB, MAP_NORESERVE = 0x10, 0x40000, 0x4000
MNT_DETACH = 2
TABLE = Path(__file__).parents[2] / "docs" / "failures.md"


def write(memory: Memory, page: int) -> None:
    memory[page * PAGE] ^= 0xFF


def map_raw(pages: int, at: int = 0, flags: int = 0) -> int:
    """The address of new private memory that nobody holds."""
    fixed = MAP_FIXED if at else 0
    address = libc.mmap(at or None, pages * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, PRIVATE | fixed | flags, -1, 0)
    assert address != ctypes.c_void_p(-1).value
    return int(address)


def unmap(address: int, pages: int) -> None:
    assert libc.munmap(address, pages * PAGE) == 0


class World:
    """A session with one region that is tracked."""

    def __init__(self) -> None:
        self.memory = dirtytrack.allocate(PAGES * PAGE, name="world")
        self.session = UffdSession()
        self.region = self.session.register(self.memory)
        self.tracker = DirtyTracker(self.session, [self.region])
        self.tracker.start()

    def assert_usable(self) -> None:
        """The session finds a write; where the test closed it, a new one does."""
        assert_finds_a_write(self.tracker if self.tracker.epoch and not self.session.closed else None)
        assert_finds_a_write(None if self.session.closed else DirtyTracker(self.session, [self.region]))


def assert_finds_a_write(tracker: DirtyTracker | None = None) -> None:
    """By this tracker of a world's region, or by a new session."""
    memory: Memory
    if tracker is None:
        memory = dirtytrack.allocate(PAGES * PAGE)
        tracker = DirtyTracker((session := UffdSession()), [session.register(memory)])
    region = tracker.regions[0]
    if not tracker.epoch:
        tracker.start()
        assert not tracker.collect()
    address = region.start + 5 * PAGE
    ctypes.memset(address, ctypes.string_at(address, 1)[0] ^ 0xFF, 1)
    assert 5 in list(tracker.collect().pages(region))


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.assert_usable()
    made.session.close()


# ---- the table itself -----------------------------------------------------------------------------------------------


def rows() -> list[list[str]]:
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] != "Call"]


def test_each_failure_has_its_row_and_each_row_its_test() -> None:
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    tests = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    tests.remove("test_each_failure_has_its_row_and_each_row_its_test")
    table = rows()
    assert {len(row) for row in table} == {6}
    assert sorted({row[5].strip("`") for row in table}) == sorted(tests)
    named = set[str]()
    for row in table:
        for name in re.findall(r"`(\w+)`", row[2]):
            if name.isupper():
                assert name in errno.errorcode.values(), row
            else:
                named.add(name)
                assert hasattr(errors, name) or hasattr(builtins, name), row
    assert set(errors.__all__) - {"DirtyTrackError"} <= named


# ---- allocate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [0, -1, "4096", 1.5, None])
def test_allocate_no_number_of_bytes(nbytes: object) -> None:
    with pytest.raises(dirtytrack.InvalidMemory, match="number of bytes"):
        dirtytrack.allocate(nbytes)  # type: ignore[arg-type]


@pytest.mark.parametrize("huge", ["2M", "1G", "4K", True])
def test_allocate_a_kind_that_is_not_there(huge: object) -> None:
    with pytest.raises(dirtytrack.InvalidMemory, match="huge"):
        dirtytrack.allocate(PAGE, huge=huge)  # type: ignore[arg-type]


@pytest.mark.parametrize("shared", [False, True])
def test_allocate_more_than_there_is(shared: bool, world: World) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for nbytes in (1 << 62, 1 << 63, 1 << 80):
        with pytest.raises(dirtytrack.LimitReached, match="Ask for less") as caught:
            dirtytrack.allocate(nbytes, shared=shared)
        assert caught.value.errno in {errno.ENOMEM, errno.EINVAL, errno.EFBIG}
        assert caught.value.feature == "memory"
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def no_descriptor_left() -> None:
    held = []
    tracked = World()
    try:
        while True:
            held.append(os.open("/dev/null", os.O_RDONLY))
    except OSError as error:
        assert error.errno == errno.EMFILE
    for call in (UffdSession, lambda: dirtytrack.allocate(PAGE, shared=True), Pagemap):
        try:
            call()
        except dirtytrack.LimitReached as error:
            assert error.errno == errno.EMFILE
            print(error.feature, error)
        else:
            raise AssertionError("no descriptor, and no error")
    tracked.session.suspend()  # gives one back
    held.append(os.open("/dev/null", os.O_RDONLY))
    try:
        tracked.session.resume()
    except dirtytrack.LimitReached as error:
        assert error.errno == errno.EMFILE
    else:
        raise AssertionError("resumed without a descriptor")
    assert tracked.tracker.collect().page_count == PAGES, "suspended: all counts as dirty"
    os.close(held.pop())
    tracked.session.resume()
    assert tracked.tracker.collect().page_count == PAGES
    write(tracked.memory, 7)
    assert list(tracked.tracker.collect().pages(tracked.region)) == [7]
    for fd in held:
        os.close(fd)
    assert_finds_a_write()


def test_the_descriptor_limit_is_reached() -> None:
    told = run_in_child(no_descriptor_left, "64-descriptors")
    assert "RLIMIT_NOFILE" in told
    assert "ulimit -n" in told


def test_closing_memory_that_is_registered(world: World) -> None:
    with pytest.raises(BufferError):
        world.memory.close()


def test_resizing_a_buffer_that_is_registered(world: World) -> None:
    buffer = bytearray(2 * PAGE)
    region = world.session.register(buffer)
    with pytest.raises(BufferError):
        buffer.append(1)
    world.session.unregister(region)
    buffer.append(1)


def test_private_memory_has_no_descriptor(world: World) -> None:
    with pytest.raises(dirtytrack.InvalidMemory, match="shared=True"):
        world.memory.fileno()


# ---- register, track, add -------------------------------------------------------------------------------------------


def refused(world: World, memory: object, match: str, **options: object) -> dirtytrack.InvalidMemory:
    """By each of the three ways in."""
    session, tracker = world.session, world.tracker
    known = session.regions, tracker.regions
    with pytest.raises(dirtytrack.InvalidMemory, match=match):
        tracker.add(memory, **options)  # type: ignore[arg-type]
    with pytest.raises(dirtytrack.InvalidMemory, match=match):
        dirtytrack.track(memory, session=session, **options)  # type: ignore[arg-type]
    with pytest.raises(dirtytrack.InvalidMemory, match=match) as caught:
        session.register(memory, **options)  # type: ignore[arg-type]
    assert (session.regions, tracker.regions) == known
    return caught.value


def test_register_a_read_only_buffer(world: World) -> None:
    array = np.zeros(PAGE, np.uint8)
    array.flags.writeable = False
    for memory in (bytes(PAGE), array, memoryview(bytearray(PAGE)).toreadonly()):
        refused(world, memory, "read-only")


def test_register_a_strided_array(world: World) -> None:
    array = np.zeros((64, 64))
    for memory in (array[:, ::2], array.T, array[::-1], memoryview(bytearray(PAGE))[::2]):
        refused(world, memory, "not C-contiguous")


def test_register_nothing(world: World) -> None:
    for memory in (bytearray(), np.zeros((0, 8)), (world.region.address, 0)):
        refused(world, memory, "empty")


def test_register_what_is_no_buffer(world: World) -> None:
    for memory in ("text", object(), 4096, None, [1, 2]):
        refused(world, memory, "no buffer protocol")


def test_register_what_is_no_range(world: World) -> None:
    for memory in ((0x1000,), ("a", 1), (1.5, 2), (0x1000, 1, 2)):
        refused(world, memory, r"\(address, nbytes\) pair")
    for memory in ((-PAGE, PAGE), (PAGE, -1), ((1 << 64) - PAGE, 2 * PAGE), (1 << 64, 1)):
        refused(world, memory, "address space")


def test_register_what_is_not_mapped(world: World) -> None:
    address = map_raw(4)
    unmap(address + 2 * PAGE, 1)
    for first, pages in ((2, 1), (0, 4), (1, 2)):
        error = refused(world, (address + first * PAGE, pages * PAGE), "nothing is mapped")
        assert error.start == address + 2 * PAGE
    refused(world, ((1 << 63) + PAGE, PAGE), "nothing is mapped")
    unmap(address, 2)
    unmap(address + 3 * PAGE, 1)


def special_mapping() -> tuple[int, int]:
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(("[vvar]", "[vdso]")):
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            return start, end - start
    raise AssertionError("this process has no vdso")


def test_register_a_mapping_that_the_kernel_refuses(world: World) -> None:
    refused(world, special_mapping(), r"\[v(dso|var)\]")


def test_register_a_read_only_file_mapping(world: World, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(2 * PAGE))
    with path.open("rb") as file:
        address = libc.mmap(None, 2 * PAGE, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    error = refused(world, (address, 2 * PAGE), "read-only", blind_spots="accepted")
    assert error.errno == errno.EPERM
    unmap(address, 2)


def test_register_hugetlb_memory(world: World) -> None:
    huge = (2 << 20) // PAGE
    address = map_raw(huge, flags=MAP_HUGETLB | MAP_NORESERVE)  # takes no huge page: nothing touches it
    refused(world, (address, 2 << 20), "hugetlb")
    refused(world, (address + PAGE, PAGE), "hugetlb")
    unmap(address, huge)


def test_register_memory_of_another_userfaultfd(world: World) -> None:
    with UffdSession() as other:
        for call in (other.register, lambda memory: dirtytrack.track(memory, session=other)):
            with pytest.raises(dirtytrack.RangeBusy, match="another userfaultfd") as caught:
                call(world.memory)
            assert caught.value.errno == errno.EBUSY
            assert (caught.value.start, caught.value.end) == (world.region.start, world.region.end)
        assert not other.regions
        write(world.memory, 3)
        assert list(world.tracker.collect().pages(world.region)) == [3]
        world.tracker.stop()
        world.session.unregister(world.region)
        with DirtyTracker(other, [other.register(world.memory)]) as tracker:
            assert_finds_a_write(tracker)
        other.close()
    world.region = world.session.register(world.memory)


def test_register_with_options_of_a_later_version(world: World) -> None:
    for options in ({"arm": "present"}, {"arm": "some"}, {"blind_spots": "unknown"}):
        with pytest.raises(dirtytrack.InvalidMemory, match=next(iter(options))):
            world.session.register(bytearray(PAGE), **options)  # type: ignore[arg-type]


def test_memory_that_others_may_write(world: World) -> None:
    shared = dirtytrack.allocate(4 * PAGE, shared=True)
    with pytest.raises(dirtytrack.BlindSpotWarning, match="mark_dirty"):
        world.session.register(shared, strict=True)
    with pytest.warns(dirtytrack.BlindSpotWarning, match="mark_dirty"):
        region = world.session.register(shared)
    assert region.blind_spots
    world.session.unregister(region)


def test_track_nothing() -> None:
    with pytest.raises(dirtytrack.InvalidMemory, match="at least one"):
        dirtytrack.track()
    with pytest.raises(dirtytrack.InvalidMemory, match="at least one"):
        dirtytrack.track({})


def test_track_several_under_one_name() -> None:
    with pytest.raises(dirtytrack.InvalidMemory, match="name="):
        dirtytrack.track(bytearray(PAGE), bytearray(PAGE), name="both")


def near_the_limit_of_mappings(left: int) -> int:
    """Alternate the protection of pages until so many mappings are left; returns their address."""
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    address = map_raw(limit)
    room = limit - Path("/proc/self/maps").read_text().count("\n") - left
    for page in range(1, room, 2):  # two mappings more each
        assert libc.mprotect(address + page * PAGE, PAGE, mmap.PROT_READ) == 0
    return address


def islands_where_mappings_run_out() -> None:
    count = 1000
    memory = dirtytrack.allocate(2 * count * PAGE, name="islands")
    near_the_limit_of_mappings(left=300)
    session = UffdSession()
    regions = [session.register((memory.address + 2 * i * PAGE, PAGE)) for i in range(count)]
    with DirtyTracker(session) as tracker:
        for page in (0, 1, 2, 999, 1000, 1998, 1999):
            write(memory, page)
        found = tracker.collect()
        assert [i for i, region in enumerate(regions) if found.in_region(region)] == [0, 1, 500, 999]
        assert found.page_count == 4, "what lies between the islands is nobody's"
        session.suspend()
        session.resume()
        assert tracker.collect().page_count == count
        write(memory, 4)
        assert [run.start for run in tracker.collect()] == [memory.address + 4 * PAGE]
    for region in regions[::2]:
        session.unregister(region)
    with DirtyTracker(session) as tracker:
        write(memory, 0)
        write(memory, 2)
        assert [run.start for run in tracker.collect()] == [memory.address + 2 * PAGE]


def no_mapping_left() -> None:
    tracked = World()
    memory = map_raw(64)
    address = near_the_limit_of_mappings(left=40)
    held = []
    try:
        while True:
            held.append(map_raw(1))
            assert libc.mprotect(held[-1], PAGE, mmap.PROT_READ if len(held) % 2 else 0) == 0
    except (AssertionError, OSError):
        pass  # full
    try:
        tracked.session.register((memory + 5 * PAGE, PAGE), name="island")
    except dirtytrack.LimitReached as error:
        assert error.errno == errno.ENOMEM
        assert error.feature == "vm.max_map_count"
        print(error)
    else:
        raise AssertionError("an island without a mapping")
    assert len(tracked.session.regions) == 1
    assert_finds_a_write(tracked.tracker)
    unmap(address, 64)
    region = tracked.session.register((memory + 5 * PAGE, PAGE), name="island")
    with DirtyTracker(tracked.session, [region]) as tracker:
        ctypes.memset(region.address, 1, 1)
        assert tracker.collect().page_count == 1


def test_so_many_mappings_that_regions_must_share_them() -> None:
    run_in_child(islands_where_mappings_run_out, timeout=100)


@pytest.mark.unsanitized("it needs mappings of its own")
def test_vm_max_map_count_is_reached() -> None:
    assert "sysctl vm.max_map_count" in run_in_child(no_mapping_left, timeout=100)


# ---- opening a session ----------------------------------------------------------------------------------------------


def opens() -> None:
    with UffdSession() as session:
        print(session.opened_by)
    assert_finds_a_write()


def test_a_seccomp_filter_forbids_the_call_and_there_is_a_device() -> None:
    if not os.access("/dev/userfaultfd", os.R_OK | os.W_OK):
        # Nothing to open: the same filter as a container's, with the device door simulated to fail as it does here.
        assert "PermissionDenied" in run_in_child(is_denied, "seccomp-eperm")
        return
    assert run_in_child(opens, "seccomp-eperm") == "/dev/userfaultfd\n"
    assert run_in_child(opens, "seccomp-enosys") == "/dev/userfaultfd\n"


def is_denied() -> None:
    for call in (UffdSession, lambda: dirtytrack.track(bytearray(PAGE))):
        try:
            call()
        except dirtytrack.PermissionDenied as error:
            assert error.errno == errno.EPERM
            assert error.feature == "userfaultfd"
            print(type(error).__name__, error)
        else:
            raise AssertionError("opened what a filter forbids")
    assert not dirtytrack.probe().tracking


def test_a_seccomp_filter_forbids_the_call_and_there_is_no_device() -> None:
    told = run_in_child(is_denied, "no-device", "seccomp-eperm")
    assert "/dev/userfaultfd" in told
    assert "seccomp" in told
    run_in_child(is_denied, "nobody", "seccomp-eperm")


def test_an_unprivileged_user_needs_no_permission() -> None:
    assert run_in_child(opens, "nobody") == "userfaultfd user mode\n"


def is_unsupported() -> None:
    try:
        UffdSession()
    except dirtytrack.UnsupportedKernel as error:
        assert error.errno is not None
        print(error.feature, errno.errorcode[error.errno], error)
    else:
        raise AssertionError("a session on a kernel that has none")
    support = dirtytrack.probe()
    assert not support.tracking
    assert support.why_not
    assert support.remedies


def test_a_kernel_without_userfaultfd() -> None:
    told = run_in_child(is_unsupported, "no-device", "seccomp-enosys")
    assert told.startswith("userfaultfd ENOSYS")
    assert "CONFIG_USERFAULTFD" in told


def test_a_kernel_without_asynchronous_write_protection() -> None:
    told = run_in_child(is_unsupported, "no-wp-async")
    assert told.startswith("UFFD_FEATURE_WP_ASYNC EINVAL")
    assert "6.7" in told


def test_a_kernel_without_pagemap_scan() -> None:
    told = run_in_child(is_unsupported, "no-pagemap-scan")
    assert told.startswith("PAGEMAP_SCAN ENOTTY")
    assert "6.7" in told


def test_proc_is_not_mounted() -> None:
    told = run_in_child(is_unsupported, "no-proc")
    assert told.startswith("/proc/PID/pagemap ENOENT")


def may_not_read_its_pagemap() -> None:
    for call in (UffdSession, Pagemap):
        try:
            call()
        except dirtytrack.PermissionDenied as error:
            assert error.errno in {errno.EACCES, errno.EPERM}
            print(error)
        else:
            raise AssertionError("read a page map that is not readable")
    assert not dirtytrack.probe().tracking


def test_a_process_that_is_not_dumpable() -> None:
    assert "not dumpable" in run_in_child(may_not_read_its_pagemap, "nobody", "not-dumpable")


def test_options_of_a_session_of_a_later_version() -> None:
    with pytest.raises(dirtytrack.InvalidMemory, match="events"):
        UffdSession(events=True)


def test_no_memory_for_the_core(world: World) -> None:
    with failing("ALLOCATE", number=errno.ENOMEM), pytest.raises(MemoryError):
        UffdSession()
    with failing("ALLOCATE", number=errno.ENOMEM), pytest.raises(MemoryError):
        world.session.register(bytearray(PAGE))
    with failing("ALLOCATE", number=errno.ENOMEM), pytest.raises(MemoryError):
        DirtyTracker(world.session)
    write(world.memory, 3)
    with failing("ALLOCATE", number=errno.ENOMEM), pytest.raises(MemoryError):
        world.tracker.collect()
    assert list(world.tracker.collect().pages(world.region)) == [3]


def test_an_answer_of_the_kernel_that_nobody_knows(world: World) -> None:
    write(world.memory, 3)
    with failing("SCAN", number=errno.EIO), pytest.raises(dirtytrack.KernelRefused, match="EIO") as caught:
        world.tracker.collect()
    assert caught.value.errno == errno.EIO
    with failing("REGISTER", number=errno.EIO), pytest.raises(dirtytrack.KernelRefused, match="EIO"):
        world.session.register(bytearray(PAGE))
    assert list(world.tracker.collect().pages(world.region)) == [3]


def test_another_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "_loaded", False)
    monkeypatch.setattr(sys, "platform", "darwin")
    for call in (UffdSession, Pagemap, lambda: dirtytrack.allocate(PAGE), lambda: dirtytrack.track(bytearray(PAGE))):
        with pytest.raises(dirtytrack.UnsupportedKernel, match="darwin"):
            call()
    assert not dirtytrack.probe().tracking


def test_the_extension_module_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "_loaded", False)
    monkeypatch.delattr(sys.modules["dirtytrack.kernel"], "_core", raising=False)
    monkeypatch.setitem(sys.modules, "dirtytrack.kernel._core", None)
    with pytest.raises(dirtytrack.UnsupportedKernel, match="_core"):
        UffdSession()
    assert "_core" in dirtytrack.probe().why_not


def in_a_subinterpreter() -> None:
    script = (
        "import dirtytrack\ntry:\n    dirtytrack.allocate(1)\nexcept ImportError as error:\n"
        "    assert 'sub-interpreter' in str(error)\nelse:\n    raise AssertionError('loaded')\n"
    )
    try:
        import _interpreters  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        import _xxsubinterpreters as _interpreters  # type: ignore[import-not-found,no-redef,unused-ignore]
    number = _interpreters.create()
    failure = _interpreters.run_string(number, f"import sys\nsys.path[:] = {sys.path!r}\n{script}")
    assert not failure, failure
    assert_finds_a_write()


def test_a_sub_interpreter() -> None:
    run_in_child(in_a_subinterpreter)


# ---- sessions -------------------------------------------------------------------------------------------------------


def test_a_closed_session(world: World) -> None:
    dirty = world.tracker.collect()
    world.session.close()
    world.session.close()
    session, tracker, region = world.session, world.tracker, world.region
    for call in (
        lambda: session.register(bytearray(PAGE)),
        lambda: session.unregister(region),
        lambda: session.write_protect(region),
        lambda: session.mark_dirty(region),
        lambda: session.in_flight(region).__enter__(),
        session.suspend,
        session.resume,
        session.statistics,
        lambda: DirtyTracker(session),
        tracker.start,
        tracker.collect,
        lambda: tracker.collect(region),
        lambda: tracker.collect(budget_seconds=1),
        lambda: tracker.collect_into(bytearray(PAGES * PAGE)),
        tracker.peek,
        tracker.stop,
        tracker.statistics,
        lambda: tracker.put_back(dirty),
        lambda: tracker.remove(region),
        lambda: tracker.add(region),
        lambda: dirtytrack.track(bytearray(PAGE), session=session),
    ):
        with pytest.raises(dirtytrack.SessionClosed):
            call()
    assert session.closed
    assert session.fileno() == -1
    assert "closed" in repr(session)


def test_unregister_while_it_is_watched(world: World) -> None:
    write(world.memory, 2)
    with pytest.raises(dirtytrack.InvalidMemory, match=r"tracker\.remove"):
        world.session.unregister(world.region)
    assert list(world.tracker.collect().pages(world.region)) == [2]


def test_a_region_that_was_unregistered(world: World) -> None:
    region = world.session.register(bytearray(4 * PAGE), name="gone")
    world.session.unregister(region)
    tracker = DirtyTracker(world.session, [region])
    for call in (
        lambda: world.session.unregister(region),
        lambda: world.session.write_protect(region),
        lambda: world.tracker.add(region),
        tracker.start,
    ):
        with pytest.raises(dirtytrack.NotRegistered, match="gone"):
            call()
    assert not tracker.epoch
    assert world.tracker.regions == (world.region,)


def test_a_region_of_another_session(world: World) -> None:
    with UffdSession() as other:
        region = other.register(bytearray(PAGES * PAGE), name="foreign")
        for refuses in (
            lambda: world.session.unregister(region),
            lambda: world.session.write_protect(region),
            lambda: world.tracker.add(region),
            DirtyTracker(world.session, [region]).start,
        ):
            with pytest.raises(dirtytrack.NotRegistered, match="foreign"):
                refuses()
        for call in (world.tracker.collect, world.tracker.remove, world.tracker.peek):
            with pytest.raises(dirtytrack.InvalidMemory, match="foreign"):
                call(region)
        assert_finds_a_write(DirtyTracker(other, [region]))
    assert world.tracker.regions == (world.region,)


def test_declare_what_is_no_memory(world: World) -> None:
    for memory in ("text", None, object(), (0x1000,), (0, 0), dirtytrack.Run(8192, 4096), dirtytrack.Run(0, 0)):
        with pytest.raises(dirtytrack.InvalidMemory):
            world.session.mark_dirty(memory)  # type: ignore[arg-type]
        with pytest.raises(dirtytrack.InvalidMemory):
            world.session.in_flight(memory)  # type: ignore[arg-type]
    assert not world.tracker.collect()


def test_resume_while_somebody_else_has_the_memory(world: World) -> None:
    world.session.suspend()
    with UffdSession() as other:
        other.register(world.memory)
        with pytest.raises(dirtytrack.RangeBusy) as caught:
            world.session.resume()
        assert caught.value.errno == errno.EBUSY
        assert world.session.fileno() == -1
        assert world.tracker.collect().page_count == PAGES
    world.session.resume()
    assert world.tracker.collect().page_count == PAGES


def test_pickling_what_belongs_to_this_process(world: World) -> None:
    with Pagemap() as pagemap:
        for thing in (world.session, world.tracker, world.region, world.memory, pagemap):
            with pytest.raises(TypeError, match="cannot be pickled"):
                pickle.dumps(thing)


def forked() -> None:
    tracked = World()
    pagemap = Pagemap()
    dirtytrack.track(tracked.memory, session=tracked.session)
    write(tracked.memory, 3)
    child = os.fork()
    if not child:
        calls = (
            tracked.tracker.collect,
            tracked.tracker.peek,
            tracked.tracker.stop,
            tracked.tracker.statistics,
            lambda: tracked.tracker.put_back(dirtytrack.DirtySet()),
            lambda: tracked.session.register(bytearray(PAGE)),
            tracked.session.suspend,
            lambda: tracked.session.mark_dirty(tracked.region),
            lambda: DirtyTracker(tracked.session),
            lambda: pagemap.scan(0, PAGE),
        )
        try:
            for call in calls:
                try:
                    call()
                except dirtytrack.UsedAfterFork:
                    continue
                os._exit(2)
            assert tracked.session.fileno() == -1
            assert_finds_a_write()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(3)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert list(tracked.tracker.collect().pages(tracked.region)) == [3]
    assert_finds_a_write(tracked.tracker)


def test_used_after_a_fork() -> None:
    run_in_child(forked)


# ---- trackers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("audit", [-0.1, 1.1, float("nan"), float("inf")])
def test_an_audit_of_no_share(world: World, audit: float) -> None:
    with pytest.raises(dirtytrack.InvalidMemory, match="audit"):
        DirtyTracker(world.session, audit=audit)
    with pytest.raises(dirtytrack.InvalidMemory, match="audit"):
        dirtytrack.track(bytearray(PAGE), session=world.session, audit=audit)
    assert world.session.regions == (world.region,)


def test_a_tracker_that_is_not_running(world: World) -> None:
    dirty = world.tracker.stop()
    region = world.region
    for tracker in (world.tracker, DirtyTracker(world.session)):
        for call in (
            tracker.collect,
            lambda tracker=tracker: tracker.collect(budget_seconds=1),
            tracker.peek,
            tracker.stop,
            lambda tracker=tracker: tracker.put_back(dirty),
            lambda tracker=tracker: tracker.add(region),
            lambda tracker=tracker: tracker.collect(region),
            lambda tracker=tracker: tracker.remove(region),
        ):
            with pytest.raises(dirtytrack.NotStarted):
                call()
        assert tracker.epoch == 0


def test_add_a_buffer_to_a_tracker_that_is_not_running(world: World) -> None:
    world.tracker.stop()
    buffer = bytearray(PAGE)
    with pytest.raises(dirtytrack.NotStarted):
        world.tracker.add(buffer)
    buffer.append(1)
    assert world.session.regions == (world.region,)


def test_starting_twice(world: World) -> None:
    write(world.memory, 4)
    with pytest.raises(dirtytrack.AlreadyStarted, match="add"):
        world.tracker.start()
    with pytest.raises(dirtytrack.AlreadyStarted), world.tracker:
        pass
    assert world.tracker.epoch == 1
    assert list(world.tracker.collect().pages(world.region)) == [4]


def test_a_region_that_is_watched_already(world: World) -> None:
    with pytest.raises(dirtytrack.InvalidMemory, match="already"):
        world.tracker.add(world.region)
    with pytest.raises(dirtytrack.InvalidMemory, match="already"):
        DirtyTracker(world.session, [world.region, world.region]).start()
    assert world.tracker.regions == (world.region,)


def test_a_region_that_is_not_this_trackers(world: World) -> None:
    other = world.session.register(bytearray(PAGE), name="other")
    tracker, mirror = world.tracker, bytearray(PAGE)
    for region in (other, "other", "unknown"):
        for call in (tracker.collect, tracker.peek, tracker.remove, lambda r: tracker.collect_into(mirror, r)):
            with pytest.raises(dirtytrack.InvalidMemory, match=r"other|unknown"):
                call(region)
    for nonsense in (3.5, object()):
        with pytest.raises((dirtytrack.InvalidMemory, TypeError)):
            tracker.collect(nonsense)  # type: ignore[arg-type]


def test_a_name_that_two_regions_have(world: World) -> None:
    memory = dirtytrack.allocate(PAGE, name="world")
    second = world.tracker.add(memory)
    write(world.memory, 1)
    with pytest.raises(dirtytrack.InvalidMemory, match="pass the Region"):
        world.tracker.collect("world")
    assert world.tracker.remove(second).page_count == 1
    assert world.tracker.collect("world").page_count == 1


@pytest.mark.parametrize("budget", [-1, -1e-9, float("nan"), float("-inf")])
def test_a_budget_of_no_time(world: World, budget: float) -> None:
    write(world.memory, 1)
    with pytest.raises(dirtytrack.InvalidMemory, match="budget_seconds"):
        world.tracker.collect(budget_seconds=budget)
    assert world.tracker.epoch == 1
    assert world.tracker.collect(budget_seconds=0.5).page_count == 1


def test_put_back_what_is_no_set(world: World) -> None:
    for thing in (None, [(0, PAGE)], world.region):
        with pytest.raises(TypeError, match="DirtySet"):
            world.tracker.put_back(thing)  # type: ignore[arg-type]


def mirrors_that_are_refused(world: World) -> Iterator[tuple[object, str]]:
    nbytes = PAGES * PAGE
    good = bytearray(nbytes)
    address = world.region.address
    yield bytearray(nbytes - 1), "bytes"
    yield bytearray(nbytes + 1), "bytes"
    yield bytes(nbytes), "read-only"
    yield np.zeros(2 * nbytes, np.uint8)[::2], "C-contiguous"
    yield world.memory, "overlaps"
    yield (address + PAGE, nbytes), "overlaps"
    yield "text", "no buffer"
    yield {}, "no mirror"
    yield {"unknown": good}, "unknown"
    yield {"world": good, world.region: good}, "two mirrors"
    yield {"world": None}, "no buffer"


def test_a_mirror_that_cannot_be_one(world: World) -> None:
    write(world.memory, 6)
    for mirror, match in mirrors_that_are_refused(world):
        with pytest.raises(dirtytrack.InvalidMemory, match=match):
            world.tracker.collect_into(mirror)  # type: ignore[arg-type]
    assert world.tracker.epoch == 1
    dirty = world.tracker.collect()
    assert list(dirty.pages(world.region)) == [6], "nothing was consumed"
    for mirror, match in mirrors_that_are_refused(world):
        with pytest.raises(dirtytrack.InvalidMemory, match=match):
            dirty.copy_to(mirror)  # type: ignore[arg-type]


def test_mirrors_of_several_regions(world: World) -> None:
    second = world.tracker.add(bytearray(4 * PAGE), name="second")
    good, both = bytearray(PAGES * PAGE), bytearray((PAGES + 4) * PAGE)
    half = memoryview(both)[2 * PAGE : 6 * PAGE]
    for mirror, match in (
        (good, "which region"),
        ({"world": good}, "second"),
        ({"world": memoryview(both)[: PAGES * PAGE], "second": half}, "overlap"),
    ):
        with pytest.raises(dirtytrack.InvalidMemory, match=match):
            world.tracker.collect_into(mirror)
    assert world.tracker.epoch == 1
    assert world.tracker.peek().in_region(second).page_count >= 4
    assert world.tracker.remove(second).nbytes == 4 * PAGE


def test_a_mapping_went_away(world: World) -> None:
    address = map_raw(8)
    region = world.tracker.add((address, 8 * PAGE), name="raw")
    second = DirtyTracker(world.session, [region])
    second.start()
    world.tracker.collect()
    write(world.memory, 9)
    ctypes.memset(address, 1, PAGE)
    unmap(address + 4 * PAGE, 2)
    for tracker in (world.tracker, second):
        with pytest.raises(dirtytrack.RegionGone, match="raw") as caught:
            tracker.collect()
        assert caught.value.region is region
        assert (caught.value.start, caught.value.end) == (address + 4 * PAGE, address + 6 * PAGE)
    assert 0 in list(world.tracker.remove(region).pages(region))
    assert list(world.tracker.collect().pages(world.region)) == [9]
    assert 0 in list(second.collect().pages(region)), "told once, then what is left of it"
    second.stop()
    unmap(address, 4)
    unmap(address + 6 * PAGE, 2)


def test_a_mapping_went_away_before_start(world: World) -> None:
    address = map_raw(8)
    region = world.session.register((address, 8 * PAGE), name="raw")
    unmap(address, 8)
    for call in (
        DirtyTracker(world.session, [world.region, region]).start,
        lambda: world.tracker.add(region),
        lambda: world.session.write_protect(region),
    ):
        with pytest.raises(dirtytrack.RegionGone, match="raw") as caught:
            call()
        assert caught.value.region is region
    assert world.tracker.regions == (world.region,)
    world.session.unregister(region)


def truncated(world: World) -> tuple[int, Region, int]:
    """A region of a file that is shorter than it was; descriptor, region and mapping."""
    fd = os.memfd_create("truncated")
    os.ftruncate(fd, 4 * PAGE)
    address = libc.mmap(None, 4 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
    ctypes.memset(address, 1, 4 * PAGE)
    region = world.tracker.add((address, 4 * PAGE), name="file", blind_spots="accepted")
    os.ftruncate(fd, 2 * PAGE)
    return fd, region, address


def test_a_page_vanishes_beneath_a_copy(world: World) -> None:
    fd, region, address = truncated(world)
    mirror = bytearray(4 * PAGE)
    with pytest.raises(dirtytrack.RegionGone, match="vanished") as caught:
        world.tracker.collect_into(mirror, "file")
    assert caught.value.errno == errno.EFAULT
    assert (caught.value.start, caught.value.end) == (address + 2 * PAGE, address + 3 * PAGE)
    dirty = world.tracker.collect()
    assert dirty.in_region(region).page_count == 4, "all pages stayed pending"
    with pytest.raises(dirtytrack.RegionGone, match="vanished"):
        dirty.scatter(b"\2" * dirty.nbytes)
    for call in (dirty.gather, lambda: dirty.copy_to({"file": mirror})):
        with pytest.raises(dirtytrack.RegionGone, match="vanished"):
            call()
    os.ftruncate(fd, 4 * PAGE)
    assert bytes(dirty.gather()) == b"\2" * 2 * PAGE + bytes(2 * PAGE), "what came before it was written"
    world.tracker.remove(region)
    world.session.unregister(region)
    unmap(address, 4)
    os.close(fd)


def test_the_audit_finds_what_nobody_reported(world: World) -> None:
    shared = dirtytrack.allocate(4 * PAGE, shared=True)
    with mmap.mmap(shared.fileno(), 4 * PAGE) as alias:
        region = world.session.register(shared, name="shared", blind_spots="accepted")
        tracker = DirtyTracker(world.session, [region], audit=1.0)
        tracker.start()
        tracker.collect()
        alias[2 * PAGE] = 7  # by another mapping: a blind spot
        shared[0] = 1
        with pytest.raises(dirtytrack.MissedWrite, match="blind_spots") as caught:
            tracker.collect()
        assert (caught.value.start, caught.value.end) == (region.start + 2 * PAGE, region.start + 3 * PAGE)
        assert {0, 2} <= set(tracker.collect().pages(region)), "the pages stayed pending"
        assert not tracker.collect()
        tracker.stop()


# ---- sets -----------------------------------------------------------------------------------------------------------


def test_output_that_does_not_fit(world: World) -> None:
    write(world.memory, 1)
    dirty = world.tracker.collect()
    for out, match in (
        (bytearray(PAGE - 1), "bytes"),
        (bytes(PAGE), "read-only"),
        (world.memory, "overlaps"),
        (np.zeros(2 * PAGE, np.uint8)[::2], "C-contiguous"),
        ("text", "no buffer"),
    ):
        with pytest.raises(dirtytrack.InvalidMemory, match=match):
            dirty.gather(out)  # type: ignore[arg-type]
    for data in (bytes(PAGE - 1), bytes(PAGE + 1), b""):
        with pytest.raises(dirtytrack.InvalidMemory):
            dirty.scatter(data)
    assert not world.tracker.collect()


@pytest.mark.parametrize("granule", [0, -PAGE, 1, PAGE + 1])
def test_a_granule_that_is_no_multiple_of_the_page(world: World, granule: int) -> None:
    with pytest.raises(dirtytrack.InvalidMemory, match="granule"):
        world.tracker.collect().changed(bytearray(PAGES * PAGE), granule)


def test_ask_a_set_for_a_region_that_it_does_not_know(world: World) -> None:
    second = world.tracker.add(bytearray(PAGE), name="second")
    dirty = world.tracker.collect()
    assert world.tracker.remove(second) == world.tracker.peek().in_region(world.region) - dirty
    for call in (dirty.in_region, dirty.offsets, dirty.pages, dirty.bitmap, dirty.rows):
        with pytest.raises(dirtytrack.InvalidMemory, match="unknown"):
            call("unknown")
    for call in (dirty.offsets, dirty.pages, dirty.bitmap):
        with pytest.raises(dirtytrack.InvalidMemory, match="which region"):
            call()
    foreign = world.session.register(bytearray(64 * PAGE), name="foreign")
    with pytest.raises(dirtytrack.InvalidMemory, match="foreign"):
        dirty.pages(foreign)


def test_rows_of_what_has_none(world: World) -> None:
    array = np.zeros((64, PAGE), np.uint8)
    region = world.tracker.add(array)
    dirty = world.tracker.collect()
    assert len(dirty.rows(region)) == 64
    assert len(dirty.rows(array)) == 64
    for rows_of, match in (
        (array[::-1], "backwards"),
        (np.broadcast_to(array[:1], (8, PAGE)), "repeats|backwards|not"),
        (np.zeros((4, PAGE), np.uint8), "nobody watched|not among"),
        ((world.region.address, PAGE), "no rows"),
        ("text", "text"),
    ):
        with pytest.raises(dirtytrack.InvalidMemory, match=match):
            dirty.rows(rows_of)  # type: ignore[arg-type]
    world.tracker.remove(region)


def reads(dirty: dirtytrack.DirtySet, mirror: bytearray) -> Iterator[object]:
    yield dirty.gather
    yield lambda: dirty.scatter(bytes(dirty.nbytes))
    yield lambda: dirty.copy_to(mirror)
    yield lambda: dirty.changed(mirror)


def test_bytes_of_a_region_that_was_unregistered(world: World) -> None:
    memory = dirtytrack.allocate(4 * PAGE, name="second")
    tracker = DirtyTracker(world.session, [world.session.register(memory)])
    tracker.start()
    write(memory, 1)
    dirty = tracker.stop()
    world.session.unregister(dirty_region := world.session.regions[-1])
    assert dirty_region.name == "second"
    for call in reads(dirty, bytearray(4 * PAGE)):
        with pytest.raises(dirtytrack.NotRegistered, match="unregistered"):
            call()  # type: ignore[operator]
    assert dirty.page_count == 1
    assert list(dirty.pages("second")) == [1]


def test_bytes_after_the_session_was_closed(world: World) -> None:
    write(world.memory, 1)
    dirty = world.tracker.collect()
    world.session.close()
    for call in reads(dirty, bytearray(PAGES * PAGE)):
        with pytest.raises(dirtytrack.SessionClosed, match="closed"):
            call()  # type: ignore[operator]
    assert list(dirty.pages(world.region)) == [1]


def test_bytes_of_a_set_that_was_pickled(world: World) -> None:
    write(world.memory, 1)
    dirty = pickle.loads(pickle.dumps(world.tracker.collect()))
    for call in reads(dirty, bytearray(PAGES * PAGE)):
        with pytest.raises(dirtytrack.NotRegistered, match="pickle"):
            call()  # type: ignore[operator]
    assert list(dirty.pages("world")) == [1]


# ---- Pagemap --------------------------------------------------------------------------------------------------------


def test_a_process_that_is_not_there(world: World) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with Pagemap(child.pid) as pagemap:
        child.send_signal(signal.SIGKILL)
        child.communicate()
        with pytest.raises(dirtytrack.TargetGone, match="ended") as caught:
            pagemap.scan(0, PAGE)
        assert caught.value.errno == errno.ESRCH
    with pytest.raises(dirtytrack.TargetGone, match=str(child.pid)) as caught:
        Pagemap(child.pid)
    assert caught.value.errno == errno.ENOENT
    assert caught.value.pid == child.pid


def reads_the_pagemap_of_init() -> None:
    try:
        Pagemap(1)
    except dirtytrack.PermissionDenied as error:
        assert error.errno == errno.EACCES
        assert error.pid == 1
    else:
        raise AssertionError("read another user's page map")
    assert_finds_a_write()


def test_a_process_of_another_user() -> None:
    run_in_child(reads_the_pagemap_of_init, "nobody")


def test_a_scan_that_insists_on_registered_memory(world: World) -> None:
    start, end = world.region.start, world.region.end
    address = map_raw(4)
    mask = PageCategory.WRITTEN
    with Pagemap() as pagemap:
        with pytest.raises(dirtytrack.NotRegistered, match="CHECK_WPASYNC") as caught:
            pagemap.scan(
                address, address + 4 * PAGE, category_mask=mask, return_mask=mask, flags=ScanFlag.CHECK_WPASYNC
            )
        assert caught.value.errno == errno.EPERM
        assert len(pagemap.scan(start, end, category_mask=mask, return_mask=mask, flags=ScanFlag.CHECK_WPASYNC)) == 0
        with pytest.raises(dirtytrack.NotRegistered):
            dirtytrack.pagemap.written((address, 4 * PAGE))
    unmap(address, 4)


def test_an_arming_scan_that_fails_midway(world: World) -> None:
    address = map_raw(8)
    unmap(address, 8)
    map_raw(4, at=address)
    region = world.session.register((address, 4 * PAGE))
    world.session.write_protect(region)
    map_raw(4, at=address + 4 * PAGE)
    ctypes.memset(address + 2 * PAGE, 1, 1)
    mask, flags = PageCategory.WRITTEN, ScanFlag.WP_MATCHING | ScanFlag.CHECK_WPASYNC
    with Pagemap() as pagemap, pytest.raises(dirtytrack.NotRegistered) as caught:
        pagemap.scan(address, address + 8 * PAGE, category_mask=mask, return_mask=mask, flags=flags)
    partial = caught.value.partial
    assert partial is not None
    assert [(part.start, part.end) for part in partial] == [(address + 2 * PAGE, address + 3 * PAGE)]
    world.session.unregister(region)
    unmap(address, 8)


def test_a_question_that_the_kernel_refuses(world: World) -> None:
    start, end = world.region.start, world.region.end
    with Pagemap() as pagemap:
        for question in (
            {"flags": 1 << 40},
            {"return_mask": 1 << 50},
            {"category_mask": 1 << 63, "return_mask": 2},
        ):
            with pytest.raises(dirtytrack.InvalidMemory, match="PAGEMAP_SCAN") as caught:
                pagemap.scan(start, end, **question)
            assert caught.value.errno == errno.EINVAL
        with pytest.raises(dirtytrack.InvalidMemory):
            pagemap.scan(start + 1, end, return_mask=PageCategory.WRITTEN)
        with pytest.raises(dirtytrack.InvalidMemory):
            pagemap.scan(0, (1 << 64) - PAGE, return_mask=PageCategory.WRITTEN)


@pytest.mark.parametrize("numbers", [(-1, PAGE, 0), (0, 1 << 64, 0), (0, PAGE, -1)])
def test_numbers_that_are_no_addresses(world: World, numbers: tuple[int, int, int]) -> None:
    with Pagemap() as pagemap, pytest.raises(dirtytrack.InvalidMemory, match="64-bit"):
        pagemap.scan(numbers[0], numbers[1], max_pages=numbers[2])


def test_a_scan_that_could_hang_for_ever(world: World) -> None:
    huge = (2 << 20) // PAGE
    address = map_raw(huge, flags=MAP_HUGETLB | MAP_NORESERVE)
    written = PageCategory.WRITTEN
    with Pagemap() as pagemap:
        for mask in (written | PageCategory.PRESENT, PageCategory.PRESENT):
            with pytest.raises(dirtytrack.InvalidMemory, match="hang"):
                pagemap.scan(
                    address, address + (2 << 20), category_mask=mask, return_mask=mask, flags=ScanFlag.WP_MATCHING
                )
    unmap(address, huge)


def test_a_closed_pagemap(world: World) -> None:
    pagemap = Pagemap()
    pagemap.close()
    pagemap.close()
    with pytest.raises(ValueError, match="closed"):
        pagemap.scan(0, PAGE)
    assert pagemap.fileno() == -1


def cannot_look_at_mappings() -> None:
    tracked = World()
    RESTRICTIONS["no-proc"]()
    try:
        tracked.session.register(bytearray(PAGE))
    except dirtytrack.PermissionDenied as error:
        assert error.errno == errno.ENOENT
        print(error)
    else:
        raise AssertionError("registered without looking")
    map_raw(1, at=tracked.region.start + 2 * PAGE)
    write(tracked.memory, 9)
    try:
        tracked.tracker.collect()
    except dirtytrack.PermissionDenied as error:
        assert error.errno == errno.ENOENT
    else:
        raise AssertionError("a mapping was replaced, and nobody could look")
    check(libc.umount2(b"/proc", MNT_DETACH))
    assert {2, 9} <= set(tracked.tracker.collect().pages(tracked.region))
    assert_finds_a_write(tracked.tracker)


def test_proc_went_away() -> None:
    assert "/proc" in run_in_child(cannot_look_at_mappings)

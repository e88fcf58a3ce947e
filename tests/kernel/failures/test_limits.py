# SPDX-License-Identifier: MIT
"""Limits that are reached: memory, descriptors, mappings, the kernel's own memory. Takes 4 s of CI's 20 min."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
from pathlib import Path

import pytest

import dirtytrack
from dirtytrack import DirtyTracker, Pagemap, UffdSession
from tests.kernel.failures.world import (
    PAGES,
    World,
    assert_finds_a_write,
    map_raw,
    take_the_last_descriptors,
    take_the_last_mappings,
    unmap,
    write,
)
from tests.oracle import PAGE, protect
from tests.sandbox import failing, run_in_child


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
    tracked = World()
    held = take_the_last_descriptors()
    for call in (
        UffdSession,
        lambda: dirtytrack.allocate(PAGE, shared=True),
        Pagemap,
        lambda: tracked.session.register(bytearray(PAGE)),
        lambda: tracked.tracker.add(bytearray(PAGE)),
    ):
        with pytest.raises(dirtytrack.LimitReached) as caught:
            call()
        assert caught.value.errno == errno.EMFILE
        print(caught.value.feature, caught.value)
    tracked.session.suspend()  # gives one back
    held.append(os.open(os.devnull, os.O_RDONLY))
    with pytest.raises(dirtytrack.LimitReached) as caught:
        tracked.session.resume()
    assert caught.value.errno == errno.EMFILE
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


def near_the_limit_of_mappings(left: int) -> int:
    """Alternate the protection of pages until so many mappings are left; returns their address."""
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    address = map_raw(limit)
    room = limit - Path("/proc/self/maps").read_text().count("\n") - left
    for page in range(1, room, 2):  # two mappings more each
        protect(address + page * PAGE, PAGE, mmap.PROT_READ)
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
    protect(memory + 63 * PAGE, PAGE, 0)  # apart from the world, which would share its mapping
    address = near_the_limit_of_mappings(left=40)
    with pytest.raises(dirtytrack.LimitReached) as caught:
        take_the_last_mappings()
        tracked.session.register((memory + 5 * PAGE, PAGE), name="island")
    assert caught.value.errno == errno.ENOMEM
    assert caught.value.feature == "vm.max_map_count"
    print(caught.value)
    assert len(tracked.session.regions) == 1
    assert_finds_a_write(tracked.tracker)
    unmap(address, 64)
    region = tracked.session.register((memory + 5 * PAGE, PAGE), name="island")
    with DirtyTracker(tracked.session, [region]) as tracker:
        ctypes.memset(region.address, 1, 1)
        assert tracker.collect().page_count == 1


@pytest.mark.unsanitized("it needs mappings of its own")
def test_so_many_mappings_that_regions_must_share_them() -> None:
    run_in_child(islands_where_mappings_run_out, timeout=100)


@pytest.mark.unsanitized("it needs mappings of its own")
def test_vm_max_map_count_is_reached() -> None:
    assert "sysctl vm.max_map_count" in run_in_child(no_mapping_left, timeout=100)


def test_no_memory_for_the_core(world: World) -> None:
    write(world.memory, 3)
    for call in (
        UffdSession,
        lambda: world.session.register(bytearray(PAGE)),
        lambda: DirtyTracker(world.session),
        world.tracker.collect,
    ):
        with failing("ALLOCATE", number=errno.ENOMEM), pytest.raises(MemoryError):
            call()
    assert list(world.tracker.collect().pages(world.region)) == [3]


def test_no_memory_in_the_kernel(world: World) -> None:
    fresh = world.session.register(bytearray(4 * PAGE))
    write(world.memory, 3)
    for site, call in (
        ("PROTECT", DirtyTracker(world.session, [fresh]).start),
        ("PROTECT", lambda: world.tracker.add(fresh)),
        ("SCAN", world.tracker.collect),
    ):
        with failing(site, number=errno.ENOMEM), pytest.raises(dirtytrack.LimitReached, match="kernel") as caught:
            call()
        assert caught.value.errno == errno.ENOMEM
        assert caught.value.feature == "kernel memory"
    assert list(world.tracker.collect().pages(world.region)) == [3]


def test_the_whole_system_has_no_descriptor_left() -> None:
    with (
        failing("OPEN_USER_MODE", "OPEN_DEVICE", "OPEN_FULL", number=errno.ENFILE, times=0),
        pytest.raises(dirtytrack.LimitReached, match="sysctl") as caught,
    ):
        UffdSession()
    assert caught.value.errno == errno.ENFILE
    assert caught.value.feature == "fs.file-max"


def no_thread_left() -> None:
    tracked = World()
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    with pytest.raises(dirtytrack.LimitReached, match="RLIMIT_NPROC") as caught:
        UffdSession(events=True)
    assert caught.value.errno == errno.EAGAIN
    assert caught.value.feature == "threads"
    tracked.assert_usable()


def test_no_thread_can_be_started_for_events() -> None:
    run_in_child(no_thread_left, "nobody")

# SPDX-License-Identifier: MIT
"""Memory, registrations and processes that went away, and writes that nobody reported. Under 2 s of CI's 20 min."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import subprocess
import sys
import time

import pytest

import dirtytrack
from dirtytrack import DirtyTracker, PageCategory, Pagemap, Region, ScanFlag
from tests import oracle
from tests.kernel.failures.world import World, map_raw, unmap, write
from tests.oracle import PAGE


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
    address = oracle.map_at(0, 4 * PAGE, fd=fd)
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
    region = world.session.register(shared, name="shared", blind_spots="accepted")
    with mmap.mmap(shared.fileno(), 4 * PAGE) as alias:  # made after the registration, so nobody watches it
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


def test_leaving_a_with_when_something_was_missed() -> None:
    shared = dirtytrack.allocate(4 * PAGE, shared=True)
    with (
        pytest.raises(dirtytrack.MissedWrite, match="blind_spots"),
        dirtytrack.track(shared, audit=1.0, blind_spots="accepted") as tracker,
        mmap.mmap(shared.fileno(), 4 * PAGE) as alias,
    ):
        tracker.collect()
        alias[2 * PAGE] = 7
    assert not tracker.epoch, "stopped all the same"
    shared.close()


def test_a_process_that_is_not_there(world: World) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with Pagemap(child.pid) as pagemap:
        child.send_signal(signal.SIGKILL)
        child.communicate()
        with pytest.raises(dirtytrack.TargetGone, match="ended") as caught:
            end = time.monotonic() + 10  # who else has a hold of its address space may keep that for a moment
            while time.monotonic() < end:
                pagemap.scan(0, PAGE)
        assert caught.value.errno == errno.ESRCH
        mask, flags = PageCategory.PRESENT, ScanFlag.WP_MATCHING
        with pytest.raises(dirtytrack.TargetGone, match="ended") as caught:  # for which it looks at the mappings first
            pagemap.scan(0, PAGE, category_mask=mask, flags=flags)
        assert caught.value.errno == errno.ENOENT
    with pytest.raises(dirtytrack.TargetGone, match=str(child.pid)) as caught:
        Pagemap(child.pid)
    assert caught.value.errno == errno.ENOENT
    assert caught.value.pid == child.pid


def test_a_process_that_became_another_program() -> None:
    execs = "import os; os.read(0, 1); os.execvp('cat', ['cat'])"
    with subprocess.Popen([sys.executable, "-c", execs], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin
        assert child.stdout
        with Pagemap(child.pid) as pagemap:
            pagemap.scan(0, PAGE)
            child.stdin.write(b"!cat answers\n")
            child.stdin.flush()
            assert child.stdout.readline() == b"cat answers\n"
            with pytest.raises(dirtytrack.TargetGone, match="exec") as caught:
                pagemap.scan(0, PAGE)
            assert caught.value.errno == errno.ESRCH


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
    assert caught.value.errno == errno.EPERM
    partial = caught.value.partial
    assert partial is not None
    assert [(part.start, part.end) for part in partial] == [(address + 2 * PAGE, address + 3 * PAGE)]
    world.session.unregister(region)
    unmap(address, 8)

# SPDX-License-Identifier: MIT
"""Arguments that cannot be meant: mirrors, buffers, names, shares, masks. Nothing is consumed. Under 1 s of 20 min."""

from __future__ import annotations

import errno
import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import dirtytrack
from dirtytrack import DirtyTracker, PageCategory, Pagemap, ScanFlag
from tests.kernel.failures.world import HUGE_BYTES, PAGES, World, map_huge, map_raw, unmap, write
from tests.oracle import PAGE
from tests.sandbox import RESTRICTIONS, check, libc, run_in_child

MNT_DETACH = 2


@pytest.mark.parametrize("audit", [-0.1, 1.1, float("nan"), float("inf")])
def test_an_audit_of_no_share(world: World, audit: float) -> None:
    with pytest.raises(dirtytrack.InvalidMemory, match="audit"):
        DirtyTracker(world.session, audit=audit)
    with pytest.raises(dirtytrack.InvalidMemory, match="audit"):
        dirtytrack.track(bytearray(PAGE), session=world.session, audit=audit)
    assert world.session.regions == (world.region,)


@pytest.mark.parametrize("budget", [-1, -1e-9, float("nan"), float("-inf")])
def test_a_budget_of_no_time(world: World, budget: float) -> None:
    write(world.memory, 1)
    with pytest.raises(dirtytrack.InvalidMemory, match="budget_seconds"):
        world.tracker.collect(budget_seconds=budget)
    assert world.tracker.epoch == 1
    assert world.tracker.collect(budget_seconds=0.5).page_count == 1


def test_a_region_that_is_not_this_trackers(world: World) -> None:
    other = world.session.register(bytearray(PAGE), name="other")
    tracker, mirror = world.tracker, bytearray(PAGE)
    for region in (other, "other", "unknown"):
        for call in (tracker.collect, tracker.peek, tracker.remove, lambda r: tracker.collect_into(mirror, r)):
            with pytest.raises(dirtytrack.InvalidMemory, match=r"other|unknown"):
                call(region)
    for nonsense in (3.5, object()):
        with pytest.raises(dirtytrack.InvalidMemory, match="there is no region"):
            tracker.collect(nonsense)  # type: ignore[arg-type]


def test_a_name_that_two_regions_have(world: World) -> None:
    memory = dirtytrack.allocate(PAGE, name="world")
    second = world.tracker.add(memory)
    write(world.memory, 1)
    with pytest.raises(dirtytrack.InvalidMemory, match="pass the Region"):
        world.tracker.collect("world")
    assert world.tracker.remove(second).page_count == 1
    assert world.tracker.collect("world").page_count == 1


def test_put_back_what_is_no_set(world: World) -> None:
    operations: tuple[Callable[[Any, Any], object], ...]
    operations = operator.or_, operator.and_, operator.sub, operator.le, operator.ge
    write(world.memory, 3)
    dirty = world.tracker.collect()
    for thing in (None, [(0, PAGE)], world.region):
        with pytest.raises(TypeError, match="DirtySet"):
            world.tracker.put_back(thing)  # type: ignore[arg-type]
        for operation in operations:
            with pytest.raises(TypeError, match=r"not supported|unsupported"):
                operation(dirty, thing)
    world.tracker.put_back(dirty)
    assert world.tracker.collect() == dirty


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
    for data in (bytes(PAGE - 1), bytes(PAGE + 1), b"", (world.region.address, PAGE)):
        with pytest.raises(dirtytrack.InvalidMemory):
            dirty.scatter(data)  # type: ignore[arg-type]
    assert not world.tracker.collect()


@pytest.mark.parametrize("granule", [0, -PAGE, 1, PAGE + 1])
def test_a_granule_that_is_no_multiple_of_the_page(world: World, granule: int) -> None:
    with pytest.raises(dirtytrack.InvalidMemory, match="granule"):
        world.tracker.collect().changed(bytearray(PAGES * PAGE), granule)


def test_ask_a_set_for_a_region_that_it_does_not_know(world: World) -> None:
    second = world.tracker.add(dirtytrack.allocate(PAGE), name="second")
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
    raw = world.tracker.add((map_raw(1), PAGE), name="raw")
    with pytest.raises(dirtytrack.InvalidMemory, match="told no shape"):
        world.tracker.collect().rows("raw")
    for added in (region, raw):
        world.tracker.remove(added)
    world.session.unregister(raw)
    unmap(raw.address, 1)


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
    address = map_huge()
    for mask in (PageCategory.WRITTEN | PageCategory.PRESENT, PageCategory.PRESENT):
        with pytest.raises(dirtytrack.InvalidMemory, match="hang"):
            arm(address, mask)
    unmap(address, HUGE_BYTES // PAGE)


def arm(address: int, mask: PageCategory, max_pages: int = 0) -> None:
    """By a scan of as much as a hugetlb page."""
    end = address + HUGE_BYTES
    with Pagemap() as pagemap:
        pagemap.scan(
            address, end, category_mask=mask, return_mask=mask, flags=ScanFlag.WP_MATCHING, max_pages=max_pages
        )


def test_a_scan_that_would_pass_over_a_huge_page() -> None:
    address = map_huge()
    for max_pages in (1, HUGE_BYTES // PAGE - 1, HUGE_BYTES // PAGE + 1):
        with pytest.raises(dirtytrack.InvalidMemory, match="multiple"):
            arm(address, PageCategory.WRITTEN, max_pages)
    unmap(address, HUGE_BYTES // PAGE)


def cannot_look_for_hugetlb() -> None:
    tracked = World()
    with Pagemap() as pagemap:
        RESTRICTIONS["no-proc"]()
        mask, flags = PageCategory.WRITTEN | PageCategory.PRESENT, ScanFlag.WP_MATCHING
        start, end = tracked.region.start, tracked.region.end
        with pytest.raises(dirtytrack.InvalidMemory, match="could hang") as caught:
            pagemap.scan(start, end, category_mask=mask, return_mask=mask, flags=flags)
        assert caught.value.errno == errno.ENOENT
    check(libc.umount2(b"/proc", MNT_DETACH))
    tracked.assert_usable()


def test_a_scan_of_which_nobody_can_say_that_it_does_not_hang() -> None:
    run_in_child(cannot_look_for_hugetlb)

# SPDX-License-Identifier: MIT
"""The bytes of a set: gathering, mirroring and comparing them against memcpy and memcmp over the same runs."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator
from functools import partial

import dirtytrack

from .bare import PAGE, Bare, address_of
from .harness import MIB, Arena, Pair, Row, Settings, arena, flat, paired, scattered, show_bytes

SHARES = (0.01, 0.1, 0.5, 1.0)
NBYTES = 256 * MIB
LEAST_COPY_SPEED, LEAST_COMPARE_SPEED = 0.9, 0.8

Measure = Callable[[Settings, Bare, Arena, dirtytrack.Memory, "array[int]"], Pair]


def rows(settings: Settings, bare: Bare, name: str, measure: Measure, least_speed: float) -> Iterator[Row]:
    """Measures over an arena and as much memory beside it, at each share of written pages."""
    for nbytes in settings.sizes(NBYTES):
        with arena(bare, nbytes) as space:
            other = dirtytrack.allocate(nbytes, name="mirror")
            bare.populate(address_of(other), nbytes)
            for share in SHARES:
                pages = scattered(space.page_count, share)
                pair = measure(settings, bare, space, other, pages)
                yield pair.speed_row(f"{name} {show_bytes(nbytes)}, {share:.4g} dirty", least_speed)


def measure_gather(settings: Settings, bare: Bare, space: Arena, other: dirtytrack.Memory, pages: array[int]) -> Pair:
    bare.write(space.region.address, pages)
    dirty = space.trackers[0].collect()
    runs, address, clock = flat(dirty.runs), address_of(other), time.perf_counter_ns
    out = memoryview(other)[: dirty.nbytes]

    def ours() -> int:
        begin = clock()
        dirty.gather(out)
        return clock() - begin

    return paired(settings, space.rehearse, ours, lambda: bare.gather(runs, address))


def measure_collect_into(
    settings: Settings, bare: Bare, space: Arena, other: dirtytrack.Memory, pages: array[int]
) -> Pair:
    region, tracker, address, clock = space.region, space.trackers[0], address_of(other), time.perf_counter_ns
    tracker.collect()

    def ours() -> int:
        begin = clock()
        dirty = tracker.collect_into(other)
        elapsed = clock() - begin
        assert dirty.page_count == len(pages)
        return elapsed

    def loop() -> int:
        elapsed, found = bare.collect(region.start, region.end, 1, address)
        assert found == len(pages)
        return elapsed

    def prepare() -> None:
        bare.write(region.address, pages)
        space.rehearse()

    return paired(settings, prepare, ours, loop)


def measure_changed(
    settings: Settings, bare: Bare, space: Arena, other: dirtytrack.Memory, pages: array[int], differ: bool
) -> Pair:
    region, tracker, clock = space.region, space.trackers[0], time.perf_counter_ns
    memoryview(other)[:] = memoryview(space.memory)
    bare.write(region.address, pages, value=7)
    bare.write(address_of(other), pages, value=7)
    different = pages[::2] if differ else array("Q")
    bare.write(region.address, different, at=PAGE // 2, value=99)
    bare.write(address_of(other), different, at=PAGE // 2, value=100)
    dirty = tracker.collect()
    runs, address = flat(dirty.runs), address_of(other)

    def ours() -> int:
        begin = clock()
        found = dirty.changed(other)
        elapsed = clock() - begin
        assert found.page_count == len(different)
        return elapsed

    def loop() -> int:
        elapsed, found = bare.changed(runs, region.start, address)
        assert found == len(different)
        return elapsed

    return paired(settings, space.rehearse, ours, loop)


def gather(settings: Settings, bare: Bare) -> Iterator[Row]:
    """`gather(out)` against memcpy of the same runs into the same buffer."""
    yield from rows(settings, bare, "gather", measure_gather, LEAST_COPY_SPEED)


def collect_into(settings: Settings, bare: Bare) -> Iterator[Row]:
    """`collect_into(mirror)` against the bare pass that copies each run as the ioctl returns it."""
    yield from rows(settings, bare, "collect_into", measure_collect_into, LEAST_COPY_SPEED)


def changed(settings: Settings, bare: Bare) -> Iterator[Row]:
    """`changed(mirror)` against memcmp of the same pages: all the same, then every second one different."""
    yield from rows(
        settings, bare, "changed, none differ,", partial(measure_changed, differ=False), LEAST_COMPARE_SPEED
    )
    yield from rows(settings, bare, "changed, half differ,", partial(measure_changed, differ=True), LEAST_COMPARE_SPEED)

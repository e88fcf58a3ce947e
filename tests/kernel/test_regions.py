# SPDX-License-Identifier: MIT
"""Each sentence of the contract about regions: registering, pins, what a region tells, arming it by `write_protect`.

What the kernel has registered is asked by the independent client. Sessions are in test_sessions.py, how calls fail is
in failures/, what cannot be seen in test_blind_spots.py. Takes about 1 s of CI's 20 min.
"""

from __future__ import annotations

import gc
import mmap
import random
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dirtytrack
from dirtytrack import DirtyTracker, Run, UffdSession
from tests import oracle
from tests.kernel.listening import armed, pages_of, registered_pages
from tests.oracle import PAGE

DMA = "DMA in flight"
HUGE_PAGE = 2 << 20


# ---- registering ----------------------------------------------------------------------------------------------------


def test_what_a_buffer_owner_drops_stays_until_it_is_unregistered(session: UffdSession) -> None:
    array = np.zeros(4 * PAGE, np.uint8)
    weak, region = weakref.ref(array), session.register(array)
    del array
    gc.collect()
    assert weak() is not None, "registered memory is never freed"
    session.unregister(region)
    gc.collect()
    assert weak() is None


def test_registered_buffers_cannot_be_resized_nor_closed(session: UffdSession) -> None:
    from array import array
    from multiprocessing.shared_memory import SharedMemory

    shared = SharedMemory(create=True, size=PAGE)
    numbers, plain = array("d", bytes(PAGE)), mmap.mmap(-1, PAGE)
    regions = [session.register(memory, blind_spots="accepted") for memory in (shared, numbers, plain)]
    resizes: tuple[Callable[[], object], ...] = (
        shared.close,
        lambda: numbers.append(1.0),
        plain.close,
        lambda: plain.resize(2 * PAGE),
    )
    for resize in resizes:
        with pytest.raises(BufferError):
            resize()
    for region in regions:
        session.unregister(region)
    numbers.append(1.0)
    plain.close()
    shared.close()
    shared.unlink()


def test_regions_come_in_the_order_of_their_registration(session: UffdSession) -> None:
    buffers = {f"buffer {i}": bytearray(PAGE) for i in range(5)}
    regions = [session.register(buffer, name=name) for name, buffer in buffers.items()]
    assert session.regions == tuple(regions)
    assert [region.name for region in session.regions] == list(buffers)
    session.unregister(regions.pop(1))
    again = session.register(buffers["buffer 1"])
    assert session.regions == (*regions, again)
    assert len({region.name for region in session.regions}) == 5, "names that were not given differ"
    del again
    gc.collect()
    assert len(session.regions) == 5, "a session keeps what it registered"


def test_the_same_memory_twice_is_two_regions(session: UffdSession) -> None:
    memory = dirtytrack.allocate(2 * PAGE)
    first, second = session.register(memory), session.register((memory.address, 2 * PAGE))
    tracker = armed(session)
    memory[0] = 1
    dirty = tracker.collect()
    assert dirty.page_count == 1
    assert dirty.nbytes == PAGE, "each byte once"
    assert pages_of(dirty, first) == pages_of(dirty, second) == [0]
    tracker.stop()
    session.unregister(first)
    assert registered_pages(second.start, second.end) == [0, 1]
    tracker = armed(session)
    memory[PAGE] = 1
    assert pages_of(tracker.collect(), second) == [1]


def test_an_address_that_is_used_again_is_registered_again(session: UffdSession) -> None:
    with oracle.mapped(4 * PAGE) as address:
        first = session.register((address, 4 * PAGE))
        oracle.unmap(address, 4 * PAGE)
        oracle.map_at(address, 4 * PAGE)
        assert registered_pages(address, address + 4 * PAGE) == []
        second = session.register((address, 4 * PAGE))
        assert registered_pages(address, address + 4 * PAGE) == [0, 1, 2, 3]
        tracker = armed(session, second)
        oracle.poke_bytes(address + PAGE, b"\1")
        assert pages_of(tracker.collect(), second) == [1]
        tracker.stop()
        session.unregister(first)
        assert registered_pages(address, address + 4 * PAGE) == [0, 1, 2, 3]


SPAN = 48 * PAGE
cuts = st.tuples(st.integers(0, SPAN - 1), st.integers(1, SPAN)).map(lambda c: (c[0], min(c[1], SPAN - c[0])))


@settings(max_examples=100)
@given(st.lists(cuts, min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_unregistering_touches_no_page_that_another_region_holds(
    pieces: list[tuple[int, int]], chance: random.Random
) -> None:
    with oracle.mapped(SPAN) as address, UffdSession() as session:
        regions = [session.register((address + offset, nbytes)) for offset, nbytes in pieces]
        for region, (offset, nbytes) in zip(regions, pieces, strict=True):
            assert (region.address, region.nbytes) == (address + offset, nbytes)
            assert (region.start, region.end) == (
                region.address // PAGE * PAGE,
                -(-(region.address + nbytes) // PAGE) * PAGE,
            )
        chance.shuffle(regions)
        while True:
            wanted = {(at - address) // PAGE for r in regions for at in range(r.start, r.end, PAGE)}
            assert set(registered_pages(address, address + SPAN)) == wanted
            if not regions:
                break
            tracker = armed(session)
            written = chance.choice(sorted(wanted))
            oracle.poke_bytes(address + written * PAGE, b"\1")
            assert [(run.start - address) // PAGE for run in tracker.collect()] == [written], "and it is tracked still"
            tracker.stop()
            session.unregister(regions.pop())


def mapping_count() -> int:
    return Path("/proc/self/maps").read_text().count("\n")


@pytest.mark.parametrize("nbytes", [PAGE, 100, 3 * PAGE + 5])
def test_small_regions_that_touch_cost_no_mappings(session: UffdSession, nbytes: int) -> None:
    """The kernel has 65,530 mappings for a process."""
    count = 1000
    memory = dirtytrack.allocate(count * nbytes)
    places = [(memory.address + i * nbytes, nbytes) for i in range(count)]
    random.Random(1).shuffle(places)
    before = mapping_count()
    regions = [session.register(place) for place in places]
    assert mapping_count() <= before + 10
    tracker = armed(session)
    memory[500 * nbytes] = 1
    dirty = tracker.collect()
    assert dirty.page_count == 1
    touched = [r for r in regions if dirty.in_region(r)]
    assert {r.start for r in touched} <= {run.start - i * PAGE for run in dirty for i in range(5)}
    assert dirty.nbytes == min(PAGE, memory.nbytes)
    tracker.stop()
    for region in regions:
        session.unregister(region)
    assert mapping_count() <= before + 10


# ---- what a region tells --------------------------------------------------------------------------------------------


def test_what_a_region_tells_of_an_array(session: UffdSession) -> None:
    owner = np.zeros(20_000, np.float64)
    array = owner[7 : 7 + 96 * 100].reshape(96, 100)
    region = session.register(array, name="weights")
    assert region.address == array.__array_interface__["data"][0]
    assert region.nbytes == array.nbytes == 96 * 100 * 8
    assert region.start == region.address // PAGE * PAGE
    assert region.end == -(-(region.address + region.nbytes) // PAGE) * PAGE
    assert region.page_count == (region.end - region.start) // PAGE
    assert (region.name, region.arm, region.granule_bytes) == ("weights", "all", PAGE)
    assert (region.shape, region.dtype) == ((96, 100), "d")
    assert region.blind_spots == {DMA}
    assert region.registered
    assert repr(region) == f"<Region 'weights' of 76800 bytes at {region.address:#x}>"
    with pytest.raises(AttributeError):
        region.name = "other"  # type: ignore[misc]


def test_what_a_region_tells_where_the_buffer_does_not(session: UffdSession) -> None:
    memory = dirtytrack.allocate(4 * PAGE, name="own")
    assert session.register(memory).name == "own", "taken over"
    assert session.register(memory, name="given").name == "given"
    raw = session.register((memory.address + 1, PAGE))
    assert (raw.shape, raw.dtype) == (None, None)
    assert raw.name == "region 3"
    assert raw.page_count == 2
    run = session.register(Run(memory.address + PAGE, memory.address + 3 * PAGE))
    assert (run.start, run.end, run.nbytes) == (memory.address + PAGE, memory.address + 3 * PAGE, 2 * PAGE)
    dates = np.zeros((5, 3), "datetime64[ns]")
    assert session.register(dates).shape == (5, 3)
    assert session.register(np.zeros((), np.int32)).shape == ()


def test_what_the_kernel_resolves(session: UffdSession) -> None:
    private = session.register(dirtytrack.allocate(HUGE_PAGE, huge="transparent"))
    assert private.granule_bytes == PAGE, "it splits at the first store"
    memory = dirtytrack.allocate(2 * HUGE_PAGE, huge="transparent", shared=True)
    shared = session.register(memory, blind_spots="accepted")
    assert shared.granule_bytes == HUGE_PAGE, "it never does"
    assert shared.start % HUGE_PAGE == shared.end % HUGE_PAGE == 0


# ---- write_protect --------------------------------------------------------------------------------------------------


def test_write_protect_keeps_what_every_listener_waits_for(session: UffdSession) -> None:
    memory = dirtytrack.allocate(8 * PAGE)
    whole, part = session.register(memory), session.register((memory.address + 2 * PAGE, 2 * PAGE))
    first, second = armed(session, whole), armed(session, part)
    memory[2 * PAGE] = memory[5 * PAGE] = 1
    session.write_protect(part)
    assert oracle.written(whole.start, whole.end) == {5}, "armed, for real"
    session.write_protect(whole)
    session.write_protect(whole)
    assert oracle.written(whole.start, whole.end) == set()
    memory[3 * PAGE] = 1
    assert pages_of(second.collect(), part) == [0, 1]
    assert pages_of(first.collect(), whole) == [2, 3, 5]
    memory[6 * PAGE] = 1
    oracle.arm(session.fileno(), whole.start, whole.end)
    assert not first.collect(), "the kernel's own way to arm does lose it"


def test_write_protect_arms_what_nobody_listens_to_yet(session: UffdSession) -> None:
    memory = dirtytrack.allocate(4 * PAGE)
    memory[:] = bytes([1]) * 4 * PAGE
    region = session.register(memory)
    assert oracle.written(region.start, region.end) == {0, 1, 2, 3}, "registering arms nothing"
    session.write_protect(region)
    assert oracle.written(region.start, region.end) == set()
    memory[PAGE] = 1
    assert oracle.written(region.start, region.end) == {1}
    tracker = DirtyTracker(session)
    tracker.start()
    assert not tracker.collect()

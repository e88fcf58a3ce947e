# SPDX-License-Identifier: MIT
"""Each sentence of the contract about sessions: doors, registering, pins, regions, arming, coming and going.

What a session has after each call, and what the kernel has registered, asked by the independent client. How calls fail
is in failures/, what cannot be seen in test_blind_spots.py. Takes about 2 s of CI's 20 min.
"""

from __future__ import annotations

import errno
import gc
import mmap
import os
import random
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dirtytrack
from dirtytrack import DirtySet, DirtyTracker, Region, Run, UffdFeature, UffdSession
from dirtytrack.kernel import engine
from tests import oracle
from tests.oracle import PAGE
from tests.sandbox import failing

HUGE_PAGE = 2 << 20
DMA = "DMA in flight"
OTHER_WRITERS = "writes through another mapping or descriptor"
HOLES = "pages discarded by a punched hole, MADV_REMOVE or truncation"
FILE_BENEATH = "the file changing beneath pages that were never written"
DISCARDS = "pages of a file discarded by MADV_DONTNEED"


@pytest.fixture
def session() -> Iterator[UffdSession]:
    with UffdSession() as made:
        yield made


def armed(session: UffdSession, *regions: Region) -> DirtyTracker:
    """A running tracker with nothing pending."""
    tracker = DirtyTracker(session, regions or None)
    tracker.start()
    assert not tracker.collect()
    return tracker


def pages_of(dirty: DirtySet, region: Region) -> list[int]:
    return list(dirty.pages(region))


def registered_pages(start: int, end: int) -> list[int]:
    """By the kernel: the pages of [start, end) that a userfaultfd has."""
    return [i for i, bits in enumerate(oracle.categories(start, end)) if bits & oracle.WPALLOWED]


def descriptors() -> dict[int, str]:
    found = {}
    for link in Path("/proc/self/fd").iterdir():
        try:
            found[int(link.name)] = str(link.readlink())
        except FileNotFoundError:  # that of the listing itself
            continue
    return found


def is_resizable(buffer: bytearray) -> bool:
    try:
        buffer.append(0)
    except BufferError:
        return False
    buffer.pop()
    return True


# ---- doors and descriptors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shut", [(), ("OPEN_USER_MODE",), ("OPEN_USER_MODE", "OPEN_DEVICE")])
def test_the_first_door_that_opens_is_taken_and_tracks_the_kernels_writes_too(shut: tuple[str, ...]) -> None:
    answers = dirtytrack.probe().door_errnos
    assert list(answers) == list(engine.DOORS[1:])
    usable = [door for door in list(answers)[len(shut) :] if answers[door] == 0]
    memory = dirtytrack.allocate(4 * PAGE)
    with failing(*shut, number=errno.EPERM, times=0):
        if not usable:
            with pytest.raises(dirtytrack.PermissionDenied):
                UffdSession()
            return
        session = UffdSession()
    with session, open("/dev/zero", "rb", buffering=0) as source:
        assert session.opened_by == usable[0]
        assert usable[0] in repr(session)
        region = session.register(memory)
        tracker = armed(session)
        source.readinto(memoryview(memory)[PAGE : PAGE + 1])
        memory[3 * PAGE] = 1
        assert pages_of(tracker.collect(), region) == [1, 3]


def test_descriptors_and_features(session: UffdSession) -> None:
    fd = session.fileno()
    assert "userfaultfd" in str(Path(f"/proc/self/fd/{fd}").readlink())
    assert not os.get_inheritable(fd)
    assert isinstance(session.features, UffdFeature)
    assert UffdFeature.WP_ASYNC | UffdFeature.WP_UNPOPULATED in session.features
    assert session.features == dirtytrack.probe().features
    session.close()
    assert session.fileno() == -1
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


# ---- the end of a session -------------------------------------------------------------------------------------------


def test_a_closed_session_cannot_be_entered() -> None:
    session = UffdSession()
    session.close()
    with pytest.raises(dirtytrack.SessionClosed), session:
        pass


def test_closing_lets_go_of_everything() -> None:
    before = descriptors()
    buffer, memory = bytearray(64 * PAGE), dirtytrack.allocate(4 * PAGE)
    with UffdSession() as session:
        regions = session.register(buffer), session.register(memory)
        tracker = DirtyTracker(session)
        tracker.start()
        assert list(session.regions) == list(tracker.regions) == list(regions)
        assert "2 regions" in repr(session)
        assert not is_resizable(buffer)
        assert registered_pages(regions[1].start, regions[1].end) == [0, 1, 2, 3]
    assert session.closed
    assert len(session.regions) == 0
    assert not any(region.registered for region in regions)
    assert "unregistered" in repr(regions[0])
    assert (regions[1].address, regions[1].nbytes) == (memory.address, 4 * PAGE), "the numbers stay"
    assert is_resizable(buffer)
    assert registered_pages(regions[1].start, regions[1].end) == []
    memory.close()
    del tracker
    assert descriptors() == before


def test_a_with_that_raises_closes_and_passes_it_on() -> None:
    before, buffer = descriptors(), bytearray(PAGE)
    sessions = []

    def raises() -> None:
        with UffdSession() as session:
            sessions.append(session)
            session.register(buffer)
            with session.in_flight(buffer), DirtyTracker(session):
                raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        raises()
    assert sessions[0].closed
    assert is_resizable(buffer)
    assert descriptors() == before


def test_a_dropped_session_closes_without_a_warning() -> None:
    before = descriptors()
    buffer, memory = bytearray(64 * PAGE), dirtytrack.allocate(4 * PAGE)
    session = UffdSession()
    region = session.register(memory)
    session.register(buffer)
    tracker = armed(session)
    memory[PAGE] = 1
    dirty = tracker.collect()
    weak = weakref.ref(session)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del session
        assert weak() is not None, "its trackers have it"
        memory[2 * PAGE] = 1
        assert pages_of(tracker.collect(), region) == [2]
        del tracker
        gc.collect()
    assert weak() is None
    assert descriptors() == before
    assert registered_pages(region.start, region.end) == []
    assert pages_of(dirty, region) == [1], "sets outlive their session"
    with UffdSession() as other:
        other.register(memory)
    del region, dirty
    assert is_resizable(buffer)


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


# ---- suspending -----------------------------------------------------------------------------------------------------


def test_suspended_the_userfaultfd_is_gone_and_all_is_dirty(session: UffdSession) -> None:
    buffer, memory = bytearray(PAGE), dirtytrack.allocate(4 * PAGE)
    region = session.register(memory)
    held = session.register(buffer)
    tracker, other = armed(session, region), armed(session, region)
    memory[PAGE] = 1
    session.suspend()
    session.suspend()
    assert session.fileno() == -1
    assert not session.closed
    assert not [target for target in descriptors().values() if "userfaultfd" in target]
    assert registered_pages(region.start, region.end) == []
    assert session.regions == (region, held)
    assert region.registered
    assert not is_resizable(buffer), "pins stay"
    for _ in range(2):
        assert pages_of(tracker.peek(), region) == [0, 1, 2, 3]
        assert pages_of(tracker.collect(), region) == [0, 1, 2, 3]
    with UffdSession() as stranger:
        stranger.register(memory)
    session.resume()
    session.resume()
    assert session.fileno() >= 0
    assert registered_pages(region.start, region.end) == [0, 1, 2, 3]
    for listener in (tracker, other):
        assert pages_of(listener.collect(), region) == [0, 1, 2, 3]
        assert not listener.collect()
    memory[2 * PAGE] = 1
    for listener in (tracker, other):
        assert pages_of(listener.collect(), region) == [2]
    assert (tracker.epoch, other.epoch) == (7, 5)


def test_coming_and_going_while_suspended(session: UffdSession) -> None:
    memory = dirtytrack.allocate(8 * PAGE)
    stays = session.register((memory.address, 2 * PAGE))
    goes = session.register((memory.address + 2 * PAGE, 2 * PAGE))
    tracker = armed(session, stays)
    session.suspend()
    session.unregister(goes)
    comes = session.register((memory.address + 4 * PAGE, 2 * PAGE))
    session.write_protect(comes)
    tracker.add(comes)
    starts = DirtyTracker(session)
    starts.start()
    assert set(starts.regions) == {stays, comes}
    assert starts.collect().page_count == 4
    stops = armed_while_suspended(session, stays)
    assert pages_of(stops.stop(), stays) == [0, 1]
    session.resume()
    assert registered_pages(memory.address, memory.address + 8 * PAGE) == [0, 1, 4, 5]
    for listener in (tracker, starts):
        assert listener.collect().page_count == 4
        assert not listener.collect()
    memory[4 * PAGE] = 1
    for listener in (tracker, starts):
        dirty = listener.collect()
        assert pages_of(dirty, comes) == [0]
        assert dirty.page_count == 1


def armed_while_suspended(session: UffdSession, region: Region) -> DirtyTracker:
    tracker = DirtyTracker(session, [region])
    tracker.start()
    return tracker


def test_closing_a_suspended_session() -> None:
    before, buffer = descriptors(), bytearray(PAGE)
    with UffdSession() as session:
        session.register(buffer)
        session.suspend()
    assert is_resizable(buffer)
    assert descriptors() == before
    with pytest.raises(dirtytrack.SessionClosed):
        session.resume()


# ---- two sessions ---------------------------------------------------------------------------------------------------


def test_the_kernel_allows_one_userfaultfd_a_mapping(session: UffdSession) -> None:
    memory = dirtytrack.allocate(8 * PAGE)
    region = session.register((memory.address + 4 * PAGE, 2 * PAGE))
    tracker = armed(session)
    with UffdSession() as other:
        for first, count in ((0, 8), (3, 2), (5, 1), (4, 2)):
            with pytest.raises(dirtytrack.RangeBusy) as caught:
                other.register((memory.address + first * PAGE, count * PAGE))
            assert isinstance(caught.value, OSError)
        assert other.regions == ()
        assert registered_pages(memory.address, memory.address + 8 * PAGE) == [4, 5], "nothing, not a half"
        mine = other.register((memory.address, 4 * PAGE))
        beside = armed(other)
        memory[3 * PAGE] = memory[4 * PAGE] = 1
        assert pages_of(beside.collect(), mine) == [3]
        assert pages_of(tracker.collect(), region) == [0]
        tracker.stop()
        session.unregister(region)
        taken = other.register(memory)
        assert pages_of(armed(other, taken).peek(), taken) == []


def test_we_never_arm_what_another_session_has(session: UffdSession) -> None:
    """An address that went away beneath a region is used again, by memory that a stranger registered: it is gone for
    us, and comes back as a mapping that was replaced when the stranger lets go of it."""
    with oracle.mapped(4 * PAGE) as address:
        stranger = UffdSession()
        region = session.register((address, 4 * PAGE))
        tracker = armed(session)
        oracle.map_at(address + PAGE, PAGE)
        foreign = stranger.register((address + PAGE, PAGE))
        theirs = armed(stranger)
        oracle.poke_bytes(address + PAGE, b"\1")
        oracle.poke_bytes(address + 3 * PAGE, b"\1")
        with pytest.raises(dirtytrack.RegionGone) as caught:
            tracker.collect()
        assert caught.value.region is region
        assert (caught.value.start, caught.value.end) == (address + PAGE, address + 2 * PAGE)
        assert 3 in pages_of(tracker.collect(), region), "told once, and what remains is watched"
        assert pages_of(theirs.collect(), foreign) == [0], "their bits are theirs"
        oracle.poke_bytes(address + PAGE, b"\2")
        assert 1 not in pages_of(tracker.collect(), region)
        with pytest.raises(dirtytrack.RegionGone):
            armed(session)
        assert pages_of(theirs.collect(), foreign) == [0], "nor does arming take them"
        stranger.close()
        assert pages_of(tracker.collect(), region) == [1], "another mapping, dirty as a whole"
        oracle.poke_bytes(address + PAGE, b"\3")
        assert pages_of(tracker.collect(), region) == [1]
        assert pages_of(tracker.collect(), region) == []

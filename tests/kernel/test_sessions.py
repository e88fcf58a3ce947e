# SPDX-License-Identifier: MIT
"""Each sentence of the contract about sessions: doors, the end, suspending, two of them at once.

What a session has after each call, and what the kernel has registered, asked by the independent client. Regions are in
test_regions.py, how calls fail is in failures/. Takes about 1 s of CI's 20 min.
"""

from __future__ import annotations

import errno
import gc
import os
import warnings
import weakref
from pathlib import Path

import pytest

import dirtytrack
from dirtytrack import DirtyTracker, Region, UffdFeature, UffdSession
from dirtytrack.kernel import engine
from tests import oracle
from tests.kernel.listening import armed, is_resizable, pages_of, registered_pages
from tests.opened import descriptors
from tests.oracle import PAGE
from tests.sandbox import failing

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
    gc.collect()
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
    gc.collect()
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
    gc.collect()
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
    gc.collect()
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

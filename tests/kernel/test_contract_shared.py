# SPDX-License-Identifier: MIT
"""Each sentence of the contract about `track` and the session that everybody shares, statistics and the audit.

Takes about 1 s of CI's 20 min.
"""

from __future__ import annotations

import gc
import mmap
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

import dirtytrack
from dirtytrack import DirtySet, DirtyTracker, Memory, MissedWrite, Region, Session, UffdSession
from dirtytrack.session import default_session
from tests import oracle
from tests.kernel.backends import session_of
from tests.kernel.listening import pages_of
from tests.oracle import PAGE

PAGES = 16


@pytest.fixture
def session(backend: str) -> Iterator[Session]:
    with session_of(backend) as made:
        yield made


@pytest.fixture
def memory() -> Memory:
    return dirtytrack.allocate(PAGES * PAGE, name="memory")


@pytest.fixture
def region(session: Session, memory: Memory) -> Region:
    return session.register(memory)


def armed(session: Session, audit: float = 0.0) -> DirtyTracker:
    tracker = DirtyTracker(session, audit=audit)
    tracker.start()
    return tracker


def write(memory: Memory, *pages: int) -> None:
    for page in pages:
        memory[page * PAGE] = (memory[page * PAGE] + 1) % 256


# ---- the shared session ---------------------------------------------------------------------------------------------


def test_who_tracks_the_same_memory_shares_the_session(memory: Memory) -> None:
    first, second = dirtytrack.track(memory, name="first"), dirtytrack.track((memory.address, 4 * PAGE))
    session = first.session
    assert session is second.session is default_session()
    with first:
        with second:
            assert len(session.regions) == 2, "two, of two users"
            write(memory, 2, 9)
            assert [run.start for run in second.collect()] == [memory.address + 2 * PAGE]
        assert list(session.regions) == list(first.regions)
        assert len(registered(memory)) == PAGES, "unregistered by count"
        write(memory, 3)
        assert pages_of(first.collect(), first.regions[0]) == [2, 3, 9]
    assert not list(session.regions)
    assert registered(memory) == []


def registered(memory: Memory) -> list[int]:
    bits = oracle.categories(memory.address, memory.address + memory.nbytes)
    return [page for page, found in enumerate(bits) if found & oracle.WPALLOWED]


def test_the_shared_session_goes_with_its_last_tracker(memory: Memory) -> None:
    first, second = dirtytrack.track(memory), dirtytrack.track(bytearray(PAGE))
    weak, fd = weakref.ref(first.session), first.session.fileno()
    with first:
        write(memory, 1)
    del first
    gc.collect()
    assert weak() is not None, "the second has it"
    with second:
        pass
    del second
    gc.collect()
    assert weak() is None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    with dirtytrack.track(memory) as third:
        write(memory, 1)
        assert third.collect().page_count == 1


def test_a_tracker_that_is_dropped_lets_go_of_what_it_tracked(memory: Memory) -> None:
    keeps, buffer = dirtytrack.track(memory), bytearray(PAGE)
    dropped = dirtytrack.track(memory, buffer)
    dropped.start()
    with pytest.raises(BufferError):
        buffer.append(1)
    del dropped
    gc.collect()
    buffer.append(1)
    assert keeps.session.regions == keeps.regions
    with keeps:
        write(memory, 4)
        assert keeps.collect().page_count == 1


def test_the_shared_session_and_an_explicit_one_do_not_mix(memory: Memory) -> None:
    session = UffdSession()
    with dirtytrack.track(memory) as tracker:
        with pytest.raises(dirtytrack.RangeBusy):
            session.register(memory)
        write(memory, 1)
        assert tracker.collect().page_count == 1
    mine = session.register((memory.address, PAGE))
    with pytest.raises(dirtytrack.RangeBusy):
        dirtytrack.track(memory)
    with dirtytrack.track(memory, session=session) as tracker:
        assert tracker.session is session
        assert mine not in tracker.regions
    assert session.regions == (mine,)


def test_names_never_share_a_namespace_with_options(memory: Memory) -> None:
    buffers = {name: bytearray(PAGE) for name in ("audit", "session", "strict", "name")}
    with dirtytrack.track(buffers, memory, {"more": bytearray(2 * PAGE)}) as tracker:
        assert [region.name for region in tracker.regions] == [*buffers, "memory", "more"]
        buffers["audit"][0] = 1
        assert tracker.collect().in_region("audit").nbytes >= 1
    with dirtytrack.track(memory, name="mine") as tracker:
        assert tracker.collect("mine").page_count == 0


# ---- statistics, audit, what is empty here --------------------------------------------------------------------------


def test_statistics_count_what_was_done(session: Session, memory: Memory, region: Region) -> None:
    first, second = armed(session), armed(session)
    started = session.statistics()
    write(memory, 1, 2, 5)
    assert first.statistics() == type(started)(*[0] * len(started))
    first.peek()
    assert session.statistics().collects == started.collects, "a peek is no collect"
    first.collect()
    second.collect()
    session.mark_dirty((memory.address, 2 * PAGE))
    second.collect(region)
    one, two, both = first.statistics(), second.statistics(), session.statistics()
    assert (one.collects, two.collects, both.collects - started.collects) == (1, 2, 3)
    assert (one.pages_found, two.pages_found, both.pages_found - started.pages_found) == (3, 0, 3)
    support = dirtytrack.probe()
    remedied = isinstance(session, UffdSession) and not (support.sees_discards and support.sees_untouched)
    scans = 2 if remedied else 1  # with remedy R1
    assert (one.scans, two.scans) == (scans, 2 * scans), "one mapping, one call"
    assert both.pages_declared == 2
    assert one.collect_ns > 0
    assert both.collect_ns == started.collect_ns + one.collect_ns + two.collect_ns
    assert both.mappings_renewed == both.scans_refused == both.scans_faulted == both.pages_audited == 0
    first.stop()
    assert first.statistics().collects == 2
    assert first.statistics().pages_found == 3


@contextmanager
def unwatched(session: Session, shared: dirtytrack.Memory) -> Iterator[tuple[Region, mmap.mmap]]:
    """A region of it, and a mapping that was made too late to be armed with it."""
    region = session.register(shared, name="shared", blind_spots="accepted")
    with mmap.mmap(shared.fileno(), shared.nbytes) as alias:
        yield region, alias


def test_the_audit_leaves_all_pending_whichever_way_it_is_found() -> None:
    shared = dirtytrack.allocate(8 * PAGE, shared=True)
    mirror = bytearray(8 * PAGE)
    with UffdSession() as session, unwatched(session, shared) as (region, alias):
        tracker, plain = armed(session, audit=1.0), armed(session)
        takes: tuple[Callable[[], DirtySet], ...] = (
            tracker.collect,
            lambda: tracker.collect(budget_seconds=60),
            lambda: tracker.collect_into(mirror),
            tracker.stop,
        )
        for number, take in enumerate(takes, 1):
            tracker.collect()
            epoch, audited = tracker.epoch, tracker.statistics().pages_audited
            alias[6 * PAGE] = shared[3 * PAGE] = number
            with pytest.raises(MissedWrite) as caught:
                take()
            assert (caught.value.start, caught.value.end) == (region.start + 6 * PAGE, region.start + 7 * PAGE)
            assert tracker.epoch == epoch
            assert not any(mirror), "nothing was handed out"
            assert pages_of(tracker.collect(), region) == [3, 6]
            assert tracker.statistics().pages_audited > audited
            assert not tracker.collect()
        plain.collect()
        alias[0] = 1
        assert not plain.collect(), "without an audit nobody notices"
        leaves = DirtyTracker(session, audit=1.0)
        with pytest.raises(MissedWrite), leaves:
            leaves.collect()
            alias[PAGE] = 9
        assert not leaves.epoch, "found by leaving its `with`, it is stopped all the same"


def test_what_the_audit_found_is_told_by_region() -> None:
    shared = dirtytrack.allocate(8 * PAGE, shared=True)
    with UffdSession() as session, unwatched(session, shared) as (region, alias):
        session.register(bytearray(PAGE))
        tracker = armed(session, audit=1.0)
        tracker.collect()
        alias[6 * PAGE] = 1
        with pytest.raises(MissedWrite, match="shared") as caught:
            tracker.collect()
        assert caught.value.region is region


def test_the_audit_knows_what_a_collect_of_a_part_reported(session: Session, memory: Memory) -> None:
    low = session.register((memory.address, 4 * PAGE))
    high = session.register((memory.address + 4 * PAGE, 4 * PAGE))
    tracker = armed(session, audit=1.0)
    tracker.collect()
    write(memory, 1, 5)
    assert pages_of(tracker.collect(low), low) == [1]
    assert pages_of(tracker.collect(), high) == [1], "page 1 of `low` was reported: it was not missed"
    assert not tracker.collect()


def test_the_audit_knows_what_a_collect_on_a_budget_reported(session: Session) -> None:
    big = dirtytrack.allocate(128 << 20)
    region = session.register(big)
    tracker = armed(session, audit=1.0)
    tracker.collect()
    write(big, *range(1000))
    dirty = tracker.collect(budget_seconds=0)
    assert not dirty.complete
    reported = pages_of(dirty, region)
    assert reported == list(range(len(reported)))
    assert reported, "up to a round address, wherever that lies in this memory"
    assert pages_of(tracker.collect(), region) == list(range(len(reported), 1000)), "and none of them was missed"


def test_nothing_is_assumed_in_the_first_epochs(memory: Memory) -> None:
    with dirtytrack.track(memory, adaptive=True, exact=False) as tracker:
        write(memory, 3)
        mirror = bytearray(memory)
        dirty = tracker.collect(exact=True, mirror=mirror)
        assert dirty.page_count == 1
        assert isinstance(dirty.assumed, DirtySet)
        assert not dirty.assumed
        assert dirty.assumed <= dirty
        assert dirty.assumed.epoch == dirty.epoch


def test_the_first_epoch_is_audited_and_so_is_added_memory() -> None:
    shared = dirtytrack.allocate(4 * PAGE, shared=True)
    with UffdSession() as session, unwatched(session, shared) as (region, alias):
        tracker = armed(session, audit=1.0)
        alias[PAGE] = 1
        with pytest.raises(MissedWrite):
            tracker.collect()
        tracker.stop()
        first = session.register(dirtytrack.allocate(PAGE))
        tracker = dirtytrack.DirtyTracker(session, [first], audit=1.0)
        tracker.start()
        tracker.add(region)
        assert tracker.collect().in_region(region).page_count == 4
        alias[2 * PAGE] = 1
        with pytest.raises(MissedWrite) as caught:
            tracker.collect()
        assert caught.value.region is region


def test_leaving_a_tracker_whose_memory_another_watches(caplog: pytest.LogCaptureFixture) -> None:
    memory = dirtytrack.allocate(4 * PAGE)
    with pytest.raises(KeyError, match="its own"), dirtytrack.track(memory, name="both") as tracker:
        session = tracker.session
        other = dirtytrack.DirtyTracker(session)
        other.start()
        raise KeyError("its own")
    assert "still watches" in caplog.text
    write(memory, 2)
    (region,) = other.regions
    assert pages_of(other.collect(), region) == [2]
    other.stop()
    assert list(session.regions) == [region]
    del region, tracker
    session.mark_dirty(memory)  # any call: what was dropped is let go of
    assert not session.regions

# SPDX-License-Identifier: MIT
"""Several mappings of one memory, and memory that two sessions meet in; mappings come and go. Takes about 1 s."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import suppress

import pytest

import dirtytrack
from dirtytrack import DirtyTracker, UffdSession
from tests import oracle
from tests.oracle import PAGE

PAGES = 8


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("aliased")
    os.pwrite(made, bytes(PAGES * PAGE), 0)
    yield made
    os.close(made)


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_mapping_that_was_replaced_hides_no_other(fd: int, gone: int) -> None:
    """The others are scanned all the same in the collect that lets go of it."""
    whole = mmap.mmap(fd, PAGES * PAGE)
    others = [oracle.map_at(0, PAGES * PAGE, fd=fd) for _ in range(3)]
    with dirtytrack.track(whole, blind_spots="accepted") as tracker:
        (region,) = tracker.regions
        assert region.aliases == 3
        oracle.map_at(others[gone], PAGES * PAGE)
        left = [address for i, address in enumerate(others) if i != gone]
        for page, address in enumerate(left, 2):
            oracle.poke_bytes(address + page * PAGE, b"x")
        assert {2, 3} <= set(tracker.collect().pages(region))
        assert region.aliases == 2
        assert not tracker.collect()
    del tracker
    for address in others:
        oracle.unmap(address, PAGES * PAGE)


def test_a_flight_into_one_mapping_is_dirty_in_the_others(fd: int) -> None:
    one, other = mmap.mmap(fd, PAGES * PAGE), mmap.mmap(fd, PAGES * PAGE)
    with UffdSession() as session:
        region = session.register(other, blind_spots="accepted")
        tracker = DirtyTracker(session)
        tracker.start()
        with session.in_flight((oracle.address_of(one) + PAGE, PAGE)):
            for _ in range(2):
                assert list(tracker.peek().pages(region)) == [1]
                assert list(tracker.collect().pages(region)) == [1]
        assert list(tracker.collect().pages(region)) == [1], "once after"
        assert not tracker.collect()


@pytest.mark.parametrize("turned", [False, True])
def test_two_sessions_where_two_regions_were_replaced(turned: bool) -> None:
    """The first has both regions still; what lies there is the second's, and none of its writes is taken."""
    address = oracle.map_at(0, 16 * PAGE)
    parts = [(address, 10 * PAGE), (address + 5 * PAGE, 10 * PAGE)]
    with UffdSession() as first, UffdSession() as second:
        for part in reversed(parts) if turned else parts:
            first.register(part)
        before = DirtyTracker(first)
        before.start()
        oracle.map_at(address, 16 * PAGE)
        region = second.register((address, 16 * PAGE))
        tracker = DirtyTracker(second)
        tracker.start()
        for _ in range(5):
            for page in (2, 7, 12):
                oracle.poke_bytes(address + page * PAGE, os.urandom(8))
            with suppress(dirtytrack.RegionGone):
                before.collect()
            assert {2, 7, 12} <= set(tracker.collect().pages(region))
    oracle.unmap(address, 16 * PAGE)


def test_memory_of_another_kind_beneath_many_regions() -> None:
    """Each renewed mapping needs notes of its own for remedy R2, in the middle of a collect that tells everybody."""
    pages = 64
    address = oracle.map_at(0, pages * PAGE)
    with UffdSession() as session:
        regions = [session.register((address + page * PAGE, PAGE)) for page in range(pages)]
        trackers = [DirtyTracker(session), DirtyTracker(session)]
        for tracker in trackers:
            tracker.start()
        made = os.memfd_create("other kind")
        os.ftruncate(made, pages * PAGE)
        oracle.map_at(address, pages * PAGE, fd=made)
        late = DirtyTracker(session)
        late.start()
        assert trackers[0].collect(regions[3]).page_count == 1
        for tracker in trackers:
            tracker.collect()
        oracle.poke_bytes(address + 5 * PAGE, b"x")
        for tracker in (*trackers, late):
            assert list(tracker.collect().pages(regions[5])) == [0]
        os.close(made)
    oracle.unmap(address, pages * PAGE)

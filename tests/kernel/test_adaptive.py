# SPDX-License-Identifier: MIT
"""Adaptive re-arming: blocks that are densely rewritten go unwatched, and nothing that was written is outside a set.

Takes 25 s of CI's 20 min.
"""

from __future__ import annotations

import pickle
import random
import threading
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

import dirtytrack
from dirtytrack import DirtySet, DirtyTracker, Memory, UffdSession
from dirtytrack.kernel import core
from tests.kernel.conftest import USUAL
from tests.oracle import PAGE, address_of

PAGES = 2048  # of 8 MiB: 32 blocks of 64 pages
BLOCK = 64
UNTOLD = 64  # enum dt_remedy
SETTLED = 8  # epochs
COOLED = 100  # epochs at the most

Words = npt.NDArray[np.uint64]

pytestmark = pytest.mark.usefixtures("usual_costs")


@pytest.fixture(params=[False, True], ids=["private", "shared"])
def memory(request: pytest.FixtureRequest) -> Memory:
    """It begins with a block: blocks lie at multiples of their size, and pages before the first are watched."""
    held = []
    while True:
        made = dirtytrack.allocate(PAGES * PAGE, shared=request.param)
        beyond = address_of(made) % (BLOCK * PAGE)
        if not beyond:
            made[:] = bytes(len(made))
            return made
        held += [made, dirtytrack.allocate(beyond)]  # the next goes below


@pytest.fixture
def session() -> Iterator[UffdSession]:
    with UffdSession() as made:
        yield made


def words(memory: Memory | bytearray) -> Words:
    """The first word of each page."""
    return np.frombuffer(memory, np.uint64)[:: PAGE // 8]


Chosen = npt.NDArray[np.int64] | list[int]


def store(memory: Memory, pages: Chosen, value: int) -> None:
    words(memory)[pages] = value


def rewrite(memory: Memory, tracker: DirtyTracker, pages: Chosen, epochs: int) -> DirtySet:
    """Write the same pages in each of so many epochs; the last set."""
    for epoch in range(epochs):
        store(memory, pages, 1 << 32 | epoch)
        dirty = tracker.collect()
    return dirty


def test_dense_memory_is_assumed_and_spares_the_faults(memory: Memory, session: UffdSession) -> None:
    region = session.register(memory, blind_spots="accepted")
    with DirtyTracker(session) as tracker:
        dirty = rewrite(memory, tracker, np.arange(PAGES), SETTLED)
        assert dirty.assumed == dirty
        assert list(dirty.assumed.pages(region)) == list(range(PAGES))
        told = tracker.statistics()
        rewrite(memory, tracker, np.arange(PAGES), 20)
        after = tracker.statistics()
        assert after.pages_assumed - told.pages_assumed == 20 * PAGES
        assert after.faults_avoided - told.faults_avoided > 0.8 * 20 * PAGES
        assert after.pages_found - told.pages_found < 0.2 * 20 * PAGES
        assert told.overhead_ns > 0
        assert told.predicted_ns > 0


def test_what_it_is_decided_by_is_measured(memory: Memory, session: UffdSession) -> None:
    core.lib.dt_costs_exchange(core.ffi.new("dt_costs *"))
    session.register(memory, blind_spots="accepted")
    with DirtyTracker(session) as tracker:
        assert rewrite(memory, tracker, np.arange(PAGES), SETTLED).assumed.page_count == PAGES
    measured = core.ffi.new("dt_costs *", USUAL)
    core.lib.dt_costs_exchange(measured)
    for cost in USUAL:
        assert 0 < getattr(measured, cost) < 1_000_000, "ns"


def test_a_dense_part_is_assumed_and_the_rest_is_exact(memory: Memory, session: UffdSession) -> None:
    region = session.register(memory, blind_spots="accepted")
    dense = np.arange(512, 1024)
    with DirtyTracker(session) as tracker:
        rewrite(memory, tracker, dense, SETTLED)
        store(memory, [3, 1500], 7)
        dirty = tracker.collect()
        assert set(dirty.pages(region)) == {3, 1500} | set(dense)
        assert set(dirty.assumed.pages(region)) == set(dense)


def test_sparse_writes_are_exact_for_ever(memory: Memory, session: UffdSession) -> None:
    region = session.register(memory, blind_spots="accepted")
    pages = np.arange(0, PAGES, 16)
    with DirtyTracker(session) as tracker:
        for epoch in range(60):
            store(memory, pages + epoch % 16, epoch + 1)
            assert list(tracker.collect().pages(region)) == list(pages + epoch % 16)
        assert tracker.statistics().pages_assumed == 0


@pytest.mark.parametrize("pages", [np.arange(PAGES), np.arange(5, PAGES, 16)], ids=["dense", "hot"])
@pytest.mark.parametrize("dull", range(40, 46))
def test_it_notices_what_comes_after_long_without_a_gain(
    dull: int, pages: Chosen, memory: Memory, session: UffdSession
) -> None:
    """By then it does not look at each epoch any more."""
    session.register(memory, blind_spots="accepted")
    with DirtyTracker(session, page_cost_seconds=None if len(pages) == PAGES else 1e-6) as tracker:
        for epoch in range(dull):
            store(memory, np.arange(epoch % 16, PAGES, 16), epoch + 1)
            assert tracker.collect().page_count == PAGES // 16
        assert not tracker.statistics().pages_assumed
        assert rewrite(memory, tracker, pages, 12).assumed.page_count > 0.7 * len(pages), "but for what is asked"


def test_what_cools_is_exact_again(memory: Memory, session: UffdSession) -> None:
    session.register(memory, blind_spots="accepted")
    with DirtyTracker(session) as tracker:
        rewrite(memory, tracker, np.arange(PAGES), 40)
        for _ in range(COOLED):
            if not tracker.collect():
                break
        store(memory, [5], 1)
        assert tracker.collect().page_count == 1


def test_a_part_that_cools_is_exact_while_the_rest_is_hot(memory: Memory, session: UffdSession) -> None:
    region = session.register(memory, blind_spots="accepted")
    hot = np.arange(1024)
    with DirtyTracker(session) as tracker:
        rewrite(memory, tracker, np.arange(PAGES), 40)
        dirty = rewrite(memory, tracker, hot, 2 * COOLED)
        assert set(dirty.pages(region)) == set(hot)


def test_who_is_exact_forbids_it(memory: Memory, session: UffdSession) -> None:
    region = session.register(memory, blind_spots="accepted")
    everything = np.arange(PAGES)
    with DirtyTracker(session) as adaptive:
        rewrite(memory, adaptive, everything, SETTLED)
        with DirtyTracker(session, exact=True) as exact:
            store(memory, [9], 1)
            assert list(exact.collect().pages(region)) == [9]
            assert set(adaptive.collect().pages(region)) == set(everything), "armed again, and dirty for the others"
            for epoch in range(SETTLED):
                store(memory, everything, epoch)
                assert exact.collect().assumed.page_count == 0
                assert adaptive.collect().assumed.page_count == 0
            store(memory, [11], 1)
            assert list(adaptive.collect().pages(region)) == [11]
        assert rewrite(memory, adaptive, everything, SETTLED).assumed.page_count == PAGES, "and nobody forbids it now"


def test_who_does_not_want_it_does_not_forbid_it(memory: Memory, session: UffdSession) -> None:
    session.register(memory, blind_spots="accepted")
    everything = np.arange(PAGES)
    with DirtyTracker(session, adaptive=False) as plain:
        assert not rewrite(memory, plain, everything, SETTLED).assumed
        with DirtyTracker(session) as adaptive:
            rewrite(memory, adaptive, everything, SETTLED)
            store(memory, everything, 1)
            assert plain.collect().assumed.page_count == PAGES, "what one assumes is assumed for all, and said"


def test_the_dearest_page_counts(memory: Memory, session: UffdSession) -> None:
    session.register(memory, blind_spots="accepted")
    most = np.concatenate([np.arange(block, block + 48) for block in range(0, PAGES, BLOCK)])
    with DirtyTracker(session, page_cost_seconds=1e-9) as cheap:
        assert rewrite(memory, cheap, most, SETTLED).page_count == PAGES
        with DirtyTracker(session, page_cost_seconds=1.0):
            cheap.collect()
            dirty = rewrite(memory, cheap, most, SETTLED)
            assert (dirty.page_count, dirty.assumed.page_count) == (len(most), 0)


def test_comparing_leaves_what_was_really_written(memory: Memory, session: UffdSession) -> None:
    region = session.register(memory, blind_spots="accepted")
    mirror = bytearray(memory)
    with DirtyTracker(session) as tracker:
        rewrite(memory, tracker, np.arange(PAGES), SETTLED)
        tracker.collect_into(mirror)
        store(memory, [2, 700], 3)
        dirty = tracker.collect(exact=True, mirror=mirror)
        assert list(dirty.pages(region)) == [2, 700]
        dirty.copy_to(mirror)
        store(memory, [8], 3)
        assert list(tracker.collect(region, exact=True, mirror=mirror).pages()) == [8]
        with pytest.raises(dirtytrack.InvalidMemory, match="mirror"):
            tracker.collect(exact=True)
        with pytest.raises(dirtytrack.InvalidMemory, match="exact"):
            tracker.collect(mirror=mirror)
        store(memory, [12], 3)
        with pytest.raises(dirtytrack.InvalidMemory, match="bytes"):
            tracker.collect(exact=True, mirror=bytearray(PAGE))
        assert 12 in tracker.collect().pages(region), "nothing was collected"


def test_a_peek_has_what_is_assumed(memory: Memory, session: UffdSession) -> None:
    session.register(memory, blind_spots="accepted")
    with DirtyTracker(session) as tracker:
        rewrite(memory, tracker, np.arange(1024), SETTLED)
        seen = tracker.peek()
        assert seen.assumed.page_count == seen.page_count == 1024
        dirty = tracker.collect()
        assert (dirty, dirty.assumed) == (seen, seen.assumed)


def test_what_is_assumed_of_sets_made_of_sets(memory: Memory, session: UffdSession) -> None:
    region = session.register(memory, name="all", blind_spots="accepted")
    with DirtyTracker(session) as tracker:
        rewrite(memory, tracker, np.arange(1024), SETTLED)
        store(memory, [1500], 1)
        dirty = tracker.collect()
    watched = dirty - dirty.assumed
    assert list(watched.pages(region)) == [1500]
    assert not watched.assumed
    assert (watched | dirty).assumed == dirty.assumed == (dirty & dirty).assumed
    assert DirtySet.union([watched, dirty, watched]).assumed == dirty.assumed
    assert dirty.in_region("all").assumed == dirty.assumed.assumed == dirty.assumed
    assert pickle.loads(pickle.dumps(dirty)).assumed == dirty.assumed
    assert dirty.changed(bytearray(memory)).assumed.page_count == 0


def test_collects_in_part_and_on_a_budget(memory: Memory, session: UffdSession) -> None:
    address, half = address_of(memory), PAGES // 2
    low = session.register((address, (half - 1) * PAGE), blind_spots="accepted")
    high = session.register((address + half * PAGE, half * PAGE), blind_spots="accepted")
    everything = np.arange(PAGES)
    with DirtyTracker(session, [low, high]) as tracker:
        rewrite(memory, tracker, everything, SETTLED)
        store(memory, everything, 1)
        assert tracker.collect(low).assumed.page_count == half - BLOCK, "whole blocks; the rest was watched"
        assert tracker.collect(high).assumed.page_count == half
        for _ in range(50):
            store(memory, everything, 2)
            parts = [tracker.collect(budget_seconds=0) for _ in range(3)]
            assert DirtySet.union(parts).page_count == PAGES - 1
        tracker.remove(low)
        rewrite(memory, tracker, everything, SETTLED)  # parts were collected that nobody wrote to meanwhile
        store(memory, everything, 3)
        assert tracker.collect().page_count == half
        assert tracker.stop().page_count == half, "assumed to the end"


def test_wrong_costs_are_refused(session: UffdSession) -> None:
    for cost in (-1.0, float("nan"), float("inf")):
        with pytest.raises(dirtytrack.InvalidMemory, match="page_cost_seconds"):
            DirtyTracker(session, page_cost_seconds=cost)


# ---- single pages --------------------------------------------------------------------------------------------------

HOT = np.arange(5, PAGES, 16)  # four pages of each block
EACH = 1e-6  # seconds that a page costs whoever collects: blocks are too dear to be assumed whole
ENTERED = 12  # epochs


def test_hot_pages_among_cold_ones_are_assumed_by_themselves(memory: Memory, session: UffdSession) -> None:
    region = session.register(memory, blind_spots="accepted")
    with DirtyTracker(session, page_cost_seconds=EACH) as tracker:
        rewrite(memory, tracker, HOT, ENTERED)
        before = tracker.statistics()
        store(memory, [*HOT, 7, 8, 12, 700], 3)
        dirty = tracker.collect()
        after = tracker.statistics()
        assert set(dirty.pages(region)) == {*HOT, 7, 8, 12, 700}
        assert set(dirty.assumed.pages(region)) == set(HOT)
        assert after.pages_assumed - before.pages_assumed == len(HOT)
        assert after.pages_found - before.pages_found == 4, "the others are watched, and cost a fault"
        dirty = tracker.collect()
        assert dirty.assumed == dirty, "nothing was stored, and it does not know"
        assert set(dirty.pages(region)) == set(HOT)
        assert list((tracker.peek() - dirty).pages(region)) == []


def test_hot_pages_spare_most_faults_for_long(memory: Memory, session: UffdSession) -> None:
    session.register(memory, blind_spots="accepted")
    with DirtyTracker(session, page_cost_seconds=EACH) as tracker:
        rewrite(memory, tracker, HOT, ENTERED)
        before = tracker.statistics()
        assert rewrite(memory, tracker, HOT, 100).page_count == len(HOT)
        after = tracker.statistics()
        assert after.pages_found - before.pages_found < 0.15 * 100 * len(HOT)
        assert after.faults_avoided - before.faults_avoided > 0.8 * 100 * len(HOT)


def test_hot_pages_that_cool_are_exact_again(memory: Memory, session: UffdSession) -> None:
    session.register(memory, blind_spots="accepted")
    with DirtyTracker(session, page_cost_seconds=EACH) as tracker:
        assert rewrite(memory, tracker, HOT, 40).assumed
        for _ in range(COOLED):
            if not tracker.collect():
                break
        store(memory, [HOT[3], 6], 1)
        assert tracker.collect().page_count == 2


def test_some_hot_pages_cool_while_others_are_hot(memory: Memory, session: UffdSession) -> None:
    region = session.register(memory, blind_spots="accepted")
    with DirtyTracker(session, page_cost_seconds=EACH) as tracker:
        rewrite(memory, tracker, HOT, 40)
        dirty = rewrite(memory, tracker, HOT[::2], 2 * COOLED)
        assert set(dirty.pages(region)) == set(HOT[::2])
        assert rewrite(memory, tracker, np.arange(PAGES), 2 * COOLED).page_count == PAGES


def test_what_is_written_at_random_is_exact(memory: Memory, session: UffdSession) -> None:
    region, chance = session.register(memory, blind_spots="accepted"), np.random.default_rng(1)
    with DirtyTracker(session, page_cost_seconds=EACH) as tracker:
        for epoch in range(80):
            pages = np.sort(chance.choice(PAGES, PAGES // 4, replace=False))
            store(memory, pages, epoch + 1)
            dirty = tracker.collect()
            assert list(dirty.pages(region)) == list(pages)
            assert not dirty.assumed


def test_who_is_exact_forbids_single_pages_too(memory: Memory, session: UffdSession) -> None:
    region = session.register(memory, blind_spots="accepted")
    with DirtyTracker(session, page_cost_seconds=EACH) as adaptive:
        assert rewrite(memory, adaptive, HOT, ENTERED).assumed
        with DirtyTracker(session, exact=True) as exact:
            store(memory, [9], 1)
            assert list(exact.collect().pages(region)) == [9]
            assert set(adaptive.collect().pages(region)) == {*HOT, 9}, "armed again, and dirty for the others"
            assert not rewrite(memory, adaptive, HOT, ENTERED).assumed


def test_comparing_leaves_the_hot_pages_that_were_written(memory: Memory, session: UffdSession) -> None:
    region = session.register(memory, blind_spots="accepted")
    mirror = bytearray(memory)
    with DirtyTracker(session, page_cost_seconds=EACH) as tracker:
        rewrite(memory, tracker, HOT, ENTERED)
        tracker.collect_into(mirror)
        store(memory, [HOT[1], 700], 4)
        assert list(tracker.collect(exact=True, mirror=mirror).pages(region)) == [HOT[1], 700]


def test_what_was_found_is_not_called_assumed(memory: Memory, session: UffdSession) -> None:
    """One who collects seldom is told of pages in both ways, of other blocks and of the same."""
    region = session.register(memory, blind_spots="accepted")
    with DirtyTracker(session, page_cost_seconds=EACH) as often, DirtyTracker(session, adaptive=False) as seldom:
        rewrite(memory, often, HOT, ENTERED)
        seldom.collect()
        for page in (0, 1, 200, 201):
            store(memory, [page], 1)
            often.collect()
        assert set(seldom.peek().assumed.pages(region)) == set(HOT)
        dirty = seldom.collect()
        assert set(dirty.assumed.pages(region)) == set(HOT)
        assert set(dirty.pages(region)) == {*HOT, 0, 1, 200, 201}


@pytest.mark.parametrize("remedy", [0, UNTOLD])
def test_hot_pages_that_nobody_is_told_of_are_found_out(remedy: int, memory: Memory) -> None:
    """Or the truth that follows could not fail."""
    with UffdSession(_remedy=remedy) as session:
        session.register(memory, blind_spots="accepted")
        mirror = bytearray(memory)
        with DirtyTracker(session, page_cost_seconds=EACH) as tracker:
            for epoch in range(ENTERED):
                store(memory, HOT, epoch + 1)
                tracker.collect_into(mirror)
            assert tracker.statistics().pages_assumed
            assert (mirror == memory[:]) == (not remedy)


# ---- truth ---------------------------------------------------------------------------------------------------------


def phase(chance: random.Random) -> Chosen:
    """Pages that are written in each epoch for a while."""
    match chance.choice(("dense", "part", "idle", "scattered", "half", "hot", "hot")):
        case "dense":
            return list(range(PAGES))
        case "part":
            start = chance.randrange(PAGES - 300)
            return list(range(start, start + 300))
        case "scattered":
            return chance.sample(range(PAGES), 40)
        case "hot":
            return chance.sample(range(PAGES), 120)
        case "half":
            return chance.sample(range(PAGES), PAGES // 2)
        case _:
            return []


@pytest.mark.parametrize("seed", range(4))
def test_no_phase_hides_a_write(seed: int, memory: Memory, session: UffdSession) -> None:
    """Two listeners of different rhythm and one that comes and goes, discards, and a full copy as the truth."""
    chance = random.Random(seed)
    region = session.register(memory, blind_spots="accepted")
    trackers = [DirtyTracker(session), DirtyTracker(session)]
    mirrors = [bytearray(memory), bytearray(memory)]
    for tracker in trackers:
        tracker.start()
    guest: DirtyTracker | None = None
    assumed = single = 0
    for epoch in range(1, 240):
        if epoch % 12 == 1:
            pages = phase(chance)
        store(memory, pages, epoch)
        if chance.random() < 0.1:
            start = chance.randrange(PAGES - 100)
            memory.discard(start * PAGE, 100 * PAGE)
        if chance.random() < 0.05:
            if guest is None:
                guest = DirtyTracker(session, exact=chance.random() < 0.5)
                guest.start()
            else:
                guest.stop()
                guest = None
        for every, tracker, mirror in zip((1, 5), trackers, mirrors, strict=True):
            if epoch % every == 0:
                dirty = tracker.collect()
                assumed += dirty.assumed.page_count
                single += sum(run.end - run.start == PAGE for run in dirty.assumed)
                assert dirty.assumed <= dirty
                dirty.copy_to(mirror)
                assert mirror == memory[:], f"epoch {epoch}"
        if guest is not None:
            guest.collect(region)
    assert assumed > single > 0, "or nothing was tested"


@pytest.mark.parametrize("pages", [np.arange(PAGES // 2), HOT], ids=["dense", "hot"])
def test_writers_beside_collects_lose_nothing(pages: Chosen, memory: Memory, session: UffdSession) -> None:
    """Stamps that only grow: after a collect the mirror is nowhere behind what was in memory before it."""
    session.register(memory, blind_spots="accepted")
    mirror = bytearray(memory)
    stop = threading.Event()

    def write() -> None:
        stamp = epoch = 0
        while not stop.is_set():
            stamp += 1
            words(memory)[pages] = stamp
            if tracker.epoch != epoch:  # one page of the others in each: hot ones pay for that
                epoch = tracker.epoch
                words(memory)[epoch * 37 % PAGES] = stamp

    with DirtyTracker(session, page_cost_seconds=EACH if len(pages) == len(HOT) else None) as tracker:
        tracker.collect_into(mirror)
        writer = threading.Thread(target=write)
        writer.start()
        try:
            for _ in range(120):
                before = words(memory).copy()
                while words(memory)[pages[0]] == before[pages[0]]:
                    time.sleep(0)
                tracker.collect_into(mirror)
                assert (words(mirror) >= before)[pages].all()
        finally:
            stop.set()
            writer.join()
        tracker.collect_into(mirror)
        assert mirror == memory[:]
        assert tracker.statistics().pages_assumed

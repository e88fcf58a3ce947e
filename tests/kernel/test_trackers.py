# SPDX-License-Identifier: MIT
"""Trackers: what final sets hold, budgets over many regions against a model, sleepers, and what errors hold on to.

What test_contract.py does not prove of the same sentences. Takes about 1 s of CI's 20 min.
"""

from __future__ import annotations

import errno
import gc
import pickle
from collections.abc import Callable
from random import Random

import pytest

import dirtytrack
from dirtytrack import DirtySet, DirtyTracker, Memory, Region, RegionGone, UffdSession
from tests import oracle
from tests.oracle import PAGE
from tests.sandbox import failing

PAGES = 16


@pytest.fixture
def memory() -> Memory:
    return dirtytrack.allocate(PAGES * PAGE, name="memory")


def armed(session: UffdSession, *regions: Region) -> DirtyTracker:
    tracker = DirtyTracker(session, regions or None)
    tracker.start()
    return tracker


def write(memory: Memory, *pages: int) -> None:
    for page in pages:
        memory[page * PAGE] = (memory[page * PAGE] + 1) % 256


def pages_of(dirty: DirtySet, address: int) -> set[int]:
    return {page for start, end in dirty for page in range((start - address) // PAGE, (end - address) // PAGE)}


# ---- final sets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [lambda tracker, region: tracker.remove(region), lambda tracker, _: tracker.stop()])
def test_a_final_set_has_all_that_was_pending_for_whatever_reason(
    session: UffdSession, memory: Memory, end: Callable[[DirtyTracker, Region], DirtySet]
) -> None:
    region = session.register(memory)
    other, tracker = armed(session), armed(session)
    write(memory, 1)
    tracker.put_back(tracker.collect())  # given back
    write(memory, 3)
    other.collect()  # found by another
    session.mark_dirty((memory.address + 5 * PAGE, 1))  # declared
    flight = session.in_flight((memory.address + 7 * PAGE, 1))  # in flight, now
    with flight:
        write(memory, 9)  # in the kernel only
        final = end(tracker, region)
    assert pages_of(final, memory.address) == {1, 3, 5, 7, 9}
    bytes_of = b"".join(memory[page * PAGE : (page + 1) * PAGE] for page in (1, 3, 5, 7, 9))
    assert final.gather() == bytes_of, "its bytes can be read: the region is registered still"
    assert pages_of(other.collect(), memory.address) == {5, 7, 9}


def test_a_tracker_of_nothing(session: UffdSession, memory: Memory) -> None:
    tracker = armed(session)
    for epoch in (1, 2):
        dirty = tracker.collect()
        assert (dirty.epoch, dirty.complete, list(dirty)) == (epoch, True, [])
    assert tracker.collect(budget_seconds=0).complete
    assert not tracker.collect_into({})
    assert not tracker.peek()
    region = tracker.add(memory)
    assert tracker.collect().page_count == PAGES
    tracker.remove(region)
    write(memory, 1)
    assert not tracker.collect()
    assert not tracker.stop()


def test_a_set_that_was_pickled_can_be_put_back(session: UffdSession, memory: Memory) -> None:
    session.register(memory)
    tracker = armed(session)
    write(memory, 2, 3, 11)
    sent = pickle.loads(pickle.dumps(tracker.collect()))
    assert (sent.epoch, sent.complete) == (1, True)
    tracker.put_back(sent)
    assert pages_of(tracker.collect(), memory.address) == {2, 3, 11}


# ---- one bit a page, however long a listener sleeps -----------------------------------------------------------------


def test_a_sleeper_costs_no_memory_and_misses_nothing(session: UffdSession, memory: Memory) -> None:
    region = session.register(memory)
    awake, sleeper = armed(session), armed(session)
    chance, written = Random(1), set()

    def allocations(epochs: int) -> int:
        """Of the core; asked of a failure that never comes."""
        with failing("ALLOCATE", number=errno.ENOMEM, nth=1 << 40) as calls:
            for _ in range(epochs):
                pages = set(chance.choices(range(PAGES - 1), k=3))
                write(memory, *pages)
                written.update(pages)
                assert pages_of(awake.collect(), region.start) == pages
        return calls.seen

    allocations(10)  # what the first collects make room for
    before = allocations(200)
    assert allocations(2000) == 10 * before, "nothing piles up"
    assert pages_of(sleeper.stop(), memory.address) == written == set(range(PAGES - 1))
    allocations(10)
    assert allocations(200) == before, "and nobody pays for one that sleeps"


# ---- budgets --------------------------------------------------------------------------------------------------------


class Model:
    """What a listener is owed of each region, and what it may get."""

    def __init__(self, tracker: DirtyTracker, spans: dict[Region, range]) -> None:
        self.tracker, self.spans = tracker, spans
        self.owed: dict[Region, set[int]] = {}
        self.allowed: dict[Region, set[int]] = {}
        """Pages that a scan may find again: an incomplete collect took them from the bits, and not from the kernel."""
        self.restart()

    def restart(self) -> None:
        self.tracker.start()
        self.owed = {region: set() for region in self.tracker.regions}
        self.allowed = {region: set() for region in self.tracker.regions}

    def written(self, page: int) -> None:
        for region in self.owed:
            if page in self.spans[region]:
                self.owed[region].add(page)
                self.allowed[region].add(page)

    def check(self, pages: set[int], regions: list[Region], complete: bool) -> None:
        owed: set[int] = set().union(*(self.owed[region] for region in regions))
        allowed = owed.union(*(self.allowed[region] for region in regions))
        assert pages <= allowed
        assert not complete or pages >= owed

    def got(self, pages: set[int], regions: list[Region], complete: bool = True) -> None:
        self.check(pages, regions, complete)
        for region in regions:
            self.owed[region] -= pages
            if complete:
                self.allowed[region].clear()


@pytest.mark.parametrize("seed", range(25))
def test_budgets_among_everything_else_lose_nothing(session: UffdSession, seed: int) -> None:
    """Regions much longer than what one step of a budget scans; some overlap, some touch, and they come and go."""
    chance = Random(seed)
    page_count = 65_536
    memory = dirtytrack.allocate(page_count * PAGE)
    spans: dict[Region, range] = {}
    for _ in range(4):
        first = chance.randrange(page_count - 1)
        count = chance.randrange(1, min(page_count - first, 20_000) + 1)
        region = session.register((memory.address + first * PAGE, count * PAGE))
        spans[region] = range(first, first + count)
    regions = list(spans)
    models = [Model(DirtyTracker(session, chance.sample(regions, k)), spans) for k in (2, 4)]
    incomplete = 0

    def do(model: Model) -> None:
        nonlocal incomplete
        tracker, watched = model.tracker, list(model.owed)
        action = chance.random()
        if action < 0.5:
            page = chance.choice(spans[chance.choice(regions)])
            write(memory, page)
            for each in models:
                each.written(page)
        elif action < 0.8:
            only = chance.choice([None, *watched])
            asked = watched if only is None else [only]
            if chance.random() < 0.3:
                model.check(pages_of(tracker.peek(only), memory.address), asked, complete=True)
            dirty = tracker.collect(only, budget_seconds=0 if chance.random() < 0.8 else None)
            incomplete += not dirty.complete
            model.got(pages_of(dirty, memory.address), asked, dirty.complete)
        elif action < 0.9 and len(watched) < len(regions):
            region = chance.choice([region for region in regions if region not in watched])
            tracker.add(region)
            model.owed[region], model.allowed[region] = set(spans[region]), set(spans[region])
        elif action < 0.9:
            region = chance.choice(watched)
            model.got(pages_of(tracker.remove(region), memory.address), [region])
            del model.owed[region], model.allowed[region]
        elif action < 0.95:
            model.got(pages_of(tracker.stop(), memory.address), watched)
            model.restart()
        else:
            session.write_protect(chance.choice(regions))

    for _ in range(300):
        do(chance.choice(models))
    assert incomplete > 5
    for model in models:
        owed: set[int] = set().union(*model.owed.values())
        found: set[int] = set()
        for _ in range(12):  # as many steps as all of the memory takes
            found |= pages_of(model.tracker.collect(budget_seconds=0), memory.address)
        assert found >= owed


# ---- what an error holds on to --------------------------------------------------------------------------------------


def test_a_mirror_is_free_once_the_error_is_forgotten(session: UffdSession) -> None:
    """Without the collector of cycles: whoever resizes the mirror in the `except` does not want to wait for that."""
    mirror = bytearray(4 * PAGE)
    with oracle.mapped(4 * PAGE) as address:
        session.register((address, 4 * PAGE))
        tracker = armed(session)
        oracle.unmap(address + PAGE, PAGE)
        gc.disable()
        try:
            with pytest.raises(RegionGone) as caught:
                tracker.collect_into(mirror)
            del caught
            mirror.append(1)
        finally:
            gc.enable()

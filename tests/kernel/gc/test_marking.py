# SPDX-License-Identifier: MIT
"""Mostly-concurrent marking of a graph that is changed meanwhile: nothing reachable at the end is left unmarked, and
the pause is predicted. Without the dirty pages objects are missed, so the test can fail."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable

import pytest

from dirtytrack import DirtySet, DirtyTracker, InvalidMemory, NotRegistered, NotStarted, UffdSession, allocate
from dirtytrack.gc import ConcurrentMark, CrossingMap
from tests.oracle import PAGE

OBJECT_WORDS = 8  # all of them fields
OBJECTS = 40_000
ROOTS = 4


class Graph:
    """Objects that point to each other by index + 1; the first few are roots. A mutator moves references about so
    that a marker which looks at each object once misses some."""

    def __init__(self, session: UffdSession) -> None:
        self.memory = allocate(OBJECTS * OBJECT_WORDS * 8, name="graph")
        self.fields = memoryview(self.memory).cast("Q")
        self.region = session.register(self.memory)
        self.tracker = DirtyTracker(session, [self.region])
        self.tracker.start()
        self.crossing = CrossingMap(self.region, OBJECT_WORDS * 8)
        self.crossing.add(self.region.address + i * OBJECT_WORDS * 8 for i in range(OBJECTS))
        self.random = random.Random(1)
        for i in range(OBJECTS - 1):  # a few long chains, and other references
            if i >= ROOTS:
                self.fields[(i - ROOTS) * OBJECT_WORDS] = i + 1
            self.fields[i * OBJECT_WORDS + 1] = self.random.randrange(OBJECTS) * (i % 3 == 0) + (i % 3 == 0)
        self.marked = bytearray(OBJECTS)
        self.meanwhile: Callable[[], None] = lambda: time.sleep(0)  # lets the mutator have its turn

    def of(self, number: int) -> list[int]:
        at = number * OBJECT_WORDS
        return [field - 1 for field in self.fields[at : at + OBJECT_WORDS] if field]

    def mark(self, numbers: Iterable[int]) -> None:
        """What these point to, and so on."""
        work = list(numbers)
        for count, number in enumerate(work):  # grows
            if count % 64 == 0:
                self.meanwhile()
            for other in self.of(number):
                if not self.marked[other]:
                    self.marked[other] = 1
                    work.append(other)

    def mark_roots(self) -> None:
        self.marked[:ROOTS] = b"\1" * ROOTS
        self.mark(range(ROOTS))

    def mark_from(self, dirty: DirtySet) -> None:
        starts = self.crossing.objects_on(dirty)
        numbers = [(start - self.region.address) // (OBJECT_WORDS * 8) for start in starts]
        self.mark([number for number in numbers if self.marked[number]])

    def reachable(self) -> set[int]:
        found, work = set(range(ROOTS)), list(range(ROOTS))
        for number in work:
            for other in self.of(number):
                if other not in found:
                    found.add(other)
                    work.append(other)
        return found

    def hide(self) -> None:
        """Move a reference from a place that is marked late to one that was marked early, and drop the first."""
        far = self.random.randrange(OBJECTS // 2, OBJECTS) * OBJECT_WORDS
        near = self.random.randrange(ROOTS, 64) * OBJECT_WORDS + self.random.randrange(2, OBJECT_WORDS)
        self.fields[near] = self.fields[far]
        self.fields[far] = 0


class Mutator(threading.Thread):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph, self.over = graph, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.0002):
            for _ in range(3):
                self.graph.hide()


def mark_beside_a_mutator(graph: Graph) -> ConcurrentMark:
    mutator = Mutator(graph)
    mark = ConcurrentMark(graph.region, graph.tracker, pause_seconds=0.0, most_rounds=3)
    mutator.start()
    try:
        mark.begin()
        graph.mark_roots()
        for dirty in mark.rounds():
            graph.mark_from(dirty)
    finally:
        mutator.over.set()
        mutator.join()
    dirty = mark.finish()  # mutators are stopped
    graph.mark_from(dirty)
    graph.mark_roots()
    return mark


def test_nothing_reachable_is_left_unmarked(session: UffdSession) -> None:
    graph = Graph(session)
    mark = mark_beside_a_mutator(graph)
    assert not [number for number in graph.reachable() if not graph.marked[number]]
    assert mark.history
    assert all(each.page_count and each.seconds > 0 and each.epoch_seconds > 0 for each in mark.history)


@pytest.mark.parametrize("broken", [False, True])
def test_without_the_dirty_pages_some_are_missed(session: UffdSession, broken: bool) -> None:
    graph = Graph(session)
    graph.meanwhile = graph.hide  # the mutator, in the marker's own thread: always the same
    mark = ConcurrentMark(graph.region, graph.tracker, pause_seconds=0.0, most_rounds=2)
    mark.begin()
    graph.mark_roots()
    for dirty in mark.rounds():
        graph.mark_from(DirtySet() if broken else dirty)
    graph.meanwhile = lambda: None
    dirty = mark.finish()
    graph.mark_from(DirtySet() if broken else dirty)
    graph.mark_roots()
    missed = [number for number in graph.reachable() if not graph.marked[number]]
    assert bool(missed) == broken


def test_rounds_end_when_the_pause_is_predicted_to_be_short(session: UffdSession) -> None:
    memory = allocate(256 * PAGE)
    tracker = DirtyTracker(session, [session.register(memory)])
    tracker.start()
    mark = ConcurrentMark(tracker.regions, tracker, pause_seconds=0.02, most_rounds=50)
    mark.begin()
    assert mark.predicted_pause_seconds == float("inf")
    written, found = 256, []
    memory[::PAGE] = b"\1" * 256
    for dirty in mark.rounds():
        found.append(dirty.page_count)
        time.sleep(0.001 * dirty.page_count)
        written //= 2
        memory[: written * PAGE : PAGE] = b"\2" * written
    assert found[:2] == [256, 128]
    assert len(found) < 8
    assert mark.predicted_pause_seconds <= 0.02
    assert mark.finish().page_count == found[-1] // 2
    assert [each.page_count for each in mark.history] == found
    assert "not running" in repr(mark)


def test_rounds_end_when_they_gain_nothing(session: UffdSession) -> None:
    memory = allocate(64 * PAGE)
    tracker = DirtyTracker(session, [session.register(memory)])
    tracker.start()
    mark = ConcurrentMark(tracker.regions, tracker, pause_seconds=0.0, most_rounds=50)
    mark.begin()
    for _ in mark.rounds():
        memory[::PAGE] = b"\1" * 64
    assert len(mark.history) <= 4


def test_a_round_that_was_left_is_in_the_next(session: UffdSession) -> None:
    memory = allocate(64 * PAGE)
    tracker = DirtyTracker(session, [session.register(memory)])
    tracker.start()
    mark = ConcurrentMark(tracker.regions, tracker, pause_seconds=0.0)
    mark.begin()
    memory[PAGE] = 1
    for dirty in mark.rounds():
        assert dirty.page_count == 1
        break
    with pytest.raises(ZeroDivisionError):
        for dirty in mark.rounds():
            assert dirty.page_count == 1
            memory[2 * PAGE] = 1 // 0
    memory[3 * PAGE] = 1
    assert mark.finish().page_count == 2


def test_what_is_refused(session: UffdSession) -> None:
    region = session.register(allocate(PAGE))
    tracker = DirtyTracker(session, [region])
    tracker.start()
    mark = ConcurrentMark(region, tracker)
    for call in (mark.finish, lambda: list(mark.rounds())):
        with pytest.raises(NotStarted, match="begin"):
            call()
    for options in ({"pause_seconds": -1.0}, {"most_rounds": -1}):
        with pytest.raises(InvalidMemory):
            ConcurrentMark(region, tracker, **options)
    other = session.register(allocate(PAGE))
    with pytest.raises(NotRegistered):
        ConcurrentMark(other, tracker)


def test_a_tracker_that_others_collected_from_gives_the_whole_heap(session: UffdSession) -> None:
    memory = allocate(64 * PAGE)
    tracker = DirtyTracker(session, [session.register(memory)])
    tracker.start()
    mark = ConcurrentMark(tracker.regions, tracker)
    mark.begin()
    memory[0] = 1
    tracker.collect()
    assert mark.finish().page_count == 64

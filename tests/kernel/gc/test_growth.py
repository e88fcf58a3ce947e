# SPDX-License-Identifier: MIT
"""Heaps that grow and shrink while they are collected and marked, beside a model: nothing is missed of what was there,
of what came, nor of what stayed when something went. That the machines can fail is shown by breaking them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.errors import FlakyFailure
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from dirtytrack import DirtySet, DirtyTracker, Memory, Region, UffdSession, allocate
from dirtytrack.gc import CardTable, ConcurrentMark, CrossingMap, RememberedSet
from dirtytrack.kernel import core
from tests import oracle
from tests.asked import fewer
from tests.kernel.gc.heaps import YOUNG, YOUNG_BYTES
from tests.oracle import PAGE

PAGES = 6  # of a segment
WORDS = PAGES * PAGE // 8
END = YOUNG + YOUNG_BYTES
ANY = 1 | 2 | 8 | 1024  # bits of enum dt_site
places = st.integers(0, 1 << 20)
HOW = st.sampled_from(("buffer", "registered", "watched"))


class Segment:
    """Some of the heap, and the regions of it that trackers have."""

    def __init__(self, session: UffdSession) -> None:
        self.session, self.memory = session, allocate(PAGES * PAGE, name="segment")
        self.region: Region | None = None

    def join(self, grown: RememberedSet | CardTable | ConcurrentMark, how: str) -> None:
        """By one of the ways there are. The first registers it."""
        if self.region is not None or how != "buffer":
            self.region = self.region or self.session.register(self.memory)
            if how == "watched":
                grown.tracker.add(self.region)
                oracle.poke_bytes(self.memory.address + 8, b"\0")  # written, and perhaps collected, before it joins
            grown.add(self.region)
        else:
            self.region = grown.add(self.memory)

    def close(self) -> None:
        assert self.region is not None
        self.session.unregister(self.region)
        self.memory.close()


def is_in(at: int, segment: Segment) -> bool:
    return segment.memory.address <= at < segment.memory.address + PAGES * PAGE


def write(memory: Memory, index: int, value: int) -> None:
    oracle.poke_bytes(memory.address + index * 8, value.to_bytes(8, "little"))


def read(address: int) -> int:
    return int.from_bytes(oracle.peek_bytes(address, 8), "little")


@contextmanager
def failing(nth: int) -> Iterator[None]:
    """The nth step inside fails, if there are so many."""
    core.lib.dt_fail(ANY, nth, 1, 12, 0)
    try:
        yield
    except (MemoryError, OSError):
        pass
    finally:
        core.lib.dt_fail(0, 0, 0, 0, 0)


class Collected(RuleBasedStateMachine):
    """A remembered set, and card tables with a mirror and without, over the same segments."""

    def __init__(self) -> None:
        super().__init__()
        self.session = UffdSession()
        self.segments = [Segment(self.session)]
        first = self.segments[0]
        first.region = self.session.register(first.memory)
        self.trackers = [DirtyTracker(self.session, [first.region]) for _ in range(3)]
        for tracker in self.trackers:
            tracker.start()
        one, two, three = self.trackers
        self.remembered = RememberedSet(first.region, one, nursery=(YOUNG, END))
        self.small, self.whole = CardTable(first.region, two, 512, mirror=True), CardTable(first.region, three)
        self.changed = set[int]()  # words that were stored since cards were cleaned
        self.differing = set[int]()  # words that an update found to differ from the one before
        self.before = dict[int, bytes]()

    def teardown(self) -> None:
        self.session.close()

    @rule(segment=places, index=st.integers(0, WORDS - 1), value=st.sampled_from((YOUNG, END - 8, END, 7)))
    def store(self, segment: int, index: int, value: int) -> None:
        memory = self.segments[segment % len(self.segments)].memory
        if read(memory.address + index * 8) != value:
            self.changed.add(memory.address + index * 8)
        write(memory, index, value)

    @rule(segment=places, page=st.integers(0, PAGES - 1))
    def discard(self, segment: int, page: int) -> None:
        self.segments[segment % len(self.segments)].memory.discard(page * PAGE, PAGE)

    @rule(how=HOW, dirty=st.booleans())
    def grow(self, how: str, dirty: bool) -> None:
        segment = Segment(self.session)
        if dirty:
            write(segment.memory, 9, YOUNG)
        for grown in (self.remembered, self.small, self.whole):
            segment.join(grown, how)
        self.segments.append(segment)
        if dirty:
            self.changed.add(segment.memory.address + 72)
            self.differing.add(segment.memory.address + 72)

    @precondition(lambda self: len(self.segments) > 1)
    @rule(segment=places)
    def shrink(self, segment: int) -> None:
        gone = self.segments.pop(segment % len(self.segments))
        assert gone.region is not None
        for shrunk in (self.remembered, self.small, self.whole):
            shrunk.remove(gone.region)
        for words in (self.changed, self.differing):
            words -= set(range(gone.memory.address, gone.memory.address + PAGES * PAGE, 8))
        self.before.pop(gone.memory.address, None)
        gone.close()

    @rule(nth=st.integers(1, 6), which=st.integers(0, 2))
    def fail(self, nth: int, which: int) -> None:
        with failing(nth):
            (lambda: self.remembered.minor(YOUNG, END), self.small.update, self.whole.update)[which]()

    @rule()
    def forget(self) -> None:
        self.look()
        with self.remembered.forget_own_writes(), self.small.forget_own_writes(), self.whole.forget_own_writes():
            write(self.segments[-1].memory, 3, YOUNG)
        self.before = {segment.memory.address: segment.memory[:] for segment in self.segments}

    def look(self) -> None:
        """What the next update is to find by comparing."""
        for segment in self.segments:
            now = segment.memory[:]
            old = self.before.get(segment.memory.address, now)
            words = zip(memoryview(now).cast("Q"), memoryview(old).cast("Q"), strict=True)
            self.differing |= {segment.memory.address + 8 * i for i, (new, was) in enumerate(words) if new != was}
            self.before[segment.memory.address] = now

    @rule()
    def minor(self) -> None:
        expected = [
            segment.memory.address + 8 * i
            for segment in self.segments
            for i, word in enumerate(memoryview(segment.memory[:]).cast("Q"))
            if YOUNG <= word < END
        ]
        assert list(self.remembered.minor(YOUNG, END)) == sorted(expected)

    @rule(clean=st.booleans())
    def update(self, clean: bool) -> None:
        self.look()
        for cards, expected in ((self.small, self.differing), (self.whole, self.changed)):
            cards.update()
            for at in expected:
                region, card = cards.index(at)
                assert cards.view(region)[card] == CardTable.DIRTY
            assert set(cards.regions) == {segment.region for segment in self.segments}
            if clean:
                cards.clear()
        if clean:
            self.changed.clear()
            self.differing.clear()


OBJECT = 64
OBJECTS = PAGES * PAGE // OBJECT  # of a segment, each of eight references
LIST = 100  # objects in a row, at first


class Marked(RuleBasedStateMachine):
    """A marker that looks at a few objects at a time while references move about, and segments come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.session = UffdSession()
        self.segments = [Segment(self.session)]
        first = self.segments[0]
        first.region = self.session.register(first.memory)
        self.tracker = DirtyTracker(self.session, [first.region])
        self.tracker.start()
        self.mark = ConcurrentMark(first.region, self.tracker, pause_seconds=0.0, most_rounds=1000)
        self.roots: list[int] = [first.memory.address]
        for i in range(LIST):
            write(first.memory, i * OBJECT // 8, first.memory.address + (i + 1) * OBJECT)
        self.marked, self.work = set[int](), list[int]()
        self.begin()

    def teardown(self) -> None:
        self.session.close()

    # ---- the graph

    def object(self, number: int) -> int:
        """Mostly one that is reachable."""
        if number % 4:
            found = sorted(self.reachable())
            return found[number // 4 % len(found)]
        number //= 4
        segment = self.segments[number // OBJECTS % len(self.segments)]
        return segment.memory.address + number % OBJECTS * OBJECT

    def is_there(self, at: int) -> bool:
        return any(is_in(at, each) for each in self.segments)

    def references(self, at: int) -> list[int]:
        return [to for to in (read(at + 8 * i) for i in range(8)) if self.is_there(to)]

    def reachable(self) -> set[int]:
        found, work = set[int](self.roots), list(self.roots)
        for at in work:
            new = set(self.references(at)) - found
            found |= new
            work += new
        return found

    @rule(source=places, field=st.integers(1, 7), to=places)
    def store(self, source: int, field: int, to: int) -> None:
        oracle.poke_bytes(self.object(source) + 8 * field, self.object(to).to_bytes(8, "little"))

    @rule(early=places, late=places, field=st.integers(1, 7))
    def hide(self, early: int, late: int, field: int) -> None:
        """Move a reference from what is looked at late to what was looked at early."""
        known = [each for each in self.segments if each.region is not None]
        marked = sorted(self.marked - set(self.work)) or self.roots
        marked = [at for at in marked if not any(is_in(at, each) for each in known)] or marked
        waiting = self.work or self.roots
        source, target = waiting[late % len(waiting)], marked[early % len(marked)]
        value = next(iter(self.references(source)), 0)
        for i in range(8):
            oracle.poke_bytes(source + 8 * i, bytes(8))
        oracle.poke_bytes(target + 8 * field, value.to_bytes(8, "little"))

    @rule(to=places)
    def root(self, to: int) -> None:
        self.roots = [self.roots[0], self.object(to)]

    @rule(how=HOW, source=places, chain=st.integers(1, 5), late=st.booleans())
    def grow(self, how: str, source: int, chain: int, late: bool) -> None:
        """Late: it is marked and written before the marker is told of it."""
        segment = Segment(self.session)
        for i in range(chain):  # a list of objects, which an old one leads to
            write(segment.memory, i * OBJECT // 8, segment.memory.address + (i + 1) * OBJECT)
        old = self.object(source)
        if not late:
            segment.join(self.mark, how)
        oracle.poke_bytes(old + 8, segment.memory.address.to_bytes(8, "little"))
        self.segments.append(segment)
        for i in range(chain + 1):  # what is allocated while marking is born marked
            self.push(segment.memory.address + i * OBJECT)
        if late:
            self.look(chain + 1)

    def join(self, how: str) -> None:
        for segment in self.segments:
            if segment.region is None:
                segment.join(self.mark, how)

    @rule(segment=places)
    def shrink(self, segment: int) -> None:
        """One of which nothing is alive."""
        found = self.reachable()
        dead = [each for each in self.segments if each.region is not None and not any(is_in(at, each) for at in found)]
        if dead and len(self.segments) > 1:
            gone = dead[segment % len(dead)]
            self.segments.remove(gone)
            assert gone.region is not None
            self.mark.remove(gone.region)
            gone.close()
            self.marked = {at for at in self.marked if self.is_there(at)}
            self.work = [at for at in self.work if self.is_there(at)]

    # ---- the marker

    def push(self, at: int) -> None:
        if at not in self.marked:
            self.marked.add(at)
            self.work.append(at)

    def again(self, dirty: DirtySet) -> None:
        """From all marked objects on these pages."""
        for segment in self.segments:
            crossing = CrossingMap(segment.memory, OBJECT)
            crossing.add([segment.memory.address + i * OBJECT for i in range(OBJECTS)])
            self.work += [at for at in crossing.objects_on(dirty) if at in self.marked]

    def begin(self) -> None:
        self.marked.clear()
        self.work.clear()
        self.mark.begin()
        self.rounds: Iterator[DirtySet] = self.mark.rounds()
        for at in self.roots:
            self.push(at)

    @rule(count=st.integers(1, 20))
    def look(self, count: int) -> None:
        while self.work and count:
            count -= 1
            for at in self.references(self.work.pop()):
                self.push(at)

    @rule(how=HOW)
    def round(self, how: str) -> None:
        self.join(how)
        dirty = next(self.rounds, None)
        if dirty is not None:
            self.again(dirty)

    @rule(nth=st.integers(1, 6))
    def fail(self, nth: int) -> None:
        with failing(nth):
            self.again(next(self.mark.rounds(), DirtySet()))
        self.rounds = self.mark.rounds()

    @rule(how=HOW)
    def finish(self, how: str) -> None:
        self.join(how)
        self.again(self.mark.finish())
        for at in self.roots:
            self.push(at)
        while self.work:
            for at in self.references(self.work.pop()):
                self.push(at)
        assert self.reachable() <= self.marked
        self.begin()


def run(machine: type[RuleBasedStateMachine], examples: int = 60, steps: int = 30, **options: Any) -> None:
    chosen = settings(max_examples=fewer(examples), stateful_step_count=steps, **options)
    run_state_machine_as_test(machine, settings=chosen)


@pytest.mark.parametrize("machine", [Collected, Marked])
def test_the_machine_and_the_model_agree(machine: type[RuleBasedStateMachine]) -> None:
    run(machine)


@pytest.mark.soak
@pytest.mark.parametrize("machine", [Collected, Marked])
def test_the_machine_and_the_model_agree_for_long(machine: type[RuleBasedStateMachine]) -> None:
    run(machine, 3000, 60)


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """What joins a heap is not told."""
    add = DirtyTracker.add

    def silent(self: DirtyTracker, memory: Any, **options: Any) -> Region:
        region = add(self, memory, **options)
        waiting = self.collect()
        self.put_back(waiting - DirtySet.from_runs([(region.start, region.end)]))
        return region

    monkeypatch.setattr(DirtyTracker, "add", silent)
    for grown in (RememberedSet, CardTable, ConcurrentMark):
        forgetful = grown.add

        def quiet(self: Any, *arguments: Any, forgetful: Any = forgetful, **options: Any) -> Region:
            epoch = self._heap._epoch
            region: Region = forgetful(self, *arguments, **options)
            self._heap._epoch = epoch and self.tracker.epoch
            for name in ("_pending", "_added"):
                if getattr(self, name, None) is not None:
                    setattr(self, name, getattr(self, name) - DirtySet.from_runs([(region.start, region.end)]))
            return region

        monkeypatch.setattr(grown, "add", quiet)


@pytest.mark.usefixtures("silent")
def test_the_machine_notices_that_what_joins_is_not_told() -> None:
    with pytest.raises((AssertionError, FlakyFailure)):
        run(Collected, 1000, 40, phases=[Phase.generate], derandomize=True, report_multiple_bugs=False)


def hide_something_in_what_joins_late() -> None:
    marked = Marked()
    marked.grow("registered", 5, 5, late=True)
    marked.look(3)
    marked.hide(0, 0, 3)
    try:
        marked.finish("registered")
    finally:
        marked.teardown()


def test_what_joins_a_marking_late_is_looked_at_again() -> None:
    hide_something_in_what_joins_late()


@pytest.mark.usefixtures("silent")
def test_the_marker_notices_that_what_joins_is_not_told() -> None:
    with pytest.raises(AssertionError):
        hide_something_in_what_joins_late()

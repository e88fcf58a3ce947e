# SPDX-License-Identifier: MIT
"""A state machine drives sessions, regions and listeners through everything at once, beside a model that is obvious.

The model keeps, for each listener and each of its regions, a copy of the memory at the last collect and the pages that
are owed for another reason. What differs from the copy must be in the next set; on plain private memory nothing else
may be.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import dirtytrack
from tests import oracle
from tests.oracle import PAGE
from tests.strategies import Kind, Span, Way, spans, ways

PAGES = {Kind.PRIVATE: 160, Kind.SHARED: 160, Kind.HUGE: 1024, Kind.SHARED_HUGE: 512}
MOST_REGIONS, MOST_LISTENERS = 6, 3


class Missed(AssertionError):
    """A page that was written is not in the set that must have it."""


class OtherProcess:
    """A process that writes into this one."""

    _SCRIPT = """
import sys
sys.path[:0] = sys.argv[1:]
from tests.oracle import write_process
for line in sys.stdin:
    pid, address, data = line.split()
    write_process(int(pid), int(address), bytes.fromhex(data))
    print("done", flush=True)
"""

    def __init__(self) -> None:
        oracle.allow_any_tracer()
        root = str(Path(oracle.__file__).resolve().parents[1])
        command = [sys.executable, "-c", self._SCRIPT, root]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def write(self, address: int, data: bytes) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{os.getpid()} {address} {data.hex()}\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "done\n"

    def close(self) -> None:
        with self._process:
            pass


class Watch:
    """What one listener is owed of one region."""

    def __init__(self, world: World, region: dirtytrack.Region) -> None:
        self.region = region
        self.first, self.last = region.start // PAGE, region.end // PAGE
        self.pages = frozenset(range(self.first, self.last))
        self._world = world
        self._before = world.frames(self.first, self.last).copy()
        self.mirror = bytearray(world.own_bytes(region))
        self.owed: set[int] = set()
        """Pages that the next set must have, whatever their content."""
        self.allowed: set[int] = set()
        """Pages that it may have, on memory where the answer is exact."""

    def owe(self, pages: set[int] | frozenset[int]) -> None:
        self.owed |= pages & self.pages
        self.allow(pages)

    def allow(self, pages: set[int] | frozenset[int]) -> None:
        self.allowed |= pages & self.pages

    def changed(self) -> set[int]:
        differ = (self._world.frames(self.first, self.last) != self._before).any(axis=1)
        return {self.first + int(i) for i in np.flatnonzero(differ)}

    def delivered(self, pages: set[int], complete: bool) -> None:
        mine = pages & self.pages
        self.owed -= mine
        if complete:  # else the scan did not come to some of them, which come again
            self.allowed -= mine
        if mine:
            rows = np.fromiter(mine, dtype=np.int64) - self.first
            self._before[rows] = self._world.frames(self.first, self.last)[rows]


class Listener:
    def __init__(self, tracker: dirtytrack.DirtyTracker) -> None:
        self.tracker = tracker
        self.watches: dict[dirtytrack.Region, Watch] = {}

    def selected(self, region: dirtytrack.Region | None) -> list[Watch]:
        return list(self.watches.values()) if region is None else [self.watches[region]]


def pages_of(dirty: dirtytrack.DirtySet) -> set[int]:
    """The pages, by number from address 0; and that the runs are what they are said to be."""
    pages: set[int] = set()
    end = -1
    for start, following in dirty:
        assert start > end, "sorted, disjoint, coalesced"
        assert start % PAGE == following % PAGE == 0
        end = following
        pages.update(range(start // PAGE, end // PAGE))
    assert dirty.page_count == len(pages)
    return pages


class World:
    """Memory, a session and its listeners, and the model of what each is owed."""

    def __init__(self, kind: Kind, populated: bool, other: OtherProcess | None = None) -> None:
        self.exact = kind is Kind.PRIVATE
        self.kind = kind
        self.other = other
        shared, huge = kind.value
        self.memory = dirtytrack.allocate(PAGES[kind] * PAGE, shared=shared, huge=huge)
        self.nbytes = self.memory.nbytes
        self.base = self.memory.address
        self._view = memoryview(self.memory)
        self._frames: npt.NDArray[np.uint8] = np.frombuffer(self.memory, np.uint8).reshape(-1, PAGE)
        self.session = dirtytrack.UffdSession()
        self.regions: list[dirtytrack.Region] = []
        self.listeners: list[Listener] = []
        self.flights: list[tuple[frozenset[int], dirtytrack.session.InFlight]] = []
        self.suspended = False
        self._pipe = os.pipe()
        self._proc_mem = os.open("/proc/self/mem", os.O_RDWR | os.O_CLOEXEC)
        self._count = 0
        if populated:
            self._frames[:] = np.arange(len(self._frames), dtype=np.uint64)[:, None].astype(np.uint8)

    def close(self) -> None:
        for fd in (*self._pipe, self._proc_mem):
            os.close(fd)
        self.session.close()
        self.listeners.clear()
        del self._frames, self._view

    # ---- looking

    def frames(self, first: int, last: int) -> npt.NDArray[np.uint8]:
        page = self.base // PAGE
        return self._frames[first - page : last - page]

    def own_bytes(self, region: dirtytrack.Region) -> memoryview:
        at = region.address - self.base
        return self._view[at : at + region.nbytes]

    def page_numbers(self, span: Span) -> frozenset[int]:
        page = self.base // PAGE
        return frozenset(range(page + span.pages.start, page + span.pages.stop))

    def watches(self) -> Iterator[Watch]:
        for listener in self.listeners:
            yield from listener.watches.values()

    # ---- writing

    def write(self, span: Span, way: Way) -> None:
        start, end = span
        pages = self.page_numbers(span)
        self._count += 1
        data = bytes((self._count * 89 + i // 64) % 251 for i in range(end - start))
        if way is Way.SAME:
            self._view[start:end] = bytes(self._view[start:end])
            for watch in self.watches():
                watch.allow(pages)
            return
        if way is Way.STORE:
            self._view[start:end] = data
        elif way is Way.READ:
            assert os.write(self._pipe[1], data) == len(data)
            assert os.readv(self._pipe[0], [self._view[start:end]]) == len(data)
        elif way is Way.THREAD:
            thread = threading.Thread(target=self._view.__setitem__, args=(slice(start, end), data))
            thread.start()
            thread.join()
        elif way is Way.SELF:
            oracle.write_process(os.getpid(), self.base + start, data)
        elif way is Way.OTHER and self.other is not None:
            self.other.write(self.base + start, data)
        else:
            assert os.pwrite(self._proc_mem, data, self.base + start) == len(data)
        assert self._view[start:end] == data
        for watch in self.watches():
            watch.owe(pages)

    def discard(self, span: Span) -> None:
        pages = self.page_numbers(span)
        oracle.discard(min(pages) * PAGE, len(pages) * PAGE)
        if not self.kind.value[0]:
            assert not any(self._view[span.start : span.end])
        for watch in self.watches():  # owed where the content changed, which Watch.changed() finds
            watch.allow(pages)

    # ---- regions

    def register(self, span: Span) -> dirtytrack.Region:
        region = self.session.register(self._view[span.start : span.end], blind_spots="accepted")
        assert (region.address - self.base, region.nbytes) == (span.start, span.end - span.start)
        self.regions.append(region)
        return region

    def unregister(self, region: dirtytrack.Region) -> None:
        watched = any(region in listener.watches for listener in self.listeners)
        if watched:
            with pytest.raises(dirtytrack.InvalidMemory):
                self.session.unregister(region)
        else:
            self.session.unregister(region)
            self.regions.remove(region)

    # ---- listeners

    def listen(self, regions: list[dirtytrack.Region]) -> Listener:
        listener = Listener(dirtytrack.DirtyTracker(self.session, regions))
        listener.tracker.start()
        assert listener.tracker.epoch == 1
        for region in regions:
            watch = listener.watches[region] = Watch(self, region)
            if self.suspended:
                watch.owe(watch.pages)
        self.listeners.append(listener)
        return listener

    def add(self, listener: Listener, region: dirtytrack.Region) -> None:
        if region in listener.watches:
            with pytest.raises(dirtytrack.InvalidMemory):
                listener.tracker.add(region)
            return
        assert listener.tracker.add(region) is region
        watch = listener.watches[region] = Watch(self, region)
        watch.owe(watch.pages)

    def remove(self, listener: Listener, region: dirtytrack.Region) -> None:
        final = listener.tracker.remove(region)
        self._use(listener, final, [listener.watches[region]])
        del listener.watches[region]

    def stop(self, listener: Listener) -> None:
        final = listener.tracker.stop()
        assert listener.tracker.epoch == 0
        self._use(listener, final, listener.selected(None))
        self.listeners.remove(listener)

    def drop(self, listener: Listener) -> None:
        self.listeners.remove(listener)
        listener.tracker = None  # type: ignore[assignment]
        gc.collect(0)

    # ---- collecting

    def check(self, watches: list[Watch], dirty: dirtytrack.DirtySet, complete: bool = True) -> set[int]:
        """Whether a set has what it must have, and nothing that it may not."""
        pages = pages_of(dirty)
        flying = {page for flight, _ in self.flights for page in flight}
        known: set[int] = set()
        allowed: set[int] = set()
        for watch in watches:
            if self.suspended:
                watch.owe(watch.pages)
            watch.owe(flying)
            known |= watch.pages
            allowed |= watch.allowed
            if complete:
                missed = (watch.changed() | watch.owed) - pages
                if missed:
                    raise Missed(f"{watch.region}: pages {sorted(page - watch.first for page in missed)} are missing")
        assert pages <= known, "pages of no region"
        if self.exact:
            assert pages <= allowed, f"pages {sorted(pages - allowed)} were not written"
        return pages

    def _use(self, listener: Listener, dirty: dirtytrack.DirtySet, watches: list[Watch]) -> None:
        pages = self.check(watches, dirty, dirty.complete)
        if watches:
            dirty.copy_to({watch.region: watch.mirror for watch in watches})
        self._took(watches, pages, dirty.complete)

    def _took(self, watches: list[Watch], pages: set[int], complete: bool) -> None:
        for watch in watches:
            watch.delivered(pages, complete)
            if complete:
                assert self.own_bytes(watch.region) == watch.mirror, "the mirror is the memory"

    def collect(
        self, listener: Listener, region: dirtytrack.Region | None = None, budget_seconds: float | None = None
    ) -> dirtytrack.DirtySet:
        epoch = listener.tracker.epoch
        dirty = listener.tracker.collect(region, budget_seconds=budget_seconds)
        assert dirty.epoch == epoch
        assert listener.tracker.epoch == epoch + 1
        assert dirty.complete or budget_seconds is not None
        self._use(listener, dirty, listener.selected(region))
        return dirty

    def collect_into(self, listener: Listener, region: dirtytrack.Region | None = None) -> None:
        watches = listener.selected(region)
        mirrors = {watch.region: watch.mirror for watch in watches}
        dirty = listener.tracker.collect_into(mirrors, region)
        self._took(watches, self.check(watches, dirty), complete=True)

    def peek(self, listener: Listener, region: dirtytrack.Region | None = None) -> dirtytrack.DirtySet:
        epoch = listener.tracker.epoch
        seen = listener.tracker.peek(region)
        self.check(listener.selected(region), seen)
        assert listener.tracker.epoch == epoch
        return seen

    def collect_and_put_back(self, listener: Listener, region: dirtytrack.Region | None = None) -> None:
        dirty = listener.tracker.collect(region)
        pages = self.check(listener.selected(region), dirty)
        for watch in listener.selected(region):
            watch.delivered(pages, complete=True)
        listener.tracker.put_back(dirty)
        for watch in listener.watches.values():
            watch.owe(pages)

    def collect_and_fail(self, listener: Listener, region: dirtytrack.Region | None = None, into: bool = False) -> None:
        """An exception where the set is made: nothing is delivered."""
        watches = listener.selected(region)
        pages = self.check(watches, listener.tracker.peek(region))
        mirrors = {watch.region: watch.mirror for watch in watches}
        with mock.patch("dirtytrack.tracker.DirtySet", side_effect=MemoryError), pytest.raises(MemoryError):
            (listener.tracker.collect_into(mirrors, region) if into else listener.tracker.collect(region))
        for watch in watches:  # of overlapping regions, each gets back what any of them had
            watch.allow(pages)

    # ---- the session

    def mark_dirty(self, span: Span) -> None:
        self.session.mark_dirty((self.base + span.start, span.end - span.start))
        for watch in self.watches():
            watch.owe(self.page_numbers(span))

    def take_off(self, span: Span) -> None:
        flight = self.session.in_flight((self.base + span.start, span.end - span.start))
        flight.__enter__()
        self.flights.append((self.page_numbers(span), flight))

    def land(self, number: int) -> None:
        pages, flight = self.flights.pop(number)
        flight.__exit__(None, None, None)
        for watch in self.watches():
            watch.owe(pages)

    def suspend(self) -> None:
        self.session.suspend()
        self.suspended = True

    def resume(self) -> None:
        self.session.resume()
        self.suspended = False
        for watch in self.watches():
            watch.owe(watch.pages)


# ---- the state machine --------------------------------------------------------------------------------------------

_other: OtherProcess | None = None


@pytest.fixture(scope="module", autouse=True)
def other_process() -> Iterator[None]:
    global _other
    _other = OtherProcess()
    yield
    _other.close()
    _other = None


numbers = st.integers(0, 1000)


class Machine(RuleBasedStateMachine):
    """Chooses what happens next; the world checks."""

    kind: Kind
    world: World

    @initialize(populated=st.booleans(), data=st.data())
    def begin(self, populated: bool, data: st.DataObject) -> None:
        self.world = World(self.kind, populated, _other)
        for _ in range(2):
            self.world.register(self.draw_region(data))
        self.world.listen(self.world.regions[:1])

    def teardown(self) -> None:
        if hasattr(self, "world"):
            try:
                if self.world.suspended:
                    self.world.resume()
                for listener in list(self.world.listeners):
                    self.world.collect(listener)
                    self.world.stop(listener)
            finally:
                self.world.close()

    def draw_region(self, data: st.DataObject) -> Span:
        whole = data.draw(st.integers(0, 3)) == 0
        return Span(0, self.world.nbytes) if whole else data.draw(spans(self.world.nbytes))

    def a_listener(self, number: int) -> Listener:
        return self.world.listeners[number % len(self.world.listeners)]

    def a_region(self, number: int) -> dirtytrack.Region:
        return self.world.regions[number % len(self.world.regions)]

    def one_of(self, listener: Listener, number: int) -> dirtytrack.Region | None:
        """None (all of them) in half of the cases."""
        mine = list(listener.watches)
        return mine[number // 2 % len(mine)] if mine and number % 2 else None

    def has_listener(self) -> bool:
        return bool(self.world.listeners)

    def has_region(self) -> bool:
        return bool(self.world.regions)

    @rule(data=st.data(), way=ways())
    def write(self, data: st.DataObject, way: Way) -> None:
        self.world.write(data.draw(spans(self.world.nbytes, 6 * PAGE)), way)

    @rule(data=st.data())
    def write_here_and_there(self, data: st.DataObject) -> None:
        for page in data.draw(st.sets(st.integers(0, self.world.nbytes // PAGE - 1), max_size=40)):
            self.world.write(Span(page * PAGE + 7, page * PAGE + 9), Way.STORE)

    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        span = data.draw(spans(self.world.nbytes))
        pages = span.pages
        self.world.discard(Span(pages.start * PAGE, pages.stop * PAGE))

    @precondition(lambda self: len(self.world.regions) < MOST_REGIONS)
    @rule(data=st.data())
    def register(self, data: st.DataObject) -> None:
        self.world.register(self.draw_region(data))

    @precondition(has_region)
    @rule(number=numbers)
    def unregister(self, number: int) -> None:
        self.world.unregister(self.a_region(number))

    @precondition(has_region)
    @rule(number=numbers)
    def write_protect(self, number: int) -> None:
        self.world.session.write_protect(self.a_region(number))

    @precondition(lambda self: len(self.world.listeners) < MOST_LISTENERS)
    @rule(chosen=st.integers(0, (1 << MOST_REGIONS) - 1))
    def listen(self, chosen: int) -> None:
        self.world.listen([region for i, region in enumerate(self.world.regions) if chosen >> i & 1])

    @precondition(lambda self: self.world.listeners and self.world.regions)
    @rule(number=numbers, region=numbers)
    def add(self, number: int, region: int) -> None:
        self.world.add(self.a_listener(number), self.a_region(region))

    @precondition(lambda self: self.world.listeners and len(self.world.regions) < MOST_REGIONS)
    @rule(number=numbers, data=st.data(), past=st.integers(0, 3))
    def grow(self, number: int, data: st.DataObject, past: int) -> None:
        """A region that adjoins one that is watched, or overlaps its end."""
        listener = self.a_listener(number)
        for region in list(listener.watches)[:1]:
            end = region.address + region.nbytes - self.world.base
            start = max(0, end - past * 1000)
            if start < self.world.nbytes:
                more = data.draw(spans(self.world.nbytes - start, 8 * PAGE))
                self.world.add(listener, self.world.register(Span(start, start + more.end - more.start)))

    @precondition(has_listener)
    @rule(number=numbers, region=numbers)
    def remove(self, number: int, region: int) -> None:
        listener = self.a_listener(number)
        mine = list(listener.watches)
        if mine:
            self.world.remove(listener, mine[region % len(mine)])

    @precondition(has_listener)
    @rule(number=numbers)
    def stop(self, number: int) -> None:
        self.world.stop(self.a_listener(number))

    @precondition(has_listener)
    @rule(number=numbers)
    def drop(self, number: int) -> None:
        self.world.drop(self.a_listener(number))

    @precondition(has_listener)
    @rule(number=numbers, region=numbers)
    def collect(self, number: int, region: int) -> None:
        listener = self.a_listener(number)
        self.world.collect(listener, self.one_of(listener, region))

    @precondition(has_listener)
    @rule(number=numbers, region=numbers, budget_seconds=st.sampled_from((0.0, 1e-5, 60.0)))
    def collect_on_a_budget(self, number: int, region: int, budget_seconds: float) -> None:
        listener = self.a_listener(number)
        dirty = self.world.collect(listener, self.one_of(listener, region), budget_seconds)
        assert dirty.complete or budget_seconds < 60

    @precondition(has_listener)
    @rule(number=numbers, region=numbers)
    def collect_into(self, number: int, region: int) -> None:
        listener = self.a_listener(number)
        self.world.collect_into(listener, self.one_of(listener, region))

    @precondition(has_listener)
    @rule(number=numbers, region=numbers)
    def peek_and_collect(self, number: int, region: int) -> None:
        listener = self.a_listener(number)
        chosen = self.one_of(listener, region)
        seen = self.world.peek(listener, chosen)
        if not seen <= self.world.collect(listener, chosen):
            raise Missed("a peek saw more than the collect after it")

    @precondition(has_listener)
    @rule(number=numbers, region=numbers)
    def peek(self, number: int, region: int) -> None:
        listener = self.a_listener(number)
        self.world.peek(listener, self.one_of(listener, region))

    @precondition(has_listener)
    @rule(number=numbers, region=numbers)
    def a_consumer_puts_back(self, number: int, region: int) -> None:
        listener = self.a_listener(number)
        self.world.collect_and_put_back(listener, self.one_of(listener, region))

    @precondition(has_listener)
    @rule(number=numbers, region=numbers, into=st.booleans())
    def a_collect_fails(self, number: int, region: int, into: bool) -> None:
        listener = self.a_listener(number)
        self.world.collect_and_fail(listener, self.one_of(listener, region), into)

    @rule(data=st.data())
    def mark_dirty(self, data: st.DataObject) -> None:
        self.world.mark_dirty(data.draw(spans(self.world.nbytes, 20 * PAGE)))

    @precondition(lambda self: len(self.world.flights) < 2)
    @rule(data=st.data())
    def take_off(self, data: st.DataObject) -> None:
        self.world.take_off(data.draw(spans(self.world.nbytes, 4 * PAGE)))

    @precondition(lambda self: self.world.flights)
    @rule(number=numbers)
    def land(self, number: int) -> None:
        self.world.land(number % len(self.world.flights))

    @rule(really=st.integers(0, 3))
    def suspend_or_resume(self, really: int) -> None:
        if self.world.suspended:
            self.world.resume()
        elif not really:
            self.world.suspend()


def machine_of(kind: Kind) -> type[Machine]:
    return type(f"Machine_{kind.name}", (Machine,), {"kind": kind})


def run(kind: Kind, chosen: settings) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(machine_of(kind), settings=chosen)


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name.lower())
def test_the_machine_and_the_model_agree(kind: Kind) -> None:
    run(kind, settings(max_examples=250, stateful_step_count=45))


@pytest.mark.soak
@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name.lower())
def test_the_machine_and_the_model_agree_for_long(kind: Kind) -> None:
    run(kind, settings(max_examples=3000, stateful_step_count=120))


# ---- the test of the test -----------------------------------------------------------------------------------------


def prepared(kind: Kind = Kind.PRIVATE) -> tuple[World, Listener]:
    world = World(kind, populated=True)
    return world, world.listen([world.register(Span(0, world.nbytes))])


def test_the_model_notices_an_erased_bit() -> None:
    world, listener = prepared()
    page = world.base + 5 * PAGE
    world.write(Span(5 * PAGE, 5 * PAGE + 1), Way.STORE)
    oracle.arm(world.session.fileno(), page, page + PAGE)
    with pytest.raises(Missed, match=r"pages \[5\]"):
        world.collect(listener)
    world.close()


def test_the_model_notices_a_mirror_that_is_behind() -> None:
    world, listener = prepared()
    world.write(Span(3 * PAGE, 4 * PAGE), Way.READ)
    with mock.patch("dirtytrack.DirtySet.copy_to"), pytest.raises(AssertionError, match="mirror"):
        world.collect(listener)
    world.close()


def test_the_model_notices_pages_that_were_not_written() -> None:
    world, listener = prepared()
    world.session.mark_dirty((world.base, 1))
    with pytest.raises(AssertionError, match="not written"):
        world.collect(listener)
    world.close()


def test_a_machine_that_erases_bits_is_found_out() -> None:
    """The whole machine against an engine that loses the first page of every set before it looks."""
    honest = World.collect

    def broken(world: World, listener: Listener, *arguments: object) -> dirtytrack.DirtySet:
        for region in listener.watches:
            if not world.suspended:
                with suppress(OSError):
                    oracle.arm(world.session.fileno(), region.start, region.start + PAGE)
        return honest(world, listener, *arguments)  # type: ignore[arg-type]

    with mock.patch.object(World, "collect", broken), pytest.raises(Missed):
        run(
            Kind.PRIVATE,
            settings(stateful_step_count=30, database=None, phases=(Phase.generate,), report_multiple_bugs=False),
        )

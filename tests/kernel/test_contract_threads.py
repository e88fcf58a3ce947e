# SPDX-License-Identifier: MIT
"""Each sentence of the contract about threads, finalisers and signal handlers.

Truth is a mirror that is kept from what was collected, and compared with the memory once nobody writes. Writers in C
are in test_storm.py, handlers that raise in test_interrupts.py, forks in test_contract_forks.py. Takes about 7 s of
CI's 20 min.
"""

from __future__ import annotations

import gc
import itertools
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random
from types import FrameType

import pytest

import dirtytrack
from dirtytrack import DirtySet, DirtyTracker, Memory
from dirtytrack.kernel import engine
from tests.asked import fewer
from tests.kernel.backends import session_of
from tests.kernel.listening import pages_of
from tests.opened import descriptors
from tests.oracle import PAGE


@pytest.fixture
def _nervous() -> Iterator[None]:
    """Threads take turns after 20 microseconds, not after 5 milliseconds: more meetings, and fewer waits."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(2e-5)
    yield
    sys.setswitchinterval(before)


nervous = pytest.mark.usefixtures("_nervous")


def write(memory: Memory, pages: set[int]) -> None:
    for page in pages:
        memory[page * PAGE] = (memory[page * PAGE] + 1) % 256


# ---- threads --------------------------------------------------------------------------------------------------------


@nervous
def test_of_collects_at_once_each_page_goes_to_exactly_one(backend: str) -> None:
    pages, rounds, takers = 256, fewer(1000), 3
    random = Random(1)
    memory = dirtytrack.allocate(pages * PAGE, name="memory")
    mirrors = [bytearray(memory.nbytes) for _ in range(takers)]
    with session_of(backend) as session, ThreadPoolExecutor(takers) as pool:
        region = session.register(memory)
        tracker = DirtyTracker(session)
        tracker.start()
        barrier = threading.Barrier(takers)

        def take(number: int) -> list[int]:
            ways: tuple[Callable[[], DirtySet], ...] = (
                tracker.collect,
                lambda: tracker.collect(region),
                lambda: tracker.collect(budget_seconds=0),
                lambda: tracker.collect_into(mirrors[number]),
            )
            barrier.wait()
            return [page for way in ways[number:] + ways[:number] for page in pages_of(way(), region)]

        winners = set()
        for _ in range(rounds):
            written = set(random.choices(range(pages), k=random.randrange(1, 100)))
            write(memory, written)
            taken = list(pool.map(take, random.sample(range(takers), takers)))  # the last to come tends to go first
            assert sorted(itertools.chain(*taken)) == sorted(written), "each once, none lost"
            winners |= {number for number, found in enumerate(taken) if found}
        assert tracker.epoch == 1 + rounds * takers * 4
        assert len(winners) > 1, "the threads did compete"


@nervous
def test_one_of_two_stops_gets_the_final_set(backend: str) -> None:
    memory = dirtytrack.allocate(8 * PAGE)
    with session_of(backend) as session, ThreadPoolExecutor(2) as pool:
        session.register(memory)
        tracker = DirtyTracker(session)
        barrier = threading.Barrier(2)

        def stop(_: int) -> int | None:
            barrier.wait()
            try:
                return tracker.stop().page_count
            except dirtytrack.NotStarted:
                return None

        for _ in range(200):
            tracker.start()
            write(memory, {1, 5})
            assert set(pool.map(stop, range(2))) == {2, None}
            assert tracker.epoch == 0


class Mirror:
    """A copy of memory, brought up to date by whoever collected, in any thread."""

    def __init__(self, memory: Memory) -> None:
        self._memory, self._lock = memory, threading.Lock()
        self._at = memory.address
        self.copy = bytearray(memory)

    def use(self, dirty: DirtySet) -> None:
        for start, end in dirty:
            with self._lock:  # read and written in one piece, or an older copy would win over a newer
                self.copy[start - self._at : end - self._at] = self._memory[start - self._at : end - self._at]


@nervous
def test_listeners_and_regions_come_and_go_in_threads_while_others_write(backend: str) -> None:
    rounds = fewer(1500)
    memory = dirtytrack.allocate(128 * PAGE, name="all")
    mirror = Mirror(memory)
    quiet = threading.Event()
    with session_of(backend) as session:
        low = session.register((memory.address, 64 * PAGE), name="low")
        high = session.register((memory.address + 60 * PAGE, 68 * PAGE), name="high")
        tracker, other = DirtyTracker(session, [low, high]), DirtyTracker(session, [high, low])
        tracker.start()

        def writes() -> None:
            random = Random(2)
            while not quiet.is_set():
                memory[random.randrange(memory.nbytes)] = random.randrange(256)

        def collects() -> None:
            for number in range(rounds * 2):
                mirror.use(tracker.collect(budget_seconds=0 if number % 3 else None))

        def adds_and_removes() -> None:
            for _ in range(rounds):
                mirror.use(tracker.remove(high))
                tracker.add(high)

        def starts_and_stops() -> None:
            for _ in range(rounds):
                with other:
                    other.collect()

        def comes_and_goes() -> None:
            random = Random(3)
            for _ in range(rounds):
                at = random.randrange(100 * PAGE)
                passing = dirtytrack.track((memory.address + at, 20 * PAGE), session=session)
                passing.start()
                if random.random() < 0.5:
                    passing.stop()
                del passing
                session.write_protect(low)
                session.unregister(session.register((memory.address + at, PAGE)))

        jobs = (collects, collects, adds_and_removes, starts_and_stops, comes_and_goes)
        with ThreadPoolExecutor(len(jobs) + 1) as pool:
            writer = pool.submit(writes)
            try:
                for done in [pool.submit(job) for job in jobs]:
                    done.result()
            finally:
                quiet.set()
            writer.result()
        mirror.use(tracker.collect())
        assert mirror.copy == memory[:]
        assert set(tracker.regions) == set(session.regions) == {low, high}
        final = tracker.stop()
        assert not final


@nervous
def test_suspending_in_a_thread_while_others_write_and_collect(backend: str) -> None:
    memory = dirtytrack.allocate(64 * PAGE)
    mirror, quiet = Mirror(memory), threading.Event()
    with session_of(backend) as session:
        region = session.register(memory)
        tracker = DirtyTracker(session)
        tracker.start()

        def writes() -> None:
            random = Random(4)
            while not quiet.is_set():
                memory[random.randrange(memory.nbytes)] = random.randrange(256)

        def collects() -> None:
            while not quiet.is_set():
                mirror.use(tracker.collect())

        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(writes), pool.submit(collects)]
            try:
                for _ in range(1000):
                    session.suspend()
                    session.resume()
            finally:
                quiet.set()
            for job in jobs:
                job.result()
        mirror.use(tracker.collect())
        assert mirror.copy == memory[:]
        write(memory, {3})
        assert pages_of(tracker.collect(), region) == [3]


# ---- finalisers -----------------------------------------------------------------------------------------------------


class Knot:
    """Holds itself: only the collector of cycles frees it, and what it holds."""

    def __init__(self, held: object) -> None:
        self.held, self.me = held, self


def _at_once(held: list[object]) -> None:
    held.clear()


def _in_a_cycle(held: list[object]) -> None:
    Knot(held.pop())
    gc.collect()


def _in_a_thread(held: list[object]) -> None:
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()


def _in_a_cycle_in_a_thread(held: list[object]) -> None:
    Knot(held.pop())
    thread = threading.Thread(target=gc.collect)
    thread.start()
    thread.join()


PARTS = ("session", "region", "tracker", "set", "flight", "final")


@pytest.mark.parametrize("drop", [_at_once, _in_a_cycle, _in_a_thread, _in_a_cycle_in_a_thread])
def test_dropped_in_any_order_nothing_stays(backend: str, drop: Callable[[list[object]], None]) -> None:
    random = Random(5)
    orders = list(itertools.permutations(PARTS))
    gc.collect()  # what earlier tests left in cycles
    before = descriptors()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for order in random.sample(orders, 12 if backend == "kernel" else 3):
            memory, buffer = dirtytrack.allocate(4 * PAGE), bytearray(PAGE)
            held = parts_of(backend, memory, buffer)
            for part in order:
                drop([held.pop(part)])
            gc.collect(0)
            buffer.append(1)  # nobody holds it
            with session_of(backend) as session:  # nobody has it registered
                region = session.register(memory)
                tracker = DirtyTracker(session)
                tracker.start()
                write(memory, {1})
                assert pages_of(tracker.collect(), region) == [1]
    assert descriptors() == before


def parts_of(backend: str, memory: Memory, buffer: bytearray) -> dict[str, object]:
    session = session_of(backend)
    region, small = session.register(memory), session.register(buffer)
    tracker = DirtyTracker(session)
    tracker.start()
    write(memory, {1, 2})
    flight = session.in_flight(buffer)
    flight.__enter__()
    parts = (session, region, tracker, tracker.collect(), flight, tracker.remove(small))
    return dict(zip(PARTS, parts, strict=True))


def test_starting_on_all_regions_while_some_come_and_go(backend: str) -> None:
    """Nobody named the region that went: the tracker starts on those that are left."""
    memory = dirtytrack.allocate(64 * PAGE)
    done = threading.Event()
    with session_of(backend) as session:
        session.register((memory.address, PAGE))

        def come_and_go() -> None:
            while not done.is_set():
                region = session.register((memory.address + 8 * PAGE, PAGE))
                while True:
                    try:
                        session.unregister(region)
                        break
                    except dirtytrack.InvalidMemory:  # the tracker has it just now
                        continue

        other = threading.Thread(target=come_and_go)
        other.start()
        try:
            for _ in range(2000):
                tracker = DirtyTracker(session)
                tracker.start()
                tracker.stop()
        finally:
            done.set()
            other.join()


def test_a_dropped_tracker_neither_disturbs_the_others_nor_waits_for_them(backend: str) -> None:
    memory = dirtytrack.allocate(8 * PAGE)
    with session_of(backend) as session:
        region = session.register(memory)
        stays = DirtyTracker(session)
        stays.start()
        for page in range(8):
            passing = DirtyTracker(session)
            passing.start()
            write(memory, {page})
            dirty = passing.collect()
            Knot(passing)
            del passing
            gc.collect()
            assert pages_of(dirty, region) == [page]
        assert pages_of(stays.stop(), region) == list(range(8))
        session.unregister(region)  # nobody watches it any more


def test_a_set_that_reached_nobody_is_pending_again(backend: str) -> None:
    """Built by the core, and lost on its way to the caller: by whatever, wherever its last reference went."""
    memory = dirtytrack.allocate(8 * PAGE)
    with session_of(backend) as session:
        region = session.register(memory)
        tracker, other = DirtyTracker(session), DirtyTracker(session)
        tracker.start()
        other.start()
        for number, drop in enumerate((_at_once, _in_a_cycle, _in_a_thread, _in_a_cycle_in_a_thread)):
            write(memory, {number})
            lost = tracker.collect()
            lost._set.delivered = 0  # as collect() does when it is interrupted
            assert lost.page_count == 1
            assert not tracker.peek()
            drop([lost])
            del lost
            gc.collect(0)
            assert pages_of(tracker.peek(), region) == [number]
            assert pages_of(tracker.collect(), region) == [number]
            assert not tracker.peek(), "a set that was delivered does not come back"
        assert pages_of(other.collect(), region) == [0, 1, 2, 3]


def test_a_call_waits_for_the_settling_that_another_thread_began(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A final set that is being settled elsewhere still stands between its region and `unregister`."""
    memory, extra = dirtytrack.allocate(PAGE), dirtytrack.allocate(PAGE)
    settle, reached, go_on = engine.settle, threading.Event(), threading.Event()

    def slow(cset: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            reached.set()
            go_on.wait()
        settle(cset)

    with session_of(backend) as session:
        tracker = DirtyTracker(session, [session.register(memory)])
        tracker.start()
        region = tracker.add(extra)
        final = tracker.remove(region)
        monkeypatch.setattr(engine, "settle", slow)
        elsewhere = threading.Thread(target=session._settle)
        elsewhere.start()
        reached.wait()
        try:
            session.unregister(region)
        finally:
            go_on.set()
            elsewhere.join()
        assert extra.address not in [each.address for each in session.regions]
        assert final, "a set that nobody has is not waited for"


# ---- signal handlers ------------------------------------------------------------------------------------------------


def test_a_signal_handler_may_call_anything(backend: str) -> None:
    random = Random(6)
    memory = dirtytrack.allocate(256 * PAGE, name="memory")
    mirror, others_mirror = bytearray(memory), bytearray(memory)
    calls = 0
    inside = False
    with session_of(backend) as session:
        region = session.register(memory)
        tracker, other = DirtyTracker(session), DirtyTracker(session)
        tracker.start()
        other.start()

        def passes_by() -> None:
            with dirtytrack.track(bytearray(PAGE), memory, session=session) as passing:
                memory[random.randrange(memory.nbytes)] ^= random.randrange(1, 256)  # not what is there: no change
                assert passing.collect()

        def tracks_elsewhere() -> None:
            elsewhere = bytearray(4 * PAGE)
            with dirtytrack.track(elsewhere, backend=backend) as passing:
                elsewhere[2 * PAGE] = 1
                assert passing.collect()

        def stops() -> None:
            other.stop().copy_to(others_mirror)
            other.start()
            others_mirror[:] = memory[:]

        actions: tuple[Callable[[], object], ...] = (
            lambda: tracker.collect().copy_to(mirror),
            lambda: tracker.collect(region).copy_to(mirror),
            lambda: tracker.collect_into(mirror),
            lambda: other.collect(budget_seconds=0).copy_to(others_mirror),
            lambda: tracker.put_back(tracker.collect()),
            tracker.peek,
            lambda: session.mark_dirty((memory.address + 7 * PAGE, PAGE)),
            lambda: session.write_protect(region),
            session.statistics,
            passes_by,
            tracks_elsewhere,
            stops,
            gc.collect,
        )

        def handle(number: int, frame: FrameType | None) -> None:
            nonlocal calls, inside
            if not inside:
                inside = True
                calls += 1
                memory[random.randrange(memory.nbytes)] = random.randrange(256)
                random.choice(actions)()
                inside = False

        handler = signal.signal(signal.SIGALRM, handle)
        timer = signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.00037)  # pytest-timeout's, if it uses one
        try:
            for step in itertools.count():
                for _ in range(20):
                    memory[random.randrange(memory.nbytes)] = random.randrange(256)
                if step % 2:
                    tracker.collect_into(mirror)
                else:
                    tracker.collect().copy_to(mirror)
                if step % 10 == 0:
                    other.collect_into(others_mirror)
                if step % 50 == 0:
                    inside = True  # the handler does nothing meanwhile
                    for listener, copy in ((tracker, mirror), (other, others_mirror)):
                        listener.collect_into(copy)
                        assert copy == memory[:]
                    inside = False
                    if calls > 1500:
                        break
        finally:
            signal.setitimer(signal.ITIMER_REAL, *timer)
            signal.signal(signal.SIGALRM, handler)

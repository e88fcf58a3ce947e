# SPDX-License-Identifier: MIT
"""Threads that close, start and stop beneath each other, forks in the middle of Python's part of a call, and exits.

What test_contract_threads.py and test_contract_forks.py leave to luck, one point after the other. Takes about 4 s of
CI's 20 min.
"""

from __future__ import annotations

import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import dirtytrack
from dirtytrack import DirtySet, DirtyTracker, Memory, NotStarted, SessionClosed, UffdSession
from tests import oracle
from tests.oracle import PAGE
from tests.points import Points
from tests.sandbox import ROOT, run_in_child


@pytest.fixture(autouse=True)
def nervous() -> Iterator[None]:
    """Threads take turns after 10 microseconds."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def write(memory: Memory, *pages: int) -> None:
    for page in pages:
        memory[page * PAGE] = memory[page * PAGE] % 255 + 1


def descriptor_count() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


# ---- beneath each other ---------------------------------------------------------------------------------------------


def until_closed(call: Callable[[], object], barrier: threading.Barrier) -> str:
    """What ended it: nothing but a closed session may."""
    barrier.wait()
    while True:
        try:
            call()
        except SessionClosed:
            return "closed"
        except (dirtytrack.NotRegistered, NotStarted) as error:
            if "closed" not in str(error) and "no longer registered" not in str(error):
                return repr(error)
        except Exception as error:
            return repr(error)


def test_closing_beneath_everybody() -> None:
    before = descriptor_count()
    for number in range(25):
        memory, buffer = dirtytrack.allocate(32 * PAGE), bytearray(8 * PAGE)
        session = UffdSession()
        regions = session.register(memory), session.register(buffer)
        mirrors = {region: bytearray(region.nbytes) for region in regions}
        tracker, other = DirtyTracker(session, regions), DirtyTracker(session, regions)
        tracker.start()
        other.start()

        def copies(tracker: DirtyTracker = tracker, mirrors: dict = mirrors, memory: Memory = memory) -> None:  # type: ignore[type-arg]
            write(memory, 2)
            dirty = tracker.collect()
            dirty.copy_to(mirrors)
            dirty.gather()

        def registers(session: UffdSession = session, memory: Memory = memory) -> None:
            session.unregister(session.register((memory.address, PAGE)))

        def passes(session: UffdSession = session, regions: tuple = regions) -> None:  # type: ignore[type-arg]
            passing = DirtyTracker(session, regions)
            passing.start()
            passing.put_back(passing.collect())
            session.mark_dirty(regions[0])

        calls: list[Callable[[], object]] = [
            tracker.collect,
            lambda other=other, mirrors=mirrors: other.collect_into(mirrors),  # type: ignore[misc]
            copies,
            registers,
            passes,
        ]
        barrier = threading.Barrier(len(calls) + 1)
        with ThreadPoolExecutor(len(calls)) as pool:
            ends = [pool.submit(until_closed, call, barrier) for call in calls]
            barrier.wait()
            for _ in range(number * 100):  # a little later each time
                write(memory, 1)
            session.close()
            assert [end.result() for end in ends] == ["closed"] * len(calls)
        assert session.regions == ()
        gc.collect()
        buffer.append(1)  # nobody holds it
        with UffdSession() as session, DirtyTracker(session, [session.register(memory)]) as tracker:
            write(memory, 3)
            assert [run.start for run in tracker.collect()] == [memory.address + 3 * PAGE]
        del ends, calls, copies, registers, passes, regions, mirrors, tracker, other, session
    assert descriptor_count() == before


def test_one_thread_starts_what_another_stops() -> None:
    """Whoever was last, it runs, and knows the regions that it watches."""
    memory = dirtytrack.allocate(8 * PAGE)
    with UffdSession() as session, ThreadPoolExecutor(2) as pool:
        region = session.register(memory)
        tracker = DirtyTracker(session, [region])
        barrier = threading.Barrier(2)

        def stops() -> None:
            barrier.wait()
            tracker.stop()

        def starts() -> None:
            barrier.wait()
            while True:
                try:
                    return tracker.start()
                except dirtytrack.AlreadyStarted:
                    pass

        tracker.start()
        for _ in range(500):
            for job in [pool.submit(stops), pool.submit(starts)]:
                job.result()
            assert tracker.regions == (region,)
            write(memory, 5)
            dirty = tracker.collect()
            assert list(dirty.pages(region)) == [5]
            assert dirty.nbytes == PAGE


def test_two_threads_start_at_once() -> None:
    memory = dirtytrack.allocate(8 * PAGE)
    with UffdSession() as session, ThreadPoolExecutor(2) as pool:
        region = session.register(memory)
        tracker = DirtyTracker(session, [region])
        barrier = threading.Barrier(2)

        def starts(_: int) -> bool:
            barrier.wait()
            try:
                tracker.start()
            except dirtytrack.AlreadyStarted:
                return False
            return True

        for _ in range(300):
            assert sorted(pool.map(starts, range(2))) == [False, True]
            write(memory, 1)
            assert list(tracker.stop().pages(region)) == [1]


def test_the_regions_can_be_listed_while_they_come_and_go() -> None:
    stays, goes = dirtytrack.allocate(PAGE), dirtytrack.allocate(PAGE)
    with UffdSession() as session, ThreadPoolExecutor(1) as pool:
        region = session.register(stays)

        def comes_and_goes() -> None:
            for _ in range(3000):
                session.unregister(session.register(goes))

        job = pool.submit(comes_and_goes)
        while not job.done():
            assert session.regions[0] is region
            assert len(session.regions) <= 2
        job.result()


# ---- forks ----------------------------------------------------------------------------------------------------------

FORKS: tuple[Callable[[], int], ...] = (os.fork, oracle.raw_fork)


def fork_and(what: Callable[[], object], fork: Callable[[], int]) -> int:
    """The child's number; it fails if `what` does, or takes 10 seconds."""
    child = fork()
    if not child:
        signal.alarm(10)
        try:
            what()
        except BaseException as error:
            print(f"{type(error).__name__} in the child: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return child


def succeeded(child: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def refuses(call: Callable[[], object]) -> None:
    try:
        call()
    except dirtytrack.UsedAfterFork:
        return
    raise AssertionError("this was not refused")


def stopped_at(nth: int, call: Callable[[], object], do: Callable[[], object]) -> bool:
    """Do something while another thread stands at the nth point of a call. False: it has not so many points."""
    there, go_on = threading.Event(), threading.Event()

    def act() -> None:
        there.set()
        go_on.wait()

    points = Points(nth, act)

    def runs() -> None:
        try:
            points.call(call)
        finally:
            there.set()

    thread = threading.Thread(target=runs)
    thread.start()
    there.wait()
    try:
        if points.where:
            do()
    finally:
        go_on.set()
        thread.join()
    return bool(points.where)


def while_another_thread_is_anywhere() -> None:
    """At each point of a call, whatever it holds there: the child neither waits for it nor uses what is half done."""
    warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons dislike os.fork beside threads
    memory = dirtytrack.allocate(8 * PAGE)
    with UffdSession() as session:
        region, part = session.register(memory), session.register((memory.address, PAGE))
        tracker, changing = DirtyTracker(session, [region]), DirtyTracker(session, [region])
        tracker.start()

        def tracks() -> None:
            buffer = dirtytrack.allocate(2 * PAGE)
            with dirtytrack.track(buffer) as passing:
                write(buffer, 1)
                assert passing.collect().page_count == 1

        def restarts() -> None:
            with changing:
                changing.add(part)
                changing.remove(part)

        def in_the_child() -> None:
            for call in (tracker.collect, changing.start, changing.stop, changing.__enter__):
                refuses(call)
            refuses(lambda: changing.add(part))
            refuses(lambda: changing.remove(part))
            tracks()

        def forks() -> None:
            write(memory, 3)
            for fork in FORKS:
                assert succeeded(fork_and(in_the_child, fork))
            assert list(tracker.collect().pages(region)) == [3], "the parent is undisturbed"

        for call in (tracks, restarts):
            step = 3  # each third point: enough, and the others' turn comes with each change of the library
            assert not all(stopped_at(nth, call, forks) for nth in range(1, 1000, step))


def beside_a_living_child() -> None:
    """While parent and child share pages, both write them: copies on write of the one are no writes of the other."""
    memory = dirtytrack.allocate(16 * PAGE)
    memory[:] = bytes([1]) * memory.nbytes
    with UffdSession() as session:
        region = session.register(memory)
        tracker = DirtyTracker(session)
        tracker.start()
        for fork in FORKS:
            write(memory, 1)
            assert list(tracker.collect().pages(region)) == [1]
            write(memory, 2)
            (asked, ask), (heard, tell) = os.pipe(), os.pipe()

            def child(asked: int = asked, tell: int = tell) -> None:
                for page in (5, 6):
                    write(memory, page)
                    os.write(tell, b"1")
                    os.read(asked, 1)
                with dirtytrack.track(memory) as mine:
                    write(memory, 7)
                    assert list(mine.collect().pages(mine.regions[0])) == [7]
                    os.write(tell, b"1")
                    os.read(asked, 1)

            number = fork_and(child, fork)
            for written in ({2, 9}, {10, 5}, {7}):
                os.read(heard, 1)
                write(memory, *written - {2})
                assert set(tracker.collect().pages(region)) == written
                os.write(ask, b"1")
            assert succeeded(number)
            assert not tracker.collect()
            write(memory, 6)
            assert list(tracker.collect().pages(region)) == [6]
            for fd in (asked, ask, heard, tell):
                os.close(fd)


def before_another_program() -> None:
    """What a child executes inherits nothing, even where descriptors are left open on purpose."""
    memory = dirtytrack.allocate(PAGE)
    with dirtytrack.track(memory) as tracker:
        command = ["ls", "-l", "/proc/self/fd"]
        seen = subprocess.run(command, close_fds=False, capture_output=True, text=True, check=True).stdout
        assert "userfaultfd" not in seen
        assert "pagemap" not in seen
        write(memory, 0)
        assert tracker.collect().page_count == 1


@pytest.mark.parametrize("when", [while_another_thread_is_anywhere, beside_a_living_child, before_another_program])
def test_a_fork(when: Callable[[], None]) -> None:
    run_in_child(when)


# ---- the end --------------------------------------------------------------------------------------------------------

LEFT_RUNNING = """
import atexit, itertools, sys, threading
import dirtytrack
memory, elsewhere = dirtytrack.allocate(1 << 20), bytearray(1 << 16)
session = dirtytrack.UffdSession()
trackers = [dirtytrack.DirtyTracker(session), dirtytrack.track(memory, session=session), dirtytrack.track(elsewhere)]
for tracker in trackers:
    tracker.start()
def works(tracker):
    for number in itertools.count():
        memory[number % len(memory)] = elsewhere[number % len(elsewhere)] = number % 256
        tracker.collect()
for tracker in trackers:
    threading.Thread(target=works, args=(tracker,), daemon=True).start()
flight = session.in_flight(memory)
flight.__enter__()
undelivered = trackers[0].collect()
kept = [tracker.collect() for tracker in trackers]
undelivered._set.delivered = 0
atexit.register(lambda: [tracker.collect() for tracker in trackers])
class Last:
    def __del__(self, tracker=trackers[0]):
        tracker.peek()
sys.last = Last()
cycle = [trackers, session]
cycle.append(cycle)
"""


def test_an_interpreter_ends_in_the_middle_of_it_all() -> None:
    for _ in range(5):
        command = [sys.executable, "-X", "dev", "-W", "error", "-c", LEFT_RUNNING]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_sets_of_several_threads_unite_to_all_that_was_written() -> None:
    """Each with its own tracker of the same memory, at its own pace: each one's sets are the whole truth."""
    memory = dirtytrack.allocate(64 * PAGE)
    with UffdSession() as session, ThreadPoolExecutor(3) as pool:
        region = session.register(memory)
        trackers = [DirtyTracker(session) for _ in range(3)]
        for tracker in trackers:
            tracker.start()
        finished = threading.Event()

        def collects(tracker: DirtyTracker) -> set[int]:
            sets = []
            while not finished.is_set():
                sets.append(tracker.collect())
            sets.append(tracker.stop())
            assert [dirty.epoch for dirty in sets] == list(range(1, len(sets) + 1))
            return set(DirtySet.union(sets).pages(region))

        jobs = [pool.submit(collects, tracker) for tracker in trackers]
        written = [page * 7 % 61 for page in itertools.chain(range(40), range(20))]
        for page in written:
            write(memory, page)
        finished.set()
        assert [job.result() for job in jobs] == [set(written)] * 3

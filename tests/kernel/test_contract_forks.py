# SPDX-License-Identifier: MIT
"""Each sentence of the contract about forks: by Python's `os.fork`, and by the C library's, unknown to Python.

What each call of a child answers is in the folder failures. Takes about 2 s of CI's 20 min.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import dirtytrack
from dirtytrack import DirtySet, DirtyTracker, Memory, UffdSession
from tests import oracle
from tests.kernel.listening import pages_of
from tests.oracle import PAGE
from tests.sandbox import run_in_child


def write(memory: Memory, pages: set[int]) -> None:
    for page in pages:
        memory[page * PAGE] = (memory[page * PAGE] + 1) % 256


def child_of(fork: Callable[[], int], what: Callable[[], object], timeout_seconds: int = 20) -> None:
    """Fork, do something in the child, and wait for it: it succeeded."""
    child = fork()
    if not child:
        signal.alarm(timeout_seconds)  # a deadlock ends, as a failure
        try:
            what()
        except BaseException as error:
            print(f"{type(error).__name__} in the child: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def is_refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except dirtytrack.UsedAfterFork:
        return True
    return False


def inherited() -> list[str]:
    """What of a session's descriptors this process has."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the descriptor of the listing itself
            found.append(str(link.readlink()))
    return [target for target in found if "userfaultfd" in target or "pagemap" in target]


FORKS: tuple[Callable[[], int], ...] = (os.fork, oracle.raw_fork)


def in_the_middle_of_everything() -> None:
    """A fork between collects: with pages pending, in a `with`, in flight, and in the session that is shared."""
    for fork in FORKS:
        memory = dirtytrack.allocate(16 * PAGE)
        with dirtytrack.track(memory) as tracker:
            region, session = tracker.regions[0], tracker.session
            other = DirtyTracker(session, [region])
            other.start()
            write(memory, {1})
            other.collect()
            dirty = tracker.peek()
            write(memory, {2})

            def child(
                hooked: bool = fork is os.fork,
                memory: Memory = memory,
                tracker: DirtyTracker = tracker,
                dirty: DirtySet = dirty,
            ) -> None:
                if hooked:
                    assert not inherited(), "closed before anybody asked"
                write(memory, {9})
                assert is_refused(tracker.collect)
                assert not inherited()
                assert tracker.session.closed
                assert tracker.session.fileno() == -1
                assert dirty.page_count == 1, "numbers are numbers"
                with dirtytrack.track(memory) as mine:
                    assert mine.session is not tracker.session
                    write(memory, {3})
                    assert pages_of(mine.collect(), mine.regions[0]) == [3]
                    assert len(inherited()) == 2, "its own"
                    write(memory, {4})
                    child_of(oracle.raw_fork, lambda: check_grandchild(memory, mine))
                    assert pages_of(mine.collect(), mine.regions[0]) == [4]
                tracker.session.close()
                tracker.__exit__(None, None, None)

            child_of(fork, child)
            assert pages_of(tracker.collect(), region) == [1, 2], "neither lost nor the child's"
            assert pages_of(other.stop(), region) == [2]
            write(memory, {5})
            assert pages_of(tracker.collect(), region) == [5]


def check_grandchild(memory: Memory, of_the_child: DirtyTracker) -> None:
    assert is_refused(of_the_child.peek)
    assert not inherited()
    with dirtytrack.track(memory) as mine:
        write(memory, {8})
        assert mine.collect().page_count == 1


def with_everything_dropped_in_the_child() -> None:
    for fork in FORKS:
        drop_everything_in_a_child(fork)


def drop_everything_in_a_child(fork: Callable[[], int]) -> None:
    memory = dirtytrack.allocate(8 * PAGE)
    session = UffdSession()
    region, tracker = session.register(memory), DirtyTracker(session)
    tracker.start()
    flight = session.in_flight((memory.address + 7 * PAGE, PAGE))
    flight.__enter__()
    flight.__exit__(None, None, None)
    parts = [session, region, flight, tracker.collect()]
    write(memory, {1})
    undelivered = [tracker.collect()]
    undelivered[0]._set.delivered = 0
    write(memory, {2})
    references = [tracker]
    del session, region, flight, tracker

    def child() -> None:
        references.clear()
        parts.clear()
        undelivered.clear()
        gc.collect()
        assert not inherited()

    child_of(fork, child)
    assert [run.start for run in references[0].collect()] == [memory.address + 2 * PAGE]
    undelivered.clear()
    assert [run.start for run in references[0].collect()] == [memory.address + PAGE]


def while_threads_are_inside() -> None:
    """Whichever lock a thread held at the fork, the child neither waits for it nor finds its half-done work.

    By os.fork only: without Python's hooks a child of a process with threads waits for the GIL itself.
    """
    warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons dislike os.fork beside threads
    memory = dirtytrack.allocate(4096 * PAGE)
    quiet = threading.Event()
    with UffdSession() as session:
        region = session.register(memory)
        tracker, other = DirtyTracker(session), DirtyTracker(session)
        tracker.start()
        other.start()

        def works(job: Callable[[], object]) -> None:
            while not quiet.is_set():
                job()

        def tracks() -> None:
            with dirtytrack.track(bytearray(PAGE)):
                pass

        jobs: tuple[Callable[[], object], ...] = (
            lambda: memory.__setitem__(slice(0, 2048 * PAGE, PAGE), bytes(2048)),
            other.collect,
            tracks,
        )
        threads = [threading.Thread(target=works, args=(job,)) for job in jobs]
        for thread in threads:
            thread.start()
        try:
            for _ in range(60):
                write(memory, {4000})

                def child() -> None:
                    assert is_refused(tracker.collect)
                    assert is_refused(lambda: session.register(bytearray(PAGE)))
                    with dirtytrack.track(memory) as mine:
                        write(memory, {4000})
                        assert mine.collect().page_count == 1

                child_of(os.fork, child)
                assert pages_of(tracker.collect(), region)[-1] == 4000
        finally:
            quiet.set()
            for thread in threads:
                thread.join()


@pytest.mark.parametrize(
    "when", [in_the_middle_of_everything, with_everything_dropped_in_the_child, while_threads_are_inside]
)
def test_a_fork(when: Callable[[], None]) -> None:
    run_in_child(when)

# SPDX-License-Identifier: MIT
"""Attaching to a program that knows nothing of us: which pages it writes, while its memory comes, goes and moves."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dirtytrack import DirtySet, process
from dirtytrack.errors import InvalidMemory, NotRegistered, RegionGone, SessionClosed, TargetBusy, TargetGone
from dirtytrack.process import Mapping, ProcessTracker
from tests.asked import SOAK
from tests.points import Points, collect_as_its_caller
from tests.programs.targets import Program, descriptors, is_unharmed, running, tracers

PAGE = 4096


class Memory:
    """What a running ``pages`` does to its memory; what it answers is an address."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.pid = program.pid

    def do(self, *words: object) -> int:
        return int(
            self.program.ask(
                " ".join(f"{w:x}" if i == 1 and words[0] in NAMED else str(w) for i, w in enumerate(words))
            ),
            16,
        )


NAMED = {"write", "over", "unmap", "grow", "move", "again", "discard", "punch", "busy"}


@pytest.fixture
def memory() -> Iterator[Memory]:
    with running("pages") as program:
        yield Memory(program)


def pages_of(dirty: DirtySet, address: int, count: int) -> list[int]:
    return [i for i in range(count) if address + i * PAGE in dirty]


def interrupt() -> None:
    raise KeyboardInterrupt


# An interrupt that meets a finaliser is ignored by Python, which says so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("untracked", [False, True])
def test_interrupted_at_any_point_all_is_pending_still(memory: Memory, untracked: bool) -> None:
    at = memory.do("map", 8)
    if untracked:
        memory.do("busy", memory.do("map", 4), 4)
    with process.attach(memory.pid) as tracker:
        tracker.collect()
        assert bool(tracker._untracked) == untracked
        # With all that is not tracked there are more than a thousand points, most of them in a loop.
        for nth in itertools.count(1, 1 if SOAK or not untracked else 3):
            memory.do("write", at, nth % 8)
            points = Points(nth, interrupt)
            try:
                points.call(lambda: collect_as_its_caller(tracker))
            except KeyboardInterrupt:
                assert nth % 8 in pages_of(tracker.collect(), at, 8), points.where
            if not points.where:
                break
        assert nth > 5


def mapping_at(tracker: ProcessTracker, address: int) -> Mapping:
    return next(m for m in tracker.mappings if m.start <= address < m.end)


def test_exactly_the_pages_that_were_written(memory: Memory) -> None:
    at = memory.do("map", 100)
    with process.attach(memory.pid) as tracker:
        assert 0 < tracker.attach_stall < 5
        assert tracker.epoch == 1
        tracker.collect()
        for page in (0, 7, 99):
            memory.do("write", at, page)
            dirty = tracker.collect()
            assert pages_of(dirty, at, 100) == [page]
            assert dirty.epoch == tracker.epoch - 1
        assert not pages_of(tracker.collect(), at, 100)
        statistics = tracker.statistics()
        assert statistics.collects == 5
        assert statistics.scans > 5
        assert statistics.pages >= 3
        assert statistics.seconds > 0
        assert "epoch 6" in repr(tracker)
    assert "detached" in repr(tracker)
    for call in (tracker.collect, tracker.refresh, tracker.statistics, lambda: tracker.read(dirty)):
        with pytest.raises(SessionClosed):
            call()


def test_reading_the_bytes(memory: Memory) -> None:
    at = memory.do("map", 10)
    with process.attach(memory.pid) as tracker:
        tracker.collect()
        memory.do("write", at, 3)
        memory.do("write", at, 4)
        dirty = tracker.collect()
        with tracker.frozen():  # it may still be on its way to wait for the next line
            data = tracker.read(dirty)
            into = bytearray(len(data) + 5)
            assert tracker.read(dirty, into) == data
        assert into[: len(data)] == data
        assert len(data) == dirty.page_span_bytes == dirty.nbytes
        where = sum(min(run.end, at + 3 * PAGE) - run.start for run in dirty if run.start < at + 3 * PAGE)
        assert data[where] == data[where + PAGE] == 2
        with pytest.raises(InvalidMemory, match="output"):
            tracker.read(dirty, bytearray(len(data) - 1))
        with pytest.raises(NotRegistered, match=r"ProcessTracker\.read"):
            dirty.gather()
        assert len(tracker.read(DirtySet())) == 0
        memory.do("unmap", at, 10)
        with pytest.raises(RegionGone):
            tracker.read(dirty)


def test_the_bytes_of_many_runs(memory: Memory) -> None:
    at = memory.do("map", 4000)
    with process.attach(memory.pid, include=(at, at + 4000 * PAGE)) as tracker:
        for page in range(0, 4000, 3):
            memory.do("write", at, page)
        dirty = tracker.collect()
        assert len(dirty) == 1334
        data = tracker.read(dirty)
        assert [data[i * PAGE] for i in range(1334)] == [2] * 1334


def test_memory_that_comes_grows_moves_and_goes(memory: Memory) -> None:
    with process.attach(memory.pid) as tracker:
        tracker.collect()
        at = memory.do("map", 8)
        assert len(pages_of(tracker.collect(), at, 8)) == 8  # new: dirty as a whole
        assert not pages_of(tracker.collect(), at, 8)
        memory.do("write", at, 5)
        assert pages_of(tracker.collect(), at, 8) == [5]

        grown = memory.do("grow", at, 8, 300)
        dirty = tracker.collect()
        assert set(range(8, 300)) <= set(pages_of(dirty, grown, 300))
        assert not pages_of(tracker.collect(), grown, 300)
        memory.do("write", grown, 200)
        assert pages_of(tracker.collect(), grown, 300) == [200]

        moved = memory.do("move", grown, 300)
        assert len(pages_of(tracker.collect(), moved, 300)) == 300
        memory.do("write", moved, 1)
        assert pages_of(tracker.collect(), moved, 300) == [1]

        memory.do("discard", moved, 2)
        assert pages_of(tracker.collect(), moved, 300) == [2]

        memory.do("again", moved, 300)
        assert len(pages_of(tracker.collect(), moved, 300)) == 300
        memory.do("write", moved, 9)
        assert pages_of(tracker.collect(), moved, 300) == [9]

        memory.do("unmap", moved + 100 * PAGE, 100)  # a hole
        memory.do("write", moved, 99)
        memory.do("write", moved, 200)
        assert {99, 200} <= set(pages_of(tracker.collect(), moved, 300))
        assert not pages_of(tracker.collect(), moved, 300)

        memory.do("unmap", moved, 300)
        assert not pages_of(tracker.collect(), moved, 300)
        assert not [m for m in tracker.mappings if m.start <= moved < m.end]
        assert tracker.statistics().refreshes >= 5


def test_refresh_alone_loses_nothing(memory: Memory) -> None:
    with process.attach(memory.pid) as tracker:
        at = memory.do("map", 8)
        memory.do("write", at, 1)
        tracker.refresh()
        assert mapping_at(tracker, at).state == "tracked"
        assert len(pages_of(tracker.collect(), at, 8)) == 8


def test_shared_memory_and_files_are_for_who_asks(memory: Memory, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(16 * PAGE))
    shared, file = memory.do("share", 16), memory.do("file", path, 16)
    with process.attach(memory.pid) as tracker:
        for address in (shared, file):
            mapping = mapping_at(tracker, address)
            assert mapping.state == "excluded"
            assert "include=" in mapping.reason
        memory.do("write", shared, 3)
        assert not pages_of(tracker.collect(), shared, 16)
    with process.attach(memory.pid, include=["*"]) as tracker:
        tracker.collect()
        memory.do("write", shared, 3)
        memory.do("write", file, 4)
        dirty = tracker.collect()
        assert pages_of(dirty, shared, 16) == [3]
        assert pages_of(dirty, file, 16) == [4]
        memory.do("discard", file, 5)  # its marker survives: remedy R2
        memory.do("punch", shared, 6)
        dirty = tracker.collect()
        assert 5 in pages_of(dirty, file, 16)
        assert 6 in pages_of(dirty, shared, 16)


def test_shared_memory_that_is_mapped_once_more(memory: Memory) -> None:
    shared, other = memory.do("share", 16), memory.do("map", 4)
    with process.attach(memory.pid, include=["*"]) as tracker:
        tracker.collect()
        for _ in range(2):  # over memory that is tracked; over itself
            memory.do("over", shared + 8 * PAGE, 4, other)
            memory.do("write", other, 3)  # before anybody knows of that mapping
            dirty = tracker.collect()
            assert len(pages_of(dirty, other, 4)) == 4
            assert 11 in pages_of(dirty, shared, 16)
        memory.do("write", other, 1)
        dirty = tracker.collect()
        assert pages_of(dirty, other, 4) == [1]
        assert pages_of(dirty, shared, 16) == [9]


def test_filters(memory: Memory) -> None:
    at = memory.do("map", 8)
    with process.attach(memory.pid, include=["[stack]", (at, at + PAGE)], exclude="[heap]") as tracker:
        states = {m.name: m.state for m in tracker.mappings if m.permissions[1] == "w"}
        assert states["[stack]"] == "tracked"
        assert mapping_at(tracker, at).state == "tracked"
        tracker.collect()
        memory.do("write", at, 7)
        assert pages_of(tracker.collect(), at, 8) == [7]
    with process.attach(memory.pid, exclude=["[stack]"]) as tracker:
        assert {m.state for m in tracker.mappings if m.name == "[stack]"} == {"excluded"}
    with pytest.raises(InvalidMemory, match="none is chosen"):
        process.attach(memory.pid, include="no such name")
    for wrong in (5, [(3, 1)], [object()]):
        with pytest.raises(InvalidMemory, match="include takes"):
            process.attach(memory.pid, include=wrong)  # type: ignore[arg-type]


def test_memory_that_another_userfaultfd_has(memory: Memory) -> None:
    at = memory.do("map", 8)
    assert memory.do("busy", at, 8) == at
    with process.attach(memory.pid) as tracker:
        mapping = mapping_at(tracker, at)
        assert mapping.state == "untracked"
        assert "userfaultfd" in mapping.reason
        for _ in range(3):  # always dirty as a whole
            assert len(pages_of(tracker.collect(), at, 8)) == 8
    memory.do("write", at, 1)


def test_two_trackers_cannot_have_the_same_memory(memory: Memory) -> None:
    at = memory.do("map", 8)
    with process.attach(memory.pid) as first, process.attach(memory.pid) as second:
        assert mapping_at(second, at).state == "untracked"
        first.collect()
        memory.do("write", at, 1)
        assert len(pages_of(second.collect(), at, 8)) == 8
        assert pages_of(first.collect(), at, 8) == [1]
        first.detach()
        second.collect()
        assert mapping_at(second, at).state == "tracked"
        second.collect()
        memory.do("write", at, 2)
        assert pages_of(second.collect(), at, 8) == [2]


@pytest.mark.parametrize("alone", [False, True])
def test_memory_that_one_tracker_has_and_the_process_maps_anew(memory: Memory, alone: bool) -> None:
    at = memory.do("map", 8)
    include = (at, at + 8 * PAGE) if alone else None
    with process.attach(memory.pid, include=include) as first, process.attach(memory.pid, include=include) as second:
        first.collect()
        second.collect()
        memory.do("again", at, 8)
        assert len(pages_of(second.collect(), at, 8)) == 8  # before the first has seen that
        memory.do("write", at, 3)
        for tracker in (first, second):
            assert 3 in pages_of(tracker.collect(), at, 8)
        memory.do("write", at, 5)
        for tracker in (second, first):
            assert 5 in pages_of(tracker.collect(), at, 8)
        assert mapping_at(first, at).state == "untracked"
        assert mapping_at(second, at).state == ("tracked" if alone else "untracked")


def test_several_attach_at_once(memory: Memory) -> None:
    """One waits for another, or says that the process is busy; never that it may not."""
    failed: list[BaseException] = []

    def attach() -> None:
        for _ in range(4):
            try:
                with process.attach(memory.pid) as tracker, tracker.frozen():
                    tracker.collect()
            except BaseException as error:
                failed.append(error)

    threads = [threading.Thread(target=attach) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {type(error) for error in failed} <= {TargetBusy}
    assert tracers(memory.pid) == {"0"}
    assert memory.do("map", 1)


def test_another_has_it_frozen(memory: Memory) -> None:
    with process.attach(memory.pid) as tracker, tracker.frozen():
        with pytest.raises(TargetBusy, match="frozen"), tracker.frozen(timeout=0.05):
            pass
        with pytest.raises(TargetBusy, match="traced"):
            process.attach(memory.pid)


def test_detaching_while_others_collect(memory: Memory) -> None:
    at = memory.do("map", 100)
    for milliseconds in range(4):
        tracker = process.attach(memory.pid, include=(at, at + 100 * PAGE))
        ended: list[BaseException] = []

        def work(tracker: ProcessTracker = tracker, ended: list[BaseException] = ended) -> None:
            try:
                while True:
                    tracker.read(tracker.collect())
            except BaseException as why:
                ended.append(why)

        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(milliseconds / 1000)
        tracker.detach()
        thread.join()
        assert [type(error) for error in ended] == [SessionClosed]
        for late in (tracker.collect, lambda tracker=tracker: tracker.frozen().__enter__()):
            with pytest.raises(SessionClosed, match="attach again"):
                late()


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 1e300])
def test_a_time_out_that_is_none(memory: Memory, seconds: float) -> None:
    with pytest.raises(InvalidMemory, match="timeout"):
        process.attach(memory.pid, timeout=seconds)
    with process.attach(memory.pid) as tracker, pytest.raises(InvalidMemory, match="timeout"):
        tracker.frozen(timeout=seconds).__enter__()


# ---- the target does not notice


@pytest.mark.parametrize("times", [2, pytest.param(100, marks=pytest.mark.soak)])
def test_waits_go_on_as_if_nothing_had_happened(times: int) -> None:
    with running("target") as program:
        before = descriptors(program)
        for _ in range(times):
            with process.attach(program.pid) as tracker:
                for _ in range(2):
                    with tracker.frozen():
                        tracker.collect()
                        time.sleep(0.005)  # a child of its ends
            is_unharmed(program, fds=before)


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_stopped_process_stays_stopped() -> None:
    with running("target", 3) as program:
        os.kill(program.pid, signal.SIGSTOP)
        while state_of(program.pid) != "T":
            time.sleep(0.001)
        with process.attach(program.pid) as tracker:
            with tracker.frozen():
                assert state_of(program.pid) == "t"
            tracker.collect()
            time.sleep(0.05)
            assert state_of(program.pid) == "T"
            assert not tracker.collect()
            os.kill(program.pid, signal.SIGCONT)
            assert program.ask() == "well"
        is_unharmed(program)


def test_nothing_is_written_while_frozen() -> None:
    with running("target") as program, process.attach(program.pid) as tracker:
        with tracker.frozen():
            tracker.collect()
            time.sleep(0.02)
            assert not tracker.collect()
            assert "0" not in tracers(program.pid)
        assert program.ask() == "well"
        assert tracker.collect()


def test_registers_of_every_thread_whoever_stops_first() -> None:
    """The stop of one that comes while another is waited for was once taken for its end."""
    with running("consistent", 3) as program, process.attach(program.pid) as tracker:
        program.answer()
        for _ in range(25):
            with tracker.frozen(registers=True) as frozen:
                tasks = {int(task.name) for task in Path(f"/proc/{program.pid}/task").iterdir()}
                assert {each.tid for each in frozen.threads} == tasks
            assert frozen.threads[0].tid == program.pid
            assert 0 < frozen.seconds < 5
            assert f"{len(tasks)} threads" in repr(frozen)
        with pytest.raises(InvalidMemory, match="ptrace"), tracker.frozen(by="cgroup", registers=True):
            pass
        with tracker.frozen() as frozen:
            assert frozen.threads == ()


def test_a_signal_that_arrives_while_frozen_is_handled() -> None:
    with running("target", 2) as program, process.attach(program.pid) as tracker:
        with tracker.frozen():
            os.kill(program.pid, signal.SIGUSR1)
            os.kill(program.pid, signal.SIGSTOP)
        while state_of(program.pid) != "T":
            time.sleep(0.001)
        os.kill(program.pid, signal.SIGCONT)
        assert program.ask() == "well"


def test_a_thread_that_waits_for_vfork_is_passed_over(memory: Memory) -> None:
    memory.do("vfork", 1500)
    with process.attach(memory.pid) as tracker:
        at = memory.do("map", 3)
        assert len(pages_of(tracker.collect(), at, 3)) == 3
        with pytest.raises(TargetBusy), tracker.frozen(timeout=0.1):
            pass
        memory.do("write", at, 1)  # it runs


def test_a_process_whose_only_thread_waits_for_vfork(memory: Memory) -> None:
    assert memory.program.process.stdin is not None
    memory.program.process.stdin.write("vfork-alone 1000\n")
    memory.program.process.stdin.flush()
    while state_of(memory.pid) != "D":
        time.sleep(0.001)
    begun = time.monotonic()
    with pytest.raises(TargetBusy, match="vfork"):
        process.attach(memory.pid, timeout=0.2)
    assert time.monotonic() - begun < 5
    assert memory.program.answer()
    with process.attach(memory.pid) as tracker:
        tracker.collect()


def test_children_run_untracked(memory: Memory) -> None:
    with process.attach(memory.pid) as tracker:
        tracker.collect()
        memory.do("vfork-alone", 1)
        assert not psutil.Process(memory.pid).children()
        tracker.collect()


# ---- it ends


def test_a_target_that_ends() -> None:
    with running("pages") as program:
        tracker = process.attach(program.pid)
        dirty = tracker.collect()
    # Its parent has waited for it by now, and its number may be another's.
    for call in (tracker.collect, tracker.refresh, lambda: tracker.read(dirty), lambda: tracker.frozen().__enter__()):
        with pytest.raises(TargetGone, match=str(program.pid)) as caught:
            call()
        assert caught.value.pid == program.pid
    tracker.detach()
    tracker.detach()


def test_a_number_that_is_anothers_by_now() -> None:
    last = Path("/proc/sys/kernel/ns_last_pid")
    if os.geteuid() != 0 or not last.exists():
        return
    with running("pages") as program:
        tracker = process.attach(program.pid)
        dirty = tracker.collect()
    for _ in range(200):
        last.write_text(str(program.pid - 1))
        with running("target", 0) as another:
            if another.pid != program.pid:  # somebody was quicker
                continue
            frozen = tracker.frozen()
            for call in (tracker.collect, tracker.refresh, lambda: tracker.read(dirty), frozen.__enter__):
                with pytest.raises(TargetGone):
                    call()
            is_unharmed(another)
            break
    else:
        raise AssertionError("the number was never given out again")
    tracker.detach()


def test_a_target_that_is_a_zombie() -> None:
    with running("target", 0) as program:
        tracker = process.attach(program.pid)
        program.process.stdin.close()  # type: ignore[union-attr]
        while state_of(program.pid) != "Z":
            time.sleep(0.001)
        with pytest.raises(TargetGone, match="ended"):
            tracker.collect()
        with pytest.raises(TargetGone, match="zombie"):
            process.attach(program.pid)
        tracker.detach()


def test_a_target_whose_end_takes_a_while() -> None:
    """Its memory is given back, of which it has much, before its pidfd tells that it ended."""
    for _ in range(3):
        with pytest.raises(AssertionError), running("pages") as program:  # it does not end well
            program.ask("map 24000")
            with process.attach(program.pid) as tracker:
                program.process.kill()
                with pytest.raises(TargetGone) as caught:
                    while True:
                        tracker.collect()
        assert f"{program.pid} ended" in str(caught.value) or f"{program.pid} is ending" in str(caught.value)


def test_a_target_that_replaces_itself(memory: Memory) -> None:
    with process.attach(memory.pid) as tracker:
        tracker.collect()
        assert memory.program.ask("exec") == "up"
        with pytest.raises(TargetGone, match="replaced itself by exec:"):
            tracker.collect()
    with process.attach(memory.pid) as tracker:
        at = memory.do("map", 4)
        assert len(pages_of(tracker.collect(), at, 4)) == 4


def test_a_target_that_is_killed_meanwhile() -> None:
    for delay in (0.0, 0.01, 0.02, 0.03, 0.05):
        with pytest.raises(AssertionError), running("target", 4) as program:  # it does not end well
            killer = threading.Timer(delay, program.process.kill)
            killer.start()
            with pytest.raises(TargetGone), process.attach(program.pid) as tracker:
                while True:
                    tracker.read(tracker.collect())
                    with tracker.frozen():
                        tracker.collect()
            killer.join()

# SPDX-License-Identifier: MIT
"""Recording this process's own memory, and telling what a block of code wrote."""

from __future__ import annotations

import errno
import io
import queue
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import dirtytrack
from dirtytrack import DirtySet, observe
from dirtytrack.errors import AlreadyStarted, InvalidMemory, InvalidRecording, LimitReached, NotStarted, TargetGone
from dirtytrack.observe import Observed, Recorder, Recording, dirtied
from dirtytrack.process import Mapping
from tests.oracle import PAGE


def pages_of(recording: Recording) -> set[int]:
    return {
        page
        for epoch in recording
        for start, end in np.asarray(epoch.runs).reshape(-1, 2).tolist()
        for page in range(start, end, PAGE)
    }


def test_everything_that_is_written_is_in_the_recording(tmp_path: Path) -> None:
    table, state = dirtytrack.allocate(512 * PAGE, name="table"), dirtytrack.allocate(8 * PAGE, name="state")
    path, told, written = tmp_path / "r", list[Observed](), set[int]()
    with dirtytrack.track(table, state, exact=True) as tracker:
        base = {memory.name: tracker.regions[i].start for i, memory in enumerate((table, state))}
        with Recorder(tracker, path, every=0.005, command="a test", told=told.append) as recorder:
            for i in range(200):
                page = i * 37 % 512
                table[page * PAGE] = i % 256
                written.add(base["table"] + page * PAGE)
                if i % 50 == 0:
                    state[i // 50 * PAGE] = 1
                    written.add(base["state"] + i // 50 * PAGE)
                    seen, end = len(told), time.monotonic() + 20
                    while len(told) == seen and time.monotonic() < end:
                        time.sleep(0.005)
        assert not tracker.peek()
    recording = Recording.open(path)
    assert pages_of(recording) == written
    assert [mapping.name for mapping in recording.mappings] == [
        name for name, _ in sorted(base.items(), key=lambda each: each[1])
    ]
    assert recording[0].resident_pages == 520
    assert [(s.pid, s.command) for s in recording.sessions] == [(0, "a test")]
    did = recorder.statistics()
    assert did.epochs == len(recording) == len(told) > 3
    assert did.pages == sum(epoch.page_count for epoch in recording) == sum(each.dirty.page_count for each in told)
    assert did.nbytes == path.stat().st_size
    assert 0 < did.cpu_seconds <= did.seconds
    assert recording.ends[0].cpu_ns == pytest.approx(did.cpu_seconds * 1e9, abs=1e3)
    assert recording.sessions[0].first_write_ns > 0
    assert all(before.ended == pytest.approx(after.begun) for before, after in pairwise(recording))
    assert {share.name: share.distinct_pages for share in observe.by_mapping(recording[:])} == {
        "table": len({page for page in written if base["table"] <= page < base["table"] + 512 * PAGE}),
        "state": 4,
    }
    with pytest.raises(AlreadyStarted):
        recorder.start()
    assert recorder.stop() == did


def test_regions_that_come_and_go_while_it_records(tmp_path: Path) -> None:
    first, second = dirtytrack.allocate(4 * PAGE, name="first"), dirtytrack.allocate(4 * PAGE, name="second")
    told = queue.Queue[set[str]]()

    def until_recorded(*names: str) -> None:
        """Epochs of before may be waiting: a thread that had no processor for a while is behind the recorder."""
        while told.get() != set(names):
            pass

    with (
        dirtytrack.track(first) as tracker,
        Recorder(
            tracker,
            tmp_path / "r",
            every=0.002,
            told=lambda each: told.put({mapping.name for mapping in each.mappings}),
        ),
    ):
        until_recorded("first")
        region = tracker.add(second)
        until_recorded("first", "second")
        tracker.remove(region)
        until_recorded("first")
    names = [tuple(sorted(mapping.name for mapping in epoch.mappings)) for epoch in Recording.open(tmp_path / "r")]
    assert [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name] == [
        ("first",),
        ("first", "second"),
        ("first",),
    ]


class Ending:
    """A source that fails in its third collect."""

    pid = 0
    epoch = 1
    mappings = (Mapping(PAGE, 9 * PAGE, "rw-p", 0, "00:00", 0, "[heap]", "tracked", ""),)

    def __init__(self, error: Exception) -> None:
        self.error, self.collects, self.back = error, 0, list[DirtySet]()

    def collect(self) -> DirtySet:
        self.collects += 1
        if self.collects == 3:
            raise self.error
        return DirtySet()

    def put_back(self, dirty: DirtySet) -> None:
        self.back.append(dirty)


def test_a_target_that_goes_ends_the_recording(tmp_path: Path) -> None:
    recorder = Recorder(Ending(TargetGone("process 7 ended", pid=7)), tmp_path / "r", every=0.001)
    recorder.start()
    assert recorder.wait(30)
    assert recorder.stop().epochs == 2
    assert str(recorder.gone) == "process 7 ended"
    recording = Recording.open(tmp_path / "r")
    assert (len(recording), [end.reason for end in recording.ends]) == (2, ["process 7 ended"])


def test_a_failure_ends_the_recording_and_is_raised(tmp_path: Path) -> None:
    with (
        pytest.raises(InvalidMemory, match="broken"),
        Recorder(Ending(InvalidMemory("broken")), tmp_path / "r", every=0.001) as recorder,
    ):
        assert recorder.wait(30)
    assert [end.reason for end in Recording.open(tmp_path / "r").ends] == ["failed: broken"]
    with pytest.raises(ZeroDivisionError), Recorder(Ending(InvalidMemory("broken")), tmp_path / "s", every=0.001) as it:
        assert it.wait(30)
        raise ZeroDivisionError


def test_what_could_not_be_written_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = dirtytrack.allocate(4 * PAGE)
    with dirtytrack.track(memory) as tracker:
        recorder = Recorder(tracker, tmp_path / "r", every=0.001)

        def full(*args: object, **named: object) -> None:
            raise LimitReached("the disk is full", errno=errno.ENOSPC)

        monkeypatch.setattr(recorder._writer, "write", full)
        memory[2 * PAGE] = 1
        recorder.start()
        assert recorder.wait(30)
        with pytest.raises(LimitReached, match="the disk is full"):
            recorder.stop()
        assert tracker.collect().pages().tolist() == [2]


def test_how_a_recorder_cannot_be_made(tmp_path: Path) -> None:
    source = Ending(InvalidMemory(""))
    for every in (0, -1, float("inf"), float("nan")):
        with pytest.raises(InvalidRecording, match="every is a time"):
            Recorder(source, tmp_path / "r", every=every)
    with pytest.raises(NotStarted):
        Recorder(source, tmp_path / "r").stop()


# ---- blocks


def test_a_block_tells_what_it_wrote() -> None:
    rows = np.zeros((300, 512))  # a row is a page long
    idle, plain = dirtytrack.allocate(4 * PAGE), dirtytrack.allocate(4 * PAGE)
    out = io.StringIO()
    with dirtied({"rows": rows, "idle": idle, "plain": plain}, file=out) as block:
        rows[100:110] = 1
        rows[200] = 1
        plain[2 * PAGE] = 1
    found = {each.name: each for each in block.buffers}
    assert found.keys() == {"rows", "plain"}
    assert block.buffers[0].name == "rows"
    assert {100, 109, 200} <= {row for part in found["rows"].rows for row in part} <= {*range(99, 111), 199, 200, 201}
    assert (found["rows"].unit, found["plain"].unit) == ("row", "byte")
    assert found["plain"].rows == (range(2 * PAGE, 3 * PAGE),)
    assert block.dirty.page_count == sum(each.page_count for each in block.buffers)
    assert block.seconds > 0
    first, second, third = out.getvalue().splitlines()
    assert first.startswith("2 of 3 buffers dirtied in ")
    assert second.startswith("  rows ")
    assert ", rows 99.." in second or ", rows 100.." in second
    assert third == f"  plain  1 of 4 pages, bytes {2 * PAGE}..{3 * PAGE - 1}"


def test_a_function_tells_at_each_call(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = np.frombuffer(dirtytrack.allocate(32 * PAGE), np.int64)

    @dirtied({"numbers": numbers})
    def step(at: int) -> int:
        numbers[at] += 1
        return at

    assert [step(0), step(3000)] == [0, 3000]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "1 of 1 buffer dirtied in" in lines[0]
    assert ": 1 page, 4.00 KiB" in lines[0]
    assert lines[1].startswith("  numbers  1 of ")
    assert ", elements 0.." in lines[1]
    assert lines[3] != lines[1]


def test_a_block_that_writes_much_tells_the_first_parts_only() -> None:
    rows = np.zeros((300, 1024))
    with dirtied(rows, file=None) as block:
        rows[::10] = 1
    assert str(block).endswith(" and 22 more")
    assert len(block.buffers[0].rows) == 30


def test_a_block_that_fails_tells_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    memory = dirtytrack.allocate(PAGE, name="memory")
    block = dirtied(memory)
    with pytest.raises(NotStarted):
        _ = block.dirty
    with pytest.raises(ZeroDivisionError), block:
        memory[0] = 1
        raise ZeroDivisionError
    assert "memory" in capsys.readouterr().out
    with pytest.raises(InvalidMemory), dirtied(b"read-only"):
        pass
    with dirtied(memory, file=None) as idle:
        pass
    assert idle.buffers == ()
    assert str(idle).endswith(": 0 pages, 0")

# SPDX-License-Identifier: MIT
"""`dirtytrack record`, `report` and `plan` on programs that know nothing of us."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest

from dirtytrack.cli import main
from dirtytrack.observe import Recorder, Recording
from dirtytrack.process import attach
from tests.oracle import PAGE

PYTHON = str(Path(sys.executable).resolve())
# Writes one page of its array for each number that it reads, then says where that page is.
WRITER = """
import ctypes, mmap, sys
memory = mmap.mmap(-1, 256 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
print(address, flush=True)
for line in sys.stdin:
    memory[int(line) * 4096] = 1
    print("ok", flush=True)
"""
# Writes steadily for a time, then ends with a status.
STEADY = """
import mmap, sys, time
memory = mmap.mmap(-1, 512 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
end, i = time.monotonic() + float(sys.argv[1]), 0
while time.monotonic() < end:
    memory[i * 7 % 512 * 4096] = i % 256
    i += 1
    time.sleep(0.0005)
sys.exit(int(sys.argv[2]))
"""


def dirtytrack(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dirtytrack", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, **options)


@contextmanager
def running(code: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen([PYTHON, "-c", code, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        yield child
    finally:
        child.stdin.close()
        child.stdout.close()
        child.kill()
        child.wait()


def pages_of(recording: Recording) -> set[int]:
    edges = [np.asarray(epoch.runs).reshape(-1, 2).tolist() for epoch in recording]
    return {page for runs in edges for start, end in runs for page in range(start, end, PAGE)}


def ask(child: subprocess.Popen[str], page: int) -> None:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(f"{page}\n")
    child.stdin.flush()
    assert child.stdout.readline() == "ok\n"


def test_what_another_process_writes_is_in_the_recording(tmp_path: Path) -> None:
    path = tmp_path / "r"
    with running(WRITER) as child:
        assert child.stdout is not None
        base = int(child.stdout.readline())
        with attach(child.pid) as tracker:
            ask(child, 1)
            with Recorder(tracker, path, every=0.003) as recorder:
                for i in range(60):
                    ask(child, i * 5 % 256)
                    time.sleep(0.0005)
            assert recorder.gone is None
        ask(child, 2)  # it was let go, and lives
        recording = Recording.open(path)
        inside = {(page - base) // PAGE for page in pages_of(recording) if 0 <= page - base < 256 * PAGE}
        assert inside == {1, *(i * 5 % 256 for i in range(60))}
        assert recording.sessions[0].pid == child.pid
        stacks = [mapping for mapping in recording.mappings if mapping.name == "[stack]"]
        assert [mapping.state for mapping in stacks] == ["tracked"]
        assert recording[-1].resident_pages > 256


def test_a_target_that_ends_midway_leaves_what_was_recorded(tmp_path: Path) -> None:
    path = tmp_path / "r"
    with running(WRITER) as child:
        assert child.stdout is not None
        base = int(child.stdout.readline())
        with attach(child.pid) as tracker:
            recorder = Recorder(tracker, path, every=0.02)
            recorder.start()
            ask(child, 9)
            while not recorder.statistics().epochs:
                time.sleep(0.005)
            child.kill()
            assert recorder.wait(30)
            assert recorder.stop().epochs >= 1
            assert recorder.gone is not None
            assert recorder.gone.pid == child.pid
    recording = Recording.open(path)
    assert base + 9 * PAGE in pages_of(recording)
    assert str(child.pid) in recording.ends[0].reason


def test_a_command_is_recorded_and_its_status_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(*words: str | Path, status: int = 0) -> str:
        assert main([*map(str, words)]) == status
        out = capsys.readouterr()
        return out.err if status else out.out

    path = tmp_path / "r"
    done = dirtytrack("record", "-o", path, "--every", "20ms", "--", PYTHON, "-c", STEADY, "0.6", "7")
    assert done.returncode == 7, done.stderr
    assert "recording took" in done.stderr
    assert "of one processor" in done.stderr
    assert "first writes" in done.stderr
    report = json.loads(told("report", path, "--json"))
    assert report["epochs"] >= 5
    assert report["pid"] > 0
    assert "sys.exit" in report["command"]
    assert report["ended"].startswith(f"process {report['pid']} ")
    assert {mapping["name"] for mapping in report["mappings"]} >= {"[heap]", "[stack]", "[anon]"}
    assert report["working_set"][-1]["mean_pages"] >= 512
    words = told("report", path)
    for part in ("Rate:", "Mappings", "Written working set", "Hot set", "[heap]"):
        assert part in words
    plan = told("plan", path, "--interval", "100ms", "--bandwidth", "1Gbit", "--downtime", "20ms")
    assert "<- asked for" in plan
    assert "Pre-copy" in plan
    numbers = json.loads(told("plan", path, "--first-write", "1us", "--json"))
    assert numbers["first_write_seconds"] == pytest.approx(1e-6)
    assert numbers["checkpoints"]["full_nbytes"] >= 512 * PAGE
    assert numbers["precopy"]["verdict"]
    only = json.loads(told("report", path, "--json", "--mapping", "[stack]"))
    assert {mapping["name"] for mapping in only["mappings"]} == {"[stack]"}
    assert only["pages"] < report["pages"]
    none = told("report", path, "--mapping", "nothing*", status=1)
    assert none.startswith("dirtytrack: no mapping matches 'nothing*'; there are: ")


def test_a_command_that_replaces_itself_is_attached_to_again(tmp_path: Path) -> None:
    path = tmp_path / "r"
    shell = 'sleep 0.2; exec "$0" -c "$1" 0.4 3'
    done = dirtytrack("record", "-o", path, "--every", "20ms", "--", "/bin/sh", "-c", shell, PYTHON, STEADY)
    assert done.returncode == 3, done.stderr
    assert "replaced itself by exec" in done.stderr
    recording = Recording.open(path)
    assert len(recording.sessions) == len(recording.ends) == 2
    assert "exec" in recording.ends[0].reason
    assert max(epoch.page_count for epoch in recording) > 10


def test_a_running_process_until_a_signal_says_so(tmp_path: Path) -> None:
    path = tmp_path / "r"
    with running(STEADY, "30", "0") as child:
        words = [sys.executable, "-m", "dirtytrack", "record", "-p", str(child.pid), "-o", str(path), "--metrics", ":0"]
        recorder = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        assert recorder.stderr is not None
        with recorder.stderr:
            where = recorder.stderr.readline().partition("metrics: ")[2].strip()
            while True:
                with urlopen(where, timeout=10) as answer:
                    lines = answer.read().decode()
                if f'dirtytrack_epochs_total{{pid="{child.pid}"}}' in lines:
                    break
                time.sleep(0.05)
            assert "dirtytrack_mapping_dirty_pages_total{" in lines
            assert len(Recording.open(path)) >= 1  # it can be read while it is written
            recorder.send_signal(signal.SIGINT)
            rest = recorder.stderr.read()
        assert recorder.wait(30) == 0, rest
        assert "recording took" in rest
        assert child.poll() is None
        assert [end.reason for end in Recording.open(path).ends] == ["stopped"]
        again = dirtytrack("record", "-p", str(child.pid), "-o", path, "--append", "--for", "50ms", "--every", "10ms")
        assert again.returncode == 0, again.stderr
        recording = Recording.open(path)
        assert len(recording.sessions) == 2
        assert child.poll() is None


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["-p", "2147483000", "-o", "r"], "2147483000"),
        (["-o", "r", "--", "/no/such/program"], "cannot be started: No such file"),
        (["-o", "r", "--", "/etc/passwd"], "cannot be started: Permission denied"),
        (["-o", "r"], "either --pid PID or -- COMMAND"),
        (["-p", "1", "-o", "r", "--", "true"], "either --pid PID or -- COMMAND"),
        (["-p", "1", "-o", "r", "--every", "100"], "argument --every: '100' is no time: it has no unit"),
        (["-p", "1", "-o", "r", "--size-budget", "64M"], "'64M' is no size"),
        (["-p", "1", "-o", "r", "--metrics", "here"], "'here' is no address"),
        (["-o", "none/r", "--", "sleep", "60"], "No such file or directory. Make its folder first"),
        (["-o", "r", "--include", "nothing*", "--", "sleep", "60"], "nothing*"),
        (["-o", "r", "--size-budget", "1KiB", "--", "sleep", "60"], "takes 16384 at least"),
    ],
)
def test_what_cannot_be_recorded(
    tmp_path: Path, words: list[str], why: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    try:
        status = main(["record", *words])
    except SystemExit as refused:  # by argparse
        status = int(str(refused.code))
    assert status != 0
    assert why in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "No such file"),
        (b"", "is empty"),
        (b"what?", "is no recording"),
        (b"DTR\x09" + bytes(40), "of version 9, this library reads version 1"),
        (b"DTR\x01\x0c", "cut short"),
    ],
    ids=["none", "empty", "another kind", "another version", "cut short"],
)
def test_what_is_no_recording(
    tmp_path: Path, content: bytes | None, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r"
    if content is not None:
        path.write_bytes(content)
    for command in ("report", "plan"):
        assert main([command, str(path)]) == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("dirtytrack: ")
        assert why in said.err

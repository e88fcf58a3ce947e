# SPDX-License-Identifier: MIT
"""How the `dirtytrack` command fails: by its exit status, in words on standard error. Takes 3 s of CI's 20 min."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dirtytrack.cli import main
from dirtytrack.errors import LimitReached
from tests.kernel.failures.world import assert_finds_a_write, take_the_last_descriptors
from tests.sandbox import run_in_child


def says_what_is_missing() -> None:
    assert main(["doctor"]) == 1


def test_the_doctor_where_tracking_does_not_work() -> None:
    assert "Tracking does not work" in run_in_child(says_what_is_missing, "no-device", "seccomp-eperm")


def cannot_show_anything() -> None:
    assert main(["demo"]) == 2


def test_the_demo_where_tracking_does_not_work() -> None:
    run_in_child(cannot_show_anything, "no-wp-async")


def has_too_few_descriptors() -> None:
    held = take_the_last_descriptors()
    os.close(held.pop())  # for what it reads
    assert main(["demo"]) == 1
    for fd in held:
        os.close(fd)
    assert_finds_a_write()


def test_the_demo_without_resources() -> None:
    run_in_child(has_too_few_descriptors, "64-descriptors")


def test_a_command_that_meets_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise LimitReached("cannot probe: too much of everything")

    monkeypatch.setattr("dirtytrack.cli.doctor.probe", fails)
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == "dirtytrack: cannot probe: too much of everything\n"


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["doctor", "--unknown"], ["demo", "--epochs", "0"]])
def test_a_command_that_is_not_understood(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: dirtytrack" in capsys.readouterr().err


def test_a_command_whose_reader_has_gone() -> None:
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-W", "error", "-m", "dirtytrack", "doctor"]
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, check=False)
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_command_that_is_interrupted(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dirtytrack", "demo"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as child:
        assert child.stdout
        child.stdout.readline()  # it has begun
        child.send_signal(signal.SIGINT)
        child.communicate()
    assert child.returncode == 130

# SPDX-License-Identifier: MIT
"""Other processes: the rows of docs/failures.md about them. More of each is in tests/programs."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import subprocess
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dirtytrack import process
from dirtytrack.dirtyset import _unpickled
from dirtytrack.errors import (
    InvalidMemory,
    PermissionDenied,
    RegionGone,
    SessionClosed,
    TargetBusy,
    TargetGone,
    UnsupportedKernel,
)
from tests.cgroups import NO_CGROUP, is_frozen, made
from tests.sandbox import NOBODY, run_in_child

WAITING = "print(flush=True); input()"


@pytest.fixture
def target() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", WAITING], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as started:
        assert started.stdout is not None
        started.stdout.readline()
        yield started
        started.kill()


def test_attaching_to_this_process() -> None:
    with pytest.raises(InvalidMemory, match="track"):
        process.attach(os.getpid())


def test_attaching_to_nobody() -> None:
    with pytest.raises(TargetGone) as caught:
        process.attach((1 << 22) - 1)
    assert caught.value.errno == errno.ESRCH
    assert caught.value.pid == (1 << 22) - 1


def test_attaching_to_one_that_is_traced(target: subprocess.Popen[bytes]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long] * 4
    assert libc.ptrace(0x4206, target.pid, 0, 0) == 0  # PTRACE_SEIZE
    with pytest.raises(TargetBusy) as caught:
        process.attach(target.pid)
    assert caught.value.pid == target.pid


def test_attaching_where_the_filters_match_nothing(target: subprocess.Popen[bytes]) -> None:
    with pytest.raises(InvalidMemory, match="none is chosen"):
        process.attach(target.pid, include="nothing is called so")


def attach_to_its_parent() -> None:
    with pytest.raises(PermissionDenied) as caught:
        process.attach(os.getppid())
    assert caught.value.errno in (errno.EPERM, errno.EACCES)


def test_attaching_to_another_users() -> None:
    if os.geteuid() == 0:
        run_in_child(attach_to_its_parent, "nobody")


def test_collecting_after_the_process_ended(target: subprocess.Popen[bytes]) -> None:
    with process.attach(target.pid) as tracker:
        target.kill()
        target.wait()
        with pytest.raises(TargetGone) as caught:
            tracker.collect()
        assert caught.value.pid == target.pid


def test_collecting_after_detaching(target: subprocess.Popen[bytes]) -> None:
    tracker = process.attach(target.pid)
    tracker.detach()
    with pytest.raises(SessionClosed, match="detached"):
        tracker.collect()


def test_a_cgroup_that_cannot_be_frozen(target: subprocess.Popen[bytes]) -> None:
    with process.attach(target.pid) as tracker:  # it is in our cgroup, root or not
        with pytest.raises((InvalidMemory, UnsupportedKernel), match='by="ptrace"') as caught:
            tracker.frozen(by="cgroup").__enter__()
        assert caught.value.pid == target.pid
        with pytest.raises(InvalidMemory, match="by takes"):
            tracker.frozen(by="force").__enter__()  # type: ignore[arg-type]


def move(target: subprocess.Popen[bytes], group: Path) -> None:
    try:
        (group / "cgroup.procs").write_text(str(target.pid))
    except OSError as error:
        pytest.skip(f"{NO_CGROUP}: {error}")


@contextmanager
def in_a_group() -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    command = [sys.executable, "-c", WAITING]
    with (
        made(f"dirtytrack-{os.getpid()}") as group,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as started,
    ):
        assert started.stdout is not None
        started.stdout.readline()
        try:
            move(started, group)
            yield started, group
        finally:
            started.kill()


def freeze_without_permission(tracker: process.ProcessTracker) -> None:
    with pytest.raises(PermissionDenied, match=r"may not be written.*delegate") as caught:
        tracker.frozen(by="cgroup").__enter__()
    assert caught.value.errno in (errno.EACCES, errno.EROFS)


def test_freezing_without_permission() -> None:
    with in_a_group() as (target, group), process.attach(target.pid) as tracker:
        (group / "cgroup.freeze").chmod(0o444)
        before = os.geteuid()
        os.seteuid(before or NOBODY)
        try:
            freeze_without_permission(tracker)
        finally:
            os.seteuid(before)
        (group / "cgroup.freeze").chmod(0o644)


def test_freezing_one_that_does_not_stop_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with in_a_group() as (target, group), process.attach(target.pid) as tracker:
        monkeypatch.setattr(os, "pread", lambda *_: b"populated 1\nfrozen 0\n")  # as it says while a thread runs
        with pytest.raises(TargetBusy, match="thread of its cgroup") as caught:
            tracker.frozen(by="cgroup", timeout=0.01).__enter__()
        monkeypatch.undo()
        assert caught.value.pid == target.pid
        assert not is_frozen(group)


def test_reading_what_is_not_mapped(target: subprocess.Popen[bytes]) -> None:
    numbers = array("Q", [0x1000, 0x2000]).tobytes()
    nowhere = _unpickled(numbers, 1, True, (), b"")
    with process.attach(target.pid) as tracker:
        with pytest.raises(RegionGone) as caught:
            tracker.read(nowhere)
        assert caught.value.errno == errno.EFAULT
        assert caught.value.start == 0x1000


def test_accepting_what_is_no_offer() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"no offer")
        with pytest.raises(InvalidMemory, match="no offer"):
            process.accept(ours)

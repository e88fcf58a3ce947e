# SPDX-License-Identifier: MIT
"""Whoever attached dies, at every step and at any moment: the target goes on, unharmed and unprotected."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial

import psutil
import pytest

import dirtytrack
from dirtytrack import process
from dirtytrack.errors import KernelRefused
from dirtytrack.kernel import core, targets
from dirtytrack.kernel.targets import Fault
from dirtytrack.process.attaching import attach_with_fault
from tests.programs.targets import Program, descriptors, is_unharmed, running
from tests.sandbox import check, libc

_PR_SET_CHILD_SUBREAPER = 36
others: set[int] = set()
"""Children from before: multiprocessing has one that stays."""


def in_child(what: Callable[[], object]) -> int:
    """Call it in a forked child, which is a tracker of its own; the wait status."""
    child = os.fork()
    if not child:
        try:
            what()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def killed(status: int) -> bool:
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.fixture(autouse=True)
def foster_parent() -> Iterator[None]:
    """Guardians whose tracker died become children of this process, so that none is overlooked."""
    others.update(child.pid for child in psutil.Process().children())
    check(libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
    yield
    check(libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0))


def settled(program: Program) -> None:
    """A guardian whose tracker died still has its work to do."""
    for child in psutil.Process().children():
        if child.pid != program.pid and child.pid not in others:
            child.wait(timeout=20)


def attach_and_use(pid: int) -> None:
    with process.attach(pid) as tracker:
        for _ in range(3):
            tracker.read(tracker.collect())
        with tracker.frozen():
            tracker.collect()


def test_the_tracker_dies_at_each_step_of_its_guardian() -> None:
    with running("target", 2) as program:
        before = descriptors(program)
        step, died = 0, True
        while died:
            step += 1
            fault = Fault(step, tracker=True)
            died = killed(in_child(partial(attach_with_fault, program.pid, None, None, 2.0, None, fault)))
            settled(program)
            is_unharmed(program, fds=before)
        assert step > 15


def test_the_tracker_dies_before_each_of_its_own_calls() -> None:
    dirtytrack.UffdSession().close()  # what the kernel needs is tried once, here
    names = "SCAN", "REGISTER", "UNREGISTER", "PROTECT", "API", "COPY"
    sites = sum(int(getattr(core.lib, f"DT_SITE_{name}")) for name in names)
    with running("target", 1) as program:
        before = descriptors(program)

        def track(nth: int) -> None:
            targets.kill_after(sites, nth)
            attach_and_use(program.pid)

        nth, died = 0, True
        while died:
            nth += 1
            died = killed(in_child(partial(track, nth)))
            settled(program)
            is_unharmed(program, fds=before)
        assert nth > 15


def test_the_guardian_dies_after_each_of_its_steps() -> None:
    """What stays is said in docs/processes.md: one descriptor that nothing was done with; waits may end early."""
    with running("target", 2, "lenient") as program:
        before = descriptors(program)
        step = 0
        while True:
            step += 1
            try:
                attach_with_fault(program.pid, None, None, 2.0, None, Fault(step)).detach()
                break
            except KernelRefused as error:
                assert "SIGKILL" in str(error)
            is_unharmed(program)
        assert step > 15
        assert set(descriptors(program)) <= {*before, "anon_inode:[userfaultfd]"}


@pytest.mark.parametrize("moments", [10, pytest.param(200, marks=pytest.mark.soak)])
@pytest.mark.parametrize("freeze", [False, True], ids=["tracking", "frozen"])
def test_the_tracker_dies_at_any_moment(freeze: bool, moments: int) -> None:
    chance = random.Random(int(freeze))

    def track(pid: int) -> None:
        with process.attach(pid) as tracker:
            while True:
                tracker.read(tracker.collect())
                if freeze:
                    with tracker.frozen():
                        tracker.collect()

    with running("target", 4) as program:
        before = descriptors(program)
        for _ in range(moments):
            child = os.fork()
            if not child:
                try:
                    track(program.pid)
                finally:
                    os._exit(1)
            time.sleep(chance.random() * 0.15)
            os.kill(child, signal.SIGKILL)
            assert killed(os.waitpid(child, 0)[1])
            settled(program)
            is_unharmed(program, fds=before)

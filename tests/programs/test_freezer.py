# SPDX-License-Identifier: MIT
"""A process is frozen with its cgroup: nothing of it moves meanwhile, and it goes on whoever is killed."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from dirtytrack import process
from dirtytrack.errors import (
    DirtyTrackError,
    InvalidMemory,
    KernelRefused,
    SessionClosed,
    TargetBusy,
    TargetGone,
    UnsupportedKernel,
)
from dirtytrack.process.freezer import group_of
from tests.cgroups import NO_CGROUP, is_frozen, made, mount_point
from tests.programs.targets import Program, is_unharmed, running, tracers
from tests.sandbox import check, libc

_CLONE_NEWNS, _MS_REC, _MS_PRIVATE, _MNT_DETACH = 0x20000, 1 << 14, 1 << 18, 2


@pytest.fixture
def group() -> Iterator[Path]:
    with made(f"dirtytrack-{os.getpid()}") as folder:
        yield folder


@contextmanager
def member(group: Path, *command: object) -> Iterator[Program]:
    with running(*(command or ("target", 4, "lenient"))) as program:
        (group / "cgroup.procs").write_text(str(program.pid))
        yield program


def thawed(group: Path) -> None:
    """Wait for it; what never comes is ended by the time-out of the test."""
    while is_frozen(group):
        time.sleep(0.002)


def in_child(what: Callable[[], object]) -> int:
    child = os.fork()
    if not child:
        status = 1
        try:
            what()
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    return child


def ends_well(what: Callable[[], object]) -> None:
    assert os.waitpid(in_child(what), 0)[1] == 0


# ---- it stands still, and goes on


def test_nothing_is_written_while_it_is_frozen(group: Path) -> None:
    with member(group) as program, process.attach(program.pid) as tracker:
        for _ in range(3):
            with tracker.frozen(by="cgroup"):
                assert is_frozen(group)
                dirty = tracker.collect()
                assert dirty
                data = bytes(tracker.read(dirty))
                time.sleep(0.03)
                assert not tracker.collect()
                assert tracker.read(dirty) == data
                assert tracers(program.pid) == {"0"}
            assert not is_frozen(group)
            assert program.ask() == "well"
            assert tracker.collect()
        is_unharmed_after(program, tracker)


def test_its_neighbours_stand_still_too(group: Path) -> None:
    with made("below", group) as below, member(group, "pages") as program, member(below, "pages") as neighbour:
        with process.attach(program.pid) as tracker, tracker.frozen(by="cgroup"):
            assert is_frozen(below)
            assert neighbour.process.stdin is not None
            assert neighbour.process.stdout is not None
            neighbour.process.stdin.write("map 3\n")
            neighbour.process.stdin.flush()
            assert not select.select([neighbour.process.stdout], [], [], 0.03)[0]
        assert int(neighbour.answer(), 16)


def test_one_that_was_frozen_before_stays_so(group: Path) -> None:
    with member(group, "pages") as program, process.attach(program.pid) as tracker:
        (group / "cgroup.freeze").write_text("1")
        with tracker.frozen(by="cgroup"):
            assert is_frozen(group)
            tracker.collect()
        assert is_frozen(group)
        (group / "cgroup.freeze").write_text("0")
        thawed(group)


def test_an_error_within_thaws_it(group: Path) -> None:
    with member(group, "pages") as program, process.attach(program.pid) as tracker:
        with pytest.raises(KeyboardInterrupt), tracker.frozen(by="cgroup"):
            raise KeyboardInterrupt
        assert not is_frozen(group)


def test_a_thread_that_waits_for_vfork_is_frozen_too(group: Path) -> None:
    with member(group, "pages") as program, process.attach(program.pid) as tracker:
        program.ask("vfork 100")
        with tracker.frozen(by="cgroup"):
            tracker.collect()
            time.sleep(0.12)
            assert not tracker.collect()


def test_one_that_a_tracer_has(group: Path) -> None:
    with member(group) as program, process.attach(program.pid) as tracker:
        with tracker.frozen(), tracker.frozen(by="cgroup"):
            tracker.collect()
            time.sleep(0.02)
            assert not tracker.collect()
        is_unharmed_after(program, tracker)


def is_unharmed_after(program: Program, tracker: process.ProcessTracker) -> None:
    tracker.detach()
    is_unharmed(program)


def test_threads_in_cgroups_of_their_own(group: Path) -> None:
    """Of a threaded cgroup the domain is frozen, which has all threads of the process."""
    with made("one", group) as one, made("two", group) as two, member(group) as program:
        for folder in (one, two):
            (folder / "cgroup.type").write_text("threaded")
        for i, task in enumerate(Path(f"/proc/{program.pid}/task").iterdir()):
            ((one, two)[i % 2] / "cgroup.threads").write_text(task.name)
        assert Path(f"/proc/{program.pid}/cgroup").read_text().rstrip().endswith("/one")
        assert group_of(program.pid) == group
        with process.attach(program.pid) as tracker:
            for _ in range(5):
                with tracker.frozen(by="cgroup"):
                    assert is_frozen(one) and is_frozen(two)
                    tracker.collect()
                    time.sleep(0.005)
                    assert not tracker.collect()
        is_unharmed(program)


def test_it_is_killed_while_it_is_frozen(group: Path) -> None:
    with pytest.raises(AssertionError), member(group, "pages") as program:  # it does not end well
        tracker = process.attach(program.pid)
        with tracker.frozen(by="cgroup"):
            program.process.kill()
            with pytest.raises(TargetGone) as caught:
                while True:
                    tracker.collect()
    assert "ended" in str(caught.value)
    with pytest.raises(TargetGone, match="ended"), tracker.frozen(by="cgroup"):
        pass
    tracker.detach()


# ---- somebody dies


def freeze_and_wait(program: Program, say: int, *, fork: bool) -> None:
    with process.attach(program.pid) as tracker, tracker.frozen(by="cgroup"):
        if fork and not os.fork():  # it has all descriptors of its parent
            os.write(say, b"%d\n" % os.getpid())
            time.sleep(60)
        if not fork:
            os.write(say, b"\n")
        time.sleep(60)


@pytest.mark.parametrize("fork", [False, True], ids=["alone", "with a child that runs on"])
def test_the_tracker_is_killed_while_it_is_frozen(group: Path, fork: bool) -> None:
    with member(group) as program:
        hear, say = os.pipe()
        child = in_child(lambda: freeze_and_wait(program, say, fork=fork))
        grandchild = os.read(hear, 20).strip()
        assert is_frozen(group)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        thawed(group)
        assert program.ask() == "well"
        if grandchild:
            os.kill(int(grandchild), signal.SIGKILL)
        os.close(hear)
        os.close(say)
        while tracers(program.pid) != {"0"}:
            time.sleep(0.002)
        if not fork:
            is_unharmed(program)


def watcher() -> psutil.Process:
    return next(child for child in psutil.Process().children() if any("thawing" in word for word in child.cmdline()))


def test_the_watcher_is_killed(group: Path) -> None:
    with member(group, "pages") as program, process.attach(program.pid) as tracker:
        with tracker.frozen(by="cgroup"):
            watcher().kill()
            tracker.collect()
        assert not is_frozen(group)


def test_the_watcher_outlives_what_ends_the_tracker(group: Path) -> None:
    with member(group, "pages") as program, process.attach(program.pid) as tracker:
        with tracker.frozen(by="cgroup"):
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                watcher().send_signal(number)
            time.sleep(0.02)
            assert is_frozen(group)
            assert watcher().is_running()
        assert not is_frozen(group)


def test_a_watcher_that_does_not_start(group: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with member(group, "pages") as program, process.attach(program.pid) as tracker:
        for interpreter, error in (
            ("", UnsupportedKernel),
            ("/dev/null", KernelRefused),
            ("/bin/false", KernelRefused),
        ):
            monkeypatch.setattr(sys, "executable", interpreter)
            with pytest.raises(error, match=r'by="ptrace"'), tracker.frozen(by="cgroup"):
                pass
            assert not is_frozen(group)


# ---- what is refused


def refuses(program: Program, kind: type[DirtyTrackError], says: str) -> None:
    with process.attach(program.pid) as tracker:
        with pytest.raises(kind, match=says) as caught, tracker.frozen(by="cgroup"):
            raise AssertionError("it was not refused")
        assert caught.value.pid == program.pid
        tracker.collect()


def test_the_root() -> None:
    root = mount_point()
    if (root / "cgroup.freeze").exists():
        pytest.skip(f"{NO_CGROUP} but in {root}, which is no root")
    with running("pages") as program:
        try:
            (root / "cgroup.procs").write_text(str(program.pid))
        except OSError as error:
            pytest.skip(f"{NO_CGROUP}: {error}")
        refuses(program, InvalidMemory, "root of the cgroups")


def test_a_cgroup_that_has_this_process_in_it(group: Path) -> None:
    def move_and_try(ours: Path) -> None:
        (ours / "cgroup.procs").write_text(str(os.getpid()))
        refuses(program, InvalidMemory, "has this process in it too")

    with member(group, "pages") as program, made("below", group) as below:
        ends_well(lambda: move_and_try(group))
        ends_well(lambda: move_and_try(below))
        assert not is_frozen(group)


def test_without_cgroup_v2(group: Path) -> None:
    def unmount_and_try() -> None:
        check(libc.unshare(_CLONE_NEWNS))
        check(libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
        check(libc.umount2(os.fsencode(mount_point()), _MNT_DETACH))
        refuses(program, UnsupportedKernel, "cgroup v2 is not mounted")

    with member(group, "pages") as program:
        ends_well(unmount_and_try)


def test_two_trackers_at_once(group: Path) -> None:
    with member(group, "pages") as program:
        with process.attach(program.pid) as one, process.attach(program.pid) as two, one.frozen(by="cgroup"):
            with pytest.raises(TargetBusy, match="another tracker"), two.frozen(by="cgroup"):
                pass
            assert is_frozen(group)
        assert not is_frozen(group)


def test_what_is_no_way(group: Path) -> None:
    with member(group, "pages") as program, process.attach(program.pid) as tracker:
        with pytest.raises(InvalidMemory, match="by takes"), tracker.frozen(by="force"):  # type: ignore[arg-type]
            pass
        tracker.detach()
        with pytest.raises(SessionClosed), tracker.frozen(by="cgroup"):
            pass


def test_it_left_its_cgroup(group: Path) -> None:
    """Between the look at where it is and the freeze."""
    with made("other", group) as other, member(group, "pages") as program, process.attach(program.pid) as tracker:
        real = subprocess.Popen

        def move_first(*args: object, **options: object) -> object:
            (other / "cgroup.procs").write_text(str(program.pid))
            return real(*args, **options)  # type: ignore[call-overload]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(subprocess, "Popen", move_first)
            with pytest.raises(TargetBusy, match="left the cgroup"), tracker.frozen(by="cgroup"):
                pass
        assert not is_frozen(group)

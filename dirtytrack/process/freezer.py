# SPDX-License-Identifier: MIT
"""The freezer of cgroup v2: all processes of a cgroup stand still (``cgroup.freeze``, Linux 5.2)."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import select
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NoReturn

from ..errors import InvalidMemory, KernelRefused, PermissionDenied, TargetBusy, UnsupportedKernel
from .admission import no_such_process

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["frozen_group", "group_of"]

_BY_PTRACE = 'by="ptrace" stops the process alone, and needs no cgroup'
_FREEZE = "cgroup.freeze"
_REMOVED = (errno.ENOENT, errno.ENODEV)  # as a cgroup can be once nobody is in it


def group_of(pid: int) -> Path:
    """The folder of the cgroup that is frozen to have a process stand still.

    Raises:
        UnsupportedKernel: there is no cgroup v2 here, or not one for this process.
        InvalidMemory: it is the root, or this process is in it too.
        TargetGone: the process has ended.
    """
    path = _path_of(pid)
    folder = _folder_of(path, pid)
    # A process may have its threads in several cgroups, below the domain that has all of them (cgroups(7)).
    while _read(folder / "cgroup.type") == "threaded":
        path, folder = path.parent, folder.parent
    if not (folder / _FREEZE).exists():
        raise InvalidMemory(
            f"cannot freeze process {pid}: it is in the root of the cgroups, {folder}, which cannot be frozen. Move it "
            f"into one of its own (mkdir {folder}/NAME; echo {pid} > {folder}/NAME/cgroup.procs); or: {_BY_PTRACE}",
            pid=pid,
            feature=_FREEZE,
        )
    ours = _path_of(os.getpid())
    if path == ours or path in ours.parents:
        raise InvalidMemory(
            f"cannot freeze process {pid}: its cgroup {folder} has this process in it too, which would stop itself. "
            f"Move one of them into another cgroup; or: {_BY_PTRACE}",
            pid=pid,
            feature=_FREEZE,
        )
    return folder


def _path_of(pid: int) -> PurePosixPath:
    """As /proc has it: from the root of our cgroup namespace."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text(errors="surrogateescape").splitlines()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise no_such_process(pid, error) from error
    except OSError as error:
        raise PermissionDenied(
            f"cannot freeze process {pid}: /proc/{pid}/cgroup may not be read ({error.strerror}). Run as that user, or "
            f"as root. Or: {_BY_PTRACE}",
            errno=error.errno,
            feature=_FREEZE,
            pid=pid,
        ) from error
    for line in lines:
        if line.startswith("0::"):
            return PurePosixPath(line[3:])
    raise _no_cgroup(pid, "it is in no cgroup of version 2")


def _folder_of(path: PurePosixPath, pid: int) -> Path:
    """Below a mount point of cgroup v2 (proc(5): the fields of mountinfo)."""
    lines = [line.split(" - ", 1) for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    mounts = [mount for mount, kind in lines if kind.split()[0] == "cgroup2"]
    for mount in mounts:
        root, point = (
            re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field) for field in mount.split()[3:5]
        )
        if path.is_relative_to(root) and ".." not in path.parts:
            folder = Path(point, path.relative_to(root))
            if (folder / "cgroup.procs").exists():
                return folder
    raise _no_cgroup(pid, f"no mount of cgroup v2 shows its cgroup {path}" if mounts else "cgroup v2 is not mounted")


def _no_cgroup(pid: int, why: str) -> UnsupportedKernel:
    return UnsupportedKernel(
        f"cannot freeze process {pid}: {why} (see /proc/{pid}/cgroup, /proc/self/mountinfo): mount -t cgroup2 none "
        f"/sys/fs/cgroup, in the cgroup namespace of the host. Or: {_BY_PTRACE}",
        feature="cgroup2",
        pid=pid,
    )


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""  # the root has no such file


@contextmanager
def frozen_group(pid: int, timeout: float) -> Iterator[None]:
    """Have all processes of a process's cgroup stand still; as `ProcessTracker.frozen` says."""
    folder = group_of(pid)
    with ExitStack() as opened:
        freeze = _open(folder / _FREEZE, pid)
        opened.callback(os.close, freeze)
        try:
            fcntl.flock(freeze, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the first to leave would thaw it for the second
        except BlockingIOError as error:
            raise TargetBusy(
                f"cannot freeze process {pid}: another tracker has its cgroup {folder} frozen. Try again later",
                errno=error.errno,
                pid=pid,
            ) from error
        if os.pread(freeze, 1, 0) != b"1":
            opened.enter_context(_thawed_at_the_end(freeze, folder, pid))
        _wait(folder, pid, timeout)
        if str(pid) not in _read(folder / "cgroup.procs").split():
            raise _left(folder, pid)
        yield


def _left(folder: Path, pid: int) -> TargetBusy:
    return TargetBusy(
        f"cannot freeze process {pid}: it left the cgroup {folder} meanwhile; all go on. Try again", pid=pid
    )


def _open(file: Path, pid: int) -> int:
    try:
        return os.open(file, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise PermissionDenied(
                f"cannot freeze process {pid}: {file} may not be written ({error.strerror}). Run as its owner or as "
                "root (in a container: with /sys/fs/cgroup mounted writable), or have its owner delegate the cgroup "
                f"(chown). Or: {_BY_PTRACE}",
                errno=error.errno,
                feature=_FREEZE,
                pid=pid,
            ) from error
        _refuse(error, file, pid)


def _refuse(error: OSError, file: Path, pid: int) -> NoReturn:
    if error.errno in _REMOVED:
        raise _left(file.parent, pid) from error
    raise KernelRefused(
        f"cannot freeze process {pid}: {file}: {error.strerror}", errno=error.errno, feature=_FREEZE, pid=pid
    ) from error


def _wait(folder: Path, pid: int, timeout: float) -> None:
    """Until all of it stands still. A cgroup that has processes of its own says so without a look at those below it
    (kernel/cgroup/freezer.c), so each is asked; what is made below a frozen one is frozen from the first."""
    deadline = time.monotonic() + timeout
    for place, _, _ in os.walk(folder):
        file = Path(place, "cgroup.events")
        try:
            events = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                still = _stands_still(events, deadline)
            finally:
                os.close(events)
        except OSError as error:
            if error.errno in _REMOVED and file.parent != folder:
                continue
            _refuse(error, file, pid)
        if not still:
            raise TargetBusy(
                f"cannot freeze process {pid}: some thread of its cgroup {place} waits in the kernel where it cannot "
                f"be stopped (for a disk), for {timeout:g} s; all go on. Try again later, or with a longer timeout=",
                errno=errno.ETIMEDOUT,
                pid=pid,
            )


def _stands_still(events: int, deadline: float) -> bool:
    """Wait for "frozen 1" in cgroup.events: the kernel wakes who polls that file when it changes (cgroup-v2.rst)."""
    poller = select.poll()
    poller.register(events, select.POLLPRI)
    while b"frozen 1" not in os.pread(events, 4096, 0).splitlines():
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        poller.poll(left * 1000)
    return True


@contextmanager
def _thawed_at_the_end(freeze: int, folder: Path, pid: int) -> Iterator[None]:
    """Freeze it, with a watcher that thaws it should this process die: started first."""
    if not sys.executable:
        raise UnsupportedKernel(
            "a cgroup is frozen beside a watcher, which this interpreter cannot start: sys.executable is empty (Python "
            f"is embedded in a program). Set it to the path of a Python interpreter; or: {_BY_PTRACE}",
            feature="sys.executable",
        )
    ourselves = os.pidfd_open(os.getpid())
    try:
        watcher = subprocess.Popen(
            [sys.executable, "-I", "-S", Path(__file__).with_name("thawing.py"), str(freeze), str(ourselves)],
            pass_fds=[freeze, ourselves],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,  # a signal to our group or terminal does not reach it
            bufsize=0,
        )
    except OSError as error:
        raise KernelRefused(
            f"cannot freeze process {pid}: the watcher that would thaw it cannot be started ({sys.executable}: "
            f"{error.strerror}). Or: {_BY_PTRACE}",
            errno=error.errno,
            pid=pid,
        ) from error
    finally:
        os.close(ourselves)
    assert watcher.stdin is not None
    assert watcher.stdout is not None
    with watcher:  # whatever happens, its input is closed, which has it thaw the group unless it was told
        if not watcher.stdout.read(1):
            raise KernelRefused(
                f"cannot freeze process {pid}: the watcher that would thaw it ended before it began, with status "
                f"{watcher.wait()}; nothing was frozen. Try again; or: {_BY_PTRACE}",
                pid=pid,
            )
        try:
            _write(freeze, b"1", folder, pid)
            yield
        finally:
            _write(freeze, b"0", folder, pid)
            with suppress(BrokenPipeError):  # somebody killed it
                watcher.stdin.write(b"\n")


def _write(freeze: int, what: bytes, folder: Path, pid: int) -> None:
    try:
        os.pwrite(freeze, what, 0)
    except OSError as error:
        if what == b"0" and error.errno == errno.ENODEV:
            return  # the cgroup is gone, with all that was in it
        _refuse(error, folder / _FREEZE, pid)

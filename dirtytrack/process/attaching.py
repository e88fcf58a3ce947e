# SPDX-License-Identifier: MIT
"""Attaching: a userfaultfd that another process was made to make."""

from __future__ import annotations

import errno
import operator
import os
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import (
    DirtyTrackError,
    InvalidMemory,
    KernelRefused,
    LimitReached,
    PermissionDenied,
    TargetBusy,
    UnsupportedKernel,
)
from ..kernel import core, targets
from ..kernel.targets import Answer, Fault, Guardian
from .admission import admit, head_room, no_such_process, tracer_of
from .mappings import Filter, Pattern, named
from .tracker import ProcessTracker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = [
    "attach",
    "attach_with_fault",
    "refuse_answer",
    "require_seconds",
    "require_some",
    "start_guardian",
]

_MOST_SECONDS = 86400.0
_MOST_PID = (1 << 31) - 1


def attach(
    pid: int,
    *,
    include: Pattern | Iterable[Pattern] | None = None,
    exclude: Pattern | Iterable[Pattern] | None = None,
    timeout: float = 2.0,
    seccomp: str | None = None,
) -> ProcessTracker:
    """Track what a running process writes. It need not know of it, and is not changed.

    One ``userfaultfd`` system call is made in the process while all of its threads stand still; its descriptor is taken
    out of the process and closed there. Epoch 1 begins clean.

    Args:
        pid: the process.
        include: which of its writable mappings: names (``"[heap]"``, ``"/dev/shm/*"``; ``"[anon]"`` is what has none),
            (start, end) addresses, or a list of these. Left out: all private anonymous memory, the heap and the stack
            included. Mappings of files and shared memory are tracked only where they are named: a process that puts
            guard pages into such memory while it is armed hangs on many kernels (see docs/processes.md).
        exclude: the same, for what is left out; it wins.
        timeout: seconds in which some thread must have stopped, and a child of vfork must have memory of its own.
        seccomp: ``"accepted"``: attach though the process has a seccomp filter that might kill it for the call.

    Returns:
        A tracker, whose `ProcessTracker.attach_stall` is how long the process stood still.

    Raises:
        InvalidMemory: this process itself, a thread, a kernel thread, another architecture; or the filters match
            nothing.
        TargetGone: there is no such process, or it is a zombie.
        TargetBusy: another tracer has it, no thread stopped in time, or it is a child of vfork that has its parent's
            memory still.
        PermissionDenied: the system does not let us (another user's, Yama, seccomp); the message names the way out.
        LimitReached: its memory cgroup has too little left for the page tables, or it has no descriptor left.
        UnsupportedKernel: this kernel cannot track.
    """
    return attach_with_fault(pid, include, exclude, timeout, seccomp, Fault())


def attach_with_fault(
    pid: int,
    include: Pattern | Iterable[Pattern] | None,
    exclude: Pattern | Iterable[Pattern] | None,
    timeout: float,
    seccomp: str | None,
    fault: Fault,
) -> ProcessTracker:
    """`attach`, in which somebody is killed on the way: for tests."""
    core.load()
    pid = operator.index(pid)
    if pid <= 0:
        raise InvalidMemory(f"a pid is a positive number, not {pid}")
    if seccomp not in (None, "accepted"):
        raise InvalidMemory(f"seccomp takes None or 'accepted', not {seccomp!r}")
    if pid > _MOST_PID:
        raise no_such_process(pid)
    require_seconds(timeout)
    chosen = Filter(include, exclude)
    with _descriptors_left(pid), ExitStack() as opened:
        pidfd = _open(lambda: os.pidfd_open(pid), pid)
        opened.callback(os.close, pidfd)
        suspend_seccomp = admit(pid, seccomp)
        pagemap = targets.open_page_map(pid, timeout)
        opened.callback(os.close, pagemap)
        maps = _open(lambda: targets.open_in_proc(pid, "maps"), pid)
        opened.callback(os.close, maps)
        require_some(pid, maps, chosen)
        with start_guardian(pid, pidfd, timeout, suspend_seccomp=suspend_seccomp, fault=fault) as guardian:
            answer = guardian.answer()
        if answer.fd >= 0:
            opened.callback(os.close, answer.fd)
        if not targets.outlives(pidfd, answer):
            raise no_such_process(pid)
        if answer.code:
            refuse_answer(answer, pid, "attach to", timeout)
        session = targets.adopt(pid, pidfd, answer.fd, pagemap, maps)
        opened.pop_all()  # they are the session's from here on
        return ProcessTracker(pid, session, chosen, pidfd, answer.stall_ns / 1e9)


def require_seconds(timeout: float) -> None:
    """Refuse what is no time-out."""
    if not 0 < timeout <= _MOST_SECONDS:
        raise InvalidMemory(f"timeout takes a positive number of seconds, a day at most, not {timeout!r}")


def start_guardian(pid: int, pidfd: int, timeout: float, **options: Any) -> Guardian:
    """A running guardian.

    Raises:
        LimitReached: there is no descriptor, process or memory left here.
    """
    try:
        return Guardian(pid, pidfd, timeout, **options)
    except OSError as error:
        if isinstance(error, DirtyTrackError):
            raise
        raise LimitReached(
            f"cannot stop process {pid}: the guardian that does it cannot be started ({error.strerror}); raise ulimit "
            "-n or -u",
            errno=error.errno,
            pid=pid,
        ) from error


@contextmanager
def _descriptors_left(pid: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, DirtyTrackError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        raise LimitReached(
            f"cannot attach to process {pid}: no file descriptor is left here ({error.strerror}); raise ulimit -n",
            errno=error.errno,
            feature="RLIMIT_NOFILE",
            pid=pid,
        ) from error


def _open(opening: Callable[[], int], pid: int) -> int:
    try:
        return opening()
    except OSError as error:
        if error.errno in (errno.ESRCH, errno.ENOENT, errno.EINVAL):
            raise no_such_process(pid, error) from error
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        raise _not_permitted(pid, "attach to", error.errno or 0) from error


def require_some(pid: int, maps: int, chosen: Filter) -> None:
    """Refuse filters that match nothing, and what there is no memory for."""
    rows = targets.mappings_of(pid, maps)
    if not rows:
        raise no_such_process(pid)
    wanted = [row for row, why in chosen.look(rows) if not why]
    if not wanted:
        names = sorted({named(row.name) for row in rows if row.writable})
        raise InvalidMemory(
            f"cannot attach to process {pid}: of its {len(rows)} mappings none is chosen by {chosen}. Writable are "
            + ", ".join(names[:12])
            + (", …" if len(names) > 12 else ""),
            pid=pid,
        )
    if pid:
        head_room(pid, sum(row.end - row.start for row in wanted if row.end - row.start < 4 << 30))


def _not_permitted(pid: int, doing: str, number: int) -> PermissionDenied:
    yama = ""
    try:
        with open("/proc/sys/kernel/yama/ptrace_scope") as file:
            scope = file.read().strip()
        if scope != "0":
            yama = (
                f"; or the Yama module's kernel.yama.ptrace_scope = {scope} forbids it: sysctl -w "
                "kernel.yama.ptrace_scope=0, or have the process call prctl(PR_SET_PTRACER)"
            )
    except OSError:
        pass
    return PermissionDenied(
        f"cannot {doing} process {pid}: it may not be traced ({errno.errorcode.get(number, number)}). It is another "
        "user's, has changed its user, is not dumpable, or is in another user namespace: run as that user, or with "
        f"CAP_SYS_PTRACE (in a container: --cap-add SYS_PTRACE and its pid namespace){yama}. Without ptrace: "
        "`process.offer` in the process, `process.accept` here",
        errno=number,
        feature="ptrace",
        pid=pid,
    )


def refuse_answer(answer: Answer, pid: int, doing: str, timeout: float) -> NoReturn:
    """Raise what the failure of a guardian means."""
    raise _failure(answer, pid, doing, timeout)


def _failure(answer: Answer, pid: int, doing: str, timeout: float) -> DirtyTrackError:
    steps, number = targets.steps(), -answer.code
    name = errno.errorcode.get(number, str(number))
    if number == errno.ESRCH:
        return no_such_process(pid)
    if number in (errno.EBUSY, errno.ETIMEDOUT):
        who = "some thread" if doing == "freeze" else "each thread"
        return TargetBusy(
            f"cannot {doing} process {pid}: {who} waits in the kernel "
            f"where it cannot be stopped (for a child of vfork, or for a disk), for {timeout:g} s. Try again later, or "
            "with a longer timeout=",
            errno=number,
            pid=pid,
        )
    if answer.step == steps["STOP"] and number in (errno.EPERM, errno.EACCES):
        if tracer := tracer_of(pid):
            return TargetBusy(
                f"cannot {doing} process {pid}: it is traced by process {tracer}, a debugger or another tracker that "
                "attaches to it or has it frozen. Try again when that is over",
                errno=number,
                pid=pid,
            )
        return _not_permitted(pid, doing, number)
    if answer.step == steps["GADGET"] and number in (errno.EPERM, errno.EACCES):
        return _not_permitted(pid, doing, number)
    if number == errno.ENOEXEC:
        return InvalidMemory(
            f"cannot {doing} process {pid}: it is not a program of this architecture, or has no system call "
            "instruction in its text",
            errno=number,
            pid=pid,
        )
    if answer.step == steps["USERFAULTFD"] and number in (errno.EMFILE, errno.ENFILE):
        return LimitReached(
            f"cannot {doing} process {pid}: it has no file descriptor left ({name}): raise its RLIMIT_NOFILE (prlimit "
            f"--pid {pid} --nofile=N)",
            errno=number,
            feature="RLIMIT_NOFILE",
            pid=pid,
        )
    if answer.step == steps["USERFAULTFD"] and number in (errno.EPERM, errno.EACCES):
        return PermissionDenied(
            f"cannot {doing} process {pid}: it may not make a userfaultfd ({name}): a seccomp filter or security "
            "module of its own, as containers have by default, forbids it. Allow userfaultfd there "
            "(docs/containers.md)",
            errno=number,
            feature="userfaultfd",
            pid=pid,
        )
    if answer.step == steps["USERFAULTFD"] and number == errno.ENOSYS:
        return UnsupportedKernel(
            f"cannot {doing} process {pid}: the kernel has no userfaultfd, or a seccomp filter of the process says so "
            f"({name})",
            errno=number,
            feature="userfaultfd",
            pid=pid,
        )
    if answer.step == steps["TAKE"] and number in (errno.EMFILE, errno.ENFILE):
        return LimitReached(f"cannot {doing} process {pid}: no descriptor is left here ({name})", errno=number, pid=pid)
    if answer.step == steps["TAKE"] and number in (errno.EPERM, errno.ENOSYS):
        return _not_permitted(pid, doing, number)
    return KernelRefused(f"cannot {doing} process {pid}: the kernel answered {name}", errno=number, pid=pid)

# SPDX-License-Identifier: MIT
"""Other processes: the guardian that has one stand still, sessions for its memory, its mappings and its bytes."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..errors import KernelRefused, TargetBusy, UnsupportedKernel
from . import core, engine, scans
from .core import new_failure
from .failures import error_of, raise_failure

if TYPE_CHECKING:
    from .core import CData

__all__ = [
    "ENDING_SECONDS",
    "Answer",
    "Fault",
    "Guardian",
    "Row",
    "ThreadState",
    "adopt",
    "await_memory",
    "has_memory",
    "is_alive",
    "kill_after",
    "layout",
    "layout_changed",
    "mappings_of",
    "open_in_proc",
    "open_page_map",
    "open_userfaultfd",
    "outlives",
    "read",
    "read_until",
    "register",
    "remove",
    "steps",
    "thread_states",
]

ENDING_SECONDS = 0.25
"""How long a process that is ending, by its looks, is given to end."""
OWN_MEMORY_SECONDS = 2.0
"""How long a child of vfork is given to become a program."""
_LOOK_SECONDS = 0.001
_ANSWER_SECONDS = 10.0
"""Beyond the time-out of what it does: for the start of its interpreter."""


# ---- the guardian


class Fault(NamedTuple):
    """For tests: after so many steps the guardian kills itself, or whoever asked it."""

    step: int = 0
    tracker: bool = False


class Answer(NamedTuple):
    """What a guardian did. ``step`` and ``code`` say what failed: 0, or the negated errno."""

    code: int
    step: int
    stall_ns: int
    threads: int
    steps: int
    fd: int
    """A descriptor that came with it, or -1."""


def steps() -> dict[str, int]:
    """The steps at which a guardian may fail, by name."""
    names = "OPEN", "GADGET", "STOP", "CALL", "USERFAULTFD", "TAKE", "REGISTERS"
    return {name: int(getattr(core.lib, f"DT_GUARD_{name}")) for name in names}


def _fork(wish: tuple[int, ...], channel: socket.socket) -> int:
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        channel.close()
        os._exit(core.taking.guard(*map(int, wish)))
    finally:
        os._exit(1)


class Guardian:
    """A running guardian. Its end lets its threads go; so does ours, which closes the channel."""

    def __init__(
        self,
        pid: int,
        pidfd: int,
        timeout: float,
        *,
        freeze: bool = False,
        registers: bool = False,
        suspend_seccomp: bool = False,
        fault: Fault | None = None,
    ) -> None:
        core.load()
        fault = fault or Fault()
        if not sys.executable:
            raise UnsupportedKernel(
                "another process is stopped by a guardian, which this interpreter cannot start: sys.executable is "
                "empty (Python is embedded in a program). Set it to the path of a Python interpreter",
                feature="sys.executable",
            )
        self._timeout = timeout
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            number = theirs.fileno()
            milliseconds = max(1, int(timeout * 1000))
            wish = (pid, pidfd, number, freeze, milliseconds, suspend_seccomp, fault.step, fault.tracker, registers)
            script = str(Path(__file__).with_name("guardian.py"))
            extension = str(core.taking.__file__)
            self._forked = 0
            try:
                self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                    [sys.executable, "-I", "-S", script, extension, *(str(int(field)) for field in wish)],
                    pass_fds=[number, pidfd],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    start_new_session=True,  # a signal to our group or terminal does not reach it
                )
            except OSError:
                # This process gave away the right to run the interpreter that it runs in: then it is split in two.
                self._process, self._forked = None, _fork(wish, ours)
            except BaseException:
                ours.close()
                raise
        self._channel = ours
        self.end: Answer | None = None
        """What it answered when it had let go, where it held threads; None before that, and where it was killed."""

    def _wait(self) -> int:
        """For its end: the exit status, or the negated number of the signal that ended it."""
        if self._process is not None:
            return self._process.wait()
        if self._forked:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self._forked, 0)[1])
            self._forked = 0
        return self._status

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
        elif self._forked:
            os.kill(self._forked, signal.SIGKILL)

    def answer(self) -> Answer:
        """Wait for its next answer.

        Raises:
            KernelRefused: it ended without one.
        """
        found = None
        for seconds in (self._timeout + _ANSWER_SECONDS, 0.0):  # the whole machine may have stood still meanwhile
            with suppress(TimeoutError, BlockingIOError):
                found = self._receive(seconds)
                break
        else:
            self._kill()
        if found is None:
            status = self._wait()
            how = f"by {signal.Signals(-status).name}" if status < 0 else f"with exit status {status}"
            raise KernelRefused(
                f"the guardian, the process that was to stop the target, ended {how} before it answered. The target "
                "runs on; try again"
            )
        return found

    def _receive(self, seconds: float) -> Answer | None:
        """What comes through the channel in that time; None at its end."""
        struct = core.ffi.new("dt_guard_answer *")
        nbytes, fd = core.ffi.sizeof(struct[0]), -1
        self._channel.settimeout(seconds)
        data, ancillary, _flags, _address = self._channel.recvmsg(nbytes, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
        for _level, kind, content in ancillary:
            if kind == socket.SCM_RIGHTS:
                fd = int.from_bytes(content[:4], sys.byteorder)
        if len(data) != nbytes:
            return None
        core.ffi.buffer(struct, nbytes)[:] = data
        return Answer(struct.code, struct.step, struct.stall_ns, struct.threads, struct.steps, fd)

    def close(self) -> None:
        """Have it let go of what it holds, and wait for its end. A second call does nothing."""
        if self._channel.fileno() >= 0:
            self._channel.shutdown(socket.SHUT_WR)
            self._wait()
            with suppress(OSError):
                self.end = self._receive(0.0)
            self._channel.close()

    def __enter__(self) -> Guardian:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ThreadState(NamedTuple):
    """A thread that stands still. Register sets are as the kernel gives them to a tracer; empty where it has none."""

    tid: int
    name: str
    prstatus: bytes
    """NT_PRSTATUS: the general ones. A thread that was stopped in a system call has the kernel's own answer there
    (-ERESTARTSYS and its like): the call is made again when it goes on."""
    fpregset: bytes
    """NT_PRFPREG."""
    xstate: bytes
    """NT_X86_XSTATE: what XSAVE stores."""
    signal_mask: int


def thread_states(fd: int) -> tuple[ThreadState, ...]:
    """The threads of the file that came with a guardian's answer, the first of the process first."""
    with open(fd, "rb", closefd=False) as file:
        file.seek(0)
        data = file.read()
    size, at, found = core.ffi.sizeof("dt_thread_state"), 0, []
    state = core.ffi.new("dt_thread_state *")
    while at < len(data):
        core.ffi.buffer(state, size)[:] = data[at : at + size]
        at += size
        middle = at + state.prstatus_bytes
        last = middle + state.fpregset_bytes
        end = last + state.xstate_bytes
        name = core.ffi.string(state.name).decode(errors="surrogateescape")
        sets = data[at:middle], data[middle:last], data[last:end]
        found.append(ThreadState(state.tid, name, sets[0], sets[1], sets[2], state.signal_mask))
        at = end + -end % 8
    return tuple(found)


# ---- sessions


def adopt(pid: int, pidfd: int, uffd: int, pagemap: int, maps: int, *, ready: bool = False, remedy: int = 0) -> CData:
    """A slot with a session that closes these descriptors with itself; where this fails they stay the caller's."""
    slot, why = engine.session_slot(), new_failure()
    target = core.ffi.new("dt_target *", (pid, pidfd, uffd, pagemap, maps, ready))
    code = core.lib.dt_session_adopt(target, remedy, slot, why)
    if code:
        raise error_of(code, why, f"track process {pid}", pid=pid)
    return slot


class Row(NamedTuple):
    """A mapping of a process as the kernel tells it."""

    start: int
    end: int
    offset: int
    inode: int
    device: tuple[int, int]
    readable: bool
    writable: bool
    executable: bool
    shared: bool
    page_bytes: int
    name: str


def _rows(out: CData, count: int) -> list[Row]:
    rows = []
    for i in range(count):
        m = out[i]
        rows.append(
            Row(
                m.start,
                m.end,
                m.offset,
                m.inode,
                (m.device_major, m.device_minor),
                bool(m.readable),
                bool(m.writable),
                bool(m.executable),
                bool(m.shared),
                m.page_bytes,
                core.ffi.string(m.name).decode(errors="surrogateescape"),
            )
        )
    return rows


def layout(session: CData, pid: int, expected: int = 64) -> list[Row]:
    """All mappings of the target; what `layout_changed` compares with from now on."""
    room = expected + 16
    while True:
        out = core.ffi.new("dt_mapping[]", room)
        count = core.lib.dt_layout_read(session, out, room)
        if count < 0:
            _raise_maps(count, pid)
        if count <= room:
            return _rows(out, count)
        room = count + 16


def mappings_of(pid: int, maps: int) -> list[Row]:
    """All mappings of a process, by its open /proc/PID/maps."""
    room = 64
    while True:
        out = core.ffi.new("dt_mapping[]", room)
        count = core.lib.dt_mappings_of(pid, maps, out, room)
        if count < 0:
            _raise_maps(count, pid)
        if count <= room:
            return _rows(out, count)
        room = count + 16


def layout_changed(session: CData, pid: int) -> bool:
    """Whether the target's writable mappings are others than at the last `layout`."""
    changed = core.lib.dt_layout_changed(session)
    if changed < 0:
        _raise_maps(changed, pid)
    return bool(changed)


def _raise_maps(code: int, pid: int) -> None:
    """Raise what a failed look at the mappings of a process means."""
    why = new_failure()
    why.step = core.lib.DT_STEP_SCAN if code == -errno.ESRCH else core.lib.DT_STEP_MAPS
    raise error_of(code, why, f"look at the mappings of process {pid}", pid=pid)


def register(session: CData, start: int, end: int, pid: int) -> tuple[CData, int]:
    """A slot with a region for part of the target, and its number in the session."""
    slot, about = engine.register(session, start, end - start, 0, None, f"track a mapping of process {pid}")
    return slot, about.number


def remove(listener: CData, handle: CData) -> None:
    """Watch a region no longer, and let go of it. What was written to it is forgotten."""
    cset = core.new_set()
    code = core.lib.dt_remove(listener, handle, cset)
    if code:
        core.give_back(cset)
        raise_failure(code, cset.why, "remove a mapping")
    core.lib.dt_settle(cset)


def read(pid: int, mem: int, cset: CData, out: CData, room: int) -> int:
    """Read the pages of a set from a process, by its /proc/PID/mem where mem is not -1; the bytes that were read."""
    why, done = new_failure(), core.ffi.new("uint64_t *")
    code = core.lib.dt_read_target(pid, mem, cset, out, room, done, why)
    if code:
        raise error_of(code, why, f"read from process {pid}", pid=pid)
    return int(done[0])


def read_until(pid: int, mem: int, cset: CData, out: CData, room: int) -> tuple[int, int, int]:
    """As `read`, up to the first page that cannot be read.

    Returns:
        How many bytes were read; the error number of what ended it, 0 where all was read; the address of that page.
    """
    why, done = new_failure(), core.ffi.new("uint64_t *")
    code = core.lib.dt_read_target(pid, mem, cset, out, room, done, why)
    return int(done[0]), -code if code else 0, int(why.start)


def kill_after(sites: int, nth: int) -> None:
    """For tests: this process kills itself after the nth call at these sites (DT_SITE_)."""
    core.lib.dt_fail(sites, nth, 1, 0, 2)


def open_userfaultfd() -> int:
    """A userfaultfd of this process, by the first door that opens."""
    why, out = new_failure(), core.ffi.new("int32_t *")
    code = core.lib.dt_open_userfaultfd(out, why)
    if code:
        raise error_of(code, why, "open a userfaultfd")
    return int(out[0])


def is_alive(pidfd: int, wait_seconds: float = 0.0) -> bool:
    """Whether the process of a pidfd has not ended, nor does within that time."""
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return not poller.poll(wait_seconds * 1000)


def outlives(pidfd: int, answer: Answer) -> bool:
    """Whether the process of a pidfd has not ended. One that is ending may not be traced: it is given some time."""
    return is_alive(pidfd, ENDING_SECONDS if answer.code else 0.0)


def has_memory(pid: int) -> bool:
    """Whether a process has memory of its own; not so once it is ending, and while /proc does not tell."""
    try:
        return Path(f"/proc/{pid}/statm").read_bytes().split()[0] != b"0"
    except OSError:
        return False


def open_in_proc(pid: int, name: str) -> int:
    """A descriptor of /proc/PID/name."""
    return os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)


def _lender(pid: int) -> int:
    """The parent whose memory a process has; 0: it has its own, or that cannot be told."""
    try:
        parent = int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except (OSError, IndexError):
        return 0
    return parent if core.lib.dt_shares_memory(pid, parent) > 0 else 0


def await_memory(pid: int, wait_seconds: float = OWN_MEMORY_SECONDS) -> None:
    """Wait until a process has memory of its own.

    A child of vfork, as `subprocess` and posix_spawn make them, has its parent's until it replaces itself by exec;
    what is opened of it before stays its parent's, and says nothing of what the program writes. Nor has it its own
    for sure when Popen() returns (seen on Linux 6.12 and 7.3 where there is one processor). Where kcmp(2) is
    forbidden, it cannot be told, and is not waited for.

    Raises:
        TargetBusy: it has not in that time.
    """
    core.load()
    until = time.monotonic() + wait_seconds
    while parent := _lender(pid):
        if time.monotonic() >= until:
            raise TargetBusy(
                f"process {pid} has the memory of its parent, process {parent}: it is a child of vfork or posix_spawn "
                f"that has not become a program of its own by exec in {wait_seconds:g} s. Try again when it has; or "
                f"take process {parent}, whose memory it is",
                pid=pid,
            )
        time.sleep(_LOOK_SECONDS)


def open_page_map(pid: int, wait_seconds: float = OWN_MEMORY_SECONDS) -> int:
    """A descriptor of the page map of a process's own memory.

    Raises:
        PermissionDenied, TargetGone: as `Pagemap`.
        TargetBusy: as `await_memory`.
    """
    await_memory(pid, wait_seconds)
    try:
        return open_in_proc(pid, "pagemap")
    except OSError as error:
        scans.refuse_open(error, pid)

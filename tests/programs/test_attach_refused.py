# SPDX-License-Identifier: MIT
"""Who cannot be attached to: a clear error each, and the process was not touched."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import dirtytrack
from dirtytrack import process
from dirtytrack.errors import InvalidMemory, LimitReached, PermissionDenied, TargetBusy, TargetGone
from dirtytrack.process import admission
from tests.programs.targets import is_unharmed, python, running, tracers
from tests.sandbox import ROOT, run_in_child

_PTRACE_TRACEME, _PTRACE_SEIZE, _PTRACE_DETACH = 0, 0x4206, 17

ECHO = "import sys\nprint('up')\nfor line in sys.stdin: print('well')"


def filtered(restriction: str) -> list[object]:
    """The same, behind a filter of tests/sandbox.py."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.sandbox import RESTRICTIONS; "
    return python(f"{code}RESTRICTIONS[{restriction!r}]()\n{ECHO}")


def killing() -> list[object]:
    """The same, where a filter kills for userfaultfd."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from tests import sandbox\n"
        "import struct, ctypes, platform\n"
        "number = sandbox._USERFAULTFD[platform.machine()]\n"
        "one = lambda code, yes, no, value: struct.pack('HBBI', code, yes, no, value)\n"
        "program = one(32, 0, 0, 0) + one(21, 0, 1, number) + one(6, 0, 0, 0x80000000) + one(6, 0, 0, 0x7fff0000)\n"
        "text = ctypes.create_string_buffer(program)\n"
        "head = ctypes.create_string_buffer(struct.pack('HP', 4, ctypes.addressof(text)))\n"
        "sandbox.check(sandbox.libc.prctl(38, 1, 0, 0, 0))\n"
        "sandbox.check(sandbox.libc.prctl(22, 2, ctypes.addressof(head), 0, 0))\n"
    )
    return python(code + ECHO)


def test_this_process() -> None:
    with pytest.raises(InvalidMemory, match=r"track\("):
        process.attach(os.getpid())


@pytest.mark.parametrize("pid", [0, -1, 1 << 22 | 1, 1 << 31, 1 << 70])
def test_no_such_process(pid: int) -> None:
    with pytest.raises((TargetGone, InvalidMemory)) as caught:
        process.attach(pid)
    assert caught.type is (TargetGone if pid > 0 else InvalidMemory)


def test_no_descriptor_left_here() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with running("target", 1) as program:
        process.attach(program.pid).detach()
        there = set(Path("/proc/self/fd").iterdir())
        refused = 0
        for more in range(10):
            resource.setrlimit(resource.RLIMIT_NOFILE, (len(there) - 1 + more, hard))
            try:
                with process.attach(program.pid) as tracker, tracker.frozen():
                    tracker.collect()
            except LimitReached:
                refused += 1
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert set(Path("/proc/self/fd").iterdir()) == there
        assert 0 < refused < 10
        is_unharmed(program)


@pytest.mark.parametrize("pid", ["7", 7.0, None])
def test_what_is_no_pid(pid: object) -> None:
    with pytest.raises(TypeError):
        process.attach(pid)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"seccomp": "yes"}, {"timeout": 0}, {"timeout": -1.0}, {"timeout": float("nan")}])
def test_options_that_there_are_not(options: dict[str, object]) -> None:
    with pytest.raises(InvalidMemory):
        process.attach(1, **options)  # type: ignore[arg-type]


def test_a_thread() -> None:
    with running("target", 2) as program:
        (other, *_) = [int(p.name) for p in Path(f"/proc/{program.pid}/task").iterdir() if p.name != str(program.pid)]
        with pytest.raises((InvalidMemory, TargetGone)):  # kernels differ in whether a thread has a pidfd
            process.attach(other)
        is_unharmed(program)


def status_of(**fields: str) -> dict[str, str]:
    return {"Name": "x", "Tgid": "7", "State": "S", "VmSize": "1 kB", "TracerPid": "0", "Seccomp": "0", **fields}


@pytest.mark.parametrize(
    ("fields", "header", "kind", "words"),
    [
        ({"Kthread": "1"}, None, InvalidMemory, "thread of the kernel"),
        ({"VmSize": ""}, None, InvalidMemory, "thread of the kernel"),
        ({"State": "Z (zombie)"}, None, TargetGone, "zombie"),
        ({"TracerPid": "99"}, None, TargetBusy, "traced by process 99"),
        ({"Tgid": "6"}, None, InvalidMemory, "thread of process 6"),
        ({}, (1, 3), InvalidMemory, "32-bit program"),
        ({}, (2, 21), InvalidMemory, "64-bit program of ELF machine 21"),
        ({"Seccomp": "1"}, None, PermissionDenied, "seccomp"),
    ],
)
def test_what_its_status_says(
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, str],
    header: tuple[int, int] | None,
    kind: type[Exception],
    words: str,
) -> None:
    status = {key: value for key, value in status_of(**fields).items() if value}
    monkeypatch.setattr(admission, "_status", {7: status}.__getitem__)
    monkeypatch.setattr(admission, "_machine", {7: header}.__getitem__)
    with pytest.raises(kind, match=words):
        admission.admit(7, None)


def test_a_thread_of_the_kernel() -> None:
    if Path("/proc/2/comm").exists() and Path("/proc/2/comm").read_text() == "kthreadd\n":  # not seen in a container
        with pytest.raises(InvalidMemory, match="thread of the kernel"):
            process.attach(2)


def test_a_32_bit_program(tmp_path: Path) -> None:
    if platform.machine() != "x86_64":
        return
    # An ELF file that waits for ever: mov $29 (pause), %eax; int $0x80; jmp.
    code = bytes.fromhex("b81d000000cd80ebf7")
    head = struct.pack("<16sHHIIIIIHHHHHH", b"\x7fELF\1\1\1", 2, 3, 1, 0x8048054, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    segment = struct.pack("<8I", 1, 0, 0x8048000, 0x8048000, 84 + len(code), 84 + len(code), 5, 4096)
    path = tmp_path / "program"
    path.write_bytes(head + segment + code)
    path.chmod(0o755)
    try:
        program = subprocess.Popen([path])
    except OSError:
        assert not Path("/proc/sys/abi/vsyscall32").exists()  # a kernel that runs no such programs
        return
    try:
        while "program" not in Path(f"/proc/{program.pid}/comm").read_text():
            time.sleep(0.001)
        with pytest.raises(InvalidMemory, match="32-bit"):
            process.attach(program.pid)
        assert program.poll() is None
    finally:
        program.kill()
        program.wait()


def test_one_that_is_traced() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long] * 4
    with running("target", 0) as program:
        assert libc.ptrace(_PTRACE_SEIZE, program.pid, 0, 0) == 0
        with pytest.raises(TargetBusy, match=f"traced by process {os.getpid()}"):
            process.attach(program.pid)
        assert libc.ptrace(0x4207, program.pid, 0, 0) == 0  # PTRACE_INTERRUPT
        os.waitid(os.P_PID, program.pid, os.WSTOPPED)
        assert libc.ptrace(_PTRACE_DETACH, program.pid, 0, 0) == 0
        is_unharmed(program)


def test_too_little_memory_for_the_markers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{100 << 20}\n")
    (tmp_path / "memory.current").write_text(f"{90 << 20}\n")
    monkeypatch.setattr(admission, "_memory_groups", {7: [tmp_path]}.__getitem__)
    admission.head_room(7, 1 << 30)  # 2 MiB
    with pytest.raises(LimitReached, match="page tables") as caught:
        admission.head_room(7, 8 << 30)  # 16 MiB
    assert caught.value.feature == "memory cgroup"
    (tmp_path / "memory.max").write_text("max\n")
    admission.head_room(7, 8 << 30)


def test_its_memory_cgroup_is_found() -> None:
    for folder in admission._memory_groups(os.getpid()):
        assert folder.is_dir()
        admission._left_in(folder)


# ---- seccomp, users


@pytest.mark.parametrize("command", [lambda: filtered("seccomp-eperm"), killing], ids=["refuses", "kills"])
def test_a_filter_does_not_see_the_call_where_it_can_be_suspended(command: Callable[[], list[object]]) -> None:
    if os.geteuid() != 0:
        return
    with running(*command()) as program:
        with process.attach(program.pid) as tracker:
            assert program.ask() == "well"
            assert tracker.collect()
        is_unharmed(program)


def test_a_filter_that_refuses_the_call() -> None:
    with running(*filtered("seccomp-eperm")) as program:
        with pytest.raises(PermissionDenied, match="userfaultfd") as caught:
            process.attach(program.pid, seccomp="accepted")
        assert caught.value.feature == "userfaultfd"
        is_unharmed(program)
    with running(*filtered("seccomp-enosys")) as program:
        with pytest.raises(dirtytrack.UnsupportedKernel, match="userfaultfd"):
            process.attach(program.pid, seccomp="accepted")
        is_unharmed(program)


def attach_as_nobody() -> None:
    # Interpreters that an ordinary user may run are not a matter of course: one that is this process's child.
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        data = bytearray(1 << 16)
        while os.read(read, 1):
            data[5] += 1
        os._exit(0)
    with process.attach(pid) as tracker:
        tracker.collect()
        os.write(write, b"x")
        time.sleep(0.05)
        dirty = tracker.collect()
        assert dirty
        assert len(tracker.read(dirty)) == dirty.page_span_bytes
        with tracker.frozen():
            tracker.collect()
    assert tracers(pid) == {"0"}
    os.close(write)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    try:
        process.attach(os.getppid())
    except PermissionDenied as error:
        print("denied", error)


def test_an_ordinary_user_attaches_to_its_own() -> None:
    told = run_in_child(attach_as_nobody, "nobody")
    if os.geteuid() == 0:  # and not to root's
        assert re.search("denied .*CAP_SYS_PTRACE", told)


def attach_to_one_with_a_filter() -> None:
    pid = os.fork()
    if not pid:
        from tests.sandbox import RESTRICTIONS

        RESTRICTIONS["seccomp-eperm"]()
        time.sleep(30)
        os._exit(0)
    while "Seccomp:\t2" not in Path(f"/proc/{pid}/status").read_text():
        time.sleep(0.001)
    try:
        process.attach(pid)
    except PermissionDenied as error:
        print("denied", error)
    assert tracers(pid) == {"0"}
    os.kill(pid, 9)
    os.waitpid(pid, 0)


def test_a_filter_that_cannot_be_suspended() -> None:
    assert re.search('denied .*seccomp="accepted"', run_in_child(attach_to_one_with_a_filter, "nobody"))

# SPDX-License-Identifier: MIT
"""What is refused before a process is touched: those that could not be tracked, or would come to harm."""

from __future__ import annotations

import os
import platform
import struct
from pathlib import Path

from ..errors import (
    DirtyTrackError,
    InvalidMemory,
    LimitReached,
    PermissionDenied,
    TargetBusy,
    TargetGone,
    UnsupportedKernel,
)

__all__ = ["admit", "head_room", "no_such_process", "tracer_of"]

_MACHINES = {"x86_64": 62, "aarch64": 183}
_64_BIT = 2
_MARKER_BYTES_SHARE = 512
"""A page of 4 KiB needs 8 bytes of page table once it is armed, populated or not (measured: 2 MiB a GiB)."""
_SPARE_BYTES = 4 << 20


def no_such_process(pid: int, error: OSError | None = None) -> TargetGone:
    """The error for a pid that names nobody."""
    return TargetGone(
        f"there is no process {pid}: it ended, or never was", errno=error.errno if error else None, pid=pid
    )


def _status(pid: int) -> dict[str, str]:
    try:
        text = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError) as error:
        raise no_such_process(pid, error) from error
    except PermissionError as error:
        raise PermissionDenied(
            f"cannot attach to process {pid}: /proc/{pid}/status may not be read ({error.strerror}). /proc is mounted "
            "with hidepid: run as that user, or as root",
            errno=error.errno,
            pid=pid,
        ) from error
    fields = (line.partition(":") for line in text.splitlines())
    return {key: value.strip() for key, _, value in fields}


def tracer_of(pid: int) -> int:
    """The process that traces this one now; 0: none, or it cannot be told."""
    try:
        return int(_status(pid).get("TracerPid", "0"))
    except DirtyTrackError:
        return 0


def _machine(pid: int) -> tuple[int, int] | None:
    """(class, machine) of the program's ELF header; None where it cannot be read."""
    try:
        with open(f"/proc/{pid}/exe", "rb") as file:
            head = file.read(20)
    except OSError:
        return None
    if len(head) < 20 or head[:4] != b"\x7fELF":
        return None
    return head[4], int(struct.unpack("<H", head[18:20])[0])


def admit(pid: int, seccomp: str | None) -> bool:
    """Look at a process without touching it. Whether it has seccomp filters that must not see what is injected.

    Raises:
        InvalidMemory: this very process, a thread, a kernel thread, or a program of another architecture.
        TargetGone: there is no such process, or it has ended.
        TargetBusy: another tracer has it.
        PermissionDenied: a seccomp filter of its own could kill it for the call that is injected.
        UnsupportedKernel: injecting is not implemented for this architecture.
    """
    if pid == os.getpid():
        raise InvalidMemory(
            f"process {pid} is this one: `dirtytrack.track(buffer)` tracks its own memory. Attach from another process",
            pid=pid,
        )
    if platform.machine() not in _MACHINES:
        raise UnsupportedKernel(f"attaching works on x86-64 and arm64, not on {platform.machine()}", pid=pid)
    status = _status(pid)
    name = status.get("Name", "?")
    leader = int(status.get("Tgid", pid))
    if leader != pid:
        raise InvalidMemory(f"{pid} is a thread of process {leader}: attach to that one", pid=pid)
    if status.get("State", "")[:1] in ("Z", "X"):
        raise TargetGone(
            f"process {pid} ({name}) has ended: it is a zombie that its parent has not waited for", pid=pid
        )
    if status.get("Kthread") == "1" or "VmSize" not in status:
        raise InvalidMemory(f"{pid} ({name}) is a thread of the kernel: it has no memory of its own", pid=pid)
    tracer = int(status.get("TracerPid", "0"))
    if tracer:
        raise TargetBusy(
            f"process {pid} ({name}) is traced by process {tracer}, a debugger or strace: only one tracer can have it. "
            "End that, then attach; the other way round works: once attached, it may be traced",
            pid=pid,
        )
    header = _machine(pid)
    if header is not None and header != (_64_BIT, _MACHINES[platform.machine()]):
        bits = "64" if header[0] == _64_BIT else "32"
        raise InvalidMemory(
            f"process {pid} ({name}) is a {bits}-bit program of ELF machine {header[1]}: only programs of this "
            f"machine's own kind ({platform.machine()}) can be attached to",
            pid=pid,
        )
    return _admit_seccomp(pid, name, int(status.get("Seccomp", "0")), seccomp)


def _admit_seccomp(pid: int, name: str, mode: int, seccomp: str | None) -> bool:
    if not mode or seccomp == "accepted":
        return False
    if mode == 2 and _may_suspend_seccomp():
        return True
    raise PermissionDenied(
        f"process {pid} ({name}) has a seccomp filter, which could kill it for the userfaultfd system call that is "
        "injected. Attach with CAP_SYS_ADMIN, which lets the filter be suspended for that call; or, where the filter "
        'is known to allow userfaultfd, or to answer with an error, pass seccomp="accepted"',
        feature="seccomp",
        pid=pid,
    )


def _may_suspend_seccomp() -> bool:
    status = _status(os.getpid())
    return status.get("Seccomp") == "0" and bool(int(status.get("CapEff", "0"), 16) >> 21 & 1)  # CAP_SYS_ADMIN


# ---- memory for the markers


def head_room(pid: int, armed_bytes: int) -> None:
    """Refuse where the page tables that arming takes might have the kernel kill the target.

    Args:
        pid: the process.
        armed_bytes: of address space that is to be armed, and is not populated yet.

    Raises:
        LimitReached: a memory cgroup of the process has too little left.
    """
    wanted = armed_bytes // _MARKER_BYTES_SHARE
    if wanted < _SPARE_BYTES:
        return
    for folder in _memory_groups(pid):
        left = _left_in(folder)
        if left is not None and left < wanted + _SPARE_BYTES:
            raise LimitReached(
                f"cannot attach to process {pid}: to arm {armed_bytes >> 20} MiB of its address space that are not "
                f"populated takes {wanted >> 20} MiB of page tables, and its memory cgroup {folder} has {left >> 20} "
                "MiB left: the kernel would kill it. Raise memory.max, or leave large mappings out by exclude=",
                feature="memory cgroup",
                pid=pid,
            )


def _memory_groups(pid: int) -> list[Path]:
    """The folders of its memory cgroup and of those above it."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _number, kinds, path = line.split(":", 2)
        if kinds in ("", "memory") or "memory" in kinds.split(","):
            root = Path("/sys/fs/cgroup") / ("memory" if kinds else "")
            folder = root / path.lstrip("/")
            if folder.is_dir():
                return [folder, *(parent for parent in folder.parents if root in parent.parents or parent == root)]
    return []


def _left_in(folder: Path) -> int | None:
    for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        try:
            most = (folder / limit).read_text().strip()
            if most == "max":
                return None
            return int(most) - int((folder / usage).read_text())
        except (OSError, ValueError):
            continue
    return None

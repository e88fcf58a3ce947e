# SPDX-License-Identifier: MIT
"""What the surroundings permit: permissions, the container, limits. Looked at, never changed."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..kernel.core import PAGE_BYTES
from ..kernel.mappings import sys_is_there
from ..kernel.support import Check, KernelSupport
from ..kernel.trial import dumpable

__all__ = ["container", "headroom_bytes", "limits", "permissions", "surroundings"]

_CAP_SYS_PTRACE = 19
_NOT_TOLD = "not told by /proc"
_ROOM_FOR_MAPPINGS, _ROOM_FOR_DESCRIPTORS, _ROOM_FOR_MARKERS_BYTES = 1024, 16, 32 << 20


def surroundings(support: KernelSupport) -> dict[str, Any]:
    """Permissions, container and limits, in what JSON has."""
    return {
        "permissions": [check._asdict() for check in permissions(support)],
        "container": [container(support)._asdict()],
        "limits": [check._asdict() for check in limits()],
        "headroom_bytes": headroom_bytes(),
    }


def _text(path: str) -> str:
    """What a small file says; empty where it cannot be read."""
    with suppress(OSError, UnicodeDecodeError), open(path) as file:
        return file.read().strip()
    return ""


def _status(field: str) -> str:
    for line in _text("/proc/self/status").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return value.strip()
    return ""


# ---- permissions ----------------------------------------------------------------------------------------------------

_TO_OPEN = {
    "userfaultfd user mode": "a filter or security module that lets userfaultfd pass: docs/containers.md",
    "/dev/userfaultfd": "as root: chmod a+rw /dev/userfaultfd; in a container: --device /dev/userfaultfd",
    "userfaultfd full": "sysctl vm.unprivileged_userfaultfd=1, or the capability CAP_SYS_PTRACE",
}


def permissions(support: KernelSupport) -> Iterator[Check]:
    """Who this process is to the kernel, and which doors are open to it."""
    if support.problem:
        return
    for door, number in support.door_errnos.items():
        if not number:
            yield Check(door, True, "opens", "", needed=False)
            continue
        said = f"{errno.errorcode.get(number, number)}: {os.strerror(number)}"
        if support.door:
            said += ", and not needed"
        forbidden = door == "userfaultfd full" and support.door_errnos["userfaultfd user mode"]
        # Who may not even open the user mode, which takes no privilege, has a filter in the way, not a lack of one.
        yield Check(door, False, said, _TO_OPEN["userfaultfd user mode" if forbidden else door], needed=False)
    yield _sysctl()
    yield _capability()
    yield _user_namespace()
    yield _dumpable(support)
    yield _seccomp(support)


def _sysctl() -> Check:
    value = _text("/proc/sys/vm/unprivileged_userfaultfd")
    said = {"0": "0: the full mode takes CAP_SYS_PTRACE", "1": "1: the full mode is open to all"}
    missing = "not there" if Path("/proc/sys").exists() else _NOT_TOLD
    return Check("vm.unprivileged_userfaultfd", True, said.get(value, value or missing), "", needed=False)


def _capability() -> Check:
    bits = _status("CapEff")
    has = f"{_NOT_TOLD} whether with it"
    if bits:
        has = "with it" if int(bits, 16) >> _CAP_SYS_PTRACE & 1 else "without it"
    said = f"user {os.geteuid()}, {has}; for other users' processes and the full mode"
    return Check("CAP_SYS_PTRACE", True, said, "", needed=False)


def _user_namespace() -> Check:
    mapped = _text("/proc/self/uid_map").split()
    if not mapped and not Path("/proc/self/uid_map").exists():
        return Check("user namespace", True, _NOT_TOLD, "", needed=False)
    first = mapped[:3] == ["0", "0", str((1 << 32) - 1)]
    said = (
        "the machine's own" if first else "one of its own: its capabilities open nothing outside; user mode needs none"
    )
    return Check("user namespace", True, said, "", needed=False)


def _dumpable(support: KernelSupport) -> Check:
    may = dumpable() == 1
    ok = may or not support.pagemap_errno
    if may:
        said = "yes: its user's other processes may look at it"
    else:
        said = "no: only root may look at it" + ("" if ok else ", and it may not open its own page map")
    remedy = "" if ok else "prctl(PR_SET_DUMPABLE, 1), or open the session before privileges are given up"
    return Check("dumpable", ok, said, remedy, needed=False)


def _seccomp(support: KernelSupport) -> Check:
    mode = _status("Seccomp")
    filtered = mode == "2"
    ok = not filtered or support.door is not None
    said = "a filter is in force" if filtered else "no filter" if mode else _NOT_TOLD
    if filtered and support.door:
        said += f", and lets {support.door} pass"
    remedy = "" if ok else "a profile that allows userfaultfd: docs/containers.md"
    return Check("seccomp", ok, said, remedy, needed=False)


# ---- containers -----------------------------------------------------------------------------------------------------

_BY_FILE = {"/.dockerenv": "Docker", "/run/.containerenv": "Podman", "/run/systemd/container": ""}
_BY_CGROUP = ("kubepods", "docker", "containerd", "libpod", "lxc", "nspawn")


def _container_name() -> str:
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return "Kubernetes"
    for path, name in _BY_FILE.items():
        if Path(path).exists():
            return name or _text(path) or "a container"
    groups = _text("/proc/1/cgroup")
    return next((name for name in _BY_CGROUP if name in groups), "")


def container(support: KernelSupport) -> Check:
    """Which container this seems to be, and the door that it leaves open."""
    name = _container_name()
    if support.door:
        return Check("container", True, f"{name or 'none seen'}; the door is {support.door}", "", needed=False)
    said = f"{name or 'none seen'}; no door is open"
    return Check(
        "container", not name, said, "a seccomp profile or a device: docs/containers.md" if name else "", False
    )


# ---- limits ---------------------------------------------------------------------------------------------------------


def limits() -> Iterator[Check]:
    """What a process that tracks may run into."""
    yield _mappings()
    yield _descriptors()
    yield _memory_cgroup()
    yield _huge_pages()


def _mappings() -> Check:
    most = _text("/proc/sys/vm/max_map_count")
    if not most.isdecimal():
        return Check("vm.max_map_count", True, _NOT_TOLD, "", needed=False)
    used = len(_text("/proc/self/maps").splitlines())
    ok = int(most) - used >= _ROOM_FOR_MAPPINGS
    said = f"{most} mappings, {used} in use; each region that adjoins no other may take two more"
    return Check("vm.max_map_count", ok, said, "" if ok else "sysctl vm.max_map_count=262144", needed=False)


def _descriptors() -> Check:
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    used, in_use = 0, f"{_NOT_TOLD} how many are open"
    with suppress(OSError):
        used = len([*Path("/proc/self/fd").iterdir()]) - 1
        in_use = f"{used} in use"
    if most == resource.RLIM_INFINITY:
        return Check("open files", True, f"no limit, {in_use}", "", needed=False)
    ok = most - used >= _ROOM_FOR_DESCRIPTORS
    return Check("open files", ok, f"{most}, {in_use}; a session takes two", "" if ok else "ulimit -n", needed=False)


def _groups() -> Iterator[tuple[str, str, str]]:
    """Files of each memory cgroup above this process: (limit, used, cache that can be dropped)."""
    for line in _text("/proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        names = path.strip("/").split("/") if path.strip("/") else []
        if number == "0":
            root, most, used = "/sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, most, used = "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        for depth in range(len(names), -1, -1):
            folder = "/".join([root, *names[:depth]])
            yield f"{folder}/{most}", f"{folder}/{used}", f"{folder}/memory.stat"


def headroom_bytes() -> int | None:
    """How much memory the memory cgroups leave, files' cache that can be dropped counted as free; None: no limit."""
    room = None
    for most, used, stat in _groups():
        limit, usage = _text(most), _text(used)
        if not limit.isdecimal() or not usage.isdecimal() or int(limit) >= 1 << 62:
            continue
        cache = 0
        for line in _text(stat).splitlines():
            name, _, value = line.partition(" ")
            if name in ("inactive_file", "total_inactive_file"):
                cache = int(value)
        left = max(0, int(limit) - int(usage) + cache)
        room = left if room is None else min(room, left)
    return room


def _memory_cgroup() -> Check:
    room = headroom_bytes()
    if room is None:
        said = "no limit seen" if _text("/proc/self/cgroup") else _NOT_TOLD
        return Check("memory cgroup", True, said, "", needed=False)
    ok = room >= _ROOM_FOR_MARKERS_BYTES
    gib = room * (PAGE_BYTES // 8) >> 30
    said = f"{room >> 20} MiB left: markers for {gib} GiB of memory that is armed and was never touched"
    remedy = "" if ok else "register sparse memory with arm='present', or raise the limit: beyond it the kernel kills"
    return Check("memory cgroup", ok, said, remedy, needed=False)


def _huge_pages() -> Check:
    pool, memory = {}, _text("/proc/meminfo")
    for line in memory.splitlines():
        name, _, value = line.partition(":")
        if name in ("HugePages_Total", "HugePages_Free"):
            pool[name] = value.strip()
    setting = _text("/sys/kernel/mm/transparent_hugepage/enabled")
    missing = "not there" if sys_is_there() else "not told by /sys"
    chosen = setting[setting.find("[") + 1 : setting.find("]")] if "[" in setting else missing
    free = f"{pool.get('HugePages_Free', '0')} of {pool.get('HugePages_Total', '0')} free in the pool (vm.nr_hugepages)"
    said = f"{free if memory else f'the pool is {_NOT_TOLD}'}; transparent ones: {chosen}"
    return Check("huge pages", True, said, "", needed=False)

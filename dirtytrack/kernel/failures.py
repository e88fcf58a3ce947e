# SPDX-License-Identifier: MIT
"""From (code, dt_failure) to an exception that says what happened, where, why, and what to do.

The one place that knows what an errno means at which step (measured, Linux 6.1 to 7.3).
"""

from __future__ import annotations

import errno as _errno
from typing import TYPE_CHECKING, Any, NoReturn

from .. import errors
from . import core, mappings

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..region import Region

__all__ = ["INSTEAD", "WAYS_TO_A_USERFAULTFD", "describe", "error_of", "forked", "raise_failure", "unreadable_maps"]

WAYS_TO_A_USERFAULTFD = (
    (
        "in a container: run it with --device /dev/userfaultfd and read and write permission on that device, or with a "
        "seccomp profile that allows the userfaultfd system call (--security-opt seccomp=profile.json)"
    ),
    "on the host: chmod a+rw /dev/userfaultfd (a udev rule keeps it so)",
    "under a seccomp filter or security module of your own (systemd's SystemCallFilter=, SELinux): allow userfaultfd",
)
"""No sysctl and no capability: the door that is part of every kernel that can track takes neither."""

_DOCTOR = "`dirtytrack doctor` tells what this machine can do."
INSTEAD = (
    'Or do without the kernel: track(..., backend="compare"), which reads and compares all of the memory at each '
    "collect, and takes as much again."
)
_OR_NOT = f"{INSTEAD} {_DOCTOR}"
_LIMIT_ERRNOS = (_errno.EMFILE, _errno.ENFILE, _errno.ENOMEM, _errno.ENOSPC)


def describe(start: int, end: int) -> str:
    return f"[{start:#x}, {end:#x})"


def _name(number: int) -> str:
    return _errno.errorcode.get(number, f"errno {number}")


def _where(start: int, end: int, region: Region | None) -> str:
    span = describe(start, end) if end else ""
    if region is None:
        return span or "memory"
    return f"region {region.name!r} {span or describe(region.start, region.end)}"


def forked(what: str) -> errors.UsedAfterFork:
    return errors.UsedAfterFork(
        f"this {what} was made before a fork, and this is the child: here it would act on the parent's memory. "
        "Make a new one in the child; what the child inherited is closed, the parent is undisturbed"
    )


def unreadable_maps(error: OSError, start: int, end: int) -> Exception:
    """The exception for a failed look at the mappings of [start, end)."""
    why = core.new_failure()
    why.step, why.start, why.end = core.lib.DT_STEP_MAPS, start, end
    return error_of(-(error.errno or _errno.EIO), why, "look at the memory")


def raise_failure(
    code: int,
    why: Any,
    doing: str,
    *,
    find: Callable[[int], Region | None] | None = None,
    region: Region | None = None,
) -> NoReturn:
    """Raise what `error_of` makes of it."""
    raise error_of(code, why, doing, find=find, region=region)


def error_of(
    code: int,
    why: Any,
    doing: str,
    *,
    find: Callable[[int], Region | None] | None = None,
    region: Region | None = None,
    pid: int | None = None,
) -> Exception:
    """The exception for a failed call of the core.

    Args:
        code: what the call returned.
        why: its dt_failure, or None.
        doing: what was being done, as in "register the memory".
        find: the region of an id in the failure.
        region: the region in question, where the caller knows.
        pid: the process in question, where it is another one.
    """
    lib = core.lib
    step = why.step if why else lib.DT_STEP_NONE
    start, end = (why.start, why.end) if why else (0, 0)
    if region is None and find is not None and why and why.region:
        region = find(why.region)
    if not end and region is not None:
        start, end = region.start, region.end
    if code > lib.DT_CLOSED:
        return _of_errno(-code, step, start, end, doing, region, pid)
    return _of_code(code, start, end, doing, region)


def _of_code(code: int, start: int, end: int, doing: str, region: Region | None) -> Exception:
    lib = core.lib
    where = _where(start, end, region)
    place: dict[str, Any] = {"start": start, "end": end, "region": region} if end else {"region": region}
    if code == lib.DT_CLOSED:
        return errors.SessionClosed(f"cannot {doing}: the session is closed. Open another `UffdSession`")
    if code == lib.DT_FORKED:
        return forked("session, or what was made from it,")
    if code == lib.DT_NOT_STARTED:
        return errors.NotStarted(f"cannot {doing}: the tracker is not running. Call `start()` or use it in a `with`")
    if code == lib.DT_RUNNING:
        return errors.AlreadyStarted(f"cannot {doing}: the tracker is running. `add()` takes more memory in")
    if code == lib.DT_NOT_WATCHED:
        return errors.InvalidMemory(
            f"cannot {doing}: {where} is not one of this tracker's regions: `add()` it", **place
        )
    if code == lib.DT_WATCHED:
        return errors.InvalidMemory(f"cannot {doing}: {where} is one of this tracker's regions already", **place)
    if code == lib.DT_GONE:
        return errors.RegionGone(
            f"cannot {doing}: a mapping of {where} went away while it was registered (munmap or mremap). "
            "`tracker.remove(error.region)` gives that region's last pages, and collecting goes on; nothing is lost",
            **place,
        )
    if code == lib.DT_UNREGISTERED:
        return errors.NotRegistered(
            f"cannot {doing}: {where} is no longer registered. Register the memory again", **place
        )
    if code == lib.DT_MISSED:
        return errors.MissedWrite(
            f"the audit found that {where} changed since the last collect without being reported. If "
            "`region.blind_spots` names no path by which it was written, please report this with the output of "
            "`dirtytrack doctor --json`",
            **place,
        )
    if code == lib.DT_TOO_SMALL:
        return errors.InvalidMemory(f"cannot {doing}: the buffer's length does not match the set's bytes", **place)
    if code == lib.DT_NOT_ANONYMOUS:
        return errors.InvalidMemory(
            f"cannot {doing} with arm='present': {where} is not private anonymous memory only, and of other memory a "
            "page that was swapped out looks like one never touched. Leave out arm=",
            **place,
        )
    if code == lib.DT_HUGETLB_MASK:
        return errors.InvalidMemory(
            f"cannot {doing}: an arming scan with another mask than exactly WRITTEN can hang the process for ever over "
            f"hugetlb memory, which {where} has. Use category_mask = return_mask = PageCategory.WRITTEN, or scan "
            "without WP_MATCHING",
            **place,
        )
    return errors.KernelRefused(f"cannot {doing}: the core answered {code}", **place)


def _of_errno(
    number: int, step: int, start: int, end: int, doing: str, region: Region | None, pid: int | None
) -> Exception:
    lib = core.lib
    if step == lib.DT_STEP_MAPS and number == _errno.ENODEV:
        number = _errno.ENOENT  # of opening /proc/self/maps; the core keeps ENOENT for "no mapping"
    name = _name(number)
    where = _where(start, end, region)
    place: dict[str, Any] = {"errno": number}
    if end:
        place.update(start=start, end=end)
    if region is not None:
        place["region"] = region
    if number == _errno.ENOMEM and step in (lib.DT_STEP_NONE, lib.DT_STEP_MEMORY):
        return MemoryError(f"cannot {doing}: out of memory")
    if step in (lib.DT_STEP_USERFAULTFD, lib.DT_STEP_API, lib.DT_STEP_PAGEMAP):
        return _of_opening(number, name, step, doing, pid)
    if step == lib.DT_STEP_REGISTER:
        return _of_register(number, name, start, end, doing, where, place)
    if step == lib.DT_STEP_SCAN:
        return _of_scan(number, name, start, end, doing, where, place, pid)
    if step == lib.DT_STEP_COPY and number == _errno.EFAULT:
        return errors.RegionGone(
            f"cannot {doing}: the page {describe(start, end)} vanished beneath the copy ({name}): its memory was "
            "unmapped or its file truncated. What was copied before it stays copied; the set is unchanged",
            **place,
        )
    if step == lib.DT_STEP_MAPS and number in (_errno.EACCES, _errno.EPERM, _errno.ENOENT):
        return errors.PermissionDenied(
            f"cannot {doing}: /proc/self/maps cannot be read ({name}). Mount /proc in this container", **place
        )
    if number in _LIMIT_ERRNOS:
        return _limit(number, name, doing, where, place)
    if step == lib.DT_STEP_EVENTS and number == _errno.EAGAIN:
        return errors.LimitReached(
            f"cannot {doing}: no thread can be started ({name}, RLIMIT_NPROC or the pids cgroup); raise it, or leave "
            "out events=True",
            feature="threads",
            **place,
        )
    if number == _errno.ENOENT and step == lib.DT_STEP_PROTECT:
        return errors.NotRegistered(f"cannot {doing}: {where} is not registered or not mapped ({name})", **place)
    if number == _errno.EINVAL:
        return errors.InvalidMemory(f"cannot {doing}: {where} is not a range that can be used ({name})", **place)
    return errors.KernelRefused(f"cannot {doing}: the kernel answered {name} for {where}. {_DOCTOR}", **place)


def _limit(number: int, name: str, doing: str, where: str, place: dict[str, Any]) -> Exception:
    if number in (_errno.EMFILE, _errno.ENFILE):
        limit = "RLIMIT_NOFILE" if number == _errno.EMFILE else "fs.file-max"
        cure = "raise it (ulimit -n)" if number == _errno.EMFILE else "raise that sysctl"
        return errors.LimitReached(
            f"cannot {doing}: no file descriptor is left ({name}, {limit}); {cure} or close some",
            feature=limit,
            **place,
        )
    return errors.LimitReached(
        f"cannot {doing}: the kernel has no memory for {where} ({name})", feature="kernel memory", **place
    )


def _of_opening(number: int, name: str, step: int, doing: str, pid: int | None) -> Exception:
    lib = core.lib
    if number in _LIMIT_ERRNOS:
        return _limit(number, name, doing, "a descriptor", {"errno": number})
    if step == lib.DT_STEP_PAGEMAP:
        path = f"/proc/{pid or 'self'}/pagemap"
        if pid is not None and number in (_errno.ENOENT, _errno.ESRCH):
            return errors.TargetGone(
                f"cannot {doing}: there is no process {pid} ({name} for {path})", errno=number, pid=pid
            )
        if number in (_errno.EACCES, _errno.EPERM):
            return errors.PermissionDenied(
                f"cannot {doing}: {path} may not be read ({name}). The process belongs to another user or is not "
                "dumpable: run as that user, or with CAP_SYS_PTRACE",
                errno=number,
                feature="/proc/PID/pagemap",
                pid=pid,
            )
        return errors.UnsupportedKernel(
            f"cannot {doing}: {path} is not there ({name}). The kernel needs CONFIG_PROC_PAGE_MONITOR, the container a "
            f"/proc{'' if pid is not None else '. ' + INSTEAD}",
            errno=number,
            feature="/proc/PID/pagemap",
        )
    if step == lib.DT_STEP_USERFAULTFD and number in (_errno.EPERM, _errno.EACCES):
        ways = "; ".join(WAYS_TO_A_USERFAULTFD)
        return errors.PermissionDenied(
            f"cannot {doing}: no userfaultfd may be opened here ({name} at each door). The unprivileged door is part "
            f"of every kernel that can track, so a filter forbids it. Ways out: {ways}. {_OR_NOT}",
            errno=number,
            feature="userfaultfd",
        )
    if step == lib.DT_STEP_USERFAULTFD:
        feature, needs = "userfaultfd", "CONFIG_USERFAULTFD"
    else:
        feature, needs = "UFFD_FEATURE_WP_ASYNC", "Linux 6.7 or newer with CONFIG_PTE_MARKER_UFFD_WP"
    return errors.UnsupportedKernel(
        f"cannot {doing}: this kernel lacks {feature} ({name}); it takes {needs} on x86-64 or arm64. {_OR_NOT}",
        errno=number,
        feature=feature,
    )


def _unusable(start: int, end: int) -> str:
    """What lies in [start, end) that cannot be registered: a hole, else the mapping that is not plain memory."""
    at = start
    suspect = ""
    try:
        for mapping in mappings.mappings(start, end):
            if mapping.start > at:
                return f"nothing is mapped at {describe(at, min(mapping.start, end))}"
            if mapping.name.startswith(("[v", "[uprobes]", "anon_inode:", "/dev/")) or not suspect:
                suspect = f"it holds the mapping {mapping}"
            at = mapping.end
    except OSError:
        return "its mappings cannot be read"
    return f"nothing is mapped at {describe(at, end)}" if at < end else suspect


def _of_register(
    number: int, name: str, start: int, end: int, doing: str, where: str, place: dict[str, Any]
) -> Exception:
    if number == _errno.EBUSY:
        return errors.RangeBusy(
            f"cannot {doing}: another userfaultfd of this process has part of {where} ({name} from UFFDIO_REGISTER; "
            "the kernel allows one a mapping), for example another explicit `UffdSession`. Share one session: "
            "`track()` does, and one session has any number of trackers",
            **place,
        )
    if number == _errno.EPERM:
        return errors.InvalidMemory(
            f"cannot {doing}: {where} is a shared mapping of a file that was opened read-only or sealed against "
            f"writing, or one of the kernel's own ({name} from UFFDIO_REGISTER): {_unusable(start, end)}. Map files "
            "writable",
            **place,
        )
    if number in (_errno.EINVAL, _errno.EFAULT):
        return errors.InvalidMemory(
            f"cannot {doing}: {where} cannot be tracked ({name} from UFFDIO_REGISTER): {_unusable(start, end)}. "
            "Ordinary memory can: anonymous, shared, or a file's; not a hole, the vdso, a device's or a ring's mapping",
            **place,
        )
    if number == _errno.ENOMEM:
        return errors.LimitReached(
            f"cannot {doing}: this process has as many mappings as it may ({name} from UFFDIO_REGISTER for {where}); "
            "each registered island splits a mapping. Raise the sysctl vm.max_map_count (sysctl -w "
            "vm.max_map_count=1048576) or register larger ranges",
            feature="vm.max_map_count",
            **place,
        )
    return errors.KernelRefused(f"cannot {doing}: UFFDIO_REGISTER answered {name} for {where}. {_DOCTOR}", **place)


def _of_scan(
    number: int, name: str, start: int, end: int, doing: str, where: str, place: dict[str, Any], pid: int | None
) -> Exception:
    if number == _errno.ESRCH:
        return errors.TargetGone(
            f"cannot {doing}: the process ended, or replaced itself by exec ({name} from PAGEMAP_SCAN)",
            pid=pid,
            **place,
        )
    if number == _errno.EPERM:
        return errors.NotRegistered(
            f"cannot {doing}: part of {where} is not registered for asynchronous write protection ({name} from "
            "PAGEMAP_SCAN with CHECK_WPASYNC): never registered, unmapped, or mapped anew. Pages before it may have "
            "been re-armed: what was found is on `error.partial`",
            **place,
        )
    if number in (_errno.ENOTTY, _errno.ENOSYS):
        return errors.UnsupportedKernel(
            f"cannot {doing}: this kernel has no PAGEMAP_SCAN ({name}); it takes Linux 6.7 or newer. {_OR_NOT}",
            feature="PAGEMAP_SCAN",
            **place,
        )
    if number == _errno.EINVAL:
        return errors.InvalidMemory(
            f"cannot {doing}: PAGEMAP_SCAN refused the question ({name}): a flag or category that this kernel does not "
            "know, or a start that is not on a page",
            **place,
        )
    if number == _errno.EFAULT:
        return errors.InvalidMemory(
            f"cannot {doing}: {describe(start, end)} is not in the address space ({name} from PAGEMAP_SCAN)", **place
        )
    if number in _LIMIT_ERRNOS:
        return _limit(number, name, doing, where, place)
    return errors.KernelRefused(f"cannot {doing}: PAGEMAP_SCAN answered {name} for {where}. {_DOCTOR}", **place)

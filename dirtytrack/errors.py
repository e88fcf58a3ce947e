# SPDX-License-Identifier: MIT
"""What can go wrong, by name.

::

    DirtyTrackError                              never raised itself
    ├── UnsupportedKernel    NotImplementedError this kernel, platform or build cannot do it
    ├── PermissionDenied     PermissionError     a sysctl, capability, seccomp filter or container forbids it
    ├── LimitReached         OSError             vm.max_map_count, descriptors, kernel memory
    ├── KernelRefused        OSError             an answer of the kernel that nothing above explains
    ├── InvalidMemory        ValueError          read-only, not contiguous, empty, not mappable, unknown here
    ├── InvalidDelta         ValueError          bytes that are no delta, or a damaged one
    ├── InvalidRecording     ValueError          a file that is no recording, a damaged one, or nothing in it matches
    ├── InvalidCheckpoint    ValueError          no store of checkpoints, one of another version, or one that cannot be
    ├── DamagedCheckpoint    OSError             bytes of a checkpoint are not what was written, or are missing
    ├── NoSuchGeneration     LookupError         the store has no checkpoint of that number, or none at all
    ├── StoreBusy            OSError             somebody else writes to the store
    ├── StoreFailed          OSError             the store's disk is full, read-only, broken, or went away
    ├── CheckpointerClosed   RuntimeError        the checkpointer, or the store, is closed
    ├── NotRegistered        ValueError          the memory is not registered, or is no longer
    ├── RangeBusy            OSError             another userfaultfd has the memory
    ├── RegionGone           OSError             a mapping went away beneath its region
    ├── TargetGone           ProcessLookupError  the process ended, or replaced itself by exec
    ├── TargetBusy           OSError             it does not stop, or a debugger has it
    ├── SessionClosed        RuntimeError        the session is closed
    ├── NotStarted           RuntimeError        the tracker is not running
    ├── AlreadyStarted       RuntimeError        the tracker is running
    ├── UsedAfterFork        RuntimeError        made before a fork, used in the child
    └── MissedWrite          RuntimeError        the audit found a change that nobody reported

    BlindSpotWarning         UserWarning         this memory can be written where no page table sees it
    GuardPageWarning         UserWarning         its owner puts guard pages into it, and might never come back

Each also derives from the built-in that a caller would catch, tells what happened, where, why, and what to do about
it, and carries ``errno`` where the kernel gave one. Memory that the core itself cannot get is a plain `MemoryError`.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .pagemap import Scan
    from .region import Region

__all__ = [
    "AlreadyStarted",
    "BlindSpotWarning",
    "CheckpointerClosed",
    "DamagedCheckpoint",
    "DirtyTrackError",
    "GuardPageWarning",
    "InvalidCheckpoint",
    "InvalidDelta",
    "InvalidMemory",
    "InvalidRecording",
    "KernelRefused",
    "LimitReached",
    "MissedWrite",
    "NoSuchGeneration",
    "NotRegistered",
    "NotStarted",
    "PermissionDenied",
    "RangeBusy",
    "RegionGone",
    "SessionClosed",
    "StoreBusy",
    "StoreFailed",
    "TargetBusy",
    "TargetGone",
    "UnsupportedKernel",
    "UsedAfterFork",
]


class DirtyTrackError(Exception):
    """The base of all errors of this library; never raised itself.

    Attributes:
        errno: the kernel's error number, or None where the kernel was not asked.
        feature: the kernel feature, system call or limit in question, or None.
        start, end: the addresses in question, half-open, or None.
        region: the `Region` in question, or None.
        pid: the process in question, or None.
        partial: what a failing `Pagemap.scan` had found before it failed, or None.
    """

    errno: int | None = None
    feature: str | None = None
    start: int | None = None
    end: int | None = None
    region: Region | None = None
    pid: int | None = None
    partial: Scan | None = None

    def __init__(
        self,
        message: str,
        *,
        errno: int | None = None,
        feature: str | None = None,
        start: int | None = None,
        end: int | None = None,
        region: Region | None = None,
        pid: int | None = None,
    ) -> None:
        super().__init__(message)
        self.errno = errno
        self.feature = feature
        self.start = start
        self.end = end
        self.region = region
        self.pid = pid

    _TRAVELLING: tuple[str, ...] = ("errno", "feature", "start", "end", "pid")
    """Numbers and words travel to another process; a region (it pins memory) and a partial scan do not."""

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), str(self), {name: getattr(self, name) for name in self._TRAVELLING})


def _rebuild(kind: type[DirtyTrackError], message: str, fields: dict[str, object]) -> DirtyTrackError:
    error = kind(message)
    for name, value in fields.items():
        setattr(error, name, value)
    return error


class UnsupportedKernel(DirtyTrackError, NotImplementedError):
    """This kernel, platform or build cannot do it; ``feature`` names what is missing. See ``dirtytrack doctor``."""


class PermissionDenied(DirtyTrackError, PermissionError):
    """A sysctl, a missing capability, a seccomp filter or a container forbids it; the message names the ways out."""


class LimitReached(DirtyTrackError, OSError):
    """A limit of the system was reached; ``feature`` names it (``vm.max_map_count``, ``RLIMIT_NOFILE``, …)."""


class KernelRefused(DirtyTrackError, OSError):
    """The kernel refused for a reason that this library has no better name for; ``errno`` tells which."""


class InvalidMemory(DirtyTrackError, ValueError):
    """The memory, or what was said about it, cannot be used: ``start`` and ``end`` tell where."""


class InvalidDelta(DirtyTrackError, ValueError):
    """These bytes are no delta, a damaged one, or one of another version; nothing was written."""


class InvalidRecording(DirtyTrackError, ValueError):
    """The file is no recording, one of another version, or damaged; or it has nothing of what was asked for."""


class InvalidCheckpoint(DirtyTrackError, ValueError):
    """No store of checkpoints, one of another version, or one whose contents cannot be; or a checkpoint cannot be so."""


class DamagedCheckpoint(DirtyTrackError, OSError):
    """Bytes of a checkpoint are not what was written, or are missing.

    Attributes:
        generation: the one in question, or None where the damage is the store's.
        damage: what is damaged, a sentence each.
        whole: the newest generation that is whole, or None where there is none or nobody looked.
    """

    generation: int | None = None
    damage: tuple[str, ...] = ()
    whole: int | None = None
    _TRAVELLING = (*DirtyTrackError._TRAVELLING, "generation", "damage", "whole")

    def __init__(
        self,
        message: str,
        *,
        generation: int | None = None,
        damage: tuple[str, ...] = (),
        whole: int | None = None,
        **known: Any,
    ) -> None:
        super().__init__(message, **known)
        self.generation = generation
        self.damage = damage
        self.whole = whole


class NoSuchGeneration(DirtyTrackError, LookupError):
    """The store has no checkpoint of that number, or none at all; the message tells which there are."""


class StoreBusy(DirtyTrackError, OSError):
    """Somebody else writes to the store; ``pid`` tells who, where the kernel says."""


class StoreFailed(DirtyTrackError, OSError):
    """The store cannot be read or written: a full disk, a broken or read-only one, a store that went away."""


class CheckpointerClosed(DirtyTrackError, RuntimeError):
    """The checkpointer is closed, or the store is."""


class NotRegistered(DirtyTrackError, ValueError):
    """The memory is not registered (any more), or a scan that insists on it met memory that is not."""


class RangeBusy(DirtyTrackError, OSError):
    """Another userfaultfd of this process has the memory: the kernel allows one a mapping."""


class RegionGone(DirtyTrackError, OSError):
    """A mapping went away beneath ``region``: [``start``, ``end``) is no longer there."""


class TargetGone(DirtyTrackError, ProcessLookupError):
    """The process ``pid`` ended, or replaced itself by exec."""


class TargetBusy(DirtyTrackError, OSError):
    """The process ``pid`` did not stop in time, or another tracer has it."""


class SessionClosed(DirtyTrackError, RuntimeError):
    """The session is closed."""


class NotStarted(DirtyTrackError, RuntimeError):
    """The tracker is not running."""


class AlreadyStarted(DirtyTrackError, RuntimeError):
    """The tracker is running."""


class UsedAfterFork(DirtyTrackError, RuntimeError):
    """A session, tracker or pagemap made before a fork was used in the child, where it would act on the parent."""


class MissedWrite(DirtyTrackError, RuntimeError):
    """The audit found that the page [``start``, ``end``) of ``region`` changed without being reported."""


class BlindSpotWarning(UserWarning):
    """This memory can be written where no page table sees it; ``region.blind_spots`` tells how."""


class GuardPageWarning(UserWarning):
    """This memory is shared or a file's and has guard pages; to add one while it is tracked may never end."""

# SPDX-License-Identifier: MIT
"""Sessions, regions and listeners of the C core, as functions that raise.

Handles are slots that exist before the C call that fills them (``dt_session **``, with a finaliser), so that an
interrupt between the C function's return and Python's next step leaks nothing. Finalisers only queue work.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, NamedTuple

from . import core, sets
from .abi import Fd, UffdFeature
from .core import new_failure
from .failures import error_of, raise_failure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ..region import Region
    from . import _taking
    from .core import CData

    Find = Callable[[int], Region | None]

__all__ = [
    "BACKENDS",
    "DOORS",
    "About",
    "Statistics",
    "about",
    "add",
    "close",
    "collect",
    "collect_into",
    "collecting",
    "door",
    "epoch",
    "features",
    "fileno",
    "flight",
    "generation",
    "guard_pages",
    "is_private_hugetlb",
    "kept_bytes",
    "listener_statistics",
    "mark_dirty",
    "new_listener",
    "open_session",
    "peek",
    "put_back",
    "register",
    "registered",
    "remove",
    "require",
    "resume",
    "session_slot",
    "session_statistics",
    "set_audit",
    "settle",
    "start",
    "state",
    "stop",
    "suspend",
    "take_error",
    "unregister",
    "watched",
    "write_protect",
]

DOORS = ("", "userfaultfd user mode", "/dev/userfaultfd", "userfaultfd full")
"""The ways to a userfaultfd, in the order in which they are tried; by number of the core."""

BACKENDS = ("kernel", "compare", "compare-hashes")
"""Who says what was written; by number of the core."""


class Statistics(NamedTuple):
    """What a session or a tracker did so far. Times are in nanoseconds, pages are base pages."""

    collects: int
    """Collecting passes."""
    scans: int
    """PAGEMAP_SCAN calls."""
    protects: int
    """UFFDIO_WRITEPROTECT calls."""
    pages_found: int
    """Written pages that scans found and re-armed: each cost its writer one fault."""
    pages_absent: int
    """Pages that only the pass for absent pages found (remedy R1)."""
    pages_lost: int
    """Pages discarded where the kernel's marker survives, found by the pass for those (remedy R2)."""
    pages_assumed: int
    """Pages that were told without having been watched, because that was cheaper than the faults."""
    faults_avoided: int
    """Those of them that were written, by what samples of them said: each would have cost its writer a fault."""
    overhead_ns: int
    """What adaptive tracking cost beside ``collect_ns``, by what things cost on this machine: the faults, and a copy
    of each assumed page that was not written. Counted from when that was measured: when many pages were written again
    and again."""
    predicted_ns: int
    """The same, as it was predicted one pass before."""
    pages_told: int
    """Pages that the kernel told of by an event (``UffdSession(events=True)``)."""
    pages_declared: int
    """Pages declared by `mark_dirty` and `in_flight`."""
    mappings_renewed: int
    """Replaced mappings that were registered again."""
    scans_refused: int
    """Scans that met EPERM; what they had found was harvested all the same."""
    scans_faulted: int
    """Scans that met EFAULT; their range was taken as dirty."""
    pages_audited: int
    """Clean pages whose hashes the audit compared."""
    collect_ns: int
    """Time inside collecting passes, nearly all of it in the kernel."""


def _check(code: int, why: CData, doing: str, find: Find | None = None, region: Region | None = None) -> None:
    if code:
        raise_failure(code, why, doing, find=find, region=region)


def _statistics(read: Callable[[CData, CData], int], handle: CData) -> Statistics:
    out = core.ffi.new("dt_statistics *")
    _check(read(handle, out), None, "read the statistics")
    return Statistics(*(getattr(out, name) for name in Statistics._fields))


# ---- sessions


def session_slot() -> CData:
    """An empty slot for a session, which is closed and dropped with it."""
    lib = core.lib

    def finish(slot: CData) -> None:
        # Nobody waits here: whoever is inside the session has a handle of it, and this is the last.
        if slot[0]:
            lib.dt_session_close(slot[0])
        lib.dt_session_drop(slot)

    return core.ffi.gc(core.ffi.new("dt_session **"), finish)


def open_session(remedy: int, *, events: bool = False, backend: str = "kernel") -> CData:
    """A slot with a session; the slot must live as long as what is in it is used. Dropping it closes the session.

    Closes, because sets that were delivered keep the core's session: the memory would stay registered, and busy for the
    next session, for as long as anybody keeps a set.
    """
    slot, why = session_slot(), new_failure()
    number = BACKENDS.index(backend)
    _check(core.lib.dt_session_open(remedy, events, number, slot, why), why, "open a session")
    return slot


def generation() -> int:
    """A number of this process, which no forked child shares."""
    return core.lib.dt_generation()


def close(session: CData) -> None:
    core.lib.dt_session_close(session)


def state(session: CData) -> int:
    """0, or not when it is closed or another process's; closes what a child inherited."""
    return core.lib.dt_session_state(session)


def require(session: CData) -> None:
    """Raise where it is closed, or another process's."""
    _check(state(session), None, "use the session")


def door(session: CData) -> str:
    return DOORS[core.lib.dt_session_door(session)]


def features(session: CData) -> UffdFeature:
    return UffdFeature(core.lib.dt_session_features(session))


def fileno(session: CData) -> Fd:
    return Fd(core.lib.dt_session_fd(session))


def session_statistics(session: CData) -> Statistics:
    return _statistics(core.lib.dt_session_statistics, session)


def kept_bytes(session: CData) -> int:
    """What a session that compares keeps to compare with."""
    return core.lib.dt_session_kept_bytes(session)


def suspend(session: CData) -> None:
    why = new_failure()
    _check(core.lib.dt_session_suspend(session, why), why, "suspend the session")


def resume(session: CData) -> None:
    why = new_failure()
    _check(core.lib.dt_session_resume(session, why), why, "resume the session")


def mark_dirty(session: CData, start: int, end: int) -> None:
    _check(core.lib.dt_mark_dirty(session, start, end), None, "mark memory dirty")


def flight(session: CData, start: int, end: int, *, begin: bool) -> None:
    """Begin or end. What has no session any more has ended."""
    code = core.lib.dt_in_flight(session, start, end, begin)
    if begin or code not in (core.lib.DT_CLOSED, core.lib.DT_FORKED):
        _check(code, None, "declare memory in flight")


# ---- regions


class About(NamedTuple):
    """What the core knows of a region."""

    number: int
    """In its session."""
    start: int
    end: int
    granule_bytes: int
    kinds: int
    """DT_KIND_ bits of what is mapped there."""
    arm: str
    """``all`` or ``present``."""
    aliases: int
    """Other mappings of the same memory in this process that are armed with it."""
    unseen_aliases: int
    """And those that could not be registered."""


_ARMS = {None: "DT_ARM_AUTO", "all": "DT_ARM_ALL", "present": "DT_ARM_PRESENT"}


def register(
    session: CData, address: int, nbytes: int, granule_bytes: int, arm: str | None, doing: str, *, pinned: bool = False
) -> tuple[CData, About]:
    """A slot with a region, and what it is. ``pinned``: somebody holds the memory, so that it can be read directly."""
    slot, why = core.ffi.gc(core.ffi.new("dt_region **"), core.lib.dt_region_drop), new_failure()
    arming = getattr(core.lib, _ARMS[arm]) | (core.lib.DT_PINNED if pinned else 0)
    _check(core.lib.dt_register(session, address, nbytes, granule_bytes, arming, slot, why), why, doing)
    return slot, about(slot[0])


def about(handle: CData) -> About:
    out = core.ffi.new("dt_region_info *")
    core.lib.dt_region_about(handle, out)
    arm = "present" if out.arming == core.lib.DT_ARM_PRESENT else "all"
    numbers = out.id, out.start, out.end, out.granule_bytes, out.kinds
    return About(*numbers, arm, out.aliases, out.unseen_aliases)


def is_private_hugetlb(about: About) -> bool:
    """Whether all of it is private memory of huge pages of the pool."""
    return about.kinds & ~core.lib.DT_KIND_GIGANTIC == core.lib.DT_KIND_ANONYMOUS | core.lib.DT_KIND_HUGETLB


def guard_pages(session: CData, start: int, end: int) -> int:
    """How many pages of it are guard pages."""
    out = core.ffi.new("uint64_t *")
    _check(core.lib.dt_guard_pages(session, start, end, out), None, "look for guard pages")
    return int(out[0])


def unregister(handle: CData, region: Region) -> bool:
    """False, and nothing done, while a listener watches it."""
    why = new_failure()
    code = core.lib.dt_unregister(handle, why)
    if code == -errno.EBUSY:
        return False
    _check(code, why, "unregister", region=region)
    return True


def registered(handle: CData) -> bool:
    return bool(core.lib.dt_region_registered(handle))


def write_protect(handle: CData, region: Region) -> None:
    why = new_failure()
    _check(core.lib.dt_write_protect(handle, why), why, "write-protect", region=region)


# ---- listeners


def new_listener(session: CData, *, adaptive: bool, exact: bool, page_ns: int) -> CData:
    """A slot with a listener."""
    slot = core.ffi.gc(core.ffi.new("dt_listener **"), core.lib.dt_listener_drop)
    _check(core.lib.dt_listener_new(session, slot), None, "make a tracker")
    _check(core.lib.dt_listener_wish(slot[0], adaptive, exact, page_ns), None, "make a tracker")
    return slot


def collecting(listener: CData, made: type[Any]) -> _taking.Collecting:
    """What collects all regions of a listener, without a budget, in the fewest steps; the caller keeps the listener.

    Its sets are delivered when it returns them. It raises `core.taking.Failed`, of which `take_error` makes the error
    that is meant; by then everything has gone back.
    """
    return core.taking.Collecting(int(core.ffi.cast("uintptr_t", listener)), made)


def take_error(failed: _taking.Failed, find: Find) -> Exception:
    why = sets.set_of(failed.args[0]).why
    return error_of(why.code, why, "collect", find=find)


def start(listener: CData, regions: Iterable[CData], find: Find) -> None:
    why = new_failure()
    handles = core.ffi.new("dt_region *[]", list(regions))
    _check(core.lib.dt_start(listener, handles, len(handles), why), why, "start the tracker", find)


def add(listener: CData, handle: CData, find: Find, region: Region | None) -> None:
    why = new_failure()
    _check(core.lib.dt_add(listener, handle, why), why, "add memory", find, region)


def _filled(
    call: Callable[..., int], arguments: tuple[Any, ...], doing: str, find: Find, region: Region | None = None
) -> CData:
    """A set that a call filled. Where it failed, what it took goes back to its listener at once."""
    cset = core.new_set()
    try:
        code = call(*arguments, cset)
        if code:
            raise error_of(code, cset.why, doing, find=find, region=region)
    except BaseException:  # an interrupt too
        core.give_back(cset)  # now, not when the last traceback that knows it goes
        raise
    return cset


def collect(listener: CData, region: Region | None, budget_seconds: float, find: Find) -> CData:
    return _filled(core.lib.dt_collect, (listener, _handle(region), budget_seconds), "collect", find, region)


def collect_into(listener: CData, region: Region | None, extents: CData, find: Find) -> CData:
    arguments = listener, _handle(region), extents, len(extents)
    return _filled(core.lib.dt_collect_into, arguments, "collect into the mirror", find, region)


def peek(listener: CData, region: Region | None, find: Find) -> CData:
    return _filled(core.lib.dt_peek, (listener, _handle(region)), "peek", find, region)


def remove(listener: CData, region: Region, find: Find) -> CData:
    return _filled(core.lib.dt_remove, (listener, _handle(region)), "remove a region", find, region)


def stop(listener: CData, find: Find) -> CData:
    return _filled(core.lib.dt_stop, (listener,), "stop the tracker", find)


def _handle(region: Region | None) -> CData:
    return core.ffi.NULL if region is None else region._handle


def put_back(listener: CData, cset: CData) -> None:
    _check(core.lib.dt_put_back(listener, cset), None, "put pages back")


def settle(cset: CData) -> None:
    """Let go of the regions of a final set that was delivered."""
    core.lib.dt_settle(cset)


def watched(listener: CData) -> tuple[int, ...]:
    """The numbers of the regions that it watches."""
    room = 0
    while True:
        ids = core.ffi.new("uint64_t[]", room)
        count = core.lib.dt_watched(listener, ids, room)
        if count < 0:
            _check(count, None, "look what is watched")
        if count <= room:
            return tuple(ids[i] for i in range(count))
        room = count


def epoch(listener: CData) -> int:
    return core.lib.dt_epoch(listener)


def set_audit(listener: CData, share: float) -> None:
    _check(core.lib.dt_audit(listener, share), None, "turn the audit on")


def listener_statistics(listener: CData) -> Statistics:
    return _statistics(core.lib.dt_listener_statistics, listener)

# SPDX-License-Identifier: MIT
"""Who writes to an object store: terms, of which the highest counts, and a lease that is renewed.

A term is an object that is made by a conditional put, so that each has one holder. **What keeps two writers apart is
the number**: whoever finds a higher term has lost the right, whatever clocks say. The lease only says when somebody may
begin the next term. All ages are those of the store's own clock.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import socket
import threading
import time
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from ...errors import DirtyTrackError, StoreBusy, StoreFailed
from .bucket import Absent, Present, put_once

if TYPE_CHECKING:
    from .bucket import Bucket, Found

__all__ = ["WRITERS", "Lease", "term_of_key"]

_log = logging.getLogger("dirtytrack")
WRITERS = "writers"
_TERM = re.compile(rf"{WRITERS}/([0-9]{{16}})\.writer")
_PROBE = re.compile(rf"{WRITERS}/[0-9a-f]{{32}}\.probe")
_PROBE_SECONDS = 3600.0
_PATIENCE_SECONDS = 5.0  # with a renewal that is under way
_ATTEMPTS = 4
_held: set[str] = set()
"""Leases of this process, which it has not let go of."""


class _Told(NamedTuple):
    """What the object of a term says."""

    id: str
    state: str
    seconds: float
    host: str
    boot: str
    pids: int
    pid: int
    started: int

    @classmethod
    def of(cls, data: bytes) -> _Told | None:
        try:
            told = json.loads(data)
            found = cls(*(told[name] for name in cls._fields))
            return found if all(type(a) is type(b) for a, b in zip(found, _NONE, strict=True)) else None
        except (ValueError, KeyError, TypeError):
            return None

    def encode(self) -> bytes:
        return json.dumps(self._asdict()).encode() + b"\n"


_NONE = _Told("", "", 0.0, "", "", 0, 0, 0)


def term_of_key(key: str) -> int | None:
    """The number of a term, by its object's key; None where it is none."""
    found = _TERM.fullmatch(key)
    return int(found[1]) if found else None


def _key(term: int) -> str:
    return f"{WRITERS}/{term:016d}.writer"


class Lease:
    """The right to write, until somebody else begins a term.

    Args:
        bucket: where.
        seconds: after which others may take it over, where it was not renewed.

    Raises:
        StoreBusy: somebody else has it.
        StoreFailed: the store does not honour conditional puts.

    Thread safety: everything may be called from any thread.
    """

    def __init__(self, bucket: Bucket, seconds: float) -> None:
        self._bucket, self._seconds = bucket, seconds
        self._id = os.urandom(16).hex()
        self._lost: StoreBusy | None = None
        self._over = threading.Event()
        self._pid = os.getpid()
        listing, probe = self._probed()
        self._now, self._at = probe.modified, time.clock_gettime(time.CLOCK_BOOTTIME)
        _held.add(self._id)  # before it can be found: another thread of ours would take us for dead
        try:
            self.term = self._begin(listing, probe)
            self.require()  # where the listing was old, a term that is over and gone could be begun anew
        except BaseException:
            _held.discard(self._id)
            raise
        self._thread = threading.Thread(
            target=_renew, args=(weakref.ref(self), self._over, seconds / 3), name="dirtytrack-lease", daemon=True
        )
        self._thread.start()

    def now(self) -> float:
        """The store's clock, in seconds since 1970; not later than it is."""
        return self._now + time.clock_gettime(time.CLOCK_BOOTTIME) - self._at

    # ---- getting it

    def _probed(self) -> tuple[list[Found], Found]:
        """The terms that there are, and an object that was put just now; found out with it: whether puts are
        conditional."""
        key = f"{WRITERS}/{self._id}.probe"
        try:
            put_once(self._bucket, key, self._id.encode())
            if not self._refuses(key):
                raise StoreFailed(
                    f"{self._bucket.name} cannot be a store of checkpoints: it puts an object though there is one, "
                    "where it was asked not to (If-None-Match: *), so that two who write at once would overwrite each "
                    "other. Use a store that honours conditional puts",
                    errno=errno.ENOTSUP,
                    feature="conditional put",
                )
            listing = self._bucket.list(WRITERS)
            probe = next((each for each in listing if each.key == key), None)
            if probe is None:
                raise StoreFailed(
                    f"{self._bucket.name} cannot be a store of checkpoints: what was put is not in its listing",
                    errno=errno.ENOTSUP,
                    feature="list",
                )
            return listing, probe
        finally:
            with suppress(DirtyTrackError):  # else it goes when it is old
                self._bucket.delete([key])

    def _refuses(self, key: str) -> bool:
        """Whether the store refuses to put an object where there is one."""
        problem: StoreFailed | None = None
        for _ in range(_ATTEMPTS):
            try:
                self._bucket.create(key, b"another")
                return False
            except Present:
                return True
            except StoreFailed as error:
                problem = error
        assert problem is not None
        raise problem

    def _begin(self, listing: list[Found], probe: Found) -> int:
        terms = sorted((term, each) for each in listing if (term := term_of_key(each.key)) is not None)
        last = terms[-1][0] if terms else 0
        if terms:
            self._require_over(terms[-1][1], probe)
        term = last + 1
        try:
            put_once(self._bucket, _key(term), self._told("held"))
        except Present as error:
            raise StoreBusy(
                f"somebody else just became the writer of {self._bucket.name}: one at a time may save, compact or prune"
            ) from error
        old = [each.key for each in listing if _PROBE.fullmatch(each.key) and self._is_old(each, probe)]
        with suppress(DirtyTrackError):  # the next writer's, else
            self._bucket.delete([each.key for _, each in terms] + old)
        return term

    @staticmethod
    def _is_old(each: Found, probe: Found) -> bool:
        return probe.modified - each.modified > _PROBE_SECONDS

    def _require_over(self, last: Found, probe: Found) -> None:
        """Refuse while the holder of the last term may be at work."""
        try:
            told = _Told.of(self._bucket.get(last.key))
        except Absent:
            return  # somebody began the next one, which the conditional put finds out
        age = probe.modified - last.modified
        seconds = self._seconds if told is None else told.seconds
        if age > seconds or (told is not None and (told.state != "held" or _is_dead(told))):
            return
        left = f"its lease ends in {max(seconds - age, 0):.0f} s unless it renews it"
        if told is None:
            raise StoreBusy(f"somebody writes to the store {self._bucket.name}: {left}")
        here = told.boot == _boot() and told.pids == _pids()
        who = "this process" if here and told.pid == os.getpid() else f"process {told.pid}"
        where = "" if here else f" on {told.host}"
        raise StoreBusy(
            f"{who}{where} writes to the store {self._bucket.name}: one at a time may save, compact or prune. Close "
            f"the other, or wait: {left}",
            pid=told.pid if here else None,
        )

    def _told(self, state: str) -> bytes:
        told = _Told(
            self._id,
            state,
            float(self._seconds),
            socket.gethostname(),
            _boot(),
            _pids(),
            os.getpid(),
            _started(os.getpid()),
        )
        return told.encode()

    # ---- having it

    def require(self) -> None:
        """Refuse, where somebody else began a term.

        Raises:
            StoreBusy.
            PermissionDenied, StoreFailed: nobody knows.
        """
        if self._lost is not None:
            raise self._lost.with_traceback(None)
        highest = max((term_of_key(each.key) or 0 for each in self._bucket.list(WRITERS)), default=0)
        if highest != self.term:
            self._lost = StoreBusy(
                f"somebody else became the writer of {self._bucket.name}, as this one had not renewed its lease of "
                f"{self._seconds:.0f} s in time, or its term was removed. What the other saves counts: open the store "
                "anew, with resume=True, once the other is done"
            )
            raise self._lost

    def renew(self) -> None:
        """Say that the holder is at work; never fails."""
        try:
            self.require()
            self._bucket.put(_key(self.term), self._told("held"))
        except StoreBusy as error:
            _log.warning("%s", error)
            self._over.set()
        except DirtyTrackError as error:
            _log.info("the lease of %s was not renewed: %s", self._bucket.name, error)

    def release(self) -> None:
        """Let go of it; never fails."""
        if self._over.is_set() and self._id not in _held:
            return
        self._over.set()
        _held.discard(self._id)
        if os.getpid() != self._pid:
            return
        self._thread.join(_PATIENCE_SECONDS)
        if self._lost is None:
            with suppress(DirtyTrackError):  # it ends by itself
                self._bucket.put(_key(self.term), self._told("released"))

    def drop(self) -> None:
        """Let go of it without a word to the store: it ends by itself, for this process at once."""
        self._over.set()
        _held.discard(self._id)


def _renew(lease: weakref.ref[Lease], over: threading.Event, seconds: float) -> None:
    while not over.wait(seconds):
        found = lease()
        if found is None:
            return
        found.renew()
        del found


# ---- whether a holder is alive, where that can be known


def _boot() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def _pids() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino  # noqa: PTH116 - of a link to nowhere
    except OSError:
        return 0


def _started(pid: int) -> int:
    """When a process began, in the kernel's ticks; 0 where it is dead.

    Raises:
        OSError: that cannot be known.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return 0
    except PermissionError:
        pass  # somebody else's, which /proc may hide
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        words = file.read().rpartition(")")[2].split()
    return 0 if words[0] in "ZXx" else int(words[19])


def _is_dead(told: _Told) -> bool:
    if not told.boot or not told.pids or told.boot != _boot() or told.pids != _pids():
        return False  # of another machine or container
    if told.pid == os.getpid() and told.started == _started(told.pid):
        return told.id not in _held
    try:
        return _started(told.pid) != told.started
    except OSError:
        return False


def _after_fork() -> None:
    _held.clear()


os.register_at_fork(after_in_child=_after_fork)

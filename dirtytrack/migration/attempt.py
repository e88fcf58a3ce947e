# SPDX-License-Identifier: MIT
"""One attempt of a source: connect, bulk, rounds, stop, decide."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ..dirtyset import DirtySet
from ..errors import (
    CallbackFailed,
    DirtyTrackError,
    GoalMissed,
    MemoryDiffers,
    MigrationAborted,
    MigrationFailed,
    PeerLost,
    ProtocolViolated,
)
from ..kernel.core import PAGE_BYTES
from ..kernel.moving import DIGEST_BYTES, Moving, round_trip_seconds
from ..kernel.packing import xxh64
from ..layout import held
from . import joining, wire
from .joining import Address
from .policy import Policy, RoundReport
from .populated import populated
from .sending import Part, Senders
from .telling import Migrated, Progress
from .transport import Budget, Link
from .wire import BODY_BYTES, Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..region import Region
    from ..tracker import DirtyTracker
    from .policy import Decision, Goal
    from .source import Source

__all__ = ["Attempt", "Heart", "digest_of"]

_TELL_SECONDS = 0.2
_ROUND_TRIPS = 3  # of a stop: the round's end, FINISH and READY, COMMIT and COMMITTED
_LAST_WORD_SECONDS = 1.0
_VERIFY_BYTES_PER_SECOND = 5e9  # of one thread that reads and hashes
_FIRST_OVERHEAD = 0.002  # seconds: threads woken
_MOST_LOOKED = 1024  # pages of what remains, that are looked at: a millisecond in which the source writes on


class Heart(threading.Thread):
    """Says ALIVE on a control connection, four times in the shorter of both time-outs.

    Args:
        link: the connection.
        theirs: the other side's time-out.
        arrived: what to tell with it.
    """

    def __init__(self, link: Link, theirs: float, arrived: Callable[[], int] = lambda: 0) -> None:
        super().__init__(name="dirtytrack-alive", daemon=True)
        self._link, self._arrived, self._every = link, arrived, min(link.timeout, theirs) / 4
        self._stop = threading.Event()
        self.start()

    def run(self) -> None:
        """Until it is stopped, or the connection ends."""
        while not self._stop.wait(self._every):
            try:
                self._link.send(Kind.ALIVE, number=self._arrived())
            except MigrationFailed:
                return

    def stop(self) -> None:
        """Say no more."""
        self._stop.set()


def digest_of(tables: Sequence[Moving], state: bytes) -> str:
    """What FINISH says of all memory and the state, in hexadecimal digits."""
    out = b""
    for seed in (0, 1):
        found = seed
        for moving in tables:
            found = xxh64(moving.table, found)
        out += (xxh64(state, found) if state else found).to_bytes(8, "little")
    return out.hex()


class Attempt:
    """From connecting to COMMITTED. What fails, raises; the source decides what comes of it.

    Args:
        source: whose memory.
        tracker: that runs.
        address: the destination's.
        goal: what is wanted.
    """

    def __init__(self, source: Source, tracker: DirtyTracker, address: Address, goal: Goal) -> None:
        self._source, self._tracker, self._address = source, tracker, address
        self._policy = Policy(goal)
        self._hand_over = source.hand_over
        self._taken: list[DirtySet] = []
        self._control: Link | None = None
        self._heart: Heart | None = None
        self._senders: Senders | None = None
        self._links: list[Link] = []
        self._regions: list[tuple[Region, Moving, Any]] = []
        self._reports: list[RoundReport] = []
        self._began = self._stopped_at = time.perf_counter()
        self._overhead = _FIRST_OVERHEAD
        self._collect_seconds = 0.0  # of the last collect
        self._decision: Decision | None = None
        self._slowed = False
        self._downtime = 0.0
        self.promised_maybe = False  # FINISH was sent

    # ---- the whole

    def run(self) -> Migrated:
        """Do it."""
        source = self._source
        source.tell(Progress("connecting"))
        self._connect()
        self._round(0, self._bulk())
        number = 1
        while True:
            report = self._reports[-1]
            self._decision = decision = self._policy.decide(report)
            self._tell("rounds", report, decision.reason)
            if decision.action == "abort":
                missed = GoalMissed(
                    f"the goal cannot be met: {decision.reason}. The source runs on. Ask for a longer max_downtime, "
                    "for on_divergence='proceed' or 'slow', or give it more bandwidth"
                )
                missed.predicted_downtime = decision.predicted_downtime
                raise missed
            if decision.action == "slow":
                self._slow(decision.step)
            if decision.action == "stop":
                break
            self._round(number, self._dirty())
            number += 1
        self._stop(number)
        return self.result()

    def result(self, resolved: str | None = None) -> Migrated:
        """What it was like."""
        decision = self._decision
        assert decision is not None, "it was stopped by one"
        return Migrated(
            downtime=self._downtime or time.perf_counter() - self._stopped_at,
            predicted_downtime=decision.predicted_downtime,
            reason=decision.reason,
            rounds=tuple(self._reports),
            seconds=time.perf_counter() - self._began,
            sent_bytes=self._sent_bytes,
            resolved=resolved,
            stop_seconds=self._source.stop_seconds,
        )

    @property
    def _sent_bytes(self) -> int:
        control = self._control.sent_bytes if self._control is not None else 0
        return control + sum(link.sent_bytes for link in self._links)

    def _call(self, what: str, function: Callable[..., Any] | None, *arguments: Any) -> Any:
        if function is None:
            return None
        try:
            return function(*arguments)
        except Exception as error:
            raise CallbackFailed(f"{what}() failed: {error!r}. The source runs on") from error

    # ---- connecting

    def _connect(self) -> None:
        source, address, hand_over = self._source, self._address, self._hand_over
        about = address, source.timeout, source.tls
        control = joining.connect(*about, source.token, "control", hand_over.migration, hand_over.attempt)
        self._control = control
        self._regions = [(region, self._moving(region), held(region)) for region in self._tracker.regions]
        control.send(
            Kind.OPEN,
            {
                "page_bytes": PAGE_BYTES,
                "seed": source.seed.hex(),
                "connections": source.connections,
                "codec": int(source.codec),
                "delta": source.delta,
                "verify": source.verify,
                "timeout_ms": int(source.timeout * 1000),
                "regions": [
                    {"name": region.name, "nbytes": region.nbytes, "phase": moving.phase}
                    for region, moving, _ in self._regions
                ],
            },
        )
        while (frame := self._expect(Kind.HAVE, Kind.OPENED)).kind is Kind.HAVE:
            self._note(frame)
        said = wire.json_of(frame)
        source.secret = wire.hexadecimal(said, "secret", 32)
        self._heart = Heart(control, wire.seconds(said, "timeout_ms"))
        began = time.perf_counter()
        hand_over.begin_journal(
            address=str(address), secret=source.secret.hex(), token=bool(source.token), tls=source.tls is not None
        )
        self._overhead += 2 * (time.perf_counter() - began) if hand_over.journal is not None else 0.0
        key = source.token + source.secret
        for _ in range(source.connections):
            link = joining.connect(*about, key, "pages", hand_over.migration, hand_over.attempt)
            self._links.append(link)
        self._overhead += _ROUND_TRIPS * round_trip_seconds(control.sock)
        began = time.perf_counter()
        digest_of([moving for _, moving, _ in self._regions], b"")
        self._overhead += 2 * (time.perf_counter() - began)  # one side after the other
        self._senders = Senders(self._links, PAGE_BYTES, source.codec, Budget(source.bandwidth), delta=source.delta)

    def _moving(self, region: Region) -> Moving:
        span = region._span
        moving = Moving(
            region.address,
            region.nbytes,
            phase=region.address % PAGE_BYTES,
            page_bytes=PAGE_BYTES,
            seed=self._source.seed,
            unpinned=span.unpinned,
            through=region._handle if span.compared_by else None,
        )
        if self._source.delta:
            moving.keep_sent()
        return moving

    def _note(self, frame: wire.Frame) -> None:
        head = frame.header
        if head.region >= len(self._regions) or head.body_bytes % DIGEST_BYTES or not head.body_bytes:
            raise ProtocolViolated("the destination says that it has pages of no region")
        moving = self._regions[head.region][1]
        if head.number + head.body_bytes // DIGEST_BYTES > moving.pages:
            raise ProtocolViolated("the destination says that it has more pages than there are")
        moving.note(head.number, frame.body)

    # ---- rounds

    def _bulk(self) -> list[Part]:
        """What is populated, and what the destination has that is not zero."""
        dirty = self._tracker.collect()  # from here on what is written is in the next round
        self._taken.append(dirty)
        parts = []
        for number, (region, moving, _) in enumerate(self._regions):
            found = DirtySet.from_runs(populated(region)) | self._had(region, moving) | dirty.in_region(region)
            parts.append(Part(number, moving, found))
        return parts

    def _had(self, region: Region, moving: Moving) -> DirtySet:
        block, start = BODY_BYTES // DIGEST_BYTES, region.address - moving.phase
        runs = []
        for first in range(0, moving.pages, block):
            count = min(block, moving.pages - first)
            if moving.others(first, count):
                runs.append((start + first * PAGE_BYTES, start + (first + count) * PAGE_BYTES))
        return DirtySet.from_runs([(low, high) for low, high in _joined(runs)])

    def _dirty(self) -> list[Part]:
        began = time.perf_counter()
        dirty = self._tracker.collect()
        self._collect_seconds = time.perf_counter() - began
        self._taken = [DirtySet.union([*self._taken, dirty])]
        return [Part(i, moving, dirty.in_region(region)) for i, (region, moving, _) in enumerate(self._regions)]

    def _round(self, number: int, parts: list[Part], *, timeout: float | None = None) -> None:
        """Send a round, and wait until all of it is there."""
        senders, control = self._senders, self._control
        assert senders is not None, "connected"
        assert control is not None, "connected"
        began, sent, pages = time.perf_counter(), senders.sent_bytes, senders.sent_pages
        moved = sum(part.dirty.page_count for part in parts) * PAGE_BYTES
        until = None if timeout is None else began + timeout
        senders.begin(number, parts)
        try:
            while not senders.wait(_TELL_SECONDS if until is None else min(_TELL_SECONDS, max(until - began, 0.001))):
                self._look(until)
                if number == 0 or until is None:
                    self._tell("bulk" if number == 0 else "rounds", self._so_far(number, moved, began, sent), "")
        except PeerLost as error:
            if error is senders.failure:
                self._said_why()
            raise
        self._wait_for(Kind.ARRIVED, number, until)
        seconds = time.perf_counter() - began
        remaining, differing = (0, 0) if timeout is not None else self._remaining()
        report = self._report(number, moved, senders.sent_bytes - sent, seconds, remaining)
        changed = (senders.sent_pages - pages) * PAGE_BYTES
        self._reports.append(report._replace(changed_bytes=changed, remaining_changed_bytes=differing))

    def _remaining(self) -> tuple[int, int]:
        """How much is dirty; and how much of it, as far as a sample tells, the destination has not as it is: what was
        written before a round read it has been sent as it is."""
        dirty = self._tracker.peek()
        every, looked, differing = 1 + dirty.page_count // _MOST_LOOKED, 0, 0
        for region, moving, _ in self._regions:
            found = moving.differing(dirty.in_region(region)._set, every)
            looked, differing = looked + found[0], differing + found[1]
        return dirty.nbytes, dirty.nbytes * differing // looked if looked else dirty.nbytes

    def _report(self, number: int, moved: int, sent: int, seconds: float, remaining: int) -> RoundReport:
        elapsed = time.perf_counter() - self._began
        overhead = self._overhead + self._collect_seconds + self._verify_seconds() + self._source.stop_seconds
        can_slow = self._source.slow is not None
        return RoundReport(number, moved, sent, seconds, remaining, elapsed, self._sent_bytes, overhead, can_slow)

    def _so_far(self, number: int, moved: int, began: float, sent: int) -> RoundReport:
        assert self._senders is not None, "connected"
        done = self._senders.sent_bytes - sent
        return self._report(number, done, done, time.perf_counter() - began, max(moved - done, 0))

    def _look(self, until: float | None) -> None:
        """Whether somebody said stop, or it takes too long."""
        if self._source.stopping.is_set():
            raise MigrationAborted("abort() was called: the source runs on")
        if until is not None and time.perf_counter() > until:
            raise PeerLost(
                f"the source was paused for {self._source.stop_timeout:g} s (stop_timeout) and not everything had "
                "arrived: it runs on"
            )

    def _wait_for(self, kind: Kind, number: int, until: float | None = None) -> wire.Frame:
        """A frame on the control connection; ALIVE tells that there is progress."""
        frame = self._expect(kind, until=until)
        if frame.header.number != number:
            raise ProtocolViolated(f"{self._address} answers {kind.name} to what nobody asked")
        return frame

    def _expect(self, *kinds: Kind, until: float | None = None) -> wire.Frame:
        """A frame of these types on the control connection. It may take long, as long as ALIVE comes in between, and
        tells, where pages are waited for, that more and more arrives."""
        control = self._control
        assert control is not None, "connected"
        arrived, last = -1, time.perf_counter()
        before = control.timeout
        try:
            while True:
                if until is not None:
                    control.set_timeout(max(min(before, until - time.perf_counter()), 0.01))
                try:
                    frame = control.receive()
                except PeerLost:
                    self._look(until)
                    raise
                if frame.kind in kinds:
                    return frame
                if frame.kind is not Kind.ALIVE:
                    control.refuse_unexpected(frame)
                self._look(until)
                now = time.perf_counter()
                if frame.header.number != arrived:
                    arrived, last = frame.header.number, now
                elif Kind.ARRIVED in kinds and now - last > before:
                    raise PeerLost(f"nothing arrives at {control.peer} for {before:g} s: the link stands still")
        finally:
            control.set_timeout(before)

    def _said_why(self) -> None:
        """A destination that gives up says why before it closes."""
        control, until = self._control, time.perf_counter() + _LAST_WORD_SECONDS
        assert control is not None, "connected"
        while (left := until - time.perf_counter()) > 0:
            control.set_timeout(left)
            try:
                frame = control.receive()
            except MigrationFailed:
                return  # no word: what is known is the link's error
            if frame.kind is Kind.REFUSED:
                control.refuse_unexpected(frame)

    def _slow(self, step: float) -> None:
        self._slowed = True
        self._call("slow", self._source.slow, step)

    def _verify_seconds(self) -> float:
        """Both sides read, one after the other, what the bulk was."""
        if not self._source.verify or not self._reports:
            return 0.0
        return 2 * self._reports[0].moved_bytes / _VERIFY_BYTES_PER_SECOND

    def _tell(self, phase: str, report: RoundReport, reason: str) -> None:
        rate = report.remaining_bytes / report.seconds if report.seconds and phase != "bulk" else 0.0
        self._source.tell(
            Progress(
                phase,
                report.round,
                report.remaining_bytes,
                rate,
                report.moved_bytes / report.seconds if report.seconds else 0.0,
                None if phase == "bulk" else self._policy.predict(report),
                report.total_bytes,
                report.elapsed_seconds,
                reason,
            )
        )

    # ---- the end

    def _stop(self, number: int) -> None:
        source, control, hand_over = self._source, self._control, self._hand_over
        assert control is not None, "connected"
        if self._reports and self._decision is not None:  # before it stands still: what is told takes time
            self._tell("stopping", self._reports[-1], self._decision.reason)
        self._stopped_at = time.perf_counter()
        until = self._stopped_at + source.stop_timeout
        hand_over.stop()
        self._call("pause", source.pause)
        paused = time.perf_counter()
        self._round(number, self._dirty(), timeout=source.stop_timeout)
        asked = time.perf_counter()
        state = self._call("state", source.state)
        source.stop_seconds = paused - self._stopped_at + time.perf_counter() - asked
        state = b"" if state is None else self._call("state", lambda: bytes(memoryview(state)))
        for at in range(0, len(state), BODY_BYTES):
            control.send(Kind.STATE, state[at : at + BODY_BYTES], number=at)
        if source.verify:
            self._verify()
        digest = digest_of([moving for _, moving, _ in self._regions], state)
        self.promised_maybe = True
        try:
            control.send(Kind.FINISH, {"state_nbytes": len(state), "digest": digest})
        except PeerLost:
            self._said_why()
            raise
        self._wait_for(Kind.READY, 0, until)
        self._look(until)
        hand_over.decide()
        control.send(Kind.COMMIT, number=hand_over.attempt)
        self._hear_answer(control)
        self._downtime = time.perf_counter() - self._stopped_at
        hand_over.committed()
        last = self._reports[-1]
        source.tell(
            Progress("moved", last.round, total_bytes=self._sent_bytes, seconds=time.perf_counter() - self._began),
            guarded=True,
        )

    @staticmethod
    def _hear_answer(control: Link) -> None:
        """COMMITTED, in time: what nobody answers is in doubt, and that is better resolved soon."""
        until = time.perf_counter() + control.timeout
        while (left := until - time.perf_counter()) > 0:
            control.set_timeout(left)
            frame = control.receive()
            if frame.kind is Kind.COMMITTED:
                return
            if frame.kind is not Kind.ALIVE:
                control.refuse_unexpected(frame)
        raise PeerLost(f"{control.peer} does not answer the decision")

    def _verify(self) -> None:
        for region, moving, _ in self._regions:
            start = region.address - moving.phase
            for low, high in populated(region):
                first, behind = (max(low, start) - start) // PAGE_BYTES, (high - start) // PAGE_BYTES
                behind = min(behind, moving.pages)
                page = moving.digest(first, behind - first, check=True)
                if page < behind:
                    raise MemoryDiffers(
                        f"page {page} of region {region.name!r} is not what was sent, and nobody reported that it was "
                        "written: somebody writes it where no page table sees it (region.blind_spots), or was not "
                        "paused. The source runs on"
                    )

    # ---- when it is over

    def put_back(self) -> None:
        """What was collected, to the tracker: whoever collects next has it again."""
        taken, self._taken = self._taken, []
        for dirty in taken:
            with suppress(DirtyTrackError):
                self._tracker.put_back(dirty)
        if self._slowed and self._source.slow is not None:
            self._slowed = False
            with suppress(Exception):
                self._source.slow(0.0)

    def tell_abort(self, reason: str) -> None:
        """Tell the destination by the connection that there is."""
        if self._control is None:
            return
        with suppress(MigrationFailed):
            self._control.set_timeout(1.0)
            self._control.send(Kind.ABORT, {"reason": reason[:1000]}, number=self._hand_over.attempt)
            if self.promised_maybe:
                while self._control.receive().kind is not Kind.ABORTED:
                    pass
                self.promised_maybe = False

    def close(self) -> None:
        """End all connections."""
        if self._heart is not None:
            self._heart.stop()
        if self._senders is not None:
            self._senders.close()
        for link in self._links:
            link.close()
        if self._control is not None:
            self._control.close()
        self._regions = []


def _joined(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for low, high in runs:
        if out and out[-1][1] == low:
            out[-1] = (out[-1][0], high)
        else:
            out.append((low, high))
    return out

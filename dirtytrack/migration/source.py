# SPDX-License-Identifier: MIT
"""Source: moves the memory of something that keeps running, and stops it for the last bit only."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

from ..errors import (
    AlreadyStarted,
    CallbackFailed,
    DirtyTrackError,
    HandOverInDoubt,
    InvalidMemory,
    MigrationAborted,
    MigrationFailed,
    NotStarted,
    PeerRefused,
    SessionClosed,
    UnsupportedKernel,
    UsedAfterFork,
)
from ..tracker import DirtyTracker, track
from . import joining, packing
from .attempt import Attempt
from .handover import SourceHandOver, SourceState
from .joining import Address
from .journal import Journal
from .policy import Goal
from .telling import Doubt, Migrated, Progress
from .wire import MOST_CONNECTIONS, Codec, Kind, field, json_of

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from typing_extensions import Self

    from ..memory import AnyBuffer
    from .telling import Arbiter, Teller
    from .transport import Link

    Trackable = AnyBuffer | tuple[int, int]

__all__ = ["Source"]

_log = logging.getLogger("dirtytrack")
_ASK_SECONDS = 0.2  # between two tries to resolve a doubt
_SHORT = 2.0  # seconds that telling a failed attempt's destination may take


class Source:
    """The side that has the memory, and runs until the destination does.

    Nothing is tracked, and nothing connects, before `migrate`. If that fails, the source runs on as if nothing had
    been, and `migrate` can be called again: what the destination has already is not sent again.

    Args:
        memory: what to move: a buffer, an (address, nbytes) pair, or a mapping from names to such; or a tracker, whose
            collects are the migration's while it lasts. The destination knows the regions by their names.
        pause: stops all who write the memory, and returns when they have stopped.
        resume: lets them run again, after a failure; pause and resume may both be called twice in a row.
        state: called when paused: what else the destination needs, as bytes.
        stop_seconds: what ``pause`` and ``state`` take together, as far as you know, for the predicted downtime; what
            an attempt that failed behind them measured counts from then on.
        slow: called with a number from 0 (not at all) to 0.99: slows the writers, if the goal says so.
        connections: TCP connections for the bulk, 1 to 64.
        bandwidth: the most to send, in bytes a second.
        compress: ``"zstd"`` or ``"lz4"``, by the extra of that name, on both sides.
        delta: send of a page that was sent before only what differs, where that is much less. It costs memory here: a
            copy of all that was sent, as long as the migration lasts.
        verify: read all memory once more on both sides while neither runs, and compare: for the careful. It adds to the
            downtime, which the policy knows.
        tls: an `ssl.SSLContext` for clients.
        token: a secret that the destination has too.
        timeout: seconds without progress after which the other side counts as lost.
        stop_timeout: the most that the source stays paused before the decision: then it runs on and the attempt failed.
        doubt_timeout: seconds after which an ambiguous moment raises `HandOverInDoubt`; None: never.
        journal: a file in which the hand-over's steps are kept, for `dirtytrack migrate --resolve`.
        arbiter: asked in the ambiguous moment, until it says ``"source"`` or ``"destination"``: see `Doubt`.
        progress: called with a `Progress` several times a second. What it raises ends the attempt.

    Raises:
        InvalidMemory: an argument that cannot be.
        UnsupportedKernel: the package for ``compress`` is not installed.
        JournalUnusable.

    Thread safety: one migration at a time; `abort` from any thread.
    """

    def __init__(
        self,
        memory: DirtyTracker | Trackable | Mapping[str, Trackable],
        *,
        pause: Callable[[], object] | None = None,
        resume: Callable[[], object] | None = None,
        state: Callable[[], bytes] | None = None,
        stop_seconds: float = 0.0,
        slow: Callable[[float], object] | None = None,
        connections: int = 2,
        bandwidth: float | None = None,
        compress: Literal["zstd", "lz4"] | None = None,
        delta: bool = False,
        verify: bool = False,
        tls: ssl.SSLContext | None = None,
        token: str | bytes | None = None,
        timeout: float = 30.0,
        stop_timeout: float = 10.0,
        doubt_timeout: float | None = 60.0,
        journal: str | Path | None = None,
        arbiter: Arbiter | None = None,
        progress: Teller | None = None,
    ) -> None:
        if not 1 <= connections <= MOST_CONNECTIONS:
            raise InvalidMemory(f"connections are 1 to {MOST_CONNECTIONS}, not {connections}")
        if (pause is None) != (resume is None):
            raise InvalidMemory("pause and resume go together: what was paused must run again when a migration fails")
        for name, value in (("bandwidth", bandwidth), ("timeout", timeout), ("stop_timeout", stop_timeout)):
            if value is not None and not value > 0:
                raise InvalidMemory(f"{name} is more than 0, not {value}")
        self.codec = _codec(compress)
        self.memory, self.pause, self.resume, self.state, self.slow = memory, pause, resume, state, slow
        self.connections, self.bandwidth, self.verify, self.tls = connections, bandwidth, verify, tls
        self.token = token.encode() if isinstance(token, str) else token or b""
        self.timeout, self.stop_timeout, self.doubt_timeout = timeout, stop_timeout, doubt_timeout
        if not stop_seconds >= 0:
            raise InvalidMemory(f"stop_seconds is not less than 0, not {stop_seconds}")
        self.delta, self.stop_seconds = delta, stop_seconds
        self.arbiter, self.progress = arbiter, progress
        self.seed = secrets.token_bytes(32)
        self.secret = b""  # of the last attempt
        self.hand_over = SourceHandOver(secrets.token_bytes(16), None if journal is None else Journal(journal))
        self.stopping = threading.Event()
        self._tracker: DirtyTracker | None = None
        self._busy = threading.Lock()
        self._peer = Address("", 0, "")
        self._doubted: Attempt | None = None
        self._since = 0.0

    @property
    def migration(self) -> str:
        """The number of this migration in hexadecimal digits, which both sides know."""
        return self.hand_over.migration.hex()

    @property
    def may_run(self) -> bool:
        """Whether the source may run: not while it is paused, in doubt, or moved."""
        return self.hand_over.may_run

    def __repr__(self) -> str:
        return f"<Source {self.hand_over.state.value}, after {self.hand_over.attempt} attempts>"

    # ---- moving

    def migrate(self, to: str, goal: Goal | None = None) -> Migrated:
        """Move to a destination that listens there. Returns when it runs, and this side never will again.

        Args:
            to: ``tcp://host:port`` or ``unix:///path``.
            goal: what is wanted; left out, `Goal` as it is.

        Raises:
            MigrationFailed: one of its kinds says why; the source runs on (``error.running == "source"``).
            HandOverInDoubt: the one exception: neither side runs. `settle` tries on, `resolve` decides.
            AlreadyStarted: it is moving, or has moved.
            PermissionDenied, UnsupportedKernel, RangeBusy, LimitReached, InvalidMemory: the memory cannot be tracked.
            RegionGone: part of it went away while it was moved; the source runs on.
        """
        address = Address.of(to)
        if not self._busy.acquire(blocking=False):
            raise AlreadyStarted("this source is being moved already")
        try:
            self._require_running()
            self.stopping.clear()
            self._peer = address
            self.hand_over.begin(self.hand_over.attempt + 1)
            tracker, owned = self._tracked()
            attempt = Attempt(self, tracker, address, Goal() if goal is None else goal)
            try:
                return attempt.run()
            except BaseException as error:
                if self.hand_over.state is SourceState.COMMITTING:
                    if not isinstance(error, Exception):
                        raise  # Ctrl-C: `settle` goes on
                    self._doubted, self._since = attempt, time.monotonic()
                    return self._settle(error, self.doubt_timeout)
                if self.hand_over.state is not SourceState.MOVED:
                    self._run_on(attempt, error)
                raise
            finally:
                attempt.close()
                if owned:
                    self._let_go(tracker)
        finally:
            self._busy.release()

    def abort(self) -> None:
        """Have a migration that is under way fail with `MigrationAborted`, unless its hand-over has been decided."""
        self.stopping.set()

    def _require_running(self) -> None:
        state = self.hand_over.state
        if state is SourceState.COMMITTING:
            raise HandOverInDoubt("the last attempt is still in doubt: settle() tries on, resolve() decides")
        if state is SourceState.MOVED:
            raise AlreadyStarted("this source has moved: the destination runs")

    def _tracked(self) -> tuple[DirtyTracker, bool]:
        """A tracker that runs, and whether to end it afterwards."""
        if isinstance(self.memory, DirtyTracker):
            tracker = self.memory
            if tracker.epoch:
                return tracker, False
        else:
            # Exact: what was only assumed to be dirty would make the policy wait for a silence that never comes.
            tracker = self._tracker or track(self.memory, exact=True)
            self._tracker = tracker
        tracker.start()
        return tracker, True

    @staticmethod
    def _let_go(tracker: DirtyTracker) -> None:
        with suppress(NotStarted, SessionClosed, UsedAfterFork):
            try:
                tracker.stop()
            except DirtyTrackError as error:
                _log.warning("after a migration: %s", error)
                tracker.__exit__(None, None, None)

    # ---- when it fails

    def _run_on(self, attempt: Attempt, error: BaseException) -> None:
        """As if nothing had been: the decision was not taken."""
        stopped = self.hand_over.state is SourceState.STOPPED
        self.hand_over.back()
        try:
            if stopped and self.resume is not None:
                self.resume()
        except Exception as failed:
            broken = CallbackFailed(f"the migration failed ({error}), and resume() failed: {failed!r}")
            broken.running = None
            raise broken from failed
        finally:
            attempt.put_back()
            attempt.tell_abort(str(error) or type(error).__name__)
        if attempt.promised_maybe:
            self._tell_abort_anew(str(error))
        self.tell(Progress("failed", reason=str(error)), guarded=True)

    def _tell_abort_anew(self, reason: str) -> str | None:
        """The destination may have promised, and the link is gone: else it would stay in doubt until somebody looks.
        Where it stands before, if it can be reached."""
        attempt, standing = self.hand_over.attempt, None
        with suppress(MigrationFailed), self._ask_link(_SHORT) as link:
            link.send(Kind.ASK, number=attempt)
            standing = field(json_of(link.expect(Kind.STANDS)), "standing", str, 16)
            if standing != "committed":
                link.send(Kind.ABORT, {"reason": reason[:1000]}, number=attempt)
                link.expect(Kind.ABORTED)
        return standing

    def tell(self, progress: Progress, *, guarded: bool = False) -> None:
        """Call the progress function."""
        if self.progress is None:
            return
        try:
            self.progress(progress)
        except Exception as error:
            if not guarded:
                raise CallbackFailed(f"progress() failed: {error!r}") from error
            _log.warning("progress() failed: %r", error)

    # ---- the ambiguous moment

    def settle(self, timeout: float | None = None) -> Migrated:
        """Go on trying to resolve an ambiguous moment, as `migrate` did.

        Args:
            timeout: for so many seconds at most; None: as long as it takes.

        Returns:
            The destination runs.

        Raises:
            HandOverInDoubt: still not resolved.
            MigrationFailed: it is resolved, and the source runs on.
            NotStarted: nothing is in doubt.
        """
        if self.hand_over.state is not SourceState.COMMITTING:
            raise NotStarted("no hand-over of this source is in doubt")
        with self._busy:
            return self._settle(None, timeout)

    def resolve(self, runs: Literal["source", "destination"]) -> Literal["source", "destination"]:
        """Say which side runs, when `HandOverInDoubt` was raised. **Say the same on the other side:** see `Doubt`.

        Returns:
            Which side runs: not what was said where the destination can be reached, and runs.

        Raises:
            NotStarted: nothing is in doubt.
            CallbackFailed: resume() failed.
        """
        if self.hand_over.state is not SourceState.COMMITTING:
            raise NotStarted("no hand-over of this source is in doubt")
        with self._busy:
            told = self._tell_abort_anew("the verdict is that the source runs on") if runs == "source" else None
            self._decide("destination" if told == "committed" else runs)
            return "source" if self.may_run else "destination"

    def _decide(self, runs: str) -> None:
        if runs not in ("source", "destination"):
            raise InvalidMemory(f"a verdict is 'source' or 'destination', not {runs!r}")
        if runs == "destination":
            self.hand_over.committed()
            return
        self.hand_over.aborted()
        if self._doubted is not None:
            self._doubted.put_back()
        if self.resume is not None:
            try:
                self.resume()
            except Exception as error:
                broken = CallbackFailed(f"the source was to run on, and resume() failed: {error!r}")
                broken.running = None
                raise broken from error

    def _settle(self, cause: Exception | None, timeout: float | None) -> Migrated:
        began = time.monotonic()
        while True:
            waited = time.monotonic() - began
            self.tell(Progress("in doubt", seconds=waited, reason=str(cause or "")), guarded=True)
            standing = self._ask()
            if standing == "committed":
                self.hand_over.committed()
                return self._settled("destination")
            if standing == "aborted":
                self._decide("source")
                raise PeerRefused(f"the destination {self._peer} gave up: the source runs on") from cause
            verdict = self.hand_over.verdict() or self._arbitrate()
            if verdict == "destination":
                self._decide(verdict)
                return self._settled("verdict")
            if verdict is not None:
                if self._tell_abort_anew("the verdict is that the source runs on") == "committed":
                    continue  # it runs, whatever was said: asked once more, it says so
                self._decide(verdict)
                raise MigrationAborted(
                    "the answer to the decision was lost, and the verdict is that the source runs on"
                ) from cause
            if timeout is not None and waited >= timeout:
                raise HandOverInDoubt(
                    f"the decision was sent to {self._peer} and its answer is lost ({cause}); nobody could resolve it "
                    f"for {waited:.1f} s. Both sides keep everything, neither runs. Look whether the destination runs, "
                    "and call resolve() alike on both sides, or dirtytrack migrate --resolve JOURNAL"
                ) from cause
            time.sleep(_ASK_SECONDS if timeout is None else min(_ASK_SECONDS, max(timeout - waited, 0.0)))

    def _arbitrate(self) -> str | None:
        if self.arbiter is None:
            return None
        seconds = time.monotonic() - self._since
        try:
            return self.arbiter(Doubt("source", self.migration, self.hand_over.attempt, str(self._peer), seconds))
        except Exception as error:
            _log.warning("arbiter() failed: %r", error)
            return None

    def _ask_link(self, timeout: float) -> Link:
        hand_over = self.hand_over
        key = self.token + self.secret
        return joining.connect(self._peer, timeout, self.tls, key, "ask", hand_over.migration, hand_over.attempt)

    def _ask(self) -> str | None:
        """Where the destination stands; and if it waits for the decision, that."""
        attempt = self.hand_over.attempt
        try:
            with self._ask_link(min(self.timeout, 5.0)) as link:
                link.send(Kind.ASK, number=attempt)
                standing = field(json_of(link.expect(Kind.STANDS)), "standing", str, 16)
                if standing == "prepared":
                    link.send(Kind.COMMIT, number=attempt)
                    link.expect(Kind.COMMITTED)
                    return "committed"
                return standing
        except MigrationFailed as error:
            _log.info("nobody could be asked: %s", error)
            return None

    def _settled(self, by: str) -> Migrated:
        found = self._doubted
        assert found is not None, "a doubt has an attempt"
        return found.result(resolved=by)

    # ---- ending

    def close(self) -> None:
        """Let go of the memory, and of the journal. Not while it moves. A second call does nothing."""
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            tracker.__exit__(None, None, None)
        if self.hand_over.journal is not None:
            self.hand_over.journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _codec(name: str | None) -> Codec:
    codecs = {None: Codec.NONE, "zstd": Codec.ZSTD, "lz4": Codec.LZ4}
    if name not in codecs:
        raise InvalidMemory(f"compress is 'zstd' or 'lz4', not {name!r}")
    try:
        packing.compressor(codecs[name])
    except ImportError as error:
        raise UnsupportedKernel(
            f"compress={name!r} takes a package that is not installed: pip install 'dirtytrack[{name}]'", feature=name
        ) from error
    return codecs[name]

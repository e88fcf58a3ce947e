# SPDX-License-Identifier: MIT
"""Destination: takes in the memory of something that runs elsewhere, and runs it when the source has said so."""

from __future__ import annotations

import logging
import queue
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

import psutil

from ..errors import (
    CallbackFailed,
    DirtyTrackError,
    HandOverInDoubt,
    InvalidMemory,
    LayoutDiffers,
    MemoryDiffers,
    MigrationAborted,
    MigrationFailed,
    NotStarted,
    NotTrusted,
    PeerLost,
    ProtocolViolated,
)
from . import joining, packing, wire
from .attempt import Heart, digest_of
from .door import Door
from .handover import DestinationState, Impossible
from .joining import Address, Hello
from .receiving import Receiver, Session
from .telling import Arrival, Doubt, Progress
from .transport import Link
from .wire import MOST_CONNECTIONS, Codec, Kind

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable
    from pathlib import Path

    from typing_extensions import Self

    from .receiving import Given
    from .telling import Arbiter, Teller

__all__ = ["Destination"]

_log = logging.getLogger("dirtytrack")
_LOOK_SECONDS = 0.1
_LAST_WORD_SECONDS = 1.0


class Destination(Door):
    """The side that listens, takes memory in, and runs once the source has handed over.

    It tracks nothing and needs nothing of the kernel but sockets and memory.

    Args:
        listen: ``tcp://host:port`` (port 0: any that is free, see `address`) or ``unix:///path``. Beyond this machine
            only with ``tls`` or ``token``.
        memory: where to put it. None: fresh memory of `allocate`. A mapping from the regions' names to writable
            buffers: what is there is compared, and only what differs is sent. A function that takes the list of regions
            (each with ``name`` and ``nbytes``) and returns such a mapping: of memory that is all zero.
        prepare: called with an `Arrival` when everything is there, and **before** the source has decided: makes of it
            what will run, and does not run it. If it fails, the source runs on. It returns ``arrival.prepared``.
        abandon: called with what ``prepare`` returned, if the source runs on after all.
        max_bytes: the most memory that is taken; left out, what this machine has.
        max_state_bytes: the most state.
        tls: an `ssl.SSLContext` for servers; with ``verify_mode=ssl.CERT_REQUIRED`` the source must have a certificate.
        token: a secret that the source has too.
        timeout: seconds without a sign of life after which the source counts as lost.
        doubt_timeout: seconds after which an ambiguous moment raises `HandOverInDoubt`; None: never.
        journal: a file in which the hand-over's steps are kept.
        arbiter: asked in the ambiguous moment, until it says ``"source"`` or ``"destination"``: see `Doubt`.
        progress: called with a `Progress` several times a second.

    Raises:
        NotTrusted: it would listen to everybody.
        AddressUnusable: the port is taken.
        JournalUnusable.
        InvalidMemory: an argument that cannot be.

    Thread safety: one `receive` at a time.
    """

    def __init__(
        self,
        listen: str = "tcp://127.0.0.1:0",
        *,
        memory: Given = None,
        prepare: Callable[[Arrival], Any] | None = None,
        abandon: Callable[[Any], object] | None = None,
        max_bytes: int | None = None,
        max_state_bytes: int = 256 << 20,
        tls: ssl.SSLContext | None = None,
        token: str | bytes | None = None,
        timeout: float = 30.0,
        doubt_timeout: float | None = 60.0,
        journal: str | Path | None = None,
        arbiter: Arbiter | None = None,
        progress: Teller | None = None,
    ) -> None:
        if not timeout > 0:
            raise InvalidMemory(f"timeout is more than 0, not {timeout}")
        self._memory, self._prepare, self._abandon = memory, prepare, abandon
        self._max_bytes = psutil.virtual_memory().total if max_bytes is None else max_bytes
        self._max_state_bytes = max_state_bytes
        self._timeout, self._doubt_timeout = timeout, doubt_timeout
        self._arbiter, self._progress = arbiter, progress
        self._current: Link | None = None  # the control that is served
        self._heart: Heart | None = None  # its
        self._lingering: threading.Thread | None = None  # until the source has heard the last word
        self._source = ""
        self._began = self._since = 0.0
        self._state = b""
        self._verify = False
        self._failure: BaseException | None = None  # of a pages connection
        self._busy = threading.Lock()
        super().__init__(Address.of(listen), tls, token.encode() if isinstance(token, str) else token or b"", journal)

    @property
    def address(self) -> str:
        """Where it listens: what `Source.migrate` takes."""
        return str(self._listener.address)

    @property
    def may_run(self) -> bool:
        """Whether what has arrived may run: it has been committed."""
        session = self._session
        return session is not None and session.hand_over.may_run

    def __repr__(self) -> str:
        session = self._session
        return f"<Destination at {self.address}, {session.hand_over.state.value if session else 'waiting'}>"

    # ---- receiving

    def receive(self, timeout: float | None = None) -> Arrival:
        """Wait for a source, take everything in, and return when this side runs.

        Strangers, and sources that are refused, change nothing. What an attempt that failed has brought is kept: call
        it again, and a source that tries again sends only what is missing.

        Args:
            timeout: how long to wait for a source, in seconds; None: as long as it takes.

        Raises:
            TimeoutError: no source came in that time.
            MigrationFailed: an attempt failed; the source runs on (``error.running == "source"``).
            HandOverInDoubt: the one exception: this side promised and never heard the decision. Call `receive` again to
                wait on, or `resolve`.
        """
        if self._closed:
            raise NotStarted("this destination is closed")
        with self._busy:
            if self._session is not None and self._session.hand_over.state is DestinationState.PREPARED:
                return self._wait_in_doubt(None)
            if self.may_run:
                return self._arrival()
            until = None if timeout is None else time.monotonic() + timeout
            self._tell(Progress("waiting"))
            while True:
                found = self._next(until)
                try:
                    return self._serve(*found)
                except _Refused as refused:
                    _log.warning("a source was refused: %s", refused)
                except MigrationFailed as error:
                    if self._controls.empty():
                        raise
                    _log.warning("an attempt failed, and the next has come: %s", error)

    def _next(self, until: float | None) -> tuple[Link, Hello]:
        try:
            left = None if until is None else max(until - time.monotonic(), 0.0)
            found = self._controls.get(timeout=left)
        except queue.Empty:
            raise TimeoutError("no source came in time") from None
        if found is None:
            raise NotStarted("this destination was closed")
        return found

    def _serve(self, link: Link, hello: Hello) -> Arrival:
        """One attempt, from OPEN on."""
        self._began = time.monotonic()
        self._source = link.peer.removeprefix("the source").strip() or "unix"
        link.set_timeout(self._timeout)
        self._current = link
        try:
            session = self._begin(link, hello)
            try:
                self._take_in(session, link)
                return self._hear_decision(session, link)
            except BaseException as error:
                return self._failed(session, link, error)
        finally:
            if self._heart is not None:
                self._heart.stop()
            self._end_receiver()
            if not self.may_run:
                self._drop(link)
            with self._lock:
                self._current = None
                self._waiting -= 1

    def _received(self) -> int:
        receiver = self._receiver
        return receiver.received_bytes if receiver is not None else 0

    def _begin(self, link: Link, hello: Hello) -> Session:
        with self._lock:
            session = self._session
            if session is None or session.hand_over.migration != hello.migration:
                session = Session(hello.migration, self._journal, self._memory, self._max_bytes)
            prepared = session.hand_over.state is DestinationState.PREPARED
            try:
                session.begin(hello.attempt)
            except Impossible as error:
                joining.refuse(link, "unknown", f"this attempt is none: {error}")
                raise _Refused(str(error)) from None
        if prepared:
            self._call_abandon(session)
        try:
            said = wire.json_of(link.expect(Kind.OPEN))
            self._heart = Heart(link, wire.seconds(said, "timeout_ms"), self._received)
            codec, delta = _codec(said), wire.field(said, "delta", bool)
            connections = wire.field(said, "connections", int, MOST_CONNECTIONS)
            session.open(said)
            self._verify = wire.field(said, "verify", bool)
            session.tell(link)
            session.hand_over.begin_journal(
                address=self.address, secret=session.secret.hex(), token=bool(self._token), tls=self._tls is not None
            )
        except (DirtyTrackError, MemoryError) as error:
            joining.refuse(link, _kind_of(error), str(error) or "no memory")
            raise _Refused(str(error)) from error
        with self._lock:
            self._session = session
            self._state, self._failure = b"", None
            self._receiver = Receiver(
                session, connections, codec, delta, lambda error: self._cut(link, error), self._arrived(link)
            )
        link.send(Kind.OPENED, {"secret": session.secret.hex(), "timeout_ms": int(self._timeout * 1000)})
        return session

    def _arrived(self, link: Link) -> Callable[[int], None]:
        def arrived(round_: int) -> None:
            link.send(Kind.ARRIVED, number=round_)
            self._tell_receiving()

        return arrived

    def _cut(self, link: Link, error: BaseException) -> None:
        """A pages connection failed: say why, and wake whoever reads the control connection."""
        with self._lock:
            if self._failure is None:
                self._failure = error
        if not isinstance(error, PeerLost):
            joining.refuse(link, _kind_of(error), str(error) or type(error).__name__)
        link.cut()

    def _take_in(self, session: Session, link: Link) -> None:
        """Until FINISH, and READY."""
        state = bytearray()
        while (frame := link.expect(Kind.STATE, Kind.FINISH, Kind.ABORT, Kind.ALIVE)).kind is not Kind.FINISH:
            self._tell_receiving()
            if frame.kind is Kind.ABORT:
                self._aborted(session, link, frame)
            if frame.kind is Kind.STATE:
                if frame.header.number != len(state) or len(state) + len(frame.body) > self._max_state_bytes:
                    raise ProtocolViolated(f"the state is out of order, or longer than {self._max_state_bytes} bytes")
                state += frame.body
        receiver = self._receiver
        assert receiver is not None, "an attempt has one"
        receiver.finish()
        said = wire.json_of(frame)
        if wire.field(said, "state_nbytes", int) != len(state):
            raise ProtocolViolated("the state is not complete")
        self._state = bytes(state)
        if wire.field(said, "digest", str, 32) != digest_of(session.tables, self._state):
            raise MemoryDiffers("the digest of the memory that arrived is not the source's")
        if self._verify:
            session.verify()
        if self._prepare is not None:
            try:
                session.prepared = self._prepare(self._arrival())
            except Exception as error:
                raise CallbackFailed(f"prepare() failed: {error!r}") from error
        with self._lock:
            if session.hand_over.state is DestinationState.ABORTED:  # the source said so by another connection
                raise MigrationAborted("the source gave up meanwhile, and runs on")
            session.hand_over.prepared()
        self._since = time.monotonic()
        self._tell(Progress("prepared", receiver.round, seconds=time.monotonic() - self._began))
        link.send(Kind.READY)

    def _hear_decision(self, session: Session, link: Link) -> Arrival:
        frame = link.expect(Kind.COMMIT, Kind.ABORT)
        if frame.kind is Kind.ABORT:
            self._aborted(session, link, frame)
        with self._lock:
            self._commit(session, frame.header.number)
        with suppress(PeerLost):
            link.send(Kind.COMMITTED, number=frame.header.number)
        lingering = threading.Thread(target=self._linger, args=(link,), daemon=True)
        lingering.start()
        self._lingering = lingering  # which may be joined from then on, by whoever closes
        return self._run()

    def _linger(self, link: Link) -> None:
        """Until the source has closed: a socket that is closed with something unread takes back what it sent."""
        link.set_timeout(5.0)
        with suppress(MigrationFailed):
            while True:
                link.receive()
        self._drop(link)

    def _run(self) -> Arrival:
        session = self._session
        assert session is not None, "it was committed"
        session.let_go()
        arrival = self._arrival()
        self._tell(Progress("committed", total_bytes=arrival.received_bytes, seconds=arrival.seconds))
        return arrival

    def _arrival(self) -> Arrival:
        session, receiver = self._session, self._receiver
        assert session is not None, "something came"
        received = receiver.received_bytes if receiver is not None else 0
        seconds = time.monotonic() - self._began
        return Arrival(dict(session.memory), self._state, session.prepared, self._source, received, seconds)

    # ---- when it fails

    def _failed(self, session: Session, link: Link, error: BaseException) -> Arrival:
        with self._lock:
            state = session.hand_over.state
            failure, self._failure = self._failure, None
        if isinstance(error, PeerLost) and failure is not None:
            error = failure
        if state is DestinationState.COMMITTED:  # an asking connection brought the decision
            return self._run()
        if state is DestinationState.PREPARED:
            if not isinstance(error, MigrationFailed):
                raise error
            self._drop(link)
            return self._wait_in_doubt(error)
        if not isinstance(error, PeerLost):
            joining.refuse(link, _kind_of(error), str(error) or type(error).__name__)
        with self._lock:
            if state is not DestinationState.ABORTED:
                session.hand_over.abort()
        self._call_abandon(session)
        self._tell(Progress("failed", reason=str(error)))
        raise error

    def _aborted(self, session: Session, link: Link, frame: wire.Frame) -> None:
        reason = wire.field(wire.json_of(frame), "reason", str, 4096)
        with self._lock:
            session.hand_over.abort()
        with suppress(PeerLost):
            link.send(Kind.ABORTED, number=session.hand_over.attempt)
        raise MigrationAborted(f"the source gave up, and runs on: {reason}")

    def _call_abandon(self, session: Session) -> None:
        prepared, session.prepared = session.prepared, None
        if prepared is not None and self._abandon is not None:
            try:
                self._abandon(prepared)
            except Exception as error:
                _log.warning("abandon() failed: %r", error)

    # ---- the ambiguous moment

    def resolve(self, runs: Literal["source", "destination"]) -> Arrival | None:
        """Say which side runs, when `HandOverInDoubt` was raised. **Say the same on the other side:** see `Doubt`.

        Returns:
            What runs now, or None where the source does.

        Raises:
            NotStarted: nothing is in doubt.
        """
        session = self._session
        if session is None or session.hand_over.state is not DestinationState.PREPARED:
            raise NotStarted("no hand-over of this destination is in doubt")
        return self._decide(session, runs)

    def _decide(self, session: Session, runs: str) -> Arrival | None:
        if runs not in ("source", "destination"):
            raise InvalidMemory(f"a verdict is 'source' or 'destination', not {runs!r}")
        with self._lock:
            if session.hand_over.state is DestinationState.PREPARED:
                if runs == "destination":
                    session.hand_over.commit(session.hand_over.attempt)
                else:
                    session.hand_over.abort()
            state = session.hand_over.state
        if state is DestinationState.COMMITTED:
            return self._run()
        self._call_abandon(session)
        return None

    def _wait_in_doubt(self, cause: BaseException | None) -> Arrival:
        """Until the source comes again, or somebody knows."""
        session = self._session
        assert session is not None, "it is in doubt"
        began, hand_over = time.monotonic(), session.hand_over
        self._end_receiver()
        while True:
            waited = time.monotonic() - began
            if hand_over.state is DestinationState.COMMITTED:
                return self._run()
            if hand_over.state is DestinationState.ABORTED:
                self._call_abandon(session)
                raise MigrationAborted("the source gave up after all, and runs on") from cause
            self._tell(Progress("in doubt", seconds=waited, reason=str(cause or "")))
            verdict = hand_over.verdict() or self._arbitrate(session)
            if verdict is not None:
                arrival = self._decide(session, verdict)
                if arrival is not None:
                    return arrival
                raise MigrationAborted("the verdict is that the source runs on") from cause
            if self._doubt_timeout is not None and waited >= self._doubt_timeout:
                raise HandOverInDoubt(
                    f"this side promised to {self._source} and never heard the decision ({cause}); nobody could "
                    f"resolve it for {waited:.1f} s. Everything is kept, and does not run. Look whether the source "
                    "runs, and call resolve() alike on both sides, or dirtytrack migrate --resolve JOURNAL"
                ) from cause
            try:
                found = self._controls.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                continue
            if found is None:
                raise NotStarted("this destination was closed")
            if found[1].migration != hand_over.migration:
                joining.refuse(found[0], "busy", "another migration is in doubt here")
                self._drop(found[0])
                with self._lock:
                    self._waiting -= 1
                continue
            with suppress(_Refused):
                return self._serve(*found)

    def _arbitrate(self, session: Session) -> str | None:
        if self._arbiter is None:
            return None
        hand_over = session.hand_over
        seconds = time.monotonic() - self._since
        try:
            return self._arbiter(
                Doubt("destination", hand_over.migration.hex(), hand_over.attempt, self._source, seconds)
            )
        except Exception as error:
            _log.warning("arbiter() failed: %r", error)
            return None

    # ---- ending

    def _tell(self, progress: Progress) -> None:
        if self._progress is None:
            return
        try:
            self._progress(progress)
        except Exception as error:
            _log.warning("progress() failed: %r", error)

    def _tell_receiving(self) -> None:
        receiver = self._receiver
        if self._progress is None or receiver is None:
            return
        received, seconds = receiver.received_bytes, time.monotonic() - self._began
        rate = received / seconds if seconds else 0.0
        self._tell(Progress("receiving", receiver.round, bytes_per_second=rate, total_bytes=received, seconds=seconds))

    def _end_receiver(self) -> None:
        receiver = self._receiver
        if receiver is not None:
            receiver.close()

    def close(self) -> None:
        """Listen no more, and end all connections. What has arrived stays. A second call does nothing."""
        if self._closed:
            return
        if self._lingering is not None:
            self._lingering.join(_LAST_WORD_SECONDS)  # until the source has heard that this side runs
        self._closed = True
        self._listener.close()
        self._controls.put(None)
        with self._lock:
            links = tuple(self._links)
        for link in links:
            link.close()
        self._end_receiver()
        self._acceptor.join()
        if self._session is not None:
            self._session.let_go()
        if self._journal is not None:
            self._journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Refused(Exception):
    """A source came, and was told no before anything of it was here."""


def _codec(said: dict[str, Any]) -> Codec:
    try:
        codec = Codec(wire.field(said, "codec", int, Codec.LZ4))
        packing.compressor(codec)
    except ValueError:
        raise ProtocolViolated("pages are to be compressed in a way that this version does not know") from None
    except ImportError as error:
        raise LayoutDiffers(f"pages are to be compressed, and a package for it is missing here: {error}") from error
    return codec


def _kind_of(error: BaseException) -> str:
    for kind, names in (
        ("layout", LayoutDiffers),
        ("memory", MemoryDiffers),
        ("trust", NotTrusted),
        ("protocol", ProtocolViolated),
    ):
        if isinstance(error, names):
            return kind
    return "failed"

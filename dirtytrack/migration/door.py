# SPDX-License-Identifier: MIT
"""Who connects to a destination: strangers, sources, and sources that ask."""

from __future__ import annotations

import logging
import queue
import threading
import time
from typing import TYPE_CHECKING

from ..errors import DirtyTrackError, ProtocolViolated
from . import joining
from .handover import DestinationState, Impossible
from .joining import Address, Hello, Listener
from .journal import Journal
from .wire import Kind

if TYPE_CHECKING:
    import ssl
    from pathlib import Path

    from .receiving import Receiver, Session
    from .transport import Link

__all__ = ["Door"]

_log = logging.getLogger("dirtytrack")
_HANDSHAKE_SECONDS = 10.0
_HANDSHAKES = 16  # at once; more wait in the kernel's queue
_RETRY_SECONDS = 0.1


class Door:
    """Listens, and sorts who comes. Part of `Destination`, not to be made itself.

    Args:
        address: where to listen.
        tls: or None.
        token: or nothing.
        journal: a file, or None.
    """

    _current: Link | None

    def __init__(self, address: Address, tls: ssl.SSLContext | None, token: bytes, journal: str | Path | None) -> None:
        self._tls, self._token = tls, token
        self._lock = threading.RLock()  # of the session and its hand-over
        self._session: Session | None = None
        self._receiver: Receiver | None = None
        self._controls: queue.SimpleQueue[tuple[Link, Hello] | None] = queue.SimpleQueue()
        self._waiting = 0  # controls that are queued or served
        self._past: dict[tuple[bytes, int], tuple[bytes, str]] = {}
        self._closed = False
        self._links: set[Link] = set()
        self._room = threading.BoundedSemaphore(_HANDSHAKES)
        self._journal = None if journal is None else Journal(journal)
        try:
            guarded = bool(token) or (tls is not None and tls.verify_mode.name == "CERT_REQUIRED")
            self._listener = Listener(address, guarded=guarded)
        except BaseException:
            if self._journal is not None:
                self._journal.close()
            raise
        if self._journal is not None:
            self._remember(self._journal)
        self._acceptor = threading.Thread(target=self._accept, name="dirtytrack-accept", daemon=True)
        self._acceptor.start()

    def _remember(self, journal: Journal) -> None:
        """What an earlier process with this journal knew. What it had promised is gone with it, and will never run."""
        secret = b""
        for record in journal.before:
            try:
                key = bytes.fromhex(record["id"]), int(record["attempt"])
                secret = bytes.fromhex(record["secret"]) if "secret" in record else secret
            except (KeyError, ValueError, TypeError):
                continue
            if record.get("role", "destination") != "destination":
                continue
            standing = "committed" if record.get("state") == "committed" else "aborted"
            if "verdict" not in record:
                self._past[key] = secret, standing

    def _accept(self) -> None:
        while not self._closed:
            self._room.acquire()
            try:
                link = self._listener.accept(_HANDSHAKE_SECONDS)
            except OSError as error:
                self._room.release()
                if not self._closed:
                    _log.warning("accepting a connection failed: %s", error)
                    time.sleep(_RETRY_SECONDS)
                continue
            with self._lock:
                self._links.add(link)
            threading.Thread(target=self._greet, args=(link,), name="dirtytrack-greet", daemon=True).start()

    def _greet(self, link: Link) -> None:
        """Who is it? For so long at most, however slowly it speaks."""
        too_long = threading.Timer(_HANDSHAKE_SECONDS, link.cut)
        too_long.daemon = True
        too_long.start()
        kept = False
        try:
            hello = joining.welcome(link, self._tls, self._key_of)
            too_long.cancel()
            if hello.role == "control":
                kept = self._queue_control(link, hello)
            elif hello.role == "pages":
                receiver = self._receiver
                kept = receiver is not None and receiver.join(link)
            else:
                self._answer(link, hello)
        except DirtyTrackError as error:
            _log.info("a connection came to nothing: %s", error)
        finally:
            too_long.cancel()
            self._room.release()
            if not kept:
                self._drop(link)

    def _queue_control(self, link: Link, hello: Hello) -> bool:
        with self._lock:
            session = self._session
            same = session is not None and session.hand_over.migration == hello.migration
            bound = session is not None and session.hand_over.state in (
                DestinationState.PREPARED,
                DestinationState.COMMITTED,
            )
            if (self._waiting and not same) or (bound and not same) or self._closed or self._waiting > 3:
                joining.refuse(link, "busy", "another migration is under way here")
                return False
            if self._current is not None:
                self._current.cut()  # the same source has given that one up already
            self._waiting += 1
            self._controls.put((link, hello))
        return True

    def _key_of(self, hello: Hello) -> bytes | None:
        if hello.role == "control":
            return self._token
        with self._lock:
            session = self._session
            if session is not None and session.hand_over.migration == hello.migration:
                current = session.hand_over.attempt == hello.attempt
                secret = session.secrets.get(hello.attempt)
                if secret is not None and (hello.role == "ask" or current):
                    return self._token + secret
            past = self._past.get((hello.migration, hello.attempt))
        return self._token + past[0] if past is not None and hello.role == "ask" else None

    def _standing(self, hello: Hello) -> str:
        session = self._session
        if session is not None and session.hand_over.migration == hello.migration:
            if session.hand_over.attempt == hello.attempt:
                return session.hand_over.state.value
            return "aborted"  # a later attempt came, or a later one than was ever heard of
        return self._past.get((hello.migration, hello.attempt), (b"", "unknown"))[1]

    def _answer(self, link: Link, hello: Hello) -> None:
        """A source that asks, and what it decides then."""
        while True:
            frame = link.expect(Kind.ASK, Kind.COMMIT, Kind.ABORT)
            with self._lock:
                session, standing = self._session, self._standing(hello)
                mine = session is not None and session.hand_over.migration == hello.migration
                if frame.kind is Kind.COMMIT and mine and standing in ("prepared", "committed"):
                    assert session is not None, "it is ours"
                    self._commit(session, hello.attempt)
                if frame.kind is Kind.ABORT and mine and standing in ("prepared", "receiving"):
                    assert session is not None, "it is ours"
                    session.hand_over.abort()
                standing = self._standing(hello)
            if frame.kind is Kind.ASK:
                link.send(Kind.STANDS, {"standing": standing}, number=hello.attempt)
            elif (frame.kind is Kind.COMMIT) == (standing == "committed"):
                link.send(Kind.COMMITTED if standing == "committed" else Kind.ABORTED, number=hello.attempt)
            else:
                raise ProtocolViolated(f"{frame.kind.name} where this side stands at {standing}")

    def _commit(self, session: Session, attempt: int) -> None:
        try:
            session.hand_over.commit(attempt)
        except Impossible as error:
            raise ProtocolViolated(f"COMMIT does not belong here: {error}") from None

    def _drop(self, link: Link) -> None:
        link.close()
        with self._lock:
            self._links.discard(link)

# SPDX-License-Identifier: MIT
"""Links: addresses, TLS, who is who, frames through sockets, and how fast."""

from __future__ import annotations

import errno
import os
import secrets
import select
import socket
import ssl
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import (
    AddressUnusable,
    LayoutDiffers,
    MemoryDiffers,
    MigrationFailed,
    NotTrusted,
    PeerLost,
    PeerRefused,
    ProtocolViolated,
)
from . import wire
from .wire import HEADER_BYTES, PREAMBLE, Frame, Kind

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Address", "Budget", "Hello", "Link", "Listener", "connect", "refuse", "welcome"]

_TLS_BYTES = 64 << 10  # OpenSSL writes all that it is given, or nothing in time
_LOOPBACK = ("127.", "::1")
_REFUSALS: dict[str, type[MigrationFailed]] = {
    "layout": LayoutDiffers,
    "memory": MemoryDiffers,
    "trust": NotTrusted,
    "protocol": ProtocolViolated,
}
"""What a destination refuses for, where its reason has a name of its own."""


class Address(NamedTuple):
    """Where a destination listens: ``tcp://host:port`` or ``unix:///path``."""

    host: str
    port: int
    path: str

    @staticmethod
    def of(text: str) -> Address:
        """Read one.

        Raises:
            AddressUnusable: it is none.
        """
        kind, _, rest = text.partition("://")
        if kind == "unix" and rest:
            return Address("", 0, rest)
        host, colon, port = rest.rpartition(":")
        if kind != "tcp" or not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
            raise AddressUnusable(f"an address is tcp://host:port or unix:///path, not {text!r}")
        return Address(host.removeprefix("[").removesuffix("]"), int(port), "")

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        return bool(self.path) or self.host == "localhost" or self.host.startswith(_LOOPBACK)

    def __str__(self) -> str:
        if self.path:
            return f"unix://{self.path}"
        return f"tcp://[{self.host}]:{self.port}" if ":" in self.host else f"tcp://{self.host}:{self.port}"


class Budget:
    """A bandwidth that several threads share.

    Args:
        bytes_per_second: None: no limit.
    """

    def __init__(self, bytes_per_second: float | None) -> None:
        self._rate = bytes_per_second
        self._lock = threading.Lock()
        self._free_at = 0.0

    def spend(self, nbytes: int, stop: threading.Event) -> None:
        """Wait until so many bytes may be sent, or somebody says stop."""
        if not self._rate:
            return
        with self._lock:
            now = time.monotonic()
            at = max(self._free_at, now - 0.01)  # what was not used is lost, but for a little
            self._free_at = at + nbytes / self._rate
        if at > now:
            stop.wait(at - now)


class Link:
    """One connection: frames out, frames in. One thread may read while others write.

    Args:
        sock: connected.
        peer: how messages call the other side.
        timeout: seconds without progress until it counts as lost.
    """

    def __init__(self, sock: socket.socket, peer: str, timeout: float) -> None:
        self.sock, self.peer, self.timeout = sock, peer, timeout
        self.sent_bytes = 0
        self.received_bytes = 0
        self.welcome = False
        self.round_trip = 0.0
        """In seconds, as the handshake had it."""
        self._write = threading.Lock()
        # An OpenSSL connection is for one thread at a time (SSL_read(3)), and Python looks to that from 3.13 on only.
        self._alone = threading.RLock()
        self._head = bytearray(HEADER_BYTES)
        self._body = bytearray(4096)
        sock.settimeout(timeout)
        with suppress(OSError):  # no TCP
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def set_timeout(self, seconds: float) -> None:
        """Another time-out from now on."""
        self.timeout = seconds
        with suppress(OSError):  # it is closed
            self.sock.settimeout(seconds)

    # ---- out

    def send(self, kind: Kind, body: Any = b"", *, data: Any = b"", **header: Any) -> None:
        """Send a frame.

        Args:
            kind: its type.
            body: bytes, or what becomes JSON.
            data: of PAGES.
            header: number, region, codec.

        Raises:
            PeerLost: the link is gone, or stands still.
        """
        head, body = wire.frame(kind, body, data_bytes=len(data), **header)
        with self._write:
            self._send_all([head + body, data] if len(data) else [head + body])
        self.sent_bytes += len(head) + len(body) + len(data)

    def send_preamble(self) -> None:
        """Send the first eight bytes."""
        with self._write:
            self._send_all([PREAMBLE])

    def _send_all(self, parts: list[Any]) -> None:
        """Each piece may take as long as the time-out: a slow link is no broken one."""
        try:
            if isinstance(self.sock, ssl.SSLSocket):
                with self._alone:
                    for part in parts:
                        view = memoryview(part)
                        for at in range(0, len(view), _TLS_BYTES):
                            self.sock.sendall(view[at : at + _TLS_BYTES])
                return
            done = self.sock.sendmsg(parts)
            for part in parts:
                view = memoryview(part)[done:]
                done = max(done - len(part), 0)
                while view:
                    view = view[self.sock.send(view) :]
        except (OSError, ValueError) as error:
            raise self._lost(error, "takes nothing") from error

    def _lost(self, error: Exception, stands: str) -> MigrationFailed:
        if isinstance(error, ssl.SSLError) and "ALERT" in (error.reason or ""):
            return NotTrusted(f"{self.peer} does not trust this side's certificate: {error.reason}", errno=error.errno)
        if isinstance(error, TimeoutError):
            return PeerLost(f"{self.peer} {stands} for {self.timeout:g} s: it hangs, or the link stands still")
        number = error.errno if isinstance(error, OSError) else None
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return PeerLost(f"the link to {self.peer} broke: {why}", errno=number)

    # ---- in

    def read_preamble(self) -> None:
        """Read the first eight bytes.

        Raises:
            ProtocolViolated: another protocol or version.
            PeerLost: the link is gone.
        """
        first = bytearray(8)
        self._receive_into(memoryview(first))
        wire.preamble_of(bytes(first), self.peer)

    def receive(self) -> Frame:
        """Read a frame but its data, which `receive_data` reads. The body is good until the next call.

        Raises:
            PeerLost: the link is gone, or nothing came in time.
            ProtocolViolated: what came is no frame.
        """
        self._receive_into(memoryview(self._head))
        found = wire.header(self._head, welcome=self.welcome)
        if found.body_bytes > len(self._body):
            self._body = bytearray(found.body_bytes)
        body = memoryview(self._body)[: found.body_bytes]
        self._receive_into(body)
        wire.require_checksum(self._head, body, found)
        return Frame(found, body)

    def receive_data(self, view: memoryview) -> None:
        """Read the data of the frame before.

        Raises:
            PeerLost: the link is gone, or nothing came in time.
        """
        self._receive_into(view)

    def expect(self, *kinds: Kind) -> Frame:
        """Read a frame of one of these types, passing over ALIVE.

        Raises:
            PeerRefused, LayoutDiffers, MemoryDiffers, NotTrusted: it said no.
            PeerLost, ProtocolViolated.
        """
        while True:
            found = self.receive()
            if found.kind in kinds:
                return found
            if found.kind is not Kind.ALIVE:
                self.refuse_unexpected(found)

    def refuse_unexpected(self, found: Frame) -> None:
        """Raise what a frame that was not waited for means."""
        if found.kind is Kind.REFUSED:
            said = wire.json_of(found)
            reason = wire.field(said, "reason", str, 4096)
            kind = _REFUSALS.get(wire.field(said, "kind", str, 64), PeerRefused)
            raise kind(f"{self.peer} refused: {reason}")
        raise ProtocolViolated(f"{self.peer} sent {found.kind.name}, which does not belong here")

    def _receive_into(self, view: memoryview) -> None:
        at, end = 0, len(view)
        try:
            while at < end:
                got = self._receive_some(view[at:])
                if not got:
                    break
                at += got
                self.received_bytes += got
        except (OSError, ValueError) as error:
            raise self._lost(error, "says nothing") from error
        if at < end:
            raise PeerLost(f"{self.peer} closed the link: it ended, or gave up")

    def _receive_some(self, view: memoryview) -> int:
        if not isinstance(self.sock, ssl.SSLSocket):
            return self.sock.recv_into(view)
        if not self.sock.pending() and not self._readable():
            raise TimeoutError
        with self._alone:
            return self.sock.recv_into(view)

    def _readable(self) -> bool:
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return bool(poll.poll(self.timeout * 1000))

    # ---- ending

    def cut(self) -> None:
        """End it from any thread: whoever reads or writes it gets PeerLost."""
        with suppress(OSError, ValueError):
            # Not SSLSocket's, which lets go of TLS first: what another thread sends in between would be in the clear.
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close it. A second call does nothing."""
        self.cut()
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


# ---- connecting and listening


def _unusable(address: Address, doing: str, error: OSError) -> AddressUnusable:
    hint = {
        errno.EADDRINUSE: "somebody listens there already: choose another port, or 0 for any that is free",
        errno.ECONNREFUSED: "nobody listens there: start the destination first",
        errno.ENOENT: "there is no such socket, or no such folder: start the destination first",
        errno.EACCES: "that is not allowed to this user: choose a port above 1023, or another path",
        errno.EADDRNOTAVAIL: "that address is not this machine's",
        errno.EMFILE: "no descriptor is left (RLIMIT_NOFILE)",
    }.get(error.errno or 0, "look at the address")
    why = error.strerror or str(error)
    return AddressUnusable(f"cannot {doing} {address}: {why}; {hint}", errno=error.errno)


def connect(
    to: Address,
    timeout: float,
    tls: ssl.SSLContext | None,
    key: bytes,
    role: str,
    migration: bytes,
    attempt: int,
) -> Link:
    """Connect to a destination, and show each other who we are.

    Raises:
        AddressUnusable: nobody is there.
        NotTrusted: the certificate or the token is wrong.
        PeerLost, PeerRefused, ProtocolViolated.
    """
    if tls is None and not key and not to.local:
        raise NotTrusted(
            f"{to} is beyond this machine, and neither TLS nor a token was given: pass tls= (an ssl.SSLContext), or "
            "token="
        )
    try:
        if to.path:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            try:
                sock.settimeout(timeout)
                sock.connect(to.path)
            except BaseException:
                sock.close()
                raise
        else:
            sock = socket.create_connection((to.host, to.port), timeout)
    except OSError as error:
        raise _unusable(to, "connect to", error) from error
    link = Link(sock, f"the destination {to}", timeout)
    try:
        if tls is not None:
            link.sock = _wrapped(link, tls, server_hostname=to.host or "localhost")
        link.send_preamble()
        link.read_preamble()
        nonce = secrets.token_bytes(32)
        hello = {"role": role, "id": migration.hex(), "attempt": attempt, "nonce": nonce.hex()}
        link.send(Kind.HELLO, hello)
        answer = wire.json_of(link.expect(Kind.CHALLENGE))
        nonces = nonce + wire.hexadecimal(answer, "nonce", 32)
        theirs = wire.mac(key, b"destination", role, migration, attempt, nonces)
        if not secrets.compare_digest(wire.field(answer, "mac", str, 64), theirs):
            raise NotTrusted(f"{link.peer} does not know the token: give the same token= to both sides")
        proof = wire.mac(key, b"source", role, migration, attempt, nonces)
        began = time.perf_counter()
        link.send(Kind.PROOF, {"mac": proof})
        link.expect(Kind.WELCOME)
        link.round_trip = time.perf_counter() - began
        link.welcome = True
    except BaseException:
        link.close()
        raise
    return link


def _wrapped(link: Link, tls: ssl.SSLContext, **options: Any) -> ssl.SSLSocket:
    try:
        return tls.wrap_socket(link.sock, suppress_ragged_eofs=True, **options)
    except ssl.SSLError as error:
        raise NotTrusted(
            f"no TLS with {link.peer}: {error.reason or error}. Both sides need a context, the certificate must be one "
            "that the other side trusts, and be for the name by which it is reached",
            errno=error.errno,
        ) from error
    except OSError as error:
        raise link._lost(error, "does not answer") from error


class Hello(NamedTuple):
    """Who came."""

    role: str
    migration: bytes
    attempt: int


def welcome(link: Link, tls: ssl.SSLContext | None, key_of: Any) -> Hello:
    """The destination's side of `connect`.

    Args:
        link: new.
        tls: or None.
        key_of: (Hello) -> the key, or None where no such migration is known.

    Raises:
        NotTrusted, PeerLost, ProtocolViolated: it is nobody for us.
    """
    if tls is not None:
        link.sock = _wrapped(link, tls, server_side=True)
    link.send_preamble()
    link.read_preamble()
    said = wire.json_of(link.expect(Kind.HELLO))
    role = wire.field(said, "role", str, 16)
    hello = Hello(role, wire.hexadecimal(said, "id", 16), wire.field(said, "attempt", int, (1 << 63) - 1))
    key = key_of(hello)
    if role not in ("control", "pages", "ask") or key is None:
        refuse(link, "unknown", "no such migration, or no such attempt, is known here")
        raise ProtocolViolated(f"{link.peer} came as {role!r} for a migration that is not known here")
    nonces = wire.hexadecimal(said, "nonce", 32)
    mine = secrets.token_bytes(32)
    nonces += mine
    proof = wire.mac(key, b"destination", role, hello.migration, hello.attempt, nonces)
    link.send(Kind.CHALLENGE, {"nonce": mine.hex(), "mac": proof})
    theirs = wire.field(wire.json_of(link.expect(Kind.PROOF)), "mac", str, 64)
    if not secrets.compare_digest(theirs, wire.mac(key, b"source", role, hello.migration, hello.attempt, nonces)):
        refuse(link, "trust", "the token is another one")
        raise NotTrusted(f"{link.peer} does not know the token")
    link.send(Kind.WELCOME)
    link.welcome = True
    return hello


def refuse(link: Link, kind: str, reason: str) -> None:
    """Say no, as well as it can be said."""
    with suppress(PeerLost):
        link.send(Kind.REFUSED, {"kind": kind, "reason": reason[:1000]})


class Listener:
    """A socket that listens.

    Args:
        address: where. Port 0: any that is free.
        guarded: whether TLS or a token keeps strangers out.

    Raises:
        NotTrusted: it is not guarded, and others than this machine could reach it.
        AddressUnusable: the port is taken, or the address is not ours.
    """

    def __init__(self, address: Address, *, guarded: bool) -> None:
        if not guarded and not address.local:
            raise NotTrusted(
                f"whoever reaches {address} could put memory into this process: pass tls= (an ssl.SSLContext that "
                "wants certificates), or token=, or listen on 127.0.0.1"
            )
        try:
            self.sock = self._bound(address)
        except OSError as error:
            raise _unusable(address, "listen on", error) from error
        self._inode = 0
        if address.path:
            self.address = address
            self._inode = Path(address.path).stat().st_ino
        else:
            host, port = self.sock.getsockname()[:2]
            self.address = Address(host, port, "")

    @staticmethod
    def _bound(address: Address) -> socket.socket:
        if not address.path:
            family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
            host = address.host or ("::" if family == socket.AF_INET6 else "0.0.0.0")
            return socket.create_server((host, address.port), family=family, backlog=32)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            _remove_dead(address.path)
            before = os.umask(0o177)  # its owner alone may connect
            try:
                sock.bind(address.path)
            finally:
                os.umask(before)
            sock.listen(32)
        except BaseException:
            sock.close()
            raise
        return sock

    def accept(self, timeout: float) -> Link:
        """The next connection.

        Raises:
            OSError: it was closed, or no descriptor is left.
        """
        sock, peer = self.sock.accept()
        return Link(sock, f"the source {peer[0]}:{peer[1]}" if isinstance(peer, tuple) else "the source", timeout)

    def close(self) -> None:
        """Listen no more. A second call does nothing."""
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)  # wakes whoever accepts
        self.sock.close()
        if self._inode:
            with suppress(OSError):
                if Path(self.address.path).stat().st_ino == self._inode:
                    Path(self.address.path).unlink()
            self._inode = 0


def _remove_dead(path: str) -> None:
    """A socket's file that nobody listens at any more."""
    with suppress(FileNotFoundError):
        if not Path(path).is_socket():
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                Path(path).unlink()

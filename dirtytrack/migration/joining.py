# SPDX-License-Identifier: MIT
"""Addresses, TLS, and who is who: how a link begins."""

from __future__ import annotations

import errno
import os
import secrets
import socket
import ssl
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import AddressUnusable, NotTrusted, PeerLost, ProtocolViolated
from . import wire
from .transport import Link
from .wire import Kind

__all__ = ["Address", "Hello", "Listener", "connect", "refuse", "welcome"]

_LOOPBACK = ("127.", "::1")


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
        _exchange_preambles(link)
        nonce = secrets.token_bytes(32)
        hello = {"role": role, "id": migration.hex(), "attempt": attempt, "nonce": nonce.hex()}
        link.send(Kind.HELLO, hello)
        answer = wire.json_of(link.expect(Kind.CHALLENGE))
        nonces = nonce + wire.hexadecimal(answer, "nonce", 32)
        theirs = wire.mac(key, b"destination", role, migration, attempt, nonces)
        if not secrets.compare_digest(wire.field(answer, "mac", str, 64), theirs):
            raise NotTrusted(f"{link.peer} does not know the token: give the same token= to both sides")
        proof = wire.mac(key, b"source", role, migration, attempt, nonces)
        link.send(Kind.PROOF, {"mac": proof})
        link.expect(Kind.WELCOME)
        link.welcome = True
    except BaseException:
        link.close()
        raise
    return link


def _exchange_preambles(link: Link) -> None:
    try:
        link.send_preamble()
        link.read_preamble()
    except PeerLost as error:
        if not isinstance(link.sock, ssl.SSLSocket):
            raise
        # Of TLS 1.3 a client learns of a refused certificate only now, and by a link that is gone if it comes too late.
        raise PeerLost(
            f"{error}. Over TLS that is mostly a destination which does not trust this side's certificate",
            errno=error.errno,
        ) from error


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

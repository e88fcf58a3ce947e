# SPDX-License-Identifier: MIT
"""Links: frames through sockets, and how fast."""

from __future__ import annotations

import errno
import select
import socket
import ssl
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ..errors import (
    LayoutDiffers,
    MemoryDiffers,
    MigrationFailed,
    NotTrusted,
    PeerLost,
    PeerRefused,
    ProtocolViolated,
)
from ..kernel.moving import FrameRoom, Gate, Moving, SocketBroke
from . import wire
from .wire import HEADER_BYTES, PREAMBLE, Frame, Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

    from ..kernel.core import CData

__all__ = ["Budget", "Link"]

_AT_ONCE = 0.02  # seconds of the bandwidth
_TLS_BYTES = 64 << 10  # OpenSSL writes all that it is given, or nothing in time
_REFUSALS: dict[str, type[MigrationFailed]] = {
    "layout": LayoutDiffers,
    "memory": MemoryDiffers,
    "trust": NotTrusted,
    "protocol": ProtocolViolated,
}
"""What a destination refuses for, where its reason has a name of its own."""


class Budget:
    """A bandwidth that several threads share.

    Args:
        bytes_per_second: None: no limit.
    """

    def __init__(self, bytes_per_second: float | None) -> None:
        self._rate = bytes_per_second
        self.most_at_once = int(bytes_per_second * _AT_ONCE) if bytes_per_second else 1 << 62
        self._lock = threading.Lock()
        self._free_at = 0.0

    @property
    def limited(self) -> bool:
        """Whether there is a limit."""
        return self._rate is not None

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

    @property
    def plain(self) -> bool:
        """Whether bytes go through the socket as they are, so that the core can send and receive."""
        return not isinstance(self.sock, ssl.SSLSocket)

    def send_pages(
        self, moving: Moving, cset: CData, start: int, end: int, room: FrameRoom, *, number: int, region: int
    ) -> int:
        """Send the set's pages in [start, end) that the other side has not, without the GIL; of a plain link.

        Returns:
            How many pages they were.

        Raises:
            PeerLost: the link is gone, or stands still.
            RegionGone: a page vanished beneath the copy.
        """
        with self._write:
            try:
                about = self.sock.fileno(), self.timeout, room
                sent_bytes, pages = moving.send(cset, start, end, *about, number=number, region=region)
            except SocketBroke as broke:
                raise self._lost(broke.__cause__, "takes nothing") from broke.__cause__
        self.sent_bytes += sent_bytes
        return pages

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

    def _lost(self, error: BaseException | None, stands: str) -> MigrationFailed:
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
        return self._with_body()

    def _with_body(self) -> Frame:
        """The frame whose header has come."""
        found = wire.header(self._head, welcome=self.welcome)
        if found.body_bytes > len(self._body):
            self._body = bytearray(found.body_bytes)
        body = memoryview(self._body)[: found.body_bytes]
        self._receive_into(body)
        wire.require_checksum(self._head, body, found)
        return Frame(found, body)

    def receive_pages(self, gate: Gate, memories: Sequence[Moving], file: int, room: FrameRoom) -> Frame:
        """Have frames of pages put where they belong, without the GIL, until one comes that is another, or one that is
        for the caller to judge: that, as `receive`. Of a plain link.

        Args:
            gate: which writers pass.
            memories: by their numbers.
            file: a descriptor of the socket that nobody else closes.
            room: for this thread.

        Raises:
            Mismatch: pages are not what was sent.
            PeerLost, ProtocolViolated, RegionGone.
        """
        try:
            head, body = gate.receive(memories, file, self.timeout, room)
        except SocketBroke as broke:
            if isinstance(broke.__cause__, OSError) and broke.__cause__.errno == errno.ENODATA:
                raise self._closed() from None
            raise self._lost(broke.__cause__, "says nothing") from broke.__cause__
        self._head[:] = head
        if not len(body):
            return self._with_body()
        found = wire.header(self._head, welcome=self.welcome)
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
            raise self._closed()

    def _closed(self) -> PeerLost:
        return PeerLost(f"{self.peer} closed the link: it ended, or gave up")

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

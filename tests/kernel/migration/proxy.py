# SPDX-License-Identifier: MIT
"""A loopback proxy between a source and a destination, which knows frames and does to them what links do.

It reads frames with code of its own, from the document and not from the package.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

HELLO, OPEN, OPENED, PAGES, ROUND, ARRIVED, STATE, FINISH, READY, COMMIT, COMMITTED, ALIVE, ASK = (
    1, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 19, 20,
)  # fmt: skip
_HEAD = struct.Struct("<4sBBHIIQQ")


class Seen(NamedTuple):
    """A frame that comes by."""

    kind: int
    forward: bool
    """From the source to the destination."""
    connection: int
    """From 0, in the order in which they came."""
    frame: bytearray


class Proxy:
    """Listens; each connection is passed on to the destination.

    Args:
        to: the destination's address.
        meddle: called with each frame; says what to do: "pass", "drop", "cut" (before it), "pass and cut", "reset",
            "stall" (from here on nothing passes in this direction), or "damage" (one bit of it).
        bytes_per_second: how slowly the destination reads.
    """

    def __init__(
        self, to: str, meddle: Callable[[Seen], str] = lambda _: "pass", *, bytes_per_second: float | None = None
    ) -> None:
        host, port = to.removeprefix("tcp://").rsplit(":", 1)
        self._to = host, int(port)
        self._meddle, self._rate = meddle, bytes_per_second
        self.seen: list[tuple[int, bool]] = []
        self.closed = False
        self._sockets: list[socket.socket] = []
        self._connections = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listening.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def let_nobody_in(self) -> None:
        """From now on."""
        self.closed = True
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def close(self) -> None:
        """Cut everything, and let nobody in."""
        self.let_nobody_in()
        self.cut()
        for thread in self._threads:
            thread.join(10)
        for each in self._sockets:
            each.close()

    def cut(self) -> None:
        """All connections that there are."""
        for each in tuple(self._sockets):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _accept(self) -> None:
        while not self.closed:
            try:
                near = self._listening.accept()[0]
            except OSError:
                return
            try:
                far = socket.create_connection(self._to)
            except OSError:  # nobody is there; perhaps there will be
                near.close()
                continue
            for each in (near, far):
                each.settimeout(0.02)
            self._sockets += (near, far)
            number, self._connections = self._connections, self._connections + 1
            for come, go, forward in ((near, far, True), (far, near, False)):
                thread = threading.Thread(target=self._pass, args=(come, go, forward, number), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _pass(self, come: socket.socket, go: socket.socket, forward: bool, number: int) -> None:
        try:
            go.sendall(self._exactly(come, 8))
            while True:
                head = self._exactly(come, _HEAD.size)
                _, kind, _, _, body, data, _, _ = _HEAD.unpack(head)
                frame = head + self._exactly(come, body + data)
                self.seen.append((kind, forward))
                what = self._meddle(Seen(kind, forward, number, frame))
                if what == "damage":
                    frame[-1] ^= 0x10
                if what == "stall":
                    self._exactly(come, 1 << 40, keep=False)
                if what == "reset":
                    for each in (come, go):
                        each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        each.close()
                    return
                if what in ("pass", "damage", "pass and cut"):
                    self._slowly(go, frame, forward)
                if what in ("cut", "pass and cut"):
                    break
        except (OSError, EOFError):
            pass
        for each in (come, go):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _slowly(self, go: socket.socket, frame: bytearray, forward: bool) -> None:
        if self._rate is None or not forward:
            self._send(go, frame)
            return
        for at in range(0, len(frame), 16384):
            part = frame[at : at + 16384]
            self._send(go, part)
            time.sleep(len(part) / self._rate)

    def _send(self, go: socket.socket, data: bytearray) -> None:
        at = 0
        while at < len(data):
            with suppress(TimeoutError):
                at += go.send(memoryview(data)[at:])

    def _exactly(self, come: socket.socket, nbytes: int, *, keep: bool = True) -> bytearray:
        found = bytearray()
        while nbytes > len(found):
            try:
                part = come.recv(min(nbytes - len(found), 1 << 20))
            except TimeoutError:
                continue  # a socket that another thread closed is closed once nobody is in a call on it
            if not part:
                raise EOFError
            if keep:
                found += part
        return found

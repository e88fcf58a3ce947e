# SPDX-License-Identifier: MIT
"""Peers that are hostile, or mistaken: nothing crashes or runs, memory stays bounded, and the next one is served."""

from __future__ import annotations

import json
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import pytest

import dirtytrack
from dirtytrack.errors import MigrationFailed, ProtocolViolated
from dirtytrack.migration import Arrival, Destination, Goal, Source, page_digest, wire
from dirtytrack.migration.attempt import digest_of
from dirtytrack.migration.joining import Address, connect
from dirtytrack.migration.transport import Link
from dirtytrack.migration.wire import Kind
from tests.kernel.migration.parties import MIB

ID = b"m" * 16
OPEN = {
    "page_bytes": 4096,
    "seed": "00" * 32,
    "connections": 1,
    "codec": 0,
    "delta": False,
    "verify": False,
    "timeout_ms": 5000,
    "regions": [{"name": "m", "nbytes": 64 << 10, "phase": 0}],
}
FINISH = {"state_nbytes": 0, "digest": "00" * 16}
Peer = Callable[[str], None]


class Serving:
    """A destination in a thread, which takes whoever comes until a real source has moved."""

    def __init__(self, **options: Any) -> None:
        self.destination = Destination(**{"timeout": 2.0, "doubt_timeout": 0.1, **options})
        self.arrival: Arrival | None = None
        self.failures: list[str] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while self.arrival is None:
            try:
                self.arrival = self.destination.receive(timeout=30)
            except MigrationFailed as error:
                self.failures.append(type(error).__name__)
                if self.destination._session is not None and error.running is None:
                    self.destination.resolve("source")
            except TimeoutError:
                return

    def serve_a_real_one(self) -> None:
        memory = dirtytrack.allocate(MIB, name="real")
        memory[:5] = b"right"
        with Source(memory, timeout=5) as source:
            for _ in range(50):
                try:
                    source.migrate(self.destination.address, Goal())
                    break
                except MigrationFailed:  # the one before is not over yet
                    time.sleep(0.1)
        self._thread.join(10)
        assert self.arrival is not None
        assert self.arrival.memory["real"][:5] == b"right"

    def close(self) -> None:
        self.destination.close()
        self._thread.join(10)


@contextmanager
def serving(**options: Any) -> Iterator[Serving]:
    made = Serving(**options)
    before = psutil.Process().memory_info().rss
    try:
        yield made
        made.serve_a_real_one()
        assert psutil.Process().memory_info().rss - before < 64 << 20
    finally:
        made.close()


def raw(address: str) -> socket.socket:
    found = Address.of(address)
    return socket.create_connection((found.host, found.port), 5)


def joined(
    address: str, *, attempt: int = 1, said: dict[str, Any] | None = None, has: bytes | None = None
) -> tuple[Link, Link, bytes]:
    """A source that keeps to the protocol so far: its control and its pages connection. ``has``: the digests that the
    destination is to say it has of what is not zero."""
    to = Address.of(address)
    control = connect(to, 5, None, b"", "control", ID, attempt)
    control.send(Kind.OPEN, {**OPEN, **(said or {})})
    frame = control.expect(Kind.HAVE, Kind.OPENED)
    if has:
        assert bytes(frame.body) == has
    if frame.kind is Kind.HAVE:
        frame = control.expect(Kind.OPENED)
    secret = wire.hexadecimal(wire.json_of(frame), "secret", 32)
    return control, connect(to, 5, None, secret, "pages", ID, attempt), secret


def ended(link: Link) -> bool:
    """Whether the other side closed it, or says no."""
    link.set_timeout(5)
    try:
        while True:
            if link.receive().kind is Kind.REFUSED:
                return True
    except MigrationFailed:
        return True


# ---- strangers


def garbage(address: str) -> None:
    chance = random.Random(4)
    for _ in range(40):
        with suppress(OSError), raw(address) as sock:
            sock.sendall(chance.choice([b"", wire.PREAMBLE, b"DTMIGR\x07\0"]) + chance.randbytes(chance.randrange(200)))


def long_lengths(address: str) -> None:
    for body, data in ((2**32 - 1, 0), (1 << 20, 0), (5000, 0), (10, 2**32 - 1)):
        with suppress(OSError), raw(address) as sock:
            sock.sendall(wire.PREAMBLE + struct.pack("<4sBBHIIQQ", b"DTMF", 1, 0, 0, body, data, 0, 0) + bytes(100_000))
            sock.recv(100)


def silence(address: str) -> None:
    socks = [raw(address) for _ in range(10)]
    for sock in socks:
        sock.sendall(wire.PREAMBLE[:3])
    time.sleep(0.1)
    for sock in socks:
        sock.close()


def wrong_roles(address: str) -> None:
    to = Address.of(address)
    for role in ("pages", "ask", "king"):
        with pytest.raises(MigrationFailed):
            connect(to, 5, None, b"", role, ID, 1)


@pytest.mark.parametrize("peer", [garbage, long_lengths, silence, wrong_roles])
def test_strangers_change_nothing(peer: Peer) -> None:
    with serving() as served:
        peer(served.destination.address)
        assert not served.failures


def test_fuzzed_openings() -> None:
    chance = random.Random(6)
    values: list[Any] = [None, True, -1, 0, 1 << 63, 10**30, "", "x" * 3000, [], {}, [{}], [None], 1.5, "00" * 32]
    with serving() as served:
        to = Address.of(served.destination.address)
        for _ in range(60):
            said: dict[str, Any] = json.loads(json.dumps(OPEN))
            place = chance.choice([said, said["regions"][0]])
            place[chance.choice(list(place))] = chance.choice(values)
            with suppress(MigrationFailed), connect(to, 5, None, b"", "control", chance.randbytes(16), 1) as control:
                control.send(Kind.OPEN, said)
                control.receive()
        assert served.arrival is None


def test_more_memory_than_is_taken() -> None:
    with serving(max_bytes=8 * MIB) as served:
        to = Address.of(served.destination.address)
        with connect(to, 5, None, b"", "control", ID, 1) as control:
            control.send(Kind.OPEN, {**OPEN, "regions": [{"name": "m", "nbytes": 1 << 45, "phase": 0}]})
            with pytest.raises(dirtytrack.LayoutDiffers, match="raise max_bytes"):
                control.expect(Kind.OPENED)


# ---- sources that began well


def stretch(first: int, count: int, kind: int) -> bytes:
    return struct.pack("<QII", first, count, kind)


PAGES_WRONG: list[tuple[str, bytes, bytes, dict[str, int]]] = [
    ("beyond the end", stretch(16, 1, 1), b"", {}),
    ("across the end", stretch(15, 2, 1), b"", {}),
    ("wrapping around", stretch(2**64 - 1, 2, 1), b"", {}),
    ("no pages", stretch(0, 0, 1), b"", {}),
    ("of no kind", stretch(0, 1, 9), b"", {}),
    ("another digest", stretch(0, 1, 0) + bytes(16), b"x" * 4096, {}),
    ("too few bytes", stretch(0, 1, 0) + bytes(16), b"x" * 100, {}),
    ("too many bytes", stretch(0, 1, 0) + bytes(16), b"x" * 8192, {}),
    ("no digest", stretch(0, 1, 0), b"x" * 4096, {}),
    ("2^32 pages", stretch(0, 2**32 - 1, 0) + bytes(16), b"x" * 4096, {}),
    ("another region", stretch(0, 1, 1), b"", {"region": 1}),
    ("what differs, all the same", stretch(0, 1, 0) + bytes(16), bytes(2), {"codec": 3}),
    ("compressed all the same", stretch(0, 1, 0) + bytes(16), b"x" * 100, {"codec": 1}),
]


@pytest.mark.parametrize("row", PAGES_WRONG, ids=lambda row: row[0])
def test_pages_that_cannot_be(row: tuple[str, bytes, bytes, dict[str, int]]) -> None:
    _, body, data, head = row
    there = bytearray(b"kept" * (16 << 10))
    real = bytearray(MIB)
    given = {"m": there}
    with serving(memory=lambda plans: given if plans[0].name == "m" else {"real": real}) as served:
        given["m"] = there
        control, pages, _ = joined(served.destination.address)
        with control, pages:
            pages.send(Kind.PAGES, body, data=data, **head)
            assert ended(pages)
            assert ended(control)
        assert there == b"kept" * (16 << 10)


def test_damaged_pages_that_come_into_their_place_are_in_no_table() -> None:
    """So many at once that the socket brings them straight there."""
    right = random.Random(1).randbytes(64 << 10)
    digests = b"".join(page_digest(right[at : at + 4096], bytes(32)) for at in range(0, len(right), 4096))
    wrong = bytearray(right)
    wrong[5 * 4096 + 77] ^= 1
    with serving() as served:
        for attempt, (data, told) in enumerate([(wrong, b""), (right, None), (right, digests)], 1):
            control, pages, _ = joined(served.destination.address, attempt=attempt, has=told)
            with control, pages:
                assert served.destination._session is not None
                table = served.destination._session.tables[0].table
                pages.send(Kind.PAGES, stretch(0, 16, 0) + digests, data=data)
                if data is wrong:
                    assert ended(pages)
                    assert ended(control)
                    assert table[: 5 * 16] == digests[: 5 * 16]
                    assert table[5 * 16 :] == bytes(11 * 16)
                else:
                    pages.send(Kind.ROUND)
                    control.expect(Kind.ARRIVED)
                    assert table == digests
                    assert served.destination._session.memory["m"][:] == right
        assert served.arrival is None


@pytest.mark.parametrize("count", [4, 16], ids=["by a buffer", "into its place"])
def test_pages_that_are_still_coming_at_the_end(count: int) -> None:
    """Nobody writes memory that the destination has promised."""
    with serving() as served:
        control, pages, _ = joined(served.destination.address)
        with control, pages:
            session = served.destination._session
            assert session is not None
            digest = digest_of(session.tables, b"")
            body = stretch(0, count, 0) + bytes(16 * count)
            head, _ = wire.frame(Kind.PAGES, body, data_bytes=4096 * count)
            pages.sock.sendall(head + body + bytes(100))
            while not served.destination._receiver.gate.inside:  # type: ignore[union-attr]
                time.sleep(0.001)
            control.send(Kind.FINISH, {"state_nbytes": 0, "digest": digest})
            with pytest.raises(ProtocolViolated, match="after the last"):
                control.expect(Kind.READY)
        assert served.arrival is None


ORDER_WRONG: dict[str, list[tuple[Kind, Any, int]]] = {
    "COMMIT at once": [(Kind.COMMIT, b"", 1)],
    "a source's READY": [(Kind.READY, b"", 0)],
    "OPEN again": [(Kind.OPEN, OPEN, 0)],
    "state out of order": [(Kind.STATE, b"x", 5)],
    "another digest": [(Kind.FINISH, FINISH, 0)],
    "no digest": [(Kind.FINISH, {}, 0)],
    "a state that is missing": [(Kind.FINISH, {**FINISH, "state_nbytes": 5}, 0)],
    "ARRIVED": [(Kind.ARRIVED, b"", 0)],
}


@pytest.mark.parametrize("frames", ORDER_WRONG.values(), ids=ORDER_WRONG)
def test_words_out_of_order(frames: list[tuple[Kind, Any, int]]) -> None:
    with serving() as served:
        control, pages, _ = joined(served.destination.address)
        with control, pages:
            for kind, body, number in frames:
                control.send(kind, body, number=number)
            assert ended(control)
        assert served.arrival is None


def test_a_state_that_never_ends() -> None:
    with serving(max_state_bytes=2 * MIB) as served:
        control, pages, _ = joined(served.destination.address)
        with control, pages, suppress(MigrationFailed):
            for number in range(100):
                control.send(Kind.STATE, bytes(MIB), number=number * MIB)
        assert served.arrival is None


def test_a_decision_of_another_attempt_is_none() -> None:
    with serving() as served:
        control, pages, _ = joined(served.destination.address)
        with control, pages:
            session = served.destination._session
            assert session is not None
            control.send(Kind.FINISH, {"state_nbytes": 0, "digest": digest_of(session.tables, b"")})
            control.expect(Kind.READY)
            control.send(Kind.COMMIT, number=7)
            assert ended(control)
        assert served.arrival is None


def test_random_frames_after_a_good_beginning() -> None:
    chance = random.Random(8)
    with serving(doubt_timeout=0.05) as served:
        for attempt in range(1, 40):
            with suppress(MigrationFailed):
                control, pages, _ = joined(served.destination.address, attempt=attempt)
                with control, pages:
                    for _ in range(5):
                        kind = chance.choice([kind for kind in Kind if kind is not Kind.COMMIT])
                        body = chance.randbytes(16 * chance.randrange(8))
                        chance.choice([control, pages]).send(kind, body, number=chance.randrange(4))
            time.sleep(0.01)
        assert served.arrival is None


# ---- destinations


def answers(*frames: tuple[Kind, Any]) -> Callable[[socket.socket], None]:
    def answer(sock: socket.socket) -> None:
        link = Link(sock, "a source", 5)
        link.welcome = True
        link.send_preamble()
        link.read_preamble()
        for kind, body in frames:
            link.receive()
            link.send(kind, body)
        with suppress(MigrationFailed):
            while True:
                link.receive()

    return answer


def says(data: bytes) -> Callable[[socket.socket], None]:
    def answer(sock: socket.socket) -> None:
        sock.sendall(data)
        with suppress(OSError):
            sock.recv(100)

    return answer


@pytest.mark.parametrize(
    ("answer", "name"),
    [
        (says(b""), "PeerLost"),
        (says(b"HTTP/1.1 200 OK\r\n\r\n" * 100), "ProtocolViolated"),
        (says(b"DTMIGR\x02\0"), "ProtocolViolated"),
        (says(wire.PREAMBLE + b"\xff" * 1000), "ProtocolViolated"),
        (says(wire.PREAMBLE + struct.pack("<4sBBHIIQQ", b"DTMF", 2, 0, 0, 2**32 - 1, 0, 0, 0)), "ProtocolViolated"),
        (answers((Kind.CHALLENGE, {"nonce": "00" * 32, "mac": "00" * 32})), "NotTrusted"),
        (answers((Kind.CHALLENGE, {"nonce": 5})), "ProtocolViolated"),
        (answers((Kind.WELCOME, b"")), "ProtocolViolated"),
        (answers((Kind.REFUSED, {"kind": "busy", "reason": "not now"})), "PeerRefused"),
        (answers((Kind.REFUSED, {"kind": 3})), "ProtocolViolated"),
        (answers((Kind.COMMITTED, b"")), "ProtocolViolated"),
    ],
    ids=range(11),
)
def test_a_source_does_not_believe_any_destination(answer: Callable[[socket.socket], None], name: str) -> None:
    memory = dirtytrack.allocate(MIB, name="m")
    with socket.create_server(("127.0.0.1", 0)) as listening, Source(memory, timeout=2) as source:

        def serve() -> None:
            sock = listening.accept()[0]
            with sock, suppress(MigrationFailed):
                answer(sock)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(MigrationFailed) as caught:
            source.migrate(f"tcp://127.0.0.1:{listening.getsockname()[1]}")
        assert type(caught.value).__name__ == name, caught.value
        assert source.may_run
        thread.join(10)

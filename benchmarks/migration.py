# SPDX-License-Identifier: MIT
"""What moving a memory costs: beside a loop of sendall(), and beside what was predicted.

The other side is a process of its own. Both sides' processor time is told beside the wall clock: on a loaded machine it
says more.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection

import dirtytrack
from dirtytrack.migration import Destination, Source

from .bare import Bare
from .harness import MIB, Pair, Row, Settings, rounds, show_bytes

CONNECTIONS = (1, 2, 4)
_PIECE = 1 << 20


@dataclass(frozen=True)
class Took:
    """What one move took."""

    wall_ns: int
    cpu_ns: int
    """Of both processes."""


def cpu_ns() -> int:
    """This process's processor time so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return int((usage.ru_utime + usage.ru_stime) * 1e9)


# ---- the other side


def _there(pipe: Connection) -> None:
    """The process that memory moves to: does what it is told, and says what it took.

    Either kind of receiver has its memory in the same way: fresh from `allocate`, which the kernel populates while
    pages come, or memory of this process that was written, with zeroes, just before.
    """
    kept: dirtytrack.Memory | None = None
    while (told := pipe.recv()) is not None:
        kind, nbytes, connections, fresh = told
        if not fresh:
            kept = dirtytrack.allocate(nbytes, name="memory") if kept is None else kept
            _zero(kept)
        before = cpu_ns()
        if kind == "ours":
            with Destination(memory=None if kept is None or fresh else partial(_alone, kept)) as destination:
                pipe.send(destination.address)
                arrival = destination.receive()
                pipe.send(cpu_ns() - before)
                del arrival
        else:
            _sink(pipe, nbytes, connections, None if fresh else kept)
            pipe.send(cpu_ns() - before)


def _alone(memory: dirtytrack.Memory, _: object) -> dict[str, dirtytrack.Memory]:
    return {"memory": memory}


def _zero(memory: dirtytrack.Memory) -> None:
    zeroes = bytes(_PIECE)
    view = memoryview(memory)
    for at in range(0, len(view), _PIECE):
        view[at : at + _PIECE] = zeroes[: len(view) - at]


def _sink(pipe: Connection, nbytes: int, connections: int, memory: dirtytrack.Memory | None) -> None:
    """As many bytes into that memory, or into fresh memory."""
    memory = dirtytrack.allocate(nbytes) if memory is None else memory
    with socket.create_server(("127.0.0.1", 0)) as server:
        pipe.send(f"tcp://127.0.0.1:{server.getsockname()[1]}")
        socks = [server.accept()[0] for _ in range(connections)]

    def receive(sock: socket.socket, view: memoryview) -> None:
        at = 0
        while got := sock.recv_into(view[at : at + _PIECE]):
            at += got

    together([partial(receive, sock, view) for sock, view in zip(socks, parts(memory, connections), strict=True)])
    for sock in socks:
        sock.close()


def parts(memory: dirtytrack.Memory, count: int) -> list[memoryview]:
    """Cut into so many, one for each connection."""
    view = memoryview(memory)
    step = -(-len(view) // count)
    return [view[at : at + step] for at in range(0, len(view), step)]


def together(jobs: list[Callable[[], object]]) -> None:
    """A thread each, until all have ended."""
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Other:
    """That process."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_there, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def begin(self, kind: str, nbytes: int, connections: int, *, fresh: bool = True) -> str:
        """Have it listen; where."""
        self._pipe.send((kind, nbytes, connections, fresh))
        where: str = self._pipe.recv()
        return where

    def end(self) -> int:
        """Processor time that it took, when it is through."""
        took: int = self._pipe.recv()
        return took

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


# ---- bulk


def migrated(other: Other, memory: dirtytrack.Memory, connections: int, *, fresh: bool) -> tuple[Took, int]:
    """The whole migration of memory that nobody writes; and its bulk, from the first collect until all was there."""
    where = other.begin("ours", len(memory), connections, fresh=fresh)
    with Source(memory, connections=connections) as source:
        before, begin = cpu_ns(), time.perf_counter_ns()
        moved = source.migrate(where)
        wall, cpu = time.perf_counter_ns() - begin, cpu_ns() - before
    return Took(wall, cpu + other.end()), int(moved.rounds[0].seconds * 1e9)


def sent(other: Other, memory: dirtytrack.Memory, connections: int, *, fresh: bool) -> Took:
    """The same bytes by sendall(), until the other side has them."""
    where = other.begin("bare", len(memory), connections, fresh=fresh)
    before, begin = cpu_ns(), time.perf_counter_ns()
    socks = [socket.create_connection(("127.0.0.1", int(where.rpartition(":")[2]))) for _ in range(connections)]

    def send(sock: socket.socket, view: memoryview) -> None:
        for at in range(0, len(view), _PIECE):
            sock.sendall(view[at : at + _PIECE])
        sock.shutdown(socket.SHUT_WR)
        sock.recv(1)  # it has closed: it has everything

    together([partial(send, sock, view) for sock, view in zip(socks, parts(memory, connections), strict=True)])
    wall, cpu = time.perf_counter_ns() - begin, cpu_ns() - before
    for sock in socks:
        sock.close()
    return Took(wall, cpu + other.end())


def filled(bare: Bare, nbytes: int) -> dirtytrack.Memory:
    """Memory with something in each page that no other has."""
    memory = dirtytrack.allocate(nbytes, name="memory")
    block = os.urandom(min(nbytes, 8 * MIB))
    for at in range(0, nbytes, len(block)):
        memory[at : at + len(block)] = block[: nbytes - at]
    for page in range(0, nbytes, 4096):
        memory[page : page + 8] = page.to_bytes(8, "little")
    return memory


def migration(settings: Settings, bare: Bare) -> Iterator[Row]:
    """A memory that nobody writes, over loopback, beside a loop of sendall() with as many connections."""
    nbytes = 4 * MIB if settings.tiny else 512 * MIB
    memory = filled(bare, nbytes)
    with closing(Other()) as other:
        for fresh in (True, False):
            for connections in CONNECTIONS:
                yield from _bulk(settings, other, memory, connections, fresh=fresh)


def _bulk(
    settings: Settings, other: Other, memory: dirtytrack.Memory, connections: int, *, fresh: bool
) -> Iterator[Row]:
    bulk, whole, cpu = Pair([], []), Pair([], []), Pair([], [])
    for number in rounds(Settings(settings.seconds * 3, 6, settings.most_rounds)):
        loop = None if number % 2 else sent(other, memory, connections, fresh=fresh)
        took, bulk_ns = migrated(other, memory, connections, fresh=fresh)
        loop = loop or sent(other, memory, connections, fresh=fresh)
        if not number:
            continue  # a rehearsal of both
        for pair, ours_ns, bare_ns in (
            (bulk, bulk_ns, loop.wall_ns),
            (whole, took.wall_ns, loop.wall_ns),
            (cpu, took.cpu_ns, loop.cpu_ns),
        ):
            pair.ours.append(ours_ns)
            pair.bare.append(bare_ns)
    into = "into fresh memory" if fresh else "into memory that is there"
    what = f"{show_bytes(len(memory))} {into}, {connections} connection{'s' if connections > 1 else ''}"
    yield bulk.speed_row(f"bulk {what}", 0.8, by_round=True)
    yield whole.told_row(f"all of it: {what}", by_round=True)
    yield cpu.told_row(f"processor time of both: {what}", by_round=True)

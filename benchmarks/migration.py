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
    """The process that memory moves to: does what it is told, and says what it took."""
    while (told := pipe.recv()) is not None:
        kind, nbytes, connections = told
        before = cpu_ns()
        if kind == "ours":
            with Destination() as destination:
                pipe.send(destination.address)
                arrival = destination.receive()
                pipe.send(cpu_ns() - before)
                del arrival
        else:
            _sink(pipe, nbytes, connections, into_memory=kind == "bare")
            pipe.send(cpu_ns() - before)


def _sink(pipe: Connection, nbytes: int, connections: int, *, into_memory: bool) -> None:
    """As many bytes, into fresh memory of that length, or into a buffer again and again."""
    memory = dirtytrack.allocate(nbytes) if into_memory else None
    with socket.create_server(("127.0.0.1", 0)) as server:
        pipe.send(f"tcp://127.0.0.1:{server.getsockname()[1]}")
        socks = [server.accept()[0] for _ in range(connections)]
    views = parts(memory, connections) if memory is not None else [memoryview(bytearray(_PIECE))] * connections

    def receive(sock: socket.socket, view: memoryview) -> None:
        at = 0
        while got := sock.recv_into(view[at : at + _PIECE]):
            at = at + got if into_memory else 0

    together([partial(receive, sock, view) for sock, view in zip(socks, views, strict=True)])
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

    def begin(self, kind: str, nbytes: int, connections: int) -> str:
        """Have it listen; where."""
        self._pipe.send((kind, nbytes, connections))
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


def migrated(other: Other, memory: dirtytrack.Memory, connections: int) -> Took:
    """The whole migration of memory that nobody writes."""
    where = other.begin("ours", len(memory), connections)
    source = Source(memory, connections=connections)
    before, begin = cpu_ns(), time.perf_counter_ns()
    source.migrate(where)
    wall, cpu = time.perf_counter_ns() - begin, cpu_ns() - before
    return Took(wall, cpu + other.end())


def sent(other: Other, memory: dirtytrack.Memory, connections: int, kind: str) -> Took:
    """The same bytes by sendall(), until the other side has them."""
    where = other.begin(kind, len(memory), connections)
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
        for connections in CONNECTIONS:
            wall, cpu, thrown = Pair([], []), Pair([], []), Pair([], [])
            for number in rounds(Settings(settings.seconds * 3, 3, settings.most_rounds)):
                kinds = ("ours", "bare", "thrown") if number % 2 else ("thrown", "bare", "ours")
                took = {
                    kind: migrated(other, memory, connections)
                    if kind == "ours"
                    else sent(other, memory, connections, kind)
                    for kind in kinds
                }
                for pair, side in ((wall, "bare"), (thrown, "thrown")):
                    pair.ours.append(took["ours"].wall_ns)
                    pair.bare.append(took[side].wall_ns)
                cpu.ours.append(took["ours"].cpu_ns)
                cpu.bare.append(took["bare"].cpu_ns)
            what = f"bulk {show_bytes(nbytes)}, {connections} connection{'s' if connections > 1 else ''}"
            yield wall.speed_row(what, 0.8)
            yield cpu.told_row(f"{what}, CPU of both sides")
            yield thrown.told_row(f"{what}, receiver keeps nothing")

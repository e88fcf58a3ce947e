# SPDX-License-Identifier: MIT
"""Moves the memory of a running writer to another process over a socket, and stops the writer for the last bit only.

Run it as ``python examples/precopy_migration.py``. The destination is a second Python process; after the move it sends
its copy back and the two are compared byte for byte: the exit status is 0 only if they are the same.
"""

from __future__ import annotations

import random
import socket
import struct
import subprocess
import sys
import threading
import time

import dirtytrack

MIB = 1 << 20
NBYTES = 64 * MIB
SMALL = 512 * 1024  # dirty bytes: so few that the writer may stand still for them
MAX_ROUNDS = 30  # a writer that is faster than the socket is stopped all the same
MESSAGE = struct.Struct("<QQ")  # offset and length of the bytes that follow; length 0 ends the move


class Writer(threading.Thread):
    """A program that keeps writing: mostly a hot eighth of its memory, now and then anywhere."""

    def __init__(self, memory: dirtytrack.Memory) -> None:
        super().__init__(daemon=True)
        self.words = memoryview(memory).cast("Q")
        self.finish = threading.Event()
        self.stores = 0

    def run(self) -> None:
        chance = random.Random(1)
        while not self.finish.is_set():
            for _ in range(50):
                self.stores += 1
                span = len(self.words) if self.stores % 100 == 0 else len(self.words) // 8
                self.words[chance.randrange(span)] = self.stores
            time.sleep(0.001)


def receive_exactly(peer: socket.socket, view: memoryview) -> None:
    while view:
        count = peer.recv_into(view)
        if count == 0:
            raise ConnectionError("the other side left in the middle of a message")
        view = view[count:]


def destination(port: int) -> int:
    """The other process: puts what comes where it belongs, and shows at the end what it has."""
    memory, header = bytearray(NBYTES), bytearray(MESSAGE.size)
    with socket.create_connection(("127.0.0.1", port)) as peer, memoryview(memory) as view:
        length = 1
        while length:
            receive_exactly(peer, memoryview(header))
            offset, length = MESSAGE.unpack(header)
            receive_exactly(peer, view[offset : offset + length])
        peer.sendall(view)
    return 0


def send(peer: socket.socket, dirty: dirtytrack.DirtySet, view: memoryview) -> None:
    for start, end in struct.iter_unpack("QQ", dirty.offsets("memory").tobytes()):
        peer.sendall(MESSAGE.pack(start, end - start))
        peer.sendall(view[start:end])


def move(peer: socket.socket, memory: dirtytrack.Memory, writer: Writer) -> tuple[int, float, int]:
    """Returns the rounds that the writer ran through, how long it stood still (s) and the bytes sent meanwhile."""
    view = memoryview(memory)
    with dirtytrack.track({"memory": memory}) as tracker:
        clock, sent = time.perf_counter(), NBYTES
        peer.sendall(MESSAGE.pack(0, NBYTES))
        peer.sendall(view)  # everything, while the writer writes on: what it changes meanwhile is in the next round
        for rounds in range(1, MAX_ROUNDS + 1):
            bytes_per_second = sent / (time.perf_counter() - clock)
            waiting = tracker.peek().nbytes  # looks, takes nothing
            print(f"  round {rounds}: {sent:,} bytes at {bytes_per_second / MIB:,.0f} MiB/s, {waiting:,} dirty since")
            if waiting <= SMALL:
                break
            clock = time.perf_counter()
            dirty = tracker.collect()
            send(peer, dirty, view)
            sent = dirty.nbytes
        stopped = time.perf_counter()
        writer.finish.set()
        writer.join()
        last = tracker.stop()  # all that is left, and the end of tracking
        send(peer, last, view)
        peer.sendall(MESSAGE.pack(0, 0))
        return rounds, time.perf_counter() - stopped, last.nbytes


def main() -> int:
    memory = dirtytrack.allocate(NBYTES, name="memory")
    memoryview(memory)[:] = random.Random(2).randbytes(MIB) * (NBYTES // MIB)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        command = [sys.executable, __file__, str(server.getsockname()[1])]
        with subprocess.Popen(command) as other, server.accept()[0] as peer:
            writer = Writer(memory)
            writer.start()
            rounds, seconds, last_bytes = move(peer, memory, writer)
            copy = bytearray(NBYTES)
            receive_exactly(peer, memoryview(copy))
    same = copy == bytes(memory) and writer.stores > 0
    print(f"{rounds} rounds, then the writer stood still for {seconds * 1e3:.1f} ms and {last_bytes:,} bytes")
    print(f"after {writer.stores:,} stores the destination is {'identical' if same else 'DIFFERENT'}")
    return 0 if same and other.returncode == 0 and last_bytes < NBYTES // 8 else 1


if __name__ == "__main__":
    sys.exit(destination(int(sys.argv[1])) if len(sys.argv) > 1 else main())

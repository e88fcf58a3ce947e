# SPDX-License-Identifier: MIT
"""``python -m benchmarks.process_images``: images of a redis under load, and gcore of the same process beside them.

A redis is filled, and then a client sets keys at random, at a steady pace. Meanwhile it is saved at several intervals,
so that more and more of it is dirty, with and without what is copied before it is frozen. Another client sends PING all
the time: the longest that it waited for an answer is what users of redis saw. gcore, of gdb, writes the same process as
it does: all of it, while it stands still. The rows go into docs/process_images.json by ``--write``, and from there into
docs/process-images.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from dirtytrack.checkpoint import Retention
from dirtytrack.checkpoint.images import ProcessCheckpointer

from .harness import machine
from .observe import Redis

VALUE_BYTES = 1024
WAYS = (("0.2 s apart", 0.2, True), ("1 s apart", 1.0, True), ("5 s apart", 5.0, True), ("5 s apart", 5.0, False))
"""What it is called, seconds between two saves, and whether much is copied before."""


@dataclass(frozen=True)
class Row:
    """A way to save it. Medians of the rounds."""

    way: str
    precopy: bool
    resident_bytes: int
    dirty_bytes: float
    """Copied while it ran and while it stood still."""
    frozen_bytes: float
    frozen_ms: float
    longest_frozen_ms: float
    ping_ms: float
    """The longest that a client waited, in each round."""
    seconds: float
    """Until it was durable."""
    written_bytes: float
    rounds: int


class Pings:
    """A client that asks all the time, and notes the longest wait."""

    def __init__(self, port: int) -> None:
        self._connection = socket.create_connection(("127.0.0.1", port))
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._longest, self._ended = 0.0, False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended:
            begun = time.perf_counter()
            self._connection.sendall(b"PING\r\n")
            assert self._connection.recv(64)
            self._longest = max(self._longest, time.perf_counter() - begun)
            time.sleep(0.0005)

    def longest(self) -> float:
        """Since this was last asked, in seconds."""
        found, self._longest = self._longest, 0.0
        return found

    def close(self) -> None:
        self._ended = True
        self._thread.join()
        self._connection.close()


SETS = r"""
import os, random, socket, sys, time
port, keys, rate, nbytes = map(int, sys.argv[1:])
connection = socket.create_connection(("127.0.0.1", port))
batch, due = max(1, rate // 100), time.monotonic()
while True:
    value = os.urandom(nbytes // 2) + bytes(nbytes - nbytes // 2)
    names = (b"key:%012d" % random.randrange(keys) for _ in range(batch))
    connection.sendall(b"".join(b"*3\r\n$3\r\nSET\r\n$16\r\n%b\r\n$%d\r\n%b\r\n" % (k, nbytes, value) for k in names))
    left = 5 * batch
    while left:
        left -= len(connection.recv(min(left, 65536)))
    due = max(due + batch / rate, time.monotonic() - 0.1)
    time.sleep(max(0.0, due - time.monotonic()))
"""


class Load:
    """A client that sets keys at random, so many a second where redis can, until it is closed."""

    def __init__(self, port: int, keys: int, rate: int) -> None:
        words = [sys.executable, "-c", SETS, *map(str, (port, keys, rate, VALUE_BYTES))]
        self._process = subprocess.Popen(words)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def fill(port: int, keys: int) -> None:
    """As many keys as redis-benchmark knows, by its own."""
    words = ["redis-cli", "-p", str(port), "EVAL"]
    script = (
        "local value = string.rep('x', ARGV[2]) for i = ARGV[3], ARGV[1] - 1 do "
        "redis.call('SET', 'key:' .. string.format('%012d', i), value) if i % 20000 == 19999 then return i + 1 end end "
        "return tonumber(ARGV[1])"
    )
    at = 0
    while at < keys:
        done = subprocess.run(
            [*words, script, "0", str(keys), str(VALUE_BYTES), str(at)], capture_output=True, text=True, check=True
        )
        at = int(done.stdout)


def resident(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))


def images(redis: Redis, pings: Pings, store: Path, way: str, seconds: float, precopy: bool, rounds: int) -> list[Row]:
    pid = redis.process.pid
    most = 4 << 20 if precopy else 1 << 40
    with ProcessCheckpointer(store, pid, precopy_bytes=most, retain=Retention(last=2), compact=None) as ckpt:
        pings.longest()
        found, waits = [ckpt.save()], [pings.longest()]
        for _ in range(rounds):
            time.sleep(seconds)
            pings.longest()
            found.append(ckpt.save())
            waits.append(pings.longest())
    rows = []
    for name, saves, longest in ((f"full, {way}", found[:1], waits[:1]), (way, found[1:], waits[1:])):
        rows.append(
            Row(
                way=name,
                precopy=precopy,
                resident_bytes=resident(pid),
                dirty_bytes=median(each.bytes_frozen + each.bytes_precopied for each in saves),
                frozen_bytes=median(each.bytes_frozen for each in saves),
                frozen_ms=median(each.frozen_seconds for each in saves) * 1e3,
                longest_frozen_ms=max(each.frozen_seconds for each in saves) * 1e3,
                ping_ms=median(longest) * 1e3,
                seconds=median(each.seconds for each in saves),
                written_bytes=median(each.bytes_written for each in saves),
                rounds=len(saves),
            )
        )
    return rows


def gcore(redis: Redis, pings: Pings, folder: Path, rounds: int) -> Row:
    pid = redis.process.pid
    took, waits, sizes = list[float](), list[float](), list[int]()
    for _ in range(rounds):
        time.sleep(0.5)
        pings.longest()
        begun = time.perf_counter()
        subprocess.run(["gcore", "-o", str(folder / "core"), str(pid)], check=True, capture_output=True)
        took.append(time.perf_counter() - begun)
        time.sleep(0.05)
        waits.append(pings.longest())
        core = folder / f"core.{pid}"
        sizes.append(core.stat().st_size)
        core.unlink()
    return Row(
        way="gcore",
        precopy=False,
        resident_bytes=resident(pid),
        dirty_bytes=median(sizes),
        frozen_bytes=median(sizes),
        frozen_ms=median(waits) * 1e3,  # it does not say; what a client saw is near to it
        longest_frozen_ms=max(waits) * 1e3,
        ping_ms=median(waits) * 1e3,
        seconds=median(took),
        written_bytes=median(sizes),
        rounds=rounds,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.process_images", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--mib", type=int, default=1024, help="that redis has (1024)")
    parser.add_argument("--rounds", type=int, default=7, help="of each way (7)")
    parser.add_argument("--rate", type=int, default=10_000, help="keys that are set each second (10000)")
    parser.add_argument("--short", action="store_true", help="only see whether it runs: 64 MiB, one round")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write it to a file as JSON, beside what is printed")
    options = parser.parse_args()
    lacks = [name for name in ("redis-server", "redis-benchmark", "redis-cli", "gcore") if shutil.which(name) is None]
    if lacks:
        raise SystemExit(f"{', '.join(lacks)} not found: apt-get install redis-server redis-tools gdb")
    mib, rounds = (64, 1) if options.short else (options.mib, options.rounds)
    keys = mib * 730  # of 1 KiB, with what redis itself takes for each
    where = machine() | {"command": " ".join(["python", "-m", "benchmarks.process_images", *sys.argv[1:]])}
    with tempfile.TemporaryDirectory() as folder:
        redis, rows = Redis(Path(folder)), list[Row]()
        try:
            fill(redis.port, keys)
            pings, load = Pings(redis.port), Load(redis.port, keys, options.rate)
            try:
                time.sleep(1)
                for number, (way, seconds, precopy) in enumerate(WAYS[: 1 if options.short else None]):
                    rows += images(redis, pings, Path(folder) / str(number), way, seconds, precopy, rounds)
                    shutil.rmtree(Path(folder) / str(number))
                rows.append(gcore(redis, pings, Path(folder), min(rounds, 3)))
            finally:
                load.close()
                pings.close()
        finally:
            redis.close()
    for row in rows:
        frozen, dirty, written = (n / (1 << 20) for n in (row.frozen_bytes, row.dirty_bytes, row.written_bytes))
        print(
            f"{row.way:<18} {'precopied' if row.precopy else '':<9} frozen {row.frozen_ms:8.1f} ms (at most "
            f"{row.longest_frozen_ms:.1f}) for {frozen:7.1f} of {dirty:7.1f} MiB, ping {row.ping_ms:.1f} ms, "
            f"{written:.1f} MiB written in {row.seconds:.2f} s"
        )
    if options.write:
        document = {**where, "rows": [asdict(row) for row in rows]}
        options.write.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

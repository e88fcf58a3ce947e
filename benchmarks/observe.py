# SPDX-License-Identifier: MIT
"""``python -m benchmarks.observe``: what `dirtytrack record` costs redis, and the recorder.

redis-benchmark runs in turn with and without a recorder attached, so that both sides see the same machine. Beside the
throughput stands what redis takes of a processor for each request, which other work on the machine disturbs far less.
What the recorder's own thread takes, it tells itself. The rows go into docs/observing.json by ``--write``, and
from there into docs/observe.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import psutil

from dirtytrack.observe import Recorder, Recording
from dirtytrack.process import attach

from .harness import machine

KEYS, VALUE_BYTES = 200_000, 256
LOADS = {
    "SET, 200,000 keys": ("set", ()),
    "GET, 200,000 keys": ("get", ()),
    "SET, pipelined by 16": ("set", ("-P", "16")),
}


@dataclass(frozen=True)
class Row:
    """A load, with and without a recorder."""

    load: str
    every_ms: float
    without_per_second: float
    """Requests, the median of the rounds."""
    with_per_second: float
    ratio: float
    """Of throughput, with to without: the median of the rounds'."""
    without_us: float
    """Processor time of redis for a request, the median of the rounds."""
    cpu_ratio: float
    """Of that time, with to without: the median of the rounds'."""
    pages_an_epoch: float
    cpu_share: float
    """Of one processor, that the recorder's thread took."""
    file_bytes_a_page: float
    rounds: int


class Redis:
    """A redis-server of our own, on a port of its own, with some data in it."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        words = ["redis-server", "--port", str(self.port), "--save", "", "--appendonly", "no", "--dir", str(folder)]
        self.process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        self._process = psutil.Process(self.process.pid)
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                time.sleep(0.05)
        raise SystemExit("redis-server did not come up")

    def load(self, kind: str, more: tuple[str, ...], requests: int) -> tuple[float, float]:
        """Requests a second, and seconds of the server's processor time for each."""
        words = ["redis-benchmark", "-p", str(self.port), "-t", kind, "-n", str(requests), "-r", str(KEYS)]
        words += ["-d", str(VALUE_BYTES), "-c", "50", "--csv", *more]
        before = sum(self._process.cpu_times()[:2])
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        took = sum(self._process.cpu_times()[:2]) - before
        return float(done.stdout.splitlines()[-1].split(",")[1].strip('"')), took / requests

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


@contextlib.contextmanager
def recorded(pid: int, path: Path, every: float) -> Iterator[Recorder]:
    with attach(pid) as tracker, Recorder(tracker, path, every=every) as recorder:
        yield recorder


def measured(redis: Redis, name: str, folder: Path, every: float, rounds: int, requests: int) -> Row:
    kind, more = LOADS[name]
    without, with_ = list[tuple[float, float]](), list[tuple[float, float]]()
    shares, pages, file_bytes = list[float](), list[float](), list[float]()
    requests *= 4 if more else 1
    redis.load(kind, more, requests)  # warm
    for number in range(rounds):
        path = folder / f"{number}.dtr"
        for recording in (False, True) if number % 2 else (True, False):
            if not recording:
                without.append(redis.load(kind, more, requests))
                continue
            with recorded(redis.process.pid, path, every) as recorder:
                with_.append(redis.load(kind, more, requests))
            did = recorder.statistics()
            shares.append(did.cpu_share)
            pages.append(did.pages / did.epochs)
            file_bytes.append(did.nbytes / did.pages if did.pages else 0.0)
        assert len(Recording.open(path))
    return Row(
        load=name,
        every_ms=every * 1e3,
        without_per_second=median(rate for rate, _ in without),
        with_per_second=median(rate for rate, _ in with_),
        ratio=median(a / b for (a, _), (b, _) in zip(with_, without, strict=True)),
        without_us=median(took for _, took in without) * 1e6,
        cpu_ratio=median(a / b for (_, a), (_, b) in zip(with_, without, strict=True)),
        pages_an_epoch=median(pages),
        cpu_share=median(shares),
        file_bytes_a_page=median(file_bytes),
        rounds=rounds,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.observe", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="of each load (15)")
    parser.add_argument("--requests", type=int, default=50_000, help="of each round (50000)")
    parser.add_argument("--every", type=float, nargs="+", default=[0.1], help="seconds of an epoch (0.1)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write it to a file as JSON, beside what is printed")
    options = parser.parse_args()
    lacks = [name for name in ("redis-server", "redis-benchmark") if shutil.which(name) is None]
    if lacks:
        raise SystemExit(f"{', '.join(lacks)} not found: apt-get install redis-server redis-tools")
    where = machine() | {"command": " ".join(["python", "-m", "benchmarks.observe", *sys.argv[1:]])}
    with tempfile.TemporaryDirectory() as folder:
        redis, rows = Redis(Path(folder)), list[Row]()
        try:
            redis.load("set", (), 2 * KEYS)  # the data
            for every in options.every:
                for name in LOADS:
                    row = measured(redis, name, Path(folder), every, options.rounds, options.requests)
                    rows.append(row)
                    print(
                        f"{name:<22} every {row.every_ms:g} ms: {row.ratio:.3f} of {row.without_per_second:,.0f}/s, "
                        f"{row.cpu_ratio:.3f} of {row.without_us:.2f} µs of redis a request, "
                        f"{row.pages_an_epoch:,.0f} pages an epoch, recorder {row.cpu_share:.2%} of a processor, "
                        f"{row.file_bytes_a_page:.2f} bytes a page",
                        flush=True,
                    )
        finally:
            redis.close()
    if options.write:
        document = {**where, "rows": [asdict(row) for row in rows]}
        options.write.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

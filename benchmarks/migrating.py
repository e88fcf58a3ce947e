# SPDX-License-Identifier: MIT
"""``python -m benchmarks.migrating``: downtime by how fast memory is written, and QEMU with the same beside it.

A program of ours and a guest of QEMU have as much memory, all of it populated, and write one page after the other of a
part of it, so many a second. Both move to another process on this machine, with the same goal. The rows go into
docs/migrating.json by ``--write``, and from there into docs/migration.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import dirtytrack
from dirtytrack.migration import Goal, Migrated, Source

from .bare import Bare
from .harness import MIB, machine
from .migration import Other, filled
from .qemu import Qemu, boot_sector, tools_missing

HOT_BYTES = 64 * MIB
_TICK_SECONDS = 0.001
NEAR_SHARE, NEAR_SECONDS = 0.25, 0.005


@dataclass(frozen=True)
class Row:
    """One migration."""

    who: str
    mib: int
    bandwidth_mb: float | None
    """A cap, in MB a second."""
    dirty_mib: float
    """Written in a second, page by page."""
    seconds: float
    sent_mib: float
    downtime_ms: float
    predicted_ms: float | None
    rounds: int

    @property
    def as_predicted(self) -> bool:
        if self.predicted_ms is None:
            return True
        apart = abs(self.downtime_ms - self.predicted_ms)
        return apart <= max(NEAR_SHARE * self.predicted_ms, NEAR_SECONDS * 1e3)

    def __str__(self) -> str:
        said = "" if self.predicted_ms is None else f", {self.predicted_ms:.1f} ms predicted"
        near = "" if self.as_predicted else ", MISSED by more than 25 % and 5 ms"
        return (
            f"{self.who:<17} {self.mib} MiB, {self.dirty_mib:>4.0f} MiB/s written: {self.seconds:6.2f} s, "
            f"{self.sent_mib:7.1f} MiB sent, {self.rounds:>2} rounds, {self.downtime_ms:7.1f} ms of downtime"
            f"{said}{near}"
        )


class Writer:
    """Writes one page after the other of the first part of a memory, so many bytes of pages a second."""

    def __init__(self, memory: dirtytrack.Memory, bytes_per_second: float) -> None:
        self._memory, self._rate = memory, bytes_per_second
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        pages, done, begin = min(HOT_BYTES, len(self._memory)) // 4096, 0, time.perf_counter()
        while not self._stop.wait(_TICK_SECONDS):
            wanted = int((time.perf_counter() - begin) * self._rate / 4096)
            for number in range(done, wanted):
                at = number % pages * 4096
                self._memory[at : at + 8] = number.to_bytes(8, "little")
            done = wanted

    def pause(self) -> None:
        self._stop.set()
        self._thread.join()


def ours(
    other: Other, memory: dirtytrack.Memory, dirty: float, bandwidth: float | None, goal: Goal, *, delta: bool = False
) -> Row:
    where = other.begin("ours", len(memory), 2)
    writer = Writer(memory, dirty * MIB)
    with Source(memory, pause=writer.pause, resume=lambda: None, bandwidth=bandwidth, delta=delta) as source:
        time.sleep(0.2)
        moved: Migrated = source.migrate(where, goal)
    other.end()
    return Row(
        who="dirtytrack, delta" if delta else "dirtytrack",
        mib=len(memory) // MIB,
        bandwidth_mb=None if bandwidth is None else bandwidth / 1e6,
        dirty_mib=dirty,
        seconds=moved.seconds,
        sent_mib=moved.sent_bytes / MIB,
        downtime_ms=moved.downtime * 1e3,
        predicted_ms=moved.predicted_downtime * 1e3,
        rounds=len(moved.rounds),
    )


def theirs(folder: Path, mib: int, dirty: float, bandwidth: float | None, goal: Goal) -> Row:
    sector = boot_sector(
        folder, low=16 * MIB, pages=(mib - 32) * MIB // 4096, hot=HOT_BYTES // 4096, per_second=dirty * 256
    )
    with closing(Qemu(folder, sector, mib)) as qemu:
        told = qemu.migrate(bandwidth, goal.max_downtime)
    return Row(
        who=f"QEMU, {qemu.accelerator}",
        mib=mib,
        bandwidth_mb=None if bandwidth is None else bandwidth / 1e6,
        dirty_mib=dirty,
        seconds=told["total-time"] / 1e3,
        sent_mib=told["ram"]["transferred"] / MIB,
        downtime_ms=told["downtime"],
        predicted_ms=None,
        rounds=told["ram"]["dirty-sync-count"],
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.migrating", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--mib", type=int, default=256, help="of memory (256)")
    parser.add_argument("--dirty", type=float, nargs="+", default=[0, 25, 50, 100, 150, 200], help="MiB/s written")
    parser.add_argument("--bandwidth", type=float, default=250.0, help="MB/s, for both (250); 0: no limit")
    parser.add_argument("--downtime", type=float, default=0.1, help="the goal, in seconds (0.1)")
    parser.add_argument("--without-qemu", action="store_true", help="ours only")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write it to a file as JSON, beside what is printed")
    options = parser.parse_args()
    missing = [] if options.without_qemu else tools_missing(shutil.which)
    if missing:
        raise SystemExit(f"{', '.join(missing)} not found: apt-get install qemu-system-x86 binutils, or --without-qemu")
    goal, bandwidth = Goal(max_downtime=options.downtime), options.bandwidth * 1e6 or None
    where = machine() | {"command": " ".join(["python", "-m", "benchmarks.migrating", *sys.argv[1:]])}
    bare = Bare()
    memory, rows = filled(bare, options.mib * MIB), list[Row]()
    with closing(Other()) as other, tempfile.TemporaryDirectory() as folder:
        for dirty in options.dirty:
            jobs: list[Callable[[], Row]] = [
                lambda d=dirty, delta=delta: ours(other, memory, d, bandwidth, goal, delta=delta)  # type: ignore[misc]
                for delta in (False, True)
            ]
            if not options.without_qemu:
                jobs.append(lambda d=dirty: theirs(Path(folder), options.mib, d, bandwidth, goal))  # type: ignore[misc]
            for job in jobs:
                rows.append(job())
                print(rows[-1], flush=True)
    bare.close()
    if options.write:
        document = {**where, "goal_ms": options.downtime * 1e3, "rows": [asdict(row) for row in rows]}
        options.write.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

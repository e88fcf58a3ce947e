# SPDX-License-Identifier: MIT
"""``python -m benchmarks.reservations HOW``: a heap of 64 touched pages, in a large reservation or by themselves.

What a collector's process pays for the reservation: page tables, a fork, a minor collection. Prints JSON; each way in a
process of its own. `benchmarks.gc_barriers` runs it for docs/gc.md.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import dirtytrack
from dirtytrack.gc import RememberedSet

from .bare import PAGE

GIB = 1 << 30
TOUCHED = 64
YOUNG, YOUNG_BYTES = 1 << 40, 4 << 20  # pointers only point there
HOW = ("alone", "untracked", "sparse", "markers")
"""The 64 pages alone; 64 GiB without a tracker; with one, armed as chosen by itself; with one, and a marker a page."""


def page_table_bytes() -> int:
    """Of this process."""
    found = re.search(r"VmPTE:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10


def timed(rounds: int, call: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    """The median, in ns."""
    samples = []
    for _ in range(rounds):
        before()
        begin = time.perf_counter_ns()
        call()
        samples.append(time.perf_counter_ns() - begin)
    return median(samples)


def fork() -> None:
    """And wait for the child, which does nothing."""
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)


def measure(how: str, rounds: int, gibibytes: int = 64) -> dict[str, Any]:
    """One row."""
    nbytes = TOUCHED * PAGE if how == "alone" else gibibytes * GIB
    memory = dirtytrack.allocate(nbytes, sparse=True)
    stride = nbytes // TOUCHED
    words = [memoryview(memory)[i * stride : i * stride + 8].cast("Q") for i in range(TOUCHED)]

    def touch() -> None:
        for word in words:
            word[0] = YOUNG + 64

    before = page_table_bytes()
    touch()
    out: dict[str, Any] = {"how": how, "nbytes": nbytes, "touched_pages": TOUCHED, "minor_ns": None}
    if how == "untracked":
        out["fork_ns"] = timed(rounds, fork)
    else:
        arm = "all" if how == "markers" else None
        with dirtytrack.UffdSession() as session:
            region = session.register(memory, arm=arm)
            with dirtytrack.DirtyTracker(session, exact=True) as tracker:
                remembered = RememberedSet(region, tracker, nursery=(YOUNG, YOUNG + YOUNG_BYTES))

                def minor() -> None:
                    assert len(remembered.minor(YOUNG, YOUNG + YOUNG_BYTES)) == TOUCHED

                if how != "markers":
                    minor()
                    out["minor_ns"] = timed(rounds, minor, touch)
                out["fork_ns"] = timed(rounds if how != "markers" else 3, fork)
                out["page_table_bytes"] = page_table_bytes() - before
    out.setdefault("page_table_bytes", page_table_bytes() - before)
    return out


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], *map(int, sys.argv[2:]))))

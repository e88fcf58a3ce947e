# SPDX-License-Identifier: MIT
"""Many regions in one session against as many bare ioctls: the same ranges, the same writes before each, in turn."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator

import dirtytrack

from .bare import PAGE, Bare, address_of
from .harness import KIB, MIB, Pair, Rehearsal, Row, Settings, paired, scattered, show_bytes

COUNT = 1000
SHARES = (0.0, 0.01, 0.1, 1.0)
MOST_RATIO = 1.2


def measure(settings: Settings, bare: Bare, session: dirtytrack.UffdSession, pages: array[int]) -> Pair:
    """One collect of everything against one scan of each region. `pages` are counted from address 0."""
    ranges = array("Q", [at for region in session.regions for at in (region.start, region.end)])
    with dirtytrack.UffdSession() as another, dirtytrack.DirtyTracker(session, exact=True) as tracker:
        rehearse, clock = Rehearsal(bare, another), time.perf_counter_ns
        last: list[dirtytrack.DirtySet] = []

        def prepare() -> None:
            last.clear()  # outside the time, as in the benchmark of one region
            bare.write(0, pages)
            rehearse()

        def ours() -> int:
            begin = clock()
            dirty = tracker.collect()
            elapsed = clock() - begin
            assert dirty.page_count == len(pages)
            last.append(dirty)
            return elapsed

        def loop() -> int:
            elapsed, found = bare.ranges(ranges)
            assert found == len(pages), f"the bare loop found {found} pages of {len(pages)}"
            return elapsed

        return paired(settings, prepare, ours, loop)


def regions(settings: Settings, bare: Bare) -> Iterator[Row]:
    """A thousand regions with as much unregistered memory between them, against the sum of bare scans of each."""
    count = 10 if settings.tiny else COUNT
    for nbytes in (64 * KIB, MIB):
        memory = dirtytrack.allocate(2 * count * nbytes, name="benchmark")
        address, view = address_of(memory), memoryview(memory)
        starts = range(0, len(view), 2 * nbytes)
        with dirtytrack.UffdSession() as session:
            for start in starts:
                bare.populate(address + start, nbytes)
                session.register(view[start : start + nbytes])
            each = nbytes // PAGE
            for share in SHARES:
                chosen = scattered(count * each, share)
                pages = array("Q", [(address + starts[i // each]) // PAGE + i % each for i in chosen])
                pair = measure(settings, bare, session, pages)
                yield pair.cost_row(f"{count} regions of {show_bytes(nbytes)}, {share:.4g} dirty", MOST_RATIO, 0)

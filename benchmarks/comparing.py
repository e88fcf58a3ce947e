# SPDX-License-Identifier: MIT
"""A collect of a session that compares, against memcmp of the same memory with a mirror."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator

import dirtytrack

from .bare import PAGE, Bare, address_of
from .harness import GIB, MIB, Pair, Row, Settings, paired, scattered, show_bytes

SHARES = (0.0, 0.01, 0.1, 1.0)
MOST_RATIO, MOST_EXTRA_NS = 1.1, 20_000


def measure(settings: Settings, bare: Bare, session: dirtytrack.Session, nbytes: int, share: float) -> Pair:
    """The same pages are written before each; each side keeps a copy (or hashes) of its own."""
    memory, mirror = dirtytrack.allocate(nbytes, name="benchmark"), dirtytrack.allocate(nbytes, name="mirror")
    address, to, clock = address_of(memory), address_of(mirror), time.perf_counter_ns
    for each in (address, to):
        bare.populate(each, nbytes)
    pages, values = scattered(nbytes // PAGE, share), iter(range(1, 1 << 30))
    region = session.register(memory)
    with dirtytrack.DirtyTracker(session, [region]) as tracker:

        def prepare() -> None:  # before each side: what the other was told of is no change any more
            bare.write(address, array("Q", pages), value=next(values) % 250 + 2)

        def ours() -> int:
            begin = clock()
            dirty = tracker.collect()
            elapsed = clock() - begin
            assert dirty.page_count == len(pages)
            return elapsed

        def loop() -> int:
            elapsed, found = bare.compare(address, nbytes, to)
            assert found == len(pages)
            return elapsed

        pair = paired(settings, prepare, ours, loop)
    session.unregister(region)
    return pair


def comparing(settings: Settings, bare: Bare) -> Iterator[Row]:
    """`CompareSession`: a collect against a bare memcmp loop; with hashes without a target."""
    for hashes in (False, True):
        with dirtytrack.CompareSession(hashes=hashes) as session:
            for nbytes in settings.sizes(16 * MIB, GIB):
                for share in SHARES:
                    pair = measure(settings, bare, session, nbytes, share)
                    name = f"{session.backend} {show_bytes(nbytes)}, {share:.4g} dirty"
                    yield pair.told_row(name) if hashes else pair.cost_row(name, MOST_RATIO, MOST_EXTRA_NS)

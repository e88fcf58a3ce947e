# SPDX-License-Identifier: MIT
"""`collect()` against the bare ioctl: same memory, same writes before each, in turn."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator

import dirtytrack

from .bare import Bare
from .harness import GIB, KIB, MIB, Arena, Pair, Row, Settings, arena, clock_ns, paired, scattered, show_bytes

SHARES = (0.0, 0.0001, 0.001, 0.01, 0.03, 0.1, 0.3, 0.5, 1.0)
MOST_RATIO, MOST_EXTRA_NS = 1.05, 2_000


Loop = Callable[[int, int, int], "tuple[int, int]"]


def measure(settings: Settings, bare: Bare, space: Arena, pages: array[int], bare_loop: Loop, found_by: int) -> Pair:
    """Every tracker collects once; the bare loop makes as many passes. Each side must find exactly what was written.

    `found_by`: how many of its listeners the bare loop counts the pages of.
    """
    region, trackers, clock, reading = space.region, space.trackers, time.perf_counter_ns, clock_ns()
    tracker, passes, expected = trackers[0], len(trackers), len(pages)
    dirty: list[dirtytrack.DirtySet | None] = [None] * passes

    def prepare() -> None:
        dirty[:] = [None] * passes  # what a result costs its owner to drop, 0.2 µs, is no part of a collect
        bare.write(region.address, pages)
        space.rehearse()

    def one() -> int:
        begin = clock()
        found = tracker.collect()
        elapsed = clock() - begin
        assert found.page_count == expected, f"{found.page_count} pages found of {expected}"
        dirty[0] = found
        return elapsed

    def several() -> int:
        elapsed = reading  # taken off once by paired()
        for i, tracker in enumerate(trackers):
            begin = clock()
            found = tracker.collect()
            elapsed += clock() - begin - reading
            dirty[i] = found
        assert all(found is not None and found.page_count == expected for found in dirty)
        return elapsed

    def loop() -> int:
        elapsed, found = bare_loop(region.start, region.end, passes)
        assert found == expected * found_by, f"the bare loop found {found} pages of {expected}"
        return elapsed

    return paired(settings, prepare, one if passes == 1 else several, loop)


def rows(settings: Settings, bare: Bare, nbytes: int, listeners: int, shares: tuple[float, ...]) -> Iterator[Row]:
    with arena(bare, nbytes, listeners) as space:
        seen = set[int]()
        for share in shares:
            pages = scattered(space.page_count, share)
            if len(pages) in seen:  # small memory: two shares that come to the same number of pages
                continue
            seen.add(len(pages))
            name = f"{show_bytes(nbytes)}, {len(pages) / space.page_count:.4g} dirty"
            if listeners == 1:
                pair = measure(settings, bare, space, pages, bare.collect, 1)
                yield pair.cost_row(f"collect {name}", MOST_RATIO, MOST_EXTRA_NS)
                continue
            pair = measure(settings, bare, space, pages, bare.listen, listeners)
            yield pair.cost_row(f"collect {name}, {listeners} listeners", MOST_RATIO, MOST_EXTRA_NS * listeners)
            pair = measure(settings, bare, space, pages, bare.collect, 1)
            yield pair.told_row(f"collect {name}, {listeners} lists")


def collect(settings: Settings, bare: Bare) -> Iterator[Row]:
    """One listener's collect against one bare pass, at every density."""
    for nbytes in settings.sizes(64 * KIB, 16 * MIB, 64 * MIB, GIB):
        yield from rows(settings, bare, nbytes, 1, SHARES)


def listeners(settings: Settings, bare: Bare) -> Iterator[Row]:
    """Two and four listeners, each collecting once, against a bare loop that keeps a bitmap for each; the 2 µs are for
    each collect. The rows called "lists" tell, without a target, of a loop that only copies the list of runs."""
    for nbytes in settings.sizes(16 * MIB, GIB):
        for count in (2, 4):
            yield from rows(settings, bare, nbytes, count, (0.0, 0.001, 0.01, 0.1, 0.5, 1.0))

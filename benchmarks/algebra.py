# SPDX-License-Identifier: MIT
"""Set algebra in runs a second, counting the runs that go in."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator

import dirtytrack

from .bare import Bare
from .harness import MIB, Row, Settings, alone, arena, rounds, scattered, undisturbed

LEAST_RUNS_PER_SECOND = 50e6
NBYTES = 512 * MIB


def measure(settings: Settings, name: str, input_runs: int, operation: Callable[[], object]) -> Row:
    samples, clock = list[int](), time.perf_counter_ns
    result = operation()  # rebound below: dropping the last result is in the time
    with undisturbed():
        for _ in rounds(settings):
            begin = clock()
            result = operation()
            samples.append(clock() - begin)
    del result
    rate = input_runs / sorted(samples)[len(samples) // 2] * 1e9
    target = f">= {LEAST_RUNS_PER_SECOND / 1e6:.0f} M runs/s"
    return alone(samples, name, f"{rate / 1e6:.0f} M runs/s", target, rate >= LEAST_RUNS_PER_SECOND)


def algebra(settings: Settings, bare: Bare) -> Iterator[Row]:
    """`|`, `&`, `-`, `<=`, `==` and `union` of sets whose runs are regular and random."""
    nbytes = settings.sizes(NBYTES)[-1]
    with arena(bare, nbytes) as space:
        tracker, address, count = space.trackers[0], space.region.address, space.page_count

        def written(pages: array[int]) -> dirtytrack.DirtySet:
            bare.write(address, pages)
            return tracker.collect()

        regular = written(array("Q", range(0, count, 3))), written(array("Q", range(1, count, 3)))
        chance = written(scattered(count, 0.3, seed=2)), written(scattered(count, 0.3, seed=3))
        for kind, (left, right) in (("regular", regular), ("random", chance)):
            runs, both = len(left) + len(right), left | right
            assert both.page_count <= left.page_count + right.page_count
            twin = left | left
            for sign, input_runs, operation in (
                ("|", runs, lambda a=left, b=right: a | b),
                ("&", runs, lambda a=left, b=right: a & b),
                ("-", runs, lambda a=left, b=right: a - b),
                ("<=", len(left) + len(both), lambda a=left, b=both: a <= b),
                ("==", len(left) + len(twin), lambda a=left, b=twin: a == b),
            ):
                yield measure(settings, f"algebra {sign}, {input_runs} {kind} runs", input_runs, operation)
        sets = [written(scattered(count, 0.1, seed)) for seed in range(4, 12)]
        total = sum(map(len, sets))
        yield measure(
            settings, f"algebra union of 8, {total} random runs", total, lambda: dirtytrack.DirtySet.union(sets)
        )

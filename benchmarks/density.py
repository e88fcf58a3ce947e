# SPDX-License-Identifier: MIT
"""Adaptive tracking at every density, against plain tracking and against the ways that need no tracking.

An epoch is what epoch.py means by it: one store to each page that is written, finding the pages, making ready for the
next epoch, and copying what was found. A tracker lives through all epochs of a row: those before say what it assumes.
The time is that of this thread on the processor, in user and in kernel mode: other programs take their turns in the
middle of an epoch. What fork's child takes to end is therefore not in it.
"""

from __future__ import annotations

import gc
import mmap
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean, median

import numpy as np
import numpy.typing as npt

import dirtytrack

from .bare import PAGE, Bare, address_of
from .epoch import FORK, Ways, measure
from .harness import GIB, MIB, Row, Settings, arena, paired, rounds, scattered, show_bytes

SHARES = (0.0001, 0.001, 0.01, 0.03, 0.1, 0.15, 0.25, 0.5, 1.0)
SETTLE = 8  # epochs before the first that is measured
LEAST_ROUNDS, MOST_ROUNDS = 5, 20
IN_A_ROW = 4  # epochs of one tracker in each round; the first is not measured: its caches are full of others' memory
MPROTECT, MOST_MPROTECT = (
    "mprotect + SIGSEGV",
    0.001,
)  # of the pages: from there on it costs several times plain tracking
MOST_FORK = 0.1  # the same of fork, which copies each page that is written in a fault
WITHOUT = ("memcmp with a copy", "xxh3 of every page")  # they cost the same at each density
ADAPTIVE, PLAIN = "adaptive", "plain tracking"
MOST_OF_BEST, MOST_OF_PLAIN, MOST_SETTLING, MOST_POLICY = 1.1, 1.05, 1.3, 1.05

Pages = npt.NDArray[np.int64]
Draw = Callable[[int, int], Pages]  # of so many pages, so many different ones


class Patterns:
    """Which pages an epoch writes."""

    def __init__(self, page_count: int) -> None:
        self._chance = np.random.default_rng(1)
        self._places = self._chance.permutation(page_count)
        self.page_count = page_count
        self.by_name: dict[str, Callable[[int], Pages]] = {
            "uniform": self.uniform,
            "contiguous": self.contiguous,
            "skewed head": self.skewed,
            "skewed scattered": lambda n: self._places[self.skewed(n)],
        }

    def uniform(self, n: int) -> Pages:
        """Others in each epoch, anywhere."""
        return self._chance.choice(self.page_count, n, replace=False, shuffle=False)

    def contiguous(self, n: int) -> Pages:
        """One part, the same in each epoch."""
        first = (self.page_count - n) // 2
        return np.arange(first, first + n)

    def skewed(self, n: int) -> Pages:
        """By Zipf's law: the page at place k is drawn k times more rarely than the first; each page once."""
        keys = self._chance.standard_exponential(self.page_count) * np.arange(1, self.page_count + 1)
        return np.argpartition(keys, n - 1)[:n]

    def __call__(self, name: str, share: float) -> array[int]:
        n = min(self.page_count, max(1, round(self.page_count * share))) if share else 0
        return array("Q", np.sort(self.by_name[name](n)).astype(np.uint64).tobytes() if n else b"")


@dataclass
class Side:
    """Memory, its mirror, and the tracker that brings the mirror up to date."""

    memory: dirtytrack.Memory
    mirror: dirtytrack.Memory
    tracker: dirtytrack.DirtyTracker | None = None
    told: int = 0  # pages

    def epoch(self, bare: Bare, pages: array[int], value: int) -> int:
        """Nanoseconds of one epoch."""
        assert self.tracker is not None
        begin = time.thread_time_ns()
        bare.write(address_of(self.memory), pages, value=value)
        dirty = self.tracker.collect_into(self.mirror)
        elapsed = time.thread_time_ns() - begin
        self.told += dirty.page_count
        return elapsed


class Space:
    """The memories of one size, used again by each row."""

    def __init__(self, bare: Bare, nbytes: int) -> None:
        self.nbytes, self._bare, self._value = nbytes, bare, 0
        self.patterns = Patterns(nbytes // PAGE)
        self.ways = Ways(bare, nbytes, time.thread_time_ns)
        self.sides: dict[str, Side] = {}
        for name in (ADAPTIVE, PLAIN):
            side = Side(dirtytrack.allocate(nbytes, name=name), dirtytrack.allocate(nbytes, name="mirror"))
            for memory in (side.memory, side.mirror):
                bare.populate(address_of(memory), nbytes)
                memory.madvise(mmap.MADV_DONTFORK)  # fork is to copy the page tables of its own memory only
            self.sides[name] = side

    @contextmanager
    def tracked(self) -> Iterator[None]:
        """With a new tracker of each side, which has nothing to tell."""
        for side in self.sides.values():
            memoryview(side.mirror)[:] = memoryview(side.memory)
        with dirtytrack.UffdSession() as session, dirtytrack.UffdSession() as another:
            session.register(self.sides[ADAPTIVE].memory)
            another.register(self.sides[PLAIN].memory)
            with dirtytrack.DirtyTracker(session) as adaptive, dirtytrack.DirtyTracker(another, exact=True) as plain:
                self.sides[ADAPTIVE].tracker, self.sides[PLAIN].tracker = adaptive, plain
                yield
                for name, side in self.sides.items():
                    if not self.ways.same(side.memory, side.mirror):
                        raise AssertionError(f"{name}: the mirror differs from the memory")

    def epoch(self, name: str, pages: array[int]) -> int:
        """Nanoseconds of one epoch by one of the sides, or by a method that remembers nothing of the epoch before."""
        self._value = self._value % 255 + 1  # another one each time, so that each page differs from the mirror
        if name in self.sides:
            return self.sides[name].epoch(self._bare, pages, self._value)
        return measure(self._bare, self.ways, name, pages, self._value)


def settled(settings: Settings, space: Space, pattern: str, share: float) -> Iterator[Row]:
    """A row against the best of the other methods, and one against plain tracking."""
    limits = Settings(0.0, 2, 2) if settings.tiny else Settings(2 * settings.seconds, LEAST_ROUNDS, MOST_ROUNDS)
    others = list(WITHOUT)
    if share <= MOST_FORK:
        others.append(FORK)
    if share <= MOST_MPROTECT:
        others.append(MPROTECT)
    samples: dict[str, list[int]] = {name: [] for name in (ADAPTIVE, PLAIN, *others)}
    gc.collect()
    with space.tracked():
        for _ in range(SETTLE):
            pages = space.patterns(pattern, share)
            for name in space.sides:
                space.epoch(name, pages)
        side = space.sides[ADAPTIVE]
        side.told = written = 0
        for turn in rounds(limits):
            lists = [space.patterns(pattern, share) for _ in range(IN_A_ROW)]
            written += sum(map(len, lists))
            for name in list(samples) if turn % 2 else reversed(samples):
                each = lists if name in space.sides else lists[:2]
                samples[name] += [space.epoch(name, pages) for pages in each][1:]
    times = {PLAIN: fmean(samples[PLAIN]), **{name: median(samples[name]) for name in others}}
    best = min(times, key=times.__getitem__)
    name = f"density {show_bytes(space.nbytes)}, {pattern}, {share:.4g} dirty"
    beyond = side.told / written - 1
    for other, most in ((best, MOST_OF_BEST), (PLAIN, MOST_OF_PLAIN)):
        row = against(
            f"{name}, against {'the best' if most == MOST_OF_BEST else PLAIN}", samples[ADAPTIVE], times[other], most
        )
        yield replace(row, result=f"{row.result} of {other}, {beyond:+.0%} pages", share=share, method=other)


def against(name: str, ours: list[int], other_ns: float, most: float) -> Row:
    """Ours on the mean may take so many times as long."""
    mean, ordered = fmean(ours), sorted(ours)
    quartiles = ordered[len(ordered) // 4], ordered[len(ordered) * 3 // 4]
    ratio = mean / other_ns
    return Row(name, mean, other_ns, f"{ratio:.3f}x", f"<= {most}x", ratio <= most, len(ours), quartiles, None)


def density(settings: Settings, bare: Bare) -> Iterator[Row]:
    """Adaptive tracking, settled, against plain tracking and the best of the others, by density, pattern and size."""
    for nbytes in settings.sizes(64 * MIB, GIB):
        space = Space(bare, nbytes)
        for pattern in space.patterns.by_name:
            for share in SHARES:
                yield from settled(settings, space, pattern, share)


# ---- workloads that change ----

KINDS = {"dense": ("contiguous", 0.5), "idle": ("uniform", 0.0), "scattered": ("uniform", 0.01)}
PHASES, LEAST_PHASE, MOST_PHASE = 9, 6, 24


def phases(settings: Settings, bare: Bare) -> Iterator[Row]:
    """A workload that is dense, idle, scattered, dense again and so on, each for a random number of epochs."""
    for nbytes in settings.sizes(64 * MIB, GIB):
        space, chance = Space(bare, nbytes), np.random.default_rng(2)
        methods = (ADAPTIVE, PLAIN, *WITHOUT)
        taken: list[tuple[str, int, dict[str, int]]] = []  # the kind of phase, which epoch of it, what each method took
        written = 0
        gc.collect()
        with space.tracked():
            before = space.sides[ADAPTIVE].told = 0
            told_beyond = dict.fromkeys(KINDS, 0)
            for phase in range(PHASES):
                kind = list(KINDS)[phase % len(KINDS)]
                for number in range(2 if settings.tiny else int(chance.integers(LEAST_PHASE, MOST_PHASE + 1))):
                    pages = space.patterns(*KINDS[kind])
                    times = {name: space.epoch(name, pages) for name in methods}
                    taken.append((kind, number, times))
                    written += len(pages)
                    told_beyond[kind] += space.sides[ADAPTIVE].told - before - len(pages)
                    before = space.sides[ADAPTIVE].told
        changed = [each for each in taken[first_change(taken) :] if each[1] < SETTLE]
        size = show_bytes(nbytes)
        for part, epochs in (("all", taken), (f"the first {SETTLE} after each change", changed)):
            totals = {name: sum(times[name] for _, _, times in epochs) for name in methods}
            best = min(methods[1:], key=totals.__getitem__)
            for other, most in ((best, MOST_SETTLING), (PLAIN, MOST_SETTLING)):
                ours = [times[ADAPTIVE] for _, _, times in epochs]
                row = against(
                    f"phases {size}, {part} of {len(epochs)} epochs, against {other}",
                    ours,
                    totals[other] / len(ours),
                    most,
                )
                yield replace(row, method=other)
        for kind in KINDS:
            settling = [times for each, number, times in changed if each == kind]
            ours = [times[ADAPTIVE] for times in settling]
            bests = {name: fmean(times[name] for times in settling) for name in methods[1:]}
            best = min(bests, key=bests.__getitem__)
            row = against(f"phases {size}, settling into {kind}, against {best}", ours, bests[best], MOST_SETTLING)
            extra = told_beyond[kind] / sum(each == kind for each, _, _ in taken)
            yield replace(row, result=f"{row.result}, {extra:+.0f} pages", target="", ok=True, method=best)


def first_change(taken: list[tuple[str, int, dict[str, int]]]) -> int:
    """Where the second phase begins."""
    return next(i for i, (kind, _, _) in enumerate(taken) if kind != taken[0][0])


def policy(settings: Settings, bare: Bare) -> Iterator[Row]:
    """What deciding costs where there is nothing to assume: a collect of an adaptive tracker against an exact one."""
    for nbytes in settings.sizes(64 * MIB, GIB):
        with arena(bare, nbytes, exact=False) as adaptive, arena(bare, nbytes) as exact:
            for share in (0.001, 0.01, 0.1):
                pages = scattered(nbytes // PAGE, share)

                def prepare(pages: array[int] = pages) -> None:
                    for space in (adaptive, exact):
                        bare.write(space.region.address, pages)
                    adaptive.rehearse()

                sides = [collecting(space.trackers[0]) for space in (adaptive, exact)]
                pair = paired(settings, prepare, *sides)
                name = f"policy {show_bytes(nbytes)}, {share:.4g} dirty"
                yield pair.cost_row(name, MOST_POLICY, 0)


def collecting(tracker: dirtytrack.DirtyTracker) -> Callable[[], int]:
    clock, last = time.perf_counter_ns, list[dirtytrack.DirtySet]()

    def collect() -> int:
        last.clear()
        begin = clock()
        dirty = tracker.collect()
        elapsed = clock() - begin
        last.append(dirty)
        return elapsed

    return collect

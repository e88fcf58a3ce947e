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
from .harness import GIB, MIB, Arena, Pair, Row, Settings, arena, rounds, scattered, show_bytes, undisturbed

SHARES = (0.0001, 0.001, 0.01, 0.03, 0.1, 0.15, 0.25, 0.5, 1.0)
SETTLE = 8  # epochs before the first that is measured
LEAST_ROUNDS, MOST_ROUNDS = 3, 10  # on each of two memories
IN_A_ROW = 4  # epochs of one tracker in each round; the first is not measured: its caches are full of others' memory
MPROTECT, MOST_MPROTECT = (
    "mprotect + SIGSEGV",
    0.001,
)  # of the pages: from there on it costs several times plain tracking
MOST_FORK = 0.1  # the same of fork, which copies each page that is written in a fault
WITHOUT = ("memcmp with a copy", "xxh3 of every page")  # they cost the same at each density
ADAPTIVE, PLAIN = "adaptive", "plain tracking"
TURN = 6  # collects, as in adapt.c
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
            "steady scattered": lambda n: self._places[:n],
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

    def exchange(self) -> None:
        """The sides' memories. Where memory happens to lie in the machine makes epochs over it some percent dearer."""
        one, other = self.sides.values()
        one.memory, other.memory = other.memory, one.memory
        one.mirror, other.mirror = other.mirror, one.mirror

    def epoch(self, name: str, pages: array[int]) -> int:
        """Nanoseconds of one epoch by one of the sides, or by a method that remembers nothing of the epoch before."""
        self._value = self._value % 255 + 1  # another one each time, so that each page differs from the mirror
        if name in self.sides:
            return self.sides[name].epoch(self._bare, pages, self._value)
        return measure(self._bare, self.ways, name, pages, self._value)


def settled(settings: Settings, space: Space, pattern: str, share: float) -> Iterator[Row]:
    """A row against the best of the other methods, and one against plain tracking."""
    limits = Settings(0.0, 2, 2) if settings.tiny else Settings(settings.seconds, LEAST_ROUNDS, MOST_ROUNDS)
    others = list(WITHOUT)
    if share <= MOST_FORK:
        others.append(FORK)
    if share <= MOST_MPROTECT:
        others.append(MPROTECT)
    samples: dict[str, list[int]] = {name: [] for name in (ADAPTIVE, PLAIN, *others)}
    told = written = 0
    for _ in range(2):
        gc.collect()
        with space.tracked():
            for _ in range(SETTLE):
                pages = space.patterns(pattern, share)
                for name in space.sides:
                    space.epoch(name, pages)
            side = space.sides[ADAPTIVE]
            side.told = 0
            for turn in rounds(limits):
                lists = [space.patterns(pattern, share) for _ in range(IN_A_ROW)]
                written += sum(map(len, lists))
                for name in list(samples) if turn % 2 else reversed(samples):
                    each = lists if name in space.sides else lists[:2]
                    samples[name] += [space.epoch(name, pages) for pages in each][1:]
            told += side.told
        space.exchange()
    times = {PLAIN: fmean(samples[PLAIN]), **{name: median(samples[name]) for name in others}}
    best = min(times, key=times.__getitem__)
    name = f"density {show_bytes(space.nbytes)}, {pattern}, {share:.4g} dirty"
    beyond = told / written - 1
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


@dataclass
class Taken:
    """One epoch of a workload that changes."""

    kind: str
    settling: bool  # one of the first since the kind changed
    beyond: int  # pages that the adaptive tracker told and nobody wrote
    times: dict[str, int]


def live(space: Space, tiny: bool, methods: tuple[str, ...]) -> list[Taken]:
    """Each method lives through the whole workload."""
    chance, side, taken = np.random.default_rng(2), space.sides[ADAPTIVE], list[Taken]()
    with space.tracked():
        for phase in range(PHASES):
            kind = list(KINDS)[phase % len(KINDS)]
            for number in range(2 if tiny else int(chance.integers(LEAST_PHASE, MOST_PHASE + 1))):
                pages, side.told = space.patterns(*KINDS[kind]), 0
                times = {name: space.epoch(name, pages) for name in methods}
                taken.append(Taken(kind, phase > 0 and number < SETTLE, side.told - len(pages), times))
    return taken


def compared(name: str, epochs: list[Taken], other: str | None = None) -> Row:
    """Adaptive tracking against that method, or against the one that is the best in these epochs."""
    means = {method: fmean(each.times[method] for each in epochs) for method in epochs[0].times if method != ADAPTIVE}
    against_whom = other or min(means, key=means.__getitem__)
    row = against(name, [each.times[ADAPTIVE] for each in epochs], means[against_whom], MOST_SETTLING)
    beyond = fmean(each.beyond for each in epochs)
    return replace(row, result=f"{row.result} of {against_whom}, {beyond:+.0f} pages", method=against_whom)


def phases(settings: Settings, bare: Bare) -> Iterator[Row]:
    """A workload that is dense, idle, scattered, dense again and so on, each for a random number of epochs."""
    for nbytes in settings.sizes(64 * MIB, GIB):
        gc.collect()
        taken = live(Space(bare, nbytes), settings.tiny, (ADAPTIVE, PLAIN, *WITHOUT))
        settling = [each for each in taken if each.settling]
        for part, epochs in (("all", taken), ("settling", settling)):
            name = f"phases {show_bytes(nbytes)}, {part}, {len(epochs)} epochs"
            yield compared(f"{name}, against the best", epochs)
            yield compared(f"{name}, against {PLAIN}", epochs, PLAIN)
        for kind in KINDS:
            epochs = [each for each in settling if each.kind == kind]
            row = compared(f"phases {show_bytes(nbytes)}, settling into {kind}, {len(epochs)} epochs", epochs)
            yield replace(row, target="", ok=True)


# ---- the policy alone ----


def policy(settings: Settings, bare: Bare) -> Iterator[Row]:
    """What deciding costs where there is nothing to assume: a collect of an adaptive tracker against an exact one."""
    for nbytes in settings.sizes(64 * MIB, GIB):
        with arena(bare, nbytes, exact=False) as adaptive, arena(bare, nbytes) as exact:
            for share in (0.001, 0.01, 0.1):
                pair = Pair([], [])
                pages = scattered(nbytes // PAGE, share)
                others = array("Q", (page ^ 1 for page in pages))  # or they would be assumed, one by one
                sides = [(adaptive, pair.ours), (exact, pair.bare)]
                for _ in range(2 * SETTLE):
                    for space, _ in sides:
                        collected(bare, space, pages)
                    pages, others = others, pages
                with undisturbed():
                    for _ in rounds(settings):
                        for space, samples in sides:
                            samples.append(collected(bare, space, pages))
                        sides.reverse()
                        pages, others = others, pages
                ours, exact_ns = turns(pair.ours), median(turns(pair.bare))
                name, ratio = f"policy {show_bytes(nbytes)}, {share:.4g} dirty", median(ours) / exact_ns
                row = against(name, ours, exact_ns, MOST_POLICY)
                yield replace(row, ours_ns=median(ours), result=f"{ratio:.3f}x", ok=ratio <= MOST_POLICY)


def turns(samples: list[int]) -> list[int]:
    """The mean collect of each turn in which the policy looks at some passes and rests in the others."""
    return [round(fmean(samples[at : at + TURN])) for at in range(0, len(samples) - TURN + 1, TURN)] or samples


def collected(bare: Bare, space: Arena, pages: array[int]) -> int:
    """Nanoseconds of a collect after these writes, by the thread's clock."""
    bare.write(space.region.address, pages)
    space.rehearse()
    begin = time.thread_time_ns()
    dirty = space.trackers[0].collect()
    elapsed = time.thread_time_ns() - begin
    del dirty
    return elapsed

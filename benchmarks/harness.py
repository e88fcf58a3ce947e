# SPDX-License-Identifier: MIT
"""Measuring two ways of doing one thing side by side, and telling what came out."""

from __future__ import annotations

import gc
import os
import platform
import random
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import dirtytrack

from .bare import PAGE, Bare

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@dataclass(frozen=True)
class Settings:
    """How long to measure."""

    seconds: float = 2.0  # a row, both sides together
    least_rounds: int = 15
    most_rounds: int = 3000
    tiny: bool = False  # only see whether it runs

    def sizes(self, *nbytes: int) -> Sequence[int]:
        return (64 * KIB, MIB) if self.tiny else nbytes


@dataclass(frozen=True)
class Row:
    """One line of the report. Times are medians in nanoseconds, or means where epochs differ by design; `bare` is what
    `ours` is measured against."""

    name: str
    ours_ns: float
    bare_ns: float | None
    result: str
    target: str
    ok: bool
    rounds: int
    ours_quartiles_ns: tuple[float, float]
    bare_quartiles_ns: tuple[float, float] | None
    share: float | None = None  # of the pages, that was written: where the row has its place in a table
    method: str | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        bare = "" if self.bare_ns is None else f"bare {show_ns(self.bare_ns):>9}"
        verdict = ("ok" if self.ok else "MISSED") if self.target else ""
        target = f"target {self.target:<20} {verdict}" if self.target else ""
        times = f"ours {show_ns(self.ours_ns):>9}  {bare:<14}"
        return f"{self.name:<44} {times}  {self.result:<22} {target}".rstrip()


Benchmark = Callable[[Settings, Bare], Iterator[Row]]


def show_ns(ns: float) -> str:
    for unit, scale in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if abs(ns) >= scale:
            return f"{ns / scale:.3g} {unit}" if abs(ns) < 100 * scale else f"{ns / scale:.0f} {unit}"
    return f"{ns:.0f} ns"


def show_bytes(nbytes: int) -> str:
    for unit, scale in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if nbytes >= scale:
            return f"{nbytes // scale} {unit}"
    return f"{nbytes} B"


def quartiles(samples: Sequence[int]) -> tuple[float, float]:
    ordered = sorted(samples)
    return ordered[len(ordered) // 4], ordered[len(ordered) * 3 // 4]


@dataclass(frozen=True)
class Pair:
    """Samples of both sides in nanoseconds, taken in turn."""

    ours: list[int]
    bare: list[int]

    def _row(self, name: str, result: str, target: str, ok: bool) -> Row:
        return Row(
            name,
            median(self.ours),
            median(self.bare),
            result,
            target,
            ok,
            len(self.ours),
            quartiles(self.ours),
            quartiles(self.bare),
        )

    def cost_row(self, name: str, most_ratio: float, most_extra_ns: float) -> Row:
        """Ours may take `most_ratio` times as long, or `most_extra_ns` longer where that is more."""
        ours, bare = median(self.ours), median(self.bare)
        extra = ours - bare
        result = f"{ours / bare:.3f}x, {'+' if extra >= 0 else '-'}{show_ns(abs(extra))}"
        ok = ours <= max(bare * most_ratio, bare + most_extra_ns)
        return self._row(name, result, f"<= {most_ratio}x or +{show_ns(most_extra_ns)}", ok)

    def told_row(self, name: str, *, by_round: bool = False) -> Row:
        """No target: the ratio is told, and what it means is for the docs."""
        ratio = median(self.ours) / median(self.bare)
        if by_round:
            ratio = median(ours / bare for ours, bare in zip(self.ours, self.bare, strict=True))
        return self._row(name, f"{ratio:.3f}x", "", True)

    def speed_row(self, name: str, least_speed: float, *, by_round: bool = False) -> Row:
        """Ours must reach `least_speed` of the bare throughput: by the medians, or by the median of the rounds' ratios,
        which a machine that is slower for a while disturbs less."""
        speed = median(self.bare) / median(self.ours)
        if by_round:
            speed = median(bare / ours for ours, bare in zip(self.ours, self.bare, strict=True))
        return self._row(name, f"{speed:.3f} of bare speed", f">= {least_speed}", speed >= least_speed)


def alone(samples: Sequence[int], name: str, result: str, target: str, ok: bool) -> Row:
    """A row without a bare side."""
    return Row(name, median(samples), None, result, target, ok, len(samples), quartiles(samples), None)


def rounds(settings: Settings) -> Iterator[int]:
    """Numbers the rounds of one row until its time is over."""
    begin = time.perf_counter()
    number = 0
    while number < settings.least_rounds or (
        number < settings.most_rounds and time.perf_counter() - begin < settings.seconds
    ):
        yield number
        number += 1


def paired(
    settings: Settings,
    prepare: Callable[[], None],
    ours: Callable[[], int],
    bare: Callable[[], int],
    *,
    processors: int = 1,
) -> Pair:
    """Ours, bare, bare, ours, ours, bare, ... with `prepare` before each; the callables return nanoseconds.

    What Python takes to read its clock is taken off ours: the bare side reads it in C. `processors`: how many a call
    may use.
    """
    pair = Pair([], [])
    reading = clock_ns()
    sides = [(ours, pair.ours), (bare, pair.bare)]
    for side, _ in sides:  # warm
        prepare()
        side()
    with undisturbed(processors):
        for _ in rounds(settings):
            for side, samples in sides:
                prepare()
                samples.append(side() - (reading if side is ours else 0))
            sides.reverse()
    return pair


def clock_ns() -> int:
    """What reading the clock twice from Python takes, by the clock itself."""
    clock = time.perf_counter_ns
    samples = []
    for _ in range(1001):
        begin = clock()
        samples.append(clock() - begin)
    return int(median(samples))


@contextmanager
def undisturbed(processors: int = 1) -> Iterator[None]:
    """No cyclic garbage collection, and so many processors; with one, no migration in the middle of a sample."""
    allowed, enabled = os.sched_getaffinity(0), gc.isenabled()
    gc.collect()
    gc.disable()
    os.sched_setaffinity(0, sorted(allowed)[-processors:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
        if enabled:
            gc.enable()


class Rehearsal:
    """Every call that is measured, on a page of its own.

    The writes between two samples empty the caches. What comes next pays for it, whatever it is: some 20 µs here for
    Python code after 64 MiB were written. The bare side reads its clock inside C and would not pay. So both sides are
    called once, just before each sample, and what is measured is what dirtytrack adds.
    """

    def __init__(self, bare: Bare, session: dirtytrack.UffdSession) -> None:
        self._memory, self._mirror = dirtytrack.allocate(PAGE), dirtytrack.allocate(PAGE)
        self._region = session.register(self._memory)
        self._tracker = dirtytrack.DirtyTracker(session, [self._region], exact=True)
        self._tracker.start()
        self._bare = bare

    def __call__(self) -> None:
        self._bare.collect(self._region.start, self._region.end)
        self._memory[0] = 1
        dirty = self._tracker.collect()
        dirty.gather(self._mirror)
        dirty.changed(self._mirror)
        self._memory[0] = 2
        self._tracker.collect_into(self._mirror)


@dataclass(frozen=True)
class Arena:
    """Private anonymous memory, populated, in one region of one session, and the trackers that listen to it."""

    memory: dirtytrack.Memory
    region: dirtytrack.Region
    trackers: list[dirtytrack.DirtyTracker]
    rehearse: Rehearsal

    @property
    def page_count(self) -> int:
        return (self.region.end - self.region.start) // PAGE


@contextmanager
def arena(bare: Bare, nbytes: int, listeners: int = 1, *, exact: bool = True) -> Iterator[Arena]:
    """An Arena whose trackers are started and have nothing to tell. `exact`: the bare loop assumes nothing either."""
    memory = dirtytrack.allocate(nbytes, name="benchmark")
    with dirtytrack.UffdSession() as session, dirtytrack.UffdSession() as another:
        region = session.register(memory, name="memory")
        bare.populate(region.address, nbytes)
        trackers = [dirtytrack.DirtyTracker(session, exact=exact) for _ in range(listeners)]
        for tracker in trackers:
            tracker.start()
        try:
            yield Arena(memory, region, trackers, Rehearsal(bare, another))
        finally:
            for tracker in trackers:
                tracker.stop()


def scattered(page_count: int, share: float, seed: int = 1) -> array[int]:
    """Which pages to write: that share of them (one at least, unless it is 0), anywhere, in order."""
    count = min(page_count, max(1, round(page_count * share))) if share else 0
    return array("Q", sorted(random.Random(seed).sample(range(page_count), count)))


def flat(runs: memoryview) -> array[int]:
    """start, end, start, end, ... of a DirtySet's runs."""
    return array("Q", runs.tobytes())


def machine() -> dict[str, str]:
    """What the numbers depend on."""
    processor = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    release = platform.release().partition("-")[0]  # without what a distribution or a cloud adds
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{processor}, {len(os.sched_getaffinity(0))} processors, {memory / GIB:.0f} GiB",
        "kernel": f"{platform.system()} {release} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "command": " ".join(["python", "-m", "benchmarks", *sys.argv[1:]]),
    }

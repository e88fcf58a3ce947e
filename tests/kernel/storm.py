# SPDX-License-Identifier: MIT
"""What a storm is made of: writers without pause, memory of some kind, listeners of different rhythm and their mirrors.

What of it is looked for, and what must be found, is told in test_storm.py.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shlex
import struct
import subprocess
import threading
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

import dirtytrack
from dirtytrack import DirtySet, DirtyTracker, Run
from dirtytrack.kernel import sets
from tests import oracle
from tests.asked import SOAK, fewer
from tests.kernel.backends import session_of
from tests.oracle import PAGE

Words = npt.NDArray[np.uint64]
Ranges = tuple[tuple[int, int], ...]  # of page numbers, half-open

COLLECTS = 40 if SOAK else fewer(10)  # of each listener in each round, at the least; a quarter where all memory is read
WRITERS = 2
IDLE = 20_000  # visits from one pause of a writer to the next, where it makes any
HUGE_PAGES = 512  # pages of a page table, and of a huge page


class Lost(AssertionError):
    """A store that happened before a collect began is not in the mirror after it."""


# ---- the writers ----------------------------------------------------------------------------------------------------


class Writer(ctypes.Structure):
    """struct storm_writer."""

    _fields_ = [
        *[(name, ctypes.c_uint64) for name in ("memory", "page_words", "index", "writers", "zone_start", "zone_end")],
        *[(name, ctypes.c_uint64) for name in ("random", "idle_one_in", "order", "count")],
        *[(name, ctypes.c_uint64) for name in ("retired", "stores", "discards", "touched")],
    ]
    count: int
    order: int
    idle_one_in: int
    retired: int
    stores: int
    discards: int


def load_writers(folder: Path) -> ctypes.CDLL:
    """storm_writers.c, compiled in that folder."""
    source = Path(__file__).with_name("storm_writers.c")
    built = folder / "storm_writers.so"
    compiler = shlex.split(os.environ.get("CC") or "cc")
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([*compiler, *flags, str(source), "-o", str(built)], check=True, timeout=60)
    loaded = ctypes.CDLL(str(built))
    pointer, number = ctypes.POINTER(Writer), ctypes.c_uint64
    loaded.storm_write.argtypes = [pointer, number, number, number, ctypes.POINTER(ctypes.c_int)]
    for function in (loaded.storm_retired, loaded.storm_touched):
        function.argtypes, function.restype = [pointer], number
    loaded.storm_stamps.argtypes = [pointer, number, ctypes.c_void_p]
    loaded.storm_copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, number]
    for function in (loaded.storm_stamps, loaded.storm_copy):
        function.restype = None
    return loaded


# ---- the memory -----------------------------------------------------------------------------------------------------

NO_ALIAS = 8  # DT_REMEDY_NO_ALIAS


@dataclass(frozen=True)
class Weather:
    """What kind of storm."""

    shared: bool = False
    transparent: bool = False
    company: bool = False
    """Beside the two listeners: one whose consumer fails, one that comes and goes, a region that does, foreign writes
    declared or seen, discards, forks."""
    remedy: int = 0
    """DT_REMEDY_ABSENT, 1: with the extra pass that other kernels need."""
    wide: bool = False
    """Every other page of many in play, so that a scan finds more runs than one answer holds."""
    declares: bool = True
    """Foreign writes are declared."""
    aliased: bool = False
    """The mapping of the foreign writes is armed too, so that nothing need be declared."""
    phases: bool = False
    """In some rounds the pages in play are neighbours, rewritten until they retire; in between, writers do nothing."""
    backend: str = "kernel"
    """Who says what was written."""

    def __str__(self) -> str:
        kind = "shared" if self.shared else "transparent" if self.transparent else "private"
        more = {"company": self.company, "remedy R1": self.remedy, "wide": self.wide, "aliased": self.aliased}
        more |= {"phases": self.phases}
        by = [] if self.backend == "kernel" else [self.backend]
        return " ".join([*by, kind, *(name for name, is_so in more.items() if is_so)])


class Known(NamedTuple):
    """What memory held at a moment; a mirror that is up to date later may have newer stores, never older ones."""

    stamps: Words
    retired: list[npt.NDArray[np.uint32]]
    foreign: Words


class Storm:
    """Memory, in this order of pages: `common` to the writers, a `tail` that some listeners watch at times, the pages
    of the `foreign` writer, and for each writer a zone of its own, where it discards."""

    def __init__(self, library: ctypes.CDLL, weather: Weather, seed: int) -> None:
        self.library, self.weather, self.random = library, weather, Random(seed)
        common = 12 * 1024 if weather.wide else 6 * 1024
        self.tail = (common, common + HUGE_PAGES)
        self.foreign = (self.tail[1], self.tail[1] + HUGE_PAGES)
        zone = 2 * HUGE_PAGES if weather.company else 0
        zones = [self.foreign[1] + index * zone for index in range(WRITERS + 1)]
        self.watched: Ranges = ((0, common), (self.foreign[0], zones[-1]))
        self.held = dirtytrack.allocate(
            zones[-1] * PAGE, shared=weather.shared, huge="transparent" if weather.transparent else None
        )
        self.memory: Words = np.frombuffer(self.held, np.uint64).reshape(zones[-1], -1)
        if seed % 2:
            self.memory[:] = 0  # else the pages are there from their first store on only
        self.other: Words | None = None  # the same memory by another mapping, whose writes no page table shows
        if weather.shared:
            self.other = np.frombuffer(mmap.mmap(self.held.fileno(), self.held.nbytes), np.uint64)
            self.other = self.other.reshape(self.memory.shape)
        self.declared: Words = np.zeros(HUGE_PAGES, np.uint64)
        self.writers, self.orders, self.pages = [], [], []
        for index, (start, end) in enumerate(pairwise(zones)):
            pages = np.arange(0, common, 2) if weather.wide else np.r_[0 : self.tail[1], start:end]
            order = np.zeros(len(pages), np.uint32)
            where = self.memory.ctypes.data, self.memory.shape[1], index, WRITERS, start, end
            self.writers.append(
                Writer(*where, self.random.getrandbits(64) | 1, IDLE * weather.phases, order.ctypes.data, len(order))
            )
            self.orders.append(order)
            self.pages.append(pages)
        self.session = session_of(weather.backend, weather.remedy | (0 if weather.aliased else NO_ALIAS))
        self.regions = [self.session.register(self.memory[a:b], blind_spots="accepted") for a, b in self.watched]
        self.listeners: list[Listener] = []
        self.stop = ctypes.c_int()
        self.over, self.quiet = threading.Event(), threading.Event()
        self.checks: tuple[str, ...] = ("stamps", "retired", "foreign", "rest")
        self.most_runs = self.collects = self.pages_collected = self.pages_assumed = 0

    def known(self) -> Known:
        retired = [
            order[: self.library.storm_retired(writer)] for order, writer in zip(self.orders, self.writers, strict=True)
        ]
        stamps = np.empty((self.tail[1], WRITERS), np.uint64)
        self.library.storm_stamps(self.writers[0], len(stamps), stamps.ctypes.data)
        return Known(stamps, retired, self.declared.copy())

    def seek(self, mirror: Words, known: Known, ranges: Ranges, since: list[int]) -> None:
        """Look for what was known in a mirror of these pages. Raises Lost."""
        for start, end in ranges:
            behind = mirror[start : min(end, self.tail[1]), :WRITERS] < known.stamps[start:end]
            if "stamps" in self.checks and behind.any():
                raise Lost(f"behind the stamps of pages {start + np.flatnonzero(behind.any(axis=1))}")
            if "foreign" in self.checks and start <= self.foreign[0] < end:
                behind = mirror[self.foreign[0] : self.foreign[1], 0] < known.foreign
                if behind.any():
                    raise Lost(f"behind the foreign writes to pages {self.foreign[0] + np.flatnonzero(behind)}")
            for index, (retired, begin) in enumerate(zip(known.retired, since, strict=True)):
                pages = retired[begin:]
                pages = pages[(pages >= start) & (pages < end)]
                differ = (mirror[pages, index::WRITERS] != self.memory[pages, index::WRITERS]).any(axis=1)
                if "retired" in self.checks and differ.any():
                    raise Lost(f"behind the last store to the retired pages {pages[differ]}")

    def rest(self, mirror: Words, ranges: Ranges) -> None:
        if "rest" not in self.checks:
            return
        for start, end in ranges:
            if not np.array_equal(mirror[start:end], self.memory[start:end]):
                differ = (mirror[start:end] != self.memory[start:end]).any(axis=1)
                raise Lost(f"at rest, mirror and memory differ in pages {start + np.flatnonzero(differ)}")

    # ---- a round

    def round(self, stores: int) -> None:
        """Writers, listeners and company at once, until each has done its share; then at rest."""
        dense = self.weather.phases and self.random.random() < 0.7
        for writer, order, pages in zip(self.writers, self.orders, self.pages, strict=True):
            rng = np.random.default_rng(self.random.getrandbits(32))
            order[:] = np.roll(pages, self.random.randrange(len(pages))) if dense else rng.permutation(pages)
            at = int(np.flatnonzero(order == 0)[0])  # the last page is no page of a zone: storm_write wants that
            order[[at, -1]] = order[[-1, at]]
            writer.retired = 0
        in_play = len(self.pages[0]) - 1 if self.weather.wide else self.random.choice([64, 1024, 4096][dense:])
        self.stop.value = 0
        self.over.clear()
        self.quiet.clear()
        for listener in self.listeners:
            listener.verified = [0] * WRITERS
            listener.enough.clear()
        company: list[Callable[[], None]] = [self.guests, self.grow, self.write_from_elsewhere]
        with ThreadPoolExecutor(16) as pool:
            try:
                listening = [pool.submit(listener.listen) for listener in self.listeners]
                others = [pool.submit(one) for one in company if self.weather.company]
                arguments = stores // WRITERS + 1, in_play, 32, ctypes.byref(self.stop)
                writing = [pool.submit(self.library.storm_write, writer, *arguments) for writer in self.writers]
                for listener in self.listeners:
                    listener.enough.wait()
            finally:
                self.stop.value = 1
                errnos = [future.result() for future in writing]
                self.over.set()
                failed = [future.exception() for future in others]  # after these, nobody writes
                self.quiet.set()
            failed += [future.exception() for future in listening]
        for error in failed:
            if error is not None:
                raise error
        assert errnos == [0] * WRITERS

    def counted(self) -> int:
        """The stores that were done, by what the last of each writer left in memory."""
        for index, writer in enumerate(self.writers):
            assert self.memory[:, index::WRITERS][: self.tail[1]].max() == writer.stores
        return sum(writer.stores for writer in self.writers)

    # ---- the company

    def guests(self) -> None:
        """A listener to everything that comes and goes; with a session's region, or one of its own each time."""
        everything: Ranges = ((0, len(self.memory)),)
        mirror = np.empty_like(self.memory)
        random = Random(self.random.random())
        visits = 0
        while not self.over.is_set() or not visits:
            tracker = dirtytrack.track(self.memory, session=self.session, blind_spots="accepted")
            watches = everything
            if random.random() < 0.5:
                del tracker
                tracker, watches = DirtyTracker(self.session, self.regions), self.watched
            with tracker:
                guest = Listener(self, tracker, watches, mirror)
                for _ in range(random.randrange(4)):
                    guest.step()
                known = self.known()
                guest.absorb(tracker.stop())
                guest.seek(known, self.watched if watches is self.watched else everything)
            visits += 1

    def grow(self) -> None:
        """A region that comes and goes under a running listener."""
        listener, random = self.listeners[0], Random(self.random.random())
        while not self.over.is_set():
            region = listener.tracker.add(self.memory[self.tail[0] : self.tail[1]], blind_spots="accepted")
            self.over.wait(random.random() / 100)
            known = self.known()
            final = listener.tracker.remove(region)
            with listener.lock:  # what it collected with the region, it has copied
                listener.absorb(final)
                self.seek(listener.mirror, known, (self.tail,), [0] * WRITERS)
            self.session.unregister(region)

    def write_from_elsewhere(self) -> None:
        """The kernel's writes; in shared memory, writes that nobody can see, so that they are declared."""
        number, random = 0, Random(self.random.random())
        while not self.over.is_set():
            number += 1
            at = random.randrange(HUGE_PAGES)
            page = self.foreign[0] + at
            address = self.held.address + page * PAGE
            value = int(self.declared[at]) + 1
            if self.other is None:
                oracle.write_process(os.getpid(), address, struct.pack("Q", value))
            elif not self.weather.declares:
                self.other[page, 0] = value
            elif random.random() < 0.5:
                self.other[page, 0] = value
                self.session.mark_dirty((address, 8))
            else:
                with self.session.in_flight((address, 8)):
                    self.other[page, 0] = value
            self.declared[at] = value
            if number % 100 == 0:
                assert self.library.storm_fork() > 0
            self.over.wait(0.0005)


# ---- listeners ------------------------------------------------------------------------------------------------------


class Listener:
    """Collects all the time, and copies runs by itself: plainly, so that nothing of the library's is in the way."""

    def __init__(
        self, storm: Storm, tracker: DirtyTracker | None = None, ranges: Ranges = (), mirror: Words | None = None
    ) -> None:
        self.storm = storm
        self.ranges = ranges or storm.watched
        self.random = Random(storm.random.random())
        self.lock = threading.Lock()
        self.enough = threading.Event()
        self.steps = 0
        self.verified = [0] * WRITERS
        self.tracker = DirtyTracker(storm.session, storm.regions) if tracker is None else tracker
        if not self.tracker.epoch:
            self.tracker.start()
        self.mirror: Words = np.empty_like(storm.memory) if mirror is None else mirror
        self.mirror[:] = storm.memory  # started first
        if storm.weather.company and storm.weather.backend != "kernel":  # as copy_by_the_library() says
            everything = array("Q", [storm.held.address, storm.held.address + storm.held.nbytes])
            self.tracker.put_back(DirtySet(sets.from_runs(everything, 1)))
            self.absorb(self.tracker.collect())

    def copy(self, runs: list[Run]) -> None:
        to = self.mirror.ctypes.data - self.storm.held.address
        for run in runs:
            self.storm.library.storm_copy(run.start, to + run.start, run.nbytes // 8)

    def copy_by_the_library(self, dirty: DirtySet) -> None:
        """What is discarded holds zeroes again, as it did before: who compares must know what was read in between."""
        packed = np.frombuffer(dirty.gather(), np.uint64).reshape(-1, self.mirror.shape[1])
        base = self.storm.held.address
        for run in dirty:
            start, count = (run.start - base) // PAGE, run.nbytes // PAGE
            self.mirror[start : start + count] = packed[:count]
            packed = packed[count:]
        assert not len(packed)

    def absorb(self, dirty: DirtySet) -> None:
        if self.storm.weather.company and self.storm.weather.backend != "kernel":
            self.copy_by_the_library(dirty)
        else:
            self.copy(list(dirty))
        self.storm.most_runs = max(self.storm.most_runs, len(dirty))
        self.storm.pages_collected += dirty.page_count
        self.storm.pages_assumed += dirty.assumed.page_count

    def take(self) -> Ranges:
        """Collect in some way; of these pages the mirror is up to date then."""
        self.absorb(self.tracker.collect())
        return self.ranges

    def step(self) -> None:
        known = self.storm.known()
        with self.lock:
            self.seek(known, self.take())
        self.steps += 1
        self.storm.collects += 1

    def seek(self, known: Known, ranges: Ranges) -> None:
        self.storm.seek(self.mirror, known, ranges, self.verified)
        if ranges == self.ranges:
            self.verified = [len(retired) for retired in known.retired]

    def linger(self) -> None:
        if self.storm.weather.wide:  # until most pages were written
            storm = self.storm
            more = sum(storm.library.storm_touched(writer) for writer in storm.writers) + 3 * len(storm.pages[0])
            while not storm.over.is_set() and more > sum(map(storm.library.storm_touched, storm.writers)):
                storm.over.wait(0.001)

    def listen(self) -> None:
        try:
            enough = self.steps + (COLLECTS if self.storm.weather.backend == "kernel" else COLLECTS // 4)
            while not self.storm.quiet.is_set():
                self.linger()
                self.step()
                if self.steps >= enough:
                    self.enough.set()
            Listener.take(self)  # plainly, and all
            self.storm.rest(self.mirror, self.ranges)
        finally:
            self.enough.set()


class Slow(Listener):
    """Of a slower rhythm, and lets the library copy: everything at once, or one region."""

    def linger(self) -> None:
        super().linger()
        self.storm.over.wait(self.random.random() / 200)

    def take(self) -> Ranges:
        regions, ranges = self.storm.regions, self.ranges
        if self.random.random() < 0.5:
            into = {region: self.mirror[a:b] for region, (a, b) in zip(regions, ranges, strict=True)}
            self.tracker.collect_into(into)
            return ranges
        at = self.random.randrange(len(ranges))
        start, end = ranges[at]
        self.tracker.collect_into(self.mirror[start:end], regions[at])
        return (ranges[at],)


class Unreliable(Listener):
    """Takes parts, runs out of time, and often cannot use what it took: then it puts that back."""

    def put_back(self, dirty: DirtySet) -> None:
        self.tracker.put_back(dirty)

    def take(self) -> Ranges:
        how = self.random.choice(["all", "one region", "budget", "fails", "fails in part", "fails midway"])
        if how == "one region":
            at = self.random.randrange(len(self.ranges))
            self.absorb(self.tracker.collect(self.storm.regions[at]))
            return (self.ranges[at],)
        dirty = self.tracker.collect(budget_seconds=self.random.random() / 1000 if how == "budget" else None)
        if how == "fails":
            self.put_back(dirty)
        elif how == "fails in part":
            refused = dirty.in_region(self.random.choice(self.storm.regions))
            self.put_back(refused)
            self.absorb(dirty - refused)
        else:
            self.absorb(dirty)
            if how == "fails midway":
                self.put_back(dirty)
        return self.ranges if how in ("all", "fails midway") or (how == "budget" and dirty.complete) else ()


@contextmanager
def storm_of(library: ctypes.CDLL, weather: Weather, seed: int, listeners: list[type[Listener]]) -> Iterator[Storm]:
    storm = Storm(library, weather, seed)
    with storm.session:
        storm.listeners += [kind(storm) for kind in listeners]
        yield storm

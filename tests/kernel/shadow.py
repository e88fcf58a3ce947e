# SPDX-License-Identifier: MIT
"""A world of memory, a session and listeners, and the obvious model of what each listener is owed.

The model keeps, for each listener and each of its regions, a copy of the memory at the last collect and the pages that
are owed for another reason. What differs from the copy must be in the next set; on plain private memory nothing else
may be.
"""

from __future__ import annotations

import gc
import mmap
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest

import dirtytrack
from dirtytrack.layout import Layout
from tests import oracle
from tests.kernel.backends import session_of
from tests.kernel.host import HUGE_PAGE, POOLS, machine_lock, on_disk
from tests.oracle import PAGE
from tests.points import moved_meanwhile
from tests.strategies import Kind, Mapped, Span, Way

PAGES = {
    **dict.fromkeys((Kind.PRIVATE, Kind.SHARED, Mapped.FILE, Mapped.SHARED_FILE, Mapped.MEMFD, Mapped.SPARSE), 160),
    **dict.fromkeys((Kind.SHARED_HUGE, Kind.HUGE, Mapped.HUGETLB, Mapped.SHARED_HUGETLB), 1024),
}
MADV_REMOVE = 9


def memory_of(kind: Kind | Mapped) -> dirtytrack.Memory | mmap.mmap:
    """New memory of this kind."""
    shared, what = kind.value
    nbytes = PAGES[kind] * PAGE
    if what == "2M":
        with machine_lock():
            POOLS[HUGE_PAGE].ensure(nbytes // HUGE_PAGE)
            return dirtytrack.allocate(nbytes, shared=shared, huge="2M")
    if what in ("file", "memfd"):
        fd = os.memfd_create("model") if what == "memfd" else os.open(on_disk(Path.cwd()), os.O_TMPFILE | os.O_RDWR)
        os.pwrite(fd, random.Random(nbytes).randbytes(nbytes // 2), 0)  # the other half is a hole
        os.ftruncate(fd, nbytes)
        memory = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE)
        os.close(fd)
        return memory
    return dirtytrack.allocate(nbytes, shared=shared, huge="transparent" if what == "transparent" else None)


EAGER = 32  # enum dt_remedy: blocks are small, and assumed at once


class Missed(AssertionError):
    """A page that was written is not in the set that must have it."""

    seen = 0

    def __init__(self, what: str) -> None:
        super().__init__(what)
        Missed.seen += 1


class OtherProcess:
    """A process that writes into this one."""

    _SCRIPT = """
import sys
sys.path[:0] = sys.argv[1:]
from tests.oracle import write_process
for line in sys.stdin:
    pid, address, data = line.split()
    write_process(int(pid), int(address), bytes.fromhex(data))
    print("done", flush=True)
"""

    def __init__(self) -> None:
        oracle.allow_any_tracer()
        root = str(Path(oracle.__file__).resolve().parents[1])
        command = [sys.executable, "-c", self._SCRIPT, root]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def write(self, address: int, data: bytes) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{os.getpid()} {address} {data.hex()}\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "done\n"

    def close(self) -> None:
        with self._process:
            pass


class Watch:
    """What one listener is owed of one region."""

    def __init__(self, world: World, region: dirtytrack.Region) -> None:
        self.region = region
        self.first, self.last = region.start // PAGE, region.end // PAGE
        self.pages = frozenset(range(self.first, self.last))
        self._world = world
        self._before = world.frames(self.first, self.last).copy()
        self.mirror = bytearray(world.own_bytes(region))
        self.owed: set[int] = set()
        """Pages that the next set must have, whatever their content."""
        self.allowed: set[int] = set()
        """Pages that it may have, on memory where the answer is exact."""

    def owe(self, pages: set[int] | frozenset[int]) -> None:
        self.owed |= pages & self.pages
        self.allow(pages)

    def allow(self, pages: set[int] | frozenset[int]) -> None:
        self.allowed |= pages & self.pages

    def changed(self) -> set[int]:
        differ = (self._world.frames(self.first, self.last) != self._before).any(axis=1)
        return {self.first + int(i) for i in np.flatnonzero(differ)}

    def delivered(self, pages: set[int], complete: bool) -> None:
        mine = pages & self.pages
        self.owed -= mine
        if complete:  # else the scan did not come to some of them, which come again
            self.allowed -= mine
        if mine:
            rows = np.fromiter(mine, dtype=np.int64) - self.first
            self._before[rows] = self._world.frames(self.first, self.last)[rows]


class Listener:
    def __init__(self, tracker: dirtytrack.DirtyTracker) -> None:
        self.tracker = tracker
        self.watches: dict[dirtytrack.Region, Watch] = {}

    def selected(self, region: dirtytrack.Region | None) -> list[Watch]:
        return list(self.watches.values()) if region is None else [self.watches[region]]


def pages_of(dirty: dirtytrack.DirtySet) -> set[int]:
    """The pages, by number from address 0; and that the runs are what they are said to be."""
    pages: set[int] = set()
    end = -1
    for start, following in dirty:
        assert start > end, "sorted, disjoint, coalesced"
        assert start % PAGE == following % PAGE == 0
        end = following
        pages.update(range(start // PAGE, end // PAGE))
    assert dirty.page_count == len(pages)
    return pages


class World:
    """Memory, a session and its listeners, and the model of what each is owed."""

    def __init__(
        self,
        kind: Kind | Mapped,
        populated: bool,
        other: OtherProcess | None = None,
        remedy: int = 0,
        backend: str = "kernel",
    ) -> None:
        self.compares = backend != "kernel"
        # Pages that were left unarmed are reported once more when somebody forbids it, and are not assumed then.
        self.exact = self.compares or (kind is Kind.PRIVATE and not remedy & EAGER)
        self.kind = kind
        self.other = other
        self.memory = memory_of(kind)
        self.nbytes = len(self.memory)
        self.base = oracle.address_of(self.memory)
        self._view = memoryview(self.memory)
        self._frames: npt.NDArray[np.uint8] = np.frombuffer(self.memory, np.uint8).reshape(-1, PAGE)
        self.session = session_of(backend, remedy)
        self.regions: list[dirtytrack.Region] = []
        self.listeners: list[Listener] = []
        self.flights: list[tuple[frozenset[int], dirtytrack.session.InFlight]] = []
        self.suspended = False
        self._pipe = os.pipe()
        self._proc_mem = os.open("/proc/self/mem", os.O_RDWR | os.O_CLOEXEC)
        self._count = 0
        if populated:
            self._frames[:] = np.arange(len(self._frames), dtype=np.uint64)[:, None].astype(np.uint8)

    def close(self) -> None:
        for fd in (*self._pipe, self._proc_mem):
            os.close(fd)
        self.session.close()
        self.listeners.clear()
        del self._frames, self._view

    # ---- looking

    def frames(self, first: int, last: int) -> npt.NDArray[np.uint8]:
        page = self.base // PAGE
        return self._frames[first - page : last - page]

    def own_bytes(self, region: dirtytrack.Region) -> memoryview:
        at = region.address - self.base
        return self._view[at : at + region.nbytes]

    def page_numbers(self, span: Span) -> frozenset[int]:
        page = self.base // PAGE
        return frozenset(range(page + span.pages.start, page + span.pages.stop))

    def watches(self) -> Iterator[Watch]:
        for listener in self.listeners:
            yield from listener.watches.values()

    # ---- writing

    def write(self, span: Span, way: Way) -> None:
        start, end = span
        pages = self.page_numbers(span)
        self._count += 1
        data = bytes((self._count * 89 + i // 64) % 251 for i in range(end - start))
        if way is Way.SAME:
            self._view[start:end] = bytes(self._view[start:end])
            for watch in self.watches():
                watch.allow(pages)
            return
        if way is Way.STORE:
            self._view[start:end] = data
        elif way is Way.READ:
            assert os.write(self._pipe[1], data) == len(data)
            assert os.readv(self._pipe[0], [self._view[start:end]]) == len(data)
        elif way is Way.THREAD:
            thread = threading.Thread(target=self._view.__setitem__, args=(slice(start, end), data))
            thread.start()
            thread.join()
        elif way is Way.SELF:
            oracle.write_process(os.getpid(), self.base + start, data)
        elif way is Way.OTHER and self.other is not None:
            self.other.write(self.base + start, data)
        else:
            assert os.pwrite(self._proc_mem, data, self.base + start) == len(data)
        assert self._view[start:end] == data
        for watch in self.watches():
            # If it is discarded again, nothing has come of it, where it leaves no page and no marker. Who compares owes
            # what changed, which Watch.changed() finds: not a store of what was there, nor one that was taken back.
            if self.compares or self.kind is Mapped.SPARSE:
                watch.allow(pages)
            else:
                watch.owe(pages)

    def discard(self, span: Span) -> None:
        """Not looked at: a page that is read before the next collect is a blind spot, where a marker survives."""
        shared, what = self.kind.value
        unit = HUGE_PAGE if what == "2M" else PAGE
        span = Span(span.start // unit * unit, -(-span.end // unit) * unit)
        pages = self.page_numbers(span)
        oracle.discard(min(pages) * PAGE, len(pages) * PAGE, MADV_REMOVE if shared else mmap.MADV_DONTNEED)
        for watch in self.watches():  # owed where the content changed, which Watch.changed() finds
            watch.allow(pages)
        if self.kind is Mapped.SHARED_FILE and not self.suspended:
            for listener in self.listeners:  # before a store near by has a large folio put there, which is a blind spot
                listener.tracker.peek()

    # ---- regions

    def register(self, span: Span) -> dirtytrack.Region:
        arm = "present" if self.kind is Mapped.SPARSE else None
        region = self.session.register(self._view[span.start : span.end], blind_spots="accepted", arm=arm)
        assert (region.address - self.base, region.nbytes) == (span.start, span.end - span.start)
        self.regions.append(region)
        return region

    def unregister(self, region: dirtytrack.Region) -> None:
        watched = any(region in listener.watches for listener in self.listeners)
        if watched:
            with pytest.raises(dirtytrack.InvalidMemory):
                self.session.unregister(region)
        else:
            self.session.unregister(region)
            self.regions.remove(region)

    # ---- listeners

    def listen(self, regions: list[dirtytrack.Region], *, exact: bool = False) -> Listener:
        listener = Listener(dirtytrack.DirtyTracker(self.session, regions, exact=exact))
        listener.tracker.start()
        assert listener.tracker.epoch == 1
        for region in regions:
            watch = listener.watches[region] = Watch(self, region)
            if self.suspended:
                watch.owe(watch.pages)
        self.listeners.append(listener)
        return listener

    def add(self, listener: Listener, region: dirtytrack.Region) -> None:
        if region in listener.watches:
            with pytest.raises(dirtytrack.InvalidMemory):
                listener.tracker.add(region)
            return
        assert listener.tracker.add(region) is region
        watch = listener.watches[region] = Watch(self, region)
        watch.owe(watch.pages)

    def remove(self, listener: Listener, region: dirtytrack.Region) -> None:
        final = listener.tracker.remove(region)
        self._use(final, [listener.watches.pop(region)])

    def stop(self, listener: Listener) -> None:
        final = listener.tracker.stop()
        assert listener.tracker.epoch == 0
        self.listeners.remove(listener)
        self._use(final, listener.selected(None))

    def drop(self, listener: Listener) -> None:
        self.listeners.remove(listener)
        listener.tracker = None  # type: ignore[assignment]
        gc.collect(0)

    # ---- collecting

    def check(self, watches: list[Watch], dirty: dirtytrack.DirtySet, complete: bool = True) -> set[int]:
        """Whether a set has what it must have, and nothing that it may not."""
        pages = pages_of(dirty)
        flying = {page for flight, _ in self.flights for page in flight}
        known: set[int] = set()
        allowed: set[int] = set()
        for watch in watches:
            if self.suspended:
                watch.owe(watch.pages)
            watch.owe(flying)
            known |= watch.pages
            allowed |= watch.allowed
            if complete:
                missed = (watch.changed() | watch.owed) - pages
                if missed:
                    raise Missed(f"{watch.region}: pages {sorted(page - watch.first for page in missed)} are missing")
        assert pages <= known, "pages of no region"
        assumed = pages_of(dirty.assumed)
        assert assumed <= pages, "what was assumed is part of it"
        if self.exact:
            beyond = pages - allowed - assumed
            assert not beyond, f"pages {sorted(beyond)} were not written"
        return pages

    def _use(self, dirty: dirtytrack.DirtySet, watches: list[Watch]) -> None:
        pages = self.check(watches, dirty, dirty.complete)
        if watches:
            dirty.copy_to({watch.region: watch.mirror for watch in watches})
        self._took(watches, pages, dirty.complete)

    def _took(self, watches: list[Watch], pages: set[int], complete: bool) -> None:
        for watch in watches:
            watch.delivered(pages, complete)
            if complete:
                assert self.own_bytes(watch.region) == watch.mirror, "the mirror is the memory"

    def collect(
        self, listener: Listener, region: dirtytrack.Region | None = None, budget_seconds: float | None = None
    ) -> dirtytrack.DirtySet:
        epoch = listener.tracker.epoch
        dirty = listener.tracker.collect(region, budget_seconds=budget_seconds)
        assert dirty.epoch == epoch
        assert listener.tracker.epoch == epoch + 1
        assert dirty.complete or budget_seconds is not None
        self._use(dirty, listener.selected(region))
        return dirty

    def collect_in_steps(self, listener: Listener) -> None:
        """A budget of no time ends a collect at the end of a range at the latest, and the next goes on from there."""
        for _ in range(len(listener.watches) + 1):
            self.collect(listener, budget_seconds=0)
        for watch in listener.watches.values():
            if watch.changed() | watch.owed:
                raise Missed(f"{watch.region}: pages are missing after all of it was looked at")

    def collect_into(self, listener: Listener, region: dirtytrack.Region | None = None) -> None:
        watches = listener.selected(region)
        mirrors = {watch.region: watch.mirror for watch in watches}
        dirty = listener.tracker.collect_into(mirrors, region)
        self._took(watches, self.check(watches, dirty), complete=True)

    def peek(self, listener: Listener, region: dirtytrack.Region | None = None) -> dirtytrack.DirtySet:
        epoch = listener.tracker.epoch
        seen = listener.tracker.peek(region)
        self.check(listener.selected(region), seen)
        assert listener.tracker.epoch == epoch
        return seen

    def collect_and_put_back(self, listener: Listener, region: dirtytrack.Region | None = None) -> None:
        dirty = listener.tracker.collect(region)
        pages = self.check(listener.selected(region), dirty)
        for watch in listener.selected(region):
            watch.delivered(pages, complete=True)
        listener.tracker.put_back(dirty)
        for watch in listener.watches.values():
            watch.owe(pages)

    def collect_and_fail(self, listener: Listener, region: dirtytrack.Region | None = None, into: bool = False) -> None:
        """An exception once the core has made the set: nothing is delivered."""
        tracker = listener.tracker
        layout = tracker._layout
        watches = listener.selected(region)
        pages = self.check(watches, listener.tracker.peek(region))
        mirrors = {watch.region: watch.mirror for watch in watches}
        with (
            mock.patch("dirtytrack.dirtyset.DirtySet.__init__", side_effect=MemoryError),
            mock.patch.object(Layout, "until", side_effect=MemoryError),
            mock.patch.object(tracker, "_collecting", moved_meanwhile(tracker)),
            pytest.raises(MemoryError),
        ):
            (tracker.collect_into(mirrors, region) if into else tracker.collect(region))
        tracker._layout = layout
        for watch in watches:  # of overlapping regions, each gets back what any of them had
            watch.allow(pages)

    # ---- the session

    def mark_dirty(self, span: Span) -> None:
        self.session.mark_dirty((self.base + span.start, span.end - span.start))
        for watch in self.watches():
            watch.owe(self.page_numbers(span))

    def take_off(self, span: Span) -> None:
        flight = self.session.in_flight((self.base + span.start, span.end - span.start))
        flight.__enter__()
        self.flights.append((self.page_numbers(span), flight))

    def land(self, number: int) -> None:
        pages, flight = self.flights.pop(number)
        flight.__exit__(None, None, None)
        for watch in self.watches():
            watch.owe(pages)

    def suspend(self) -> None:
        self.session.suspend()
        self.suspended = True

    def resume(self) -> None:
        self.session.resume()
        self.suspended = False
        for watch in self.watches():
            watch.owe(watch.pages)

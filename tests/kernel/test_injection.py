# SPDX-License-Identifier: MIT
"""The core's allocations and kernel calls fail on purpose, one by one: nothing is lost, nothing leaks.

Truth is a byte-for-byte copy. Each listener has a mirror that only successful collects keep; after a failure and one
more successful collect it must equal the memory.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import dirtytrack
from dirtytrack import DirtySet, DirtyTracker, PageCategory, Pagemap, Region, Scan, UffdFeature, UffdSession
from dirtytrack.kernel import core
from tests.sandbox import failing, libc

PAGE = core.PAGE_BYTES
PAGES = 32
LOW, HIGH, SPARE = range(20), range(12, 28), range(24, 32)  # they overlap
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
MAP_FIXED = 0x10

KERNEL_CALLS = (
    *("SCAN", "REGISTER", "UNREGISTER", "PROTECT", "API", "OPEN_USER_MODE", "OPEN_PAGEMAP", "COPY", "MAPS"),
    "OPEN_USER_MODE OPEN_DEVICE OPEN_FULL",
)
ERRNOS = (errno.EPERM, errno.ENOMEM, errno.EFAULT, errno.EINVAL, errno.EIO, errno.EAGAIN, errno.ENOENT)
FAILURES = (dirtytrack.DirtyTrackError, MemoryError)  # what a call may answer; anything else is a bug


def map_pages(pages: int, at: int = 0) -> int:
    address = libc.mmap(at or None, pages * PAGE, READ_WRITE, PRIVATE | (MAP_FIXED if at else 0), -1, 0)
    assert address != ctypes.c_void_p(-1).value
    return int(address)


class Listener:
    """A tracker and its mirror of the block."""

    def __init__(self, world: World, tracker: DirtyTracker, *watched: range) -> None:
        self.world, self.tracker = world, tracker
        self.watched = {page for pages in watched for page in pages}
        self.mirror = bytearray(world.content())  # started first, mirrored after

    def absorb(self, dirty: DirtySet) -> None:
        base = self.world.base
        for run in dirty:
            self.mirror[run.start - base : run.end - base] = ctypes.string_at(run.start, run.end - run.start)

    def verify(self, pages: set[int] | None = None) -> None:
        content = self.world.content()
        lost = [
            page
            for page in sorted(self.watched if pages is None else pages)
            if content[page * PAGE : (page + 1) * PAGE] != self.mirror[page * PAGE : (page + 1) * PAGE]
        ]
        assert not lost, "pages were lost"


class World:
    """A block of memory with overlapping regions, two listeners of different rhythm, and much that is pending."""

    def __init__(self, variant: str = "plain", remedy: int = 0, seed: int = 1) -> None:
        self.random = random.Random(seed)
        self.base = map_pages(PAGES)
        self.session = UffdSession(_remedy=remedy)
        self.low, self.high, self.spare = (self.register(pages) for pages in (LOW, HIGH, SPARE))
        self.first = self.listen([self.low, self.high], LOW, HIGH)
        self.second = self.listen([self.low], LOW)
        self.listeners = [self.first, self.second]
        self.write()
        self.first.absorb(self.first.tracker.collect())  # the second's pages are pending now
        self.write()
        if variant == "replaced":
            for first, pages in ((4, 4), (14, 2), (25, 2)):
                map_pages(pages, at=self.base + first * PAGE)
            self.write()
        elif variant == "suspended":
            self.session.suspend()
            self.write()
        elif variant == "discarded":
            for first, pages in ((2, 3), (13, 3)):
                assert libc.madvise(self.base + first * PAGE, pages * PAGE, mmap.MADV_DONTNEED) == 0

    def register(self, pages: range) -> Region:
        return self.session.register((self.base + pages.start * PAGE, len(pages) * PAGE), name=f"{pages}")

    def listen(self, regions: list[Region], *watched: range) -> Listener:
        tracker = DirtyTracker(self.session, regions)
        tracker.start()
        return Listener(self, tracker, *watched)

    def content(self) -> bytes:
        return ctypes.string_at(self.base, PAGES * PAGE)

    def write(self) -> None:
        for page in self.random.sample(range(PAGES), 9):
            ctypes.memset(self.base + page * PAGE + self.random.randrange(PAGE), self.random.randrange(1, 256), 1)

    def verify(self) -> None:
        """One more successful collect of each, and nothing was lost; and what is written from now on is found."""
        if self.session.closed:
            self.session = UffdSession()
            self.listeners = [self.listen([self.register(range(PAGES))], range(PAGES))]
        self.session.resume()
        for again in range(3):
            for listener in self.listeners:
                listener.absorb(listener.tracker.collect())
                listener.verify()
                assert not again or not listener.tracker.collect(), "armed again"
            self.write()

    def leave(self, listener: Listener) -> None:
        listener.verify()
        self.listeners.remove(listener)

    def close(self) -> None:
        self.session.close()
        libc.munmap(self.base, PAGES * PAGE)


# ---- each public operation; what it gives out is the consumer's -----------------------------------------------------


def register(w: World) -> None:
    region = w.register(range(5, 8))
    w.listeners.append(w.listen([region], range(5, 8)))


def unregister(w: World) -> None:
    w.session.unregister(w.spare)


def register_again(w: World) -> None:
    w.session.unregister(w.spare)
    w.listeners.append(w.listen([w.register(SPARE)], SPARE))


def start(w: World) -> None:
    w.listeners.append(w.listen([w.low, w.spare], LOW, SPARE))


def collect(w: World) -> None:
    w.second.absorb(w.second.tracker.collect())
    w.second.verify()


def collect_region(w: World) -> None:
    w.first.absorb(w.first.tracker.collect(w.low))
    w.first.verify(set(LOW))


def collect_on_a_budget(w: World) -> None:
    dirty = w.first.tracker.collect(budget_seconds=0)
    w.first.absorb(dirty)
    if dirty.complete:
        w.first.verify()


def collect_into(w: World) -> None:
    mirror = w.second.mirror[: len(LOW) * PAGE]
    w.second.tracker.collect_into(mirror)
    w.second.mirror[: len(mirror)] = mirror
    w.second.verify()


def add(w: World) -> None:
    w.first.tracker.add(w.spare)
    w.first.watched |= set(SPARE)


def remove(w: World) -> None:
    w.first.absorb(w.first.tracker.remove(w.high))
    w.first.verify(set(HIGH))
    w.first.watched = set(LOW)


def stop(w: World) -> None:
    w.second.absorb(w.second.tracker.stop())
    w.leave(w.second)


def put_back(w: World) -> None:
    dirty = w.first.tracker.collect()
    try:
        w.first.tracker.put_back(dirty)
    except FAILURES:
        w.first.absorb(dirty)  # still the consumer's
        raise


def peek(w: World) -> None:
    w.first.absorb(w.first.tracker.peek())
    w.first.verify()


def write_protect(w: World) -> None:
    w.session.write_protect(w.low)
    w.session.write_protect(w.spare)


def suspend(w: World) -> None:
    w.session.suspend()


def resume(w: World) -> None:
    w.session.suspend()
    w.write()
    w.session.resume()


def suspended_start(w: World) -> None:
    """What is started meanwhile is armed by the resume, and a later start must not erase what it has pending."""
    w.session.suspend()
    w.listeners.append(w.listen([w.spare], SPARE))
    w.session.resume()
    third = w.listeners[-1]
    third.absorb(third.tracker.collect())
    w.write()
    w.listeners.append(w.listen([w.spare], SPARE))


def declare(w: World) -> None:
    w.session.mark_dirty(w.low)
    with w.session.in_flight(w.high):
        w.second.absorb(w.second.tracker.collect())


def close(w: World) -> None:
    w.session.close()


def open_session(w: World) -> None:
    with UffdSession() as other:
        memory = bytearray(4 * PAGE)
        with DirtyTracker(other, [other.register(memory)]) as tracker:
            tracker.collect()
            memory[2 * PAGE] = 1
            assert tracker.collect()


def drop(w: World) -> None:
    """Finalisers only queue work: the next call does it."""
    w.listeners.remove(w.second)
    del w.second
    w.spare = w.high
    w.write()
    w.first.absorb(w.first.tracker.collect())
    w.first.verify()


def read_bytes(w: World) -> None:
    dirty = w.second.tracker.collect()
    w.second.absorb(dirty)
    mirror = bytearray(len(LOW) * PAGE)
    assert len(dirty.gather()) == dirty.nbytes
    dirty.copy_to(mirror)
    assert not dirty.changed(mirror)
    dirty.scatter(dirty.gather())
    assert len(DirtySet.union([dirty, dirty]) | dirty) == len(dirty & dirty)
    assert not dirty - dirty


def scan(w: World) -> None:
    mask = PageCategory.PRESENT
    with Pagemap() as pagemap:
        found = pagemap.scan(w.base, w.base + PAGES * PAGE, category_mask=mask, return_mask=mask)
    assert found.page_count


OPERATIONS = (
    *(register, unregister, register_again, start, collect, collect_region, collect_on_a_budget, collect_into, add),
    *(remove, stop, put_back, peek, write_protect, suspend, resume, suspended_start, declare, close, open_session),
    *(drop, read_bytes, scan),
)
VARIANTS = ("plain", "replaced", "suspended", "discarded")


def fails_at(sites: str, number: int, after: bool, operation: Callable[[World], None], *how: Any) -> Iterator[int]:
    """Fails the first call at these sites, then the second, until the operation makes no more of them."""
    nth = 0
    while True:
        nth += 1
        world = World(*how)
        failed = False
        try:
            with failing(*sites.split(), number=number, nth=nth, after=after) as calls:
                operation(world)
        except FAILURES:
            failed = True
        world.verify()
        world.close()
        assert failed <= (calls.seen >= nth), "failed by itself"
        if calls.seen < nth:
            return
        yield nth


def cases(*how: Any, operation: Callable[[World], None]) -> int:
    done = sum(1 for _ in fails_at("ALLOCATE", errno.ENOMEM, False, operation, *how))
    for sites in KERNEL_CALLS:
        for number in ERRNOS:
            if (sites, number) == ("MAPS", errno.ENOENT):
                continue  # the kernel's word for "nothing is mapped there"
            for after in (False, True):
                try:
                    for _ in fails_at(sites, number, after, operation, *how):
                        done += 1
                        assert done < 5000
                except Exception as error:
                    error.args = (f"{sites} {errno.errorcode[number]} after={after}: {error}",)
                    raise
    return done


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_call_of_an_operation_fails_once(operation: Callable[[World], None], variant: str) -> None:
    done = cases(variant, operation=operation)
    assert done or operation in {declare, put_back, suspend, close, drop} or variant == "suspended"


@pytest.mark.parametrize("operation", [collect, collect_into, start, add, stop], ids=lambda op: op.__name__)
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_call_of_an_operation_fails_once_where_absent_pages_are_looked_for(
    operation: Callable[[World], None], variant: str
) -> None:
    assert cases(variant, 1, operation=operation) or variant == "suspended"


@pytest.mark.parametrize("sites", ["SCAN", "ALLOCATE"])
def test_a_collect_of_many_scans_fails_midway(sites: str) -> None:
    """More runs than one scan can tell, so that a later scan fails when earlier ones have taken their pages."""
    pages = 20_000
    memory = dirtytrack.allocate(pages * PAGE)
    with UffdSession() as session:
        region = session.register(memory)
        first, second = DirtyTracker(session), DirtyTracker(session)
        first.start()
        second.start()
        expected = list(range(0, pages, 2))
        for number, after in ((errno.EPERM, False), (errno.EPERM, True), (errno.EFAULT, True), (errno.EIO, True)):
            for nth in (1, 2):
                for page in expected:
                    memory[page * PAGE] ^= 1
                try:
                    with failing(sites, number=number, nth=nth, after=after) as calls:
                        found = first.collect()
                except FAILURES:
                    found = first.collect()
                assert calls.seen >= nth or sites == "ALLOCATE"
                assert set(expected) <= set(found.pages(region))
                assert set(expected) <= set(second.collect().pages(region)), "another listener lost them"


def test_every_call_fails_for_good_and_then_no_more() -> None:
    for operation in OPERATIONS:
        for sites, number in (("ALLOCATE", errno.ENOMEM), ("SCAN", errno.EPERM), ("SCAN", errno.EIO)):
            world = World()
            try:
                with failing(sites, number=number, times=0):
                    operation(world)
            except FAILURES:
                pass
            world.verify()
            world.close()


# ---- leaks ----------------------------------------------------------------------------------------------------------


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def mapping_count() -> int:
    return Path("/proc/self/maps").read_text().count("\n")


SANITIZED = os.environ.get("DIRTYTRACK_SANITIZE") == "1"


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def failing_calls(world: World, count: int) -> None:
    tracker, session = world.first.tracker, world.session
    mirror = bytearray(len(LOW) * PAGE)
    some = (world.base + 6 * PAGE, PAGE)
    ways: list[tuple[str, int, Callable[[], object]]] = [
        ("API", errno.EINVAL, UffdSession),
        ("OPEN_PAGEMAP", errno.EMFILE, UffdSession),
        ("SCAN", errno.ENOTTY, UffdSession),
        ("REGISTER", errno.ENOMEM, lambda: session.register(some)),
        ("REGISTER", errno.EBUSY, lambda: dirtytrack.track(some, session=session)),
        ("REGISTER", errno.EIO, lambda: tracker.add(some)),
        ("PROTECT", errno.EIO, lambda: tracker.add(world.spare)),
        ("PROTECT", errno.ENOMEM, lambda: DirtyTracker(session, [world.spare]).start()),
        ("SCAN", errno.EIO, tracker.collect),
        ("SCAN", errno.EIO, tracker.peek),
        ("SCAN", errno.EIO, lambda: tracker.remove(world.high)),
        ("SCAN", errno.EIO, tracker.stop),
        ("COPY", errno.EFAULT, lambda: world.second.tracker.collect_into(mirror)),
        ("MAPS", errno.EIO, lambda: session.register(some)),
    ]
    ways += [("ALLOCATE", errno.ENOMEM, call) for _, _, call in ways]
    for i in range(count):
        sites, number, call = ways[i % len(ways)]
        ctypes.memset(world.base + (i % 20) * PAGE, i & 0xFF, 1)
        nth = 1 + i // len(ways) % 2 if sites == "ALLOCATE" else 1
        times = 0 if sites == "ALLOCATE" else 1
        try:
            with failing(sites, number=number, nth=nth, times=times):
                result = call()
        except FAILURES:
            continue
        if not tracker.epoch:
            tracker.start()
        elif world.high not in tracker.regions:
            tracker.add(world.high)
        if isinstance(result, DirtySet):
            tracker.put_back(result)
            world.second.tracker.put_back(result)
        elif isinstance(result, Region):
            if result in tracker.regions:
                tracker.put_back(tracker.remove(result))
            if result is not world.spare:
                session.unregister(result)
        del result


def test_ten_thousand_failing_calls_leak_nothing() -> None:
    world = World()
    failing_calls(world, 1000)  # what is allocated once and kept
    gc.collect()
    world.verify()
    before = descriptors(), mapping_count()
    resident = resident_bytes()
    failing_calls(world, 10_000)
    gc.collect()
    assert abs(descriptors() - before[0]) <= 0
    assert mapping_count() <= before[1] + 4
    if not SANITIZED:  # the address sanitizer keeps what is freed for a while
        assert resident_bytes() <= resident + (2 << 20)
    world.verify()
    world.close()


# ---- bits that nobody knows yet -------------------------------------------------------------------------------------

UNKNOWN = 1 << 40


class Kernel:
    """The core of a kernel that knows more than this library."""

    def __init__(self, lib: Any) -> None:
        self._lib = lib

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lib, name)

    def dt_probe(self, out: Any) -> None:
        self._lib.dt_probe(out)
        out.features |= UNKNOWN
        out.categories |= UNKNOWN

    def dt_session_features(self, session: Any) -> int:
        return int(self._lib.dt_session_features(session)) | UNKNOWN


def test_unknown_bits_survive(monkeypatch: pytest.MonkeyPatch) -> None:
    session = UffdSession()
    monkeypatch.setattr(core, "lib", Kernel(core.lib))
    support = dirtytrack.probe()
    assert support.features & UNKNOWN
    assert support.categories & UNKNOWN
    assert support.features & UffdFeature.WP_ASYNC
    assert isinstance(support.features, UffdFeature)
    assert session.features & UNKNOWN
    assert repr(session.features)
    session.close()


def test_unknown_categories_of_a_scan_survive() -> None:
    numbers = memoryview(bytearray(24)).cast("Q", (1, 3))
    numbers[0, 1], numbers[0, 2] = PAGE, UNKNOWN | PageCategory.WRITTEN
    [part] = Scan(numbers, PAGE)
    assert part.categories == UNKNOWN | PageCategory.WRITTEN
    assert isinstance(part.categories, PageCategory)
    assert PageCategory.WRITTEN in part.categories
    assert int(part.categories) & ~PageCategory.WRITTEN.value == UNKNOWN


def test_unknown_bits_are_asked_of_the_kernel() -> None:
    with Pagemap() as pagemap, pytest.raises(dirtytrack.InvalidMemory) as caught:
        pagemap.scan(0, PAGE, return_mask=PageCategory(UNKNOWN))
    assert caught.value.errno == errno.EINVAL, "not dropped on the way"

# SPDX-License-Identifier: MIT
"""What the tests of injected failures do it to: a block of memory, its listeners, and each public operation.

Truth is a byte-for-byte copy. Each listener has a mirror that only successful collects keep; after a failure and one
more successful collect it must equal the memory.
"""

from __future__ import annotations

import ctypes
import mmap
import random
from collections.abc import Callable

import dirtytrack
from dirtytrack import DirtySet, DirtyTracker, PageCategory, Pagemap, Region, RegionGone, UffdSession
from tests import oracle
from tests.kernel.backends import session_of
from tests.oracle import PAGE

PAGES = 32
LOW, HIGH, SPARE = range(20), range(12, 28), range(24, 32)  # they overlap
FAILURES = (dirtytrack.DirtyTrackError, MemoryError)  # what a call may answer; anything else is a bug
FAR = 1 << 45  # where the kernel maps nothing by itself: a hole there stays one
VARIANTS = ("plain", "replaced", "suspended", "discarded", "gone")


class Listener:
    """A tracker and its mirror of the block."""

    def __init__(self, world: World, tracker: DirtyTracker, *watched: range) -> None:
        self.world, self.tracker = world, tracker
        self.watched = {page for pages in watched for page in pages}
        self.mirror = bytearray(world.content())  # started first, mirrored after

    def absorb(self, dirty: DirtySet) -> None:
        base = self.world.base
        for start, end in dirty:
            if base <= start < base + PAGES * PAGE:  # else of what went away
                self.mirror[start - base : end - base] = ctypes.string_at(start, end - start)

    def collect(self) -> None:
        """And take out what went away, which is told once."""
        try:
            self.absorb(self.tracker.collect())
        except RegionGone as gone:
            assert gone.region is not None
            assert gone.region is self.world.lost
            self.absorb(self.tracker.remove(gone.region))
            self.absorb(self.tracker.collect())

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

    def __init__(self, variant: str = "plain", remedy: int = 0, seed: int = 1, backend: str = "kernel") -> None:
        self.random = random.Random(seed)
        self.base = oracle.map_at(0, PAGES * PAGE)
        self.remedy = remedy
        self.backend = backend
        self.session = session_of(backend, remedy)
        self.low, self.high, self.spare = (self.register(pages) for pages in (LOW, HIGH, SPARE))
        self.first = self.listen([self.low, self.high], LOW, HIGH)
        self.second = self.listen([self.low], LOW)
        self.listeners = [self.first, self.second]
        self.lost: Region | None = None
        if variant == "gone":
            self.lost = self.first.tracker.add((oracle.map_at(FAR, 8 * PAGE), 8 * PAGE), name="lost")
        self.write()
        self.first.absorb(self.first.tracker.collect())  # the second's pages are pending now
        self.write()
        if variant == "replaced":
            for first, pages in ((4, 4), (14, 2), (25, 2)):
                oracle.map_at(self.base + first * PAGE, pages * PAGE)
            self.write()
        elif variant == "suspended":
            self.session.suspend()
            self.write()
        elif variant == "discarded":
            for first, pages in ((2, 3), (13, 3)):
                oracle.discard(self.base + first * PAGE, pages * PAGE)
        elif self.lost is not None:
            oracle.unmap(self.lost.start + 2 * PAGE, 3 * PAGE)

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
            self.session = session_of(self.backend)
            self.listeners = [self.listen([self.register(range(PAGES))], range(PAGES))]
        self.session.resume()
        for again in range(3):
            for listener in self.listeners:
                listener.collect()
                listener.verify()
                assert not again or not listener.tracker.collect(), "armed again"
            self.write()

    def leave(self, listener: Listener) -> None:
        listener.verify()
        self.listeners.remove(listener)

    def close(self) -> None:
        self.session.close()
        oracle.unmap(self.base, PAGES * PAGE)
        if self.lost is not None:
            oracle.unmap(FAR, 8 * PAGE)


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


def collect_both(w: World) -> None:
    w.first.absorb(w.first.tracker.collect())
    w.first.verify()


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


def collect_into_both(w: World) -> None:
    """Two mirrors of regions that overlap."""
    pieces = {w.low: w.first.mirror[: LOW.stop * PAGE], w.high: w.first.mirror[HIGH.start * PAGE : HIGH.stop * PAGE]}
    w.first.tracker.collect_into({**pieces, w.lost: bytearray(w.lost.nbytes)} if w.lost else pieces)
    w.first.mirror[: LOW.stop * PAGE] = pieces[w.low]
    w.first.mirror[HIGH.start * PAGE : HIGH.stop * PAGE] = pieces[w.high]
    w.first.verify()


def audit(w: World) -> None:
    """A third listener that keeps hashes of every page."""
    tracker = DirtyTracker(w.session, [w.low, w.spare], audit=1.0)
    tracker.start()
    third = Listener(w, tracker, LOW, SPARE)
    w.listeners.append(third)
    for _ in range(2):
        w.write()
        third.absorb(tracker.collect())
        third.verify()


def grow(w: World) -> None:
    """A buffer is registered, watched, and unregistered by the end of its tracker."""
    with dirtytrack.track((w.base + 18 * PAGE, 9 * PAGE), session=w.session) as tracker:
        tracker.add((w.base + 26 * PAGE, 4 * PAGE))
        third = Listener(w, tracker, range(18, 30))
        w.write()
        third.absorb(tracker.collect())
        third.verify()


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
    with session_of(w.backend) as other:
        memory = bytearray(4 * PAGE)
        with DirtyTracker(other, [other.register(memory)]) as tracker:
            tracker.collect()
            memory[2 * PAGE] = 1
            assert tracker.collect()


def every_kind(w: World) -> None:
    """Memory whose discards a marker hides, two mappings of it, what is populated only, and what the kernel tells."""
    shared, sparse = dirtytrack.allocate(8 * PAGE, shared=True), dirtytrack.allocate(8 * PAGE)
    alias = mmap.mmap(shared.fileno(), shared.nbytes)
    shared[:] = alias[:]  # present at both
    with UffdSession(events=True, _remedy=w.remedy) as session:
        both = [session.register(shared, name="shared", blind_spots="accepted")]
        both.append(session.register(sparse, name="sparse", arm="present"))
        with DirtyTracker(session, both) as tracker:
            mirrors = {"shared": bytearray(shared), "sparse": bytearray(sparse)}
            seen = alias if both[0].aliases else shared  # that it cannot be registered is said, not raised
            assert both[0].aliases or any("another userfaultfd" in spot for spot in both[0].blind_spots)
            sparse[0] = seen[0] = 1
            shared.madvise(mmap.MADV_REMOVE, 5 * PAGE, PAGE)
            try:
                tracker.collect_into(mirrors)
            except FAILURES:
                tracker.collect_into(mirrors)
                raise
            finally:
                assert mirrors == {"shared": shared[:], "sparse": sparse[:]}


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


OPERATIONS: tuple[Callable[[World], None], ...] = (
    *(register, unregister, register_again, start, collect, collect_both, collect_region, collect_into),
    *(collect_on_a_budget, collect_into_both, audit, grow, add),
    *(remove, stop, put_back, peek, write_protect, suspend, resume, suspended_start, declare, close, open_session),
    *(drop, read_bytes, scan),
)
OF_ITS_OWN = (every_kind,)
"""With a session of its own, so that nothing of the world matters to it."""

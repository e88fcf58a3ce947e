# SPDX-License-Identifier: MIT
"""A heap that is reserved at 64 GiB and touched in 64 places: no page tables, no memory, for all that gc offers."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dirtytrack import DirtyTracker, Memory, Region, UffdSession, allocate
from dirtytrack.gc import CardTable, ConcurrentMark, CrossingMap, RememberedSet
from tests import oracle
from tests.kernel.gc.heaps import YOUNG, YOUNG_BYTES
from tests.oracle import PAGE

GIB = 1 << 30
END = YOUNG + YOUNG_BYTES
PLACES = [i * GIB + i * PAGE for i in range(64)]
MOST_BYTES = 16 << 20  # of tables of ours and the kernel's together; a byte for each page of 64 GiB is as much


@dataclass
class Reservation:
    session: UffdSession
    memory: Memory
    region: Region

    @property
    def addresses(self) -> list[int]:
        return [self.memory.address + place for place in PLACES]

    def tracker(self) -> DirtyTracker:
        made = DirtyTracker(self.session, [self.region])
        made.start()
        return made

    def touch(self, value: int) -> None:
        for at in self.addresses:
            oracle.poke_bytes(at, value.to_bytes(8, "little"))


@pytest.fixture
def heap(session: UffdSession) -> Iterator[Reservation]:
    memory = allocate(64 * GIB, sparse=True, name="reservation")
    reserved = Reservation(session, memory, session.register(memory))
    assert reserved.region.arm == "present"
    reserved.touch(1)
    yield reserved
    session.unregister(reserved.region)
    memory.close()


def page_table_bytes(status: str = "/proc/self/status") -> int:
    found = re.search(r"VmPTE:\s+(\d+) kB", Path(status).read_text())
    assert found
    return int(found[1]) << 10


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


@pytest.fixture(autouse=True)
def nothing_grows(heap: Reservation) -> Iterator[None]:
    """Sixty-four touched places take 64 page tables, and the reservation none."""
    tables, resident = page_table_bytes(), resident_bytes()
    yield
    assert page_table_bytes() - tables < 2 << 20
    if os.environ.get("DIRTYTRACK_SANITIZE") != "1":  # which keeps what is freed
        assert resident_bytes() - resident < MOST_BYTES


def test_collecting(heap: Reservation) -> None:
    tracker = heap.tracker()
    for value in range(5):
        heap.touch(value)
        dirty = tracker.collect()
        assert [start for start, _ in dirty] == [at & -PAGE for at in heap.addresses]
        assert tracker.collect().page_count == 0


def test_a_remembered_set(heap: Reservation) -> None:
    remembered = RememberedSet(heap.region, heap.tracker(), nursery=(YOUNG, END))
    assert not len(remembered.minor(YOUNG, END))  # which reads the whole heap
    heap.touch(YOUNG)
    for _ in range(2):
        slots = remembered.minor(YOUNG, END)
        assert list(slots) == heap.addresses
        assert slots.page_count == 64
    remembered.remember_all()
    assert list(remembered.minor(YOUNG, END)) == heap.addresses


@pytest.mark.parametrize("mirror", [False, True])
def test_cards(heap: Reservation, mirror: bool) -> None:
    card_bytes = 512 if mirror else PAGE
    cards = CardTable(heap.region, heap.tracker(), card_bytes, mirror=mirror)
    expected = [at & -card_bytes for at in heap.addresses]
    cards.update()
    assert set(cards.dirty_cards()) >= set(expected)
    assert len(cards.dirty_cards()) <= 64 * (PAGE // card_bytes)
    cards.clear()
    for value in (2, 3):
        heap.touch(value)
        cards.update()
        assert cards.dirty_cards().tolist() == expected
        cards.clear()
        cards.update()
        assert not len(cards.dirty_ranges())


def test_marking_and_a_crossing_map(heap: Reservation) -> None:
    tracker = heap.tracker()
    crossing, mark = CrossingMap(heap.region, 16), ConcurrentMark(heap.region, tracker)
    crossing.add([at & -PAGE for at in heap.addresses])
    mark.begin()
    heap.touch(2)
    rounds = [dirty.page_count for dirty in mark.rounds()]
    assert rounds[0] == 64
    heap.touch(3)
    assert len(crossing.objects_on(mark.finish())) == 64
    assert len(crossing.objects_on([(heap.region.start, heap.region.end)])) == 64


def test_marking_where_nobody_knows_what_was_written(heap: Reservation) -> None:
    tracker = heap.tracker()
    mark = ConcurrentMark(heap.region, tracker)
    mark.begin()
    tracker.collect()  # by somebody else
    dirty = mark.finish()
    assert [start for start, _ in dirty] == [at & -PAGE for at in heap.addresses], "what is not there is not to be read"


def test_a_reservation_that_joins_a_heap(heap: Reservation) -> None:
    small = allocate(8 * PAGE)
    tracker = DirtyTracker(heap.session, [heap.session.register(small)])
    tracker.start()
    mark, cards = ConcurrentMark(tracker.regions, tracker), CardTable(tracker.regions, tracker)
    mark.begin()
    mark.add(heap.region)
    assert mark.finish().page_count == 64
    cards.update()
    cards.clear()
    cards.add(heap.region)
    cards.update()
    assert len(cards.dirty_cards(heap.region)) == 64


def test_a_fork_copies_no_page_tables(heap: Reservation) -> None:
    remembered = RememberedSet(heap.region, heap.tracker(), nursery=(YOUNG, END))
    remembered.minor(YOUNG, END)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.write(writing, Path("/proc/self/status").read_bytes())
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    found = re.search(r"VmPTE:\s+(\d+) kB", os.read(reading, 1 << 16).decode())
    os.close(reading)
    os.close(writing)
    assert found
    assert int(found[1]) << 10 <= page_table_bytes() + (1 << 20)
    heap.touch(YOUNG)
    assert list(remembered.minor(YOUNG, END)) == heap.addresses, "and the parent goes on"


@pytest.mark.parametrize("mark", [False, True])
def test_a_mirror_forgets_what_was_discarded(session: UffdSession, mark: bool) -> None:
    """A page that is given back is zeroes. What was there before, stored anew, is news."""
    memory = allocate(8 * GIB, sparse=True)
    count = 3 * 4096  # pages: so many that it is asked which of them are populated
    words = memoryview(memory).cast("Q")
    words[: count * PAGE // 8 : PAGE // 8] = memoryview(b"\1\0\0\0\0\0\0\0" * count).cast("Q")
    tracker = DirtyTracker(session, [session.register(memory)])
    tracker.start()
    cards = CardTable(tracker.regions, tracker, 512, mirror=True)
    cards.update()
    cards.clear()
    before = resident_bytes()
    if mark:
        memory.discard(0, count * PAGE)
        cards.update()
        assert cards.dirty_cards()[0] == memory.address
    else:
        with cards.forget_own_writes():
            memory.discard(0, count * PAGE)
        assert not len(cards.dirty_cards()), "it was the collector's"
    assert resident_bytes() < before - 3 * count * PAGE // 2, "neither the heap nor its mirror keeps a page"
    cards.clear()
    words[5 * PAGE // 8] = 1
    cards.update()
    assert cards.dirty_cards().tolist() == [memory.address + 5 * PAGE]
    words.release()

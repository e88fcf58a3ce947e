# SPDX-License-Identifier: MIT
"""What no page table sees: each blind spot of each kind of memory really is one, and declaring such writes mends it.

`BlindSpotWarning` once a registration, at the caller's line; `mark_dirty` and `in_flight` towards every listener; DMA
for real, by io_uring. Takes about 2 s of CI's 20 min.
"""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dirtytrack
from dirtytrack import DirtySet, DirtyTracker, Region, Run, UffdSession
from tests import oracle
from tests.kernel.ring import Ring
from tests.oracle import PAGE

HUGE_PAGE = 2 << 20
DMA = "DMA in flight"
OTHER_WRITERS = "writes through a descriptor, another process, or a mapping made after the registration"
FILE_BENEATH = "the file changing beneath pages that were never written"
REREAD = "pages discarded and there again, by a read or in a large folio, before the next collect"


@pytest.fixture
def session() -> Iterator[UffdSession]:
    with UffdSession() as made:
        yield made


def armed(session: UffdSession, *regions: Region) -> DirtyTracker:
    """A running tracker with nothing pending."""
    tracker = DirtyTracker(session, regions or None)
    tracker.start()
    assert not tracker.collect()
    return tracker


def pages_of(dirty: DirtySet, region: Region) -> list[int]:
    return list(dirty.pages(region))


def is_resizable(buffer: bytearray) -> bool:
    try:
        buffer.append(0)
    except BufferError:
        return False
    buffer.pop()
    return True


# ---- blind spots ----------------------------------------------------------------------------------------------------


@contextmanager
def kind_of_memory(kind: str, folder: Path) -> Iterator[tuple[int, int]]:
    """Four pages of this kind with content, as (address, descriptor of the file or -1)."""
    fd = -1
    if kind.startswith("memfd"):
        fd = os.memfd_create("kind")
    elif kind.startswith("file"):
        fd = os.open(folder / "file", os.O_RDWR | os.O_CREAT)
    if fd >= 0:
        os.pwrite(fd, bytes([1]) * 4 * PAGE, 0)
        flags = mmap.MAP_SHARED if kind.endswith("shared") else mmap.MAP_PRIVATE
        address = oracle._libc.mmap(None, 4 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0)
    else:
        sharing = mmap.MAP_SHARED if kind.endswith("shared") else mmap.MAP_PRIVATE
        flags = mmap.MAP_ANONYMOUS | sharing
        address = oracle._libc.mmap(None, 4 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    assert address != oracle.MAP_FAILED
    try:
        yield address, fd
    finally:
        oracle.unmap(address, 4 * PAGE)
        if fd >= 0:
            os.close(fd)


SHARED_SPOTS = frozenset((DMA, OTHER_WRITERS, REREAD))
FILE_SPOTS = frozenset((DMA, FILE_BENEATH, REREAD))
SPOTS = {
    "anonymous private": frozenset((DMA,)),
    "anonymous shared": SHARED_SPOTS,
    "memfd shared": SHARED_SPOTS,
    "memfd private": FILE_SPOTS,
    "file shared": SHARED_SPOTS,
    "file private": FILE_SPOTS,
}


@pytest.mark.parametrize("kind", SPOTS)
def test_what_each_kind_of_memory_hides_is_warned_of_once(session: UffdSession, kind: str, tmp_path: Path) -> None:
    with kind_of_memory(kind, tmp_path) as (address, _), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        memory = address, 4 * PAGE
        region = session.register(memory, name="mine")
        with DirtyTracker(session, [region]) as tracker, session.in_flight(memory):
            tracker.collect()
            session.mark_dirty(memory)
        session.suspend()
        session.resume()
        assert region.blind_spots == SPOTS[kind]
        assert len(told) == (SPOTS[kind] != {DMA})
        for warning in told:
            assert warning.category is dirtytrack.BlindSpotWarning
            assert warning.filename == __file__, "at the caller's line"
            text = str(warning.message)
            assert "'mine'" in text
            assert all(spot in text for spot in region.blind_spots)
        told.clear()
        accepted = session.register(memory, blind_spots="accepted")
        with dirtytrack.track(memory, session=session, blind_spots="accepted") as tracker:
            tracker.add(memory, blind_spots="accepted", strict=True)
        assert not told
        assert accepted.blind_spots == SPOTS[kind], "silenced, not forgotten"
        if SPOTS[kind] != {DMA}:
            known = session.regions
            for call in (session.register, lambda m, strict: dirtytrack.track(m, session=session, strict=strict)):
                with pytest.raises(dirtytrack.BlindSpotWarning):
                    call(memory, strict=True)
            assert session.regions == known
            dirtytrack.track(memory, session=session)
            with dirtytrack.track(bytearray(PAGE), session=session) as tracker:
                tracker.add(memory)
            assert [warning.filename for warning in told] == [__file__, __file__]
        else:
            session.register(memory, strict=True)


def store_by_alias(address: int, fd: int) -> None:
    with mmap.mmap(fd, 4 * PAGE) as alias:
        alias[2 * PAGE] = 7


def write_to_descriptor(address: int, fd: int) -> None:
    os.pwrite(fd, b"\7", 2 * PAGE)


def punch_a_hole(address: int, fd: int) -> None:
    madv_remove = 9
    with mmap.mmap(fd, 4 * PAGE) as alias:
        alias.madvise(madv_remove, 2 * PAGE, PAGE)
    oracle.peek_bytes(address + 2 * PAGE, 1)  # and read: the page is there again, armed


def truncate_and_grow(address: int, fd: int) -> None:
    os.ftruncate(fd, 2 * PAGE)
    os.ftruncate(fd, 3 * PAGE)
    os.ftruncate(fd, 4 * PAGE)
    os.pwrite(fd, bytes([1]) * PAGE, 3 * PAGE)  # that page is not in question
    oracle.peek_bytes(address + 2 * PAGE, 2 * PAGE)


def remove_advice(address: int, fd: int) -> None:
    oracle.discard(address + 2 * PAGE, PAGE, 9)
    oracle.peek_bytes(address + 2 * PAGE, 1)


def store_and_forget(address: int, fd: int) -> None:
    """Of a page that was written, and collected: what is discarded is a copy of the file's page."""
    oracle.discard(address + 2 * PAGE, PAGE)
    oracle.peek_bytes(address + 2 * PAGE, 1)


WAYS: dict[tuple[str, str, str], Callable[[int, int], None]] = {
    ("memfd shared", OTHER_WRITERS, "alias"): store_by_alias,
    ("memfd shared", OTHER_WRITERS, "pwrite"): write_to_descriptor,
    ("memfd shared", REREAD, "punched"): punch_a_hole,
    ("memfd shared", REREAD, "removed"): remove_advice,
    ("memfd shared", REREAD, "truncated"): truncate_and_grow,
    ("file shared", OTHER_WRITERS, "alias"): store_by_alias,
    ("file shared", OTHER_WRITERS, "pwrite"): write_to_descriptor,
    ("memfd private", FILE_BENEATH, "alias"): store_by_alias,
    ("memfd private", FILE_BENEATH, "pwrite"): write_to_descriptor,
    ("file private", FILE_BENEATH, "pwrite"): write_to_descriptor,
    ("memfd private", REREAD, "dontneed"): store_and_forget,
    ("file private", REREAD, "dontneed"): store_and_forget,
    ("memfd private", REREAD, "truncated"): truncate_and_grow,
}


@pytest.mark.parametrize(("kind", "spot", "way"), WAYS, ids=" ".join)
def test_a_blind_spot_hides_a_write_and_declaring_it_mends_that(
    session: UffdSession, kind: str, spot: str, way: str, tmp_path: Path
) -> None:
    unseen = WAYS[kind, spot, way]
    with kind_of_memory(kind, tmp_path) as (address, fd):
        region = session.register((address, 4 * PAGE), blind_spots="accepted")
        assert spot in region.blind_spots
        tracker = armed(session)

        def prepare() -> bytes:
            """The page has content, which all know, and is armed."""
            if kind == "file private" and spot == REREAD:
                os.pwrite(fd, b"\1", 2 * PAGE)
            if spot != FILE_BENEATH:
                oracle.poke_bytes(address + 2 * PAGE, b"\5" * PAGE)
            else:
                os.pwrite(fd, b"\1", 2 * PAGE)
                oracle.peek_bytes(address + 2 * PAGE, 1)
            tracker.collect()
            assert not tracker.collect()
            return oracle.peek_bytes(address, 4 * PAGE)

        before = prepare()
        unseen(address, fd)
        found = pages_of(tracker.collect(), region)
        assert oracle.peek_bytes(address, 4 * PAGE) != before, "it was written"
        assert found == [], f"and this is no blind spot any more: take {spot!r} out of region.blind_spots"
        session.mark_dirty((address + 2 * PAGE, 1))
        assert pages_of(tracker.collect(), region) == [2]

        before = prepare()
        with session.in_flight((address + 2 * PAGE, PAGE)):
            assert pages_of(tracker.collect(), region) == [2]
            unseen(address, fd)
        assert pages_of(tracker.collect(), region) == [2]
        assert oracle.peek_bytes(address, 4 * PAGE) != before
        assert not tracker.collect()


def test_every_blind_spot_is_proven() -> None:
    assert {spot for _, spot, _ in WAYS} | {DMA} == frozenset().union(*SPOTS.values())


def test_a_mapping_that_another_userfaultfd_has_is_named(session: UffdSession) -> None:
    memory = dirtytrack.allocate(4 * PAGE, shared=True)
    with mmap.mmap(memory.fileno(), memory.nbytes) as alias, oracle.userfaultfd() as other:
        at = oracle.address_of(alias)
        oracle.register(other, at, at + memory.nbytes)
        region = session.register(memory, blind_spots="accepted")
        assert region.aliases == 0
        assert any("another userfaultfd" in spot for spot in region.blind_spots)
        tracker = armed(session, region)
        alias[PAGE] = 1
        assert not tracker.collect(), "it really is one"


def test_two_sessions_cannot_have_two_mappings_of_one_memory(session: UffdSession) -> None:
    """The first takes them all, since a store through any of them is its region's."""
    memory = dirtytrack.allocate(4 * PAGE, shared=True)
    with mmap.mmap(memory.fileno(), memory.nbytes) as alias, UffdSession() as other:
        other.register(memory, blind_spots="accepted")
        with pytest.raises(dirtytrack.RangeBusy):
            session.register(alias, blind_spots="accepted")
        other.close()
        assert session.register((oracle.address_of(alias), PAGE), blind_spots="accepted").aliases == 1


def test_where_a_mapping_was_another_session_may_have_its_own(session: UffdSession) -> None:
    """The address is used again: nobody takes the other's bits, and what was taken meanwhile is told."""
    memory = dirtytrack.allocate(4 * PAGE, shared=True)
    alias = mmap.mmap(memory.fileno(), memory.nbytes)
    at = oracle.address_of(alias)
    region = session.register(memory, blind_spots="accepted")
    tracker = armed(session, region)
    alias.close()
    oracle.map_at(at, 4 * PAGE)
    with UffdSession() as other:
        theirs = other.register((at, 4 * PAGE))
        listener = DirtyTracker(other, [theirs])
        listener.start()
        oracle.poke_bytes(at + 2 * PAGE, b"x")
        tracker.collect()
        assert 2 in pages_of(listener.collect(), theirs)
        assert region.aliases == 0
        oracle.poke_bytes(at + 3 * PAGE, b"x")
        memory[PAGE] = 1
        assert pages_of(tracker.collect(), region) == [1]
        assert pages_of(listener.collect(), theirs) == [3]
    oracle.unmap(at, 4 * PAGE)


# ---- mark_dirty -----------------------------------------------------------------------------------------------------


def test_a_declared_write_goes_to_every_listener(session: UffdSession) -> None:
    memory = dirtytrack.allocate(16 * PAGE)
    whole, part = session.register(memory), session.register((memory.address + 4 * PAGE, 4 * PAGE))
    first, second = armed(session, whole), armed(session, part)
    view = memoryview(memory)
    declared_before = session.statistics().pages_declared
    calls: tuple[tuple[Any, list[int]], ...] = (
        ((memory.address + 5 * PAGE, 1), [5]),
        (view[6 * PAGE : 6 * PAGE + 1].toreadonly(), [6]),
        (Run(memory.address + 7 * PAGE - 1, memory.address + 7 * PAGE + 1), [6, 7]),
        (part, [4, 5, 6, 7]),
        (memory, list(range(16))),
        ((memory.address - PAGE, 2 * PAGE), [0]),
    )
    for what, pages in calls:
        session.mark_dirty(what)
        assert pages_of(first.peek(), whole) == pages
        assert pages_of(first.collect(), whole) == pages
        assert pages_of(second.collect(), part) == [page - 4 for page in pages if 4 <= page < 8]
        assert not first.collect()
        assert not second.collect()
    assert session.statistics().pages_declared == declared_before + 1 + 1 + 2 + 4 + 16 + 2
    session.mark_dirty(memory)
    dirty = first.collect() - second.collect()
    session.mark_dirty(dirty)
    assert pages_of(first.collect(), whole) == [0, 1, 2, 3, *range(8, 16)], "a set has many ranges"
    session.mark_dirty(bytearray(PAGE))
    assert not first.collect(), "nobody watches that"
    assert not second.collect()


def test_a_declared_write_is_pending_like_any_other(session: UffdSession) -> None:
    memory = dirtytrack.allocate(8 * PAGE)
    region = session.register(memory)
    early = armed(session)
    session.mark_dirty((memory.address, PAGE))
    late = DirtyTracker(session)
    late.start()
    assert not late.collect(), "a start is clean"
    memory[PAGE] = 1
    session.suspend()
    session.mark_dirty((memory.address + 2 * PAGE, PAGE))
    session.resume()
    early.collect()
    late.collect()
    session.mark_dirty((memory.address + 2 * PAGE, PAGE))
    assert pages_of(early.stop(), region) == [2]
    session.mark_dirty((memory.address + 3 * PAGE, PAGE))
    assert pages_of(late.remove(region), region) == [2, 3]


# ---- in_flight ------------------------------------------------------------------------------------------------------


def test_in_flight_memory_is_dirty_in_every_collect_and_once_after(session: UffdSession) -> None:
    memory = dirtytrack.allocate(8 * PAGE)
    region = session.register(memory)
    quick, slow = armed(session), armed(session)
    with session.in_flight((memory.address + 2 * PAGE, PAGE)):
        for _ in range(3):
            assert pages_of(quick.peek(), region) == [2]
            assert pages_of(quick.collect(), region) == [2]
        memory[5 * PAGE] = 1
        assert pages_of(quick.collect(region), region) == [2, 5]
        mirror = bytearray(8 * PAGE)
        assert pages_of(quick.collect_into(mirror), region) == [2]
        assert pages_of(quick.collect(budget_seconds=10), region) == [2]
    assert pages_of(quick.collect(), region) == [2], "once after"
    assert not quick.collect()
    assert pages_of(slow.collect(), region) == [2, 5], "also for who slept through it"
    assert not slow.collect()


def test_flights_nest_and_overlap(session: UffdSession) -> None:
    memory = dirtytrack.allocate(16 * PAGE)
    region = session.register(memory)
    tracker = armed(session)

    def of(first: int, last: int) -> tuple[int, int]:
        return memory.address + first * PAGE, (last - first) * PAGE

    with session.in_flight(of(2, 6)):
        with session.in_flight(of(2, 6)), session.in_flight(of(4, 9)):
            assert pages_of(tracker.collect(), region) == [2, 3, 4, 5, 6, 7, 8]
        assert pages_of(tracker.collect(), region) == [2, 3, 4, 5, 6, 7, 8], "once after"
        assert pages_of(tracker.collect(), region) == [2, 3, 4, 5], "the outer one is open still"
    assert pages_of(tracker.collect(), region) == [2, 3, 4, 5]
    assert not tracker.collect()

    one, other = session.in_flight(of(0, 3)), session.in_flight(of(2, 5))
    with one:
        other.__enter__()
        assert pages_of(tracker.collect(), region) == [0, 1, 2, 3, 4]
    tracker.collect()
    assert pages_of(tracker.collect(), region) == [2, 3, 4], "ends in any order"
    other.__exit__(None, None, None)
    assert pages_of(tracker.collect(), region) == [2, 3, 4]
    assert not tracker.collect()

    with pytest.raises(KeyError), session.in_flight(memoryview(memory)[PAGE : PAGE + 1]):
        raise KeyError
    assert pages_of(tracker.collect(), region) == [1], "an exception ends it too"
    assert not tracker.collect()


flights = st.lists(st.tuples(st.integers(0, 15), st.integers(1, 16)), min_size=1, max_size=5)


@settings(max_examples=60)
@given(flights, st.data())
def test_flights_against_a_model(places: list[tuple[int, int]], data: st.DataObject) -> None:
    memory = dirtytrack.allocate(16 * PAGE)
    with UffdSession() as session:
        region = session.register(memory)
        trackers = [armed(session), armed(session)]
        pending: list[set[int]] = [set(), set()]
        closed = [(first, min(16, first + count)) for first, count in places]
        flying: list[tuple[tuple[int, int], Any]] = []
        for _ in range(data.draw(st.integers(1, 12))):
            step = data.draw(st.sampled_from(("begin", "end", "collect", "collect")))
            if step == "begin":
                first, last = data.draw(st.sampled_from(closed))
                flight = session.in_flight((memory.address + first * PAGE, (last - first) * PAGE))
                flight.__enter__()
                flying.append(((first, last), flight))
            elif step == "end" and flying:
                (first, last), flight = flying.pop(data.draw(st.integers(0, len(flying) - 1)))
                flight.__exit__(None, None, None)
                for owed in pending:
                    owed.update(range(first, last))
            elif step == "collect":
                i = data.draw(st.integers(0, 1))
                wanted = pending[i].union(*(range(*place) for place, _ in flying))
                assert pages_of(trackers[i].collect(), region) == sorted(wanted)
                pending[i] = set()


def test_who_comes_and_goes_during_a_flight(session: UffdSession) -> None:
    memory = dirtytrack.allocate(4 * PAGE)
    region = session.register(memory)
    leaves, stops = armed(session), armed(session)
    with session.in_flight((memory.address + PAGE, PAGE)):
        comes = DirtyTracker(session)
        comes.start()
        assert pages_of(comes.collect(), region) == [1]
        added = DirtyTracker(session, [])
        added.start()
        added.add(region)
        assert pages_of(added.collect(), region) == [0, 1, 2, 3]
        assert pages_of(added.collect(), region) == [1]
        leaves.collect()
        assert pages_of(leaves.remove(region), region) == [1], "final sets have it"
        stops.collect()
        assert pages_of(stops.stop(), region) == [1]
    for tracker in (comes, added):
        assert pages_of(tracker.collect(), region) == [1]
        assert not tracker.collect()


def test_a_flight_holds_its_buffer_and_may_outlive_its_session() -> None:
    buffer = bytearray(PAGE)
    session = UffdSession()
    flight = session.in_flight(buffer)
    assert not is_resizable(buffer)
    with flight:
        session.close()
    with pytest.raises(dirtytrack.SessionClosed):
        flight.__enter__()
    del flight
    assert is_resizable(buffer)


# ---- DMA, the real one ----------------------------------------------------------------------------------------------


class Alias:
    """Where io_uring is forbidden: the same, by another mapping of the memory."""

    def __init__(self, memory: dirtytrack.Memory) -> None:
        self._alias = mmap.mmap(memory.fileno(), memory.nbytes)
        self._address = memory.address

    def submit(self, fd: int, address: int, nbytes: int) -> None:
        self._wanted = fd, address - self._address, nbytes

    def wait(self) -> int:
        fd, offset, nbytes = self._wanted
        self._alias[offset : offset + nbytes] = os.read(fd, nbytes)
        return nbytes

    def close(self) -> None:
        self._alias.close()


def test_dma_is_a_blind_spot_and_in_flight_mends_it(session: UffdSession) -> None:
    memory = dirtytrack.allocate(4 * PAGE, shared=True)
    memory[:] = bytes([1]) * 4 * PAGE
    region = session.register(memory, blind_spots="accepted")
    assert DMA in region.blind_spots
    device: Ring | Alias
    try:
        device = Ring((memory.address, memory.nbytes))
    except OSError:
        device = Alias(memory)
    source, sink = os.pipe()
    tracker = armed(session)
    device.submit(source, memory.address + 2 * PAGE + 10, 5)
    os.write(sink, b"first")
    assert device.wait() == 5
    assert memory[2 * PAGE + 10 : 2 * PAGE + 15] == b"first"
    assert not tracker.collect(), "unseen"
    mirror = bytearray(memory)
    with session.in_flight((memory.address + 2 * PAGE, PAGE)):
        device.submit(source, memory.address + 2 * PAGE + 10, 5)
        assert pages_of(tracker.collect_into(mirror), region) == [2]
        os.write(sink, b"later")
        assert device.wait() == 5
    assert pages_of(tracker.collect_into(mirror), region) == [2]
    assert mirror == memory[:]
    assert not tracker.collect()
    device.close()
    os.close(source)
    os.close(sink)

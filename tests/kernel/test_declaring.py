# SPDX-License-Identifier: MIT
"""Writes that the program declares: `mark_dirty` and `in_flight` towards every listener, and DMA for real, by io_uring.

That such writes are unseen otherwise is in test_blind_spots.py. Takes about 1 s of CI's 20 min.
"""

from __future__ import annotations

import mmap
import os
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dirtytrack
from dirtytrack import DirtyTracker, Run, UffdSession
from tests.kernel.listening import armed, is_resizable, pages_of
from tests.kernel.ring import Ring
from tests.oracle import PAGE

DMA = "DMA in flight"


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

# SPDX-License-Identifier: MIT
"""Memory that goes away, moves, or is replaced beneath a region that nobody could pin: told or dirty, never skipped.

Each test maps memory itself, and takes part of it away with the system calls behind the library's back. Takes under
1 s of CI's 20 min.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dirtytrack
from dirtytrack import DirtySet, DirtyTracker, Memory, Region, RegionGone, Session
from tests import oracle
from tests.kernel.backends import session_of
from tests.oracle import PAGE

PAGES = 8


@pytest.fixture
def session(backend: str) -> Iterator[Session]:
    with session_of(backend) as made:
        yield made


@pytest.fixture
def stays() -> Memory:
    return dirtytrack.allocate(4 * PAGE, name="stays")


@pytest.fixture
def address() -> Iterator[int]:
    """Of raw memory in the middle of a mapping, so that no neighbour may be joined to it; its pages are written."""
    with oracle.mapped((PAGES + 2) * PAGE) as outer:
        oracle.protect(outer, PAGE, mmap.PROT_READ)
        oracle.protect(outer + (PAGES + 1) * PAGE, PAGE, mmap.PROT_READ)
        write(outer + PAGE, *range(PAGES))
        yield outer + PAGE


def write(address: int, *pages: int) -> None:
    for page in pages:
        at = address + page * PAGE
        oracle.poke_bytes(at, bytes([(oracle.peek_bytes(at, 1)[0] + 1) % 256]))


def armed(session: Session, *regions: Region) -> DirtyTracker:
    tracker = DirtyTracker(session, regions or None)
    tracker.start()
    return tracker


def pages_of(dirty: DirtySet, region: Region) -> set[int]:
    return set(dirty.pages(region))


def told(tracker: DirtyTracker, region: Region, first: int, last: int) -> None:
    """Its next collect tells that these pages of the region are gone."""
    epoch = tracker.epoch
    with pytest.raises(RegionGone) as caught:
        tracker.collect()
    assert caught.value.region is region
    assert (caught.value.start, caught.value.end) == (region.start + first * PAGE, region.start + last * PAGE)
    assert isinstance(caught.value, OSError)
    assert region.name in str(caught.value)
    assert tracker.epoch == epoch, "nothing was handed out"


def registered(start: int, end: int) -> set[int]:
    """Nothing, where the kernel could not register it either."""
    if not dirtytrack.probe().tracking:
        return set()
    return {page for page, bits in enumerate(oracle.categories(start, end)) if bits & oracle.WPALLOWED}


# ---- gone -----------------------------------------------------------------------------------------------------------

HOLES = [(0, 8), (0, 3), (3, 5), (5, 8), (7, 8)]


@pytest.mark.parametrize(("first", "last"), HOLES)
def test_told_before_anything_is_handed_out_and_once_per_listener(
    session: Session, address: int, stays: Memory, first: int, last: int
) -> None:
    kept, raw = session.register(stays), session.register((address, PAGES * PAGE), name="raw")
    one, two, unconcerned = armed(session), armed(session), armed(session, kept)
    write(address, 1, 4, 6)
    stays[2 * PAGE] = 1
    assert one.peek().page_count == 4
    oracle.unmap(address + first * PAGE, (last - first) * PAGE)
    assert pages_of(unconcerned.collect(), kept) == {2}, "who does not watch it is not told"
    there = {1, 4, 6} - set(range(first, last))
    for tracker in (one, two):
        told(tracker, raw, first, last)
        assert pages_of(tracker.peek(), kept) == {2}
        assert pages_of(tracker.peek(), raw) >= there
        dirty = tracker.collect()
        assert pages_of(dirty, kept) == {2}, "what was found stayed pending"
        assert pages_of(dirty, raw) >= there
        assert not tracker.collect(), "told once"
        rest = sorted(set(range(PAGES)) - set(range(first, last)))
        write(address, *rest)
        assert pages_of(tracker.collect(), raw) == set(rest), "what is left is watched on"
    with pytest.raises(RegionGone):
        armed(session)  # a listener that comes later is told at once


def test_holes_among_many_regions_are_told_from_holes_between_them(session: Session) -> None:
    """All of them are looked at by one system call, as long as what lies between them is mapped."""
    with oracle.mapped(40 * PAGE) as base:
        regions = [session.register((base + 4 * i * PAGE, 2 * PAGE), name=f"r{i}") for i in range(10)]
        tracker = armed(session)
        assert not tracker.collect()
        oracle.unmap(base + 14 * PAGE, PAGE)  # between r3 and r4
        write(base, 0, 16)
        assert pages_of(tracker.collect(), regions[0]) == {0}
        write(base, 12, 16)
        dirty = tracker.collect()
        assert [region.name for region in regions if pages_of(dirty, region)] == ["r3", "r4"]
        oracle.unmap(base + 25 * PAGE, 2 * PAGE)  # the end of r6, and what follows it
        write(base, 24, 28)
        told(tracker, regions[6], 1, 2)
        dirty = tracker.collect()
        assert pages_of(dirty, regions[6]) == pages_of(dirty, regions[7]) == {0}
        assert not tracker.collect(), "told once"
        oracle.unmap(base, 8 * PAGE)  # two at once
        told(tracker, regions[0], 0, 2)
        told(tracker, regions[1], 0, 2)
        write(base, 36)
        assert pages_of(tracker.collect(), regions[9]) == {0}


TAKES: dict[str, Callable[[DirtyTracker, dict[Region, bytearray]], object]] = {
    "collect": lambda tracker, _: tracker.collect(),
    "collect the region": lambda tracker, mirrors: tracker.collect(list(mirrors)[1]),
    "collect on a budget": lambda tracker, _: tracker.collect(budget_seconds=0),
    "collect_into": lambda tracker, mirrors: tracker.collect_into(mirrors),
    "collect the region into": lambda tracker, mirrors: tracker.collect_into(mirrors, list(mirrors)[1]),
    "stop": lambda tracker, _: tracker.stop(),
}


@pytest.mark.parametrize("take", TAKES)
def test_whichever_call_tells_it_all_stays_pending_until_the_region_is_removed(
    session: Session, address: int, stays: Memory, take: str
) -> None:
    kept, raw = session.register(stays), session.register((address, PAGES * PAGE))
    mirrors = {kept: bytearray(kept.nbytes), raw: bytearray(raw.nbytes)}
    tracker = armed(session)
    tracker.collect()
    write(address, 1, 6)
    stays[PAGE] = 1
    oracle.unmap(address + 3 * PAGE, 2 * PAGE)
    assert pages_of(tracker.peek(), raw) == {1, 6}, "a peek tells nothing"
    with pytest.raises(RegionGone) as caught:
        TAKES[take](tracker, mirrors)
    assert caught.value.region is raw
    assert not any(map(any, mirrors.values())), "nothing was copied"
    assert tracker.epoch == 2
    final = tracker.remove(raw)
    assert pages_of(final, raw) >= {1, 6}
    session.unregister(raw)
    assert registered(address, address + PAGES * PAGE) == set(), "what remained of it was let go of"
    assert tracker.regions == (kept,)
    assert pages_of(tracker.collect(), kept) == {1}
    stays[3 * PAGE] = 1
    assert pages_of(tracker.stop(), kept) == {3}


def test_another_region_collected_alone_is_not_held_up(session: Session, address: int, stays: Memory) -> None:
    kept, raw = session.register(stays), session.register((address, PAGES * PAGE))
    tracker = armed(session)
    stays[PAGE] = 1
    oracle.unmap(address, PAGE)
    assert pages_of(tracker.collect(kept), kept) == {1}
    told(tracker, raw, 0, 1)


def test_remove_needs_no_warning_first(session: Session, address: int, stays: Memory) -> None:
    kept, raw = session.register(stays), session.register((address, PAGES * PAGE))
    tracker = armed(session)
    write(address, 1, 6)
    oracle.unmap(address + 2 * PAGE, PAGE)
    assert pages_of(tracker.remove(raw), raw) >= {1, 6}
    assert not tracker.collect()
    assert tracker.regions == (kept,)


def test_what_remains_can_be_registered_again_and_is_wholly_dirty(session: Session, address: int) -> None:
    raw = session.register((address, PAGES * PAGE), name="raw")
    tracker = armed(session)
    oracle.unmap(address + 4 * PAGE, 4 * PAGE)
    told(tracker, raw, 4, 8)
    tracker.remove(raw)
    session.unregister(raw)
    rest = tracker.add((address, 4 * PAGE), name="raw")
    assert pages_of(tracker.collect("raw"), rest) == {0, 1, 2, 3}
    write(address, 2)
    assert pages_of(tracker.collect(), rest) == {2}


def test_a_hole_that_grows_is_told_again(session: Session, address: int) -> None:
    raw = session.register((address, PAGES * PAGE))
    tracker = armed(session)
    oracle.unmap(address + 5 * PAGE, PAGE)
    told(tracker, raw, 5, 6)
    tracker.collect()
    oracle.unmap(address + 2 * PAGE, PAGE)
    told(tracker, raw, 2, 3)
    tracker.collect()
    write(address, 0, 4, 7)
    assert pages_of(tracker.collect(), raw) == {0, 4, 7}


def test_each_region_of_a_hole_is_told_once(session: Session, address: int) -> None:
    low = session.register((address, 6 * PAGE), name="low")
    high = session.register((address + 3 * PAGE, 5 * PAGE), name="high")
    tracker = armed(session)
    oracle.unmap(address + 4 * PAGE, PAGE)
    gone = []
    for _ in range(2):
        with pytest.raises(RegionGone) as caught:
            tracker.collect()
        assert (caught.value.start, caught.value.end) == (address + 4 * PAGE, address + 5 * PAGE)
        gone.append(caught.value.region)
    assert set(gone) == {low, high}
    write(address, 3)
    dirty = tracker.collect()
    assert 3 in pages_of(dirty, low)
    assert 0 in pages_of(dirty, high)


def test_memory_that_was_moved_is_gone_from_where_it_was(session: Session, address: int) -> None:
    raw = session.register((address, PAGES * PAGE))
    tracker = armed(session)
    write(address, 1)
    moved = oracle.move(address + 4 * PAGE, 4 * PAGE)
    try:
        write(moved, 0)
        told(tracker, raw, 4, 8)
        assert 1 in pages_of(tracker.collect(), raw)
        new = tracker.add((moved, 4 * PAGE))
        assert pages_of(tracker.collect(), new) == {0, 1, 2, 3}
        write(moved, 3)
        assert pages_of(tracker.collect(), new) == {3}
    finally:
        oracle.unmap(moved, 4 * PAGE)


def test_memory_that_went_while_suspended(session: Session, address: int, stays: Memory) -> None:
    kept, raw = session.register(stays), session.register((address, PAGES * PAGE))
    tracker = armed(session)
    session.suspend()
    oracle.unmap(address + 2 * PAGE, PAGE)
    session.resume()
    told(tracker, raw, 2, 3)
    dirty = tracker.collect()
    assert pages_of(dirty, kept) == {0, 1, 2, 3}
    assert pages_of(dirty, raw) >= {0, 1, 3, 4, 5, 6, 7}
    write(address, 0, 7)
    assert pages_of(tracker.collect(), raw) == {0, 7}


# ---- leaving the `with` ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_told", [False, True])
def test_leaving_a_with_after_memory_went_away(
    session: Session, address: int, stays: Memory, is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    memories: dict[str, Memory | tuple[int, int]] = {
        "raw": (address, PAGES * PAGE),
        "stays": stays,
        "more": (address + PAGE, 2 * PAGE),
    }
    with dirtytrack.track(memories, session=session) as tracker:
        oracle.unmap(address + 2 * PAGE, PAGE)
        while is_told:
            try:
                tracker.collect()
            except RegionGone:
                continue
            break
    assert not tracker.epoch
    assert session.regions == ()
    assert registered(address, address + PAGES * PAGE) == set()
    assert len([one for one in caplog.records if one.levelname == "WARNING"]) == (0 if is_told else 2)
    with dirtytrack.track(stays, session=session) as again:
        stays[0] = 1
        assert again.collect().page_count == 1


def test_leaving_a_with_that_is_left_by_the_telling(session: Session, address: int) -> None:
    tracker = dirtytrack.track((address, PAGES * PAGE), session=session)
    with pytest.raises(RegionGone) as caught, tracker:
        oracle.unmap(address, PAGES * PAGE)
        tracker.collect()
    assert caught.value.region is not None
    assert not tracker.epoch
    assert session.regions == ()


def test_closing_a_session_whose_memory_went_away(backend: str, address: int) -> None:
    with session_of(backend) as session:
        session.register((address, PAGES * PAGE))
        armed(session)
        oracle.unmap(address, 2 * PAGE)
    assert registered(address, address + PAGES * PAGE) == set()


# ---- replaced -------------------------------------------------------------------------------------------------------


def memfd_of(nbytes: int) -> int:
    fd = os.memfd_create("replacement")
    os.ftruncate(fd, nbytes)
    return fd


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("first", "last"), HOLES)
def test_memory_that_was_replaced_is_wholly_dirty_and_no_error(
    session: Session, address: int, first: int, last: int, shared: bool
) -> None:
    raw = session.register((address, PAGES * PAGE))
    one, two = armed(session), armed(session)
    assert one.collect().page_count == 0
    write(address, 1)
    replaced = set(range(first, last))
    fd = memfd_of((last - first) * PAGE) if shared else -1
    oracle.map_at(address + first * PAGE, (last - first) * PAGE, fd=fd)
    assert pages_of(one.peek(), raw) >= replaced | {1}
    for tracker in (one, two):
        assert pages_of(tracker.collect(), raw) == replaced | {1}
        assert not tracker.collect()
    if session.backend == "kernel":  # others have nothing to register again
        assert registered(raw.start, raw.end) == set(range(PAGES))
        assert session.statistics().mappings_renewed >= 1
    for page in range(PAGES):
        write(address, page)
        assert pages_of(one.collect(), raw) == {page}
    assert pages_of(two.collect(), raw) == set(range(PAGES))
    if shared:
        os.close(fd)


def test_replaced_and_gone_in_one_go(session: Session, address: int) -> None:
    raw = session.register((address, PAGES * PAGE))
    tracker = armed(session)
    oracle.map_at(address + PAGE, PAGE)
    oracle.unmap(address + 4 * PAGE, PAGE)
    told(tracker, raw, 4, 5)
    assert 1 in pages_of(tracker.collect(), raw)
    write(address, 1, 7)
    assert pages_of(tracker.collect(), raw) == {1, 7}


def test_gone_then_back_then_gone(session: Session, address: int) -> None:
    raw = session.register((address, PAGES * PAGE))
    tracker, other = armed(session), armed(session)
    for _ in range(2):
        oracle.unmap(address + 2 * PAGE, 2 * PAGE)
        told(tracker, raw, 2, 4)
        tracker.collect()
        oracle.map_at(address + 2 * PAGE, 2 * PAGE)
        assert pages_of(tracker.collect(), raw) == {2, 3}, "memory is there again, and nobody knows its past"
        write(address, 3, 6)
        assert pages_of(tracker.collect(), raw) == {3, 6}
    assert pages_of(other.collect(), raw) == {2, 3, 6}, "who slept meanwhile finds nothing gone"


def test_moved_and_replaced(session: Session, address: int) -> None:
    raw = session.register((address, PAGES * PAGE))
    tracker = armed(session)
    moved = oracle.move(address + 2 * PAGE, 2 * PAGE)
    oracle.map_at(address + 2 * PAGE, 2 * PAGE)
    try:
        write(moved, 0)
        assert pages_of(tracker.collect(), raw) == {2, 3}
    finally:
        oracle.unmap(moved, 2 * PAGE)
    assert pages_of(tracker.collect(), raw) == set()


def test_replaced_by_what_cannot_be_registered_is_dirty_in_every_collect(
    session: Session, address: int, tmp_path: Path
) -> None:
    raw = session.register((address, PAGES * PAGE))
    tracker = armed(session)
    path = tmp_path / "read-only"
    path.write_bytes(bytes(PAGE))
    fd = os.open(path, os.O_RDONLY)
    assert oracle._libc.mmap(address + 2 * PAGE, PAGE, mmap.PROT_READ, mmap.MAP_SHARED | 0x10, fd, 0) > 0
    os.close(fd)
    for page in (0, 5, 7):
        write(address, page)
        replaced = {2} if session.backend == "kernel" or page == 0 else set()  # who compares knows it from then on
        assert pages_of(tracker.collect(), raw) >= replaced | {page}

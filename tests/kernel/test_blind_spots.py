# SPDX-License-Identifier: MIT
"""What no page table sees: each blind spot of each kind of memory really is one, and declaring such writes mends it.

`BlindSpotWarning` once a registration, at the caller's line. `mark_dirty` and `in_flight` are in test_declaring.py.
Takes about 1 s of CI's 20 min.
"""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import dirtytrack
from dirtytrack import DirtyTracker, UffdSession
from tests import oracle
from tests.kernel.listening import armed, pages_of
from tests.oracle import PAGE

DMA = "DMA in flight"
OTHER_WRITERS = "writes through a descriptor, another process, or a mapping made after the registration"
FILE_BENEATH = "the file changing beneath pages that were never written"
REREAD = "pages discarded and there again, by a read or in a large folio, before the next collect"


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

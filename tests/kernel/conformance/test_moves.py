# SPDX-License-Identifier: MIT
"""Forks, and mappings that move, grow, go away and are replaced, on every kind of memory.

What a session promises of a region whose mapping changed is proven, on private memory, by test_contract_gone.py. Here:
that it holds on every kind, and what of it the kernel itself says. Takes about 1 s of CI's 20 min.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import dirtytrack
from dirtytrack import PageCategory, Pagemap, ScanFlag
from tests import oracle
from tests.kernel.kinds import KINDS, Area, Kind, some
from tests.kernel.watched import EXACT, Bare, Watched
from tests.oracle import PAGE

MAYMOVE, DONTUNMAP = 1, 4
CHECK = {**EXACT, "flags": ScanFlag.CHECK_WPASYNC}

on_every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
movable = pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.kept], ids=str)


# ---- forks ----------------------------------------------------------------------------------------------------------


class Forked:
    """A child that lives until it is told to end, or does one thing and ends."""

    def __init__(self, what: Callable[[], object] | None = None) -> None:
        read, self._write = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            os.close(self._write)
            with suppress(BaseException):
                if what is not None:
                    what()
                os.read(read, 1)
            os._exit(0)
        os.close(read)

    def end(self) -> None:
        os.close(self._write)
        assert os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1]) == 0


@on_every_kind
def test_a_fork_neither_disarms_nor_dirties_the_parent(watched: Watched) -> None:
    watched.area.store(1, b"\x11")
    Forked().end()
    watched.area.store(2, b"\x22")
    assert watched.collect() == {1, 2}
    Forked().end()
    assert watched.collect() == set()
    watched.area.store(3, b"\x33")
    assert watched.collect() == {3}, "wp is kept in the parent"


@on_every_kind
def test_stores_of_the_parent_while_a_child_lives(watched: Watched) -> None:
    area = watched.area
    child = Forked()
    for number in range(3):
        area.store(number, b"\x44")
        assert watched.collect() == {number}
        area.store(number, b"\x45")
        assert watched.collect() == {number}, "copied for the child, and armed again"
    child.end()
    assert watched.collect() == set()
    area.store(0, b"\x46")
    assert watched.collect() == {0}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.shared], ids=str)
def test_stores_of_a_child_to_its_own_copy_are_not_the_parents(watched: Watched) -> None:
    area = watched.area
    child = Forked(lambda: area.fill(9, range(4)))
    area.store(5)
    assert watched.collect() == {5}
    child.end()
    assert watched.collect() == set()
    assert area.load(1) == b"\x03"
    area.store(1)
    assert watched.collect() == {1}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_child_is_not_tracked(bare: Bare) -> None:
    """Its mappings are not registered, and hold no protection: that nothing was written there, nobody can say."""
    area = bare.area
    area.fill(1)
    bare.take()
    child = Forked(lambda: area.load(1))
    with Pagemap(child._pid) as pagemap, pytest.raises(dirtytrack.NotRegistered):
        pagemap.scan(area.address, area.end, **CHECK)
    child.end()


# ---- moved ----------------------------------------------------------------------------------------------------------


@movable
def test_memory_that_moved_is_gone_from_where_it_was_and_unarmed_where_it_is(kind: Kind, area: Area) -> None:
    area.fill(3)
    with Watched(area, compare=False) as watched, Pagemap() as pagemap:
        to = oracle.free_place(area.nbytes)
        at = oracle.remap(area.address, area.nbytes, area.nbytes, MAYMOVE | 2, to)
        assert at == to
        moved = Area(at, area.nbytes, area.granule, area.fd)
        with pytest.raises(dirtytrack.NotRegistered):
            pagemap.scan(moved.address, moved.end, **CHECK)
        with pytest.raises(dirtytrack.RegionGone):
            watched.tracker.collect()
        region = watched.tracker.add(moved.memory, blind_spots="accepted")
        watched.tracker.remove(watched.region)
        assert moved.of_runs(watched.tracker.collect(region)) == set(range(moved.units)), "nobody knows its past"
        moved.store(2)
        assert moved.of_runs(watched.tracker.collect()) == {2}
        oracle.remap(moved.address, moved.nbytes, moved.nbytes, MAYMOVE | 2, area.address)


@pytest.mark.parametrize("kind", some("private anonymous", "shared anonymous", "memfd shared"), ids=str)
def test_memory_that_moved_and_left_its_old_mapping_in_place(kind: Kind, area: Area) -> None:
    """MREMAP_DONTUNMAP: the old range stays registered, empty and written; the new one is registered by nobody."""
    area.fill(3)
    with Bare(area) as bare:
        assert bare.take() == set()
        at = oracle.remap(area.address, area.nbytes, area.nbytes, MAYMOVE | DONTUNMAP)
        assert bare.take() == set(range(area.units))
        with pytest.raises(dirtytrack.NotRegistered):
            bare.pagemap.scan(at, at + area.nbytes, **CHECK)
        oracle.unmap(at, area.nbytes)
        area.fill(3)
    with Watched(area) as watched:
        at = oracle.remap(area.address, area.nbytes, area.nbytes, MAYMOVE | DONTUNMAP)
        assert watched.collect() == set(range(area.units))
        oracle.unmap(at, area.nbytes)
        area.store(2)
        assert watched.collect() == {2}


# ---- grown ----------------------------------------------------------------------------------------------------------


def test_memory_that_grew_in_place() -> None:
    """The mapping is one, and registered; what is new of it counts as written."""
    with oracle.apart(16 * PAGE) as at, oracle.userfaultfd() as uffd, Pagemap() as pagemap:
        oracle.unmap(at + 8 * PAGE, 8 * PAGE)
        area = Area(at, 8 * PAGE, PAGE)
        area.fill(1)
        oracle.register(uffd, area.address, area.end)
        oracle.arm(uffd, area.address, area.end)
        assert oracle.remap(at, 8 * PAGE, 12 * PAGE, 0) == at
        area.store(1)
        scan = pagemap.scan(at, at + 12 * PAGE, **CHECK)
        assert area.of_runs(scan) == {1, 8, 9, 10, 11}


@pytest.mark.parametrize("kind", some("private anonymous", "shared anonymous"), ids=str)
def test_memory_that_moved_in_order_to_grow(kind: Kind, area: Area) -> None:
    area.fill(1)
    with Watched(area, compare=False) as watched, Pagemap() as pagemap:
        oracle.map_at(area.end, PAGE)  # in the way
        at = oracle.remap(area.address, area.nbytes, 2 * area.nbytes)
        assert at != area.address
        with pytest.raises(dirtytrack.NotRegistered):
            pagemap.scan(at, at + 2 * area.nbytes, **CHECK)
        with pytest.raises(dirtytrack.RegionGone):
            watched.tracker.collect()
        oracle.unmap(at, 2 * area.nbytes)
        oracle.unmap(area.end, PAGE)


def test_the_heap_that_grew() -> None:
    """By brk: what is new joins no registered mapping."""
    [heap] = some("brk heap")
    sbrk = ctypes.CDLL(None).sbrk
    sbrk.restype, sbrk.argtypes = ctypes.c_void_p, [ctypes.c_long]
    with heap.map(1, Path()):
        pass
    last = -(-sbrk(4 * PAGE) // PAGE) * PAGE + 2 * PAGE  # the last whole page of it, ours for good
    with oracle.userfaultfd() as uffd, Pagemap() as pagemap:
        oracle.register(uffd, last, last + PAGE)
        oracle.arm(uffd, last, last + PAGE)
        sbrk(4 * PAGE)
        assert len(pagemap.scan(last, last + PAGE, **CHECK)) == 0
        with pytest.raises(dirtytrack.NotRegistered):
            pagemap.scan(last, last + 3 * PAGE, **CHECK)


def test_a_stack_that_grew_downwards() -> None:
    """MAP_GROWSDOWN: the mapping itself grows, and with it what is registered."""
    map_growsdown = 0x100
    guard = 512 * PAGE  # the kernel keeps a gap of 256 pages beneath it
    with oracle.apart(guard + 8 * PAGE) as reserved, oracle.userfaultfd() as uffd, Pagemap() as pagemap:
        oracle.unmap(reserved, guard)
        low, end = reserved + guard, reserved + guard + 8 * PAGE
        oracle.map_at(low, 8 * PAGE, extra=map_growsdown)
        oracle.poke_bytes(low, bytes(8 * PAGE))
        oracle.register(uffd, low, end)
        oracle.arm(uffd, low, end)
        oracle.poke_bytes(low - PAGE, b"\1")
        found = list(pagemap.scan(low - PAGE, end, **CHECK))
        assert found == [(low - PAGE, low, PageCategory.WRITTEN)]
        oracle.unmap(low - PAGE, PAGE)


# ---- gone, replaced, beside -----------------------------------------------------------------------------------------


@movable
def test_half_of_it_went_away(kind: Kind, area: Area) -> None:
    area.fill(3)
    half = area.units // 2
    with Watched(area, compare=False) as watched:
        area.store(1)
        oracle.unmap(area.at(half), area.end - area.at(half))
        with pytest.raises(dirtytrack.RegionGone) as caught:
            watched.tracker.collect()
        assert caught.value.region is watched.region
        assert 1 in watched.collect(), "found pages stay pending"
        area.store(2)
        rest = watched.session.register((area.address, half * area.granule), blind_spots="accepted")
        watched.tracker.add(rest)
        final = area.of_runs(watched.tracker.remove(watched.region))
        assert 2 in final | area.of_runs(watched.tracker.collect())
        area.store(3)
        assert area.of_runs(watched.tracker.collect()) == {3}
        oracle.map_at(area.at(half), area.end - area.at(half))


@movable
def test_another_mapping_in_its_place_is_wholly_dirty(kind: Kind, area: Area) -> None:
    area.fill(3)
    with Watched(area, compare=False) as watched:
        oracle.map_at(area.address, area.nbytes)
        assert watched.collect() == set(range(area.units))
        area.store(2)
        assert watched.collect() == {2}, "and watched"
        if area.granule == PAGE:
            oracle.map_at(area.at(3), 2 * PAGE)
            assert watched.collect() >= {3, 4}
            area.store(3)
            area.store(6)
            assert watched.collect() == {3, 6}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.kept], ids=str)
def test_what_is_mapped_beside_it_is_not_registered(bare: Bare) -> None:
    """Whether the kernel joins the two mappings or not."""
    area = bare.area
    oracle.unmap(area.at(4), area.end - area.at(4))
    oracle.map_at(area.at(4), area.end - area.at(4))
    area.store(5)
    with pytest.raises(dirtytrack.NotRegistered):
        bare.pagemap.scan(area.at(3), area.end, **CHECK)
    assert len(bare.pagemap.scan(area.address, area.at(4), **CHECK)) == 0


# ---- registered anew ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_registered_again_nothing_changes_and_unregistered_all_is_forgotten(area: Area) -> None:
    area.fill(1)
    everything = set(range(area.units))
    with oracle.userfaultfd() as uffd:
        oracle.register(uffd, area.address, area.end)
        oracle.arm(uffd, area.address, area.end)
        oracle.register(uffd, area.address, area.end)
        assert area.of_pages(oracle.exact(area.address, area.end)) == set(), "a second time: a no-op"
        area.store(1)
        oracle.disarm(uffd, area.at(4), area.at(5))
        assert area.of_pages(oracle.exact(area.address, area.end)) == {1, 4}, "EXTRA: disarmed counts as written"
        oracle.unregister(uffd, area.address, area.end)
        oracle.register(uffd, area.address, area.end)
        assert area.of_pages(oracle.exact(area.address, area.end)) == everything, "EXTRA"
        assert area.of_pages(oracle.exact(area.address, area.end)) == set()
    with pytest.raises(PermissionError):
        oracle.exact(area.address, area.end)  # closed: unregistered
    with oracle.userfaultfd() as uffd:
        oracle.register(uffd, area.address, area.end)
        assert area.of_pages(oracle.exact(area.address, area.end)) == everything


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_forgetting_references_is_no_write(bare: Bare) -> None:
    """/proc/self/clear_refs: 1 forgets what was used lately, 4 the soft-dirty bits, which are other bits."""
    area = bare.area
    area.fill(1)
    bare.take()
    area.store(1)
    for what in ("1", "4"):
        Path("/proc/self/clear_refs").write_text(what)
    assert bare.take() == {1}
    Path("/proc/self/clear_refs").write_text("4")
    assert bare.take() == set()

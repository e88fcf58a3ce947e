# SPDX-License-Identifier: MIT
"""Swap, compaction and merging beneath a tracker: pages leave, move and become one, and no written one is lost.

The machine is really made to: a swap file in use, memory compacted until pages have moved, equal pages merged. All is
put back. Takes about 2 s of CI's 20 min.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dirtytrack.pagemap import swapped
from tests import oracle
from tests.kernel import pressure
from tests.kernel.kinds import KINDS, Area, Kind, some
from tests.kernel.watched import Bare, Watched
from tests.oracle import PAGE

SWAPPABLE = [
    kind for kind in KINDS if kind.backing in ("anonymous", "shmem") and kind.name != "transparent huge shared"
]
swappable = pytest.mark.parametrize("kind", SWAPPABLE, ids=str)
[ANONYMOUS] = some("private anonymous")


@pytest.fixture(autouse=True)
def _one_processor() -> Iterator[None]:
    """Pages wait for a while on the processor that first touched them, out of reach of what another one swaps out."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


@pytest.fixture(scope="module")
def swap_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pressure.swap(tmp_path_factory.mktemp("swap")) as path:
        yield path


# ---- swap -----------------------------------------------------------------------------------------------------------


def assert_dirty(kind: Kind, found: set[int], wanted: set[int]) -> None:
    """Of memory of a file, a page that is in swap looks like one that was discarded: it may be reported beside."""
    may_be_more = kind.private_file or kind.shared
    assert found >= wanted if may_be_more else found == wanted


@swappable
def test_armed_pages_go_out_and_come_in_armed(kind: Kind, watched: Watched, swap_file: Path) -> None:
    area = watched.area
    pressure.swap_out(area, range(area.units))
    assert pressure.swapped_bytes(area) > 0, "they are really out"
    assert_dirty(kind, watched.peek(), set())
    assert area.load(1) == b"\x03", "in again, by reading"
    assert_dirty(kind, watched.collect(), set())
    area.store(1)
    assert watched.collect() == {1}
    pressure.swap_out(area, range(area.units))
    area.store(2)
    assert_dirty(kind, watched.collect(), {2})
    area.store(3)
    assert watched.collect() == {3}


@swappable
def test_dirty_pages_that_went_out_are_dirty(kind: Kind, watched: Watched, swap_file: Path) -> None:
    area = watched.area
    dirty = {1, 2, 5}
    for round_ in range(2):
        for unit in dirty:
            area.store(unit, bytes([90 + round_]))
        pressure.swap_out(area, range(area.units))
        assert pressure.swapped_bytes(area) > 0
        assert_dirty(kind, watched.peek(), dirty)
        assert_dirty(kind, watched.collect(), dirty)
        assert watched.collect() == set(), "and armed where they are"
    assert area.load(5) == b"\x5b"


@swappable
def test_swap_is_put_off_beneath_a_tracker(kind: Kind, area: Area, tmp_path: Path) -> None:
    area.fill(3)
    with Watched(area) as watched, pressure.swap(tmp_path, 1024, priority=2000) as path:
        area.store(1)
        pressure.swap_out(area, range(area.units))
        assert_dirty(kind, watched.area.of_runs(watched.tracker.collect()), {1})
        pressure.swap_out(area, range(area.units))
        area.store(2)
        pressure.swap_out(area, range(area.units))
        pressure.swap_off(path)
        assert pressure.swapped_bytes(area) == 0
        assert_dirty(kind, watched.area.of_runs(watched.tracker.collect()), {2})
        area.store(4)
        assert watched.area.of_runs(watched.tracker.collect()) == {4}


def test_what_the_page_map_calls_swapped(tmp_path: Path, swap_file: Path) -> None:
    """Swapped and armed, swapped and dirty: the first has to be told from an armed page that was never there."""
    with ANONYMOUS.map(8, tmp_path) as area, Bare(area) as bare:
        area.fill(3)
        bare.take()
        pressure.swap_out(area, range(2))
        area.store(4)
        pressure.swap_out(area, range(4, 5))
        bits = oracle.categories(area.address, area.end)
        assert bits[0] & (oracle.SWAPPED | oracle.WRITTEN | oracle.PRESENT) == oracle.SWAPPED
        assert bits[4] & (oracle.SWAPPED | oracle.WRITTEN | oracle.PRESENT) == oracle.SWAPPED | oracle.WRITTEN
        assert area.of_runs(swapped(area.memory)) == {0, 1, 4}
        assert bare.take() == {4}
        assert area.of_runs(swapped(area.memory)) == {0, 1, 4}, "arming brings nothing in"


@pytest.mark.parametrize("kind", some("disk file shared", "disk file private"), ids=str)
def test_pages_of_a_file_that_were_written_back_and_reclaimed(watched: Watched) -> None:
    """Not in swap: in the file. A dirty one is reported though no page table has it."""
    area = watched.area
    area.store(1)
    oracle.synchronise(area.address, area.nbytes)
    pressure.swap_out(area, range(area.units))
    found = watched.collect()
    assert found >= {1}
    watched.collect()
    area.store(2)
    assert watched.collect() >= {2}
    assert watched.collect() == set()


# ---- compaction -----------------------------------------------------------------------------------------------------


def moved_by_compaction(area: Area, dirty: set[int]) -> set[int]:
    """Of holes and pages in turn, of which every second one is dirty: the units in another frame than before."""
    oracle.discard(area.address, area.nbytes, 15)  # no huge pages
    area.fill(3)
    for unit in range(0, area.units, 4):
        oracle.discard(area.at(unit), PAGE)
    with Bare(area) as bare:
        bare.take()
        buffer: Any = (ctypes.c_ubyte * area.nbytes).from_address(area.address)
        np.frombuffer(buffer, np.uint8)[PAGE :: 2 * PAGE] = 9  # the dirty ones
        before = pressure.frames(area)
        pressure.compact()
        after = pressure.frames(area)
        assert bare.take() == dirty
        assert bare.take() == set()
        area.store(5)
        assert bare.take() == {5}
    return {unit for unit, (old, new) in enumerate(zip(before, after, strict=True)) if old != new and old and new}


def test_pages_that_compaction_moved(tmp_path: Path) -> None:
    """Armed or dirty they are as before. How many move is the kernel's choice: more memory is taken until some have."""
    pages, most_areas = 65_536, 8
    dirty = set(range(1, pages, 2))
    moved: set[int] = set()
    with ExitStack() as areas:
        for _ in range(most_areas):
            moved |= moved_by_compaction(areas.enter_context(ANONYMOUS.map(pages, tmp_path)), dirty)
            if moved & dirty and moved - dirty:
                break
    assert moved & dirty, "no dirty page was moved: this test has shown nothing"
    assert moved - dirty, "nor an armed one"


# ---- merging --------------------------------------------------------------------------------------------------------


def test_pages_that_were_merged(tmp_path: Path) -> None:
    """EXTRA: the kernel writes nothing, but may report it; a store to a merged page is seen, and it alone differs."""
    with ANONYMOUS.map(64, tmp_path) as area:
        area.fill(0x6B)
        with Watched(area) as watched:
            already = pressure.merged_pages()
            with pressure.merging():
                pressure.allow_merging(area)
                deadline = time.monotonic() + 30
                while pressure.merged_pages() - already < 32:
                    assert time.monotonic() < deadline, "the kernel merged too little: this test has shown nothing"
                    time.sleep(0.01)
                watched.collect()
                shared = pressure.frames(area)
                assert len(set(shared)) < len(shared), "several pages are one"
                area.store(3)
                area.store(40)
                assert watched.collect() >= {3, 40}
                assert area.load(4) == b"\x6b"
            watched.collect()
            area.store(5)
            assert watched.collect() == {5}

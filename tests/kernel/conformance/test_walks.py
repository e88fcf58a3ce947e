# SPDX-License-Identifier: MIT
"""Patterns, limits and the end of the walk: the cases of the selftest's `sanity_tests_sd`, in units, on every kind.

What the selftest limits by the length of its vector is limited by ``max_pages`` here: `Pagemap` resumes a scan whose
vector is full, which is proven by ranges with more page regions than any vector holds. Takes about 4 s of CI's 20 min.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dirtytrack import PageCategory, Pagemap, ScanFlag
from tests import oracle
from tests.kernel.kinds import KINDS, Area, Kind, some
from tests.kernel.watched import ARMING, EXACT, Bare, Watched
from tests.oracle import PAGE

on_every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
[ANONYMOUS] = some("private anonymous")


def alternate(area: Area) -> set[int]:
    """Store to every second unit."""
    chosen = range(0, area.units, 2)
    for unit in chosen:
        area.store(unit)
    return set(chosen)


@on_every_kind
def test_every_second_unit_at_once_and_in_parts(bare: Bare) -> None:
    area = bare.area
    wanted = sorted(alternate(area))
    assert bare.written() == set(wanted)
    most = len(wanted) - 2
    assert bare.take(most) == set(wanted[:most])
    scan = bare.pagemap.scan(area.address, area.end, **EXACT)
    assert len(scan) == 2, "two are left, apart from each other"
    assert bare.take() == set(wanted[most:])
    assert bare.take() == set()


@on_every_kind
def test_a_limit_that_ends_within_the_last_run(bare: Bare) -> None:
    wanted = alternate(bare.area)
    last = bare.area.units - 1
    bare.area.store(last)
    assert bare.take(len(wanted)) == wanted
    assert bare.take() == {last}


@on_every_kind
def test_two_units_are_taken_and_all_others_stay(bare: Bare) -> None:
    area = bare.area
    area.fill(0xFF)
    most = 2 * area.unit_pages
    taken = bare.pagemap.scan(area.at(1), area.at(3), **EXACT, flags=ARMING, max_pages=most)
    assert list(taken) == [(area.at(1), area.at(3), PageCategory.WRITTEN)]
    left = bare.pagemap.scan(area.address, area.end, **EXACT)
    assert [found[:2] for found in left] == [(area.address, area.at(1)), (area.at(3), area.end)]


@on_every_kind
def test_two_areas_know_nothing_of_each_other(bare: Bare, kind: Kind, tmp_path: Path) -> None:
    with (ANONYMOUS if kind.kept else kind).map(8, tmp_path) as second, Bare(second) as other:
        everything = set(range(bare.area.units))
        bare.area.fill(ord("a"))
        second.fill(ord("b"))
        assert bare.take() == everything
        assert other.written() == set(range(second.units))
        assert bare.written() == set()


@on_every_kind
def test_the_parts_of_a_capped_answer_are_the_whole(bare: Bare) -> None:
    wanted = alternate(bare.area)
    most = len(wanted) // 3 + 1
    parts = [bare.take(most) for _ in range(3)]
    assert set().union(*parts) == wanted
    assert sum(map(len, parts)) == len(wanted), "each once"
    assert bare.take(most) == set()


@on_every_kind
def test_capped_scans_each_from_where_the_last_one_got(bare: Bare) -> None:
    area = bare.area
    chance = random.Random(4)
    most = max(2, area.units // 20) * area.unit_pages
    for _ in range(3):
        wanted = {unit for unit in range(area.units) if chance.random() < 0.5}
        for unit in wanted:
            area.store(unit)
        told: list[int] = []
        at = area.address
        while at < area.end:
            scan = bare.pagemap.scan(at, area.end, **EXACT, flags=ARMING, max_pages=most)
            assert at < scan.walk_end <= area.end
            assert scan.page_count <= most
            told += area.of_runs(scan)
            at = scan.walk_end
        assert sorted(told) == sorted(wanted), "each once"


RANDOM_PAGES = 10_000


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Area]:
    with ANONYMOUS.map(RANDOM_PAGES, tmp_path) as area:
        yield area


def store_at_random(area: Area, chance: np.random.Generator) -> NDArray[np.bool_]:
    buffer: Any = (ctypes.c_ubyte * area.nbytes).from_address(area.address)
    chosen = chance.random(area.units) < 0.5
    np.frombuffer(buffer, np.uint8)[::PAGE][chosen] += 1
    return chosen


def as_mask(area: Area, runs: memoryview) -> NDArray[np.bool_]:
    numbers = np.asarray(runs)
    edges = np.zeros(area.units + 1, np.int64)
    np.add.at(edges, (numbers[:, 0] - area.address) // PAGE, 1)
    np.add.at(edges, (numbers[:, 1] - area.address) // PAGE, -1)
    return np.cumsum(edges[:-1]).astype(bool)


def test_a_hundred_times_half_of_many_pages_asked_of_the_page_map(large: Area) -> None:
    chance = np.random.default_rng(1)
    with Bare(large) as bare:
        for _ in range(100):
            wanted = store_at_random(large, chance)
            scan = bare.pagemap.scan(large.address, large.end, **EXACT, flags=ARMING)
            assert (as_mask(large, scan.page_regions) == wanted).all()
            assert len(bare.pagemap.scan(large.address, large.end, **EXACT)) == 0


def test_a_hundred_times_half_of_many_pages_by_a_tracker(large: Area) -> None:
    chance = np.random.default_rng(2)
    with Watched(large, compare=False) as watched:
        for _ in range(100):
            wanted = store_at_random(large, chance)
            assert (as_mask(large, watched.tracker.collect().runs) == wanted).all()


# ---- where the walk ends --------------------------------------------------------------------------------------------


def test_an_empty_range_ends_where_it_starts(tmp_path: Path) -> None:
    with ANONYMOUS.map(8, tmp_path) as area, Bare(area) as bare:
        area.fill(0)
        for flags in (ScanFlag(0), ARMING):
            scan = bare.pagemap.scan(area.address, area.address, **EXACT, flags=flags)
            assert (len(scan), scan.walk_end) == (0, area.address)
        assert bare.written() == set(range(area.units)), "and arms nothing"


@on_every_kind
@pytest.mark.parametrize("pattern", ["dense", "sparse"])
def test_the_walk_ends_behind_the_last_unit_that_the_limit_allows(bare: Bare, pattern: str) -> None:
    area = bare.area
    if pattern == "dense":
        area.fill(0)
        wanted = list(range(area.units))
    else:
        wanted = sorted(alternate(area))
    count = len(wanted)
    limits = {0: None, area.units + 1: None, count: count, count // 2: count // 2, 1: 1}
    for limit, taken in limits.items():
        scan = bare.pagemap.scan(area.address, area.end, **EXACT, max_pages=limit * area.unit_pages)
        told = wanted if taken is None else wanted[:taken]
        assert area.of_runs(scan) == set(told)
        assert len(scan) == (1 if pattern == "dense" else len(told))
        assert scan.walk_end == (area.end if taken is None else area.at(told[-1] + 1))
    biggest = (1 << 64) - 1
    scan = bare.pagemap.scan(area.address, area.end, **EXACT, max_pages=biggest)
    assert (scan.walk_end, area.of_runs(scan)) == (area.end, set(wanted))
    assert bare.written() == set(wanted), "asking armed nothing"


@on_every_kind
def test_the_kernels_own_word_where_the_walk_ended(bare: Bare) -> None:
    """By the oracle, with a vector of one: the walk stops where the second region would begin, or behind the first."""
    area = bare.area
    alternate(area)
    [first] = oracle.scan_once(
        bare.pagemap.fileno(), area.address, area.end, mask=oracle.WRITTEN, returned=oracle.WRITTEN, room=1
    )
    assert first == (area.address, area.at(1), oracle.WRITTEN)
    scan = bare.pagemap.scan(area.address, area.end, **EXACT)
    assert next(iter(scan)) == first


# ---- what a tracker makes of it -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_patterns_by_a_tracker(watched: Watched) -> None:
    area = watched.area
    chance = random.Random(9)
    wanted = alternate(area)
    assert watched.collect() == wanted
    for _ in range(5):
        wanted = {unit for unit in range(area.units) if chance.random() < 0.5}
        for unit in wanted:
            area.store(unit, chance.randbytes(8))
        assert watched.collect() == wanted
    assert watched.collect() == set()


def test_an_unmapped_range_has_no_pages() -> None:
    with oracle.apart(64 * PAGE) as address:
        pass
    every = PageCategory(oracle.KNOWN) & ~PageCategory.WRITTEN
    with Pagemap() as pagemap:
        scan = pagemap.scan(address, address + 64 * PAGE, category_mask=every, return_mask=every)
        assert (len(scan), scan.walk_end) == (0, address + 64 * PAGE)

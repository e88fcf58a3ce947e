# SPDX-License-Identifier: MIT
"""The six base cases of the kernel's selftest (pagemap_ioctl.c, `base_tests`), on every kind of memory.

Through `Pagemap`, on memory that the oracle registered and armed, and through `DirtyTracker`. Takes about 3 s of CI's
20 min.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from dirtytrack import DirtyTracker, PageCategory, Pagemap, ScanFlag
from tests import oracle
from tests.kernel.host import GIGANTIC_PAGE
from tests.kernel.kinds import GIGANTIC, KINDS, Area, Kind, some
from tests.kernel.watched import ARMING, EXACT, Bare, Watched
from tests.oracle import PAGE


def the_six_base_cases(bare: Bare) -> None:
    area = bare.area
    everything, middle = set(range(area.units)), area.units // 2
    inner = everything - {0, area.units - 1}
    assert bare.take(area.units - 2) == set(), "new pages are not written"
    area.fill(0xFF)
    assert bare.written() == everything, "all are"
    assert bare.take() == everything
    area.fill(0, range(1, area.units - 1))
    assert bare.take() == inner, "all but the first and the last"
    assert bare.written() == set(), "and armed by being taken"
    area.store(middle)
    assert bare.written() == {middle}, "only the middle one"
    assert bare.take() == {middle}
    area.store(middle)
    area.store(middle + 1)
    categories = PageCategory.WRITTEN | PageCategory.HUGE
    [found] = bare.pagemap.scan(
        area.at(middle), area.at(middle + 2), category_mask=PageCategory.WRITTEN, return_mask=categories
    )
    assert found[:2] == (area.at(middle), area.at(middle + 2)), "two, of which alone was asked"
    assert bool(found.categories & PageCategory.HUGE) == (area.granule > PAGE)
    assert bare.take() == {middle, middle + 1}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_base_cases_asked_of_the_page_map(bare: Bare) -> None:
    the_six_base_cases(bare)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_base_cases_by_a_tracker(kind: Kind, area: Area) -> None:
    everything, middle = set(range(area.units)), area.units // 2
    with Watched(area, compare=False) as watched:
        new = watched.collect()
        assert not new or kind.backing == "secret", "of which nobody can ask what has content: all may count once"
        area.fill(0xFF)
        assert watched.peek() == everything
        assert watched.collect() == everything
        area.fill(0, range(1, area.units - 1))
        assert watched.collect() == everything - {0, area.units - 1}
        assert watched.collect() == set()
        area.store(middle)
        assert watched.peek() == watched.collect() == {middle}
        area.store(middle)
        area.store(middle + 1)
        assert watched.collect() == {middle, middle + 1}
        assert watched.tracker.epoch == 7
        area.load(0)
        assert watched.collect() == set(), "nobody reads a page dirty"


def test_the_base_cases_on_many_pages(tmp_path: Path) -> None:
    [kind] = some("private anonymous")
    with kind.map(5120, tmp_path) as area, Bare(area) as bare:
        the_six_base_cases(bare)


def test_the_base_cases_on_a_gibibyte_page(tmp_path: Path) -> None:
    """One unit only: so it is all of them, or none. Linux 6.12.43 fails this, and trackers see to it themselves."""
    with GIGANTIC[0].map(1, tmp_path) as area, Pagemap() as pagemap, oracle.userfaultfd() as uffd:
        oracle.register(uffd, area.address, area.end)
        oracle.arm(uffd, area.address, area.end)
        for _ in range(2):
            assert len(pagemap.scan(area.address, area.end, **EXACT)) == 0
            area.store(0)
            for flags in (ScanFlag(0), ARMING):
                [found] = pagemap.scan(area.address, area.end, **EXACT, flags=flags)
                assert found == (area.address, area.end, PageCategory.WRITTEN)


@pytest.mark.parametrize("kind", GIGANTIC, ids=str)
def test_a_tracker_sees_each_store_to_a_gibibyte_page(kind: Kind, tmp_path: Path) -> None:
    """The arming scan passes over such a page in silence on Linux 6.12.43, and neither reports nor arms it."""
    with kind.map(1, tmp_path) as area, Watched(area, compare=False) as watched:
        for number in range(3):
            assert watched.collect() == watched.peek() == set()
            area.store(0, bytes([number]))
            assert watched.peek() == watched.collect() == {0}
        first, second = watched.tracker, DirtyTracker(watched.session, [watched.region])
        second.start()
        area.store(0)
        assert [first.collect().page_count, second.collect().page_count] == [GIGANTIC_PAGE // PAGE] * 2
        first.stop()
        second.stop()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_hundred_flips(bare: Bare, kind: Kind) -> None:
    """The selftest's `test_simple`: armed is clean and stored to is written, every time."""
    area = bare.area
    unit = area.units // 2
    for number in range(100):
        assert bare.take() == set()
        area.store(unit, bytes([number]))
        scan = bare.pagemap.scan(area.address, area.end, **EXACT)
        assert area.of_runs(scan) == {unit}
        assert bare.take() == {unit}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_hundred_flips_by_a_tracker(area: Area) -> None:
    unit = area.units // 2
    area.fill(3)
    with Watched(area, compare=False) as watched:
        for number in range(100):
            area.store(unit, bytes([number]))
            assert watched.collect() == {unit}
            assert watched.peek() == set()

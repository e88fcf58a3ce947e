# SPDX-License-Identifier: MIT
"""Transparent huge pages: the selftest's `hpage_unit_tests`, and what splits, zaps and refuses to collapse them.

Takes under 1 s of CI's 20 min.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import pytest

import dirtytrack
from dirtytrack import PageCategory
from tests import oracle
from tests.kernel import pressure
from tests.kernel.host import HUGE_PAGE, setting
from tests.kernel.kinds import Area, Kind, some
from tests.kernel.watched import ARMING, EXACT, Bare, Watched
from tests.kernel.ways import UNIT, punch
from tests.oracle import PAGE

[PRIVATE, SHARED] = BOTH = some("transparent huge private", "transparent huge shared")
PAGES = HUGE_PAGE // PAGE
MADV_COLLAPSE, MADV_PAGEOUT = 25, 21

transparent = pytest.mark.parametrize("kind", BOTH, ids=str)
private = pytest.mark.parametrize("kind", [PRIVATE], ids=str)
shared = pytest.mark.parametrize("kind", [SHARED], ids=str)


def huge(area: Area) -> list[bool]:
    """Of each huge page, whether it is one."""
    bits = oracle.categories(area.address, area.end)
    return [bool(bits[first] & oracle.HUGE) for first in range(0, len(bits), PAGES)]


# ---- the selftest's -------------------------------------------------------------------------------------------------


@transparent
def test_huge_pages_are_written_as_a_whole_and_taken_as_a_whole(bare: Bare) -> None:
    area = bare.area
    assert bare.take() == set()
    assert bare.written() == set()
    area.fill(0xFF)
    scan = bare.pagemap.scan(area.address, area.end, **EXACT, flags=ARMING)
    assert list(scan) == [(area.address, area.end, PageCategory.WRITTEN)], "all in one piece"
    assert bare.written() == set()


@transparent
def test_one_store_into_armed_huge_pages(kind: Kind, bare: Bare) -> None:
    middle = bare.area.units // 2
    assert huge(bare.area)[0] == (kind is PRIVATE), "arming all zaps shared ones: there the marker needs small pages"
    bare.area.store(middle)
    assert bare.written() == {middle}
    assert not huge(bare.area)[-1], "the store split the private one"


@transparent
@pytest.mark.parametrize("half", ["first", "second"])
@pytest.mark.parametrize("limited", [False, True])
def test_half_of_the_huge_pages_is_taken(bare: Bare, half: str, limited: bool, kind: Kind, tmp_path: Path) -> None:
    del bare
    with kind.map(4 * PAGES, tmp_path) as area, Bare(area) as bare:
        area.fill(0xFF)
        middle = area.units // 2
        start = area.address if half == "first" else area.at(middle)
        end = area.end if half == "second" or limited else area.at(middle)
        most = middle if limited else 0
        taken = bare.pagemap.scan(start, end, **EXACT, flags=ARMING, max_pages=most)
        assert [found[:2] for found in taken] == [(start, start + middle * PAGE)]
        left = set(range(middle, area.units)) if half == "first" else set(range(middle))
        assert bare.written() == left


@transparent
def test_half_of_one_huge_page_is_taken(bare: Bare) -> None:
    area = bare.area
    area.fill(0xFF)
    taken = bare.pagemap.scan(area.address, area.end, **EXACT, flags=ARMING, max_pages=PAGES // 2)
    assert [found[:2] for found in taken] == [(area.address, area.at(PAGES // 2))]
    [left] = bare.pagemap.scan(area.address, area.end, **EXACT)
    assert left[:2] == (area.at(PAGES // 2), area.end)


@private
def test_a_hole_where_a_huge_page_was(kind: Kind, tmp_path: Path) -> None:
    """Discarded whole, while armed: on many kernels the exact scan alone does not see it, and remedy R1 does."""
    with kind.map(3 * PAGES, tmp_path) as area:
        area.fill(3)
        with Watched(area) as watched:
            oracle.discard(area.at(PAGES), HUGE_PAGE)
            hole = set(range(PAGES, 2 * PAGES))
            assert watched.collect() == hole
            assert watched.collect() == set()
            area.store(PAGES + 7)
            assert watched.collect() == {PAGES + 7}, "and armed as small pages"


# ---- splitting and zapping ------------------------------------------------------------------------------------------


@private
def test_private_huge_pages_stay_huge_while_armed_and_split_at_the_first_store(watched: Watched) -> None:
    area = watched.area
    assert all(huge(area))
    area.load(1)
    assert watched.collect() == set()
    assert all(huge(area)), "nor does a collect split them"
    area.store(9)
    assert watched.collect() == {9}, "of 512 pages one"
    assert not huge(area)[0]


@private
def test_rights_and_holes_within_a_huge_page(kind: Kind, tmp_path: Path) -> None:
    with kind.map(2 * PAGES, tmp_path) as area:
        area.fill(3)
        with Watched(area, compare=False) as watched:
            oracle.protect(area.at(4), PAGE, 1)
            oracle.protect(area.at(4), PAGE, 3)
            assert watched.collect() == set(), "split, and every part armed"
            area.store(4)
            area.store(5)
            assert watched.collect() == {4, 5}
            oracle.unmap(area.at(PAGES + 1), PAGE)
            area.store(PAGES)
            with pytest.raises(dirtytrack.RegionGone):
                watched.tracker.collect()
            assert PAGES in watched.collect()


@shared
def test_shared_huge_pages_armed_by_the_scan_are_dirty_as_a_whole(kind: Kind, tmp_path: Path) -> None:
    """UFFDIO_WRITEPROTECT zaps them to small pages; the scan does not: then one store makes 512 pages dirty."""
    with kind.map(2 * PAGES, tmp_path) as area, oracle.userfaultfd() as uffd:
        oracle.register(uffd, area.address, area.end)
        whole = set(range(area.units))
        assert oracle.exact(area.address, area.end) == whole
        assert all(huge(area))
        for _ in range(2):
            assert oracle.exact(area.address, area.end) == set()
            area.store(9)
            assert oracle.exact(area.address, area.end) == set(range(PAGES)), "each time"
            assert all(huge(area))


@shared
@pytest.mark.parametrize("how", ["mprotect", "munmap", "punch", "discard", "page out"])
def test_a_zapped_shared_huge_page_is_dirty(kind: Kind, how: str, tmp_path: Path) -> None:
    """EXTRA: nobody can say any more which of its pages were clean."""
    with kind.map(2 * PAGES, tmp_path) as area, oracle.userfaultfd() as uffd:
        oracle.register(uffd, area.address, area.end)
        oracle.exact(area.address, area.end)
        area.store(1)
        if how == "mprotect":
            oracle.protect(area.at(4), PAGE, 1)
            oracle.protect(area.at(4), PAGE, 3)
        elif how == "munmap":
            oracle.unmap(area.at(UNIT), PAGE)
        elif how == "punch":
            punch(area)
        else:
            oracle.discard(area.address, HUGE_PAGE, mmap.MADV_DONTNEED if how == "discard" else MADV_PAGEOUT)
        assert oracle.written(area.address, area.end) >= {1}
        assert oracle.exact(area.address, area.end) >= {1}, "of the page that was written nothing is lost"


# ---- collapsing -----------------------------------------------------------------------------------------------------


def collapse(area: Area) -> bool:
    """MADV_COLLAPSE: whether small pages became huge ones."""
    try:
        oracle.discard(area.address, area.nbytes, MADV_COLLAPSE)
    except OSError:
        return False
    return True


def small_pages(area: Area) -> None:
    """Where huge ones could be."""
    oracle.discard(area.address, area.nbytes)
    oracle.discard(area.address, area.nbytes, mmap.MADV_NOHUGEPAGE)
    area.fill(5)
    oracle.discard(area.address, area.nbytes, 14)
    assert not any(huge(area))


@private
def test_small_pages_do_not_collapse_while_one_is_armed(area: Area) -> None:
    small_pages(area)
    with Watched(area) as watched:
        area.store(7)
        assert not collapse(area)
        assert watched.collect() == {7}
        area.fill(6)
        assert collapse(area), "none of them is armed now"
        assert all(huge(area))
        assert watched.collect() == set(range(area.units))
        area.store(1)
        assert watched.collect() == {1}


@private
def test_small_pages_that_are_not_armed_collapse(area: Area) -> None:
    small_pages(area)
    assert collapse(area)
    assert all(huge(area))


@shared
def test_collapsing_through_another_mapping_loses_nothing(kind: Kind, tmp_path: Path) -> None:
    """The other mapping is not registered: there the collapse is allowed, and it zaps the pages of ours."""
    [memfd] = some("memfd shared")
    with memfd.map(1, tmp_path) as small:
        fd = os.dup(small.fd)
    os.ftruncate(fd, 2 * HUGE_PAGE)
    with oracle.apart(3 * HUGE_PAGE) as reserved:
        start = -(-reserved // HUGE_PAGE) * HUGE_PAGE
        oracle.map_at(start, HUGE_PAGE, fd=fd)
        area = Area(start, HUGE_PAGE, PAGE, fd)
        area.fill(3)
        with oracle.apart(3 * HUGE_PAGE) as elsewhere, Watched(area) as watched:
            alias = -(-elsewhere // HUGE_PAGE) * HUGE_PAGE
            oracle.map_at(alias, HUGE_PAGE, fd=fd)
            oracle.peek_bytes(alias, HUGE_PAGE)
            area.store(9)
            with setting(Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled"), "advise"):
                assert collapse(Area(alias, HUGE_PAGE, PAGE, fd))
            assert 9 in watched.collect()
            area.store(11)
            assert 11 in watched.collect()
    os.close(fd)


def test_an_armed_range_without_content_gets_no_huge_pages(tmp_path: Path) -> None:
    with PRIVATE.map(2 * PAGES, tmp_path) as area:
        oracle.discard(area.address, area.nbytes)
        with Watched(area, compare=False) as watched:
            ctypes.memset(area.address, 1, area.nbytes)
            assert not any(huge(area)), "the markers are small"
            assert watched.collect() == set(range(area.units))


def test_pages_of_a_size_between(tmp_path: Path) -> None:
    """64 KiB: 16 pages in one piece, of which each is dirty by itself."""
    folder = Path("/sys/kernel/mm/transparent_hugepage/hugepages-64kB")
    with setting(folder / "enabled", "madvise"), oracle.apart(3 * 16 * PAGE) as reserved:
        area = Area(-(-reserved // (16 * PAGE)) * 16 * PAGE, 2 * 16 * PAGE, PAGE)
        oracle.discard(area.address, area.nbytes, 14)
        area.fill(3)
        frames = pressure.frames(area)
        assert frames[16:] == list(range(frames[16], frames[16] + 16)), "really in one piece"
        with Watched(area) as watched:
            assert watched.collect() == set()
            area.store(17)
            assert watched.collect() == {17}
            area.store(3)
            area.store(18)
            assert watched.collect() == {3, 18}

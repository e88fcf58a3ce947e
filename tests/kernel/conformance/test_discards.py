# SPDX-License-Identifier: MIT
"""Content that was discarded where the page's marker stays: the exact scan misses it (test_unseen.py), trackers do not.

Takes about 1 s of CI's 20 min.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

import dirtytrack
from dirtytrack import DirtyTracker
from tests import oracle
from tests.kernel.host import on_disk
from tests.kernel.kinds import Area, Kind, some
from tests.kernel.watched import Watched
from tests.kernel.ways import (
    DISCARDS,
    SHARED_FILES,
    UNIT,
    Way,
    punch,
    rows,
)
from tests.oracle import PAGE


def assert_found(watched: Watched, wanted: set[int]) -> None:
    assert watched.collect() >= wanted
    assert watched.collect() == set(), "once"


@rows(DISCARDS)
def test_a_discard_is_reported_once(kind: Kind, way: Way, watched: Watched) -> None:
    for number in range(2):
        way(watched.area)
        assert_found(watched, {UNIT})
        watched.area.fill(number + 5)
        assert watched.collect() == set(range(watched.area.units))


@rows(DISCARDS)
def test_a_dirty_unit_that_is_discarded_is_reported(kind: Kind, way: Way, watched: Watched) -> None:
    """Whether the discard takes the mark of the store with it or not."""
    area = watched.area
    area.store(UNIT)
    area.store(UNIT - 1)
    way(area)
    found = area.of_runs(watched.tracker.collect())
    assert found >= {UNIT - 1}
    assert UNIT in found


@rows(DISCARDS)
def test_who_reads_what_waited_hides_no_discard_from_others(kind: Kind, way: Way, watched: Watched) -> None:
    """A collect whose time is up delivers pages that it did not look at; a discarded one is there again once read."""
    area, beside = watched.area, dirtytrack.allocate(PAGE)
    regions = [watched.region, watched.session.register(beside)]
    with DirtyTracker(watched.session, regions) as hasty:
        area.store(UNIT)
        waiting = hasty.collect()
        assert watched.collect() == {UNIT}
        if beside.address > area.address:
            assert not hasty.collect(budget_seconds=0), "the next one begins behind the area"
        hasty.put_back(waiting)
        way(area)
        dirty = hasty.collect(budget_seconds=0)
        assert not dirty.complete
        dirty.gather()
        assert UNIT in watched.collect()


@pytest.mark.parametrize("kind", some(*SHARED_FILES), ids=str)
def test_a_hole_in_a_file_that_this_mapping_never_had(area: Area) -> None:
    """It was filled by write(2): no page of it was ever in this page table."""
    with Watched(area, compare=False) as watched:
        punch(area)
        found = watched.collect()
        assert UNIT in found
        assert area.load(UNIT) == b"\0"
        area.store(UNIT)
        assert watched.collect() == {UNIT}


@pytest.mark.parametrize("name", ["memfd", "disk"])
@pytest.mark.parametrize("how", ["punched", "truncated"])
def test_a_hole_that_a_store_near_by_filled_again(name: str, how: str, tmp_path: Path) -> None:
    """Filled by one large write(2), so that it is in large folios; nobody looked at it through the mapping."""
    fd = os.memfd_create("large") if name == "memfd" else os.open(on_disk(tmp_path), os.O_TMPFILE | os.O_RDWR)
    os.pwrite(fd, b"\3" * 16 * PAGE, 0)
    with mmap.mmap(fd, 16 * PAGE) as memory, dirtytrack.track(memory, blind_spots="accepted") as tracker:
        if how == "punched":
            area = Area(oracle.address_of(memory), 16 * PAGE, PAGE, fd)
            punch(area, 8)
        else:
            os.ftruncate(fd, PAGE)
            os.ftruncate(fd, 16 * PAGE)
        memory[(UNIT + 1) * PAGE + 8] = 7
        gone = set(range(UNIT, UNIT + 8) if how == "punched" else range(1, 16))
        assert gone <= set(tracker.collect().pages())
        assert not tracker.collect()
    os.close(fd)

# SPDX-License-Identifier: MIT
"""Content that was discarded where the page's marker stays: the exact scan misses it (test_unseen.py), trackers do not.

Takes about 1 s of CI's 20 min.
"""

from __future__ import annotations

import pytest

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

# SPDX-License-Identifier: MIT
"""Several trackers on one memory, and memory of another process: what the selftest lacks, on every kind.

Takes about 1 s of CI's 20 min.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

import dirtytrack
from dirtytrack import DirtyTracker, PageCategory, Pagemap, UffdSession
from dirtytrack.pagemap import present, written
from tests import oracle
from tests.kernel.kinds import KINDS, Area, Kind
from tests.kernel.watched import ARMING, EXACT, Watched

on_every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


@on_every_kind
def test_three_trackers_at_their_own_pace_each_get_all(watched: Watched) -> None:
    area, session = watched.area, watched.session
    others = [DirtyTracker(session, [watched.region]) for _ in range(2)]
    for other in others:
        other.start()
    chance = random.Random(5)
    owed: list[set[int]] = [set(), set()]
    for number in range(12):
        stored = {unit for unit in range(area.units) if chance.random() < 0.3}
        for unit in stored:
            area.store(unit, bytes([number]))
        assert watched.collect() == stored
        for index, pace in enumerate((3, 4)):
            owed[index] |= stored
            if number % pace == pace - 1:
                assert area.of_runs(others[index].collect()) == owed[index]
                owed[index] = set()
    for index, other in enumerate(others):
        assert area.of_runs(other.stop()) == owed[index]


@on_every_kind
def test_two_regions_of_one_memory(area: Area) -> None:
    """Halves that overlap by two units: each tracker is told of its own, and of what both have."""
    middle = area.units // 2
    area.fill(3)
    with UffdSession() as session:
        low = session.register((area.address, (middle + 1) * area.granule), blind_spots="accepted")
        high = session.register((area.at(middle - 1), area.end - area.at(middle - 1)), blind_spots="accepted")
        first, second = DirtyTracker(session, [low]), DirtyTracker(session, [high])
        first.start()
        second.start()
        for unit in range(area.units):
            area.store(unit)
            assert area.of_runs(first.collect()) == ({unit} if unit <= middle else set())
            assert area.of_runs(second.collect()) == ({unit} if unit >= middle - 1 else set())


@on_every_kind
def test_a_page_map_scan_that_arms_takes_from_trackers(watched: Watched) -> None:
    """Whoever arms behind a session's back loses what was dirty for it: only the audit, or declaring it, helps."""
    area = watched.area
    area.store(1, b"\x44")
    with Pagemap() as pagemap:
        assert area.of_runs(pagemap.scan(area.address, area.end, **EXACT, flags=ARMING)) == {1}
    watched.session.mark_dirty((area.at(1), 1))
    assert watched.collect() == {1}


# ---- another process ------------------------------------------------------------------------------------------------


class Child:
    """A forked child that does what it is told with its own copy, or its share, of an area."""

    def __init__(self, area: Area) -> None:
        self._orders, orders = os.pipe()[::-1]
        answers, self._answers = os.pipe()
        self.area = area
        self.pid = os.fork()
        if not self.pid:
            os.close(self._orders)
            os.close(answers)
            signal.alarm(60)
            try:
                self._obey(orders, self._answers)
            finally:
                os._exit(1)
        os.close(orders)
        os.close(self._answers)
        self._heard = answers

    def _obey(self, orders: int, answers: int) -> None:
        with oracle.userfaultfd() as uffd:
            while order := os.read(orders, 2):
                what, unit = order
                if what == ord("s"):
                    self.area.store(unit, b"\x66")
                elif what == ord("l"):
                    self.area.load(unit)
                elif what == ord("a"):
                    oracle.register(uffd, self.area.address, self.area.end)
                    oracle.arm(uffd, self.area.address, self.area.end)
                os.write(answers, b"!")
        os._exit(0)

    def do(self, what: str, unit: int = 0) -> None:
        os.write(self._orders, bytes((ord(what), unit)))
        assert os.read(self._heard, 1) == b"!"

    def end(self) -> None:
        os.close(self._orders)
        os.waitpid(self.pid, 0)
        os.close(self._heard)


@contextmanager
def child_with(area: Area) -> Iterator[Child]:
    child = Child(area)
    try:
        yield child
    finally:
        child.end()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_another_process_is_asked_and_armed_from_here(area: Area) -> None:
    area.fill(3)
    memory = area.memory
    with child_with(area) as child, Pagemap(child.pid) as pagemap:
        for unit in range(area.units)[:8]:
            child.do("l", unit)
        assert area.of_runs(present(memory, pagemap)) >= set(range(8))
        with pytest.raises(dirtytrack.NotRegistered):
            written(memory, pagemap)
        child.do("a")
        assert area.of_runs(written(memory, pagemap)) == set()
        for units in ((2,), (1, 5)):
            for unit in units:
                child.do("s", unit)
            child.do("l", 6)
            assert area.of_runs(written(memory, pagemap)) == set(units)
            scan = pagemap.scan(area.address, area.end, **EXACT, flags=ARMING)
            assert area.of_runs(scan) == set(units), "armed from here"
            assert all(bits == PageCategory.WRITTEN for _, _, bits in scan)
            assert area.of_runs(written(memory, pagemap)) == set()


@on_every_kind
def test_a_child_of_a_fork_has_its_own_armed_pages(kind: Kind, watched: Watched) -> None:
    """It is tracked by whom it asks to: the parent's answers and the child's do not mix."""
    area = watched.area
    with child_with(area) as child, Pagemap(child.pid) as pagemap:
        child.do("a")
        area.store(1)
        child.do("s", 2)
        assert area.of_runs(written(area.memory, pagemap)) == {2}
        found = area.of_runs(watched.tracker.collect())
        assert found == {1}
        assert (oracle.peek_bytes(area.at(2, 8), 1) == b"\x66") == kind.shared, "if shared: unseen here, and seen there"


def test_a_process_that_ended_has_no_memory_left(tmp_path_factory: pytest.TempPathFactory) -> None:
    [kind] = [kind for kind in KINDS if kind.name == "private anonymous"]
    with kind.map(8, tmp_path_factory.mktemp("child")) as area:
        area.fill(1)
        child = Child(area)
        with Pagemap(child.pid) as pagemap:
            assert area.of_runs(present(area.memory, pagemap)) == set(range(area.units))
            child.end()
            questions: tuple[Callable[..., object], ...] = (present, written)
            for question in questions:
                with pytest.raises(dirtytrack.TargetGone):
                    question(area.memory, pagemap)

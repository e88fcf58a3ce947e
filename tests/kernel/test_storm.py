# SPDX-License-Identifier: MIT
"""A storm: threads that store without pause, while listeners of different rhythm collect. No store is lost.

The writers (storm_writers.c) tell nobody what they do. Each listener keeps a mirror by nothing but what its sets say.
What was in memory before a collect began must be in the mirror after it, and is looked for in three ways:

- stamps: each visit of a writer to a page ends with a stamp, a number that grows, so that a mirror must never be behind
  the stamps that were read just before the collect;
- retired pages: one after another, pages get their last store (or discard), and are published after it; from the next
  collect on, that writer's words must be equal for ever;
- at rest: after each round, with the writers stopped and a last collect made, mirror and memory are the same bytes.

At least 10^8 stores in all, 10^10 in `make soak`, counted by what memory holds. Takes about 70 s of CI's 20 min.
"""

from __future__ import annotations

import ctypes
import os

import pytest

from dirtytrack import DirtySet, Run
from tests import oracle
from tests.asked import SANITIZED, fewer
from tests.kernel.storm import Listener, Lost, Ranges, Slow, Unreliable, Weather, load_writers, storm_of
from tests.oracle import PAGE

STORES = fewer(10**7 if SANITIZED else 10**8)  # in all, at the least
ROUNDS = 8
SOAK_STORES = 10**10
SOAK_ROUNDS = 80
MANY_RUNS = 4096  # more than fit into one answer of the kernel, so that a scan resumes


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return load_writers(tmp_path_factory.mktemp("storm"))


# ---- the storms -----------------------------------------------------------------------------------------------------

WEATHERS = [
    Weather(),
    Weather(shared=True),
    Weather(transparent=True),
    Weather(wide=True),
    Weather(company=True),
    Weather(company=True, remedy=1),
    Weather(company=True, shared=True),
    Weather(company=True, shared=True, declares=False, aliased=True),
    Weather(company=True, transparent=True),
    Weather(company=True, phases=True),
]
COMPARING = [
    Weather(backend="compare"),
    Weather(backend="compare", wide=True),
    Weather(backend="compare", company=True),
    Weather(backend="compare-hashes"),
    Weather(backend="compare-hashes", company=True),
]
UNDECLARED = [Weather(backend="compare", company=True, shared=True, declares=False)]  # which it sees all the same


def endure(library: ctypes.CDLL, weather: Weather, stores: int, rounds: int) -> None:
    """So many stores at least, half of them into memory that was never touched before."""
    counted = collects = pages = assumed = discards = 0
    for seed in range(2):
        listeners = [Listener, Slow, *[Unreliable] * weather.company]
        with storm_of(library, weather, seed, listeners) as storm:
            for _ in range(rounds // 2):
                storm.round(-(-stores // rounds))
            counted += storm.counted()
            collects += storm.collects
            pages += storm.pages_collected
            assumed += storm.pages_assumed
            discards += sum(writer.discards for writer in storm.writers)
            assert not weather.wide or storm.most_runs > MANY_RUNS
    print(f"{weather}: {counted:,} stores, {discards:,} discards,", end=" ")
    print(f"{collects:,} collects of {pages:,} pages, {assumed:,} of them assumed")
    assert counted >= stores
    assert discards or not weather.company
    assert assumed or not weather.phases


@pytest.mark.parametrize("weather", WEATHERS, ids=str)
def test_no_store_is_lost(library: ctypes.CDLL, weather: Weather) -> None:
    endure(library, weather, -(-STORES // len(WEATHERS)), ROUNDS)


@pytest.mark.parametrize("weather", COMPARING, ids=str)
def test_no_store_is_lost_by_comparing(library: ctypes.CDLL, weather: Weather) -> None:
    endure(library, weather, STORES // 60, ROUNDS // 4)  # fewer: each collect reads all of the memory


@pytest.mark.soak
@pytest.mark.parametrize("weather", WEATHERS + COMPARING + UNDECLARED, ids=str)
def test_no_store_is_lost_for_long(library: ctypes.CDLL, weather: Weather) -> None:
    endure(library, weather, -(-SOAK_STORES // len(WEATHERS)), SOAK_ROUNDS)


# ---- the test of the test -------------------------------------------------------------------------------------------


class DropsARun(Listener):
    """Of each set it passes over one run."""

    def copy(self, runs: list[Run]) -> None:
        if runs:
            runs.pop(self.random.randrange(len(runs)))
        super().copy(runs)


class LosesPages(Listener):
    """One page in a thousand."""

    seen = 0

    def copy(self, runs: list[Run]) -> None:
        kept = []
        for run in runs:
            for page in range(run.start, run.end, PAGE):
                self.seen += 1
                if self.seen % 1000:
                    kept.append(Run(page, page + PAGE))
        super().copy(kept)


class CopiesFirst(Listener):
    """Copies, and arms after that: whatever is written in between is lost."""

    def take(self) -> Ranges:
        self.absorb(self.tracker.peek())
        self.tracker.collect()
        return self.ranges


class Robbed(Listener):
    """Somebody else arms pages, and keeps to itself that they were written."""

    def take(self) -> Ranges:
        fd = os.open("/proc/self/pagemap", os.O_RDONLY)
        written, flags = oracle.WRITTEN, oracle.WP_MATCHING | oracle.CHECK_WPASYNC
        start = self.storm.held.address
        end = start + self.ranges[0][1] * PAGE
        oracle.scan_once(fd, start, end, mask=written, returned=written, flags=flags, room=64)
        os.close(fd)
        return super().take()


class NeverPutsBack(Unreliable):
    """What it could not use, it forgets."""

    def put_back(self, dirty: DirtySet) -> None:
        del dirty


def losing(library: ctypes.CDLL, weather: Weather, loser: type[Listener], check: str) -> None:
    with storm_of(library, weather, 1, [loser, Slow]) as storm:
        storm.checks = (check,)
        for _ in range(200):  # the first is enough, as a rule
            storm.round(10**5)


@pytest.mark.parametrize("check", ["stamps", "retired", "rest"])
@pytest.mark.parametrize("loser", [DropsARun, LosesPages, CopiesFirst, Robbed, NeverPutsBack])
def test_each_check_finds_each_kind_of_loss(library: ctypes.CDLL, loser: type[Listener], check: str) -> None:
    said = {"stamps": "behind the stamps", "retired": "the retired pages", "rest": "at rest"}[check]
    with pytest.raises(Lost, match=said):
        losing(library, Weather(), loser, check)


@pytest.mark.parametrize("check", ["foreign", "rest"])
def test_a_write_that_nobody_saw_nor_declared_is_found(library: ctypes.CDLL, check: str) -> None:
    with pytest.raises(Lost, match="foreign" if check == "foreign" else "at rest"):
        losing(library, Weather(shared=True, company=True, declares=False), Listener, check)

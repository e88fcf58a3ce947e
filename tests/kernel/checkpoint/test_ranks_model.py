# SPDX-License-Identifier: MIT
"""Runs of ranks, one after the other, of a program that is drawn by lot.

Drawn is on how many ranks, which rows are whose, how it is saved, and whose disk fails when. What each generation must
be follows from its step alone.
"""

from __future__ import annotations

import errno
import random
from pathlib import Path
from typing import Any

import pytest

from dirtytrack.checkpoint import (
    DirectoryStore,
    Retention,
    compact,
    coordinated,
    generations,
    prune,
    restore,
    tending,
    verify,
)
from dirtytrack.errors import DirtyTrackError, RankFailed
from tests.ranking import ThreadRank, ranks
from tests.ranks_program import ROWS, Grid
from tests.storing import Failing


class Model:
    """A store, and what there must be in it."""

    def __init__(self, where: Path, seed: int) -> None:
        self.where, self.draw = where, random.Random(seed)
        DirectoryStore(where, create=True).close()
        self.saved: dict[int, int] = {}
        """By generation that was committed, its step."""
        self._grid, self._at, self._known = Grid(), 0, {0: bytes(Grid().cells)}

    def truth(self, step: int) -> bytes:
        while self._at < step:
            self._at += 1
            self._grid.step(self._at)
            self._known[self._at] = bytes(self._grid.cells)
        return self._known[step]

    def run(self) -> None:
        draw = self.draw
        size = draw.choice([1, 2, 2, 3, 4])
        cuts = [0, *sorted(draw.sample(range(1, ROWS), size - 1)), ROWS]
        options: dict[str, Any] = {
            "compression": draw.choice([None, "zstd"]),
            "deltas": draw.random() < 0.3,
            "compact": draw.choice([None, 0.3]),
            "retain": draw.choice([None, Retention(last=3)]),
            "staging_bytes": draw.choice([1 << 16, 1 << 20]),
        }
        steps = [
            (draw.random() < 0.6, draw.randrange(size) if draw.random() < 0.3 else None, draw.randrange(1, 12))
            for _ in range(draw.randrange(3, 9))
        ]
        found = ranks(size, lambda comm: self._rank(comm, cuts, options, steps))
        assert all(each == found[0] for each in found), "ranks know of different generations"
        first, committed = found[0]
        assert first == max(self.saved.values(), default=0)
        self.saved |= committed
        self.check()

    def _rank(
        self, comm: ThreadRank, cuts: list[int], options: dict[str, Any], steps: list[tuple[bool, int | None, int]]
    ) -> tuple[int, dict[int, int]]:
        grid, files = Grid(*cuts[comm.rank : comm.rank + 2]), Failing()
        store = DirectoryStore(self.where, files=files)
        saves = []
        with coordinated(comm, store, {"grid": grid.cells}, partition={"grid": 0}, resume=True, **options) as ckpt:
            first = step = 0 if ckpt.resumed is None else ckpt.resumed.meta
            for waits, fails, nth in steps:
                step += 1
                grid.step(step)
                if fails == comm.rank and waits:
                    files.nth, files.count, files.error = nth, 0, errno.EIO
                try:
                    saves.append((step, ckpt.save(step)))
                    if waits:
                        saves[-1][1].wait(20)
                except RankFailed:  # of this one, or of the one before, and then this one was not begun, at any rank
                    pass
                finally:
                    if waits:
                        files.nth = 0
            try:
                ckpt.wait(20)
            except DirtyTrackError:  # removing went wrong where the disk failed
                pass
        return first, {save.generation or 0: step for step, save in saves if save.state == "committed"}

    def check(self) -> None:
        there = {each.generation: each.meta for each in generations(self.where)}
        assert there.items() <= self.saved.items()
        assert not self.saved or max(self.saved) in there
        for generation, step in there.items():
            assert restore(self.where, generation=generation, threads=1)["grid"].tobytes() == self.truth(step)

    def tend(self) -> None:
        if not self.saved:
            return
        if self.draw.random() < 0.3:
            compact(self.where, self.draw.choice([each.generation for each in generations(self.where)]))
        if self.draw.random() < 0.3:
            prune(self.where, Retention(last=2))
        self.check()


def runs(where: Path, seed: int, count: int) -> None:
    model = Model(where, seed)
    for _ in range(count):
        model.run()
        model.tend()
    report = verify(where, all=True)
    assert report.ok
    assert model.saved


@pytest.mark.parametrize("seed", range(6))
def test_runs_by_lot(where: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tending, "_SPARE_NBYTES", 16 << 10)
    runs(where, seed, 4)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_runs_by_lot_for_long(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tending, "_SPARE_NBYTES", 16 << 10)
    for seed in range(100, 200):
        runs(where / str(seed), seed, 6)

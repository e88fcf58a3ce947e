# SPDX-License-Identifier: MIT
"""Two ranks, and a kill between any two operations on files of either, or a power loss at any moment.

What a file system may lose of what was not synced is lost. What was committed is there for both, nothing is torn, and
the next run goes on.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dirtytrack.checkpoint import DirectoryStore, Retention, coordinated, generations, restore, verify, writing
from dirtytrack.checkpoint.files import Files
from dirtytrack.errors import InvalidCheckpoint
from tests.ranking import ThreadRank, ranks
from tests.saving import paged
from tests.storing import Dying, Recording, crashes

ROWS = (3, 5)
IMPORTED = writing  # when it is needed, which is in each child: once, here, instead


def grid_at(step: int) -> np.ndarray[Any, Any]:
    """What all ranks together have: two pages a row, of which some change."""
    grid = np.full((sum(ROWS), 8192), 1, np.uint8)
    for each in range(step + 1):
        grid[each % sum(ROWS), ::4096] = each + 7
        grid[(each * 3 + 4) % sum(ROWS), :] = each
    return grid


def run(
    where: Path,
    files: Files | None = None,
    say: Callable[[tuple[str, int]], object] = lambda _: None,
    *,
    steps: int,
    keep: int = 2,
) -> None:
    """Both ranks go on from where it was; ``say`` hears what was reported committed, and what may be removed."""

    def work(comm: ThreadRank) -> None:
        low = sum(ROWS[: comm.rank])
        rows = paged(2 * ROWS[comm.rank]).reshape(ROWS[comm.rank], 8192)
        rows[:] = 1
        try:
            store = DirectoryStore(where, create=not comm.rank, files=files)
        except InvalidCheckpoint:  # rank 0 has not made it yet
            store = None
        with coordinated(
            comm,
            where if store is None else store,
            {"grid": rows},
            partition={"grid": 0},
            resume=True,
            retain=Retention(last=keep),
            compression=None,
            compact=None,
            threads=1,
        ) as ckpt:
            first = 0 if ckpt.resumed is None else ckpt.resumed.meta + 1
            if ckpt.resumed is not None:
                assert (rows == grid_at(first - 1)[low : low + len(rows)]).all()
            for step in range(first, first + steps):
                rows[:] = np.where(
                    rows != grid_at(step)[low : low + len(rows)], grid_at(step)[low : low + len(rows)], rows
                )
                if not comm.rank and step - keep >= 0:
                    say(("removed", step - keep))  # may be, as soon as this one is there
                assert ckpt.save(step).wait(20)
                if not comm.rank:
                    say(("committed", step))
        if store is not None:
            store.close()

    ranks(2, work)


def problem_of(where: Path, committed: set[int], *, next_run: bool) -> str | None:
    """What is wrong with what was left."""
    try:
        found = generations(where)
    except InvalidCheckpoint:
        found = ()
    there = set()
    for each in found:
        if each.damage:
            return f"generation {each.generation} is torn: {each.damage}"
        state = restore(where, generation=each.generation, threads=1)
        if state["grid"].tobytes() != grid_at(state.meta).tobytes():
            return f"generation {each.generation} is not what was saved"
        there.add(state.meta)
    if not committed <= there:
        return f"{committed - there} are gone"
    if next_run:
        run(where, steps=1)
        report = verify(where, all=True)
        if not report.ok or report.strangers:
            return f"after the next run: {report}"
    return None


def committed_by(notes: Collection[tuple[str, int]]) -> set[int]:
    return {step for what, step in notes if what == "committed"} - {step for what, step in notes if what == "removed"}


# ---- a power loss


class Disk(Recording):
    """What both ranks do, one operation after the other."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._turn = threading.RLock()

    def operate(self, name: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        with self._turn:
            return super().operate(name, call, *args, **options)

    def note(self, what: Any) -> None:
        with self._turn:
            super().note(what)


def power_losses(where: Path, steps: int, keep: int) -> None:
    (where / "disk").mkdir(parents=True)
    files = Disk(where / "disk")
    DirectoryStore(where / "disk" / "store", create=True, files=files).close()
    run(where / "disk" / "store", files, files.note, steps=steps, keep=keep)
    seen = 0
    for moment, root in crashes(files, where / "after"):
        seen += 1
        problem = problem_of(root / "store", committed_by(moment.notes), next_run=not seen % 40)
        assert problem is None, (problem, moment.after, moment.notes)
    assert seen > 300


def test_each_legal_loss_leaves_each_generation_whole_or_gone_for_all(where: Path) -> None:
    power_losses(where, 2, 1)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_each_legal_loss_of_more_steps(where: Path) -> None:
    power_losses(where, 5, 2)


# ---- a kill


class DyingInWrites(Dying):
    """Of the operations of both ranks, only those count after which something is different."""

    def __init__(self, nth: int) -> None:
        super().__init__(nth)
        self._turn = threading.RLock()

    def operate(self, name: str, call: Any, *args: Any, **options: Any) -> Any:
        with self._turn:
            if name in ("close", "lock", "unlock", "open_directory", "open_lock"):
                return call(*args, **options)
            return super().operate(name, call, *args, **options)


def killed_at(where: Path, nth: int) -> tuple[int, set[int]]:
    """How a run ended that is killed before that operation, and what it had reported committed."""
    ours, report = os.pipe()
    pid = os.fork()
    if not pid:
        code = 3
        try:
            run(where, DyingInWrites(nth), lambda what: os.write(report, f"{what[0]} {what[1]}\n".encode()), steps=3)
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    os.close(report)
    with os.fdopen(ours) as pipe:
        lines = [line.split() for line in pipe.read().splitlines()]
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, committed_by([(what, int(step)) for what, step in lines])


def killed_between_operations(where: Path, stride: int) -> None:
    """Each run is of a store of its own, begun by another one; the kill moves on by the stride."""
    nth, kills = 1, 0
    first = where.with_name("first")
    run(first, steps=2)
    while True:
        shutil.copytree(first, where)
        code, committed = killed_at(where, nth)
        problem = problem_of(where, committed, next_run=True)
        assert problem is None, (problem, nth)
        shutil.rmtree(where)
        if not code:
            break
        assert code == -signal.SIGKILL
        kills, nth = kills + 1, nth + stride
    assert kills * stride > 60


def test_killed_between_operations(where: Path) -> None:
    killed_between_operations(where, 7)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_killed_between_any_two_operations_of_ranks(where: Path) -> None:
    for _ in range(3):
        killed_between_operations(where, 1)

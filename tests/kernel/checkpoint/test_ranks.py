# SPDX-License-Identifier: MIT
"""Many ranks that save together: threads here, processes in test_ranks_mpi.py. All that comes back is compared."""

from __future__ import annotations

import errno
import json
import random
import re
import shutil
import tempfile
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dirtytrack import cli
from dirtytrack.checkpoint import (
    Checkpointer,
    DirectoryStore,
    Joined,
    Retention,
    compact,
    compare,
    coordinated,
    export_zarr,
    generations,
    prune,
    restore,
    restore_share,
    tending,
    verify,
)
from dirtytrack.checkpoint.ranks import coordinating
from dirtytrack.errors import (
    CheckpointerClosed,
    DamagedCheckpoint,
    InvalidCheckpoint,
    InvalidMemory,
    NoSuchGeneration,
    RankFailed,
    RankLost,
    RanksDisagree,
    StoreBusy,
    StoreFailed,
)
from tests.ranking import ThreadRank, outcomes, ranks
from tests.saving import paged, scribble
from tests.storing import Failing

COLUMNS = 300  # rows are no pages


class Rank:
    """A rank's buffers: rows of a grid, a table that all have, and a few numbers of its own."""

    def __init__(self, comm: ThreadRank, rows: list[int], seed: int = 1) -> None:
        self.comm, self.rows = comm, rows
        self.grid = np.frombuffer(paged(-(-rows[comm.rank] * COLUMNS * 8 // 4096)), np.float64)
        self.grid = self.grid[: rows[comm.rank] * COLUMNS].reshape(rows[comm.rank], COLUMNS)
        self.table = np.zeros(5000, np.int32)
        self.own = paged(2)
        self.draw, self.common = random.Random(seed * 100 + comm.rank), random.Random(seed)

    @property
    def buffers(self) -> dict[str, Any]:
        return {"grid": self.grid, "table": self.table, "own": self.own}

    def work(self) -> None:
        scribble(self.grid, self.draw, 0.2)
        scribble(self.table, self.common, 0.3)
        scribble(self.own, self.draw, 0.5)

    def copy(self) -> dict[str, Any]:
        return {name: buffer.copy() for name, buffer in self.buffers.items()}

    def begin(self, where: Any, **options: Any) -> Any:
        return coordinated(
            self.comm, where, self.buffers, partition={"grid": 0}, replicated={"table"}, **{"threads": 1, **options}
        )


def require_joined(where: Path, parts: list[dict[str, Any]], generation: int | None = None) -> None:
    """What `restore` gives is what the ranks had."""
    state = restore(where, generation=generation, threads=1)
    assert state["grid"].tobytes() == np.concatenate([part["grid"] for part in parts]).tobytes()
    assert (state["table"] == parts[0]["table"]).all()
    for rank, part in enumerate(parts):
        assert (state[f"own[{rank}]"] == part["own"]).all()


def saved(where: Path, rows: list[int], *, steps: int = 3, seed: int = 1, **options: Any) -> list[list[dict[str, Any]]]:
    """Save a few generations; what the ranks had at each, by generation."""

    def work(comm: ThreadRank) -> list[dict[str, Any]]:
        rank, copies = Rank(comm, rows, seed), []
        with rank.begin(where, **options) as ckpt:
            for step in range(steps):
                rank.work()
                copies.append(rank.copy())
                save = ckpt.save({"step": step})
                assert save.wait(20)
                assert save.kind == ("increment" if step else "full")
        return copies

    return [list(parts) for parts in zip(*ranks(len(rows), work), strict=True)]


# ---- saving and restoring


@pytest.mark.parametrize("rows", [[7], [5, 9], [3, 1, 40, 2]], ids=str)
def test_each_generation_is_what_all_ranks_had(where: Path, rows: list[int]) -> None:
    truth = saved(where, rows)
    for number, parts in enumerate(truth, 1):
        require_joined(where, parts, number)
    state = restore(where)
    assert (state.generation, state.parent, state.meta) == (3, 2, {"step": 2})
    assert state["grid"].shape == (sum(rows), COLUMNS)
    assert isinstance(state.manifest.ranks, Joined)
    assert state.manifest.ranks.size == len(rows)
    report = verify(where, all=True)
    assert report.ok
    assert not report.strangers
    assert [each.kind for each in generations(where)] == ["full", "increment", "increment"]


def test_the_parts_are_stores_of_their_own(where: Path) -> None:
    saved(where, [5, 9])
    with DirectoryStore(where) as store:
        assert store.parts() == (0, 1)
        listed = generations(store)[-1]
        assert listed.segment_count == sum(generations(store.part(rank))[-1].segment_count or 0 for rank in (0, 1))
        assert listed.stored_nbytes == sum(generations(store.part(rank))[-1].stored_nbytes or 0 for rank in (0, 1))
    part = restore(where / "ranks" / "000001")
    assert set(part) == {"grid", "own"}
    assert part["grid"].shape == (9, COLUMNS)


def test_a_program_goes_on_with_an_increment(where: Path) -> None:
    rows = [6, 20]
    before = saved(where, rows)[-1]

    def work(comm: ThreadRank) -> dict[str, Any]:
        rank = Rank(comm, rows, seed=2)
        with rank.begin(where, resume=True) as ckpt:
            assert ckpt.resumed.meta == {"step": 2}
            for name, buffer in rank.buffers.items():
                assert buffer.tobytes() == before[comm.rank][name].tobytes()
                assert ckpt.resumed[name] is buffer
            rank.grid[0, 0] += 1
            copy = rank.copy()
            save = ckpt.save()
            assert save.wait(20)
            assert save.kind == "increment"
            assert save.bytes_dirty <= 3 * 4096
            assert ckpt.generation == save.generation == 4
        return copy

    require_joined(where, ranks(2, work))
    assert [each.parent for each in generations(where)] == [None, 1, 2, 3]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(1, 4), st.data())
def test_another_number_of_ranks(rows: list[int], size: int, data: st.DataObject) -> None:
    """Rows may go anywhere; what is each rank's own is left behind, by name."""
    total = sum(rows)
    size = min(size, total)
    cuts = (
        sorted(data.draw(st.sets(st.integers(1, total - 1), min_size=size - 1, max_size=size - 1))) if size > 1 else []
    )
    others = [high - low for low, high in zip([0, *cuts], [*cuts, total], strict=True)]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        where = Path(folder) / "store"
        parts: list[dict[str, Any]] = ranks(len(rows), lambda comm: shared_only(comm, where, rows, resume=False))
        grid = np.concatenate([part["grid"] for part in parts])

        def work(comm: ThreadRank) -> dict[str, Any]:
            low = sum(others[: comm.rank])
            state = restore_share(comm, where, threads=1)
            again = shared_only(comm, where, others, resume=True, expected=grid[low : low + others[comm.rank]])
            return {**again, "even": state["grid"]}

        after = ranks(size, work)
        assert np.concatenate([part["even"] for part in after]).tobytes() == grid.tobytes()
        lengths = [len(part["even"]) for part in after]
        assert max(lengths) - min(lengths) <= 1
        state = restore(where)
        assert state["grid"].tobytes() == np.concatenate([part["grid"] for part in after]).tobytes()
        assert verify(where, all=True).ok


def shared_only(
    comm: ThreadRank, where: Path, rows: list[int], *, resume: bool, expected: Any = None
) -> dict[str, Any]:
    """Save grid and table, twice."""
    rank = Rank(comm, rows, seed=len(rows))
    buffers = {"grid": rank.grid, "table": rank.table}
    with coordinated(
        comm, where, buffers, partition={"grid": 0}, replicated=["table"], resume=resume, threads=1
    ) as ckpt:
        if expected is not None:
            assert rank.grid.tobytes() == expected.tobytes()
            assert ckpt.resumed is not None
            assert ckpt.resumed["grid"] is rank.grid
        for step in range(2):
            rank.work()
            assert ckpt.save(step).wait(20)
    return {"grid": rank.grid.copy(), "table": rank.table.copy()}


def test_each_rank_reads_only_what_it_needs(where: Path) -> None:
    """Of four parts, with one gone: who needs nothing of it does not miss it."""
    rows = [10, 10, 10, 10]
    truth = saved(where, rows)[-1]
    shutil.rmtree(where / "ranks" / "000003")
    into = np.zeros((15, COLUMNS))

    def work(comm: ThreadRank) -> None:
        buffers = into if comm.rank == 0 else np.zeros((25, COLUMNS))
        restore_share(comm, where, into={"grid": buffers})

    first, second = outcomes(2, work)
    assert isinstance(first, RankFailed)
    assert first.ranks == (1,)
    assert isinstance(second, DamagedCheckpoint)
    assert "rank 3" in str(second)
    assert into.tobytes() == np.concatenate([part["grid"] for part in truth])[:15].tobytes()


# ---- what fails


def test_a_disk_that_is_full_at_one_rank_fails_all_and_loses_nothing(where: Path) -> None:
    rows, full = [6, 20], Failing()

    def work(comm: ThreadRank) -> dict[str, Any]:
        rank = Rank(comm, rows)
        store = DirectoryStore(where, create=True, files=full) if comm.rank else where
        with rank.begin(store) as ckpt:
            rank.work()
            assert ckpt.save(0).wait(20)
            for attempt in range(3):
                rank.work()
                if comm.rank:
                    full.nth, full.count, full.error, full.for_ever = 1, 0, errno.ENOSPC, True
                    full.only = ("pwrite", "create")
                save = ckpt.save(f"fails {attempt}")
                with pytest.raises(RankFailed, match=r"rank 1|this rank") as told:
                    save.wait(20)
                assert told.value.ranks == (1,)
                assert told.value.errno == errno.ENOSPC
                assert "No space left" in str(told.value)
                assert save.state == "failed"
                if comm.rank:
                    full.nth = 0
            rank.work()
            copy = rank.copy()
            save = ckpt.save("again")
            assert save.wait(20)
            assert save.kind == "increment"
        return copy

    with DirectoryStore(where, create=True):
        pass
    parts = ranks(2, work)
    require_joined(where, parts)
    assert [each.meta for each in generations(where)] == [0, "again"]
    report = verify(where, all=True)
    assert report.ok
    assert not report.strangers


def test_the_commit_itself_fails_at_rank_0(where: Path) -> None:
    """Every operation on the store of all, one after the other: whatever fails, all ranks know the same."""
    with DirectoryStore(where, create=True):
        pass
    failing = Failing()

    def work(comm: ThreadRank) -> tuple[dict[str, Any], list[int]]:
        rank, committed = Rank(comm, [3, 4]), []
        with rank.begin(where if comm.rank else DirectoryStore(where, files=failing)) as ckpt:
            rank.work()
            assert ckpt.save().wait(20)
            for nth in range(1, 60):
                rank.work()
                if not comm.rank:
                    failing.nth, failing.count = nth, 0
                save = ckpt.save(nth)
                try:
                    assert save.wait(20)
                    committed.append(save.generation or 0)
                    truth[comm.rank][save.generation or 0] = rank.copy()
                except RankFailed as error:
                    assert error.ranks == (0,)
                if not comm.rank:
                    failing.nth = 0
            assert ckpt.save("last").wait(20)
            if not comm.rank:  # to remove what failed saves had left went wrong too, and was another save's to do
                with pytest.raises(StoreFailed):
                    ckpt.wait()
            return rank.copy(), committed

    truth: list[dict[int, dict[str, Any]]] = [{}, {}]
    (one, committed), (other, others) = ranks(2, work)
    assert committed == others
    assert 5 < len(committed) < 55
    require_joined(where, [one, other])
    for generation in committed:
        require_joined(where, [truth[0][generation], truth[1][generation]], generation)
    go_on(where, [3, 4])


def go_on(where: Path, rows: list[int]) -> None:
    """Another run saves once; then nothing is left of what went wrong before."""

    def work(comm: ThreadRank) -> None:
        rank = Rank(comm, rows)
        with rank.begin(where, resume=True) as ckpt:
            assert ckpt.save().wait(20)

    ranks(len(rows), work)
    report = verify(where, all=True)
    assert report.ok
    assert not report.strangers


def test_a_rank_that_leaves_does_not_keep_the_others_waiting(where: Path) -> None:
    def work(comm: ThreadRank) -> str:
        rank = Rank(comm, [3, 4, 5])
        with rank.begin(where) as ckpt:
            rank.work()
            assert ckpt.save(1).wait(20)
            if comm.rank == 1:
                raise ZeroDivisionError("the program failed")
            save = ckpt.save(2)
            with pytest.raises(RankFailed, match=r"rank 1 saves no more .ZeroDivisionError: the program failed"):
                save.wait(20)
            with pytest.raises(RankFailed, match="rank 1 saves no more"):
                ckpt.save(3)
        with pytest.raises(CheckpointerClosed):
            ckpt.save(4)
        return "told"

    found = outcomes(3, work)
    assert found[0] == found[2] == "told"
    assert isinstance(found[1], ZeroDivisionError)
    assert restore(where).meta == 1


@pytest.mark.parametrize("under_way", [False, True])
def test_a_rank_that_leaves_by_an_error_does_not_wait_for_ever(
    where: Path, under_way: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For another one that waits for it, for something else: then the error would never be seen."""
    monkeypatch.setattr(coordinating, "_PATIENCE_SECONDS", 0.3)
    left = threading.Event()

    def work(comm: ThreadRank) -> str:
        rank = Rank(comm, [3, 4])
        try:
            with rank.begin(where) as ckpt:
                assert ckpt.save(1).wait(20)
                if comm.rank:
                    if under_way:
                        ckpt.save(2)
                    raise ZeroDivisionError("the program failed")
                assert left.wait(20), "it waits"
                with pytest.raises(RankFailed, match=r"rank 1 saves no more|rank 1 could not"):
                    ckpt.save(2).wait(20)
                    ckpt.save(3).wait(20)
        finally:
            if comm.rank:
                left.set()
        return "told"

    first, second = outcomes(2, work)
    assert isinstance(second, ZeroDivisionError)
    assert first == "told"
    assert restore(where).meta in (1, 2)
    go_on(where, [3, 4])


def test_a_save_that_raises_at_one_rank_fails_at_all(where: Path) -> None:
    def work(comm: ThreadRank) -> dict[str, Any]:
        rank = Rank(comm, [3, 4])
        fails = False

        def quiesce() -> Any:
            if fails:
                raise RuntimeError("cannot stand still")
            return nullcontext()

        with rank.begin(where, quiesce=quiesce) as ckpt:
            rank.work()
            assert ckpt.save().wait(20)
            rank.work()
            fails = comm.rank == 1
            if fails:
                with pytest.raises(RuntimeError, match="cannot stand still"):
                    ckpt.save()
            else:
                with pytest.raises(RankFailed, match=r"rank 1 could not .* RuntimeError: cannot stand still"):
                    ckpt.save().wait(20)
            fails = False
            copy = rank.copy()
            assert ckpt.save().wait(20)
        return copy

    require_joined(where, ranks(2, work))
    assert [each.generation for each in generations(where)] == [1, 3]


@pytest.mark.parametrize("after", [1, 2, 3, 4, 5, 8, 13])
def test_the_wire_is_cut(where: Path, after: int) -> None:
    """At any word: nobody hangs, what was reported is there, and another run goes on."""
    committed: list[set[int]] = [set(), set()]
    copies: list[dict[int, dict[str, Any]]] = [{}, {}]

    def work(comm: ThreadRank) -> None:
        rank = Rank(comm, [3, 4])
        with rank.begin(where) as ckpt:
            comm.cut_after = comm.said + after if comm.rank else None
            for _ in range(20):
                rank.work()
                save = ckpt.save()
                copies[comm.rank][save.generation or 0] = rank.copy()
                if save.wait(20):
                    committed[comm.rank].add(save.generation or 0)

    for each in outcomes(2, work):
        assert isinstance(each, RankLost)
    there = {each.generation for each in generations(where)}
    assert (committed[0] | committed[1]) <= there
    for generation in there:
        require_joined(where, [copies[0][generation], copies[1][generation]], generation)

    go_on(where, [3, 4])


# ---- what the ranks give does not fit together


def refused(
    where: Path, *, buffers: dict[str, Any] | None = None, without: str = "", place: Path | None = None, **given: Any
) -> list[Any]:
    """What both ranks raise, where the last one gives something else."""

    def work(comm: ThreadRank) -> None:
        rank = Rank(comm, [3, 3])
        mine, options = rank.buffers, {"partition": {"grid": 0}, "replicated": {"table"}, "threads": 1}
        if comm.rank:
            mine = {name: buffer for name, buffer in (mine | (buffers or {})).items() if name != without}
            options |= given
        begin: Any = coordinated
        begin(comm, place if comm.rank and place else where, mine, **options).close()

    return outcomes(2, work)


@pytest.mark.parametrize(
    ("given", "kind", "says"),
    [
        ({"partition": {}}, RanksDisagree, "partition= or replicated= is another at rank 1"),
        ({"resume": True}, RanksDisagree, "resume= is another at rank 1"),
        ({"buffers": {"grid": np.zeros((3, 7))}}, RanksDisagree, "'grid' is partitioned .* at rank 1"),
        ({"buffers": {"grid": np.zeros((3, COLUMNS), np.float32)}}, RanksDisagree, "at rank 1 <f4"),
        ({"buffers": {"table": np.zeros(4999, np.int32)}}, RanksDisagree, "'table' is replicated"),
        ({"without": "grid"}, InvalidCheckpoint, "no buffer 'grid' to be partitioned"),
        ({"buffers": {"own": [1]}}, InvalidMemory, "own"),
        ({"partition": {"grid": 1}}, InvalidCheckpoint, "along axis 1"),
        ({"when_busy": "skip"}, InvalidCheckpoint, "when_busy"),
        ({"level": 99}, InvalidCheckpoint, "level"),
        ({"replicated": "table"}, InvalidCheckpoint, "collection of names"),
        ({"colour": 1}, TypeError, "colour"),
    ],
)
def test_ranks_that_disagree(where: Path, given: dict[str, Any], kind: type[Exception], says: str) -> None:
    first, last = refused(where, **given)
    assert isinstance(last, kind)
    assert re.search(says, str(last))
    assert isinstance(first, (RankFailed, RanksDisagree))
    assert "rank 1" in str(first)
    if (where / "manifests").exists():
        assert not generations(where)
    saved(where, [2, 2], steps=1)  # nothing is left in the way


def test_another_store(where: Path) -> None:
    DirectoryStore(where.with_name("other"), create=True).close()
    first, last = refused(where, place=where.with_name("other"))
    assert isinstance(last, RanksDisagree)
    assert "another store here than at rank 0" in str(last)
    assert isinstance(first, RankFailed)
    first, last = refused(where, place=where.with_name("nowhere"))
    assert isinstance(last, InvalidCheckpoint)
    assert isinstance(first, RankFailed)


def test_other_steps(where: Path) -> None:
    def work(comm: ThreadRank) -> None:
        rank = Rank(comm, [3, 4])
        with rank.begin(where) as ckpt:
            with pytest.raises(RanksDisagree, match="different meta"):
                ckpt.save({"step": comm.rank}).wait(20)
            assert ckpt.save({"step": 1}).wait(20)

    ranks(2, work)


@pytest.mark.parametrize("comm", [None, 7, object(), "COMM_WORLD"], ids=str)
def test_no_communicator(where: Path, comm: Any) -> None:
    with pytest.raises(InvalidCheckpoint, match="communicator of mpi4py"):
        coordinated(comm, where, {"x": paged(1)})
    with pytest.raises(InvalidCheckpoint, match="communicator of mpi4py"):
        restore_share(comm, where)


def test_two_programs_at_once(where: Path) -> None:
    def work(comm: ThreadRank) -> None:
        rank = Rank(comm, [3, 4])
        with rank.begin(where) as ckpt:
            assert ckpt.save().wait(20)
            if not comm.rank:
                first, second = refused(where)
                assert isinstance(first, StoreBusy)
                assert isinstance(second, RankFailed)
            assert ckpt.save().wait(20)

    ranks(2, work)


def test_what_cannot_be_divided(where: Path) -> None:
    saved(where, [1, 2])

    def share(size: int, **options: Any) -> list[Any]:
        return outcomes(size, lambda comm: restore_share(comm, where, **options))

    for each in share(4, names=["grid"]):
        assert isinstance(each, InvalidCheckpoint)
        assert "3 rows, which cannot be divided among 4 ranks" in str(each)
    for each in share(3):
        assert isinstance(each, InvalidCheckpoint)
        assert "'own' is each rank's own" in str(each)
    for each in share(2, into={"grid": np.zeros((2, COLUMNS))}):
        assert isinstance(each, InvalidMemory)
        assert "together have room for" in str(each)
    for each in share(2, names=["colour"]):
        assert isinstance(each, InvalidCheckpoint)
        assert "'colour'" in str(each)
    for each in share(2, generation=9):
        assert isinstance(each, (NoSuchGeneration, RankFailed))

    def resumed(comm: ThreadRank) -> None:
        Rank(comm, [1, 1, 1]).begin(where, resume=True)

    for each in outcomes(3, resumed):
        assert isinstance(each, InvalidCheckpoint)
        assert "'own'" in str(each)


def test_one_process_does_not_go_on_from_many(where: Path) -> None:
    saved(where, [2, 3])
    grid, table = np.zeros((5, COLUMNS)), np.zeros(5000, np.int32)
    with pytest.raises(InvalidCheckpoint, match="saved by many ranks together"):
        Checkpointer(where, {"grid": grid, "table": table}, resume=True)
    with pytest.raises(InvalidCheckpoint, match="saved by many ranks together"):
        Checkpointer(where / "ranks" / "000001", {"grid": grid[:3], "own": paged(2)}, resume=True)
    with Checkpointer(where.with_name("plain"), {"grid": grid}) as ckpt:
        ckpt.save()
    for each in outcomes(2, lambda comm: Rank(comm, [2, 3]).begin(where.with_name("plain"), resume=True)):
        assert isinstance(each, (InvalidCheckpoint, RankFailed))
        assert "none that ranks saved together" in str(each)


# ---- other buffers, while it runs


def test_rows_move_and_buffers_come_and_go(where: Path) -> None:
    def work(comm: ThreadRank) -> list[dict[str, Any]]:
        rank, copies = Rank(comm, [6, 20]), []
        more, shared, own = paged(3).reshape(3, 4096), paged(1), paged(1)
        with rank.begin(where) as ckpt:

            def save(**others: Any) -> None:
                rank.work()
                copies.append({**rank.copy(), **{name: buffer.copy() for name, buffer in others.items()}})
                saves.append(ckpt.save())

            saves: list[Any] = []
            save()
            if comm.rank:  # four rows go from rank 1 to rank 0; while the save before is under way
                rank.grid = rank.grid[:16].copy()
            else:
                rank.grid = np.concatenate([rank.grid, rank.grid[:4]])
            ckpt.replace("grid", rank.grid)
            save()
            ckpt.add("more", more, partition=0)
            ckpt.add("shared", shared, replicated=True)
            ckpt.add("later", own)
            more[:], shared[:], own[:] = comm.rank + 1, 7, comm.rank + 3
            save(more=more, shared=shared, later=own)
            ckpt.remove("more")
            ckpt.remove("shared")
            ckpt.remove("later")
            save()
            for each in saves:
                assert each.wait(20)
        return copies

    truth = [list(parts) for parts in zip(*ranks(2, work), strict=True)]
    for number, parts in enumerate(truth, 1):
        require_joined(where, parts, number)
        assert ("more" in restore(where, generation=number)) == (number == 3)
    state = restore(where, generation=3)
    assert state["more"].shape == (6, 4096)
    assert (state["more"] == np.repeat([1, 2], 3)[:, None]).all()
    assert (state["shared"] == 7).all()
    assert [state[f"later[{rank}]"][0] for rank in range(2)] == [3, 4]
    assert verify(where, all=True).ok


def test_a_buffer_that_is_added_at_one_rank_only(where: Path) -> None:
    def work(comm: ThreadRank) -> None:
        rank = Rank(comm, [6, 20])
        with rank.begin(where) as ckpt:
            ckpt.save().wait(20)
            if comm.rank:
                ckpt.add("more", paged(1), partition=0)
            with pytest.raises(RanksDisagree, match="different buffers are partitioned"):
                ckpt.save().wait(20)
            if comm.rank:
                ckpt.remove("more")
            with pytest.raises(InvalidCheckpoint, match="along axis 1"):
                ckpt.add("more", paged(1), partition=1)
            with pytest.raises(InvalidMemory, match="there is no buffer 'colour'"):
                ckpt.remove("colour")
            assert ckpt.save().wait(20)

    ranks(2, work)


# ---- ranks that have nothing of their own


@pytest.mark.parametrize("lone", [0, 1])
def test_a_rank_without_buffers(where: Path, lone: int) -> None:
    """Rank 0 saves what is replicated for all, so that rank 1 has nothing to; or rank 0 has none, and coordinates."""

    def work(comm: ThreadRank, resume: bool) -> None:
        data = paged(4)
        buffers = {"data": data} if lone or comm.rank else {}
        with coordinated(comm, where, buffers, replicated=["data"] if lone else [], resume=resume) as ckpt:
            if resume:
                assert ckpt.resumed is not None
                assert ckpt.resumed.meta == 2
                assert not buffers or (data == 8).all()
            for step in range(3):
                data[:] = step + 6
                save = ckpt.save(step)
                assert save.wait(20)
                assert ckpt.generation == save.generation
            with pytest.raises(RanksDisagree):
                ckpt.save(comm.rank).wait(20)
            assert ckpt.wait(20)

    ranks(2, lambda comm: work(comm, False))
    assert (restore(where)["data" if lone else "data[1]"] == 8).all()
    ranks(2, lambda comm: work(comm, True))
    assert [each.generation for each in generations(where)] == [1, 2, 3, 5, 6, 7]
    assert verify(where, all=True).ok


@pytest.mark.parametrize("lone", [0, 1])
def test_a_rank_that_had_no_buffer_gets_one(where: Path, lone: int) -> None:
    """Behind saves that are under way; and when a run that had one there left a generation that never came to be."""

    def before(comm: ThreadRank) -> None:
        with coordinated(comm, where, {"data": paged(2)}) as ckpt:
            ckpt.save().wait(20)

    ranks(2, before)
    with DirectoryStore(where) as store, store.part(lone) as part, part.writer() as writer:
        writer.publish(replace(part.manifest(1), generation=5, parent=None))  # prepared, and then all were killed

    def work(comm: ThreadRank) -> None:
        data, more = paged(4), paged(2)
        with coordinated(comm, where, {} if comm.rank == lone else {"data": data}) as ckpt:
            saves = [ckpt.save()]
            if comm.rank == lone:
                with pytest.raises(InvalidMemory, match="no buffer yet"):
                    ckpt.remove("more")
            ckpt.add("more", more, partition=0)
            assert ckpt.buffers == (("more",) if comm.rank == lone else ("data", "more"))
            for step in range(4):
                more[:] = 10 * step + comm.rank
                saves.append(ckpt.save())
            for save in saves:
                assert save.wait(20)
        with pytest.raises(CheckpointerClosed):
            ckpt.add("other", paged(1))

    ranks(2, work)
    newest = generations(where)[-1].generation
    for step in range(4):
        state = restore(where, generation=newest - 3 + step)
        assert (state["more"] == np.repeat([10 * step, 10 * step + 1], 2 * 4096)).all()
    assert "more" not in restore(where, generation=newest - 4)
    assert verify(where, all=True).ok


# ---- what is kept


def test_what_is_not_kept_goes_at_all_ranks(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tending, "_SPARE_NBYTES", 1 << 10)

    def work(comm: ThreadRank) -> dict[str, Any]:
        rank = Rank(comm, [6, 20])
        with rank.begin(where, retain=Retention(last=2, every=7), compact=0.3) as ckpt:
            for _ in range(12):
                rank.work()
                assert ckpt.save().wait(20)
        return rank.copy()

    parts = ranks(2, work)
    require_joined(where, parts)
    assert [each.generation for each in generations(where)] == [7, 11, 12]
    for rank in range(2):
        kept = {each.generation for each in generations(where / "ranks" / f"00000{rank}")}
        assert {7, 11, 12} <= kept <= {*range(6, 13)}  # one that is being compacted stays until that is over
    assert verify(where, all=True).ok

    def again(comm: ThreadRank) -> None:
        rank = Rank(comm, [6, 20])
        with rank.begin(where, resume=7) as ckpt:
            assert ckpt.save().wait(20)

    ranks(2, again)
    for rank in range(2):
        assert [each.generation for each in generations(where / "ranks" / f"00000{rank}")] == [7, 11, 12, 13]


def test_what_ranks_that_are_no_more_had_goes_too(where: Path) -> None:
    rows = [3, 3, 3, 3, 3]

    def work(comm: ThreadRank) -> None:
        rank = Rank(comm, [8, 7] if comm.size == 2 else rows)
        buffers = {"grid": rank.grid}
        with coordinated(
            comm, where, buffers, partition={"grid": 0}, resume=comm.size == 2, retain=Retention(last=2)
        ) as ckpt:
            for step in range(3):
                rank.work()
                assert ckpt.save(step).wait(20)

    ranks(5, work)
    assert all(generations(where / "ranks" / f"00000{rank}") for rank in range(5))
    ranks(2, work)
    assert [each.generation for each in generations(where)] == [5, 6]
    for rank in range(5):
        there = [each.generation for each in generations(where / "ranks" / f"00000{rank}")]
        assert there == ([5, 6] if rank < 2 else [])
        if rank >= 2:
            assert not list((where / "ranks" / f"00000{rank}" / "segments").iterdir())
    assert verify(where, all=True).ok


def test_compact_and_prune_reach_the_parts(where: Path) -> None:
    truth = saved(where, [6, 20], steps=6)
    made = compact(where)
    assert made.generation == 6
    for rank in range(2):
        assert generations(where / "ranks" / f"00000{rank}")[-1].kind == "compacted"
    require_joined(where, truth[-1])
    assert prune(where, Retention(last=2)).removed == (1, 2, 3, 4)
    for rank in range(2):
        assert [each.generation for each in generations(where / "ranks" / f"00000{rank}")] == [5, 6]
    for generation in (5, 6):
        require_joined(where, truth[generation - 1], generation)
    found = compare(where, 5, 6)
    changed = sum(
        int((truth[4][rank]["grid"].view(np.uint8) != truth[5][rank]["grid"].view(np.uint8)).sum()) for rank in range(2)
    )
    assert next(each for each in found.regions if each.name == "grid").changed_nbytes == changed
    assert verify(where, all=True).ok


def test_an_export_joins_the_parts(where: Path, tmp_path: Path) -> None:
    zarr: Any = pytest.importorskip("zarr", minversion="3.1", reason="zarr 3 needs Python 3.11")
    parts = saved(where, [6, 20])[-1]
    export_zarr(where, tmp_path / "zarr")
    grid = np.asarray(zarr.open_group(tmp_path / "zarr", mode="r")["grid"])
    assert grid.tobytes() == np.concatenate([part["grid"] for part in parts]).tobytes()


# ---- damage


def test_damage_is_told_by_rank_and_an_older_generation_taken(where: Path) -> None:
    truth = saved(where, [6, 20])
    segment = max((where / "ranks" / "000001" / "segments").iterdir())
    data = bytearray(segment.read_bytes())
    data[4100] ^= 1
    segment.write_bytes(data)
    report = verify(where)
    assert not report.ok
    assert report.checked[0].damage[0].startswith("rank 1: ")
    assert verify(where, 2).ok
    with pytest.raises(DamagedCheckpoint, match=r"rank 1: .*Generation 2 is whole"):
        restore(where)
    state = restore(where, fallback=True)
    assert state.generation == 2
    assert state["grid"].tobytes() == np.concatenate([part["grid"] for part in truth[1]]).tobytes()


def test_a_part_is_missing(where: Path) -> None:
    saved(where, [6, 20])
    shutil.rmtree(where / "ranks" / "000001")
    with pytest.raises(DamagedCheckpoint, match="rank 1: its part is not there"):
        restore(where)
    assert "rank 1" in verify(where).checked[0].damage[0]
    assert "rank 1" in generations(where)[-1].damage[0]

    def work(comm: ThreadRank) -> None:
        Rank(comm, [6, 20]).begin(where, resume=True)

    first, second = outcomes(2, work)
    assert isinstance(second, DamagedCheckpoint)
    assert isinstance(first, RankFailed)


# ---- on the command line


def test_the_command_line_knows_of_ranks(where: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = saved(where, [6, 20])[-1]
    store = str(where)

    def told(*words: str) -> str:
        assert cli.main(["ckpt", *words]) == 0
        return capsys.readouterr().out

    assert "increment" in told("ls", store)
    shown = told("show", store)
    assert "own[1]" in shown
    assert "RANK" in shown
    assert json.loads(told("show", store, "--json"))["ranks"]["parts"][1]["segment_count"] == 3
    assert "nothing is damaged" in told("verify", store, "--all")
    told("restore", store, "-o", str(tmp_path / "out"))
    grid = np.load(tmp_path / "out" / "grid.npy")
    assert grid.tobytes() == np.concatenate([part["grid"] for part in parts]).tobytes()
    assert "changed" in told("diff", store, "1", "3")
    assert "the parts of 2 ranks" in told("compact", store)
    assert "2 removed: 1 2" in told("prune", store, "--last", "1")
    assert restore(where)["grid"].tobytes() == grid.tobytes()

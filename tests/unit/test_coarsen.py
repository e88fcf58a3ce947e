# SPDX-License-Identifier: MIT
"""Recordings under a size budget, against the obvious model: sets of page numbers."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dirtytrack import DirtySet
from dirtytrack.errors import LimitReached
from dirtytrack.observe import Recording, RecordingWriter
from dirtytrack.observe.workingset import Trace
from dirtytrack.observe.written import Written
from tests.recorded import BASE, mapping, pages_of, runs_of
from tests.strategies import page_sets

PAGES = 300


def model_cells(pages: frozenset[int] | set[int], unit: int) -> dict[int, int]:
    cells: dict[int, int] = {}
    for page in pages:
        cells[page // unit] = cells.get(page // unit, 0) + 1
    return cells


def cells_of(what: Written) -> dict[int, int]:
    return {
        start + i: count
        for start, length, count in zip(what.starts.tolist(), what.lengths.tolist(), what.counts.tolist(), strict=True)
        for i in range(length)
    }


def written(pages: frozenset[int]) -> Written:
    return Written.of(runs_of(pages, 0), 12)


@given(page_sets(PAGES), page_sets(PAGES), st.integers(0, 5), st.integers(0, 5))
def test_cells_count_what_was_written_at_least_once(a: frozenset[int], b: frozenset[int], one: int, other: int) -> None:
    coarse = written(a).coarser(one)
    assert cells_of(coarse) == model_cells(a, 1 << one)
    assert coarse.page_count == len(a)
    assert cells_of(coarse.coarser(max(one, other))) == model_cells(a, 1 << max(one, other))
    assert cells_of(written(a) | written(b)) == model_cells(a | b, 1)
    both = cells_of(coarse | written(b).coarser(other))
    unit = 1 << max(one, other)
    union = model_cells(a | b, unit)
    assert both.keys() == union.keys()
    for cell, count in both.items():
        assert union[cell] <= count <= min(unit, model_cells(a, unit).get(cell, 0) + model_cells(b, unit).get(cell, 0))


@given(st.randoms(use_true_random=False), st.integers(1, 60), st.sampled_from((16 << 10, 20 << 10, 50 << 10)))
@settings(max_examples=12)
def test_a_budget_is_kept_and_nothing_written_is_lost(
    tmp_path_factory: pytest.TempPathFactory, random: Random, count: int, budget: int
) -> None:
    path = tmp_path_factory.mktemp("recording") / "r"
    generator = np.random.default_rng(random.getrandbits(32))
    truth = [
        frozenset((generator.integers(0, 20_000, generator.integers(0, 1500)) // 3 * 3).tolist()) for _ in range(count)
    ]
    table = (mapping(0, 20_000, "[heap]"),)
    with RecordingWriter(path, size_budget=budget) as writer:
        for i, pages in enumerate(truth):
            writer.write(runs_of(pages), table, number=i + 1, begun=float(i), ended=i + 1.0)
            assert writer.nbytes == path.stat().st_size <= budget
    assert path.stat().st_size <= budget
    recording = Recording.open(path)
    first = 0
    for epoch in recording:
        assert epoch.number == first + 1
        assert epoch.seconds == pytest.approx(epoch.epochs)
        union = frozenset[int]().union(*truth[first : first + epoch.epochs])
        unit = epoch.coarse
        told = {cell - BASE // unit: pages for cell, pages in cells_of(epoch.written).items()}
        true = {page - BASE // unit: n for page, n in model_cells({BASE + page for page in union}, unit).items()}
        assert told.keys() == true.keys()
        assert all(true[cell] <= pages <= unit for cell, pages in told.items())
        assert union <= pages_of(epoch.runs)
        if epoch.exact:
            assert union == pages_of(epoch.runs)
        assert epoch.mappings == table
        first += epoch.epochs
    assert first == count
    assert recording[-1].exact


def test_mappings_that_are_gone_are_told_while_there_is_room(tmp_path: Path) -> None:
    path = tmp_path / "r"
    gone, unwritten, stays = mapping(0, 100, "gone"), mapping(100, 200, "unwritten"), mapping(200, 4000, "stays")
    with RecordingWriter(path, size_budget=16 << 10) as writer:
        writer.write(runs_of({5}), (gone, unwritten, stays), number=1, begun=0.0, ended=1.0)
        random = np.random.default_rng(5)
        for i in range(1, 60):
            pages = set(random.integers(200, 4000, 300).tolist())
            writer.write(runs_of(pages), (stays,), number=i + 1, begun=float(i), ended=i + 1.0)
    first = Recording.open(path)[0]
    assert first.epochs > 1
    assert first.mappings == (gone, stays)


def test_large_epochs_under_a_small_budget_while_mappings_come_and_go(tmp_path: Path) -> None:
    """Not even the newest epoch stays as it is; what is appended goes on from the table that was in force."""
    path, random = tmp_path / "r", np.random.default_rng(8)
    tables = [tuple(mapping(at, at + 90, f"m{i}-{at}") for at in range(i * 100, 30_000, 3000)) for i in range(12)]
    with RecordingWriter(path, size_budget=16 << 10) as writer:
        for i, table in enumerate(tables):
            pages = set(random.integers(0, 30_000, 12_000).tolist())
            writer.write(runs_of(pages), table, number=i + 1, begun=float(i), ended=i + 1.0)
            recording = Recording.open(path)
            assert recording[-1].page_count >= len(pages)
            assert set(recording[-1].mappings) >= set(table)
            assert set(recording._table) == set(table)  # in force for what comes next
            assert sum(epoch.epochs for epoch in recording) == i + 1
    assert path.stat().st_size <= 16 << 10


def test_coarsening_in_the_background_loses_nothing(tmp_path: Path) -> None:
    path, random, truth = tmp_path / "r", np.random.default_rng(9), list[set[int]]()
    with RecordingWriter(path, size_budget=40 << 10) as writer:
        for i in range(150):
            truth.append(set(random.integers(0, 5000, 300).tolist()))
            writer.write(
                runs_of(truth[-1]), (mapping(0, 5000 + i // 3, "m"),), number=i + 1, begun=i * 1.0, ended=i + 1.0
            )
            if i % 40 == 39 and writer._coarser is not None:
                writer._coarser._thread.join()
        assert writer.coarsening_seconds > 0
    recording, first = Recording.open(path), 0
    assert recording[-1].exact
    for epoch in recording:
        union = set[int]().union(*truth[first : first + epoch.epochs])
        assert union <= pages_of(epoch.runs)
        assert epoch.page_count >= len(union)
        first += epoch.epochs
        assert mapping(0, 5000 + (first - 1) // 3, "m") in epoch.mappings
    assert first == 150


def test_a_table_that_does_not_fit_into_the_budget(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    table = tuple(mapping(i, i + 1, random.bytes(40).hex()) for i in range(2000))
    with RecordingWriter(tmp_path / "r", size_budget=16 << 10) as writer:
        writer.write(runs_of({1}), (), number=1, begun=0.0, ended=1.0)
        with pytest.raises(LimitReached, match="larger size_budget"):
            writer.write(runs_of({2}), table, number=2, begun=1.0, ended=2.0)
        writer.write(runs_of({3}), (), number=3, begun=2.0, ended=3.0)  # the second was not written
    assert [pages_of(epoch.runs) for epoch in Recording.open(tmp_path / "r")] == [{1}, {3}]


def test_more_pages_than_can_be_looked_at_one_by_one(tmp_path: Path) -> None:
    """A reservation of 64 TiB that was told as written: runs say so in a few bytes, and nothing takes all memory."""
    runs = DirtySet.from_runs([(1 << 12, 1 << 46)]).runs
    with RecordingWriter(tmp_path / "r") as writer:
        writer.write(runs, [], number=1, begun=0.0, ended=1.0)
    recording = Recording.open(tmp_path / "r")
    assert recording[0].page_count == (1 << 34) - 1
    assert (recording[0].written | recording[0].written).page_count == (1 << 34) - 1
    with pytest.raises(LimitReached, match="one by one"):
        Trace(recording)
    with pytest.raises(LimitReached, match="one by one"):
        recording[0].written.coarser(1)
    assert recording[0].written.coarser(20).page_count == (1 << 34) - 1

# SPDX-License-Identifier: MIT
"""The numbers in docs/performance.md are those of docs/benchmarks.json, and so are the plots."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import BENCHMARKS, BY_NAME, write

DOCS = Path(__file__).parents[2] / "docs"
TOLD = json.loads((DOCS / "benchmarks.json").read_text(encoding="utf-8"))
PAGE = (DOCS / "performance.md").read_text(encoding="utf-8")


def test_the_tables_are_what_was_measured() -> None:
    assert runpy.run_path(str(DOCS / "draw_tables.py"))["render"](PAGE, TOLD) == PAGE


def test_each_benchmark_has_its_table() -> None:
    assert set(re.findall(r"<!-- table: (\w+) -->", PAGE)) == {row["benchmark"] for row in TOLD["rows"]}


def test_what_make_bench_docs_measures_is_what_has_a_table() -> None:
    assert set(re.findall(r"<!-- table: (\w+) -->", PAGE)) == set(BENCHMARKS) - BY_NAME


def test_a_part_that_is_measured_anew_leaves_the_others(tmp_path: Path) -> None:
    def rows(name: str, ours_ns: float) -> list[dict[str, Any]]:
        return [{"benchmark": name, "name": f"{name} a", "ours_ns": ours_ns, "target": "", "ok": True}]

    file, first = tmp_path / "told.json", {"date": "2026-01-01", "machine": "M", "kernel": "K", "python": "P"}
    write(file, first, rows("collect", 1) + rows("delta", 1) + rows("policy", 1))
    write(file, first | {"date": "2026-01-02", "command": "C"}, rows("policy", 2))
    write(file, first | {"date": "2026-01-03", "command": "C"}, rows("delta", 3))
    told = json.loads(file.read_text(encoding="utf-8"))
    assert [(row["benchmark"], row["ours_ns"]) for row in told["rows"]] == [("collect", 1), ("delta", 3), ("policy", 2)]
    assert told["elsewhere"] == {"collect": "K, M, P, 2026-01-01", "policy": "K, M, P, 2026-01-02"}
    said = runpy.run_path(str(DOCS / "draw_tables.py"))["render"]("<!-- machine --><!-- end -->", told)
    assert "2026-01-03" in said
    assert "`collect`: K, M, P, 2026-01-01." in said


def test_what_saves_cost_is_what_was_measured() -> None:
    page = (DOCS / "checkpoint.md").read_text(encoding="utf-8")
    told = json.loads((DOCS / "checkpointing.json").read_text(encoding="utf-8"))
    assert runpy.run_path(str(DOCS / "draw_tables.py"))["render"](page, told) == page
    assert set(re.findall(r"<!-- table: (\w+) -->", page)) == {row["benchmark"] for row in told["rows"]}
    assert (DOCS / "saving.svg").read_text(encoding="utf-8") == runpy.run_path(str(DOCS / "draw_saving.py"))["draw"](
        told
    )


def test_what_following_a_tracked_array_costs_is_what_was_measured() -> None:
    page = (DOCS / "formats.md").read_text(encoding="utf-8")
    told = json.loads((DOCS / "formats.json").read_text(encoding="utf-8"))
    assert runpy.run_path(str(DOCS / "draw_tables.py"))["render"](page, told) == page
    assert {row["benchmark"] for row in told["rows"]} == set(re.findall(r"<!-- table: (\w+) -->", page))


def test_no_time_stands_outside_the_tables() -> None:
    prose = re.sub(r"<!-- (?:machine|missed|table: \w+) -->.*?<!-- end -->", "", PAGE, flags=re.DOTALL)
    typed = re.findall(r"\d[\d.]* (?:ns|ms|s|million)\b|\d[\d.]* µs", prose)
    assert typed == ["2 µs"], "by hand: only the target is; make bench-docs writes the rest"


def test_what_recording_costs_is_what_was_measured() -> None:
    page = (DOCS / "observe.md").read_text(encoding="utf-8")
    told = json.loads((DOCS / "observing.json").read_text(encoding="utf-8"))
    assert runpy.run_path(str(DOCS / "draw_observing.py"))["render"](page, told) == page
    assert all(f"| {row['load']} |" in page for row in told["rows"])
    assert told["rows"]


def test_what_barriers_cost_is_what_was_measured() -> None:
    page = (DOCS / "gc.md").read_text(encoding="utf-8")
    told = json.loads((DOCS / "barriers.json").read_text(encoding="utf-8"))
    script = runpy.run_path(str(DOCS / "draw_barriers.py"))
    assert script["render"](page, told) == page
    assert set(re.findall(r"<!-- barriers: (\w+) -->", page)) == set(script["PARTS"])
    assert (DOCS / "barriers.svg").read_text(encoding="utf-8") == script["draw"](told)
    assert {row.get("barrier") for row in told["rows"]} >= {"none", "cards", "mprotect", "plain", "adaptive"}


def test_what_ranks_cost_is_what_was_measured() -> None:
    page = (DOCS / "ranks.md").read_text(encoding="utf-8")
    told = json.loads((DOCS / "ranks.json").read_text(encoding="utf-8"))
    assert runpy.run_path(str(DOCS / "draw_ranks.py"))["render"](page, told) == page
    assert [row["ranks"] for row in told["rows"]] == [1, 2, 4]
    assert told["modelled"][-1]["ranks"] == 10_000


@pytest.mark.parametrize(("script", "plot"), [("draw_epochs.py", "epochs.svg"), ("draw_density.py", "density.svg")])
def test_the_plots_are_what_was_measured(script: str, plot: str) -> None:
    draw = runpy.run_path(str(DOCS / script))["draw"]
    assert (DOCS / plot).read_text(encoding="utf-8") == draw(TOLD)


def test_what_migrations_cost_is_what_was_measured() -> None:
    page = (DOCS / "migration.md").read_text(encoding="utf-8")
    bulk, told = (json.loads((DOCS / name).read_text(encoding="utf-8")) for name in ("moving.json", "migrating.json"))
    drawn = runpy.run_path(str(DOCS / "draw_migration.py"))
    assert drawn["render_bulk"](drawn["render"](page, told), bulk) == page
    assert all(row["name"] in page for row in bulk["rows"])
    assert {row["who"].partition(",")[0] for row in told["rows"]} == {"dirtytrack", "QEMU"}
    assert drawn["draw"](told) == (DOCS / "migrating.svg").read_text(encoding="utf-8")

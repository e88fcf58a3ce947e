# SPDX-License-Identifier: MIT
"""The benchmark of write barriers runs, each barrier finds every slot, and its page is written from what came out."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
BARRIERS = ["none", "cards", "mprotect", "plain", "adaptive"]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("barriers")
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks", target_is_directory=True)
    words = [sys.executable, "-m", "benchmarks.gc_barriers", "--tiny", "--write", "told.json"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr  # it ends so where a barrier finds another number of slots
    out: dict[str, Any] = json.loads((folder / "told.json").read_text(encoding="utf-8"))
    return out


@pytest.mark.unsanitized  # programs of their own, which the sanitizer's LD_PRELOAD would go into
@pytest.mark.timeout(240)
def test_each_barrier_runs_each_program(told: dict[str, Any]) -> None:
    rows = told["rows"]
    measured = [row["barrier"] for row in rows if row["program"] == "gcbench"]
    libgc = [] if told["without_libgc"] else ["stop", "incremental", "generational"]
    assert measured == [*BARRIERS, *libgc]
    assert [row["barrier"] for row in rows if row["program"] == "stores"] == BARRIERS * 2
    barriers = [row for row in rows if row["program"] in ("gcbench", "stores")]
    assert all(row["total_ns"] > 0 and row["pause_p50_ns"] <= row["pause_max_ns"] for row in barriers)
    assert all(row["pauses"] == 2 for row in rows if row["program"] == "stores")


@pytest.mark.unsanitized
def test_a_reservation_is_measured_in_each_way(told: dict[str, Any]) -> None:
    rows = {row["how"]: row for row in told["rows"] if row["program"] == "reservation"}
    assert list(rows) == ["alone", "untracked", "sparse", "markers"]
    assert all(row["fork_ns"] > 0 for row in rows.values())
    assert rows["markers"]["page_table_bytes"] > 8 * rows["sparse"]["page_table_bytes"]


@pytest.mark.unsanitized
def test_some_parts_may_be_measured_anew(told: dict[str, Any], tmp_path: Path) -> None:
    before = {**told, "rows": [{**row, "old": True} for row in told["rows"]]}
    (tmp_path / "told.json").write_text(json.dumps(before), encoding="utf-8")
    words = [sys.executable, "-m", "benchmarks.gc_barriers", "--tiny", "--only", "reservations", "--write"]
    subprocess.run([*words, str(tmp_path / "told.json")], cwd=ROOT, check=True, capture_output=True, timeout=100)
    rows = json.loads((tmp_path / "told.json").read_text(encoding="utf-8"))["rows"]
    assert len(rows) == len(told["rows"])
    assert all(row.get("old", False) == (row["program"] != "reservation") for row in rows)
    script = runpy.run_path(str(ROOT / "docs" / "draw_barriers.py"))
    assert script["search"](told).count("\n| 64 KiB, 0.001 dirty") == 2


@pytest.mark.unsanitized
def test_a_page_without_libgc_says_so(told: dict[str, Any]) -> None:
    script = runpy.run_path(str(ROOT / "docs" / "draw_barriers.py"))
    rows = [row for row in told["rows"] if row.get("barrier") in BARRIERS]
    page = script["render"]("<!-- barriers: gcbench -->\n<!-- end -->", {"rows": rows, "without_libgc": "no libgc"})
    assert "| software cards, 512 B |" in page
    assert page.endswith("\nno libgc\n\n<!-- end -->")

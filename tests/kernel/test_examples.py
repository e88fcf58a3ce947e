# SPDX-License-Identifier: MIT
"""The examples do what they say, and the benchmarks run. What the benchmarks measure is no assertion here."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
CONSUMERS = (["checkpoint"],)  # packages beside the core, which have front doors of their own
BENCHMARKS = (
    *("collect", "listeners", "gather", "collect_into", "changed", "algebra", "import"),
    *("regions", "remedies", "epoch", "gc", "checkpoint", "checkpoint_beside", "checkpoint_restore"),
)


def run(*arguments: str, cwd: Path) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, check=False, cwd=cwd, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


def test_the_examples_are_there() -> None:
    assert [path.stem for path in EXAMPLES] == [
        "gc_write_barrier",
        "incremental_checkpoint",
        "precopy_migration",
        "ranks_simulation",
        "resumed_simulation",
    ]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_checks_itself(example: Path, tmp_path: Path) -> None:
    assert "identical" in run("-W", "error", str(example), cwd=tmp_path).splitlines()[-1]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_uses_the_public_api_only(example: Path) -> None:
    source = example.read_text()
    assert len(source.splitlines()) < 120
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            package, *inner = (node.module or "").split(".")
            if package == "dirtytrack":
                assert inner in CONSUMERS, "import dirtytrack, and take names from it"
        if isinstance(node, ast.Import):
            assert not any(name.name.startswith("dirtytrack.") for name in node.names)
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_") or node.attr == "__init__", node.attr


@pytest.mark.timeout(120)
@pytest.mark.parametrize("benchmark_name", BENCHMARKS)
def test_a_benchmark_runs(benchmark_name: str, tmp_path: Path) -> None:
    # From a directory of its own: the package that is installed is measured, not a source tree without its extension.
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks", target_is_directory=True)
    told = json.loads(run("-m", "benchmarks", "--tiny", "--json", benchmark_name, cwd=tmp_path))
    assert told["kernel"].startswith("Linux")
    assert told["rows"]
    for row in told["rows"]:
        assert row["ours_ns"] > 0
        assert isinstance(row["ok"], bool)

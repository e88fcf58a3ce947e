# SPDX-License-Identifier: MIT
"""A runtime in C compiles the same core in, by what ``python -m dirtytrack.gc`` says; the C example is one."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "barrier.c"
WARNINGS = ("-Wall", "-Wextra", "-Werror")


def told(*options: str, cwd: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", "dirtytrack.gc", *options], cwd=cwd, check=True, capture_output=True, text=True
    )
    assert done.stdout.count("\n") == 1
    return shlex.split(done.stdout)


def run_compiler(*arguments: str | Path, cwd: Path) -> None:
    """Quickly: what is looked at is what it does."""
    command = [*shlex.split(os.environ.get("CC", "cc")), "-O0", *WARNINGS, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The core, compiled by what is told."""
    folder = tmp_path_factory.mktemp("core")
    run_compiler(*told("--cflags", cwd=folder), "-c", *told("--sources", cwd=folder), cwd=folder)
    return folder


def linked(source: Path, core: Path, out: Path) -> Path:
    objects, libraries = sorted(core.glob("*.o")), told("--libs", cwd=core)
    run_compiler(*told("--cflags", cwd=core), source, *objects, *libraries, "-o", out, cwd=core)
    return out


@pytest.fixture(scope="module")
def barrier(core: Path) -> Path:
    return linked(EXAMPLE, core, core / "barrier")


@pytest.mark.unsanitized  # a program of its own, which the sanitizer's LD_PRELOAD would go into
@pytest.mark.parametrize("arguments", [("12",), ("16", "check"), ("12", "scan")], ids=" ".join)
def test_the_example_checks_itself(barrier: Path, arguments: tuple[str, ...]) -> None:
    done = subprocess.run([barrier, *arguments], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("every tree identical\n")
    assert " minor " in done.stdout


@pytest.mark.unsanitized
def test_the_example_notices_a_slot_that_is_not_told(core: Path, tmp_path: Path) -> None:
    source = EXAMPLE.read_text(encoding="utf-8")
    broken = source.replace("    pages_read += ", "    slots.count -= slots.count > 0;\n    pages_read += ")
    assert broken != source
    (tmp_path / "broken.c").write_text(broken, encoding="utf-8")
    program = linked(tmp_path / "broken.c", core, tmp_path / "broken")
    done = subprocess.run([program, "16", "check"], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 1
    assert " in all" in done.stdout


def test_the_header_is_c_plus_plus_too(tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = tmp_path / "header.cc"
    source.write_text('extern "C" {\n#include <dirtytrack.h>\n}\nint main() { return sizeof(dt_slots) == 0; }\n')
    (include, *_) = told("--cflags", cwd=tmp_path)
    subprocess.run([compiler, "-fsyntax-only", *WARNINGS, include, str(source)], check=True)


def test_something_must_be_asked_for(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dirtytrack.gc"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--cflags" in done.stderr

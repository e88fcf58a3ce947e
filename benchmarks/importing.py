# SPDX-License-Identifier: MIT
"""What `import dirtytrack` adds to the start of an interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import dirtytrack

from .bare import Bare
from .harness import Row, Settings, paired, show_ns

MOST_EXTRA_NS = 50_000_000


def start(code: str, directory: str) -> int:
    """How long an interpreter takes that runs this and ends: ns."""
    begin = time.perf_counter_ns()
    subprocess.run([sys.executable, "-c", code], cwd=directory, env=environment(directory), check=True)
    return time.perf_counter_ns() - begin


def environment(directory: str) -> dict[str, str]:
    """Ours, with the very package that is measured here in front, and its bytecode kept as that of an installed one."""
    search = [str(Path(dirtytrack.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    ours = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**ours, "PYTHONPATH": os.pathsep.join(filter(None, search)), "PYTHONPYCACHEPREFIX": directory}


def import_(settings: Settings, _bare: Bare) -> Iterator[Row]:
    """A whole process that imports dirtytrack against one that imports nothing."""
    few = replace(settings, most_rounds=2 if settings.tiny else 60)
    with tempfile.TemporaryDirectory() as empty:
        pair = paired(few, lambda: None, lambda: start("import dirtytrack", empty), lambda: start("pass", empty))
    row = pair.cost_row("import dirtytrack, one process", 1.0, MOST_EXTRA_NS)
    return iter([replace(row, result=f"+{show_ns(median(pair.ours) - median(pair.bare))}", target="< +50 ms")])

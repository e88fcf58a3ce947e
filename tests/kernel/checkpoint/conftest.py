# SPDX-License-Identifier: MIT
"""Where the stores of these tests are: in memory, where there is such a place, since they are made by the hundred."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def where() -> Iterator[Path]:
    """An empty directory, as quick as one can be."""
    memory = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="dirtytrack-", dir=memory if memory.is_dir() else None))
    yield path / "store"
    shutil.rmtree(path, ignore_errors=True)

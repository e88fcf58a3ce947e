# SPDX-License-Identifier: MIT
"""Recordings made of sets of page numbers, for tests of what reads them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dirtytrack import DirtySet
from dirtytrack.kernel.core import PAGE_BYTES as PAGE
from dirtytrack.observe import Recording, RecordingWriter
from dirtytrack.process.mappings import Mapping

BASE = 0x7F00_0000_0000 // PAGE
EPOCH_SECONDS = 0.5


def mapping(first: int, last: int, name: str, *, state: str = "tracked", reason: str = "") -> Mapping:
    """Pages first to last, counted from BASE."""
    return Mapping((BASE + first) * PAGE, (BASE + last) * PAGE, "rw-p", 0, "00:00", 0, name, state, reason)


def dirty_set(pages: Iterable[int]) -> DirtySet:
    """These pages, counted from BASE."""
    return DirtySet.union(
        [DirtySet.from_runs([((BASE + page) * PAGE, (BASE + page + 1) * PAGE)]) for page in pages] or [DirtySet()]
    )


def make_recording(
    path: Path,
    epochs: Sequence[Iterable[int]],
    tables: Sequence[Sequence[Mapping]],
    *,
    pauses: dict[int, float] | None = None,
    **options: Any,
) -> Recording:
    """A recording of epochs of half a second. The last table goes for all epochs that have none; before the epochs that
    ``pauses`` names, nothing is recorded for so long."""
    with RecordingWriter(path, pid=42, command="a program", **options) as writer:
        at = time.monotonic()
        for i, pages in enumerate(epochs):
            at += (pauses or {}).get(i, 0.0)
            table = tables[min(i, len(tables) - 1)]
            writer.write(dirty_set(pages).runs, table, number=i + 1, begun=at, ended=at + EPOCH_SECONDS)
            at += EPOCH_SECONDS
    return Recording.open(path)

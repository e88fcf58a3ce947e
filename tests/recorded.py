# SPDX-License-Identifier: MIT
"""Mappings and runs as a recorder is given them, made of page numbers."""

from __future__ import annotations

import numpy as np

from dirtytrack.process import Mapping
from tests.oracle import PAGE

__all__ = ["BASE", "mapping", "pages_of", "runs_of"]

BASE = 0x7F00_0000_0000 // PAGE


def mapping(first: int, last: int, name: str, state: str = "tracked", reason: str = "") -> Mapping:
    return Mapping((BASE + first) * PAGE, (BASE + last) * PAGE, "rw-p", 0, "00:00", 0, name, state, reason)


def runs_of(pages: frozenset[int] | set[int], base: int = BASE) -> memoryview:
    found: list[tuple[int, int]] = []
    for page in sorted(pages):
        at = (base + page) * PAGE
        if found and found[-1][1] == at:
            found[-1] = (found[-1][0], at + PAGE)
        else:
            found.append((at, at + PAGE))
    return np.array(found, np.uint64).reshape(-1, 2).data


def pages_of(runs: memoryview) -> set[int]:
    ends: list[tuple[int, int]] = np.asarray(runs).tolist()
    return {page for start, end in ends for page in range(start // PAGE - BASE, end // PAGE - BASE)}

# SPDX-License-Identifier: MIT
"""The same tests, whoever says what was written. What differs is said where a test asks for `session.backend`."""

from __future__ import annotations

import dirtytrack
from dirtytrack import Session
from tests import oracle

BACKENDS = ("kernel", "compare", "compare-hashes")


def session_of(backend: str, remedy: int = 0) -> Session:
    """A session of its own; with these remedies (enum dt_remedy), where the kernel may need any."""
    if backend == "kernel":
        return dirtytrack.UffdSession(_remedy=remedy)
    return dirtytrack.CompareSession(hashes=backend == "compare-hashes")


def has_bits(session: Session, start: int, end: int, pages: set[int]) -> bool:
    """Whether the kernel has just these pages down as written; it is not asked where it is not used."""
    return session.backend != "kernel" or oracle.written(start, end) == pages

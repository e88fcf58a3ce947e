# SPDX-License-Identifier: MIT
"""What tests of listeners say again and again."""

from __future__ import annotations

from dirtytrack import DirtySet, DirtyTracker, Region, UffdSession
from tests import oracle


def armed(session: UffdSession, *regions: Region) -> DirtyTracker:
    """A running tracker with nothing pending."""
    tracker = DirtyTracker(session, regions or None)
    tracker.start()
    assert not tracker.collect()
    return tracker


def pages_of(dirty: DirtySet, region: Region) -> list[int]:
    return list(dirty.pages(region))


def registered_pages(start: int, end: int) -> list[int]:
    """By the kernel: the pages of [start, end) that a userfaultfd has."""
    return [i for i, bits in enumerate(oracle.categories(start, end)) if bits & oracle.WPALLOWED]


def is_resizable(buffer: bytearray) -> bool:
    """Nobody has it pinned."""
    try:
        buffer.append(0)
    except BufferError:
        return False
    buffer.pop()
    return True

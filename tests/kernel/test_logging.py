# SPDX-License-Identifier: MIT
"""What is logged under ``dirtytrack``: the rare events, never one line a collect. Under a second."""

from __future__ import annotations

import logging
from mmap import PAGESIZE as PAGE
from typing import TYPE_CHECKING

import dirtytrack

if TYPE_CHECKING:
    import pytest


def test_what_a_session_does_is_logged_and_collects_are_not(caplog: pytest.LogCaptureFixture) -> None:
    memory = dirtytrack.allocate(4 * PAGE, name="grid")
    with caplog.at_level(logging.DEBUG, logger="dirtytrack"), dirtytrack.UffdSession() as session:
        region = session.register(memory)
        with dirtytrack.DirtyTracker(session) as tracker:
            before = len(caplog.records)
            for _ in range(10):
                tracker.collect()
            assert len(caplog.records) == before
            session.suspend()
            session.resume()
        session.unregister(region)
    assert all(record.name == "dirtytrack" for record in caplog.records)
    told = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert [level for level, _ in told] == ["DEBUG", "DEBUG", "INFO", "INFO", "DEBUG"]
    assert session_words(told[0][1]) and "'grid'" in told[1][1] and "DMA" in told[1][1]
    assert "suspended" in told[2][1] and "resumed" in told[3][1] and "unregistered" in told[4][1]


def session_words(message: str) -> bool:
    return message.startswith("session opened by ") and len(message) > len("session opened by ")


def test_memory_that_was_gone_when_a_tracker_was_left_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    memory = dirtytrack.allocate(4 * PAGE)
    with (
        caplog.at_level(logging.WARNING, logger="dirtytrack"),
        dirtytrack.track({"ring": (memory.address, memory.nbytes)}),  # raw, so that nothing holds it
    ):
        memory.close()
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "'ring'" in record.getMessage() and "went away" in record.getMessage()

# SPDX-License-Identifier: MIT
"""Which changes of memory the exact scan misses on this kernel, each tried, and which remedy finds them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from .truth import Row, rows
from .truth_events import EVENTS

__all__ = ["Hole", "holes", "lines"]

_HOLES = [event for event in EVENTS if event.hole]
_BLIND = [event for event in EVENTS if event.blind]
_DECLARE = "nobody sees it: declare it by mark_dirty()"
_BRACKET = "nobody sees it: put in_flight() around it"


class Hole(NamedTuple):
    """One way in which a change may hide from the scan, tried on one kind of memory."""

    event: str
    memory: str
    verdict: str
    """seen, found, blind, missed, nothing, not here or failed."""
    detail: str
    alone: dict[str, Any]
    """What the exact scan by itself told; empty where only blind spots were tried."""
    tracked: dict[str, Any]
    """What tracking tells."""

    @property
    def ok(self) -> bool:
        """False: a change was missed that no document names."""
        return self.verdict != "missed"


def holes() -> Iterator[Hole]:
    """Try each known one, on throw-away memory, in a child process."""
    for row in rows(_HOLES, ("exact scan alone", "with remedies")):
        yield _judge(row, row.outcomes["exact scan alone"], row.outcomes["with remedies"])
    for row in rows(_BLIND, ("with remedies", "with events")):
        yield _judge(row, {}, row.outcomes["with remedies"])


def _judge(row: Row, alone: dict[str, Any], tracked: dict[str, Any]) -> Hole:
    def hole(verdict: str, detail: str) -> Hole:
        return Hole(row.event.name, row.kind.name, verdict, detail, alone, tracked)

    for outcome in (alone, tracked):
        if "not_here" in outcome:
            return hole("not here", outcome["not_here"])
        if "failed" in outcome:
            return hole("failed", f"could not be tried: {outcome['failed']}")
        if "told" in outcome:
            return hole("seen", f"{outcome['told']} is raised")
    if tracked["missed"] and not row.event.blind:
        return hole("missed", "MISSED in spite of the remedies")
    if tracked["missed"]:
        with_events = row.outcomes["with events"]
        told = "; or UffdSession(events=True)" if with_events.get("missed") == 0 else ""
        return hole("blind", (_BRACKET if row.event.flight else _DECLARE) + told)
    if alone.get("missed"):
        by = f"an extra pass ({', '.join(tracked['by'])})" if tracked["by"] else "arming the other mapping too"
        return hole("found", f"the scan misses it, found by {by}")
    if tracked["changed"]:
        return hole("seen", "the scan itself reports it" if alone else "reported here, with more than was changed")
    return hole("nothing", "changes nothing")


def lines(found: Sequence[Hole]) -> Iterator[tuple[str, str]]:
    """(mark, text) a line, kinds of memory of the same event and verdict together; what is not here comes last."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    missing: dict[str, list[str]] = {}
    for hole in found:
        if hole.verdict == "not here":
            missing.setdefault(hole.detail, []).append(hole.memory)
        elif hole.verdict != "nothing":
            grouped.setdefault((hole.event, hole.verdict, hole.detail), []).append(hole.memory)
    for (event, verdict, detail), kinds in grouped.items():
        mark = {"blind": "--", "failed": "--", "missed": "NO"}.get(verdict, "ok")
        yield mark, f"{event} ({', '.join(kinds)}): {detail}"
    for why, kinds in missing.items():
        yield "--", f"not tried ({', '.join(dict.fromkeys(kinds))}): {why}"

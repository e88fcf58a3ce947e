# SPDX-License-Identifier: MIT
"""`dirtytrack doctor --truth`: what this kernel tells of each thing that can happen to memory, by doing it.

Each row is done three times, on fresh throw-away memory, in a child process: by the exact scan alone, with the remedies
that tracking takes, and with events beside them. What really changed is found by comparing all bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

from .. import DirtyTracker, PageCategory, Pagemap, RegionGone, UffdSession
from ..errors import DirtyTrackError
from ..kernel.core import PAGE_BYTES
from ..kernel.trial import KINDS, Area, Kind, NotHere
from .doctor_apart import Job, run_apart
from .truth_events import EVENTS, REGISTERED, Event

__all__ = ["WAYS", "Registering", "Row", "broken", "document", "markdown", "registering", "rows"]

_EXACT_SCAN_ALONE = 14  # DT_REMEDY_NONE
WAYS: dict[str, dict[str, Any]] = {
    "exact scan alone": {"_remedy": _EXACT_SCAN_ALONE},
    "with remedies": {},
    "with events": {"events": True},
}
"""The columns: how the session of each is made."""
_HANG_SECONDS = 1.0
_REMEDIES = {"pages_absent": "R1", "pages_lost": "R2", "pages_told": "event"}

_LEGEND = (
    "Each row was done three times, on fresh memory: seen by the exact scan alone, with the remedies, and with events "
    "too. Counted in base pages: `seen`: changed and reported; `MISSED`: changed and not reported; `+n`, `extra`: "
    "reported though nothing changed. R1: pages neither present nor swapped; R2: content that is gone though the "
    "kernel's marker stays; event: told by the kernel."
)

Outcome = dict[str, Any]
"""changed, missed and extra: base pages; told: an error by name; by: the remedies that found something; or not_here or
failed, with why."""


class Row(NamedTuple):
    """One thing that happened to one kind of memory."""

    event: Event
    kind: Kind
    outcomes: dict[str, Outcome]
    """By way, in their order; those that were not tried are left out."""


class Registering(NamedTuple):
    """What came of registering a kind of memory that was never touched."""

    kind: Kind
    outcome: Outcome
    """registered: base pages that the first peek reports, or refused: why; or not_here or failed."""


# ---- trying ---------------------------------------------------------------------------------------------------------


def _make(kind: Kind, stack: ExitStack, *, untouched: bool) -> Area:
    area = stack.enter_context(kind.make(kind.units))
    if not untouched:
        area.fill(3)
        if kind.huge:
            _insist_on_huge_pages(area)
    return area


def _insist_on_huge_pages(area: Area) -> None:
    huge = 0
    with Pagemap() as pagemap:
        end = area.address + area.nbytes
        found = pagemap.scan(area.address, end, category_mask=PageCategory.HUGE, return_mask=PageCategory.HUGE)
        huge = sum(found.page_regions[i, 1] - found.page_regions[i, 0] for i in range(len(found)))
    if huge < area.nbytes:
        raise NotHere("the kernel gave no transparent huge page (/sys/kernel/mm/transparent_hugepage)")


def _different(before: bytes, after: bytes, piece_bytes: int = 64 * PAGE_BYTES) -> set[int]:
    """The pages that differ, looked for in large pieces first."""
    found = set()
    for at in range(0, len(before), piece_bytes):
        old, new = before[at : at + piece_bytes], after[at : at + piece_bytes]
        if old != new and piece_bytes > PAGE_BYTES:
            found |= {at // PAGE_BYTES + page for page in _different(old, new, PAGE_BYTES)}
        elif old != new:
            found.add(at // PAGE_BYTES)
    return found


def _attempt(event: Event, kind: Kind, options: dict[str, Any]) -> Outcome:
    try:
        with ExitStack() as stack:
            area = _make(kind, stack, untouched=event.untouched)
            if event.before:
                event.before(area)
            before = _content(area, kind, event)
            session = stack.enter_context(UffdSession(**options))
            region = session.register((area.address, area.nbytes), blind_spots="accepted")
            tracker = DirtyTracker(session)
            tracker.start()
            event.happen(area)
            try:
                dirty = tracker.collect()
            except RegionGone as error:
                return {"told": type(error).__name__}
            found = set(dirty.pages(region))
            numbers = session.statistics()
            changed = _different(before, area.read())
            return {
                "changed": len(changed),
                "missed": len(changed - found),
                "extra": len(found - changed),
                "by": [name for field, name in _REMEDIES.items() if getattr(numbers, field)],
            }
    except NotHere as why:
        return {"not_here": str(why)}
    except OSError as error:
        if isinstance(error, DirtyTrackError):
            raise
        return {"not_here": str(error)}


def _content(area: Area, kind: Kind, event: Event) -> bytes:
    if not event.untouched:
        return area.read()
    return (b"\1" if kind.file else b"\0") * area.nbytes  # not by looking: that touches it


def rows(events: Iterable[Event] = EVENTS, ways: Iterable[str] = tuple(WAYS)) -> Iterator[Row]:
    """Have each thing happen to each kind of memory, in child processes.

    Args:
        events: which.
        ways: which columns.
    """
    chosen = tuple(ways)
    plan = [(event, KINDS[name], _ways_of(event, chosen)) for event in events for name in event.kinds]
    jobs = [
        Job(partial(_attempt, event, kind, WAYS[way]), _HANG_SECONDS if event.hangs else 30.0)
        for event, kind, tried in plan
        for way in tried
    ]
    results = run_apart(jobs)
    for event, kind, tried in plan:
        yield Row(event, kind, {way: next(results) for way in tried})
    for _ in results:  # its process ends
        pass


def _ways_of(event: Event, ways: tuple[str, ...]) -> tuple[str, ...]:
    return ways[:1] if event.hangs else ways


def _register(kind: Kind) -> Outcome:
    try:
        with ExitStack() as stack:
            area = _make(kind, stack, untouched=True)
            session = stack.enter_context(UffdSession())
            try:
                region = session.register((area.address, area.nbytes), blind_spots="accepted")
            except DirtyTrackError as error:
                return {"refused": f"{type(error).__name__}{_errno_of(error)}"}
            tracker = DirtyTracker(session)
            tracker.start()
            return {"registered": len(tracker.peek().pages(region)), "granule_bytes": region.granule_bytes}
    except NotHere as why:
        return {"not_here": str(why)}


def _errno_of(error: DirtyTrackError) -> str:
    import errno

    number = error.errno
    return f", {errno.errorcode.get(number, number)}" if number else ""


def registering(names: Iterable[str] = REGISTERED) -> Iterator[Registering]:
    """Register each kind of memory, in a child process."""
    kinds = [KINDS[name] for name in names]
    for kind, outcome in zip(kinds, run_apart([Job(partial(_register, kind)) for kind in kinds]), strict=True):
        yield Registering(kind, outcome)


# ---- telling --------------------------------------------------------------------------------------------------------


def broken(row: Row) -> bool:
    """Whether a write was missed though nothing is documented of it, or could not be tried for no known reason."""
    for way, outcome in row.outcomes.items():
        alone = way == "exact scan alone"
        if outcome.get("failed") and not row.event.hangs:
            return True
        if outcome.get("missed") and not (alone or row.event.blind):
            return True
    return False


def _say(row: Row, way: str) -> str:
    outcome = row.outcomes.get(way)
    if outcome is None:
        return "not tried"
    for key in ("not_here", "failed", "told"):
        if key in outcome:
            hangs = "hangs until SIGKILL" if row.event.hangs and key == "failed" else outcome[key]
            return {"not_here": "not here", "failed": f"**{hangs}**", "told": str(outcome[key])}[key]
    changed, missed, extra = outcome["changed"], outcome["missed"], outcome["extra"]
    more = f", +{extra}" if extra else ""
    if missed and row.event.blind and way != "exact scan alone":
        return f"blind spot{more}"
    if missed:
        return f"**MISSED {missed} of {changed}**{more}"
    if changed:
        by = f" ({', '.join(outcome['by'])})" if outcome["by"] else ""
        return f"seen {changed}{more}{by}"
    return f"extra {extra}" if extra else "nothing to see"


def _table(head: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ("---",) * len(head), *lines)]


def markdown(title: str, registered: list[Registering], found: list[Row]) -> str:
    """The whole table for this kernel."""
    lines = [f"# {title}", "", _LEGEND, "", "## Memory", ""]
    answers = []
    for kind, outcome in registered:
        if "registered" in outcome:
            said = f"yes, in {outcome['granule_bytes'] >> 10} KiB"
        else:
            said = f"no: {outcome['refused']}" if "refused" in outcome else _not_tried(outcome)
        answers.append((kind.name, said))
    lines += _table(("memory", "can be tracked"), answers)
    lines += ["", "## Events", ""]
    lines += _table(
        ("event", "memory", *WAYS), ((r.event.name, r.kind.name, *(_say(r, w) for w in WAYS)) for r in found)
    )
    missing: dict[str, set[str]] = {}
    for row in found:
        for outcome in row.outcomes.values():
            if "not_here" in outcome:
                missing.setdefault(outcome["not_here"], set()).add(f"{row.event.name}, {row.kind.name}")
    if missing:
        lines += ["", "## Not here", ""]
        lines += [f"- {why}: {_few(what)}" for why, what in missing.items()]
    return "\n".join(lines) + "\n"


def document(registered: list[Registering], found: list[Row]) -> dict[str, Any]:
    """The same in what JSON has."""
    return {
        "memory": [{"memory": kind.name, **outcome} for kind, outcome in registered],
        "events": [
            {
                "event": row.event.name,
                "memory": row.kind.name,
                "blind_spot": row.event.blind,
                "broken": broken(row),
                "outcomes": row.outcomes,
            }
            for row in found
        ],
    }


def _few(what: set[str]) -> str:
    return "; ".join(sorted(what)) if len(what) <= 3 else f"{len(what)} rows"


def _not_tried(outcome: Outcome) -> str:
    return f"not here: {outcome['not_here']}" if "not_here" in outcome else f"**{outcome['failed']}**"

# SPDX-License-Identifier: MIT
"""Which bytes of a set's pages are whose: the regions that a set of pages knows, and mirrors of them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from .errors import InvalidMemory, NotRegistered, SessionClosed
from .kernel import core, failures, sets
from .memory import pin
from .region import Region, Span

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Layout", "held", "mirrors", "pinned_extents", "read_through"]


class Layout:
    """The regions that a tracker watches, as its sets know them. Immutable, shared by many sets."""

    __slots__ = ("_bytes", "_cover", "_extents", "_mirrored", "_names", "spans", "successor")

    def __init__(self, spans: tuple[Span, ...]) -> None:
        self.spans = spans
        self.successor: Layout | None = None
        """What its tracker replaced it by, so that a collect beside an `add` or a `remove` knows all it may meet."""
        self._extents: Any = None
        self._cover: list[tuple[int, int]] | None = None
        self._bytes: list[tuple[int, int]] | None = None
        self._names: dict[str, list[Span]] | None = None
        self._mirrored: tuple[int, int, Any] | None = None
        """Where the last mirror of the only region was, how long it was, and the extents with it."""

    @property
    def extents(self) -> Any:
        """The union of the regions' own bytes, each byte once, as the core wants it."""
        if self._extents is None:
            self._extents = sets.extents(_coalesced(self.spans))
        return self._extents

    def find(self, region: Region | str | None) -> Span:
        """The region, or the one of that name, or the only one.

        Raises:
            InvalidMemory: there is none, or more than one.
        """
        if isinstance(region, Region):
            span = region._span
            if not self.knows(region):
                self.require(span.start, span.end, f"region {span.name!r}")
            return span
        if region is None:
            if len(self.spans) == 1:
                return self.spans[0]
            raise InvalidMemory(f"say which region: there are {len(self.spans)} ({self._listed()})")
        found = self._called(region)
        if not found:
            raise InvalidMemory(f"there is no region {region!r} here: there is {self._listed()}")
        if any((span.address, span.nbytes) != (found[0].address, found[0].nbytes) for span in found):
            raise InvalidMemory(f"{len(found)} regions are called {region!r}: pass the Region itself")
        return found[0]

    def knows(self, region: Region | str | None) -> bool:
        """Whether it is one of these regions, or the name of one, or the only one is meant."""
        if isinstance(region, Region):
            return any(known is region._span for known in self._called(region.name))
        return region is None or bool(self._called(region))

    def _called(self, name: str) -> list[Span]:
        if self._names is None:
            names: dict[str, list[Span]] = {}
            for span in self.spans:
                names.setdefault(span.name, []).append(span)
            self._names = names
        return self._names.get(name, [])

    def _listed(self) -> str:
        names = [repr(span.name) for span in self.spans[:8]]
        return ", ".join(names) + (", …" if len(self.spans) > 8 else "") if names else "none"

    def require(self, start: int, end: int, what: str) -> None:
        """Refuse to speak of pages that nobody watched.

        Raises:
            InvalidMemory: part of [start, end) is in no region's page span.
        """
        if self._cover is None:
            self._cover = _united((span.start, span.end) for span in self.spans)
        around = _first_after(self._cover, start)
        if around is None or around[0] > start or around[1] < end:
            raise InvalidMemory(
                f"{what} {failures.describe(start, end)} is not among the regions of this set ({self._listed()}): "
                "nobody watched all of it",
                start=start,
                end=end,
            )

    def refuse_overlap(self, start: int, end: int, what: str) -> None:
        """Refuse a buffer that is part of the memory which is copied.

        Raises:
            InvalidMemory: [start, end) overlaps a region's own bytes.
        """
        if self._bytes is None:
            self._bytes = _united((span.address, span.address + span.nbytes) for span in self.spans)
        near = _first_after(self._bytes, start)
        if near is not None and near[0] < end:
            raise InvalidMemory(f"{what} overlaps the tracked memory: pass memory of its own", start=start, end=end)

    def merged(self, other: Layout) -> Layout:
        """Both. This one itself where the other adds nothing."""
        if other is self:
            return self
        mine = set(self.spans)
        more = tuple(span for span in other.spans if span not in mine)
        return Layout(self.spans + more) if more else self

    def until(self, now: Layout) -> Layout:
        """All that was in force from this one to ``now``, its successor."""
        merged, at = self.merged(now), self.successor
        while at is not None and at is not now:
            merged, at = merged.merged(at), at.successor
        return merged


def _united(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out


def _first_after(ranges: list[tuple[int, int]], address: int) -> tuple[int, int] | None:
    """The first of sorted, disjoint ranges that ends after an address."""
    i = bisect_left(ranges, (address,))
    if i and ranges[i - 1][1] > address:
        i -= 1
    return ranges[i] if i < len(ranges) else None


def _coalesced(spans: Iterable[Span]) -> list[sets.Extent]:
    """Sorted and disjoint. Bytes that any region calls unpinned are copied as such."""
    out: list[sets.Extent] = []
    for start, end, unpinned in sorted((span.address, span.address + span.nbytes, span.unpinned) for span in spans):
        if out:
            last = out[-1]
            last_end = last.address + last.nbytes
            if start < last_end or (start == last_end and unpinned == last.unpinned):
                nbytes = max(end, last_end) - last.address
                out[-1] = sets.Extent(last.address, nbytes, last.unpinned or unpinned)
                continue
        out.append(sets.Extent(start, end - start, unpinned))
    return out


def _hold(span: Span) -> tuple[Region | None, Any]:
    """The region, where the span's memory may be read; and what holds it, beside the region itself."""
    region = span.owner() if span.owner is not None else None
    if region is None:
        return None, None
    hold = region._hold
    return None if region._ended else region, hold


def _refuse(span: Span) -> None:
    if span.pid:
        raise NotRegistered(
            f"the bytes of {span.name!r} are not this process's: `ProcessTracker.read(dirty)` reads them from process "
            f"{span.pid}",
            pid=span.pid,
        )
    if span.owner is None:
        raise NotRegistered(
            f"the bytes of region {span.name!r} are not here: this set came out of a pickle and knows numbers only"
        )
    region = span.owner()
    if region is not None and region._ended == "closed":
        raise SessionClosed(
            f"the bytes of region {span.name!r} can no longer be read: the session was closed. Read them before"
        )
    raise NotRegistered(
        f"the bytes of region {span.name!r} can no longer be read: it was unregistered. Read them before, "
        "or keep its tracker",
        start=span.start,
        end=span.end,
    )


def held(region: Region) -> Any:
    """What holds a region's bytes while they are read or written; None for raw memory.

    Raises:
        NotRegistered, SessionClosed: it is no longer registered.
    """
    alive, hold = _hold(region._span)
    if not alive:
        _refuse(region._span)
    return hold


def pinned_extents(layout: Layout, cset: Any) -> tuple[Any, list[Any]]:
    """The layout's extents, and what must be held while the core reads them.

    Raises:
        NotRegistered, SessionClosed: a region that the set touches is no longer registered.
    """
    holds: list[Any] = []
    through: Any = None
    for span in layout.spans:
        alive, hold = _hold(span)
        if alive:
            holds += (hold, alive)
            through = alive._handle if span.compared_by else through
        elif sets.intersects(cset, span.address, span.address + span.nbytes):
            _refuse(span)
    # Of several sessions, none of which knows what the others read: as it is in memory.
    if through is None or len({span.compared_by for span in layout.spans}) > 1:
        return layout.extents, holds
    return sets.extents([piece._replace(through=through) for piece in _coalesced(layout.spans)]), holds


def read_through(layout: Layout, address: int, nbytes: int) -> tuple[Any, list[Any]]:
    """The region by whose session bytes are read, where that compares, else None; and what must be held meanwhile."""
    spans = [span for span in layout.spans if span.start < address + nbytes and address < span.end]
    if len({span.compared_by for span in spans}) == 1 and spans[0].compared_by:
        for span in spans:
            alive, hold = _hold(span)
            if alive:
                return alive._handle, [alive, hold]
    return None, []


def mirrors(layout: Layout, mirror: Any, *, cset: Any = None, writable: bool) -> tuple[Any, list[Any]]:
    """The regions with their mirrors, as the core wants them, and what must be held meanwhile.

    Args:
        layout: the regions.
        mirror: a buffer for the only region, or a mapping from regions or their names to buffers. What it has for other
            regions is passed over.
        cset: the pages in question; None: any page, so that each region needs its mirror.
        writable: whether the mirrors will be written.

    Raises:
        InvalidMemory: a mirror is missing, of another length, read-only, or overlaps what it must not.
        NotRegistered, SessionClosed: a region in question is no longer registered.
    """
    again = _mirrored_again(layout, mirror) if writable else None
    if again is not None:
        return again
    pairs = mirror.items() if isinstance(mirror, Mapping) else [(None, mirror)]
    given: dict[Span, Any] = {}
    others: list[Any] = []
    for key, buffer in pairs:
        if not layout.knows(key):
            others.append(key)  # of a region that is not in question
            continue
        span = layout.find(key)
        if span in given:
            raise InvalidMemory(f"two mirrors are given for region {span.name!r}")
        given[span] = buffer
    extents: list[sets.Extent] = []
    holds: list[Any] = []
    written: list[tuple[int, int]] = []
    for span in layout.spans:
        touched = cset is None or sets.intersects(cset, span.address, span.address + span.nbytes)
        if span not in given:
            if touched:
                hint = f"; there is one for {others[0]!r}, which is no region here" if others else ""
                raise InvalidMemory(f"no mirror is given for region {span.name!r}{hint}")
            continue
        pinned = pin(given[span], what=f"mirror of region {span.name!r}", writable=writable)
        if pinned.nbytes != span.nbytes:
            raise InvalidMemory(
                f"the mirror of region {span.name!r} has {pinned.nbytes} bytes, the region has {span.nbytes}"
            )
        if writable:
            layout.refuse_overlap(pinned.address, pinned.address + pinned.nbytes, f"the mirror of region {span.name!r}")
            written.append((pinned.address, pinned.address + pinned.nbytes))
        alive, hold = _hold(span)
        if alive is None:
            if touched:
                _refuse(span)
            continue
        target = pinned.hold if pinned.hold is not None else core.pointer_to(pinned.address)
        through = alive._handle if span.compared_by else None
        extents.append(sets.Extent(span.address, span.nbytes, span.unpinned, target, through))
        holds += (hold, alive, pinned.hold)
    written.sort()
    if any(after[0] < before[1] for before, after in pairwise(written)):
        raise InvalidMemory("two mirrors overlap each other: pass memory of its own for each region")
    made = sets.extents(extents)
    if writable and len(layout.spans) == len(extents) == 1 and pinned.hold is not None:
        layout._mirrored = pinned.address, pinned.nbytes, made
    return made, holds


def _mirrored_again(layout: Layout, mirror: Any) -> tuple[Any, list[Any]] | None:
    """The same, where the mirror is where the last one was, as in most epochs; None: it has to be looked at."""
    if layout._mirrored is None:
        return None
    address, nbytes, made = layout._mirrored
    try:
        pinned = core.pin(mirror, writable=True)
    except (TypeError, ValueError, BufferError):  # no buffer, or one that is refused
        return None
    alive, hold = _hold(layout.spans[0])
    if alive is None or core.address_of(pinned) != address or len(pinned) != nbytes:
        return None
    return made, [hold, alive, pinned]

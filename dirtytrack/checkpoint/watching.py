# SPDX-License-Identifier: MIT
"""The buffers that a Checkpointer saves, as a tracker watches them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from ..dirtyset import DirtySet
from ..errors import InvalidMemory
from ..kernel import sets
from ..layout import held
from ..session import default_session
from ..tracker import DirtyTracker
from .buffers import describe
from .jobs import Plan
from .manifests import RegionEntry
from .sparse import is_sparse, without_holes

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping

    from ..region import Region
    from ..session import Session
    from .buffers import Described
    from .manifests import Manifest

__all__ = ["Watched", "Watching"]

_PAGE_COST_SECONDS = 4e-6  # copied, and written to a store of 1 GB a second


class _Member(NamedTuple):
    number: int
    described: Described
    region: Region


def _member(number: int, told: Described, region: Region) -> _Member:
    """Its region holds the buffer, and lets go of it in time: not we."""
    return _Member(number, told._replace(tracked=(told.address, told.nbytes), hold=None), region)


class Watched:
    """What is watched at one time, in the order of its numbers. Immutable."""

    def __init__(self, members: Iterable[_Member]) -> None:
        self.members = tuple(sorted(members))
        self.pieces = [_piece(member.region) for member in self.members]
        self.extents = sets.extents(self.pieces)
        self.nbytes = sum(member.region.nbytes for member in self.members)
        self.plans = tuple(_plan(member) for member in self.members)
        self.whole = _pages(member.region for member in self.members)
        self.sparse = tuple(member.region for member in self.members if is_sparse(member.region))

    def with_whole(self, dirty: DirtySet, known: frozenset[int]) -> DirtySet:
        """The set, and all pages of the regions that are not known yet."""
        fresh = [member.region for member in self.members if member.number not in known]
        return dirty | _pages(fresh) if fresh else dirty

    def parted(self, saved: DirtySet) -> tuple[DirtySet, DirtySet | None]:
        """What is to be copied, and what is zero without looking: see `without_holes`."""
        return without_holes(saved, self.sparse) if self.sparse else (saved, None)

    @property
    def holds(self) -> list[Any]:
        """What keeps the memory there.

        Raises:
            NotRegistered, SessionClosed: it is no longer registered.
        """
        return [held(member.region) for member in self.members]


def _piece(region: Region) -> sets.Extent:
    span = region._span
    return sets.Extent(region.address, region.nbytes, span.unpinned, None, region._handle if span.compared_by else None)


def _plan(member: _Member) -> Plan:
    told, region = member.described, member.region
    entry = RegionEntry(member.number, told.name, region.nbytes, told.dtype, told.shape)
    return Plan(entry, region.address, _granule(told), region._span.unpinned)


def _granule(told: Described) -> int:
    """Of deltas: the largest that tells the elements apart, up to 8 bytes."""
    itemsize = told.nbytes
    for length in told.shape or ():
        itemsize //= length
    return min(itemsize & -itemsize, 8) if told.shape is not None else 8


def _pages(regions: Iterable[Region]) -> DirtySet:
    """All pages of these."""
    runs: list[tuple[int, int]] = []
    for start, end in sorted((int(region.start), int(region.end)) for region in regions):
        if runs and start <= runs[-1][1]:
            runs[-1] = runs[-1][0], max(end, runs[-1][1])
        else:
            runs.append((start, end))
    return DirtySet.from_runs(runs)


class Watching:
    """Buffers by name and number, and the tracker of their pages.

    Args:
        described: the buffers.
        base: what they were filled from.
        filled: those that were; they keep their numbers.
        options: of `dirtytrack.track`.
        stacklevel: of warnings.

    Thread safety: one thread at a time.
    """

    def __init__(
        self,
        described: Mapping[str, Described],
        base: Manifest | None,
        filled: Container[str],
        options: Mapping[str, Any],
        *,
        stacklevel: int,
    ) -> None:
        numbers = {} if base is None else {region.name: region.number for region in base.regions}
        self._next = max(numbers.values(), default=-1) + 1
        self._session, self._registering, tracking = _options(**options)
        self._members: dict[str, _Member] = {}
        self._now: Watched | None = None
        found = []
        for name, told in described.items():  # a plain loop: the warning's stacklevel counts frames
            found.append(self._session._register(told.tracked, name, **self._registering, stacklevel=stacklevel + 1))
            number = numbers.get(name) if name in filled else None
            self._members[name] = _member(self._number() if number is None else number, told, found[-1])
        self.tracker = DirtyTracker(self._session, found, **tracking)
        self.tracker._owned = tuple(found)
        self.tracker.start()

    def _number(self) -> int:
        number = self._next
        self._next += 1
        return number

    @property
    def names(self) -> tuple[str, ...]:
        """Of the buffers."""
        return tuple(self._members)

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        return sum(member.region.nbytes for member in self._members.values())

    def now(self) -> Watched:
        """What is watched now. A `Memory` that was resized is another region since then, under another number."""
        self._follow()
        if self._now is None:
            self._now = Watched(self._members.values())
        return self._now

    def _follow(self) -> None:
        for name, member in tuple(self._members.items()):
            if member.region.registered:
                continue
            memory = member.described.memory
            again = [each for each in self.tracker.regions if each.name == name and each._memory is memory]
            if memory is None or len(again) != 1:
                continue  # which the tracker will say
            self._members[name] = _member(self._number(), describe(name, memory), again[0])
            self._now = None

    def add(self, told: Described, *, stacklevel: int) -> None:
        """Watch another buffer."""
        if told.name in self._members:
            raise InvalidMemory(f"there is a buffer {told.name!r} already: replace() it, or take another name")
        self._members[told.name] = _member(self._number(), told, self._added(told, stacklevel + 1))
        self._now = None

    def _added(self, told: Described, stacklevel: int) -> Region:
        region = self._session._register(told.tracked, told.name, **self._registering, stacklevel=stacklevel + 1)
        self.tracker.add(region)
        self.tracker._owned += (region,)
        return region

    def remove(self, name: str) -> None:
        """Let go of a buffer."""
        self._let_go(self._member(name))
        del self._members[name]
        self._now = None

    def replace(self, told: Described, *, stacklevel: int) -> None:
        """Watch another buffer under that name."""
        before = self._member(told.name)
        self._members[told.name] = _member(self._number(), told, self._added(told, stacklevel + 1))
        self._now = None
        self._let_go(before)

    def _member(self, name: str) -> _Member:
        self._follow()
        member = self._members.get(name)
        if member is None:
            there = ", ".join(map(repr, list(self._members)[:8])) or "none"
            raise InvalidMemory(f"there is no buffer {name!r}; there are {there}")
        return member

    def _let_go(self, member: _Member) -> None:
        region = member.region
        if region in self.tracker.regions:
            self.tracker.remove(region)
        if region.registered:
            self._session.unregister(region)
        self.tracker._owned = tuple(each for each in self.tracker._owned if each is not region)

    def close(self) -> None:
        """Let go of all.

        Raises:
            MissedWrite: the audit found an unreported change.
        """
        self._members, self._now = {}, None
        tracker = getattr(self, "tracker", None)
        if tracker is not None:
            tracker.__exit__(None, None, None)


def _options(
    *,
    session: Session | None = None,
    backend: str | None = None,
    blind_spots: str | None = None,
    strict: bool = False,
    page_cost_seconds: float | None = _PAGE_COST_SECONDS,
    **tracking: Any,
) -> tuple[Session, dict[str, Any], dict[str, Any]]:
    """The session; how to register; how to track."""
    within = session if session is not None else default_session("kernel" if backend is None else backend)
    if backend not in (None, within.backend):
        raise InvalidMemory(
            f"backend={backend!r} was asked for and a session given whose backend is {within.backend!r}"
        )
    tracking["page_cost_seconds"] = page_cost_seconds
    return within, {"arm": None, "blind_spots": blind_spots, "strict": strict}, tracking

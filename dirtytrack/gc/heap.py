# SPDX-License-Identifier: MIT
"""The old generation: regions of a tracker, and what was written there since somebody last asked."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from ..dirtyset import DirtySet
from ..errors import DirtyTrackError, InvalidMemory, NotRegistered
from ..kernel import core, engine
from ..kernel.abi import Address, PageCategory
from ..kernel.failures import describe
from ..layout import Layout, pinned_extents
from ..pagemap import Pagemap
from ..region import Region
from ..tracker import DirtyTracker
from .errors import BarrierBusy

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..tracker import Trackable

__all__ = ["Heap", "populated_in"]

_log = logging.getLogger("dirtytrack")
_MANY_PAGES = 4096  # from so many on it costs less to ask which are populated than to read those that are not
_POPULATED = PageCategory.PRESENT | PageCategory.SWAPPED


class _Sparse(NamedTuple):
    """A region that may be mostly empty: whose pages, where they are not in these categories, are zeroes."""

    region: Region
    populated: PageCategory
    many_pages: int
    """From so many on it is worth asking."""


class Heap:
    """Regions that one tracker watches, for one consumer."""

    def __init__(self, regions: Region | Iterable[Region], tracker: DirtyTracker) -> None:
        if not isinstance(tracker, DirtyTracker):
            raise TypeError(f"a DirtyTracker watches the heap, not a {type(tracker).__name__}")
        self.tracker = tracker
        self.regions: tuple[Region, ...] = ()
        self.layout = Layout(())
        self._alone: Layout | None = None  # the tracker's, where it watches no more than the heap
        self._sparse: tuple[_Sparse, ...] = ()
        self._epoch = 0  # that was open when this heap last settled; 0: nobody knows what was written
        self._next = 0  # that its last collect opened
        self._lock = threading.RLock()
        core.load()
        for region in _several(regions):
            self.include(region)
        if not self.regions:
            raise InvalidMemory("a heap has one region at least")

    # ---- which memory

    def include(self, region: Region) -> None:
        """Count a region to the heap.

        Raises:
            NotRegistered: it is not registered, or its tracker does not watch it.
        """
        if not isinstance(region, Region):
            raise TypeError(
                f"a heap is made of Regions, as register() and tracker.regions give, not of {type(region).__name__}"
            )
        if not region.registered:
            raise NotRegistered(f"{region!r} is not registered: register it, and give it to the tracker", region=region)
        if not any(known is region for known in self.tracker.regions):
            raise NotRegistered(
                f"region {region.name!r} is not one of the tracker's: tracker.add() it first", region=region
            )
        self._set((*(known for known in self.regions if known is not region), region))

    def exclude(self, region: Region) -> None:
        """Count it to the heap no longer."""
        if not isinstance(region, Region):
            raise TypeError(f"what is removed is a Region of the heap, not {type(region).__name__}")
        if not any(known is region for known in self.regions):
            raise InvalidMemory(f"region {region.name!r} is not part of this heap", region=region)
        self._set(tuple(known for known in self.regions if known is not region))

    def grow(
        self,
        memory: Region | Trackable,
        name: str | None,
        options: dict[str, Any],
        note: Callable[[Region], None],
    ) -> Region:
        """Have the tracker watch memory, where it does not yet, and count it to the heap. ``note`` is the last step: it
        keeps that all of it is news. Where anything fails all is as it was."""
        before, region = self.regions, memory if isinstance(memory, Region) else None
        ours = region is None or not any(known is region for known in self.tracker.regions)
        try:
            if ours:
                region = self.tracker.add(memory, name=name, **options)
            assert region is not None
            self.include(region)
            note(region)
        except BaseException:
            self._set(before)
            if ours and region is not None and any(known is region for known in self.tracker.regions):
                self.follow(self.tracker.remove(region))
                if region is not memory:  # registered for this
                    self.tracker.session.unregister(region)
            raise
        return region

    def shrink(self, region: Region) -> None:
        """Count it to the heap no longer, and have the tracker let go of it."""
        self.exclude(region)
        if any(known is region for known in self.tracker.regions):
            self.follow(self.tracker.remove(region))

    def _set(self, regions: tuple[Region, ...]) -> None:
        self.regions = regions
        self.layout, self._alone = Layout(tuple(region._span for region in regions)), None
        self._sparse = tuple(found for found in map(_sparse, regions) if found is not None)

    def refuse_overlap(self, low: int, high: int) -> Region | None:
        """The region that [low, high) overlaps, if there is one."""
        for region in self.regions:
            if low < region.address + region.nbytes and region.address < high:
                return region
        return None

    # ---- what was written

    def alone(self) -> threading.RLock:
        """What keeps other threads out. No state beside it, which an interrupt could leave behind.

        Raises:
            BarrierBusy: this thread has it already, because a signal handler interrupted it there.
        """
        if self._lock._is_owned():  # type: ignore[attr-defined]
            raise BarrierBusy(
                "a signal handler called this in the middle of another such call: set a flag there, and collect when "
                "the handler has returned"
            )
        return self._lock

    def collect(self) -> tuple[DirtySet, bool]:
        """What was written, and whether that is all of it: not where this is the first time, or where somebody else
        collected from this tracker meanwhile, or stopped it. All is in doubt until `settle` is called, which is the
        last step of whoever keeps these pages."""
        expected, self._epoch = self._epoch, 0
        try:
            dirty = self.tracker.collect()
        except DirtyTrackError:  # by which nothing was handed out
            self._epoch = expected
            raise
        epoch: int = dirty._lent.epoch
        self._next = epoch + 1
        if expected and epoch != expected:
            _log.warning("a heap's tracker was stopped, or collected by somebody else: all of the heap is read again")
        return (dirty if dirty._layout is self._alone else self._ours(dirty)), epoch == expected

    def knows(self) -> bool:
        """Whether a collect would tell all that was written."""
        return self._epoch != 0 and self.tracker.epoch == self._epoch

    def peek(self) -> tuple[DirtySet, bool]:
        """What a collect would give now, and whether that is all, without taking it: no page is armed, and the stores
        that follow meet no fault."""
        dirty = self.tracker.peek()
        known = self.knows()  # after it: so nobody collected before it either
        return (dirty if dirty._layout is self._alone else dirty & self.whole()), known

    def settle(self) -> None:
        """Be sure that what comes next is all that is written from the last collect on."""
        self._epoch = self._next

    def follow(self, final: DirtySet) -> None:
        """A region was removed by us, which closed an epoch and left what is pending of the others as it was."""
        if self._epoch == final.epoch:
            self._epoch += 1

    def _ours(self, dirty: DirtySet) -> DirtySet:
        """Its part of what a tracker found that perhaps watches more than the heap: the rest goes back."""
        mine = set(self.layout.spans)
        others = tuple(span for span in dirty._layout.spans if span not in mine)
        if not others:
            self._alone = dirty._layout
            return dirty
        try:
            spans = DirtySet.union(DirtySet.from_runs([(span.start, span.end)]) for span in others)
            self.tracker.put_back(dirty & spans)
            return dirty & self.whole()
        except BaseException:
            self.tracker.put_back(dirty)
            raise

    def doubt(self) -> None:
        """Know nothing of what was written until now."""
        self._epoch = 0

    def whole(self) -> DirtySet:
        """All pages."""
        if not self.regions:
            return DirtySet()
        return DirtySet.union(DirtySet.from_runs([(region.start, region.end)]) for region in self.regions)

    def populated(self, pages: DirtySet) -> DirtySet:
        """The pages without those that are known to be zeroes: to read a large, mostly empty reservation would take
        page tables for all of it. What is written meanwhile is dirty again."""
        for sparse in self._sparse:
            if pages.page_count < sparse.many_pages:
                continue
            span = DirtySet.from_runs([(sparse.region.start, sparse.region.end)])
            part = pages & span
            if part.page_count >= sparse.many_pages:
                pages = pages - span | part & _populated(sparse)
        return pages

    def extents(self, pages: DirtySet) -> tuple[Any, list[Any]]:
        """Its bytes, as the core wants them, and what must be held meanwhile."""
        return pinned_extents(self.layout, pages._lent)

    def __repr__(self) -> str:
        spans = ", ".join(f"{region.name!r} {describe(region.start, region.end)}" for region in self.regions[:4])
        return spans + (", …" if len(self.regions) > 4 else "")


def _several(regions: Any) -> tuple[Any, ...]:
    """One by one. A buffer in the place of a region is iterable too, and is refused as what it is."""
    try:
        memoryview(regions)
    except TypeError:
        return tuple(regions) if isinstance(regions, Iterable) else (regions,)
    return (regions,)


def _sparse(region: Region) -> _Sparse | None:
    about = engine.about(region._handle)
    if about.arm == "present":
        return _Sparse(region, _POPULATED, _MANY_PAGES)
    if engine.is_private_hugetlb(about):  # to read an empty one would take a huge page from the pool
        return _Sparse(region, PageCategory.PRESENT, 1)
    return None


def _populated(sparse: _Sparse) -> DirtySet:
    return populated_in(sparse.region.start, sparse.region.end, sparse.populated)


def populated_in(start: Address, end: Address, wanted: PageCategory = _POPULATED) -> DirtySet:
    """The pages of [start, end) in one of these categories."""
    with Pagemap() as pagemap:
        scan = pagemap.scan(start, end, category_anyof_mask=wanted, return_mask=wanted)
    numbers = iter(scan.page_regions.cast("B").cast("Q")) if len(scan.page_regions) else iter(())
    runs: list[tuple[int, int]] = []
    for first, last, _ in zip(numbers, numbers, numbers, strict=True):
        if runs and runs[-1][1] == first:
            runs[-1] = (runs[-1][0], last)
        else:
            runs.append((first, last))
    return DirtySet.from_runs(runs)

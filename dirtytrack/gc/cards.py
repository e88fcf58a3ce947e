# SPDX-License-Identifier: MIT
"""CardTable: what was written, a byte a card, as collectors know it."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from ..dirtyset import DirtySet
from ..errors import InvalidMemory
from ..kernel import core, sets, words
from ..kernel.abi import Address
from ..kernel.failures import describe
from ..layout import held
from ..memory import allocate
from .errors import CardsTooSmall
from .heap import Heap, populated_in

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..memory import Memory
    from ..region import Region
    from ..tracker import DirtyTracker, Trackable

__all__ = ["CardTable"]

_LEAST_BYTES = 512


def _page_of(address: int) -> int:
    return address & -core.PAGE_BYTES


class _Part(NamedTuple):
    """The cards of one region."""

    region: Region
    first: int
    """Address at which the first card begins."""
    card_count: int
    table: Memory
    mirror: Memory | None
    cards: Any
    holds: Any


class CardTable:
    """A byte a card: `CLEAN` or `DIRTY`, kept up to date by `update`.

    All cards that are populated are dirty in the first ``update``, since nobody knows what was written before.

    Cards of a page or more need no more than the page tables. Smaller ones, from 512 bytes on, are told apart by
    comparing the dirty pages with a mirror, a copy of the heap: ``update`` reads them and writes what changed. Then a
    store of what was there already marks nothing. **So the collector's own stores must be told**, by
    `forget_own_writes`: a slot that pointed to X, that the collector made point to Y, and the program to X again,
    where another object is now, would be as it was in the mirror.

    Args:
        regions: the heap, which the tracker watches.
        tracker: its collects are the table's from now on, as for `RememberedSet`.
        card_bytes: a power of two; the page where left out.
        mirror: keep a copy of the heap, which takes as much memory again as is populated.

    Raises:
        CardsTooSmall: below a page without a mirror, or below 512 bytes.
        InvalidMemory: no power of two.
        NotRegistered: a region is not registered, or not one of the tracker's.

    Thread safety: everything may be called from any thread. Whoever cleans cards beside an `update` does it before
    reading the memory that they stand for, never after.
    """

    CLEAN = 0
    DIRTY = 1

    def __init__(
        self,
        regions: Region | Iterable[Region],
        tracker: DirtyTracker,
        card_bytes: int | None = None,
        *,
        mirror: bool = False,
    ) -> None:
        size = core.PAGE_BYTES if card_bytes is None else operator.index(card_bytes)
        if size <= 0 or size & (size - 1):
            raise InvalidMemory(f"the size of a card is a power of two of bytes, not {card_bytes}")
        if size < _LEAST_BYTES:
            raise CardsTooSmall(f"cards have {_LEAST_BYTES} bytes at least, not {size}")
        if size < core.PAGE_BYTES and not mirror:
            raise CardsTooSmall(
                f"page tables tell pages of {core.PAGE_BYTES} bytes apart, no cards of {size}: pass mirror=True, which "
                "keeps a copy of the heap to compare with, or take larger cards"
            )
        self._card_bytes, self._shift = size, size.bit_length() - 1
        self._heap = Heap(regions, tracker)
        self._mirrored = mirror
        self._parts = tuple(self._part(region) for region in self._heap.regions)
        self._added = DirtySet()  # whole regions of which no update knows yet

    def _part(self, region: Region) -> _Part:
        first = region.address & -self._card_bytes
        count = -(-(region.address + region.nbytes - first) // self._card_bytes)
        table = allocate(count, sparse=True, name=f"cards of {region.name}")
        nbytes = region.address + region.nbytes - _page_of(region.address)  # a page of the mirror is one of the heap
        copy = allocate(nbytes, sparse=True, name=f"mirror of {region.name}") if self._mirrored else None
        cards, hold = words.cards(table, first, self._shift)
        return _Part(region, first, count, table, copy, cards, hold)

    # ---- what it is

    @property
    def card_bytes(self) -> int:
        """Of a card."""
        return self._card_bytes

    @property
    def regions(self) -> tuple[Region, ...]:
        """The heap."""
        return self._heap.regions

    @property
    def tracker(self) -> DirtyTracker:
        """Whose collects tell what was written."""
        return self._heap.tracker

    def _of(self, region: Region | None) -> _Part:
        for part in self._parts:
            if part.region is region or (region is None and len(self._parts) == 1):
                return part
        raise InvalidMemory(
            "say which region of this table: " + ", ".join(repr(part.region.name) for part in self._parts)
        )

    def view(self, region: Region | None = None) -> memoryview:
        """The bytes themselves, one a card, writable: a collector may read and clean them, in C too.

        Args:
            region: may be left out where there is one only.

        Raises:
            InvalidMemory: it is not one of this table's.
        """
        part = self._of(region)
        return memoryview(part.table)[: part.card_count]

    def index(self, address: int) -> tuple[Region, int]:
        """The region of an address, and which of its cards the address is in.

        Raises:
            InvalidMemory: it is in no region of this table.
        """
        for part in self._parts:
            if part.region.address <= address < part.region.address + part.region.nbytes:
                return part.region, (address - part.first) >> self._shift
        raise InvalidMemory(f"{address:#x} is in no region of this table", start=address)

    def __repr__(self) -> str:
        return f"<CardTable of {self._heap!r}, a byte for {self._card_bytes}>"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a CardTable cannot be pickled: it is about this process's memory")

    # ---- what was written

    def update(self) -> None:
        """Mark the cards that were written since the last update; what is dirty stays dirty.

        Raises:
            RegionGone, NotStarted, NotRegistered, MissedWrite, SessionClosed, UsedAfterFork: as `DirtyTracker.collect`.
                Cards may have been marked, and none is forgotten: the next update looks at the same pages.
        """
        with self._heap.alone():
            dirty, known = self._heap.collect()
            try:
                self._take(dirty, known, mark=True)
                self._settle()
            except BaseException:
                self._undo(dirty, known)
                raise

    def _settle(self) -> None:
        self._added = DirtySet()
        self._heap.settle()

    def _undo(self, dirty: DirtySet, known: bool) -> None:
        if known:
            self._heap.tracker.put_back(dirty)
            self._heap.settle()

    def _take(self, dirty: DirtySet, known: bool, *, mark: bool) -> None:
        """Mark them, and bring the mirror up to date; where not all is known, everything."""
        told = self._heap.whole() if not known else dirty | self._added if self._added else dirty
        pages = self._heap.populated(told)
        for part in self._parts:
            region = part.region
            alive = held(region)
            if not known or (mark and part.mirror is None):
                words.mark_cards(pages._set, region.address, region.address + region.nbytes, part.cards)
            elif self._added:
                new = pages & self._added
                words.mark_cards(new._set, region.address, region.address + region.nbytes, part.cards)
            if part.mirror is not None:
                span = region._span
                through = region._handle if span.compared_by else None
                if pages is not told:
                    self._forget(part, told - pages, mark=mark)
                at = region.address - _page_of(region.address)
                mirror = core.pin(memoryview(part.mirror)[at : at + region.nbytes], writable=True)
                extent = sets.Extent(region.address, region.nbytes, span.unpinned, mirror, through)
                words.compare_cards(pages._set, sets.extents([extent]), part.cards, mark=mark)
            del alive

    def _forget(self, part: _Part, gone: DirtySet, *, mark: bool) -> None:
        """Have the mirror be zeroes where the heap is, which costs no reading and gives the mirror's pages back. Before
        anything is compared: what is stored there meanwhile will be compared with zeroes."""
        mirror, region = part.mirror, part.region
        assert mirror is not None
        beyond = _page_of(region.address) - mirror.address
        copied = populated_in(mirror.address, Address(mirror.address + mirror.nbytes))
        stale = gone & DirtySet.from_runs((start + beyond, end + beyond) for start, end in copied)
        if mark:
            words.mark_cards(stale._set, region.address, region.address + region.nbytes, part.cards)
        for start, end in stale:
            mirror.discard(start - beyond - mirror.address, end - start)

    @contextmanager
    def forget_own_writes(self) -> Iterator[None]:
        """``with cards.forget_own_writes(): ...`` around a collection, mutators being stopped: what is written inside
        is the collector's and marks no card, but the mirror gets it.

        What the mutators wrote before is marked on entry. Where an exception leaves the ``with``, nothing is forgotten.

        Raises:
            As `update`.

        Thread safety: mutators must be stopped from before it until after it: what one stores inside is lost.
        """
        self.update()
        yield
        with self._heap.alone():
            dirty, known = self._heap.collect()
            try:
                self._take(dirty, known, mark=False)
                self._settle()
            except BaseException:
                self._undo(dirty, known)
                raise

    # ---- growing and shrinking

    def add(self, memory: Region | Trackable, *, name: str | None = None, **options: Any) -> Region:
        """Make the heap larger: all cards of it that are populated are dirty in the next `update`.

        Args:
            memory: a region that the tracker watches, or what `DirtyTracker.add` takes.
            name, options: as for `DirtyTracker.add`.

        Returns:
            The region.

        Raises:
            As `DirtyTracker.add`; the heap is as it was then.
        """

        def note(region: Region) -> None:
            made = self._part(region)
            self._added = self._added | DirtySet.from_runs([(region.start, region.end)])
            self._parts = (*(part for part in self._parts if part.region is not region), made)

        with self._heap.alone():
            before = self._parts
            try:
                return self._heap.grow(memory, name, options, note)
            except BaseException:
                self._parts = before
                raise

    def remove(self, region: Region) -> None:
        """Make the heap smaller, and free the region's cards. The tracker stops watching it; it stays registered until
        `Session.unregister`, which lets go of its memory.

        Raises:
            InvalidMemory: it is not part of the heap.
            As `DirtyTracker.remove`.
        """
        with self._heap.alone():
            self._heap.shrink(region)
            self._parts = tuple(part for part in self._parts if part.region is not region)
            self._added = self._added & self._heap.whole()

    # ---- looking at cards

    def dirty_cards(self, region: Region | None = None) -> memoryview:
        """The addresses at which dirty cards begin, rising: read-only, format ``Q``, (n,).

        Args:
            region: may be left out where there is one only.
        """
        part = self._of(region)
        return words.dirty_cards(part.cards, part.card_count)

    def dirty_ranges(self, region: Region | None = None) -> memoryview:
        """Where dirty cards are, as addresses [start, end) of runs of them: read-only, format ``Q``, (n, 2).
        `CrossingMap.objects_on` takes it.

        Args:
            region: may be left out where there is one only.
        """
        part = self._of(region)
        return words.dirty_runs(part.cards, part.card_count)

    def clear(self, start: int | None = None, end: int | None = None) -> None:
        """Clean the cards that begin in [start, end); all of them where nothing is said.

        Clean first, then read the memory that they stand for: a store that comes between marks the card again.

        Raises:
            InvalidMemory: the range is reversed.
        """
        low, high = start or 0, (1 << 64) if end is None else end
        if low > high:
            raise InvalidMemory(f"{describe(low, high)} is reversed")
        for part in self._parts:
            first = max(0, -(-(low - part.first) // self._card_bytes))
            last = min(part.card_count, -(-(high - part.first) // self._card_bytes))
            if first < last:
                if first == 0 and last == part.card_count and part.table.nbytes > 1 << 20:
                    part.table.discard()  # a table of a large, mostly empty heap is mostly not there
                else:
                    self.view(part.region)[first:last] = bytes(last - first)

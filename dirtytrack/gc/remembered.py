# SPDX-License-Identifier: MIT
"""RememberedSet: the slots of the old generation that point into the young one."""

from __future__ import annotations

import operator
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..dirtyset import DirtySet
from ..errors import InvalidMemory
from ..kernel import sets, words
from ..kernel.failures import describe
from ..region import Region
from .errors import InvalidNursery, NurseryMoved
from .heap import Heap
from .pointers import PointerFormat

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ..memory import AnyBuffer
    from ..tracker import DirtyTracker, Trackable

__all__ = ["RememberedSet", "Slots"]


class Slots:
    """What a `RememberedSet.minor` found. ``len()``, indexing and iterating give the slots' addresses.

    Attributes:
        page_count: how many pages were read for it.
        whole_heap: whether those were all pages, since nothing was known of what was written: in the first call, after
            `RememberedSet.remember_all`, and after somebody else collected from the tracker.
        seconds: that it took to collect and to read.
    """

    # What can be made later is: this is on the way of every pause.
    __slots__ = ("_found", "_heap", "_layout", "_made", "_pointers", "page_count", "seconds", "whole_heap")

    page_count: int
    whole_heap: bool
    seconds: float

    def __init__(self, found: words.Found, heap: Heap, pointers: PointerFormat, page_count: int) -> None:
        self._found = found
        self._made: memoryview | None = None
        self.page_count, self.whole_heap, self.seconds = page_count, False, 0.0
        self._heap, self._layout, self._pointers = heap, heap.layout, pointers

    @property
    def addresses(self) -> memoryview:
        """Of the words, rising: read-only, format ``Q``, shape (n,); not a copy."""
        if self._made is None:
            self._made = self._found.addresses
        return self._made

    @property
    def targets(self) -> memoryview:
        """The address that each slot pointed at when it was read, without its tag: as ``addresses``."""
        return self._found.targets

    @property
    def kept(self) -> DirtySet:
        """The pages that point into the young memory, whichever part of it: the next minor() reads them again."""
        return DirtySet(self._found.kept, self._layout)

    def redirect(self, targets: AnyBuffer | Sequence[int]) -> None:
        """Make every slot point at another address, and keep its tag: what a collector does that moved the objects.

        Args:
            targets: as many addresses as there are slots: numbers, or a buffer of 64-bit ones.

        Raises:
            InvalidMemory: there are fewer or more, or a slot cannot hold its target; the slots before it are written.
            NotRegistered, SessionClosed: the heap is no longer registered.

        Thread safety: not beside a mutator that writes these slots: whose store is last stays.
        """
        packed, count = _numbers(targets, "targets")
        if count != len(self):
            raise InvalidMemory(f"there are {len(self)} slots, and {count} targets for them")
        if not count:
            return
        extents, holds = self._heap.extents(self.kept)
        try:
            words.redirect(extents, self._pointers._pointers, self.addresses, packed, count)
        finally:
            del holds  # not kept by a traceback

    def __len__(self) -> int:
        return self._found.count

    def __iter__(self) -> Iterator[int]:
        return iter(self.addresses)

    def __getitem__(self, index: int) -> int:
        return self.addresses[index]

    def __repr__(self) -> str:
        return f"<Slots: {len(self)} in {self.kept.page_count} of {self.page_count} pages read>"


class RememberedSet:
    """The slots of the old generation that point into the young one, without a write barrier in the stores.

    Such a slot was written since the last collection, so it is in a dirty page, and only those are read. **None is
    forgotten:** a page is read in each `minor` until a reading of all of it found no word that points into the young
    memory, and again as soon as it is written after that reading began. So it is right to leave a slot as it is, be it
    that the object stayed young, that the collector was interrupted, or that ``minor`` itself failed midway: the next
    one has it again. The first call reads all that is populated, since nobody knows what was written before.

    The collector's own stores into old pages, such as promoted objects, count as written and are read in the next
    ``minor``, unless `forget_own_writes` says that they need not be.

    Args:
        regions: the old generation, which the tracker watches.
        tracker: its collects are the remembered set's from now on: pages that somebody else collects from it are lost
            to this set, which then reads the whole heap. Others listen by trackers of their own.
        pointers: how slots hold addresses.
        nursery: (low, high), all addresses at which young objects ever are: of a nursery and survivor spaces, all of
            them. Left out: what the first `minor` is asked about.

    Raises:
        NotRegistered: a region is not registered, or not one of the tracker's.
        InvalidNursery: it overlaps the old generation, or no slot can point there.
        InvalidPointerFormat: a region begins where no slot can.

    Thread safety: everything may be called from any thread; calls follow one another. Mutators need not be stopped for
    ``minor``: what they store meanwhile is in it or in the next one.
    """

    def __init__(
        self,
        regions: Region | Iterable[Region],
        tracker: DirtyTracker,
        *,
        pointers: PointerFormat | None = None,
        nursery: tuple[int, int] | None = None,
    ) -> None:
        if not isinstance(pointers, PointerFormat | None):
            raise TypeError(f"pointers takes a PointerFormat, as PointerFormat.plain() gives it, not {pointers!r}")
        self._pointers = PointerFormat.plain() if pointers is None else pointers
        self._heap = Heap(regions, tracker)
        for region in self._heap.regions:
            self._pointers._require_heap(region)
        self._nursery: tuple[int, int] | None = None
        self._asked: tuple[int, int] | None = None  # what minor() was last asked about, and was right
        self._young: Any = None  # the nursery, as the core wants it
        self._room = words.Room()
        self._nothing = DirtySet()
        self._retained = self._nothing  # pages that pointed into the young memory when they were last read
        self._pending = self._nothing  # pages that were collected and not read yet
        self._looking = False  # within forget_own_writes(nursery_empty=True): nothing is taken until its end
        self._looked = False  # and some minor() has read all of it
        if nursery is not None:
            self._settle_nursery(*_addresses(nursery))

    # ---- what it is

    @property
    def regions(self) -> tuple[Region, ...]:
        """The old generation."""
        return self._heap.regions

    @property
    def tracker(self) -> DirtyTracker:
        """Whose collects tell what was written."""
        return self._heap.tracker

    @property
    def pointers(self) -> PointerFormat:
        """How slots hold addresses."""
        return self._pointers

    @property
    def nursery(self) -> tuple[int, int] | None:
        """All addresses at which young objects ever are; None before the first `minor`, where none was given."""
        return self._nursery

    @property
    def retained(self) -> DirtySet:
        """The pages that the next minor() reads even if nobody writes them."""
        return self._retained | self._pending

    def __repr__(self) -> str:
        return f"<RememberedSet of {self._heap!r}>"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a RememberedSet cannot be pickled: it is about this process's memory")

    # ---- the nursery

    def _settle_nursery(self, low: int, high: int) -> None:
        self._require_nursery(low, high)
        self._nursery, self._young = (low, high), words.span(low, high)

    def _require_nursery(self, low: int, high: int) -> None:
        if not 0 <= low < high <= 1 << 64:
            raise InvalidNursery(f"this nursery is empty or reversed: [{low:#x}, {high:#x})")
        self._pointers._require_nursery(low, high)
        region = self._heap.refuse_overlap(low, high)
        if region is not None:
            raise InvalidNursery(
                f"the nursery {describe(low, high)} overlaps the old generation: region {region.name!r} is "
                f"{describe(region.address, region.address + region.nbytes)}. Young objects lie in memory of their own",
                start=low,
                end=high,
                region=region,
            )

    def _within_nursery(self, low: int, high: int) -> None:
        if (low, high) == self._asked:
            return
        low, high = _addresses((low, high))
        if self._nursery is None:
            self._settle_nursery(low, high)
        assert self._nursery is not None
        self._require_nursery(low, high)
        if low < self._nursery[0] or high > self._nursery[1]:
            raise NurseryMoved(
                f"{describe(low, high)} is not part of the nursery {describe(*self._nursery)}: pages that were read "
                "and dropped may point there. Make the set with nursery=(low, high) around all young memory, or call "
                "remember_all(nursery=...), after which the next minor() reads the whole heap",
                start=low,
                end=high,
            )
        self._asked = (low, high)

    # ---- collections

    def minor(self, nursery_low: int, nursery_high: int) -> Slots:
        """Find the slots that point into [nursery_low, nursery_high): roots of a minor collection, beside its others.

        Reads the pages written since the last call and those that pointed into the young memory then, in C and without
        the GIL.

        Returns:
            The slots. Their pages are retained: see `Slots.kept`.

        Raises:
            InvalidNursery: the range is empty, overlaps the old generation, or no slot can point there.
            NurseryMoved: it is not part of the nursery.
            RegionGone: a mapping of the heap went away. As with every failure, nothing is forgotten: the next call
                reads all pages that this one would have.
            NotStarted, NotRegistered, MissedWrite, SessionClosed, UsedAfterFork: as `DirtyTracker.collect`.
        """
        began = time.perf_counter()
        with self._heap.alone():
            self._within_nursery(nursery_low, nursery_high)
            if self._looking:
                return self._look(nursery_low, nursery_high, began)
            dirty, known = self._heap.collect()
            try:
                pages = self._with_remembered(dirty) if known else self._heap.whole()
                slots = self._read(self._heap.populated(pages), nursery_low, nursery_high)
                slots.whole_heap = not known
                # In this order: an interrupt in between leaves too much, never too little.
                self._retained = slots.kept if slots._found.keeps else self._nothing
                self._pending = self._nothing
                self._heap.settle()
            except BaseException:
                self._undo(dirty, known)
                raise
        slots.seconds = time.perf_counter() - began
        return slots

    def _look(self, low: int, high: int, began: float) -> Slots:
        """A minor() that takes nothing: mutators stand still, and what is dirty stays so until they go on."""
        dirty, known = self._heap.peek()
        pages = self._with_remembered(dirty) if known else self._heap.whole()
        slots = self._read(self._heap.populated(pages), low, high)
        slots.whole_heap = not known
        # What was asked to be read again was; it is forgotten with the rest, or with nothing.
        self._retained, self._pending = self._retained | self._pending, self._nothing
        self._looked = known
        slots.seconds = time.perf_counter() - began
        return slots

    def _with_remembered(self, dirty: DirtySet) -> DirtySet:
        # Not by `|`, which also unites whose it is: this is on the way of every pause.
        for pages in (self._retained, self._pending):
            if pages is not self._nothing:
                dirty = DirtySet(sets.unite(dirty._lent, pages._lent), self._heap.layout)
        return dirty

    def _undo(self, dirty: DirtySet, known: bool) -> None:
        """Have the next call read what this one did not; the whole heap, where even this fails."""
        if known:
            self._pending = self._pending | dirty
            self._heap.settle()

    def _read(self, pages: DirtySet, low: int, high: int) -> Slots:
        extents, holds = self._heap.extents(pages)
        cset = pages._lent
        try:
            found = words.find_slots(cset, extents, self._pointers._pointers, self._young, low, high, self._room)
        finally:
            del holds  # not kept by a traceback
        return Slots(found, self._heap, self._pointers, cset.pages)

    def retain(self, what: DirtySet | Slots | AnyBuffer | Iterable[int]) -> None:
        """Have pages read by the next `minor`, written or not: those of slots that point into the young memory after a
        collection whose stores `forget_own_writes` forgets. The slots that ``minor`` found need no retaining.

        Args:
            what: pages, slots, or addresses in those pages: numbers, or a buffer of 64-bit ones.

        Raises:
            InvalidMemory: an address is in no page of the heap.
        """
        if isinstance(what, Slots):
            pages = what.kept
        elif isinstance(what, DirtySet):
            pages = what
        else:
            packed, count = _numbers(what, "addresses")
            if not count:
                return
            pages = DirtySet(words.pages_of(packed, count))
        with self._heap.alone():
            beyond = pages - self._heap.whole()
            if beyond:
                start, end = next(iter(beyond))
                raise InvalidMemory(f"{describe(start, end)} is in no region of this heap", start=start, end=end)
            self._pending = self._pending | pages

    def remember_all(self, nursery: tuple[int, int] | None = None) -> None:
        """Have the next `minor` read all of the heap: after a full collection that moved objects, or because young
        objects will lie elsewhere.

        Args:
            nursery: where they are from now on; left out: where they were.

        Raises:
            InvalidNursery: it is empty, overlaps the old generation, or no slot can point there.
        """
        with self._heap.alone():
            self._heap.doubt()
            self._asked = None
            if nursery is not None:
                self._settle_nursery(*_addresses(nursery))

    @contextmanager
    def forget_own_writes(self, *, nursery_empty: bool = False) -> Iterator[None]:
        """``with remembered.forget_own_writes(): ...`` around a collection, mutators being stopped: what is written
        inside is the collector's, and is read here and now rather than in the next pause.

        What the mutators wrote before is kept apart on entry. At the end the pages that were written inside are read,
        and only those that point into the young memory are retained. Where an exception leaves the ``with``, nothing is
        forgotten.

        Args:
            nursery_empty: the collection leaves nothing young behind. Then no page can point there, and all of them are
                dropped unread, the retained ones too; but not what the mutators wrote before, if no `minor` inside
                read it. And pages are armed at the end only: the collector's stores into pages that the mutators
                wrote meet no fault.

        Raises:
            As `minor`; NurseryMoved: there is no nursery yet.

        Thread safety: mutators must be stopped from before it until after it. Should one store all the same, then with
        ``nursery_empty`` its store is lost; without, none is.
        """
        with self._heap.alone():
            self._looked, self._looking = False, nursery_empty and self._heap.knows()
            if not self._looking:
                dirty, known = self._heap.collect()
                self._pending = self._pending | dirty if known else self._heap.whole()
                self._heap.settle()
        try:
            yield
        finally:
            looking, self._looking = self._looking, False
        with self._heap.alone():
            dirty, known = self._heap.collect()
            if not known:
                return  # and the next minor() reads the whole heap
            try:
                if looking and not self._looked:
                    self._pending = self._pending | dirty
                if nursery_empty:
                    self._retained = self._nothing
                elif self._nursery is None:
                    raise NurseryMoved(
                        "there is no nursery yet, so it cannot be told which pages point there: make the set with "
                        "nursery=, or call minor() first"
                    )
                else:
                    kept = self._read(self._heap.populated(dirty), *self._nursery).kept
                    self._retained = self._retained | kept
                self._heap.settle()
            except BaseException:
                self._undo(dirty, known)
                raise

    # ---- growing and shrinking

    def add(self, memory: Region | Trackable, *, name: str | None = None, **options: Any) -> Region:
        """Make the old generation larger; it is read as a whole in the next `minor`.

        Args:
            memory: a region that the tracker watches, or what `DirtyTracker.add` takes.
            name, options: as for `DirtyTracker.add`.

        Returns:
            The region.

        Raises:
            InvalidNursery: the nursery lies in it.
            InvalidPointerFormat: it begins where no slot can.
            As `DirtyTracker.add`.
        """

        def check(region: Region) -> None:
            self._asked = None
            self._pointers._require_heap(region)
            if self._nursery is not None:
                self._require_nursery(*self._nursery)
            self._pending = self._pending | DirtySet.from_runs([(region.start, region.end)])

        with self._heap.alone():
            return self._heap.grow(memory, name, options, check)

    def remove(self, region: Region) -> None:
        """Make the old generation smaller: nothing in that region is alive. The tracker stops watching it; it stays
        registered until `Session.unregister`, which lets go of its memory.

        Raises:
            InvalidMemory: it is not part of the heap.
            As `DirtyTracker.remove`.
        """
        with self._heap.alone():
            self._heap.shrink(region)
            rest = self._heap.whole()
            self._retained, self._pending = self._retained & rest, self._pending & rest


def _addresses(nursery: Any) -> tuple[int, int]:
    try:
        low, high = nursery
        return operator.index(low), operator.index(high)
    except (TypeError, ValueError):
        raise TypeError(f"a nursery is two addresses, where it begins and where it ends, not {nursery!r}") from None


def _numbers(what: Any, called: str) -> tuple[Any, int]:
    """A buffer of 64-bit numbers, and how many there are."""
    try:
        view = memoryview(what)
    except TypeError:
        try:
            view = memoryview(array("Q", what))
        except (TypeError, OverflowError, ValueError) as error:
            raise InvalidMemory(f"{called} are numbers, or a buffer of 64-bit numbers: {error}") from error
    if view.itemsize != 8 or not view.c_contiguous:
        raise InvalidMemory(
            f"{called} are 64-bit numbers, one after the other; this buffer has items of {view.itemsize}"
        )
    return view, view.nbytes // 8

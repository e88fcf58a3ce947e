# SPDX-License-Identifier: MIT
"""Mirror: a copy of a memory that follows it, and tells what changed in between."""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING, Any

from ..dirtyset import DirtySet
from ..errors import InvalidMemory, NotStarted
from ..kernel import core, deltas, sets
from ..layout import Layout
from ..memory import allocate
from ..tracker import DirtyTracker, track
from .encoded import Delta, compared, compose, granule_of

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from ..memory import AnyBuffer
    from ..region import Region

__all__ = ["Mirror"]

# Two memories that lie a multiple of this apart are slower to read in turn, by a fifth to a third (measured, Zen 4: its
# first-level cache finds lines by a hash of the address, which is the same for both). Two mappings of such a length,
# made one after the other, lie so.
_ALIKE = 1 << 28
_ASIDE = core.PAGE_BYTES  # which is enough


class Mirror:
    """A copy of a memory, brought up to date by `Mirror.update`, which returns what changed since the last one.

    The copy is made here; it takes as much memory again. So does, at most, the room for deltas, which is kept and used
    again once nobody holds the last delta or a view of it.

    Nothing is lost: what an update that failed or was interrupted had found already is in the next one's delta, and the
    pages that it had not looked at are put back.

    Args:
        memory: what to mirror: a buffer or (address, nbytes), tracked from here to `Mirror.close`; or a tracker that
            runs, whose collects are the mirror's from then on.
        region: or its name: which one of the tracker's; may be left out where it has one only. One mirror per region.
        granule: of the deltas, a power of two from 1 to 4096 bytes. Left out: the memory's items where the buffer tells
            them, 8 bytes at most; else 8.
        options: of `track`, where the memory is no tracker.

    Raises:
        InvalidMemory: no such granule or region; or the memory cannot be tracked.
        NotStarted: the tracker does not run.
        PermissionDenied, UnsupportedKernel, RangeBusy, LimitReached: as `track`.

    Thread safety: updates may be called from any thread, and follow one another.
    """

    def __init__(
        self,
        memory: DirtyTracker | AnyBuffer | tuple[int, int],
        region: Region | str | None = None,
        *,
        granule: int | None = None,
        **options: Any,
    ) -> None:
        self._lock = threading.RLock()
        self._owned: DirtyTracker | None = None
        self._owed: list[Delta | None] = [None]  # what an update had encoded, until it is handed out
        self._rooms = deltas.Rooms()
        self._options = options
        if isinstance(memory, DirtyTracker):
            if options:
                raise InvalidMemory(f"the tracker exists already: no {', '.join(options)} can be given")
            if not memory.epoch:
                raise NotStarted("a mirror takes a tracker that runs: call its start() first, or use it in a `with`")
            self._tracker, self._region = memory, _region_of(memory, region)
        else:
            if region is not None:
                raise InvalidMemory("region= is for a tracker: this memory is one region")
            self._owned = self._follow(memory)
        try:
            self._granule = granule_of(_granule_for(self._region) if granule is None else granule)
            self._memory = allocate(self._region.nbytes + _ASIDE, name=f"mirror of {self._region.name}")
            self._begin = 0 if (self._memory.address ^ self._region.address) % _ALIKE else _ASIDE
            # As a range, which this object holds: a garbage collection that meets a memoryview whose buffer is in use,
            # both of them in a cycle such as a traceback makes, crashes CPython up to 3.11 and 3.12.6 (gh-77894).
            self._copy = self._memory.address + self._begin, self._region.nbytes
            _all_of(self._region).copy_to(self._copy)
        except BaseException:
            self.close()
            raise

    def _follow(self, memory: AnyBuffer | tuple[int, int]) -> DirtyTracker:
        """Track that memory from now on."""
        self._tracker = track(memory, **self._options).__enter__()
        (self._region,) = self._tracker.regions
        return self._tracker

    # ---- what it is

    @property
    def data(self) -> memoryview:
        """The copy, read-only: the memory as of the last update."""
        return memoryview(self._memory)[self._begin : self._begin + self._region.nbytes].toreadonly()

    @property
    def nbytes(self) -> int:
        """Of the memory, and of the copy."""
        return self._region.nbytes

    @property
    def granule(self) -> int:
        """Of the deltas."""
        return self._granule

    @property
    def tracker(self) -> DirtyTracker:
        """Who finds the dirty pages."""
        return self._tracker

    @property
    def region(self) -> Region:
        """What is mirrored."""
        return self._region

    def __repr__(self) -> str:
        return f"<Mirror of {self._region!r}>"

    # ---- following

    def update(self) -> Delta:
        """Bring the copy up to date.

        Returns:
            What changed since the last update, or since the mirror was made. Applied to another copy of that time, it
            makes it equal to this one.

        Raises:
            RegionGone: the memory, or a page of it, went away.
            MissedWrite: the tracker's audit found an unreported change.
            NotStarted, NotRegistered, SessionClosed, UsedAfterFork.
        """
        with self._lock:
            dirty: DirtySet | None = None
            try:
                dirty = self._tracker.collect(self._region)
                made = self._take(dirty)
            except BaseException:
                if dirty is not None:
                    self._tracker.put_back(dirty)
                raise
        # The last step, and in this very frame: Python looks for signals whenever a call returns.
        delta, made[0] = made[0], None
        return delta  # type: ignore[return-value]

    def _take(self, dirty: DirtySet) -> list[Delta | None]:
        """Compare those pages, and bring the copy up to date. What came of it is owed until it is taken out of the
        list."""
        owed, slot = self._owed, None
        try:
            cset, extents, holds = compared(self._region, self._copy, dirty, update=True)
            slot = self._rooms.take(deltas.room(cset, extents, self._granule))
            deltas.diff(cset, extents, self._granule, update=True, slot=slot)
            del holds
            self._owed = [_joined(owed[0], slot)]
        except BaseException:  # an interrupt too
            if slot is not None and slot.nbytes and self._owed is owed:  # the copy has it already
                self._owed = [_joined(owed[0], slot)]
            raise
        return self._owed

    def move_to(self, memory: AnyBuffer | tuple[int, int]) -> Delta:
        """Mirror another memory of the same length from now on: the same data at another place.

        Returns:
            What the other memory has differently, found by comparing all of it.

        Raises:
            InvalidMemory: it is of another length, or this mirror was given its tracker; or as `track`.
        """
        with self._lock:
            before = self._owned
            if before is None:
                raise InvalidMemory("this mirror was given its tracker: make another mirror of the other memory")
            was = self._tracker, self._region
            after = self._follow(memory)
            try:
                if self._region.nbytes != was[1].nbytes:
                    raise InvalidMemory(f"that memory has {self._region.nbytes} bytes, this mirror {was[1].nbytes}")
                made = self._take(_all_of(self._region))
            except BaseException:
                after.__exit__(None, None, None)
                self._tracker, self._region = was
                raise
            self._owned = after
            before.__exit__(None, None, None)
        delta, made[0] = made[0], None
        return delta  # type: ignore[return-value]

    def close(self) -> None:
        """Stop tracking, where the mirror does that itself. The copy stays."""
        with self._lock:
            owned, self._owned = self._owned, None
            if owned is not None:
                owned.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a Mirror cannot be pickled: it follows this process's memory")


def _joined(owed: Delta | None, slot: deltas.Slot) -> Delta:
    delta = Delta(deltas.trimmed(slot), slot.nbytes, sealed=False)
    return delta if owed is None else compose(owed, delta)


def _all_of(region: Region) -> DirtySet:
    """All pages of a region."""
    whole = struct.pack("=QQ", region.start, region.end)
    return DirtySet(sets.from_runs(whole, 1), Layout((region._span,)))


def _region_of(tracker: DirtyTracker, wanted: Region | str | None) -> Region:
    found = [region for region in tracker.regions if wanted is None or wanted in (region, region.name)]
    if len(found) != 1:
        names = ", ".join(repr(region.name) for region in tracker.regions[:8]) or "none"
        which = "which region?" if wanted is None else f"there is no such region, or more than one: {wanted!r}."
        raise InvalidMemory(f"{which} A mirror is of one; the tracker has {len(tracker.regions)}: {names}")
    return found[0]


def _granule_for(region: Region) -> int:
    """The largest that tells the items apart, where the buffer told their shape."""
    itemsize = region.nbytes
    for length in region.shape or ():
        itemsize //= length
    return min(itemsize & -itemsize, 8) if region.shape and region.dtype != "B" else 8

# SPDX-License-Identifier: MIT
"""ConcurrentMark: mostly-concurrent marking by incremental update, with the final pause predicted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from ..dirtyset import DirtySet
from ..errors import InvalidMemory, NotStarted
from .heap import Heap

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..region import Region
    from ..tracker import DirtyTracker, Trackable

__all__ = ["ConcurrentMark", "MarkRound"]

_SHRINKS = 0.9  # a round that finds more than this share of what the one before found gains nothing worth a round


class MarkRound(NamedTuple):
    """What one round of re-marking found and took."""

    page_count: int
    """Pages that were written since the round before, or added."""
    epoch_seconds: float
    """How long the mutators had for that."""
    seconds: float
    """How long it took to collect these pages and to mark from them."""
    added_page_count: int = 0
    """Those of them in regions that were added since the round before: they come once, whoever writes them."""


class ConcurrentMark:
    """Mark while the program runs, and stop it for the rest only (Boehm, Demers and Shenker, 1991).

    A page barrier says afterwards that a page was written, not what was there before. So this is **incremental
    update**, and no snapshot at the beginning: an object that becomes unreachable while marking runs may survive until
    the next time, and none that is reachable at the end is missed, by this scheme:

    1. `begin`. From here on every write is told. Then read the roots, and mark from them while the mutators run.
    2. ``for dirty in mark.rounds()``: from every marked object that has a byte on those pages, mark what it points to
       (`CrossingMap.objects_on` says which objects these are), while the mutators run. Ends when the pause that is left
       is predicted to be short enough, or gets no shorter.
    3. Stop the mutators. ``dirty = mark.finish()``: the same again from these pages, and from all roots: stacks,
       registers, and the nursery, if there is one. Everything that is reachable is marked now; they may go on.

    What was allocated in the heap meanwhile was written, so its page is dirty; whether such objects are born marked is
    the collector's choice.

    Why nothing is missed: an object that is reachable at the end has a path from a root. Take the first on it that is
    not marked. Whatever points to it is a root, all of which step 3 reads, or an object that is marked and holds the
    reference in some word. If that word was stored before the object was last read, the reading saw it and marked. If
    after, the page was written after a collect that came before that reading, so it is in a later set, from which the
    object was read again.

    Args:
        regions: the heap, which the tracker watches.
        tracker: its collects are the marking's while it runs. A `RememberedSet` of the same heap has one of its own.
        pause_seconds: how long the final pause may be.
        most_rounds: give up to shorten it after so many.

    Raises:
        NotRegistered: a region is not registered, or not one of the tracker's.
        InvalidMemory: no time, or no number of rounds.

    Thread safety: one thread marks. The time that it takes between two rounds is what is predicted with. `add` and
    `remove` may be called by any thread.
    """

    def __init__(
        self,
        regions: Region | Iterable[Region],
        tracker: DirtyTracker,
        *,
        pause_seconds: float = 0.005,
        most_rounds: int = 10,
    ) -> None:
        if not 0 <= pause_seconds <= 1e6 or most_rounds < 0:
            raise InvalidMemory(f"no pause takes {pause_seconds} s, or no marking {most_rounds} rounds")
        self._heap = Heap(regions, tracker)
        self._pause_seconds, self._most_rounds = pause_seconds, most_rounds
        self._history: list[MarkRound] = []
        self._owed: DirtySet | None = None  # that was given out, and is not known to have been marked from
        self._added: DirtySet | None = None  # whole regions that are in no round yet
        self._running = False
        self._given = self._collected = 0.0

    @property
    def regions(self) -> tuple[Region, ...]:
        """The heap."""
        return self._heap.regions

    @property
    def tracker(self) -> DirtyTracker:
        """Whose collects tell what was written."""
        return self._heap.tracker

    @property
    def history(self) -> tuple[MarkRound, ...]:
        """The rounds since `begin`."""
        return tuple(self._history)

    @property
    def predicted_pages(self) -> float:
        """How many pages `finish` would find if the mutators stopped now and wrote on as in the last round; infinite
        before the first round."""
        if not self._history:
            return float("inf")
        last = self._history[-1]
        since = time.perf_counter() - self._collected
        # Pages are written again: within the time of an epoch no more than in that epoch, beyond it in proportion.
        return _written(last) * min(1.0, since / last.epoch_seconds if last.epoch_seconds else 1.0)

    @property
    def predicted_pause_seconds(self) -> float:
        """How long collecting and marking from these pages would take, by what the rounds took for a page. To mark from
        the roots comes on top: only the collector knows what that takes."""
        marked = [each for each in self._history if each.page_count]
        if not marked:
            return 0.0 if self._history else float("inf")
        speed = sum(each.seconds for each in marked) / sum(each.page_count for each in marked)
        return self.predicted_pages * speed

    def begin(self) -> None:
        """Forget what was written until now, and have everything from here on told. Roots are read after it.

        Raises:
            NotStarted, RegionGone, NotRegistered, MissedWrite, SessionClosed, UsedAfterFork: as
                `DirtyTracker.collect`.
        """
        with self._heap.alone():
            self._heap.collect()
            self._heap.settle()
            self._history.clear()
            self._owed, self._added, self._running = None, None, True
            self._collected = time.perf_counter()

    def rounds(self) -> Iterator[DirtySet]:
        """The pages written since the last round, each time: mark from the marked objects on them, and go on.

        Ends when the predicted pause is short enough, when a round finds hardly fewer pages than the one before, or
        after ``most_rounds``. A round that is left by ``break`` or by an exception is in the next one, or in `finish`.

        Raises:
            NotStarted: there was no `begin`.
            As `begin`; nothing is lost then.
        """
        while len(self._history) < self._most_rounds and not self._short_enough():
            dirty, epoch_seconds, added = self._take()
            began = self._given = self._collected
            yield dirty
            self._owed = None  # marked from: whoever asks for the next round says so
            took = time.perf_counter() - began
            self._history.append(MarkRound(dirty.page_count, epoch_seconds, took, added))

    def finish(self) -> DirtySet:
        """The pages that are left, the mutators being stopped: mark from them and from all roots, and the marking is
        complete.

        Raises:
            As `rounds`; nothing is lost then, and it may be called again.
        """
        dirty, _, _ = self._take()
        self._running = False
        return dirty

    def add(self, memory: Region | Trackable, *, name: str | None = None, **options: Any) -> Region:
        """Make the heap larger, while marking runs or not, at the latest before `finish`: all that is populated of it
        is in the next round, since nobody knows its past.

        Args:
            memory: a region that the tracker watches, or what `DirtyTracker.add` takes.
            name, options: as for `DirtyTracker.add`.

        Returns:
            The region.

        Raises:
            As `DirtyTracker.add`; the heap is as it was then.
        """

        def note(region: Region) -> None:
            new = DirtySet.from_runs([(region.start, region.end)])
            self._added = new if self._added is None else self._added | new

        with self._heap.alone():
            return self._heap.grow(memory, name, options, note)

    def remove(self, region: Region) -> None:
        """Make the heap smaller, while marking runs or not: nothing in that region is alive, and what was in a round of
        it is not to be looked at again. The tracker stops watching it; it stays registered until `Session.unregister`,
        which lets go of its memory.

        Raises:
            InvalidMemory: it is not part of the heap.
            As `DirtyTracker.remove`.
        """
        with self._heap.alone():
            self._heap.shrink(region)
            rest = self._heap.whole()
            self._owed, self._added = (pages and pages & rest for pages in (self._owed, self._added))

    def _short_enough(self) -> bool:
        self._require()
        if not self._history:
            return False
        if self.predicted_pause_seconds <= self._pause_seconds:
            return True
        before, last = self._history[-2:] if len(self._history) > 1 else (None, self._history[-1])
        return before is not None and _written(last) > _written(before) * _SHRINKS

    def _require(self) -> None:
        if not self._running:
            raise NotStarted("no marking is under way: call begin() first, then read the roots and mark from them")

    def _take(self) -> tuple[DirtySet, float, int]:
        """What is owed, how long the mutators had, and how many pages of it are of regions that came meanwhile."""
        self._require()
        with self._heap.alone():
            dirty, known = self._heap.collect()
            try:
                owed = dirty if known else self._heap.whole()
                for pages in (self._owed, self._added):
                    owed = owed if pages is None else owed | pages
                owed = self._heap.populated(owed)  # where nothing is, nothing is marked
                added = 0 if self._added is None else (owed & self._added).page_count
                now = time.perf_counter()
                epoch_seconds, self._collected = now - self._collected, now
                self._owed, self._added = owed, None
                self._heap.settle()
            except BaseException:
                if known:
                    self._heap.tracker.put_back(dirty)
                    self._heap.settle()
                raise
        return owed, epoch_seconds, added

    def __repr__(self) -> str:
        state = f"{len(self._history)} rounds" if self._running else "not running"
        return f"<ConcurrentMark of {self._heap!r}, {state}>"


def _written(each: MarkRound) -> int:
    return each.page_count - each.added_page_count

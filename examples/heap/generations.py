# SPDX-License-Identifier: MIT
"""The memory of both generations, and who watches the old one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import dirtytrack
from dirtytrack.gc import ConcurrentMark, CrossingMap, PointerFormat, RememberedSet

from .errors import HeapExhausted

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dirtytrack import DirtyTracker, Region

__all__ = ["UNIT_BYTES", "Generations"]

UNIT_BYTES = 16
"""Objects begin at multiples of it."""


class Generations:
    """Young memory, of which nobody keeps track; and a reservation for the old generation, registered by segments as it
    grows. Two trackers watch it: one for the remembered set, one for marking. Each hears of every write, whatever the
    other has taken; a third one, of a checkpointer, would too.

    Args:
        young_bytes: of eden and both survivor spaces.
        old_bytes: how large the old generation may become.
        segment_bytes: by how much it grows; where there are huge pages, a multiple of them.
        huge: pages of the old generation, as `dirtytrack.allocate` takes it.
        pause_seconds: what a marking tries to keep its last pause below, beside the minor collection in it.
        adaptive: whether pages that are rewritten all the time may go unwatched, as `dirtytrack.DirtyTracker` says.
        minor_tracker, marking_tracker: for tests, which pass one that misses writes.
    """

    def __init__(
        self,
        young_bytes: int,
        old_bytes: int,
        segment_bytes: int,
        huge: Literal["transparent", "2M", "1G"] | None,
        pause_seconds: float,
        adaptive: bool,
        minor_tracker: type[DirtyTracker],
        marking_tracker: type[DirtyTracker],
    ) -> None:
        self.young = dirtytrack.allocate(young_bytes, name="young generation")
        self.old = dirtytrack.allocate(old_bytes, huge=huge, sparse=huge is None)
        self.segment_bytes = -(-segment_bytes // self.old.page_bytes) * self.old.page_bytes
        self.starts = CrossingMap(self.old, UNIT_BYTES)
        self.session = dirtytrack.UffdSession()
        self._segments = [self._register(0)]
        self._coming: Region | None = None  # of a growing that was interrupted
        self._leaving: list[Region] = []  # of a shrinking
        self._for_minor = minor_tracker(self.session, self._segments, adaptive=adaptive)
        self._for_marking = marking_tracker(self.session, self._segments, adaptive=adaptive)
        self._for_minor.start()
        self._for_marking.start()
        self.remembered = RememberedSet(
            self._segments, self._for_minor, pointers=PointerFormat.plain(UNIT_BYTES), nursery=self.nursery
        )
        self.mark = ConcurrentMark(self._segments, self._for_marking, pause_seconds=pause_seconds)

    @property
    def nursery(self) -> tuple[int, int]:
        """All addresses at which young objects ever are."""
        return self.young.address, self.young.address + self.young.nbytes

    @property
    def regions(self) -> tuple[Region, ...]:
        """The old generation as it is now."""
        return tuple(self._segments)

    @property
    def nbytes(self) -> int:
        """Of the old generation as it is now."""
        return sum(region.nbytes for region in self._segments)

    def _register(self, start: int) -> Region:
        end = min(start + self.segment_bytes, self.old.nbytes)
        return self.session.register(memoryview(self.old)[start:end], name=f"old generation, from {start}")

    def grow(self) -> int:
        """By a segment; returns how many bytes there are then.

        Raises:
            HeapExhausted: all that was reserved is in use.
        """
        self._let_go()
        if self._coming is None or _is_in(self._coming, self._segments):
            if self.nbytes == self.old.nbytes:
                raise HeapExhausted(f"the old generation has all {self.old.nbytes} bytes that it may have")
            self._coming = self._register(self.nbytes)
        region = self._coming
        if not _is_in(region, self.remembered.regions):
            self.remembered.add(region)
        if not _is_in(region, self.mark.regions):
            self.mark.add(region)  # a marking that is under way has all of it in its next round
        self._segments.append(region)
        self._coming = None
        return self.nbytes

    def shrink(self) -> None:
        """By the last segment, in which nothing is: its pages go back to the system."""
        if self._coming is not None:
            self._leaving.append(self._coming)
            self._coming = None
        self._leaving.append(self._segments[-1])
        self._segments.pop()
        self._let_go()

    def _let_go(self) -> None:
        """Of segments that are none any more. Whatever was done before an interrupt is not done again."""
        while self._leaving:
            region = self._leaving[-1]
            if not _is_in(region, self._segments):
                for watching in (self.remembered, self.mark):
                    if _is_in(region, watching.regions):
                        watching.remove(region)
                for tracker in (self._for_minor, self._for_marking):
                    if _is_in(region, tracker.regions):
                        tracker.remove(region)
                if region.registered:
                    self.session.unregister(region)
                self.old.discard(region.address - self.old.address, region.nbytes)
            self._leaving.pop()

    def discard(self, start: int, end: int) -> None:
        """Give pages back in the middle, at addresses: MADV_DONTNEED."""
        self.old.discard(start - self.old.address, end - start)

    def close(self) -> None:
        """Let go of the userfaultfd and of the memory; nobody has a pointer into it any more."""
        for tracker in (self._for_minor, self._for_marking):
            if tracker.epoch:
                tracker.stop()
        self.session.close()
        self.old.close()
        self.young.close()


def _is_in(region: Region, regions: Iterable[Region]) -> bool:
    return any(each is region for each in regions)

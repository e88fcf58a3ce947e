# SPDX-License-Identifier: MIT
"""Source: what can be observed; anything that collects and knows its mappings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ..process.mappings import Mapping
from ..tracker import DirtyTracker

if TYPE_CHECKING:
    from ..dirtyset import DirtySet
    from ..region import Region

__all__ = ["Source", "TrackerSource", "source_of"]


@runtime_checkable
class Source(Protocol):
    """What is observed: a `ProcessTracker` is one, a `DirtyTracker` is made one by `source_of`."""

    @property
    def epoch(self) -> int:
        """The open epoch."""

    @property
    def mappings(self) -> tuple[Mapping, ...]:
        """As of the last collect, by address."""

    def collect(self) -> DirtySet:
        """Every page written since the last collect."""


class TrackerSource:
    """A tracker of this process's own memory as a Source: its regions are the mappings, each under its name.

    Args:
        tracker: a started one.
    """

    def __init__(self, tracker: DirtyTracker) -> None:
        self._tracker = tracker
        self._regions: tuple[Region, ...] = ()
        self._mappings: tuple[Mapping, ...] = ()

    @property
    def epoch(self) -> int:
        """The tracker's."""
        return self._tracker.epoch

    @property
    def mappings(self) -> tuple[Mapping, ...]:
        """A mapping for each region: its page span. Only start, end, name and state are known."""
        regions = self._tracker.regions
        if regions != self._regions:
            found = [
                Mapping(
                    start=region.start,
                    end=region.end,
                    permissions="",
                    offset=0,
                    device="",
                    inode=0,
                    name=region.name,
                    state="tracked",
                    reason="",
                )
                for region in regions
            ]
            self._mappings = tuple(sorted(found, key=lambda mapping: (mapping.start, mapping.end, mapping.name)))
            self._regions = regions
        return self._mappings

    def collect(self) -> DirtySet:
        """The tracker's."""
        return self._tracker.collect()

    def put_back(self, dirty: DirtySet) -> None:
        """The tracker's."""
        self._tracker.put_back(dirty)


def source_of(tracker: DirtyTracker | Source) -> Source:
    """A tracker of this process, or whatever is a Source already, as a Source."""
    return TrackerSource(tracker) if isinstance(tracker, DirtyTracker) else tracker

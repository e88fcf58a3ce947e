# SPDX-License-Identifier: MIT
"""Several processes that write one shared memory: what any of them wrote."""

from __future__ import annotations

from array import array
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from ..dirtyset import DirtySet
from ..errors import InvalidMemory, TargetGone
from ..kernel import sets
from .mappings import EXCLUDED, Mapping

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .tracker import ProcessTracker

__all__ = ["Workers"]


class Workers:
    """One shared memory that several processes write, each tracked by a `ProcessTracker` that was told to include it.

    Args:
        trackers: of `attach` or `accept`; they stay the caller's.
        name: of the memory, as `Mapping.name` has it, ``*`` and ``?`` as in a shell.

    Raises:
        InvalidMemory: one of the processes does not have it mapped and tracked, or the name matches more than one.

    Thread safety: as its trackers.
    """

    def __init__(self, trackers: Iterable[ProcessTracker], name: str) -> None:
        self._trackers = list(trackers)
        self._name = name
        self._spans: dict[ProcessTracker, list[Mapping]] = {}
        found = set()
        for tracker in self._trackers:
            spans = [m for m in tracker.mappings if self._is_named(m)]
            if not spans:
                raise InvalidMemory(
                    f"process {tracker.pid} tracks no shared memory called {name!r}: name it in include= of its tracker"
                )
            self._spans[tracker] = spans
            found |= {(m.device, m.inode) for m in spans}
        if len(found) > 1:
            raise InvalidMemory(f"{name!r} matches {len(found)} memories: they are not one that all of them share")
        if not found:
            raise InvalidMemory("there is no tracker")
        ((self._device, self._inode),) = found

    def _is_named(self, mapping: Mapping) -> bool:
        return (
            mapping.state != EXCLUDED
            and mapping.permissions.endswith("s")
            and fnmatchcase(mapping.name, self._name.replace("[", "[[]"))
        )

    @property
    def trackers(self) -> tuple[ProcessTracker, ...]:
        """Those whose processes were there at the last collect."""
        return tuple(self._trackers)

    def collect(self) -> DirtySet:
        """The pages of the shared memory that any of the processes wrote since the last collect.

        What the trackers find of their other memory is dropped. A process that has ended, or let go of the memory, may
        have written all that it had mapped: that counts as dirty once, and the process is left out from then on.

        Returns:
            A set whose "addresses" are offsets into the shared memory.
        """
        runs: list[tuple[int, int]] = []
        for tracker in tuple(self._trackers):
            before = self._spans[tracker]
            try:
                dirty: Iterable[tuple[int, int]] = tracker.collect()
                now = [m for m in tracker.mappings if (m.device, m.inode) == (self._device, self._inode)]
                now = [m for m in now if m.state != EXCLUDED]
            except TargetGone:
                dirty, now = [(m.start, m.end) for m in before], []
                self._trackers.remove(tracker)
            gone = [m for m in before if m not in now]
            self._spans[tracker] = now
            runs += [(m.offset, m.offset + m.nbytes) for m in gone]
            for start, end in dirty:
                for m in now:
                    low, high = max(start, m.start), min(end, m.end)
                    if low < high:
                        runs.append((m.offset + low - m.start, m.offset + high - m.start))
        return DirtySet(_set_of(runs))


def _set_of(runs: list[tuple[int, int]]) -> object:
    numbers = array("Q")
    for start, end in sorted(runs):
        if numbers and start <= numbers[-1]:
            numbers[-1] = max(numbers[-1], end)
        else:
            numbers.extend((start, end))
    return sets.from_runs(numbers, len(numbers) // 2)

# SPDX-License-Identifier: MIT
"""The written working set: which pages were written in the last seconds, for several lengths of time at once."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from ..dirtyset import DirtySet

__all__ = ["LENGTHS_SECONDS", "Window"]

LENGTHS_SECONDS = (1.0, 10.0, 60.0)
_PARTS = 64
_MOST_RUNS = 1 << 22  # 64 MiB a window
_FEWEST_PARTS = 8


class _Part(NamedTuple):
    begun: float
    ended: float
    dirty: DirtySet


class Window:
    """What was written in the last ``seconds``, in some 64 parts.

    It begins with a part, not within one, so it covers what it should to within a 64th; an eighth more, where the parts
    have so many runs that neighbours are united; and never less than the last epoch. Until it was watched for so long
    it covers less: ``covered_seconds``.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._parts: deque[_Part] = deque()

    def add(self, dirty: DirtySet, begun: float, ended: float) -> None:
        """Take in what was written from ``begun`` to ``ended``, in seconds of any clock that runs forward."""
        parts = self._parts
        if parts and ended - parts[-1].begun <= self.seconds / _PARTS:
            last = parts.pop()
            dirty, begun = last.dirty | dirty, last.begun
        parts.append(_Part(begun, ended, dirty))
        while parts[0].ended <= ended - self.seconds * (1 - 1 / _PARTS):
            parts.popleft()
        if len(parts) >= 2 * _FEWEST_PARTS and sum(len(part.dirty) for part in parts) > _MOST_RUNS:
            self._parts = deque(_united(list(parts)))

    @property
    def covered_seconds(self) -> float:
        """From the begin of the first part to the end of the last."""
        return self._parts[-1].ended - self._parts[0].begun if self._parts else 0.0

    @property
    def full(self) -> bool:
        """Whether it was watched for as long as it is."""
        return self.covered_seconds >= self.seconds * (1 - 1 / _PARTS)

    def written(self) -> DirtySet:
        """Each page that was written, once."""
        return DirtySet.union(part.dirty for part in self._parts)


def _united(parts: list[_Part]) -> list[_Part]:
    """Neighbours two by two, counted from the newest, so that it is the oldest that may stay alone."""
    out: list[_Part] = []
    while parts:
        last = parts.pop()
        if parts:
            first = parts.pop()
            last = _Part(first.begun, last.ended, first.dirty | last.dirty)
        out.append(last)
    return out[::-1]

# SPDX-License-Identifier: MIT
"""What a source writes just now: rates, working sets and histories, of the whole and of each mapping."""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..dirtyset import DirtySet
from ..kernel.core import PAGE_BYTES
from .windows import LENGTHS_SECONDS, Window

if TYPE_CHECKING:
    from ..process.mappings import Mapping
    from .source import Source

__all__ = ["HISTORY", "MappingSample", "Sample", "Watch"]

HISTORY = 60
"""So many epochs are kept for a sparkline."""


@dataclass(frozen=True)
class MappingSample:
    """What was written of one mapping.

    Attributes:
        mapping: which.
        dirty_bytes: in the last epoch, whole pages.
        bytes_per_second: the same over the epoch's time.
        windows_bytes: how much was written at least once in each window.
        history: bytes a second, epoch by epoch, the newest last; at most 60 of them.
    """

    mapping: Mapping
    dirty_bytes: int
    bytes_per_second: float
    windows_bytes: tuple[int, ...]
    history: tuple[float, ...]

    @property
    def share(self) -> float:
        """The part of the mapping, 0 to 1, that the last epoch wrote."""
        return self.dirty_bytes / self.mapping.nbytes


@dataclass(frozen=True)
class Sample:
    """What was written of a source, as of the end of an epoch.

    Attributes:
        epoch: the one that ended.
        seconds: how long it was.
        collect_seconds: how long the collect at its end took.
        dirty_bytes, bytes_per_second, windows_bytes, history: as of `MappingSample`, of all mappings; pages of mappings
            that have gone meanwhile are still in the windows.
        windows_full: for each window, whether it was watched for as long as it is.
        mappings: those that are tracked or count as dirty, by address.
    """

    epoch: int
    seconds: float
    collect_seconds: float
    dirty_bytes: int
    bytes_per_second: float
    windows_bytes: tuple[int, ...]
    windows_full: tuple[bool, ...]
    history: tuple[float, ...]
    mappings: tuple[MappingSample, ...]

    @property
    def untracked_bytes(self) -> int:
        """How much of ``dirty_bytes`` counts as written because it cannot be tracked."""
        return sum(row.dirty_bytes for row in self.mappings if row.mapping.state == "untracked")


class Watch:
    """Watches a source: each `sample` ends an epoch and tells what was written.

    Args:
        source: what is collected from; nobody else should.
        lengths_seconds: the windows.
        clock: seconds, running forward.

    Attributes:
        source: as given.
        windows: a `Window` for each of the lengths.
        dirty: what the last sample collected.
    """

    def __init__(
        self,
        source: Source,
        lengths_seconds: Sequence[float] = LENGTHS_SECONDS,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.source = source
        self.windows = tuple(Window(seconds) for seconds in lengths_seconds)
        self._clock = clock
        self._begun = clock()
        self.dirty = DirtySet()
        self._history = deque[float](maxlen=HISTORY)
        self._histories: dict[tuple[int, str], deque[float]] = {}

    def sample(self) -> Sample:
        """Collect, and say what was written since the sample before.

        Raises:
            TargetGone: the process ended; whatever else the source's collect raises.
        """
        epoch = self.source.epoch
        before = self._clock()
        self.dirty = dirty = self.source.collect()
        begun, ended = self._begun, self._clock()
        self._begun = ended
        seconds = max(ended - begun, 1e-9)
        mappings = [mapping for mapping in self.source.mappings if mapping.state != "excluded"]
        spans = array("Q", (edge for mapping in mappings for edge in (mapping.start, mapping.end)))
        counts = dirty.page_counts(spans).tolist()
        written = []
        windows_counts = []
        for window in self.windows:
            window.add(dirty, begun, ended)
            pages = window.written()
            written.append(pages.page_span_bytes)
            windows_counts.append(pages.page_counts(spans).tolist())
        self._history.append(dirty.page_span_bytes / seconds)
        kept, self._histories = self._histories, {}
        rows = []
        for i, mapping in enumerate(mappings):
            rate = counts[i] * PAGE_BYTES / seconds
            key = (mapping.start, mapping.name)
            history = self._histories[key] = kept.get(key, deque(maxlen=HISTORY))
            history.append(rate)
            windows_bytes = tuple(each[i] * PAGE_BYTES for each in windows_counts)
            rows.append(MappingSample(mapping, counts[i] * PAGE_BYTES, rate, windows_bytes, tuple(history)))
        return Sample(
            epoch=epoch,
            seconds=seconds,
            collect_seconds=ended - before,
            dirty_bytes=dirty.page_span_bytes,
            bytes_per_second=dirty.page_span_bytes / seconds,
            windows_bytes=tuple(written),
            windows_full=tuple(window.full for window in self.windows),
            history=tuple(self._history),
            mappings=tuple(rows),
        )

# SPDX-License-Identifier: MIT
"""dirtied: what a block of code, or a function, writes; by buffer and rows."""

from __future__ import annotations

import sys
import time
from contextlib import ContextDecorator, ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from ..dirtyset import DirtySet
from ..errors import NotStarted
from ..kernel.core import PAGE_BYTES
from ..tracker import track
from .arrays import np
from .units import show_bytes, show_seconds

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from typing_extensions import Self

    from ..region import Region
    from ..tracker import DirtyTracker, Trackable

__all__ = ["DirtiedBuffer", "dirtied"]

_SHOWN = 8


class DirtiedBuffer(NamedTuple):
    """A buffer of which something was written."""

    name: str
    page_count: int
    pages: int
    """That it has."""
    rows: tuple[range, ...]
    """Along its first axis (bytes, where the buffer told no shape): all that a dirty page touches."""
    unit: str
    """What they are called: row, element or byte."""

    def __str__(self) -> str:
        shown = [str(part.start) if len(part) == 1 else f"{part.start}..{part.stop - 1}" for part in self.rows[:_SHOWN]]
        more = f" and {len(self.rows) - _SHOWN} more" if len(self.rows) > _SHOWN else ""
        several = "s" if len(self.rows) > 1 or len(self.rows[0]) > 1 else ""
        return f"{self.page_count} of {self.pages} pages, {self.unit}{several} {', '.join(shown)}{more}"


class dirtied(ContextDecorator):  # noqa: N801 - it is read as a word: with dirtied(...), @dirtied(...)
    """Print what a block, or each call of a function, wrote: by buffer, and by the rows that the written pages touch.

    It is told by pages: a small buffer shares its pages with whatever else lies there, and is told as written with it.

    ``with observe.dirtied({"weights": w, "state": s}): step()``; or ``@observe.dirtied({"weights": w})``.

    Args:
        buffers: as `track` takes them.
        file: where it is printed; left out, standard output; None: nowhere.

    Attributes:
        dirty: the DirtySet, once the block is left.
        buffers: the buffers that were written, most pages first.
        seconds: how long the block took.

    Raises:
        InvalidMemory, RangeBusy, PermissionDenied, UnsupportedKernel: on entry, as `track`.

    Thread safety: each block or call has a tracker of its own. What other threads write meanwhile is told as well.
    """

    def __init__(
        self, *buffers: Trackable | Mapping[str, Trackable], file: TextIO | Any | None = ..., **options: Any
    ) -> None:
        self._buffers, self._file, self._options = buffers, file, options
        self._tracker: DirtyTracker | None = None
        self._dirty: DirtySet | None = None
        self._found: tuple[DirtiedBuffer, ...] = ()
        self._regions: tuple[Region, ...] = ()
        self.seconds = 0.0

    def _recreate_cm(self) -> Self:
        return type(self)(*self._buffers, file=self._file, **self._options)

    @property
    def dirty(self) -> DirtySet:
        """What was written.

        Raises:
            NotStarted: the block has not been left.
        """
        if self._dirty is None:
            raise NotStarted("what a block wrote is known when it is left")
        return self._dirty

    @property
    def buffers(self) -> tuple[DirtiedBuffer, ...]:
        """Of which something was written. Raises as `dirty`."""
        assert self.dirty is not None
        return self._found

    def __enter__(self) -> Self:
        self._tracker = track(*self._buffers, exact=True, **self._options)
        self._tracker.__enter__()
        self._regions = self._tracker.regions
        self._began = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tracker, self._tracker = self._tracker, None
        assert tracker is not None
        with ExitStack() as stack:
            stack.push(tracker)  # left in any case
            self._dirty = tracker.collect()
            self.seconds = time.perf_counter() - self._began
            found = [_looked_at(self._dirty, region) for region in self._regions]
        self._found = tuple(sorted((each for each in found if each.page_count), key=lambda each: -each.page_count))
        file = sys.stdout if self._file is ... else self._file
        if file is not None:
            print(self, file=file)

    def __str__(self) -> str:
        dirty, count = self.dirty, len(self._regions)
        first = (
            f"{len(self._found)} of {count} buffer{'s' if count > 1 else ''} dirtied in {show_seconds(self.seconds)}: "
            f"{dirty.page_count} page{'' if dirty.page_count == 1 else 's'}, {show_bytes(dirty.page_span_bytes)}"
        )
        width = max((len(each.name) for each in self._found), default=0)
        return "\n".join([first, *(f"  {each.name:{width}}  {each}" for each in self._found)])


def _looked_at(dirty: DirtySet, region: Region) -> DirtiedBuffer:
    offsets = np.asarray(dirty.offsets(region)).reshape(-1, 2).astype(np.int64)
    shape = region.shape or (region.nbytes,)
    row_bytes = region.nbytes // shape[0]
    unit = "row" if len(shape) > 1 else "element" if row_bytes > 1 else "byte"
    first, last = offsets[:, 0] // row_bytes, (offsets[:, 1] - 1) // row_bytes
    parts = list[range]()
    if len(first):
        apart = np.flatnonzero(first[1:] > last[:-1] + 1)
        begins, ends = np.append(0, apart + 1), np.append(apart, len(first) - 1)
        parts = [range(int(a), int(b) + 1) for a, b in zip(first[begins], last[ends], strict=True)]
    return DirtiedBuffer(
        region.name, dirty.in_region(region).page_count, (region.end - region.start) // PAGE_BYTES, tuple(parts), unit
    )

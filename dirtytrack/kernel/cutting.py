# SPDX-License-Identifier: MIT
"""What a set has of several memories, cut into parts of bounded length: for `dirtytrack.checkpoint`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from . import core

if TYPE_CHECKING:
    from .core import CData

__all__ = ["Cut", "Cuts", "cut"]


class Cut(NamedTuple):
    """A part of what a set has of one memory."""

    memory: int
    """Its index."""
    first: int
    span_count: int
    """Its spans, of all of them."""
    nbytes: int


class Cuts:
    """What `cut` found. ``len()`` is how many there are; indexing gives a `Cut`."""

    __slots__ = ("_cuts", "_spans", "nbytes", "span_count")

    def __init__(self, cuts: CData, spans: CData, nbytes: int) -> None:
        self._cuts, self._spans, self.nbytes, self.span_count = cuts, spans, nbytes, len(spans)

    def __len__(self) -> int:
        return len(self._cuts)

    def __getitem__(self, index: int) -> Cut:
        found = self._cuts[index]
        return Cut(found.memory, found.first, found.count, found.nbytes)

    def spans(self, which: Cut) -> memoryview:
        """Pairs of 64-bit numbers, offset in the memory and length, as bytes; copies nothing."""
        whole = memoryview(core.ffi.buffer(self._spans)).cast("B")
        return whole[16 * which.first : 16 * (which.first + which.span_count)]

    def bounds(self, which: Cut) -> tuple[int, int]:
        """Of its bytes in the memory: where the first span begins and the last one ends."""
        last = self._spans[which.first + which.span_count - 1]
        return self._spans[which.first].offset, last.offset + last.nbytes


def cut(cset: CData, memories: CData, most_nbytes: int) -> Cuts:
    """Cut what the set has of each memory (`sets.extents`) into parts of at most so many bytes, memory by memory."""
    call, null, total = core.lib.dt_set_cut, core.ffi.NULL, core.ffi.new("dt_cut *")
    call(cset, memories, len(memories), most_nbytes, null, 0, null, 0, total)
    cuts, spans = core.ffi.new("dt_cut[]", total.memory), core.ffi.new("dt_span[]", total.count)
    call(cset, memories, len(memories), most_nbytes, spans, len(spans), cuts, len(cuts), total)
    return Cuts(cuts, spans, total.nbytes)

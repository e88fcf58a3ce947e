# SPDX-License-Identifier: MIT
"""Chunks of an array in C order: how large, which of them bytes are in, and which bytes are in them. Needs NumPy."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["MOST_CHUNK_NBYTES", "Box", "Slab", "boxes", "chosen", "grid_of", "slabs", "touched"]

MOST_CHUNK_NBYTES = 64 << 20
_LEAST_NBYTES, _MOST_CHUNKS, _PAGE = 1 << 20, 1024, 4096


class Box(NamedTuple):
    """A part of an array: [begin, end) along each axis."""

    begin: tuple[int, ...]
    end: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """As an index."""
        return tuple(map(slice, self.begin, self.end))

    def of(self, array: Any, first: tuple[int, ...] | None = None) -> Any:
        """That part of an array, or of one that begins at ``first``; not a copy, and of no axis an array too."""
        begins = first or (0,) * len(self.begin)
        inside = (slice(low - at, high - at) for low, high, at in zip(*self, begins, strict=True))
        index: tuple[Any, ...] = (*inside, ...)
        return array[index]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of it."""
        return tuple(end - begin for begin, end in zip(self.begin, self.end, strict=True))


def grid_of(shape: tuple[int, ...], chunks: tuple[int, ...]) -> tuple[int, ...]:
    """How many chunks there are along each axis."""
    return tuple(-(-length // chunk) for length, chunk in zip(shape, chunks, strict=True))


# ---- how large


def chosen(
    shape: tuple[int, ...], itemsize: int, wanted_nbytes: int | None = None, *, most_nbytes: int = MOST_CHUNK_NBYTES
) -> tuple[int, ...]:
    """A shape of chunks that each are one piece of the memory, so that a run of dirty bytes is in as few as can be.

    Args:
        shape: of the array.
        itemsize: of an element, in bytes.
        wanted_nbytes: of a chunk, at most, as far as an element is not larger. Left out: a 1024th of the array, at
            least 1 MiB and at most ``most_nbytes``.
        most_nbytes: see there.
    """
    if wanted_nbytes is None:
        wanted_nbytes = min(max(math.prod(shape) * itemsize // _MOST_CHUNKS, _LEAST_NBYTES), most_nbytes)
    chunks, inner_nbytes = list[int](), itemsize
    for length in reversed(shape):
        fitting = max(1, min(length, wanted_nbytes // inner_nbytes))
        even = -(-length // -(-length // fitting))  # all of a length, but for the last
        whole_pages = _PAGE // math.gcd(_PAGE, inner_nbytes)
        rounded = -(-even // whole_pages) * whole_pages  # so that no page is in two
        chunks.append(rounded if rounded <= fitting else even)
        inner_nbytes *= length
    return tuple(reversed(chunks))


# ---- which of them bytes are in


def touched(runs: Any, shape: tuple[int, ...], chunks: tuple[int, ...], itemsize: int) -> Any:
    """Which chunks have bytes of these runs: a grid of truth values.

    A run of bytes of an array in C order is, axis by axis from the first: whole rows, and what is left of the row
    before and the row behind them, which are rows of the next axis. So each run is a few boxes of chunks, however long
    it is; boxes are marked by their edges, which are then summed up.

    Args:
        runs: offsets into the array's bytes, (n, 2), half-open, not empty, in an array of 64-bit integers.
        shape, chunks: of the array, and of its chunks.
        itemsize: of an element, in bytes.
    """
    found = np.zeros(grid_of(shape, chunks), np.bool_)
    if not len(runs):
        return found
    if not shape:
        return ~found
    first, last = runs[:, 0] // itemsize, (runs[:, 1] - 1) // itemsize  # elements, both of them inside
    # Behind this axis chunks are as long as the array: there is nothing to find out.
    deepest = max((axis for axis in range(len(shape)) if chunks[axis] < shape[axis]), default=0)
    for axis in range(deepest + 1):
        row = math.prod(shape[axis + 1 :])
        low, high = first // row, last // row  # numbers of rows, of all that are before them too
        if axis == deepest:
            _mark(found, axis, low, high, shape, chunks)
            break
        cut_below, cut_above = first % row != 0, (last + 1) % row != 0
        whole_low, whole_high = low + cut_below, high - cut_above
        whole = whole_low <= whole_high
        _mark(found, axis, whole_low[whole], whole_high[whole], shape, chunks)
        inside = (low == high) & (cut_below | cut_above)
        below, above = (low < high) & cut_below, (low < high) & cut_above
        first, last = (
            np.concatenate((first[inside], first[below], high[above] * row)),
            np.concatenate((last[inside], (low[below] + 1) * row - 1, last[above])),
        )
    return found


def _mark(found: Any, axis: int, low: Any, high: Any, shape: tuple[int, ...], chunks: tuple[int, ...]) -> None:
    """Mark the rows ``low`` to ``high`` of an axis, both included, which are in one row of the axis before."""
    if not len(low):
        return
    length, grid = shape[axis], found.shape
    outer = np.zeros(len(low), np.int64)
    if axis:
        places = np.unravel_index(low // length, shape[:axis])
        where = tuple(place // chunk for place, chunk in zip(places, chunks, strict=False))
        outer = np.ravel_multi_index(where, grid[:axis])
    edges = np.zeros((math.prod(grid[:axis]), grid[axis] + 1), np.int64)
    np.add.at(edges, (outer, low % length // chunks[axis]), 1)
    np.subtract.at(edges, (outer, high % length // chunks[axis] + 1), 1)
    marked = (edges.cumsum(axis=1)[:, :-1] > 0).reshape(grid[: axis + 1])
    found |= marked.reshape(marked.shape + (1,) * (len(grid) - axis - 1))


def boxes(found: Any, shape: tuple[int, ...], chunks: tuple[int, ...], shards: tuple[int, ...] | None) -> Iterator[Box]:
    """The parts of the array that are to be written for these chunks: one for each object of the store.

    Args:
        found: as `touched` has it.
        shape, chunks: of the array, and of its chunks.
        shards: of its shards, where it has any: of one, the box that has all of its chunks in question.
    """
    at = np.argwhere(found)
    if not len(at):
        return
    low = high = at
    if shards is not None and shape:
        per_shard = np.array(shards) // np.array(chunks)
        which = np.ravel_multi_index(tuple((at // per_shard).T), grid_of(shape, shards))
        order = np.argsort(which, kind="stable")
        begins = np.flatnonzero(np.diff(which[order], prepend=-1))
        low, high = np.minimum.reduceat(at[order], begins), np.maximum.reduceat(at[order], begins)
    lows = (low * np.array(chunks, np.int64)).tolist()
    highs = np.minimum((high + 1) * np.array(chunks, np.int64), np.array(shape, np.int64)).tolist()
    for begin, end in zip(lows, highs, strict=True):
        yield Box(tuple(begin), tuple(end))


# ---- which bytes are in them


class Slab(NamedTuple):
    """A piece of an array's memory that consists of chunks."""

    low: int
    """Offset in bytes."""
    nbytes: int
    box: Box
    """Which part of the array it is."""

    def boxes(self, chunks: tuple[int, ...]) -> Iterator[Box]:
        """The chunks in it."""
        axes = (
            [(low, min(low + chunk, end)) for low in range(begin, end, chunk)]
            for begin, end, chunk in zip(self.box.begin, self.box.end, chunks, strict=True)
        )
        for each in itertools.product(*axes):
            yield Box(tuple(low for low, _ in each), tuple(high for _, high in each))


def slabs(shape: tuple[int, ...], chunks: tuple[int, ...], itemsize: int) -> Iterator[Slab]:
    """An array's memory from its beginning to its end, in pieces of whole chunks.

    Along the first axis on which a chunk is longer than 1 it is cut as chunks are; all axes behind are whole.
    """
    if not shape:
        yield Slab(0, itemsize, Box((), ()))
        return
    axis = next((axis for axis, chunk in enumerate(chunks) if chunk > 1), len(shape) - 1)
    row_nbytes, low = math.prod(shape[axis + 1 :]) * itemsize, 0
    rest = shape[axis + 1 :]
    for outer in itertools.product(*map(range, shape[:axis])):
        for begin in range(0, shape[axis], chunks[axis]):
            end = min(begin + chunks[axis], shape[axis])
            nbytes = (end - begin) * row_nbytes
            behind = tuple(place + 1 for place in outer)
            yield Slab(low, nbytes, Box((*outer, begin, *(0 for _ in rest)), (*behind, end, *rest)))
            low += nbytes

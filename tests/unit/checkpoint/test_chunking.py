# SPDX-License-Identifier: MIT
"""Which chunks bytes are in, against looking at each element; and that slabs and boxes leave nothing out."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dirtytrack.checkpoint.formats.chunking import boxes, chosen, grid_of, slabs, touched

Shape = tuple[int, ...]


@st.composite
def arrays(draw: st.DrawFn, least_axes: int = 0) -> tuple[Shape, Shape, int]:
    """A shape, one of chunks, which may be longer, and an item's size."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=least_axes, max_size=4)))
    chunks = tuple(draw(st.integers(1, length + 2)) for length in shape)
    return shape, chunks, draw(st.sampled_from((1, 2, 8)))


@st.composite
def runs_within(draw: st.DrawFn, nbytes: int) -> list[tuple[int, int]]:
    """Runs of bytes, as those of dirty pages are: in order, apart from one another."""
    edges = sorted(draw(st.sets(st.integers(0, nbytes), max_size=8)))
    return list(zip(edges[::2], edges[1::2], strict=False))


def chunk_numbers(shape: Shape, chunks: Shape) -> Any:
    """Of each element, the number of its chunk."""
    grid = grid_of(shape, chunks)
    if not shape:
        return np.zeros((), np.int64)
    places = np.indices(shape).reshape(len(shape), -1)
    return np.ravel_multi_index(tuple(place // chunk for place, chunk in zip(places, chunks, strict=True)), grid)


def plainly(runs: list[tuple[int, int]], shape: Shape, chunks: Shape, itemsize: int) -> Any:
    """As `touched`, byte by byte."""
    dirty = np.zeros(math.prod(shape) * itemsize, np.bool_)
    for start, end in runs:
        dirty[start:end] = True
    elements = dirty.reshape(-1, itemsize).any(axis=1)
    found = np.zeros(math.prod(grid_of(shape, chunks)), np.bool_)
    found[np.atleast_1d(chunk_numbers(shape, chunks))[elements]] = True
    return found.reshape(grid_of(shape, chunks))


def as_runs(pairs: list[tuple[int, int]]) -> Any:
    return np.array(pairs, np.int64).reshape(-1, 2)


@given(st.data())
def test_touched_are_the_chunks_that_have_a_byte_of_a_run(data: st.DataObject) -> None:
    shape, chunks, itemsize = data.draw(arrays())
    runs = data.draw(runs_within(math.prod(shape) * itemsize))
    found = touched(as_runs(runs), shape, chunks, itemsize)
    assert np.array_equal(found, plainly(runs, shape, chunks, itemsize))


def test_one_page_of_a_large_array_is_looked_up_without_looking_at_the_rest() -> None:
    shape, chunks = (1 << 20, 1 << 10, 1 << 10), (1 << 16, 1 << 8, 1 << 8)  # 8 TiB
    at = 5 * (1 << 20) * 8
    found = touched(as_runs([(at, at + 4096)]), shape, chunks, 8)
    assert np.argwhere(found).tolist() == [[0, 0, 0], [0, 0, 1]]
    whole = touched(as_runs([(0, 8 << 40)]), shape, chunks, 8)
    assert whole.all()


@given(st.data())
def test_boxes_have_each_chunk_in_question_and_one_for_each_object(data: st.DataObject) -> None:
    shape, chunks, _ = data.draw(arrays())
    shards = tuple(chunk * data.draw(st.integers(1, 3)) for chunk in chunks) if data.draw(st.booleans()) else None
    grid = grid_of(shape, chunks)
    size = math.prod(grid)
    found = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)), np.bool_).reshape(grid)
    made = list(boxes(found, shape, chunks, shards))
    covered = np.zeros(shape, np.int64)
    for box in made:
        covered[box.slices] += 1
    elements = np.take(found.reshape(-1), chunk_numbers(shape, chunks)).reshape(shape)
    assert covered.max(initial=0) <= 1 and (covered[elements] == 1).all()
    unit = shards or chunks
    objects = np.unique(np.atleast_1d(chunk_numbers(shape, unit).reshape(shape))[np.atleast_1d(elements)])
    assert len(made) == len(objects)
    for box in made:  # within one object, and no larger than the chunks in question make it
        assert all(low // one == (high - 1) // one for low, high, one in zip(*box, unit, strict=True))
        assert all(low % chunk == 0 for low, chunk in zip(box.begin, chunks, strict=True))
        inside = np.argwhere(np.atleast_1d(elements[box.slices])) if shape else np.zeros((1, 0))
        assert len(inside)
        if shape:
            assert (inside.min(axis=0) < np.array(chunks)).all()
    if shards is None:
        assert (covered.astype(np.bool_) == elements).all()


@given(arrays())
def test_slabs_are_the_memory_in_order_and_consist_of_chunks(array: tuple[Shape, Shape, int]) -> None:
    shape, chunks, itemsize = array
    offsets = np.arange(math.prod(shape), dtype=np.int64).reshape(shape) * itemsize
    at, seen = 0, np.zeros(shape, np.int64)
    for slab in slabs(shape, chunks, itemsize):
        assert slab.low == at
        inside = np.atleast_1d(offsets[slab.box.slices]).reshape(-1)
        assert inside[0] == at and (np.diff(inside) == itemsize).all() and len(inside) * itemsize == slab.nbytes
        at += slab.nbytes
        for box in slab.boxes(chunks):
            seen[box.slices] += 1
            assert len(np.unique(chunk_numbers(shape, chunks).reshape(shape)[box.slices])) == 1
    assert at == math.prod(shape) * itemsize and (seen == 1).all()


@given(arrays(least_axes=1), st.integers(1, 3000))
def test_chosen_chunks_are_pieces_of_the_memory(array: tuple[Shape, Shape, int], wanted: int) -> None:
    shape, _, itemsize = array
    chunks = chosen(shape, itemsize, wanted)
    assert math.prod(chunks) * itemsize <= max(wanted, itemsize)
    numbers = chunk_numbers(shape, chunks)
    changes = int((np.diff(numbers) != 0).sum())
    assert changes == len(np.unique(numbers)) - 1  # never back in one that was left
    for axis, chunk in itertools.islice(enumerate(chunks), len(shape)):
        assert 1 <= chunk <= shape[axis]


def test_chosen_chunks_by_themselves() -> None:
    assert chosen((100,), 8) == (100,)
    assert chosen((1 << 20, 256), 8) == (1024, 256)  # 2 GiB in 1024
    assert chosen((1 << 30, 1024), 8) == (8192, 1024)  # 64 MiB, whatever the array's size
    assert chosen((3, 1 << 30), 1) == (1, 3141632)  # whole pages
    assert chosen((1000, 1000), 8) == (128, 1000)  # of 8 in 1 MiB at most 131
    assert chosen((), 8) == ()

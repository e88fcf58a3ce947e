# SPDX-License-Identifier: MIT
"""DirtySet against the obvious model: a set of page numbers. Needs the C core, but nothing of the kernel."""

from __future__ import annotations

import pickle
import struct
import weakref
from array import array
from collections.abc import Iterable
from itertools import pairwise
from mmap import PAGESIZE as PAGE
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dirtytrack import DirtySet, InvalidMemory, NotRegistered, Run, SessionClosed
from dirtytrack.kernel import core, sets
from dirtytrack.layout import Layout
from dirtytrack.memory import pin
from dirtytrack.region import Span

core.load()
BASE = 0x7F00_0000_0000
ROOM = 64
PAGES = st.frozensets(st.integers(0, ROOM - 1))


class Owner:
    """What a Span knows of a Region while that lives."""

    def __init__(self, hold: Any) -> None:
        self._hold, self._ended = hold, ""


def span_of(
    address: int, nbytes: int, name: str = "r", *, unpinned: bool = False, shape: tuple[int, ...] | None = None
) -> Span:
    start, end = address - address % PAGE, -(-(address + nbytes) // PAGE) * PAGE
    return Span(1, name, address, nbytes, start, end, PAGE, unpinned, shape, None)


WHOLE = Layout((span_of(BASE, ROOM * PAGE),))


def listed(view: memoryview) -> Any:
    """As lists of lists, which the type checker does not expect of a memoryview."""
    return view.tolist()


def runs_of(pages: Iterable[int], base: int = BASE) -> list[Run]:
    runs: list[Run] = []
    for page in sorted(pages):
        start = base + page * PAGE
        if runs and runs[-1].end == start:
            runs[-1] = Run(runs[-1].start, start + PAGE)
        else:
            runs.append(Run(start, start + PAGE))
    return runs


def make(pages: Iterable[int], layout: Layout = WHOLE, base: int = BASE, **options: Any) -> DirtySet:
    runs = runs_of(pages, base)
    packed = b"".join(struct.pack("=QQ", *run) for run in runs)
    return DirtySet(sets.from_runs(packed, len(runs), **options), layout)


def pages_of(dirty: DirtySet, base: int = BASE) -> set[int]:
    return {page for start, end in dirty for page in range((start - base) // PAGE, (end - base) // PAGE)}


@given(PAGES)
def test_what_is_in_it(pages: frozenset[int]) -> None:
    dirty = make(pages, epoch=7)
    assert list(dirty) == runs_of(pages)
    assert all(type(run) is Run for run in dirty)
    assert (len(dirty), bool(dirty)) == (len(runs_of(pages)), bool(pages))
    assert (dirty.page_count, dirty.page_span_bytes, dirty.nbytes) == (len(pages), len(pages) * PAGE, len(pages) * PAGE)
    assert dirty.runs.shape == (len(dirty), 2)
    assert dirty.runs.format == "Q"
    assert dirty.runs.readonly
    assert listed(dirty.runs) == [list(run) for run in dirty]
    assert (dirty.epoch, dirty.complete) == (7, True)
    assert list(dirty.pages()) == sorted(pages)
    assert listed(dirty.offsets()) == [[run.start - BASE, run.end - BASE] for run in dirty]
    bits = int.from_bytes(dirty.bitmap("r"), "little")
    assert bits == sum(1 << page for page in pages)
    assert not dirty.assumed


@given(PAGES, PAGES)
def test_algebra(a: frozenset[int], b: frozenset[int]) -> None:
    x, y = make(a, epoch=1), make(b, epoch=2)
    assert pages_of(x | y) == a | b
    assert pages_of(x & y) == a & b
    assert pages_of(x - y) == a - b
    assert (x == y, x <= y, x >= y) == (a == b, a <= b, a >= b)
    assert (x | y).epoch == 2
    assert hash(x | y) == hash(y | x)
    assert list(x | y) == runs_of(a | b)


@given(st.lists(PAGES, max_size=5))
def test_union_of_many(many: list[frozenset[int]]) -> None:
    assert pages_of(DirtySet.union(make(pages) for pages in many)) == set().union(*many)


@given(PAGES, st.integers(-PAGE, ROOM * PAGE + PAGE))
def test_membership(pages: frozenset[int], offset: int) -> None:
    assert ((BASE + offset) in make(pages)) == (offset // PAGE in pages)
    assert "x" not in make(pages)
    assert -1 not in make(pages)


@given(PAGES, st.integers(0, 8 * PAGE), st.integers(1, 40 * PAGE))
def test_bytes_are_clipped_to_the_region(pages: frozenset[int], offset: int, nbytes: int) -> None:
    span = span_of(BASE + offset, nbytes)
    dirty = make(pages, Layout((span,)))
    mine = [
        (max(start, BASE + offset), min(end, BASE + offset + nbytes))
        for start, end in runs_of(pages)
        if start < BASE + offset + nbytes and end > BASE + offset
    ]
    assert dirty.nbytes == sum(end - start for start, end in mine)
    assert listed(dirty.offsets()) == [[start - BASE - offset, end - BASE - offset] for start, end in mine]
    first = offset // PAGE
    last = -(-(offset + nbytes) // PAGE)
    assert list(dirty.pages()) == [page - first for page in sorted(pages) if first <= page < last]
    assert pages_of(dirty.in_region("r")) == {page for page in pages if first <= page < last}


@given(PAGES, st.integers(1, 3 * PAGE), st.integers(0, PAGE))
def test_rows(pages: frozenset[int], row_bytes: int, offset: int) -> None:
    count = (ROOM * PAGE - offset) // row_bytes
    span = span_of(BASE + offset, count * row_bytes, shape=(count, row_bytes))
    dirty = make(pages, Layout((span,)))
    touched = [
        row
        for row in range(count)
        if any(
            page in pages
            for page in range((offset + row * row_bytes) // PAGE, (offset + (row + 1) * row_bytes - 1) // PAGE + 1)
        )
    ]
    assert list(dirty.rows("r")) == touched


@given(st.lists(st.tuples(st.integers(0, 20 * PAGE), st.integers(1, 9 * PAGE)), min_size=1, max_size=5), PAGES)
def test_each_byte_counts_once(pieces: list[tuple[int, int]], pages: frozenset[int]) -> None:
    spans = tuple(span_of(BASE + at, n, f"r{i}", unpinned=bool(i % 2)) for i, (at, n) in enumerate(pieces))
    covered = bytearray(ROOM * PAGE)
    for at, n in pieces:
        covered[at : at + n] = b"\1" * n
    expected = sum(covered[page * PAGE : (page + 1) * PAGE].count(1) for page in pages)
    assert make(pages, Layout(spans)).nbytes == expected


@given(PAGES, st.integers(0, PAGE - 1))
def test_gather_scatter_copy_and_compare(pages: frozenset[int], offset: int) -> None:
    memory = bytearray(b % 251 for b in range(ROOM * PAGE))
    held = pin(memory)
    base = held.address // PAGE * PAGE
    span = span_of(held.address, held.nbytes)
    owner = Owner(held.hold)
    span.owner = weakref.ref(owner)  # type: ignore[arg-type]
    layout = Layout((span,))
    dirty = make(pages, layout, base)
    ranges = [(start, end) for start, end in listed(dirty.offsets())]
    packed = b"".join(bytes(memory[start:end]) for start, end in ranges)
    assert dirty.gather().tobytes() == packed
    room = bytearray(len(packed) + 3)
    assert dirty.gather(room).nbytes == len(packed)
    assert bytes(room) == packed + bytes(3)
    mirror = bytearray(len(memory))
    dirty.copy_to(mirror)
    assert all(mirror[start:end] == memory[start:end] for start, end in ranges)
    assert sum(map(bool, mirror)) <= len(packed)
    assert not dirty.changed(mirror)
    assert not dirty.changed({"r": bytes(mirror)})
    if ranges:
        at = ranges[-1][0] + offset % (ranges[-1][1] - ranges[-1][0])
        mirror[at] ^= 0xFF
        found = dirty.changed({"r": mirror})
        assert list(found) == runs_of([(held.address + at - base) // PAGE], base)
        assert found <= dirty
    dirty.scatter(bytes(len(packed)))
    assert all(not any(memory[start:end]) for start, end in ranges)
    with pytest.raises(InvalidMemory, match="bytes"):
        dirty.scatter(bytes(len(packed) + 1))


@given(PAGES)
def test_pickled_sets_know_numbers_only(pages: frozenset[int]) -> None:
    dirty = make(pages, epoch=3, complete=False)
    back = pickle.loads(pickle.dumps(dirty))
    assert back == dirty
    assert (back.epoch, back.complete) == (3, False)
    assert list(back.pages("r")) == sorted(pages)
    assert back.nbytes == dirty.nbytes
    if pages:
        with pytest.raises(NotRegistered, match="pickle"):
            back.gather()


def test_bytes_of_what_is_no_longer_registered() -> None:
    held = pin(bytearray(8 * PAGE))
    owner = Owner(held.hold)
    span = span_of(held.address, held.nbytes)
    span.owner = weakref.ref(owner)  # type: ignore[arg-type]
    dirty = make([2], Layout((span,)), held.address // PAGE * PAGE)
    owner._ended = "closed"
    with pytest.raises(SessionClosed):
        dirty.gather()
    owner._ended = "unregistered"
    with pytest.raises(NotRegistered):
        dirty.copy_to(bytearray(8 * PAGE))
    del owner
    with pytest.raises(NotRegistered):
        dirty.changed(bytearray(8 * PAGE))
    assert dirty.nbytes > 0


def test_mirrors_are_checked_before_anything_happens() -> None:
    memory = bytearray(8 * PAGE)
    held = pin(memory)
    owner = Owner(held.hold)
    one, two = span_of(held.address, 4 * PAGE, "one"), span_of(held.address + 4 * PAGE, 4 * PAGE, "two")
    one.owner = two.owner = weakref.ref(owner)  # type: ignore[arg-type]
    dirty = make(range(1, 7), Layout((one, two)), held.address // PAGE * PAGE)
    good = bytearray(4 * PAGE)
    for mirror, problem in [
        (good, "say which region"),
        ({"one": good}, "no mirror"),
        ({"one": good, "two": good}, "overlap each other"),
        ({"one": good, "two": bytearray(3)}, "has 3 bytes"),
        ({"one": good, "two": bytes(4 * PAGE)}, "read-only"),
        ({"one": good, "two": memoryview(memory)[: 4 * PAGE]}, "overlaps the tracked memory"),
        ({"one": good, "three": good}, "no mirror is given for region 'two'"),
    ]:
        with pytest.raises(InvalidMemory, match=problem):
            dirty.copy_to(mirror)  # type: ignore[arg-type]
    dirty.copy_to({"one": good, "two": bytearray(4 * PAGE), "elsewhere": bytearray(1)})


def test_nothing_is_known_of_other_regions() -> None:
    dirty = make([1, 2])
    for question in (dirty.in_region, dirty.offsets, dirty.pages, dirty.bitmap, dirty.rows):
        with pytest.raises(InvalidMemory):
            question("elsewhere")
    with pytest.raises(InvalidMemory, match="nobody watched"):
        dirty.rows(bytearray(100))
    with pytest.raises(InvalidMemory, match="no shape"):
        dirty.rows("r")
    with pytest.raises(InvalidMemory, match="multiple"):
        dirty.changed(b"", granule=PAGE + 1)


def test_runs_outlive_their_set() -> None:
    runs = make([1, 2, 9]).runs
    assert listed(runs) == [list(run) for run in runs_of([1, 2, 9])]
    empty = DirtySet()
    assert (empty.runs.shape, len(empty), empty.nbytes, list(empty)) == ((0, 2), 0, 0, [])
    assert DirtySet.union([]) == empty
    with pytest.raises(TypeError, match="not with a int"):
        DirtySet.union([empty, 1])  # type: ignore[list-item]


@given(PAGES, st.lists(st.integers(0, ROOM), unique=True, max_size=9))
def test_pages_are_counted_in_spans(pages: frozenset[int], edges: list[int]) -> None:
    spans = [(BASE + a * PAGE, BASE + b * PAGE) for a, b in pairwise(sorted(edges))]
    counted = make(pages).page_counts(spans)
    assert listed(counted) == [sum(start <= BASE + page * PAGE < end for page in pages) for start, end in spans]
    assert listed(make(pages).page_counts(make(pages).runs)) == [(end - start) // PAGE for start, end in runs_of(pages)]


@given(PAGES)
def test_a_set_is_made_of_runs(pages: frozenset[int]) -> None:
    dirty = make(pages, epoch=3)
    for runs in (dirty.runs, array("Q", dirty.runs.tobytes()), list(dirty), iter(dirty)):
        again = DirtySet.from_runs(runs, epoch=3)
        assert (again, again.epoch) == (dirty, 3)
    with pytest.raises(InvalidMemory):
        DirtySet.from_runs(dirty.runs).in_region("r")


@pytest.mark.parametrize(
    "runs",
    [
        [(1, 2)],
        [(PAGE, PAGE)],
        [(2 * PAGE, 3 * PAGE), (0, PAGE)],
        [(0, 2 * PAGE), (PAGE, 3 * PAGE)],
        [1, 2],
        [(-PAGE, 0)],
        [(0, 1 << 64)],
        b"12345678",
        bytearray(16),
        7,
    ],
)
def test_what_are_no_runs_is_refused(runs: Any) -> None:
    with pytest.raises(InvalidMemory):
        DirtySet.from_runs(runs)
    with pytest.raises(InvalidMemory):
        make({1}).page_counts(runs)

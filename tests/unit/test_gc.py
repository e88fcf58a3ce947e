# SPDX-License-Identifier: MIT
"""Pointer formats, crossing maps, and what is refused: no kernel that tracks is needed for these."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dirtytrack import DirtySet, InvalidMemory, allocate
from dirtytrack.gc import CrossingMap, InvalidPointerFormat, PointerFormat
from tests.oracle import PAGE

# ---- pointer formats


@pytest.mark.parametrize("alignment", [0, 3, 12, -8, 1 << 31])
def test_objects_are_aligned_to_powers_of_two(alignment: int) -> None:
    with pytest.raises(InvalidPointerFormat, match="power of two"):
        PointerFormat.plain(alignment)


@pytest.mark.parametrize(
    ("mask", "tag"), [(0, None), (1 << 64, None), ((1 << 64) - 1, None), (-1, None), (0x7, 8), (0x6, 1)]
)
def test_a_tag_is_some_of_the_bits(mask: int, tag: int | None) -> None:
    with pytest.raises(InvalidPointerFormat):
        PointerFormat.tagged(mask, tag)


@pytest.mark.parametrize(
    ("base", "shift", "why"),
    [(4, 3, "misaligned"), (0, 32, "0 to 31"), (0, -1, "0 to 31"), (-8, 3, "no"), ((1 << 64) - 4096, 0, "no")],
)
def test_a_compressed_pointer_reaches_its_heap(base: int, shift: int, why: str) -> None:
    with pytest.raises(InvalidPointerFormat, match=why):
        PointerFormat.compressed(base, shift)


def test_formats_are_values() -> None:
    assert PointerFormat.plain() == PointerFormat.plain(8) != PointerFormat.conservative()
    assert hash(PointerFormat.tagged(7)) == hash(PointerFormat.tagged(7))
    assert repr(PointerFormat.tagged(7, 1)) == "PointerFormat.tagged(0x7, 0x1)"
    assert PointerFormat.compressed(1 << 32).slot_bytes == 4
    assert PointerFormat.tagged(7).slot_bytes == 8


# ---- crossing maps

AT = 1 << 40  # nothing is mapped there, nor needs to be
UNITS = 70_000  # more than the summary's first bit stands for


@st.composite
def steps(draw: st.DrawFn) -> list[tuple[str, list[int]]]:
    near = st.sampled_from((0, 1, 62, 63, 64, 4095, 4096, 4097, 8191, 8192, UNITS - 1))
    unit = st.one_of(near, st.integers(0, UNITS - 1))
    add = st.lists(unit, max_size=6).map(lambda units: ("add", units))
    discard = st.tuples(unit, unit).map(lambda pair: ("discard", sorted(pair)))
    return draw(st.lists(st.one_of(add, add, discard), max_size=12))


@settings(max_examples=200)
@given(
    steps=steps(),
    questions=st.lists(st.integers(0, UNITS - 1), min_size=1, max_size=8),
    alignment=st.sampled_from((8, 16, 64)),
)
def test_a_crossing_map_is_a_set_of_addresses(
    steps: list[tuple[str, list[int]]], questions: list[int], alignment: int
) -> None:
    crossing = CrossingMap((AT, UNITS * alignment - alignment // 2), alignment)  # the last unit is cut short
    model: set[int] = set()
    for what, units in steps:
        if what == "add":
            crossing.add(AT + unit * alignment for unit in units)
            model |= set(units)
        else:
            crossing.discard(AT + units[0] * alignment, AT + units[1] * alignment)
            model -= set(range(*units))
    for unit in questions:
        before = [start for start in model if start <= unit]
        expected = AT + max(before) * alignment if before else None
        assert crossing.object_at(AT + unit * alignment) == expected
        assert (AT + unit * alignment in crossing) == (unit in model)
    edges = sorted(set(questions))
    runs = [(AT + start * alignment, AT + end * alignment) for start, end in zip(edges[::2], edges[1::2], strict=False)]
    told = set[int]()
    for start, end in runs:
        crossing_in = [AT + unit * alignment for unit in model if AT + unit * alignment <= start]
        told |= {max(crossing_in)} if crossing_in else set()
        told |= {AT + unit * alignment for unit in model if start <= AT + unit * alignment < end}
    assert crossing.objects_on(runs).tolist() == sorted(told)


def test_a_large_object_is_found_from_any_of_its_pages() -> None:
    crossing = CrossingMap((AT, 1 << 30))
    crossing.add([AT + 8, AT + (1 << 30) - 8])
    assert crossing.object_at(AT + (1 << 30) - 16) == AT + 8
    dirty = DirtySet.from_runs([(AT + page * PAGE, AT + (page + 1) * PAGE) for page in (7, 90_000, 200_000)])
    assert crossing.objects_on(dirty).tolist() == [AT + 8]
    assert crossing.object_at(AT) is None


def test_a_crossing_map_takes_buffers_of_starts_and_nothing_else() -> None:
    crossing = CrossingMap((AT, 1 << 20), 16)
    crossing.add(array("Q", [AT + 32, AT]))
    crossing.add(AT + 64)
    assert crossing.objects_on([(AT, AT + 4096)]).tolist() == [AT, AT + 32, AT + 64]
    for wrong in ([AT + 8], [AT - 16], [AT + (1 << 20)], [AT + 128, AT + 8]):
        with pytest.raises(InvalidMemory, match="None was added"):
            crossing.add(wrong)
    for odd in (array("I", [1, 2]), ["x"], [-1]):
        with pytest.raises(InvalidMemory, match="64-bit"):
            crossing.add(odd)  # type: ignore[arg-type]
    assert crossing.objects_on([(AT, AT + 4096)]).tolist() == [AT, AT + 32, AT + 64]
    with pytest.raises(InvalidMemory, match="sorted"):
        crossing.objects_on([(AT + 4096, AT + 8192), (AT, AT + 4096)])
    for no_pairs in ([(-8, AT)], [AT, AT + 8], [(AT, AT + 8, 1)], None):
        with pytest.raises(InvalidMemory, match="pairs of 64-bit numbers"):
            crossing.objects_on(no_pairs)  # type: ignore[arg-type]
    with pytest.raises(InvalidMemory, match="not in the memory"):
        crossing.object_at(AT + (1 << 20))
    with pytest.raises(TypeError, match="float"):
        crossing.object_at(AT + 0.5)  # type: ignore[arg-type]


def test_a_crossing_map_is_of_aligned_memory() -> None:
    with pytest.raises(InvalidMemory, match="power of two"):
        CrossingMap((AT, 4096), 4)
    with pytest.raises(InvalidMemory, match="where no object"):
        CrossingMap((AT + 8, 4096), 16)


def test_a_crossing_map_of_a_large_reservation_costs_nothing_but_what_is_used() -> None:
    crossing = CrossingMap((AT, 64 << 30))
    crossing.add([AT, AT + (40 << 30)])
    crossing.discard(AT, AT + (64 << 30))
    assert crossing.object_at(AT + (64 << 30) - 1) is None
    assert not len(crossing.objects_on([(AT, AT + (64 << 30))]))
    assert resident(crossing.bits) < 4 << 20  # of a gibibyte


def resident(memory: memoryview) -> int:
    """Bytes of it that are populated."""
    from dirtytrack.kernel import core

    first = core.address_of(core.pin(memory, writable=True)) // PAGE
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:  # smaps counts its neighbours too
        pagemap.seek(first * 8)
        entries = np.frombuffer(pagemap.read(-(-len(memory) // PAGE) * 8), np.uint64)
    return int(np.count_nonzero(entries >> np.uint64(63))) * PAGE


def test_memory_of_its_own_can_be_mapped() -> None:
    memory = allocate(1 << 20)
    crossing = CrossingMap(memory, 8)
    assert (crossing.address, crossing.nbytes, crossing.alignment) == (memory.address, memory.nbytes, 8)
    assert len(crossing.bits) >= memory.nbytes // 64
    assert len(crossing.summary)

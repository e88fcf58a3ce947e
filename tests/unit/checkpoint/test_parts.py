# SPDX-License-Identifier: MIT
"""The parts that a Checkpointer is made of, each for itself."""

from __future__ import annotations

import sys
import threading
import time
from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dirtytrack import DirtySet
from dirtytrack.checkpoint.bell import Bell
from dirtytrack.checkpoint.buffers import array_of, describe, misfits
from dirtytrack.checkpoint.costs import Costs
from dirtytrack.checkpoint.crew import Crew
from dirtytrack.checkpoint.manifests import RegionEntry
from dirtytrack.checkpoint.staging import Staging, default_staging_nbytes
from dirtytrack.errors import InvalidMemory
from dirtytrack.kernel import cutting, sets

PAGE = 4096
MIB = 1 << 20

# ---- cuts


@given(
    pages=st.sets(st.integers(0, 60), max_size=30),
    memories=st.lists(st.tuples(st.integers(0, 50 * PAGE), st.integers(1, 20 * PAGE)), max_size=6),
    most=st.integers(1, 6).map(lambda pages: pages * PAGE),
)
def test_cuts_have_each_byte_of_each_memory_once(pages: set[int], memories: list[tuple[int, int]], most: int) -> None:
    dirty = DirtySet.union([DirtySet.from_runs([(page * PAGE, page * PAGE + PAGE)]) for page in pages])
    extents = sets.extents([sets.Extent(address, nbytes, False) for address, nbytes in memories])
    cuts = cutting.cut(dirty._set, extents, most)
    found: list[set[int]] = [set() for _ in memories]
    before = -1
    for index in range(len(cuts)):
        which = cuts[index]
        assert which.memory >= before
        before = which.memory
        assert 0 < which.nbytes <= most
        numbers = array("Q", cuts.spans(which).tobytes())
        spans = list(zip(numbers[::2], numbers[1::2], strict=True))
        assert sum(nbytes for _, nbytes in spans) == which.nbytes
        assert cuts.bounds(which) == (spans[0][0], spans[-1][0] + spans[-1][1])
        for offset, nbytes in spans:
            some = set(range(offset, offset + nbytes, PAGE // 2)) | {offset + nbytes - 1}
            assert not found[which.memory] & set(range(offset, offset + 1))
            found[which.memory] |= some
    total = 0
    for address, nbytes in memories:
        total += sum(max(0, min(address + nbytes, page * PAGE + PAGE) - max(address, page * PAGE)) for page in pages)
    assert cuts.nbytes == total == sum(cuts[index].nbytes for index in range(len(cuts)))
    for (address, _), offsets in zip(memories, found, strict=True):
        assert all((address + offset) // PAGE in pages for offset in offsets)


# ---- the staging buffer


def test_staging_goes_round() -> None:
    staging = Staging(1 << 16)
    rooms = [staging.take(1, 1 << 14) for _ in range(4)]
    assert [room.offset for room in rooms if room] == [0, 1 << 14, 2 << 14, 3 << 14]
    assert staging.take(1, 100) is None
    for room in rooms[:2]:
        assert room is not None
        staging.give_back(room)
    again = staging.take(2 << 14, 2 << 14)
    assert again is not None
    assert again.offset == 0
    assert staging.take(1, 1) is None
    staging.give_back(again)
    staging.give_back(again)  # does nothing
    assert rooms[2] is not None
    staging.give_back(rooms[2])
    assert staging.take((3 << 14) + 1, 1 << 16) is None
    staging.clear()
    whole = staging.take(1 << 16, 1 << 20)
    assert whole is not None
    assert whole.nbytes == 1 << 16


@given(steps=st.lists(st.one_of(st.integers(1, 1 << 14), st.none()), max_size=60))
def test_what_is_taken_never_overlaps(steps: list[int | None]) -> None:
    staging, out = Staging(1 << 16), list[Any]()
    for nbytes in steps:
        if nbytes is None:
            if out:
                staging.give_back(out.pop(0))
            continue
        room = staging.take(nbytes, nbytes)
        if room is None:
            assert out
            continue
        for other in out:
            assert room.offset >= other.offset + other.nbytes or other.offset >= room.offset + room.nbytes
        assert 0 <= room.offset <= staging.nbytes - room.nbytes
        out.append(room)


def test_whoever_waits_for_room_gets_it_or_gives_up() -> None:
    staging = Staging(1 << 16)
    first = staging.take(1 << 16, 1 << 16)
    assert first is not None
    threading.Timer(0.05, staging.give_back, [first]).start()
    assert staging.take(1 << 16, 1 << 16, lambda: False)
    given_up = threading.Event()

    def give_up() -> None:
        given_up.set()
        staging.wake()

    threading.Timer(0.05, give_up).start()
    assert staging.take(1, 1, given_up.is_set) is None


def test_how_much_is_staged() -> None:
    assert default_staging_nbytes(8000) == 2 * MIB
    assert default_staging_nbytes(20 * MIB) == 32 * MIB
    assert default_staging_nbytes(1 << 30) == 128 * MIB
    assert default_staging_nbytes(1 << 40) == 256 * MIB


# ---- full or increment


def learned(*saves: tuple[bool, int, float], **options: Any) -> Costs:
    costs = Costs(**options)
    for full, nbytes, seconds in saves:
        costs.learn(full=full, nbytes=nbytes, seconds=seconds + 0.001, fixed_seconds=0.001)
    return costs


def test_until_something_was_measured_bytes_decide() -> None:
    for costs in (Costs(), learned((True, 100 * MIB, 1.0))):
        assert costs.full_is_cheaper(100 * MIB, 100 * MIB)
        assert not costs.full_is_cheaper(99 * MIB, 100 * MIB)
    assert not learned((True, 100 * MIB, 1.0), deltas=True).full_is_cheaper(100 * MIB, 100 * MIB)


def test_what_was_measured_decides() -> None:
    costs = learned((True, 100 * MIB, 1.0), (False, 10 * MIB, 0.2))  # a byte of an increment costs twice as much
    assert not costs.full_is_cheaper(45 * MIB, 100 * MIB)
    assert costs.full_is_cheaper(55 * MIB, 100 * MIB)
    costs = learned((True, 100 * MIB, 1.0), (False, 10 * MIB, 0.05))  # it compresses better
    assert not costs.full_is_cheaper(100 * MIB, 100 * MIB)


def test_a_bad_moment_is_forgotten() -> None:
    costs = learned((True, 100 * MIB, 1.0), (False, 10 * MIB, 5.0))
    chosen = 0
    while costs.full_is_cheaper(30 * MIB, 100 * MIB):
        chosen += 1
        costs.learn(full=True, nbytes=100 * MIB, seconds=1.0, fixed_seconds=0.001)
    assert 1 < chosen < 12


def test_small_saves_tell_nothing() -> None:
    costs = learned((True, 100 * MIB, 1.0), (False, PAGE, 1.0))
    assert not costs.full_is_cheaper(99 * MIB, 100 * MIB)


# ---- threads


@pytest.mark.parametrize("threads", [1, 3])
def test_results_come_in_order(threads: int) -> None:
    def work(number: int) -> int:
        time.sleep(0.001 * (number % 3))
        return number * number

    with Crew(threads) as crew:
        assert list(crew.map(work, range(40))) == [number * number for number in range(40)]
        with pytest.raises(ZeroDivisionError):
            list(crew.map(lambda number: 1 // (number - 7), range(40)))
        assert list(crew.map(work, range(3))) == [0, 1, 4]


def test_who_waits_hears_the_bell() -> None:
    bell, seen = Bell(), list[int]()

    def ring() -> None:
        with bell.mutex:
            seen.append(1)
            bell.ring()

    threading.Timer(0.02, ring).start()
    assert bell.wait_for(lambda: seen, 10)
    assert not bell.wait_for(lambda: len(seen) > 1, 0.02)


# ---- buffers


def test_buffers_that_fit() -> None:
    def region(nbytes: int, dtype: str | None = None, shape: tuple[int, ...] | None = None) -> dict[str, RegionEntry]:
        return {"x": RegionEntry(0, "x", nbytes, dtype, shape)}

    given_floats = {"x": describe("x", array("f", range(6)))}
    assert not misfits(region(24, "<f4", (6,)), given_floats)
    assert not misfits(region(24, "torch.float32", (6,)), given_floats)
    assert not misfits(region(24), given_floats)
    assert not misfits(region(24, "torch.bfloat16", (12,)), {"x": describe("x", bytearray(24))})
    assert "20" in misfits(region(20), given_floats)[0]
    assert "<i4" in misfits(region(24, "<i4", (6,)), given_floats)[0]
    assert "(2, 3)" in misfits(region(24, "<f4", (2, 3)), given_floats)[0]
    assert "'y'" in misfits(region(24), {"y": given_floats["x"]})[0]


def test_arrays_without_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("numpy", "torch"):
        monkeypatch.setitem(sys.modules, name, None)
    back = array_of(bytearray(array("d", [1.0, 2.0]).tobytes()), "<f8", (1, 2))
    assert back.tolist() == [[1.0, 2.0]]
    assert array_of(bytearray(8), "<f8", ()).tolist() == 0.0
    assert array_of(bytearray(8), "<c8", (1,)).format == "B"
    assert array_of(bytearray(8), None, None).nbytes == 8
    assert array_of(bytearray(8), "torch.float32", (2,)).tolist() == [0.0, 0.0]


def test_what_numpy_does_not_know_comes_as_bytes() -> None:
    for dtype in ("torch.float8_e4m3fn", "nonsense", "O", '[["a","O"]]', "[", "<f8"):
        back = array_of(bytearray(12), dtype, (3,))
        assert (back.dtype, back.shape) == ("uint8", (12,))


def test_a_name_is_a_name() -> None:
    for name in ("", 7, "x" * 4097):
        with pytest.raises(InvalidMemory, match="name"):
            describe(name, bytearray(3))

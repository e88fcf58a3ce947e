# SPDX-License-Identifier: MIT
"""Deltas against the obvious model: two byte strings. Needs the C core, but nothing of the kernel."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from itertools import pairwise
from mmap import PAGESIZE as PAGE
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dirtytrack import DirtySet, InvalidDelta, InvalidMemory
from dirtytrack.delta import Delta, apply, compose, diff
from dirtytrack.kernel import core, sets
from dirtytrack.layout import Layout
from dirtytrack.memory import pin
from dirtytrack.region import Span

core.load()
GRANULES = st.integers(0, 12).map(lambda shift: 1 << shift)
HEADER = 24


@st.composite
def contents(draw: st.DrawFn, nbytes: int) -> bytes:
    """Zeroes, changed in ways that each have their own encoding."""
    data = bytearray(nbytes)
    for _ in range(draw(st.integers(0, 4))):
        start, step = draw(st.integers(0, nbytes)), draw(st.sampled_from((1, 1, 2, 3, 16, 17, 64, 255, 256, 1000)))
        end = draw(st.integers(start, nbytes))
        value = draw(st.integers(0, 255))
        data[start:end:step] = bytes([value]) * len(range(start, end, step))
    return bytes(data)


@st.composite
def versions(draw: st.DrawFn, count: int) -> tuple[list[memoryview], int]:
    """Buffers of one length with different content, at one alignment, each in memory of its own."""
    nbytes = draw(st.one_of(st.integers(1, 200), st.integers(1, 5 * PAGE), st.sampled_from((PAGE, 2 * PAGE, PAGE + 1))))
    skew = draw(st.sampled_from((0, 0, 1, 8, 48, 64, PAGE - 8)))
    made = []
    for _ in range(count):
        room = bytearray(nbytes + 2 * PAGE)
        start = -pin(room).address % PAGE + skew
        view = memoryview(room)[start : start + nbytes]
        view[:] = draw(contents(nbytes))
        made.append(view)
    return made, skew


def pages_around(view: memoryview) -> int:
    address = pin(view).address
    return (-(-(address + view.nbytes) // PAGE) - address // PAGE) * PAGE


def changed_granules(a: memoryview, b: memoryview, granule: int) -> list[int]:
    return [
        i
        for i in range(-(-len(a) // granule))
        if a[i * granule : (i + 1) * granule] != b[i * granule : (i + 1) * granule]
    ]


def dirty_of(view: memoryview, pages: set[int]) -> DirtySet:
    """A set that knows the buffer, with these pages of it."""
    held = pin(view)
    start, end = held.address // PAGE * PAGE, -(-(held.address + held.nbytes) // PAGE) * PAGE
    packed = b"".join(
        struct.pack("=QQ", at, at + PAGE) for at in range(start, end, PAGE) if (at - start) // PAGE in pages
    )
    layout = Layout((Span(1, "r", held.address, held.nbytes, start, end, PAGE, False, None, None),))
    return DirtySet(sets.from_runs(packed, len(packed) // 16), layout)


@given(versions(2), GRANULES, st.booleans())
def test_applied_to_the_mirror_it_gives_the_memory(
    made: tuple[list[memoryview], int], granule: int, update: bool
) -> None:
    (now, mirror), skew = made
    before = bytearray(mirror)
    delta = diff(now, mirror, None, granule, update=update)
    assert bytes(mirror) == (bytes(now) if update else bytes(before))
    granules = changed_granules(now, memoryview(before), granule)
    apply(delta, before)
    assert before == now
    assert (delta.target_nbytes, delta.granule, bool(delta)) == (len(now), granule, bool(granules))
    runs = list(delta)
    assert len(runs) == len(delta)
    assert all(now[at : at + len(data)] == data and data.readonly for at, data in runs)
    assert all(a + len(data) <= b for (a, data), (b, _) in pairwise(runs))
    assert delta.changed_nbytes == sum(len(data) for _, data in runs)
    named = {at // granule + i for at, data in runs for i in range(-(-len(data) // granule))}
    assert sorted(named) == granules
    if granules and skew % granule == 0:
        assert delta.nbytes <= pages_around(now) * 1.01


@given(versions(2), GRANULES, st.frozensets(st.integers(0, 6)))
def test_only_the_dirty_pages_are_looked_at(
    made: tuple[list[memoryview], int], granule: int, pages: frozenset[int]
) -> None:
    (now, mirror), _ = made
    delta = diff(now, mirror, dirty_of(now, set(pages)), granule)
    first = pin(now).address // PAGE
    expected = bytearray(mirror)
    dirty_bytes = 0
    for start in range(0, len(now), granule):
        end = min(start + granule, len(now))
        touched = range((pin(now).address + start) // PAGE - first, (pin(now).address + end - 1) // PAGE - first + 1)
        if not pages.isdisjoint(touched):
            expected[start:end] = now[start:end]
            dirty_bytes += end - start
    apply(delta, mirror)
    assert mirror == expected
    assert delta.nbytes <= HEADER + dirty_bytes * 1.01 + 24 * len(pages)


@given(versions(1), GRANULES, st.randoms(use_true_random=False), st.integers(0, 300))
def test_never_larger_than_the_pages_and_one_percent(
    made: tuple[list[memoryview], int], granule: int, random: Any, period: int
) -> None:
    """The patterns that are dearest to write down: some changed, some not, in turn, by rule or by chance."""
    (now,), skew = made
    mirror = bytearray(now)
    for at in range(0, len(now), granule):
        if at // granule % period if period > 1 else random.random() < 0.5:
            now[at] ^= 0xFF
    delta = diff(now, mirror, None, granule)
    if delta and skew % granule == 0:
        assert delta.nbytes <= pages_around(now) * 1.01
    apply(delta, mirror)
    assert mirror == now


@given(versions(4), st.tuples(GRANULES, GRANULES, GRANULES))
def test_composing(made: tuple[list[memoryview], int], granules: tuple[int, int, int]) -> None:
    (a, b, c, d), _ = made
    one, two, three = (diff(y, x, None, g) for (x, y), g in zip(pairwise((a, b, c, d)), granules, strict=True))
    both = compose(one, two)
    target = bytearray(a)
    apply(both, target)
    assert target == c
    other = bytearray(a)[::-1]  # on any memory it does what they do, one after the other
    expected = bytearray(other)
    apply(one, expected)
    apply(two, expected)
    apply(both, other)
    assert other == expected
    left, right = compose(both, three), compose(one, compose(two, three))
    assert left == right
    assert hash(left) == hash(right)
    target = bytearray(a)
    apply(left, target)
    assert target == d
    assert left.granule == min(granules)


@given(versions(2), GRANULES, st.booleans())
def test_bytes_and_back(made: tuple[list[memoryview], int], granule: int, small: bool) -> None:
    (now, mirror), _ = made
    delta = diff(now, mirror, None, granule)
    data = delta.compressed(1) if small else bytes(delta)
    assert len(data) <= delta.nbytes
    back = Delta.from_bytes(data, target_nbytes=len(now))
    assert back == delta
    assert (back.nbytes, len(back), back.granule) == (delta.nbytes, len(delta), granule)
    apply(data, mirror)
    assert mirror == now
    assert pickle.loads(pickle.dumps(delta)) == delta
    assert Delta.from_bytes(bytes(back)) == back


@given(versions(2), GRANULES, st.data())
def test_damaged_bytes_are_refused_before_a_byte_is_written(
    made: tuple[list[memoryview], int], granule: int, data: st.DataObject
) -> None:
    (now, mirror), _ = made
    delta = diff(now, mirror, None, granule)
    good = delta.compressed(1) if data.draw(st.booleans()) else bytes(delta)
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(0, 3))):
        bad[data.draw(st.integers(0, len(bad) - 1))] = data.draw(st.integers(0, 255))
    del bad[data.draw(st.integers(0, len(bad))) :]
    bad += data.draw(st.binary(max_size=3))
    before = bytes(mirror)
    if bad != good:
        with pytest.raises((InvalidDelta, InvalidMemory)):
            apply(bad, mirror)
        assert mirror == before


def sealed(delta: bytes | bytearray) -> bytes:
    """With the right checksum: what somebody sends who knows the format."""
    held = core.pin(delta, writable=False)
    return bytes(delta[:16]) + struct.pack("<Q", core.lib.dt_delta_checksum(held, len(delta))) + bytes(delta[24:])


@given(versions(2), GRANULES, st.data())
def test_hostile_bytes_with_a_good_checksum(
    made: tuple[list[memoryview], int], granule: int, data: st.DataObject
) -> None:
    (now, mirror), _ = made
    hostile = bytearray(bytes(diff(now, mirror, None, granule)))
    if data.draw(st.booleans()):
        del hostile[data.draw(st.integers(HEADER, len(hostile))) :]
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.one_of(st.integers(3, len(hostile) - 1), st.integers(3, min(len(hostile) - 1, 40))))
        hostile[at] = data.draw(st.integers(0, 255))
    hostile += data.draw(st.binary(max_size=8))
    before = bytes(mirror)
    try:
        apply(sealed(hostile), mirror)
    except (InvalidDelta, InvalidMemory):
        assert mirror == before


@given(st.binary(max_size=100), st.integers(1, 3 * PAGE), st.integers(0, 12))
def test_any_body_is_read_or_refused(body: bytes, nbytes: int, shift: int) -> None:
    target = bytearray(nbytes)
    try:
        delta = Delta.from_bytes(sealed(b"DTD\x01" + bytes([shift, 0, 0, 0]) + struct.pack("<QQ", nbytes, 0) + body))
    except InvalidDelta:
        return
    apply(delta, target)
    assert all(target[at : at + len(data)] == data for at, data in delta)


def test_what_is_said_of_bytes_that_are_no_delta() -> None:
    good = bytes(diff(b"a" * 100, b"b" * 100))
    target = bytearray(100)

    def changed(at: int, value: int) -> bytes:
        return sealed(good[:at] + bytes([value]) + good[at + 1 :])

    for bad, words in [
        (b"", "0 bytes are no delta"),
        (good[:23], "23 bytes are no delta"),
        (b"x" * 50, "do not begin as one"),
        (changed(3, 2), "version 2, this library reads version 1"),
        (good[:-1] + b"?", "checksum"),
        (good[:-1], "checksum"),
        (sealed(good[:-1]), "at byte 24"),
        (changed(4, 13), "at byte 4"),
        (changed(5, 2), "at byte 4"),
        (changed(6, 1), "at byte 4"),
        (changed(24, 5), "at byte 24"),
        (changed(24, 8), "at byte 24"),
        (sealed(good + b"\0"), "at byte 125"),
    ]:
        with pytest.raises(InvalidDelta, match=words):
            apply(bad, target)
    with pytest.raises(InvalidMemory, match="for a memory of 100 bytes, not of 99"):
        apply(good, bytearray(99))
    with pytest.raises(InvalidMemory, match="read-only"):
        apply(good, bytes(100))
    with pytest.raises(InvalidDelta, match="buffer"):
        Delta.from_bytes(7)  # type: ignore[arg-type]
    assert target == bytes(100)
    apply(good, target)
    assert target == b"a" * 100


def test_compressed_bytes_do_not_take_more_memory_than_they_may() -> None:
    zstandard = pytest.importorskip("zstandard")
    good = diff(bytes(4 * PAGE), b"b" * (4 * PAGE)).compressed()
    assert len(good) < 100
    assert good[5] == 1
    for nbytes, body in [(1 << 40, bytes(10)), (1 << 24, bytes(1 << 24)), (10, bytes(1 << 24)), (1 << 24, bytes(10))]:
        bomb = good[:24] + struct.pack("<Q", nbytes) + zstandard.compress(body)
        with pytest.raises(InvalidDelta, match="cannot be"):
            Delta.from_bytes(sealed(bomb))
    unknown = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(10))
    for frame in (unknown, b"", b"garbage that is no frame", zstandard.compress(bytes(10)) + b"more"):
        with pytest.raises(InvalidDelta, match="compressed"):
            Delta.from_bytes(sealed(good[:24] + struct.pack("<Q", 10) + frame))
    with pytest.raises(InvalidMemory):
        Delta.from_bytes(good, target_nbytes=4 * PAGE + 1)


def test_the_checksum_is_xxh64() -> None:
    xxhash = pytest.importorskip("xxhash")
    for nbytes in (*range(1, 80), 1000, 5000):
        data = bytes(diff(bytes(range(256)) * 20 + bytes(nbytes), b"x" * (5120 + nbytes), None, 1))
        seed = xxhash.xxh64_intdigest(data[:16])
        assert struct.unpack_from("<Q", data, 16) == (xxhash.xxh64_intdigest(data[24:], seed),)


ARRAYS = st.sampled_from(("u1", "<i2", "<f4", "<f8", "<c16", "M8[s]", "S12", "i4,f4,f4"))


@given(ARRAYS, st.lists(st.integers(1, 40), min_size=1, max_size=3), st.data())
def test_exactly_the_elements_that_changed(dtype: str, shape: list[int], data: st.DataObject) -> None:
    array = np.zeros(shape, dtype)
    before = array.copy()
    itemsize = array.itemsize
    granule = min(itemsize & -itemsize, data.draw(GRANULES))
    flat = array.reshape(-1).view("u1").reshape(-1, itemsize)
    wanted = sorted(data.draw(st.frozensets(st.integers(0, array.size - 1), max_size=20)))
    for index in wanted:
        flat[index, data.draw(st.integers(0, itemsize - 1))] = 7
    delta = diff(array, before, None, granule)
    found = np.asarray(delta.changed(array))
    assert found.tolist() == wanted
    mask = np.asarray(delta.changed(array, "mask"))
    assert mask.shape == array.shape
    assert mask.dtype == bool
    assert np.flatnonzero(mask).tolist() == wanted
    rows = {index // (array.size // shape[0]) for index in wanted}
    assert list(delta.changed(before, "rows")) == sorted(rows)
    if shape[0] > 2:
        part = array[1:-1]
        offset = array.nbytes // shape[0]
        inside = [i - array.size // shape[0] for i in wanted if 0 < i // (array.size // shape[0]) < shape[0] - 1]
        assert list(delta.changed(part, offset=offset)) == inside


def test_elements_that_cannot_be_told() -> None:
    array = np.zeros((10, 6), np.float32)
    delta = diff(array, np.ones_like(array))
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: delta.changed(array), "granule=4"),
        (lambda: delta.changed(array[1:], offset=24), "granule=4"),
        (lambda: delta.changed(array.view("f8"), offset=4), "is not in"),
        (lambda: delta.changed(array.view("f8")[1:], offset=4), "granule=4"),
        (lambda: delta.changed(array[:5]), "pass offset="),
        (lambda: delta.changed(array[:5], offset=-1), "is not in"),
        (lambda: delta.changed(array[:, ::2]), "not C-contiguous"),
        (lambda: delta.changed(array.view("f8"), "columns"), "not 'columns'"),  # type: ignore[arg-type]
        (lambda: delta.changed(np.zeros(()), "rows", offset=0), "no first axis"),
    ]
    for question, words in cases:
        with pytest.raises(InvalidMemory, match=words):
            question()
    assert list(delta.changed(array, "rows")) == list(range(10))
    assert len(delta.changed(array.view("f8"))) == 30


def test_arguments() -> None:
    memory, mirror = bytearray(5 * PAGE), bytearray(5 * PAGE)
    memory[PAGE] = 1
    out = bytearray(5 * PAGE + 5 * PAGE // 64 + 4096)
    delta = diff(memory, mirror, out=out)
    assert bytes(delta) == bytes(out[: delta.nbytes])
    view = memoryview(memory)
    overlapping: list[Callable[[], object]] = [
        lambda: diff(view[:PAGE], view[1 : PAGE + 1]),
        lambda: diff(view[:8], mirror[:8], out=view),
        lambda: diff(bytearray(8), view[:8], out=view),
        lambda: apply(delta, memoryview(out)[: 5 * PAGE]),
    ]
    for call in overlapping:
        with pytest.raises(InvalidMemory, match=r"overlaps|lies in"):
            call()
    for granule in (0, 3, 8192, -8):
        with pytest.raises(InvalidMemory, match="power of two"):
            diff(memory, mirror, None, granule)
    with pytest.raises(InvalidMemory, match="has 3 bytes"):
        diff(memory, bytearray(3))
    with pytest.raises(InvalidMemory, match="read-only"):
        diff(memory, bytes(mirror), update=True)
    with pytest.raises(InvalidMemory, match="this delta may take"):
        diff(memory, mirror, out=bytearray(100))
    with pytest.raises(InvalidMemory, match="nobody watched"):
        diff(memory, mirror, DirtySet())
    with pytest.raises(TypeError, match="not a list"):
        diff(memory, mirror, [(0, 10)])  # type: ignore[arg-type]
    with pytest.raises(InvalidMemory, match="for a memory of 9 bytes, not of 8"):
        compose(diff(b"12345678", b"abcdefgh"), diff(b"123456789", b"abcdefghi"))
    assert diff(memory, mirror) != 7
    assert "8 of 20480 changed" in repr(delta)


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from dirtytrack import UnsupportedKernel

    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UnsupportedKernel, match=r"pip install dirtytrack\[zstd\]"):
        diff(bytes(9), bytes(9)).compressed()


def test_views_outlive_their_delta() -> None:
    data = [piece for _, piece in diff(b"ab" * 5000, bytes(10000))]
    assert b"".join(data) == b"ab" * 5000

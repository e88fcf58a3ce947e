# SPDX-License-Identifier: MIT
"""A zarr array that follows a tracked one: the same after each write, and no chunk written that had no dirty byte."""

from __future__ import annotations

import asyncio
import errno
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dirtytrack
from dirtytrack.checkpoint import Checkpointer, Written, ZarrWriter, export_zarr
from dirtytrack.errors import InvalidMemory, StoreBusy, StoreFailed

zarr: Any = pytest.importorskip("zarr", minversion="3.1", reason="zarr 3 needs Python 3.11")

PAGE = 4096


class Counting(zarr.storage.WrapperStore):  # type: ignore[misc]
    """A store that notes which keys are written or removed, and fails after so many."""

    def __init__(self, store: Any) -> None:
        super().__init__(store)
        self.keys: list[str] = []
        self.left = 10**9

    def taken(self) -> list[str]:
        """The keys since the last call, sorted."""
        keys, self.keys = sorted(self.keys), []
        return keys

    async def set(self, key: str, value: Any) -> None:
        self.keys.append(key)
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, "no space left")
        await super().set(key, value)

    async def delete(self, key: str) -> None:
        self.keys.append(key)
        await super().delete(key)


def tracked(shape: tuple[int, ...], dtype: Any = np.float64, before: int = 0) -> tuple[Any, Any]:
    """A memory, and an array in it."""
    count = math.prod(shape)
    memory = dirtytrack.allocate(before + count * np.dtype(dtype).itemsize, name="it")
    return memory, np.frombuffer(memory, np.uint8)[before:].view(dtype)[:count].reshape(shape)


def objects_of(pages: set[int], array: Any, unit: tuple[int, ...], first: int) -> set[tuple[int, ...]]:
    """Which chunks or shards have bytes of these pages, element by element."""
    flat = np.arange(array.size)
    begin = (first + flat * array.itemsize) // PAGE
    end = (first + (flat + 1) * array.itemsize - 1) // PAGE
    dirty = np.isin(begin, [*pages]) | np.isin(end, [*pages])
    places = np.argwhere(dirty.reshape(array.shape)) // np.array(unit)
    return set(map(tuple, places.tolist()))


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_it_follows_and_writes_no_other_chunk(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=3)))
    shape = (*shape[:-1], shape[-1] * data.draw(st.sampled_from((1, 40))))
    dtype = data.draw(st.sampled_from((np.uint8, np.int16, np.float64, np.complex128)))
    chunks = tuple(data.draw(st.integers(-(-length // 3), length)) for length in shape)
    shards = None
    if data.draw(st.booleans()):
        shards = tuple(chunk * data.draw(st.integers(1, 3)) for chunk in chunks)
    memory, array = tracked(shape, dtype, 16 * data.draw(st.integers(0, 2)))
    first = array.__array_interface__["data"][0] - memory.address
    draw = np.random.default_rng(data.draw(st.integers(0, 1000)))
    bits = array.reshape(-1).view(np.uint8)
    bits[:] = draw.integers(0, 255, len(bits))
    store = Counting(zarr.storage.MemoryStore())
    target = zarr.create_array(store, shape=shape, dtype=dtype, chunks=chunks, shards=shards, fill_value=0)
    with dirtytrack.track(memory, exact=True) as tracker:
        writer = ZarrWriter(target, array)
        count = math.prod(-(-length // one) for length, one in zip(shape, shards or chunks, strict=True))
        assert writer.write_all() == Written(count, count, array.nbytes)
        for _ in range(3):
            store.taken()
            for _ in range(data.draw(st.integers(0, 3))):
                at = int(draw.integers(0, len(bits)))
                length = int(draw.choice((1, 7, PAGE)))
                bits[at : at + length] = draw.choice((0, 128, 200))
            dirty = tracker.collect()
            written = writer.write(dirty)
            assert target[...].tobytes() == array.tobytes()
            pages = set(dirty.pages())
            expected = objects_of(pages, array, shards or chunks, first)
            assert store.taken() == sorted("c/" + "/".join(map(str, place)) for place in expected)
            assert written.written == len(expected) and written.of == count


def test_files_of_other_chunks_are_not_touched(tmp_path: Path) -> None:
    memory, array = tracked((64, 1024))
    array[:] = np.arange(array.size).reshape(array.shape)
    target = zarr.create_array(zarr.storage.LocalStore(tmp_path / "it"), shape=(64, 1024), dtype="f8", chunks=(4, 1024))
    with dirtytrack.track(memory, exact=True) as tracker:
        writer = ZarrWriter(target, array)
        writer.write_all()
        before = {path: (path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes()) for path in files(tmp_path)}
        time.sleep(0.02)
        array[9, 3], array[40] = 1, 2
        assert writer.write(tracker.collect()).written == 2
    now = {path: (path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes()) for path in files(tmp_path)}
    changed = [str(path.relative_to(tmp_path)) for path in now if now[path] != before[path]]
    assert len(before) == 17 and changed == ["it/c/10/0", "it/c/2/0"]
    assert (zarr.open_array(tmp_path / "it", mode="r")[...] == array).all()


def files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def test_chunks_that_split_the_inner_axis() -> None:
    memory, array = tracked((32, 4096), np.uint8)  # a row is a page
    store = Counting(zarr.storage.MemoryStore())
    target = zarr.create_array(store, shape=array.shape, dtype="u1", chunks=(8, 1000))
    with dirtytrack.track(memory, exact=True) as tracker:
        writer = ZarrWriter(target, array)
        array[9, 17] = 1
        dirty = tracker.collect()
        assert np.argwhere(writer.touched(dirty)).tolist() == [[1, column] for column in range(5)]
        assert writer.write(dirty) == Written(5, 20, 8 * 4096)
    assert target[9, 17] == 1


def test_an_array_of_format_2() -> None:
    memory, array = tracked((16, 512))
    store = Counting(zarr.storage.MemoryStore())
    target = zarr.create_array(store, shape=array.shape, dtype="f8", chunks=(2, 512), zarr_format=2)
    with dirtytrack.track(memory, exact=True) as tracker:
        writer = ZarrWriter(target, array)
        array[5] = 1
        store.taken()
        assert writer.write(tracker.collect()).written == 1
        assert store.taken() == ["2.0"] and (target[...] == array).all()


def test_what_is_written_meanwhile_is_not_beneath_a_codec() -> None:
    """A checksum is computed of bytes, and then those are written: they must be the same."""
    memory, array = tracked((8, 1 << 19), np.uint64)
    codecs = {"compressors": zarr.codecs.Crc32cCodec(), "fill_value": 1}
    target = zarr.create_array(zarr.storage.MemoryStore(), shape=array.shape, dtype="u8", chunks=(1, 1 << 19), **codecs)
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            np.add(array, 1, out=array)  # without the global lock

    with dirtytrack.track(memory) as tracker:
        writer = ZarrWriter(target, array)
        worker = threading.Thread(target=work)
        worker.start()
        try:
            for _ in range(4):
                writer.write(tracker.collect())
                target[...]  # each chunk is whole
        finally:
            over.set()
            worker.join()
        writer.write(tracker.collect())
        assert (target[...] == array).all()


def test_of_a_shard_only_the_chunks_in_question_are_encoded_again() -> None:
    memory, array = tracked((64, 4096), np.uint8)
    array[:] = 1
    store = Counting(zarr.storage.MemoryStore())
    target = zarr.create_array(store, shape=array.shape, dtype="u1", chunks=(1, 4096), shards=(16, 4096))
    with dirtytrack.track(memory, exact=True) as tracker:
        writer = ZarrWriter(target, array)
        assert writer.write_all().written == 4
        store.taken()
        array[18], array[20] = 3, 4
        assert writer.write(tracker.collect()) == Written(1, 4, 3 * 4096)  # rows 18 to 20
        assert store.taken() == ["c/1/0"]
    assert (target[...] == array).all()


def test_a_write_that_fails_loses_nothing() -> None:
    memory, array = tracked((64, 512))
    store = Counting(zarr.storage.MemoryStore())
    target = zarr.create_array(store, shape=array.shape, dtype="f8", chunks=(1, 512))
    with dirtytrack.track(memory, exact=True) as tracker:
        writer = ZarrWriter(target, array)
        for left in (0, 5, 29):
            array[10:40] += 1
            store.left = left
            dirty = tracker.collect()
            with pytest.raises(
                StoreFailed, match=r"no space left\. Of 30 chunks at least \d+ were written: put the dirty set back"
            ) as caught:
                writer.write(dirty)
            assert caught.value.errno == errno.ENOSPC
            tracker.put_back(dirty)
            store.left = 10**9
            array[50] += 1
            assert writer.write(tracker.collect()).written == 31
            assert (target[...] == array).all()


def test_an_interrupt_leaves_nothing_on_its_way() -> None:
    """What was begun has ended when it comes up: it does not land on what the next call writes."""

    class Slow(Counting):
        async def set(self, key: str, value: Any) -> None:
            await asyncio.sleep(0.02)
            await super().set(key, value)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    memory, array = tracked((200, 512))
    store = Slow(zarr.storage.MemoryStore())
    target = zarr.create_array(store, shape=array.shape, dtype="f8", chunks=(1, 512))
    before = signal.signal(signal.SIGALRM, interrupted)
    try:
        with dirtytrack.track(memory, exact=True) as tracker:
            writer = ZarrWriter(target, array, threads=4)
            array[:] = 1
            dirty = tracker.collect()
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(KeyboardInterrupt):
                writer.write(dirty)
            begun = len(store.keys)
            assert 0 < begun < 200
            time.sleep(0.1)
            assert len(store.keys) == begun
            tracker.put_back(dirty)
            assert writer.write(tracker.collect()).written == 200
            assert (target[...] == array).all()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_signal_handler_may_not_write_within_a_write() -> None:
    class Handler(Counting):
        async def set(self, key: str, value: Any) -> None:
            if key.startswith("c/"):
                os.kill(os.getpid(), signal.SIGUSR1)
            await asyncio.sleep(0.05)
            await super().set(key, value)

    told: list[BaseException] = []

    def handle(*_: object) -> None:
        try:
            writer.write_all()
        except StoreBusy as error:
            told.append(error)

    memory, array = tracked((4, 512))
    store = Handler(zarr.storage.MemoryStore())
    target = zarr.create_array(store, shape=array.shape, dtype="f8", chunks=(1, 512), fill_value=7)
    writer = ZarrWriter(target, array)
    del memory
    before = signal.signal(signal.SIGUSR1, handle)
    try:
        writer.write_all()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert told and (target[...] == array).all()


def test_a_part_of_what_is_tracked_and_several_arrays() -> None:
    memory = dirtytrack.allocate(64 * PAGE, name="all")
    grid = np.frombuffer(memory, np.float64, 20 * 512, PAGE).reshape(20, 512)
    other = np.zeros(512 * 10)
    places = [
        zarr.create_array(
            zarr.storage.MemoryStore(),
            shape=each.shape,
            dtype="f8",
            chunks=(1, *each.shape[1:]) if each.ndim > 1 else (512,),
        )
        for each in (grid, grid[5:10], other)
    ]
    with dirtytrack.track({"memory": memory, "other": other}, exact=True) as tracker:
        whole, part, beside = map(ZarrWriter, places, (grid, grid[5:10], other))
        grid[7], grid[12], other[600] = 1, 2, 3
        np.frombuffer(memory, np.uint8)[0] = 1  # before it
        dirty = tracker.collect()
        assert whole.write(dirty).written == 2 and part.write(dirty).written == 1
        assert 1 <= beside.write(dirty).written <= 2
        assert (
            (places[0][...] == grid).all() and (places[1][...] == grid[5:10]).all() and (places[2][...] == other).all()
        )
        with pytest.raises(InvalidMemory, match="nobody watched all of it"):
            ZarrWriter(places[1], np.zeros((5, 512))).write(dirty)


def test_nothing_is_dirty_and_arrays_of_no_axis() -> None:
    memory, array = tracked((8, 512))
    target = zarr.create_array(zarr.storage.MemoryStore(), shape=(8, 512), dtype="f8", chunks=(1, 512))
    scalar_memory, scalar = tracked(())
    alone = zarr.create_array(zarr.storage.MemoryStore(), shape=(), dtype="f8")
    with dirtytrack.track({"memory": memory, "scalar": scalar_memory}) as tracker:
        assert ZarrWriter(target, array).write(tracker.collect()) == Written(0, 8, 0)
        scalar[...] = 7
        assert ZarrWriter(alone, scalar).write(tracker.collect()) == Written(1, 1, 8)
        assert alone[()] == 7


def test_a_writer_refuses_what_does_not_fit() -> None:
    memory, array = tracked((8, 512))
    store = zarr.storage.MemoryStore()
    target = zarr.create_array(store, shape=(8, 512), dtype="f8", chunks=(1, 512))
    for zarr_array, given_array, says in (
        (target, memory, r"one of NumPy, not Memory"),
        (target, [1, 2], "one of NumPy"),
        (array, array, r"a zarr\.Array of zarr-python 3, not ndarray"),
        (target, array.T, "not contiguous"),
        (target, array.view(np.int64), "of type int64, the zarr array of float64"),
        (target, array.reshape(16, 256), r"the shape \(16, 256\), the zarr array \(8, 512\)"),
        (zarr.open_array(store, mode="r"), array, "read-only"),
    ):
        with pytest.raises(InvalidMemory, match=says):
            ZarrWriter(zarr_array, given_array)
    with pytest.raises(InvalidMemory, match="threads="):
        ZarrWriter(target, array, threads=0)
    with pytest.raises(InvalidMemory, match="not bytes"):
        ZarrWriter(target, array).write(b"")  # type: ignore[arg-type]


def test_a_resize_is_refused_before_anything_is_written() -> None:
    memory, array = tracked((8, 512))
    store = Counting(zarr.storage.MemoryStore())
    target = zarr.create_array(store, shape=(8, 512), dtype="f8", chunks=(1, 512))
    with dirtytrack.track(memory) as tracker:
        writer = ZarrWriter(target, array)
        array[:] = 1
        dirty = tracker.collect()
        target.resize((9, 512))
        store.taken()
        writes: tuple[Callable[[], object], ...] = (partial(writer.write, dirty), writer.write_all)
        for write in writes:
            with pytest.raises(InvalidMemory, match=r"the zarr array \(9, 512\): resize the other one too"):
                write()
        assert store.taken() == []
        target.resize((8, 512))
        assert writer.write(dirty).written == 8
        array.shape = (4, 1024)
        with pytest.raises(InvalidMemory, match="shape"):
            writer.write(dirty)


def test_bytes_that_only_compare_equal_to_the_fill_value_are_written() -> None:
    nan = np.frombuffer(b"\x01\0\0\0\0\0\xf8\x7f", np.float64)[0]
    for dtype, fill, value in (
        (np.complex128, 0, complex(0.0, -0.0)),
        (np.float64, 0, -0.0),
        (np.float64, np.nan, nan),
    ):
        memory, array = tracked((4, 512), dtype)
        target = zarr.create_array(
            zarr.storage.MemoryStore(), shape=array.shape, dtype=dtype, chunks=(1, 512), fill_value=fill
        )
        with dirtytrack.track(memory) as tracker:
            array[:3] = value
            array[3] = fill
            ZarrWriter(target, array).write(tracker.collect())
            assert target[...].tobytes() == array.tobytes()
            assert target.nchunks_initialized == 3


def test_a_program_that_writes_meanwhile_is_caught_up_with() -> None:
    memory, array = tracked((256, 512), np.int64)
    target = zarr.create_array(zarr.storage.MemoryStore(), shape=array.shape, dtype="i8", chunks=(4, 512))
    over = threading.Event()

    def work() -> None:
        draw = np.random.default_rng(1)
        while not over.is_set():
            array[draw.integers(0, 256)] += 1

    with dirtytrack.track(memory) as tracker:
        writer = ZarrWriter(target, array)
        worker = threading.Thread(target=work)
        worker.start()
        try:
            for _ in range(4):
                writer.write(tracker.collect())
        finally:
            over.set()
            worker.join()
        writer.write(tracker.collect())
        assert (target[...] == array).all()


def test_it_goes_on_from_an_export(tmp_path: Path) -> None:
    memory, array = tracked((64, 512))
    array[:] = np.random.default_rng(1).random(array.shape)
    with Checkpointer(tmp_path / "store", {"it": array}) as ckpt, dirtytrack.track(memory) as tracker:
        ckpt.save().wait()
        export_zarr(tmp_path / "store", tmp_path / "out", chunk_bytes=8 * PAGE)
        writer = ZarrWriter(zarr.open_group(tmp_path / "out", mode="r+")["it"], array)
        array[3] = 7
        assert writer.write(tracker.collect()).written == 1
        assert (zarr.open_group(tmp_path / "out", mode="r")["it"][...] == array).all()

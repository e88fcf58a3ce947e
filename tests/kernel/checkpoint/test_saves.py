# SPDX-License-Identifier: MIT
"""What is saved is what was there, whatever the buffers are: each generation against a full copy."""

from __future__ import annotations

import mmap
import random
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dirtytrack
from dirtytrack.checkpoint import Checkpointer, restore, verify
from dirtytrack.checkpoint.segments import FrameKind
from dirtytrack.checkpoint.store import DirectoryStore
from dirtytrack.errors import BlindSpotWarning, InvalidCheckpoint, InvalidMemory
from dirtytrack.kernel import core
from tests.generations import Keyed
from tests.saving import PAGE, Program, bytes_of, paged, require_equal, scribble
from tests.storing import frames_and_bytes

DTYPES = ("u1", "<f4", ">i2", "f8", "c16", "?", "M8[ns]", "S7", "U3", "g", [("a", "i4"), ("b", "f8", (2,))])


def unaligned(nbytes: int, by: int) -> Any:
    return np.zeros(nbytes + by + PAGE, np.uint8)[by : by + nbytes]


@contextmanager
def memory_of(kind: str) -> Iterator[Any]:
    if kind == "shared":
        memory = SharedMemory(create=True, size=5 * PAGE + 11)
        yield memory
        memory.close()
        memory.unlink()
    elif kind == "mmap":
        yield mmap.mmap(-1, 3 * PAGE + 5)
    elif kind == "bytearray":
        yield bytearray(2 * PAGE + 77)
    elif kind == "array":
        yield array("d", range(3000))
    elif kind == "Memory":
        yield dirtytrack.allocate(7 * PAGE, name="heap")
    elif kind == "shared Memory":
        yield dirtytrack.allocate(7 * PAGE, shared=True)
    elif kind == "huge":
        yield dirtytrack.allocate(4 << 20, huge="transparent")
    elif kind == "unaligned":
        yield unaligned(3 * PAGE + 100, 333)
    elif kind == "tiny":
        yield unaligned(1, 5)
    elif kind == "memmap":
        yield np.frombuffer(mmap.mmap(-1, 4 * PAGE), "<i4").reshape(64, 64)


KINDS = ("shared", "mmap", "bytearray", "array", "Memory", "shared Memory", "huge", "unaligned", "tiny", "memmap")


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_buffer(where: Path, kind: str) -> None:
    with memory_of(kind) as memory:
        track = {"blind_spots": "accepted"}
        with Program(where, {"it": memory, "beside": np.zeros(10)}, compression=None, track=track) as program:
            assert program.save().kind == "full"
            for _ in range(3):
                scribble(memory, program.draw, 0.3)
                program.save()
            program.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (5, 1, 7)], ids=str)
def test_arrays_come_back_as_they_were(where: Path, dtype: Any, shape: tuple[int, ...]) -> None:
    grid = np.zeros(shape, dtype)
    bytes_of(grid)[:] = np.resize(
        np.arange(1, 60, dtype=np.uint8) if dtype != "?" else np.ones(3, np.uint8), grid.nbytes
    )
    if dtype == "U3":
        grid[...] = "äß"
    with Checkpointer(where, {"grid": grid}) as ckpt:
        ckpt.save().wait()
    back = restore(where)["grid"]
    assert (back.dtype, back.shape) == (grid.dtype, grid.shape)
    assert back.tobytes() == grid.tobytes()
    into = np.zeros_like(grid)
    restore(where, into={"grid": into})
    assert into.tobytes() == grid.tobytes()


def test_memory_that_others_may_write_is_warned_of_where_it_was_given(where: Path) -> None:
    with pytest.warns(BlindSpotWarning, match="'it'") as caught:
        ckpt = Checkpointer(where, {"it": mmap.mmap(-1, PAGE)})
    with ckpt:
        with pytest.warns(BlindSpotWarning, match="'more'") as added:
            ckpt.add("more", mmap.mmap(-1, PAGE))
        with pytest.warns(BlindSpotWarning, match="'more'") as replaced:
            ckpt.replace("more", mmap.mmap(-1, PAGE))
    assert {each.filename for each in (*caught, *added, *replaced)} == {__file__}


def test_a_raw_range(where: Path) -> None:
    memory = dirtytrack.allocate(4 * PAGE)
    raw = memory.address + 100, 3 * PAGE
    data = np.frombuffer(memory, np.uint8)[100 : 100 + 3 * PAGE]
    with Checkpointer(where, {"raw": raw}) as ckpt:
        for value in range(3):
            data[PAGE * value + 7] = value + 1
            ckpt.save().wait()
            require_equal(where, {"raw": bytes(data)})
    data[:] = 0
    with Checkpointer(where, {"raw": raw}, resume=True) as ckpt:
        assert data[7] == 1
        assert not ckpt.save().bytes_dirty


def test_what_lies_beside_a_buffer_is_not_saved(where: Path) -> None:
    page = np.zeros(3 * PAGE, np.uint8)
    page[:] = 7
    with Checkpointer(where, {"it": page[100:200], "that": page[200:300]}, compression=None) as ckpt:
        ckpt.save().wait()
        page[:] = 9
        save = ckpt.save()
        save.wait()
        assert save.bytes_dirty == 200
        require_equal(where, {"it": b"\x09" * 100, "that": b"\x09" * 100})


def test_buffers_may_overlap(where: Path) -> None:
    data = np.zeros(20 * PAGE, np.uint8)
    parts = {"all": data, "first": data[: 9 * PAGE], "tied": data, "middle": data[PAGE + 5 : 12 * PAGE + 9]}
    with Program(where, parts, staging_bytes=1 << 16) as program:
        program.save()
        for at in (0, 5 * PAGE, 10 * PAGE, 19 * PAGE):
            data[at] += 1
            program.save()
        program.check()


@pytest.mark.parametrize("backend", ["kernel", "compare", "compare-hashes"])
def test_each_backend(where: Path, backend: str) -> None:
    buffers = {"a": np.zeros(40 * PAGE, np.uint8), "b": unaligned(9 * PAGE, 17)}
    with Program(where, buffers, track={"backend": backend}, staging_bytes=1 << 16) as program:
        for _ in range(5):
            program.save()
            program.scribble()
        program.check()


# ---- how it is written


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"compression": None},
    "zstd": {},
    "deltas": {"deltas": True, "compression": None},
    "deltas, zstd": {"deltas": True, "level": 3},
    "threads": {"threads": 3},
    "encrypted": {"encrypt": Keyed(77), "decrypt": Keyed(77)},
    "encrypted deltas": {"encrypt": Keyed(77), "decrypt": Keyed(77), "deltas": True, "threads": 2},
    "waves": {"staging_bytes": 1 << 16},
    "waves, threads": {"staging_bytes": 1 << 16, "threads": 2, "deltas": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_way_to_write(where: Path, options: dict[str, Any]) -> None:
    buffers = {"a": np.zeros(100 * PAGE, np.uint8), "b": unaligned(31 * PAGE + 9, 1001), "c": np.zeros((3, 3))}
    buffers["a"][:] = np.frombuffer(random.Random(3).randbytes(100 * PAGE), np.uint8)
    with Program(where, buffers, **options) as program:
        for number in range(8):
            program.save(full=number == 5)
            program.scribble(0.05 if number % 2 else 0.4)
        program.check()
    assert verify(where, all=True).ok


def test_what_did_not_change_is_not_stored_again(where: Path) -> None:
    data = paged(200, 3)
    with Checkpointer(where, {"data": data}, deltas=True, compression=None) as ckpt:
        ckpt.save().wait()
        data[:] = data.copy()  # every page is written
        same = ckpt.save()
        same.wait()
        assert (same.bytes_dirty, same.bytes_written) == (data.nbytes, 0)
        data[::PAGE] += 1
        few = ckpt.save()
        few.wait()
        assert few.bytes_dirty == data.nbytes
        assert 0 < few.bytes_written < data.nbytes // 50
        require_equal(where, {"data": bytes(data)})


def test_zeros_take_no_room(where: Path) -> None:
    data = np.zeros(4 << 20, np.uint8)
    data[5] = 1
    with Checkpointer(where, {"data": data}, compression=None) as ckpt:
        save = ckpt.save()
        save.wait()
        assert save.bytes_written < 1 << 21
        kinds = [kind for _, _, kind, _ in frames_and_bytes(DirectoryStore(where), DirectoryStore(where).manifest())]
        assert kinds == [FrameKind.PAGES, *[FrameKind.ZEROS] * 3]


def test_nothing_dirty_is_a_generation_without_a_segment(where: Path) -> None:
    with Program(where, {"data": paged(10)}) as program:
        program.save()
        before = len(DirectoryStore(where).segments())
        save = program.save()
        assert (save.kind, save.bytes_dirty, save.bytes_written) == ("increment", 0, 0)
        assert len(DirectoryStore(where).segments()) == before
        program.check()


def test_an_increment_pays_for_what_changed(where: Path) -> None:
    data = paged(2000, 3)
    with Checkpointer(where, {"data": data}, compression=None) as ckpt:
        ckpt.save().wait()
        data[: 20 * PAGE : PAGE] += 1
        save = ckpt.save()
        save.wait()
        assert save.kind == "increment"
        assert save.bytes_dirty == 20 * PAGE
        assert 20 * PAGE < save.bytes_written < 25 * PAGE


def test_all_dirty_is_full(where: Path) -> None:
    data = paged(2000, 3)
    with Checkpointer(where, {"data": data}, compression=None) as ckpt:
        ckpt.save().wait()
        data += 1
        save = ckpt.save()
        save.wait()
        assert save.kind == "full"
        assert len(DirectoryStore(where).manifest().segments) == 1


def test_meta_is_kept_as_it_was(where: Path) -> None:
    meta: dict[str, Any] = {"step": 3, "why": ["a", None, 1.5]}
    with Checkpointer(where, {"data": bytearray(9)}) as ckpt:
        save = ckpt.save(meta)
        meta["step"] = 4
        save.wait()
        assert restore(where).meta == {"step": 3, "why": ["a", None, 1.5]}
        for wrong in ({1, 2}, float("nan"), object()):
            with pytest.raises(InvalidCheckpoint, match="JSON"):
                ckpt.save(wrong)
        assert ckpt.save().wait()


# ---- buffers that come and go


def test_meta_is_not_nested_so_deep_that_it_cannot_be_read(where: Path) -> None:
    def nested(depth: int) -> Any:
        return [nested(depth - 1)] if depth else 7

    def deep_in_calls(calls: int) -> Any:
        return deep_in_calls(calls - 1) if calls else restore(where).meta

    with Checkpointer(where, {"data": bytearray(9)}) as ckpt:
        with pytest.raises(InvalidCheckpoint, match="deep"):
            ckpt.save(nested(101))
        ckpt.save(nested(100))
    assert deep_in_calls(500) == nested(100)


def test_buffers_come_and_go(where: Path) -> None:
    with Program(where, {"a": paged(20)}) as program:
        ckpt, buffers = program.ckpt, program.buffers
        program.save()
        buffers["b"] = np.arange(5000)
        ckpt.add("b", buffers["b"])
        with pytest.raises(InvalidMemory, match="'b' already"):
            ckpt.add("b", bytearray(3))
        assert program.save().bytes_dirty == buffers["b"].nbytes
        program.scribble()
        program.save()
        ckpt.remove("a")
        del buffers["a"]
        with pytest.raises(InvalidMemory, match="no buffer 'a'"):
            ckpt.remove("a")
        program.save()
        buffers["a"] = np.ones(7 * PAGE, np.uint8)  # another one of that name
        ckpt.add("a", buffers["a"])
        program.save()
        buffers["b"] = np.concatenate([buffers["b"], np.arange(9000)])  # it has grown
        ckpt.replace("b", buffers["b"])
        program.scribble()
        program.save()
        program.scribble()
        program.save()
        with pytest.raises(InvalidMemory, match="no buffer 'c'"):
            ckpt.replace("c", bytearray(3))
        assert set(ckpt.buffers) == {"a", "b"}
        program.check()


@pytest.mark.parametrize("nbytes", [3 * PAGE, 64 * PAGE])
def test_memory_is_resized(where: Path, nbytes: int) -> None:
    memory = dirtytrack.allocate(9 * PAGE)
    with Program(where, {"heap": memory, "other": np.zeros(3)}) as program:
        scribble(memory, program.draw)
        program.save()
        memory.resize(nbytes)
        scribble(memory, program.draw)
        program.save()
        scribble(memory, program.draw)
        assert program.save().kind == "increment"
        program.check()


def test_a_removed_buffer_is_let_go_of(where: Path) -> None:
    data = bytearray(3 * PAGE)
    with Checkpointer(where, {"data": data, "rest": bytearray(5)}) as ckpt:
        ckpt.save()
        with pytest.raises(BufferError):
            data.extend(b"more")
        ckpt.remove("data")
        ckpt.wait()
        core.load()
        data.extend(b"more")
    with Checkpointer(where.parent / "other", {"data": data}) as ckpt:
        ckpt.save()
    data.extend(b"more")


def test_many_buffers(where: Path) -> None:
    pool = np.zeros(700 * 1000, np.uint8)
    buffers = {f"part {i}": pool[1000 * i : 1000 * i + 900] for i in range(700)}
    with Program(where, buffers, threads=2) as program:
        program.save()
        pool[::50000] = 3
        save = program.save()
        assert save.kind == "increment"
        program.check()


# ---- what cannot be


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: {"x": b"constant"}, "read-only"),
        (lambda: {"x": np.zeros(3, object)}, "Python objects"),
        (lambda: {"x": np.zeros((4, 4)).T}, "C-contiguous"),
        (lambda: {"x": np.zeros(0)}, "empty"),
        (
            lambda: {"x": np.zeros(3, np.dtype({"names": ["a", "b"], "formats": ["i4", "i4"], "offsets": [0, 0]}))},
            "kept",
        ),
        (lambda: {"x": np.ma.zeros(3)}, "masked"),
        (lambda: {"x": 3}, "buffer protocol"),
        (lambda: {"": bytearray(3)}, "name"),
        (lambda: {7: bytearray(3)}, "name"),
        (dict, "one at least"),
        (lambda: [bytearray(3)], "mapping"),
    ],
)
def test_buffers_that_cannot_be_saved(where: Path, make: Callable[[], Any], says: str) -> None:
    with pytest.raises(InvalidMemory, match=says):
        Checkpointer(where, make())
    assert not where.exists()  # nothing was begun


@pytest.mark.parametrize(
    "options",
    [
        {"when_busy": "never"},
        {"quiesce": 3},
        {"compact": 0},
        {"threads": 0},
        {"compression": "lzma"},
        {"level": 99},
        {"resume": "1"},
        {"resume": None},
        {"retain": 3},
        {"encrypt": b"key"},
        {"decrypt": b"key"},
    ],
)
def test_options_that_cannot_be(where: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidCheckpoint):
        Checkpointer(where, {"x": bytearray(3)}, **options)


def test_a_staging_buffer_that_cannot_be(where: Path) -> None:
    with pytest.raises(InvalidMemory, match="staging_bytes"):
        Checkpointer(where, {"x": bytearray(3)}, staging_bytes=100)
    with Checkpointer(where, {"x": bytearray(3)}) as ckpt:  # and the store is free again
        assert ckpt.save().wait()

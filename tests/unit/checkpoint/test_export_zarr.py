# SPDX-License-Identifier: MIT
"""Generations as zarr: read back by zarr and compared byte by byte; refused, damaged, interrupted."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dirtytrack.checkpoint import Checkpointer, DirectoryStore, RegionEntry, compact, export_zarr, restore
from dirtytrack.checkpoint.formats.to_zarr import node_name
from dirtytrack.errors import (
    DamagedCheckpoint,
    InvalidCheckpoint,
    NoSuchGeneration,
    PermissionDenied,
    StoreFailed,
    UnsupportedKernel,
)
from tests.generations import PAGE, History, Keyed

zarr: Any = pytest.importorskip("zarr", minversion="3.1", reason="zarr 3 needs Python 3.11")


@pytest.fixture
def made(where: Path) -> History:
    """Arrays, bytes and zeros, in five generations with deltas."""
    history = History(DirectoryStore(where / "store", create=True), 6, compression="zstd")
    history.add("grid", 30 * PAGE, "<f8", (30, 512))
    history.add("cube", 16 * PAGE, "<i2", (32, 16, 64))
    history.add("../table", 10_001)
    history.add("big", 8 * PAGE, ">u4", (8192,))
    history.add("numbers", 3 * PAGE, "<c16")
    history.add("tensor", 2 * PAGE, "torch.float32", (2, 1024))
    for step in range(5):
        history.save({"step": step})
        history.write(4)
    return history


def require_same(group: Any, truth: dict[str, bytes]) -> None:
    arrays = group.attrs["dirtytrack"]["arrays"]
    assert arrays.keys() == truth.keys()
    for name, data in truth.items():
        array = group[arrays[name]]
        told = array.attrs["dirtytrack"]
        assert told["name"] == name
        found = np.asarray(array[...])
        if (told["dtype"] or "")[:1] == ">":
            found = found.astype(told["dtype"])
        assert found.tobytes() == data, name


def test_each_generation_is_what_was_saved(where: Path, made: History) -> None:
    for generation, truth in made.truth.items():
        manifest = export_zarr(made.store, where / f"{generation}.zarr", generation)
        assert manifest.generation == generation
        group = zarr.open_group(where / f"{generation}.zarr", mode="r")
        assert group.attrs["meta"] == {"step": generation - 1}
        assert group.attrs["dirtytrack"]["generation"] == generation
        require_same(group, truth)
    group = zarr.open_group(where / "5.zarr", mode="r")
    state = restore(made.store)
    for name, node in group.attrs["dirtytrack"]["arrays"].items():
        array, back = group[node], state[name]
        assert array.metadata.zarr_format == 3
        assert array.shape == tuple(back.shape) and array.dtype == np.asarray(back).dtype.newbyteorder("<")
    assert group["grid"].shape == (30, 512) and group["..%2Ftable".replace("..", "%2E.")].dtype == np.uint8


def test_a_program_that_prefers_format_2_gets_3(where: Path, made: History) -> None:
    with zarr.config.set({"default_zarr_format": 2, "array.write_empty_chunks": True}):
        export_zarr(made.store, where / "out")
    require_same(zarr.open_group(where / "out", mode="r", zarr_format=3), made.truth[5])


def test_what_is_zero_takes_no_chunk_and_what_only_compares_equal_to_it_does(where: Path) -> None:
    zeros, minus, complex_minus = np.zeros((64, 512)), np.full((64, 512), -0.0), np.zeros((32, 512), np.complex128)
    complex_minus.imag = -0.0
    with Checkpointer(where / "store", {"zeros": zeros, "minus": minus, "complex": complex_minus}) as ckpt:
        ckpt.save().wait()
    export_zarr(where / "store", where / "out", chunk_bytes=32 << 10)
    group = zarr.open_group(where / "out", mode="r")
    assert group["zeros"].nchunks_initialized == 0 and not group["zeros"][...].any()
    for name, array in (("minus", minus), ("complex", complex_minus)):
        assert group[name].nchunks_initialized == group[name].nchunks == 8
        assert group[name][...].tobytes() == array.tobytes()


@settings(max_examples=25)
@given(data=st.data())
def test_any_shape_chunks_and_shards(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    where = tmp_path_factory.mktemp("any")
    shape = tuple(data.draw(st.lists(st.integers(1, 40), max_size=4)))
    dtype = data.draw(st.sampled_from(("<u1", "<i2", ">f4", "<f8", "<M8[ns]", "|b1")))
    history = History(DirectoryStore(where / "store", create=True), data.draw(st.integers(0, 99)))
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    history.add("it", nbytes, dtype, shape)
    if dtype == "|b1":
        history.memory["it"][:] = bytes(byte & 1 for byte in history.memory["it"])
    history.save()
    chunks = tuple(data.draw(st.integers(-(-length // 3), length + 1)) for length in shape)
    options: dict[str, Any] = {"chunks": {"it": chunks}} if data.draw(st.booleans()) else {}
    if options and shape and data.draw(st.booleans()):
        options["shards"] = {"it": tuple(chunk * data.draw(st.integers(1, 3)) for chunk in chunks)}
    compressors = data.draw(st.sampled_from(("auto", None)))
    export_zarr(history.store, where / "out", compressors=compressors, **options)
    group = zarr.open_group(where / "out", mode="r")
    require_same(group, history.truth[1])
    assert group["it"].shape == shape
    if options:
        assert group["it"].chunks == chunks and group["it"].shards == options.get("shards", {}).get("it")


def test_chunks_that_split_inner_axes_are_written_from_a_few_rows_at_once(where: Path) -> None:
    array = np.arange(300 * 70 * 50, dtype=np.int32).reshape(300, 70, 50)
    with Checkpointer(where / "store", {"it": array}) as ckpt:
        ckpt.save().wait()
    export_zarr(where / "store", where / "out", chunks={"it": (100, 7, 9)}, memory_bytes=8 << 20)
    assert (zarr.open_group(where / "out", mode="r")["it"][...] == array).all()
    with pytest.raises(InvalidCheckpoint, match=r"4200000 bytes of it at once: pass memory_bytes=16800000 at least"):
        export_zarr(where / "store", where / "two", chunks={"it": (300, 7, 9)}, memory_bytes=8 << 20)
    assert not (where / "two").exists()


def test_what_is_encrypted(where: Path) -> None:
    history = History(DirectoryStore(where / "store", create=True), encrypt=Keyed(0x33))
    history.add("it", 3 * PAGE)
    history.save()
    export_zarr(history.store, where / "out", decrypt=Keyed(0x33))
    require_same(zarr.open_group(where / "out", mode="r"), history.truth[1])
    with pytest.raises(InvalidCheckpoint, match="decrypt"):
        export_zarr(history.store, where / "two")
    assert sorted(path.name for path in where.iterdir()) == ["out", "store"]


def test_some_buffers_and_no_others(where: Path, made: History) -> None:
    export_zarr(made.store, where / "out", names=["grid", "big"])
    group = zarr.open_group(where / "out", mode="r")
    require_same(group, {name: made.truth[5][name] for name in ("grid", "big")})
    assert sorted(group.array_keys()) == ["big", "grid"]
    with pytest.raises(InvalidCheckpoint, match="no buffer 'grind'; it has 'grid'"):
        export_zarr(made.store, where / "two", names=["grind"])


TYPES_THAT_ZARR_HAS_NOT = ('[["a","<i4"],["b","<f8",[2]]]', "torch.bfloat16", "bfloat16", "<U3", "|V12", "|S4", "<f16")


@pytest.mark.parametrize("dtype", TYPES_THAT_ZARR_HAS_NOT)
def test_a_type_that_zarr_does_not_have(where: Path, dtype: str) -> None:
    history = History(DirectoryStore(where / "store", create=True))
    history.add("fine", PAGE, "<f4", (32, 32))
    history.add("it", 4800, dtype, None)
    history.save()
    with pytest.raises(InvalidCheckpoint, match=r"zarr has no type for 'it' \(.*as_bytes=True"):
        export_zarr(history.store, where / "out")
    assert sorted(path.name for path in where.iterdir()) == ["store"]
    export_zarr(history.store, where / "out", as_bytes=True)
    group = zarr.open_group(where / "out", mode="r")
    require_same(group, history.truth[1])
    assert group["it"].dtype == np.uint8 and group["it"].attrs["dirtytrack"]["dtype"] == dtype
    export_zarr(history.store, where / "one", names=["fine"])


def test_what_was_damaged_is_never_exported(where: Path, made: History) -> None:
    path = where / "store" / "segments" / made.manifests[4].segments[-1].name
    whole = path.read_bytes()
    for at in range(4096, len(whole), 701):
        damaged = bytearray(whole)
        damaged[at] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(DamagedCheckpoint):
            export_zarr(made.store, where / "out", 4)
        assert sorted(each.name for each in where.iterdir()) == ["store"]
    export_zarr(made.store, where / "out", 3)


def test_a_damaged_compaction_is_passed_over_by_an_export(where: Path, made: History) -> None:
    with made.store.reading():  # so that what it replaces stays
        after = compact(where / "store")
    assert export_zarr(made.store, where / "compacted").revision == 1
    path = where / "store" / "segments" / after.segments[0].name
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    assert export_zarr(made.store, where / "out").revision == 0
    for name in ("compacted", "out"):
        require_same(zarr.open_group(where / name, mode="r"), made.truth[5])
    memory = zarr.storage.MemoryStore()
    export_zarr(made.store, memory)
    require_same(zarr.open_group(memory, mode="r"), made.truth[5])


def test_a_target_that_is_there_is_not_overwritten(where: Path, made: History) -> None:
    (where / "file").write_bytes(b"mine")
    (where / "full").mkdir()
    (where / "full" / "mine").write_bytes(b"mine")
    (where / "dangling").symlink_to(where / "nothing")
    for name in ("file", "full", "dangling", "store"):
        with pytest.raises(InvalidCheckpoint, match="is there already, and nothing is overwritten"):
            export_zarr(made.store, where / name)
    assert (where / "file").read_bytes() == (where / "full" / "mine").read_bytes() == b"mine"
    (where / "empty").mkdir()
    export_zarr(made.store, where / "empty")
    export_zarr(made.store, where / "deep" / "er")
    assert zarr.open_group(where / "deep" / "er", mode="r").attrs["meta"] == {"step": 4}
    assert not list(where.rglob("*.new"))


def test_options_of_an_export_that_make_no_sense(where: Path, made: History) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"memory_bytes": 1000}, "memory_bytes= is a number from"),
        ({"threads": 0}, "threads="),
        ({"chunk_bytes": 0}, "chunk_bytes="),
        ({"names": "grid"}, "names= is a list"),
        ({"chunks": {"grid": (1,)}}, "chunks= of 'grid' is 2 numbers"),
        ({"chunks": {"grid": (0, 1)}}, "numbers from 1 on"),
        ({"chunks": {"grid": 7}}, "not 7"),
        ({"chunks": {"grind": (1, 1)}}, "no buffer that is exported"),
        ({"chunks": {"grid": (2, 512)}, "shards": {"grid": (3, 512)}}, "no multiple"),
    ]
    for options, says in wrong:
        with pytest.raises(InvalidCheckpoint, match=says):
            export_zarr(made.store, where / "out", **options)
    with pytest.raises(InvalidCheckpoint, match="open a store there and pass that"):
        export_zarr(made.store, "s3://bucket/out")
    with pytest.raises(InvalidCheckpoint, match="a path or a store of the package zarr"):
        export_zarr(made.store, 7)
    with pytest.raises(NoSuchGeneration, match="no generation 9"):
        export_zarr(made.store, where / "out", 9)
    assert sorted(path.name for path in where.iterdir()) == ["store"]


def test_a_package_that_is_not_there_or_too_old(where: Path, made: History, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zarr, "__version__", "2.18.3")
    with pytest.raises(UnsupportedKernel, match=r"2\.18\.3, and 3\.1 or newer"):
        export_zarr(made.store, where / "out")
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(UnsupportedKernel, match=r'pip install "dirtytrack\[zarr\]"'):
        export_zarr(made.store, where / "out")
    assert not (where / "out").exists()


def test_progress_tells_all_bytes_and_can_end_it(where: Path, made: History) -> None:
    told: list[tuple[int, int]] = []
    export_zarr(made.store, where / "out", progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (made.manifests[5].nbytes,) * 2 and told == sorted(told)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_zarr(made.store, where / "two", progress=stop)
    assert sorted(path.name for path in where.iterdir()) == ["out", "store"]


def test_a_full_disk_leaves_nothing(where: Path, made: History, monkeypatch: pytest.MonkeyPatch) -> None:
    local, left = import_module("zarr.storage._local"), iter(range(9))

    def full(path: Path, value: Any, exclusive: bool = False) -> int:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return put(path, value, exclusive)  # type: ignore[no-any-return]

    put = local._put
    monkeypatch.setattr(local, "_put", full)
    with pytest.raises(StoreFailed, match=r"No space left on device.*make room") as caught:
        export_zarr(made.store, where / "out", chunk_bytes=PAGE)
    assert caught.value.errno == errno.ENOSPC
    assert sorted(path.name for path in where.iterdir()) == ["store"]


def test_a_folder_that_may_not_be_written_to(where: Path, made: History, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "mkdir", forbidden)  # root may write anywhere
    with pytest.raises(PermissionDenied, match="Export to where this user may write"):
        export_zarr(made.store, where / "theirs" / "out")


def test_whoever_kills_it_leaves_no_target(where: Path, made: History) -> None:
    code = """
import os, signal, sys
from dirtytrack.checkpoint import export_zarr
count = int(sys.argv[3])
def tell(done, total):
    global count
    count -= 1
    if not count:
        os.kill(os.getpid(), signal.SIGKILL)
export_zarr(sys.argv[1], sys.argv[2], progress=tell, chunk_bytes=4096, memory_bytes=8 << 20)
"""
    out = where / "out"
    done = subprocess.run([sys.executable, "-c", code, where / "store", out, "4"], check=False)
    assert done.returncode == -9 and not out.exists() and list(where.glob(".out.*.new"))
    export_zarr(made.store, out)
    require_same(zarr.open_group(out, mode="r"), made.truth[5])


# ---- stores of zarr's


class Failing(zarr.storage.WrapperStore):  # type: ignore[misc]
    """A store that fails after so many writes."""

    left = 10**9

    async def set(self, key: str, value: Any) -> None:
        type(self).left -= 1
        if self.left < 0:
            raise ConnectionResetError(errno.ECONNRESET, "the wire was cut")
        await super().set(key, value)


@pytest.fixture
def failing() -> Iterator[type[Failing]]:
    yield Failing
    Failing.left = 10**9


def test_a_store_of_zarrs(where: Path, made: History, failing: type[Failing]) -> None:
    memory = zarr.storage.MemoryStore()
    export_zarr(made.store, memory, 3)
    require_same(zarr.open_group(memory, mode="r"), made.truth[3])
    with pytest.raises(InvalidCheckpoint, match="holds something already"):
        export_zarr(made.store, memory, 4)
    require_same(zarr.open_group(memory, mode="r"), made.truth[3])
    with pytest.raises(InvalidCheckpoint, match="read-only"):
        export_zarr(made.store, memory.with_read_only(True))
    for left in (0, 1, 3, 8):
        store = failing(zarr.storage.MemoryStore())
        Failing.left = left
        with pytest.raises(StoreFailed, match="the wire was cut"):
            export_zarr(made.store, store)
        assert not store._store._store_dict
    with pytest.raises(InvalidCheckpoint, match="nothing can be removed from"):
        export_zarr(made.store, zarr.storage.ZipStore(where / "it.zip", mode="w"))


def test_the_attributes_come_last(where: Path, made: History) -> None:
    order: list[str] = []

    class Noting(zarr.storage.WrapperStore):  # type: ignore[misc]
        async def set(self, key: str, value: Any) -> None:
            order.append(key)
            if key == "zarr.json":
                group = json.loads(value.to_bytes())
                assert ("dirtytrack" in group["attributes"]) == (len(order) > 1)
            await super().set(key, value)

    export_zarr(made.store, Noting(zarr.storage.MemoryStore()))
    assert order[0] == order[-1] == "zarr.json" and order.count("zarr.json") == 2


# ---- names, and memory


def test_no_name_leads_out_of_the_group_or_into_its_own_files(where: Path) -> None:
    names = [
        "a/b",
        "a",
        "..",
        ".",
        "zarr.json",
        "__x",
        "c",
        "%41",
        "A",
        "ü" * 300,
        "\udc80",
        "with space",
        "x" * 4096,
        "a\\b",
    ]
    entries = [RegionEntry(number, name, 1) for number, name in enumerate(names)]
    nodes = [node_name(entry) for entry in entries]
    assert len({node.lower() for node in nodes}) == len(names) - 1  # a and A
    for node in nodes:
        assert "/" not in node and not node.startswith((".", "__")) and node != "zarr.json" and len(node) <= 255
    history = History(DirectoryStore(where / "store", create=True))
    for name in names:
        history.add(name, 100)
    history.save()
    export_zarr(history.store, where / "out")
    require_same(zarr.open_group(where / "out", mode="r"), history.truth[1])
    assert {path.name for path in (where / "out").iterdir()} == {*nodes, "zarr.json"}


def test_it_takes_no_more_memory_than_was_said(where: Path) -> None:
    array = np.random.default_rng(1).integers(0, 255, (1536, 16 << 10), np.uint8)  # 24 MiB
    with Checkpointer(where / "store", {"it": array}, compression=None) as ckpt:
        ckpt.save().wait()
    export_zarr(where / "store", where / "warm", memory_bytes=8 << 20)
    tracemalloc.start()
    try:
        export_zarr(where / "store", where / "out", memory_bytes=8 << 20, compressors=None)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 12 << 20
    assert (zarr.open_group(where / "out", mode="r")["it"][...] == array).all()

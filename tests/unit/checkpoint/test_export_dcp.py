# SPDX-License-Identifier: MIT
"""Generations for `torch.distributed.checkpoint`: loaded by it and by its own utilities. `make test-torch` runs it."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dirtytrack.checkpoint import Checkpointer, DirectoryStore, export_dcp, restore
from dirtytrack.errors import DamagedCheckpoint, InvalidCheckpoint, NoSuchGeneration, StoreFailed, UnsupportedKernel
from tests.generations import PAGE, History, Keyed
from tests.saving import bytes_of

pytestmark = pytest.mark.torch

TENSORS = {
    "layer.weight": ("torch.bfloat16", (64, 128)),
    "layer.bias": ("torch.float32", (1024,)),
    "ids": ("<i8", (16, 4, 8)),
    "mask": ("|u1", (5000,)),
    "phase": ("<c8", (512,)),
    "small": ("torch.float8_e4m3fn", (4096,)),
    "count": ("<u2", (2048,)),
    "plain": (None, None),
    "one": ("<f8", ()),
}


@pytest.fixture
def torch() -> Any:
    return import_module("torch")


@pytest.fixture
def dcp() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DCP tells of one process, and of its own deprecated calls
        yield import_module("torch.distributed.checkpoint")


@pytest.fixture
def made(where: Path) -> History:
    history = History(DirectoryStore(where / "store", create=True), 6, compression="zstd")
    sizes = {"layer.weight": 2, "layer.bias": 4, "ids": 8, "mask": 1, "phase": 8, "small": 1, "count": 2, "one": 8}
    for name, (dtype, shape) in TENSORS.items():
        nbytes = 10_001 if shape is None else int(np.prod(shape)) * sizes[name]
        history.add(name, nbytes, dtype, shape)
    for step in range(4):
        history.save({"step": step, "loss": [0.5, None]})
        history.write(4)
    return history


def as_bytes(tensor: Any) -> bytes:
    return bytes(bytes_of(tensor))


def test_each_generation_is_loaded(where: Path, made: History, torch: Any, dcp: Any) -> None:
    for generation, truth in made.truth.items():
        export_dcp(made.store, where / "out" / str(generation), generation)
        restored = restore(made.store, generation=generation)
        state = {name: torch.zeros_like(torch.as_tensor(restored[name])) for name in truth}
        dcp.load({**state}, checkpoint_id=str(where / "out" / str(generation)), no_dist=True)
        for name, data in truth.items():
            assert as_bytes(state[name]) == data, name
    told: dict[str, Any] = {"dirtytrack": None}
    dcp.load(told, checkpoint_id=str(where / "out" / "4"), no_dist=True)
    assert told["dirtytrack"]["meta"] == {"step": 3, "loss": [0.5, None]}
    assert told["dirtytrack"]["generation"] == 4
    assert told["dirtytrack"]["buffers"]["layer.weight"] == {"dtype": "torch.bfloat16", "shape": [64, 128]}


def test_its_own_utilities_make_one_file_of_it(where: Path, made: History, torch: Any, dcp: Any) -> None:
    export_dcp(made.store, where / "out")
    utils = import_module("torch.distributed.checkpoint.format_utils")
    utils.dcp_to_torch_save(where / "out", where / "one.pt")
    found = torch.load(where / "one.pt", weights_only=True)
    assert found.pop("dirtytrack")["generation"] == 4
    assert found.keys() == made.truth[4].keys()
    for name, data in made.truth[4].items():
        assert as_bytes(found[name]) == data, name
        dtype, shape = TENSORS[name]
        assert str(found[name].dtype) == (dtype if (dtype or "").startswith("torch.") else str(found[name].dtype))
        assert tuple(found[name].shape) == (shape if shape is not None else (10_001,))
    assert found["count"].dtype == torch.uint16 and found["phase"].dtype == torch.complex64
    utils.torch_save_to_dcp(where / "one.pt", where / "again")  # and back


def test_large_tensors_are_cut_and_it_takes_no_more_memory_than_was_said(where: Path, torch: Any, dcp: Any) -> None:
    array = np.random.default_rng(1).integers(0, 255, (16 << 10, 4096), np.uint8)  # 64 MiB
    with Checkpointer(where / "store", {"it": array}, compression=None) as ckpt:
        ckpt.save().wait()
    tracemalloc.start()
    try:
        export_dcp(where / "store", where / "out", memory_bytes=8 << 20)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 16 << 20
    metadata = dcp.FileSystemReader(where / "out").read_metadata()
    assert len(metadata.state_dict_metadata["it"].chunks) == 32
    state = {"it": torch.zeros(array.shape, dtype=torch.uint8)}
    dcp.load(state, checkpoint_id=str(where / "out"), no_dist=True)
    assert (state["it"].numpy() == array).all()


def test_a_tensor_that_was_saved_is_loaded_as_it_was(where: Path, torch: Any, dcp: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 3)).to(torch.bfloat16)
    with Checkpointer(where / "store", model.state_dict()) as ckpt:
        ckpt.save({"epoch": 1}).wait()
    export_dcp(where / "store", where / "out")
    other = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 3)).to(torch.bfloat16)
    state = other.state_dict()
    dcp.load(state, checkpoint_id=str(where / "out"), no_dist=True)
    other.load_state_dict(state)
    for name, tensor in model.state_dict().items():
        assert other.state_dict()[name].equal(tensor)


@pytest.mark.parametrize("dtype", ['[["a","<i4"]]', "<U3", ">f8", "<M8[ns]", "|V12"])
def test_a_type_that_pytorch_does_not_have(where: Path, torch: Any, dcp: Any, dtype: str) -> None:
    history = History(DirectoryStore(where / "store", create=True))
    history.add("it", 4800, dtype, None)
    history.save()
    with pytest.raises(InvalidCheckpoint, match=r"PyTorch has no type for 'it' \(.*as_bytes=True"):
        export_dcp(history.store, where / "out")
    assert sorted(path.name for path in where.iterdir()) == ["store"]
    export_dcp(history.store, where / "out", as_bytes=True)
    state = {"it": torch.zeros(4800, dtype=torch.uint8)}
    dcp.load(state, checkpoint_id=str(where / "out"), no_dist=True)
    assert as_bytes(state["it"]) == history.truth[1]["it"]


def test_what_goes_wrong_leaves_nothing(where: Path, made: History, monkeypatch: pytest.MonkeyPatch) -> None:
    (where / "full").mkdir()
    (where / "full" / "mine").write_bytes(b"mine")
    with pytest.raises(InvalidCheckpoint, match="is there already"):
        export_dcp(made.store, where / "full")
    with pytest.raises(NoSuchGeneration):
        export_dcp(made.store, where / "out", 9)
    with pytest.raises(InvalidCheckpoint, match="no buffer 'nothing'"):
        export_dcp(made.store, where / "out", names=["nothing"])

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_dcp(made.store, where / "out", progress=stop)
    path = where / "store" / "segments" / made.manifests[4].segments[-1].name
    damaged = bytearray(path.read_bytes())
    damaged[4100] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DamagedCheckpoint, match="is damaged"):
        export_dcp(made.store, where / "out")
    filesystem = import_module("torch.distributed.checkpoint.filesystem")
    monkeypatch.setattr(filesystem, "_write_item", lambda *_, **__: 1 / 0)
    with pytest.raises(StoreFailed, match="division by zero"):
        export_dcp(made.store, where / "out", 3)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UnsupportedKernel, match=r'pip install "dirtytrack\[torch\]"'):
        export_dcp(made.store, where / "out", 3)
    assert sorted(path.name for path in where.iterdir()) == ["full", "store"]


def test_a_buffer_that_is_called_as_the_export_calls_itself_and_what_is_encrypted(
    where: Path, torch: Any, dcp: Any
) -> None:
    history = History(DirectoryStore(where / "store", create=True), encrypt=Keyed(3))
    history.add("dirtytrack", PAGE)
    history.add("it", PAGE)
    history.save()
    with pytest.raises(InvalidCheckpoint, match="is called 'dirtytrack'"):
        export_dcp(history.store, where / "out", decrypt=Keyed(3))
    export_dcp(history.store, where / "out", names=["it"], decrypt=Keyed(3))
    with pytest.raises(InvalidCheckpoint, match="decrypt"):
        export_dcp(history.store, where / "two", names=["it"])
    assert not (where / "two").exists()


RANK = """
import sys, warnings
warnings.simplefilter("ignore")
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
rank, ranks, where = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{where}/meeting", rank=rank, world_size=ranks)
mesh = init_device_mesh("cpu", (ranks,))
state = {"it": distribute_tensor(torch.zeros(3001, 300), mesh, [Shard(0)]), "dirtytrack": None}
dcp.load(state, checkpoint_id=where + "/out")
told, whole = state["dirtytrack"], state["it"].full_tensor()
assert told["meta"] == {"step": 1} and state["it"].to_local().shape[0] < 3001
assert whole.equal(torch.arange(3001 * 300, dtype=torch.float32).reshape(3001, 300))
dist.destroy_process_group()
"""


def test_two_ranks_load_their_own_parts(where: Path, torch: Any) -> None:
    array = np.arange(3001 * 300, dtype=np.float32).reshape(3001, 300)
    with Checkpointer(where / "store", {"it": array}) as ckpt:
        ckpt.save({"step": 1}).wait()
    export_dcp(where / "store", where / "out", memory_bytes=8 << 20)
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(rank), "2", str(where)]) for rank in range(2)]
    assert [rank.wait(100) for rank in ranks] == [0, 0]

# SPDX-License-Identifier: MIT
"""Tensors of PyTorch, and a model that is trained. `make test-torch` runs it: PyTorch is large."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from dirtytrack.checkpoint import Checkpointer, restore
from dirtytrack.errors import InvalidMemory
from tests.saving import Program

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("kind", ["bfloat16", "float32", "int64", "bool", "complex64", "float8_e4m3fn"])
@pytest.mark.parametrize("shape", [(), (7,), (3, 4, 5)], ids=str)
def test_tensors_come_back_as_they_were(where: Path, kind: str, shape: tuple[int, ...]) -> None:
    torch: Any = import_module("torch")

    dtype = getattr(torch, kind)
    tensor = torch.randint(0, 2, shape).to(dtype)
    with Program(where, {"it": tensor}) as program:
        program.save()
        tensor.view(torch.uint8).fill_(1) if tensor.dim() else tensor.fill_(1)
        program.save()
        program.check()
    back = restore(where)["it"]
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert back.reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))
    into = torch.zeros(shape, dtype=dtype)
    with Checkpointer(where, {"it": into}, resume=True):
        assert into.reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))


def test_tensors_that_cannot_be_saved(where: Path) -> None:
    torch: Any = import_module("torch")

    for tensor, says in (
        (torch.zeros(4, 4).T[1:], "contiguous"),
        (torch.zeros(0), "empty"),
        (torch.zeros(3, device="meta"), "on meta"),
        (torch.zeros(3, 3).to_sparse(), "contiguous"),
        (torch.zeros(3, dtype=torch.complex64).conj(), "conj"),
    ):
        with pytest.raises(InvalidMemory, match=says):
            Checkpointer(where, {"it": tensor})


def test_a_model_with_a_large_embedding_is_trained_killed_and_goes_on(where: Path) -> None:
    torch: Any = import_module("torch")

    def model_of(seed: int) -> Any:
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.EmbeddingBag(50_000, 32, mode="mean", sparse=True), torch.nn.Linear(32, 4))

    def train(model: Any, first: int, last: int, ckpt: Checkpointer | None) -> list[Any]:
        optimizer, saves = torch.optim.SGD(model.parameters(), lr=0.5), []
        for step in range(first, last):
            torch.manual_seed(step)
            loss = model(torch.randint(0, 50_000, (16, 8))).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if ckpt is not None:
                saves.append(ckpt.save({"step": step}))
        return saves

    whole = model_of(1)
    train(whole, 0, 30, None)
    first = model_of(1)
    with Checkpointer(where, first.state_dict(), compression=None) as ckpt:
        saves = train(first, 0, 15, ckpt)
    assert saves[0].kind == "full"
    assert all(save.kind == "increment" and save.bytes_dirty < 50_000 * 32 * 4 // 3 for save in saves[1:])
    second = model_of(2)
    with Checkpointer(where, second.state_dict(), resume=True) as ckpt:
        assert ckpt.resumed is not None
        saves = train(second, ckpt.resumed.meta["step"] + 1, 30, ckpt)
    assert saves[0].kind == "increment"
    for name, tensor in whole.state_dict().items():
        assert second.state_dict()[name].equal(tensor)
        assert restore(where)[name].equal(tensor)

# SPDX-License-Identifier: MIT
"""A model that PyTorch trains on the CPU, followed by deltas. `make test-torch` runs it: PyTorch is large."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import dirtytrack
from dirtytrack import InvalidMemory
from dirtytrack.delta import ArrayChanges, Mirror, apply, array_changes

pytestmark = pytest.mark.torch
STEPS = 50


def model_of(torch: Any, dtype: Any) -> tuple[Any, dirtytrack.Memory, Any]:
    """Embeddings, of which a step touches few rows, and dense layers; all parameters in one memory, beside a flat
    integer view of it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.EmbeddingBag(5000, 32, mode="mean"),
        torch.nn.Linear(32, 128),
        torch.nn.ReLU(),
        torch.nn.Linear(128, 10),
    ).to(dtype)
    parameters = list(model.parameters())
    nbytes = sum(-(-p.numel() * p.element_size() // 64) * 64 for p in parameters)
    memory = dirtytrack.allocate(nbytes, name="parameters")
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    at = 0
    for p in parameters:
        end = at + p.numel() * p.element_size()
        place = flat[at:end].view(p.dtype).view(p.shape)
        place.copy_(p.data)
        p.data = place
        at += -(-(end - at) // 64) * 64
    return model, memory, np.frombuffer(memory, "u2" if dtype is torch.bfloat16 else "u4")


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("optimizer_name", ["Adam", "SparseAdam"])
def test_fifty_steps_of_training(precision: str, optimizer_name: str) -> None:
    torch = pytest.importorskip("torch")
    dtype = getattr(torch, precision)
    model, memory, flat = model_of(torch, dtype)
    if optimizer_name == "SparseAdam":
        model[0].sparse = True
        optimizers = [
            torch.optim.SparseAdam([model[0].weight], lr=1e-3),
            torch.optim.Adam([p for layer in model[1:] for p in layer.parameters()], lr=1e-3),
        ]
    else:
        optimizers = [torch.optim.Adam(model.parameters(), lr=1e-3)]
    table = array_changes(model[0].weight)
    sent = pages = 0
    with Mirror(memory, granule=flat.itemsize) as mirror, table:
        replica = bytearray(mirror.data)
        before, rows_before = flat.copy(), model[0].weight.detach().clone()
        for _ in range(STEPS):
            words = torch.randint(0, 5000, (16, 8))
            loss = model(words).square().mean()
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            pages += mirror.tracker.peek().page_span_bytes
            delta = mirror.update()
            apply(bytes(delta), replica)
            assert replica == memory[:]
            assert np.asarray(delta.changed(flat)).tolist() == np.flatnonzero(flat != before).tolist()
            rows = np.asarray(table.changed("rows"))
            differ = (model[0].weight.detach().view(torch.uint8) != rows_before.view(torch.uint8)).any(1)
            assert rows.tolist() == differ.nonzero().reshape(-1).tolist()
            before, rows_before = flat.copy(), model[0].weight.detach().clone()
            sent += delta.nbytes
    assert 0 < sent < pages
    if precision == "bfloat16" or optimizer_name == "SparseAdam":  # else nearly all of what is stored is new
        assert sent < pages / 2


def test_a_parameter_that_is_rebound_is_followed() -> None:
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.zeros(300, 7, dtype=torch.bfloat16))
    with array_changes(weight) as changes:
        with torch.no_grad():
            weight[3, 2] = 1
        assert list(changes()) == [23]
        weight.data = weight.data.clone()
        with torch.no_grad():
            weight[4, 0] = 1
        assert list(changes("rows")) == [4]
        with torch.no_grad():
            weight[5, 6] = 1
        mask = np.asarray(changes("mask"))
        assert mask.nonzero()[0].tolist() == [5]
        weight.data = torch.zeros(3, 7, dtype=torch.bfloat16)
        with pytest.raises(InvalidMemory, match="bytes"):
            changes()


def test_tensors_that_cannot_be_watched() -> None:
    torch = pytest.importorskip("torch")
    for tensor, words in [
        (torch.zeros(3, 4).t(), "not contiguous"),
        (torch.zeros(0, 4), "empty"),
        (torch.zeros(3, device="meta"), "on meta"),
    ]:
        with pytest.raises(InvalidMemory, match=words):
            array_changes(tensor)
    scalar = torch.zeros((), dtype=torch.float64)
    changes: ArrayChanges = array_changes(scalar)
    scalar += 1
    assert list(changes()) == [0]
    assert np.asarray(changes("mask")).shape in ((), (1,))
    changes.close()

# SPDX-License-Identifier: MIT
"""Ranks that talk by a process group of PyTorch, on gloo: processes, started here. `make test-torch` runs it."""

from __future__ import annotations

import multiprocessing
import os
import signal
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from dirtytrack.checkpoint import coordinated, generations, restore, restore_share, verify
from dirtytrack.errors import InvalidCheckpoint, RankLost

pytestmark = [pytest.mark.torch, pytest.mark.timeout(300)]  # each process imports PyTorch

SIZE = 2


def rank_of(rank: int, size: int, meeting: str, work: Any, where: str, answers: Any) -> None:
    dist: Any = import_module("torch.distributed")
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    try:
        answers.put((rank, work(dist, where)))
    except BaseException as error:
        answers.put((rank, error))
    finally:
        dist.destroy_process_group()


def processes(size: int, work: Any, where: Path, meeting: Path) -> dict[int, Any]:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    meeting.unlink(missing_ok=True)
    started = [
        context.Process(target=rank_of, args=(rank, size, str(meeting), work, str(where), answers))
        for rank in range(size)
    ]
    for each in started:
        each.start()
    found = dict(answers.get(timeout=90) for each in started)
    for each in started:
        each.join(30)
    return found


def train(dist: Any, where: str) -> tuple[int, list[float]]:
    """Weights that all have, and moments of the optimiser that are divided among the ranks."""
    torch: Any = import_module("torch")
    rank, size = dist.get_rank(), dist.get_world_size()
    weights, moments = torch.zeros(3000), torch.zeros(60 // size, 400, dtype=torch.bfloat16)
    with coordinated(
        dist.group.WORLD,
        where,
        {"weights": weights, "moments": moments},
        partition={"moments": 0},
        replicated={"weights"},
        resume=True,
    ) as ckpt:
        first = 0 if ckpt.resumed is None else ckpt.resumed.meta["step"] + 1
        for step in range(first, first + 4):
            moments += 1
            gradient = torch.full((3000,), float(rank + 1))
            dist.all_reduce(gradient)  # the program's own talking, beside that of its saves
            weights += gradient / size
            save = ckpt.save({"step": step})
        assert save.wait(30)
    assert (weights == weights[0]).all()
    return first, [float(weights[0]), float(moments.float().mean())]


def test_a_process_group_serves_as_well(where: Path, tmp_path: Path) -> None:
    meeting = tmp_path / "meeting"
    assert processes(2, train, where, meeting) == {0: (0, [6.0, 4.0]), 1: (0, [6.0, 4.0])}
    state = restore(where)
    assert state["moments"].shape == (60, 400)
    assert (state["moments"] == 4).all()
    assert (state["weights"] == 6).all()
    assert processes(3, train, where, meeting)[2] == (4, [14.0, 8.0])
    assert [each.generation for each in generations(where)] == list(range(1, 9))
    assert verify(where, all=True).ok
    assert processes(2, share, where, meeting) == {0: [30, 8.0], 1: [30, 8.0]}


def share(dist: Any, where: str) -> list[float]:
    state = restore_share(dist.group.WORLD, where)
    return [len(state["moments"]), float(state["moments"].float().mean())]


def lose(dist: Any, where: str) -> str:
    torch: Any = import_module("torch")
    data = torch.zeros(5000)
    with coordinated(dist.group.WORLD, where, {"data": data}, partition={"data": 0}) as ckpt:
        assert ckpt.save(1).wait(30)
        if dist.get_rank():
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            ckpt.save(2).wait(60)
        except RankLost as error:
            return str(error)
    return "nothing was noticed"


def test_a_rank_that_is_gone_is_noticed(where: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    started = [
        context.Process(target=rank_of, args=(rank, 2, str(tmp_path / "meeting"), lose, str(where), answers))
        for rank in range(2)
    ]
    for each in started:
        each.start()
    rank, told = answers.get(timeout=90)
    assert rank == 0
    assert "could not be reached" in told
    for each in started:
        each.join(30)
        each.kill()
    assert restore(where).meta == 1


def no_member(dist: Any, where: str) -> str:
    group = dist.new_group([0])
    if dist.get_rank():
        with pytest.raises(InvalidCheckpoint):
            coordinated(group, where, {"x": bytearray(8192)})
        return "no member"
    with coordinated(group, where, {"x": bytearray(8192)}) as ckpt:
        assert ckpt.save().wait(30)
        return f"{ckpt.rank} of {ckpt.size}"


def test_a_group_of_some(where: Path, tmp_path: Path) -> None:
    assert processes(2, no_member, where, tmp_path / "meeting") == {0: "0 of 1", 1: "no member"}

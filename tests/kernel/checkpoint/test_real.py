# SPDX-License-Identifier: MIT
"""Programs as they are: a simulation and a training that are killed and go on, and a database that never stops."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dirtytrack import allocate
from dirtytrack.checkpoint import Checkpointer, Retention, generations, restore, verify
from tests.databases import Sqlite
from tests.saving import bytes_of

KILLS = 5


# ---- what is killed, and goes on


class Simulation:
    """Heat that spreads on a grid, and particles that carry it about and leave it elsewhere."""

    STEPS, WIDTH, PARTICLES = 120, 512, 2000

    def __init__(self) -> None:
        self.random = np.random.default_rng(1)
        self.heat = np.zeros((400, self.WIDTH), np.float32)
        self.where = self.random.uniform(0, 20, (self.PARTICLES, 2))  # in a corner: most of the grid is cold
        self.speed = self.random.normal(0, 0.3, (self.PARTICLES, 2))
        self.buffers: dict[str, Any] = {"heat": self.heat, "where": self.where, "speed": self.speed}

    def step(self, number: int) -> None:
        inner, heat = self.heat[1:61, 1:-1], self.heat
        inner[:] = (heat[:60, 1:-1] + heat[2:62, 1:-1] + heat[1:61, :-2] + heat[1:61, 2:] + inner) / np.float32(5)
        self.speed[number % 7 :: 7] += self.random.normal(0, 0.1, self.speed[number % 7 :: 7].shape)
        self.where += self.speed
        np.clip(self.where, 1, 60, out=self.where)
        np.add.at(self.heat, tuple(self.where.astype(int).T), np.float32(1))

    def meta(self) -> Any:
        return self.random.bit_generator.state

    def go_on(self, meta: Any) -> None:
        self.random.bit_generator.state = meta


class Training:
    """A model of PyTorch with a large embedding, whose optimizer has state as large."""

    STEPS, ROWS = 60, 100_000

    def __init__(self) -> None:
        self.torch: Any = import_module("torch")
        self.torch.set_num_threads(1)  # those of the process that this one was forked from are not here
        self.torch.sparse.check_sparse_tensor_invariants.disable()  # Adagrad makes some, and is warned without this
        self.torch.manual_seed(1)
        table = self.torch.nn.EmbeddingBag(self.ROWS, 16, mode="mean", sparse=True)
        self.model = self.torch.nn.Sequential(table, self.torch.nn.Linear(16, 4))
        self.optimizer = self.torch.optim.Adagrad(self.model.parameters(), lr=0.1)
        state = self.optimizer.state
        self.buffers: dict[str, Any] = dict(self.model.state_dict())
        for name, weights in self.model.named_parameters():
            self.buffers[f"{name}: sum"], self.buffers[f"{name}: step"] = state[weights]["sum"], state[weights]["step"]

    def step(self, number: int) -> None:
        self.torch.manual_seed(number)
        words = (self.torch.rand(16, 8) ** 4 * self.ROWS).long()  # few of them often
        loss = (self.model(words) - 1).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def meta(self) -> Any:
        return None

    def go_on(self, meta: Any) -> None:
        pass


Work = Simulation | Training


def work_on(make: Callable[[], Work], where: Path, report: int) -> None:
    """Runs in a child, from where the last one was killed."""
    work = make()
    with Checkpointer(where, work.buffers, resume=True, retain=Retention(last=3), compression=None) as ckpt:
        first = 0
        if ckpt.resumed is not None:
            first = ckpt.resumed.meta["step"] + 1
            work.go_on(ckpt.resumed.meta["more"])
        os.write(report, f"began {first}\n".encode())
        for number in range(first, work.STEPS):
            work.step(number)
            save = ckpt.save({"step": number, "more": work.meta()})
            assert save.kind == "increment" or number == 0
            if number % 4 == 0 and save.wait():
                os.write(report, f"committed {number}\n".encode())


@contextmanager
def child(run: Callable[[int], None]) -> Iterator[tuple[int, Iterator[list[str]]]]:
    """Its pid, and what it says, line by line."""
    ours, report = os.pipe()
    pid = os.fork()
    if not pid:
        code = 3
        try:
            os.close(ours)
            run(report)
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    os.close(report)
    with os.fdopen(ours) as lines:
        yield pid, (line.split() for line in lines)


def is_killed_and_goes_on(make: Callable[[], Work], where: Path) -> None:
    draw, committed, begins = random.Random(3), -1, list[int]()
    for kills in range(KILLS + 1):
        with child(lambda report: work_on(make, where, report)) as (pid, lines):
            more = draw.randrange(1, make.STEPS // 4 // KILLS)  # type: ignore[attr-defined]
            for word, number in lines:
                if word == "began":
                    begins.append(int(number))
                    assert int(number) > committed
                    continue
                committed, more = int(number), more - 1
                if not more and kills < KILLS:
                    os.kill(pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            assert code == (-signal.SIGKILL if kills < KILLS else 0)
    assert begins == sorted(set(begins))
    assert len(begins) == KILLS + 1
    assert verify(where, all=True).ok

    state, unbroken = restore(where), make()
    for step in range(unbroken.STEPS):
        unbroken.step(step)
    assert state.meta == {"step": unbroken.STEPS - 1, "more": unbroken.meta()}
    for name, buffer in unbroken.buffers.items():
        assert (bytes_of(state[name]) == bytes_of(buffer)).all(), name


def test_a_simulation_that_is_killed_ends_as_one_that_is_not(where: Path) -> None:
    is_killed_and_goes_on(Simulation, where)


@pytest.mark.torch
def test_a_training_that_is_killed_ends_as_one_that_is_not(where: Path) -> None:
    Training()  # what PyTorch imports for it, it imports now, and not in each child
    is_killed_and_goes_on(Training, where)


# ---- a database


class Bank:
    """Accounts between which money moves, in a thread of its own, which stands still only while a save copies."""

    ACCOUNTS, EACH, MOVES = 4000, 1000, 2048

    def __init__(self, memory: Any) -> None:
        self.memory, self.database, self.moved, self.seen = memory, Sqlite(memory), 0, b""
        self._between, self._over = threading.Lock(), threading.Event()
        self._draw, self._thread = random.Random(5), threading.Thread(target=self._work)

    def found(self) -> None:
        run = self.database.run
        run("PRAGMA page_size = 4096; CREATE TABLE accounts (id INTEGER PRIMARY KEY, held INTEGER, got INTEGER);")
        run("CREATE INDEX rich ON accounts (held); CREATE TABLE moves (id INTEGER PRIMARY KEY, note TEXT);")
        run("INSERT INTO accounts VALUES " + ",".join(f"({i}, {self.EACH}, 0)" for i in range(self.ACCOUNTS)))

    def _work(self) -> None:
        while not self._over.is_set():
            source, target = self._draw.sample(range(self.ACCOUNTS), 2)
            amount = self._draw.randrange(100)
            with self._between:
                self.database.run(
                    f"BEGIN; UPDATE accounts SET held = held - {amount}, got = got - {amount} WHERE id = {source};"
                    f"UPDATE accounts SET held = held + {amount}, got = got + {amount} WHERE id = {target};"
                    f"REPLACE INTO moves VALUES ({self.moved % self.MOVES}, 'from {source} to {target}'); COMMIT;"
                )
                self.moved += 1

    @contextmanager
    def quiesced(self) -> Iterator[None]:
        with self._between:
            self.seen = bytes(self.memory)
            yield

    def __enter__(self) -> Bank:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.database.close()


def require_sound(memory: Any) -> None:
    """It can be opened, and no move is in it by half."""
    database = Sqlite(memory)
    assert database.run("PRAGMA integrity_check") == [("ok",)]
    assert database.run("SELECT count(*), sum(held), sum(got) FROM accounts") == [
        (str(Bank.ACCOUNTS), str(Bank.ACCOUNTS * Bank.EACH), "0")
    ]
    assert database.run(f"SELECT count(*) FROM accounts WHERE held != {Bank.EACH} + got") == [("0",)]
    database.close()


@pytest.mark.parametrize("deltas", [False, True], ids=["pages", "deltas"])
def test_each_generation_of_a_database_under_load_is_sound(where: Path, deltas: bool) -> None:
    first, second = allocate(2 << 20, name="database"), allocate(2 << 20, name="database")
    truth: dict[int, bytes] = {}

    def save_some(bank: Bank, ckpt: Checkpointer) -> None:
        for _ in range(12):
            before = bank.moved
            while bank.moved < before + 4:
                time.sleep(0.0005)
            save = ckpt.save()
            assert save.generation is not None
            truth[save.generation] = bank.seen
            assert save.kind == "increment" or save.generation == 1

    bank = Bank(first)
    bank.found()
    with bank, Checkpointer(where, {"database": first}, quiesce=bank.quiesced, deltas=deltas) as ckpt:
        save_some(bank, ckpt)
    opened: list[Bank] = []

    def quiesced() -> AbstractContextManager[None]:
        return opened[0].quiesced()

    with Checkpointer(where, {"database": second}, resume=True, quiesce=quiesced, deltas=deltas) as ckpt:
        opened.append(Bank(second))  # it is there only now
        with opened[0] as bank:
            save_some(bank, ckpt)

    assert [each.generation for each in generations(where)] == sorted(truth)
    for generation, seen in truth.items():
        found = restore(where, generation=generation)["database"]
        assert bytes(found) == seen, generation
        require_sound(found)

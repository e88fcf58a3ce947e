# SPDX-License-Identifier: MIT
"""A program that saves is killed, at random and between any two operations on files; then another one goes on.

What was reported committed is there, and as it was; nothing is there that is not whole; and the next run cleans up.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from dirtytrack import allocate
from dirtytrack.checkpoint import Checkpointer, DirectoryStore, Retention, restore, tending, verify, writing
from dirtytrack.checkpoint.files import Files
from dirtytrack.errors import InvalidCheckpoint, NoSuchGeneration
from tests.saving import PAGE, bytes_of, scribble
from tests.storing import Dying

KEEP = 2
MOST_WORDS = 6  # of a program, before it is killed
IMPORTED = (writing, zstandard)  # when they are needed, which is in each child: once, here, instead


def digest_of(buffers: Mapping[str, Any]) -> str:
    found = hashlib.sha1(usedforsecurity=False)
    for name in sorted(buffers):
        found.update(name.encode() + b"\0")
        found.update(bytes_of(buffers[name]).data)
    return found.hexdigest()


def new_buffer(pages: int) -> Any:
    return np.frombuffer(allocate(pages * PAGE), np.uint8)


class Program:
    """Runs in a child. Says what it is about to save, what it saves, and what is committed."""

    def __init__(self, where: Path, report: int, seed: int, files: Files | None) -> None:
        tending._SPARE_NBYTES = 16 << 10  # so that such small stores are compacted
        self.draw, self.report = random.Random(seed), report
        self.store = DirectoryStore(where, create=True, files=files)
        try:
            regions = self.store.manifest().regions
        except NoSuchGeneration:
            self.buffers = {"grid": new_buffer(40), "table": new_buffer(9)}
        else:
            self.buffers = {region.name: new_buffer(region.nbytes // PAGE) for region in regions}
        self.options: dict[str, Any] = {
            "compression": self.draw.choice([None, "zstd"]),
            "deltas": self.draw.random() < 0.3,
            "when_busy": self.draw.choice(["wait", "coalesce"]),
            "staging_bytes": self.draw.choice([1 << 16, 1 << 20]),
            "retain": Retention(last=KEEP),
            "compact": self.draw.choice([0.5, 2]),
            "threads": self.draw.choice([1, 2]),
        }

    def say(self, *words: object) -> None:
        os.write(self.report, (" ".join(map(str, words)) + "\n").encode())

    def run(self, steps: int) -> None:
        ckpt = Checkpointer(self.store, self.buffers, resume=True, **self.options)
        if ckpt.resumed is not None:
            self.say("resumed", ckpt.resumed.generation, digest_of(self.buffers))
        for _ in range(steps):
            self.step(ckpt)
        ckpt.close()

    def step(self, ckpt: Checkpointer) -> None:
        draw = self.draw
        for buffer in self.buffers.values():
            scribble(buffer, draw, 0.2)
        if draw.random() < 0.1:
            self.buffers["table"] = new_buffer(draw.randrange(1, 20))
            scribble(self.buffers["table"], draw, 0.5)
            ckpt.replace("table", self.buffers["table"])
        self.say("next", digest_of(self.buffers))
        save = ckpt.save(full=draw.random() < 0.05)
        self.say("saving", save.generation)
        if draw.random() < 0.7:
            save.wait()
            self.say("committed", save.generation)


def run_child(where: Path, seed: int, *, steps: int, files: Files | None = None) -> tuple[int, int]:
    """Its pid, and where to read what it says."""
    ours, report = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(ours)
        code = 3
        try:
            Program(where, report, seed, files).run(steps)
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    os.close(report)
    return pid, ours


class Truth:
    """What was said of a store by all programs so far."""

    def __init__(self, where: Path) -> None:
        self.where, self.digests, self.committed = where, dict[int, str](), 0
        self.draw = random.Random(1)

    def hear(self, report: int, before: bytes = b"") -> bool:
        """What a program said that is no more, and what was read of that. Whether it said anything."""
        with os.fdopen(report, "rb") as pipe:
            lines = (before + pipe.read()).decode().split("\n")[:-1]
        pending: str | None = None
        for line in lines:
            match line.split():
                case ["next", digest]:
                    pending = digest
                case ["saving", generation]:
                    assert pending is not None
                    self.digests[int(generation)], pending = pending, None
                case ["committed", generation]:
                    self.committed = max(self.committed, int(generation))
                case ["resumed", generation, digest]:
                    assert self.digests[int(generation)] == digest
                case _:
                    pytest.fail(line)
        self.pending = pending
        return bool(lines)

    def check(self) -> None:
        try:
            store = DirectoryStore(self.where)
        except InvalidCheckpoint:  # killed before there was a store
            assert not self.committed
            return
        with store:
            generations = {kept.generation for kept in store.catalog()}
            newest = max(generations, default=0)
            assert newest >= self.committed
            if newest and newest not in self.digests:  # killed before it could say which it is
                assert self.pending is not None
                self.digests[newest] = self.pending
            # The number of one that did not come to be is taken again by the next program.
            self.digests = {generation: self.digests[generation] for generation in generations}
            for generation in generations:
                state = restore(store, generation=generation, threads=1)
                assert digest_of(state) == self.digests[generation], generation
            if self.draw.random() < 0.1:
                report = verify(store, all=True)
                assert report.ok, report

    def check_clean(self) -> None:
        """After a run that ended well."""
        with DirectoryStore(self.where) as store:
            report = verify(store, all=True)
            assert report.ok
            assert not report.strangers
            assert len({kept.generation for kept in store.catalog()}) <= KEEP + 1


def end_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at_random(where: Path, times: int) -> None:
    truth, draw, worked = Truth(where), random.Random(times), 0
    for number in range(times):
        pid, report = run_child(where, number, steps=100000)
        said = b""
        if draw.random() < 0.8:  # else while it begins
            words = draw.randrange(1, MOST_WORDS)  # however long it takes for them: other programs run here too
            while said.count(b"\n") < words and (more := os.read(report, 1 << 16)):
                said += more
        time.sleep(draw.random() * 0.004)
        os.kill(pid, signal.SIGKILL)
        assert end_of(pid) == -signal.SIGKILL
        worked += truth.hear(report, said)
        truth.check()
        if number % 50 == 49:
            pid, report = run_child(where, -number, steps=5)
            assert end_of(pid) == 0
            truth.hear(report)
            truth.check()
            truth.check_clean()
    assert worked > times // 2
    assert truth.committed > times // 4


def test_killed_at_random(where: Path) -> None:
    killed_at_random(where, 200)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_killed_at_random_for_long(where: Path) -> None:
    killed_at_random(where, 1000)


class DyingInWrites(Dying):
    """Of the operations, only those count after which something is different."""

    def operate(self, name: str, call: Any, *args: Any, **options: Any) -> Any:
        if name in ("close", "lock", "unlock", "open_directory", "open_lock"):
            return call(*args, **options)
        return super().operate(name, call, *args, **options)


@pytest.mark.parametrize("seed", [2, 3])
def test_killed_between_any_two_operations(where: Path, seed: int) -> None:
    """Of a first run, and of those that go on, compact and prune."""
    truth, kills = Truth(where), 0
    while True:
        pid, report = run_child(where, seed, steps=3, files=DyingInWrites(kills + 1))
        code = end_of(pid)
        truth.hear(report)
        truth.check()
        if not code:
            break
        assert code == -signal.SIGKILL
        kills += 1
    truth.check_clean()
    assert kills > 25

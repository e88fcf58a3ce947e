# SPDX-License-Identifier: MIT
"""The policy over recordings of real writers, as `dirtytrack record` makes them: at any speed, from any moment on."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import dirtytrack
from dirtytrack.migration import Goal
from dirtytrack.observe import Recorder, Recording
from tests.unit.migration.test_policy import Curve, Run

PAGES = 4096


def record(path: Path, hot: int, stores: int) -> Recording:
    """A program that writes a hot part most of the time, sleeps a little, and now and then goes over everything."""
    memory = dirtytrack.allocate(PAGES * 4096, name="table")
    chance, stop = random.Random(3), threading.Event()

    def write() -> None:
        rounds = 0
        while not stop.is_set():
            rounds += 1
            for _ in range(stores):
                memory[chance.randrange(hot) * 4096] = rounds % 256
            if rounds % 40 == 0:
                for page in range(0, PAGES, 3):
                    memory[page * 4096] = rounds % 256
            time.sleep(0.002)

    writer = threading.Thread(target=write)
    with dirtytrack.track(memory, exact=True) as tracker, Recorder(tracker, path, every=0.01, command="a test"):
        writer.start()
        time.sleep(0.6)
        stop.set()
        writer.join()
    return Recording.open(path)


def replayed(recording: Recording) -> Curve:
    """What was dirty after any stretch of it, in bytes; it begins anew when it is over."""
    epochs = list(recording)
    length = epochs[-1].ended
    written = [
        {page for low, high in np.asarray(epoch.runs).tolist() for page in range(low // 4096, high // 4096)}
        for epoch in epochs
    ]

    def curve(begin: float, end: float) -> float:
        first, last, found = begin % length, begin % length + min(end - begin, length), set[int]()
        for shift in (0.0, length):
            for epoch, pages in zip(epochs, written, strict=True):
                if epoch.begun + shift < last and epoch.ended + shift > first:
                    found |= pages
        return len(found) * 4096.0

    return curve


@pytest.mark.parametrize(("hot", "stores"), [(16, 10), (600, 200), (4000, 400)])
def test_migrations_of_what_was_recorded(tmp_path: Path, hot: int, stores: int) -> None:
    curve = replayed(record(tmp_path / "r", hot, stores))
    chance = random.Random(5)
    for how in ("proceed", "abort", "slow"):
        for _ in range(12):
            begun = chance.uniform(0, 0.5)
            goal = Goal(max_downtime=10 ** chance.uniform(-2.5, -0.5), on_divergence=how)
            speed = 10 ** chance.uniform(7, 9.5)

            def later(begin: float, end: float, begun: float = begun) -> float:
                return curve(begin + begun, end + begun)

            run = Run(goal, later, memory=PAGES * 4096, speed=speed)
            assert run.end.action in ("stop", "abort")
            assert run.rounds < 100
            if run.end.action == "stop":
                assert run.downtime <= run.end.predicted_downtime * 1.25 + 0.005
                assert run.end.predicted_downtime <= goal.max_downtime or how == "proceed"
            # Of all that was seen the moment was a good one, or it was said that waiting had not helped.
            if how == "proceed" and run.end.predicted_downtime > goal.max_downtime:
                assert run.remaining[-1] <= 2 * min(run.remaining) or "would not help" in run.end.reason

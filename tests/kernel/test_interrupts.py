# SPDX-License-Identifier: MIT
"""A signal handler that raises, anywhere inside the library, loses no page: what was not handed out comes again."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import FrameType

import dirtytrack
from dirtytrack import DirtySet, DirtyTracker, UffdSession

PAGE = 4096
SECONDS = 3
PACKAGE = str(Path(dirtytrack.__file__).parent)


class Interrupted(Exception):
    pass


def test_an_interrupt_anywhere_loses_nothing() -> None:
    random = Random(1)
    memories = {"low": dirtytrack.allocate(512 * PAGE), "high": dirtytrack.allocate(64 * PAGE)}
    mirrors = {name: bytearray(memory) for name, memory in memories.items()}
    with UffdSession() as session:
        regions = [session.register(memory, name=name) for name, memory in memories.items()]
        tracker = DirtyTracker(session, regions)
        tracker.start()
        ways: list[Callable[[], DirtySet]] = [
            tracker.collect,
            lambda: tracker.collect("low"),
            lambda: tracker.collect_into(mirrors),
            lambda: tracker.remove("high"),
            tracker.stop,
        ]
        armed, interrupts = False, 0

        def interrupt(number: int, frame: FrameType | None) -> None:
            # Only inside the library: what is interrupted on its way from the call into a variable is the caller's.
            nonlocal interrupts
            if armed and frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
                interrupts += 1
                raise Interrupted

        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.00037)
        try:
            end = time.monotonic() + SECONDS
            while time.monotonic() < end or (interrupts <= 50 and time.monotonic() < end + 20):
                for memory in random.choices(list(memories.values()), k=20):
                    memory[random.randrange(memory.nbytes)] = random.randrange(256)
                found = DirtySet()
                try:
                    armed = True
                    found = random.choice(ways)()
                    armed = False
                except Interrupted:
                    armed = False
                found.copy_to(mirrors)
                if not tracker.epoch:
                    tracker.start()
                if regions[1] not in tracker.regions:
                    tracker.add(regions[1])
                if random.random() < 0.05:
                    tracker.collect_into(mirrors)
                    assert all(mirrors[name] == memory[:] for name, memory in memories.items())
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert interrupts > 50

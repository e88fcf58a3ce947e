# SPDX-License-Identifier: MIT
"""A program that the tests of the commands move: it counts in its memory, and says where it got to."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import dirtytrack
from dirtytrack.migration import Arrival, Source

PAGES = 256


class Counter:
    """Counts up in one page after the other."""

    def __init__(self, memory: Any, count: int = 0) -> None:
        self.memory, self.count = memory, count
        self._go, self._idle = threading.Event(), threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            if not self._go.is_set():
                self._idle.set()
                self._go.wait()
            at = self.count % PAGES * 4096
            self.count += 1
            self.memory[at : at + 8] = struct.pack("<Q", self.count)
            time.sleep(0.0001)

    def pause(self) -> None:
        self._go.clear()
        self._idle.wait()

    def resume(self) -> None:
        self._idle.clear()
        self._go.set()

    def right(self) -> bool:
        last = [struct.unpack("<Q", self.memory[page * 4096 : page * 4096 + 8])[0] for page in range(PAGES)]
        return max(last) == self.count and sorted(last) == list(range(self.count - PAGES + 1, self.count + 1))


def source(**options: Any) -> tuple[Source, Callable[[], object]]:
    counter = Counter(dirtytrack.allocate(PAGES * 4096, name="counts"))
    counter.resume()
    while counter.count < 2 * PAGES:
        time.sleep(0.01)
    moving = Source(
        {"counts": counter.memory},
        pause=counter.pause,
        resume=counter.resume,
        state=lambda: struct.pack("<Q", counter.count),
        **options,
    )
    return moving, lambda: print("it runs on here", flush=True)


def prepare(arrival: Arrival) -> Callable[[], int]:
    counter = Counter(arrival.memory["counts"], struct.unpack("<Q", arrival.state)[0])
    assert counter.right()

    def run() -> int:
        first = counter.count
        counter.resume()
        time.sleep(0.05)
        counter.pause()
        print(
            f"counted on from {first}: {'right' if counter.right() and counter.count > first else 'WRONG'}", flush=True
        )
        return 0 if counter.right() else 9

    return run


def nothing(**options: Any) -> str:
    return "no source"

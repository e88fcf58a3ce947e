# SPDX-License-Identifier: MIT
"""Ranks under test: threads of one process that talk by queues, and what each of them came to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Empty, Queue
from typing import Any, TypeVar

__all__ = ["Cut", "ThreadRank", "outcomes", "ranks"]

_T = TypeVar("_T")
_PATIENCE_SECONDS = 30


class Cut(Exception):
    """The wire was cut."""


class _Wires:
    def __init__(self, size: int) -> None:
        self.size, self.cut = size, threading.Event()
        self.up = [Queue[bytes]() for _ in range(size)]
        self.down = [Queue[bytes]() for _ in range(size)]

    def take(self, queue: Queue[bytes]) -> bytes:
        for _ in range(_PATIENCE_SECONDS * 20):
            if self.cut.is_set():
                raise Cut("the wire was cut")
            try:
                return queue.get(timeout=0.05)
            except Empty:
                continue
        raise AssertionError("a rank waits for another that never comes")


class ThreadRank:
    """What a rank in a thread talks by."""

    background = True

    def __init__(self, wires: _Wires, rank: int) -> None:
        self._wires, self.rank, self.size = wires, rank, wires.size
        self.said = 0
        self.cut_after: int | None = None
        """How often it still speaks before the wire is cut."""

    def _speak(self) -> None:
        self.said += 1
        if self.cut_after is not None and self.said > self.cut_after:
            self._wires.cut.set()
            raise Cut("the wire was cut")

    def gather(self, data: bytes) -> list[bytes] | None:
        self._speak()
        self._wires.up[self.rank].put(data)
        return None if self.rank else [self._wires.take(queue) for queue in self._wires.up]

    def broadcast(self, data: bytes) -> bytes:
        if not self.rank:
            self._speak()
            for queue in self._wires.down:
                queue.put(data)
        return self._wires.take(self._wires.down[self.rank])

    def close(self) -> None:
        pass


def outcomes(size: int, work: Callable[[ThreadRank], _T]) -> list[_T | BaseException]:
    """What each rank's work returned, or raised."""
    wires = _Wires(size)
    found: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            found[rank] = work(ThreadRank(wires, rank))
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * _PATIENCE_SECONDS)
        assert not thread.is_alive(), "a rank hangs"
    return found


def ranks(size: int, work: Callable[[ThreadRank], _T]) -> list[_T]:
    """What each rank's work returned."""
    found = outcomes(size, work)
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return found  # type: ignore[return-value]

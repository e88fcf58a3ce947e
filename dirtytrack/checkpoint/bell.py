# SPDX-License-Identifier: MIT
"""A lock, and waiting for what is guarded by it."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Bell"]

_LOOK_SECONDS = 0.5


class Bell:
    """What threading.Condition is, for threads that are interrupted.

    A Condition takes and gives back its lock in functions of Python, at whose beginning Python looks for signals: a
    Ctrl-C there leaves it locked for ever. Here the lock is taken by a ``with`` of the lock itself, which is one step,
    and nothing is owed while one waits. A call to `ring` that was interrupted is made up for within half a second.
    """

    def __init__(self) -> None:
        self.mutex = threading.Lock()
        self._waiting: list[threading.Lock] = []

    def ring(self) -> None:
        """Something has changed: whoever waits looks again. The caller has the lock."""
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            each.release()

    def wait_for(self, predicate: Callable[[], object], timeout: float | None = None) -> bool:
        """Wait, without the lock, until it is so.

        Args:
            predicate: asked under the lock.
            timeout: seconds.

        Returns:
            False where the time ran out.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            mine = threading.Lock()
            mine.acquire()
            with self.mutex:
                if predicate():
                    return True
                self._waiting.append(mine)
            rest = _LOOK_SECONDS if end is None else min(_LOOK_SECONDS, end - time.monotonic())
            if rest <= 0:
                return False
            mine.acquire(timeout=rest)

# SPDX-License-Identifier: MIT
"""Threads that work on frames, whose results come in order."""

from __future__ import annotations

import os
import threading
import traceback
from collections import deque
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from typing_extensions import Self

__all__ = ["Crew", "Worker", "default_threads", "let_go"]

_T = TypeVar("_T")
_R = TypeVar("_R")


def default_threads() -> int:
    """How many threads work on a save where nobody says: half of the processors that there are for this process, up to
    four. The program goes on beside them."""
    return max(1, min(4, len(os.sched_getaffinity(0)) // 2))


def let_go(error: BaseException | None) -> None:
    """Have the frames of an error's traceback hold nothing: who keeps the error does not keep buffers pinned.

    Before Python 3.12.2 and 3.11.8 the collector may even crash over them, where it finds a pinned memoryview in a
    cycle (CPython's gh-77894); and whoever catches an error easily makes one of it and his own frame.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


class _Task(Generic[_T, _R]):
    __slots__ = ("_done", "_error", "_item", "_result", "_work")

    def __init__(self, work: Callable[[_T], _R], item: _T) -> None:
        self._work, self._item, self._done = work, item, threading.Lock()
        self._error: BaseException | None = None
        self._done.acquire()

    def do(self) -> None:
        try:
            self._result = self._work(self._item)
        except BaseException as error:
            let_go(error)
            self._error = error
        del self._item, self._work  # which an error, whose frames hold this, would keep
        self._done.release()

    def result(self) -> _R:
        self._done.acquire()
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error, self  # the same
        return self._result


class Worker(threading.Thread):
    """A thread of ours: who is waited for, and so may not wait. The collector may run anybody's finalisers in it."""


class Crew:
    """Threads, begun when there is work for them. A context manager: at its end there are none.

    Not concurrent.futures, which takes no work once the interpreter ends: the last saves are to be finished then.

    Args:
        threads: how many; 1 is the caller's own.

    Thread safety: one thread at a time.
    """

    def __init__(self, threads: int) -> None:
        self._count, self._threads = threads, list[threading.Thread]()
        self._tasks: SimpleQueue[_Task[Any, Any] | None] = SimpleQueue()

    def map(self, work: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[_R]:
        """The results of the work for each item, in order. Few more than were asked for are begun."""
        if self._count < 2:
            yield from map(work, items)
            return
        begun: deque[_Task[_T, _R]] = deque()
        try:
            for item in items:
                if len(self._threads) < min(self._count, len(begun) + 1):
                    self._begin()
                task = _Task(work, item)
                begun.append(task)
                self._tasks.put(task)
                if len(begun) > 2 * self._count:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for task in begun:  # what they work on is the caller's again after this
                task._done.acquire()

    def _begin(self) -> None:
        thread = Worker(target=self._work, name="dirtytrack-frames", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task.do()
            del task

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for _thread in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

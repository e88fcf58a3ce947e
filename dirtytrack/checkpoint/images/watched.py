# SPDX-License-Identifier: MIT
"""A process whose memory is saved: its tracker, and all else that looks at it."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

from ...kernel import targets
from ...kernel.targets import Row
from ...process import attach
from ...process.mappings import Filter
from .mapped import Marks, rows_of
from .populated import Populated
from .space import joined, pages_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ...dirtyset import DirtySet
    from ...process.mappings import Pattern

__all__ = ["Watched"]


class Watched:
    """Attaches to a process, and lets go of it with `close`.

    Args:
        pid: which.
        exclude: mappings that are not saved.
        timeout, seccomp: see `dirtytrack.process.attach`.

    Raises:
        As `attach` does.

    Thread safety: one thread at a time.
    """

    def __init__(
        self, pid: int, exclude: Pattern | Iterable[Pattern] | None, *, timeout: float, seccomp: str | None
    ) -> None:
        if exclude is not None and not isinstance(exclude, (str, tuple)):
            exclude = list(exclude)
        self.pid, self.chosen = pid, Filter(None, exclude)
        self._text, self._rows = b"", list[Row]()
        self._tracked: tuple[int, DirtySet] | None = None
        with ExitStack() as opened:
            self.tracker = opened.enter_context(attach(pid, exclude=exclude, timeout=timeout, seccomp=seccomp))
            self.memory = self._open("mem")
            opened.callback(os.close, self.memory)
            self._maps = self._open("maps")
            opened.callback(os.close, self._maps)
            self.populated = Populated(pid)
            opened.callback(self.populated.close)
            self.marks = Marks(pid)
            self.tracker.refresh()  # what was opened is of the very process that is tracked
            self._opened = opened.pop_all()

    def _open(self, name: str) -> int:
        try:
            return targets.open_in_proc(self.pid, name)
        except OSError:
            self.tracker.refresh()  # says that it has gone
            raise

    @property
    def epoch(self) -> int:
        """Of its tracker."""
        return self.tracker.epoch

    def collect(self) -> DirtySet:
        """As `ProcessTracker.collect`."""
        return self.tracker.collect()

    def tracked(self) -> DirtySet:
        """What is tracked as of the last collect, which has all writes to it."""
        refreshes = self.tracker.statistics().refreshes
        if self._tracked is None or self._tracked[0] != refreshes:
            self._tracked = refreshes, pages_of(joined(self.tracker.tracked))
        return self._tracked[1]

    def rows(self) -> list[Row]:
        """All mappings, as they are now."""
        os.lseek(self._maps, 0, os.SEEK_SET)
        parts = []
        while part := os.read(self._maps, 1 << 20):
            parts.append(part)
        text = b"".join(parts)
        if text != self._text:  # mostly it is what it was a moment ago
            self._text, self._rows = text, rows_of(text)
        return self._rows

    def require_there(self) -> None:
        """Raise `TargetGone` where it has ended or replaced itself."""
        self.tracker.refresh()

    def close(self) -> None:
        """Let go of it; again does nothing."""
        self._opened.close()

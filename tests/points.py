# SPDX-License-Identifier: MIT
"""Every point at which Python may run a signal handler, or another thread, inside a call: visited one after the other.

CPython looks for signals where a function begins, where a call of a C function has returned, and where a loop goes
back. A trace function stops there, and does what the test wants to happen just there. What a storm of signals hits by
luck is hit by number.
"""

from __future__ import annotations

import dis
import sys
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from dirtytrack import DirtySet, DirtyTracker
from dirtytrack.kernel import engine
from dirtytrack.layout import Layout
from dirtytrack.process import ProcessTracker

_HERE = str(Path(__file__).resolve().parent)
_BEGINNING = -1


@cache
def _looks_for_signals(code: CodeType) -> frozenset[int]:
    """Offsets of the instructions after which it does."""
    names = ("CALL", "JUMP_BACKWARD", "JUMP_ABSOLUTE")
    return frozenset(one.offset for one in dis.get_instructions(code) if one.opname.startswith(names))


class Points:
    """Makes a call, and does something at its nth point.

    Args:
        nth: from 1.
        act: what is done; it may raise.
    """

    def __init__(self, nth: int, act: Callable[[], object]) -> None:
        self._nth, self._act = nth, act
        self._last: dict[FrameType, int] = {}
        self.seen = 0
        self.where = ""
        """File and line of the nth point; empty where the call has not so many."""

    def call(self, function: Callable[[], object]) -> object:
        """Call it in this thread; what it returns or raises."""
        before = sys.gettrace()
        sys.settrace(self._on_event)
        try:
            return function()
        finally:
            sys.settrace(before)
            self._last.clear()

    def _on_event(self, frame: FrameType, event: str, _: object) -> Any:
        if self.where or frame.f_code.co_filename.startswith(_HERE):
            return None
        if event == "call":
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            self._last[frame] = _BEGINNING
            self._at(frame)
        elif event == "opcode":
            last, self._last[frame] = self._last.get(frame, _BEGINNING), frame.f_lasti
            if last in _looks_for_signals(frame.f_code):
                self._at(frame)
        elif event == "return":
            del self._last[frame]
            if frame.f_back in self._last:  # after a function in Python, unlike one in C, it does not
                self._last[frame.f_back] = _BEGINNING
        return self._on_event

    def _at(self, frame: FrameType) -> None:
        self.seen += 1
        if self.seen == self._nth:
            self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            sys.settrace(None)
            self._act()


COLLECT = compile("tracker.collect()", "its caller", "eval")
"""A collect is C's: the points are its caller's, before it and as it returns."""


def collect_as_its_caller(tracker: DirtyTracker | ProcessTracker) -> object:
    """A collect whose caller `Points` sees."""
    return eval(COLLECT, {"tracker": tracker})


def moved_meanwhile(tracker: DirtyTracker) -> Any:
    """What collects for a tracker, and finds another layout when it is through."""
    known = weakref.ref(tracker)  # a class lives until the cyclic collector comes

    class Moving(DirtySet):
        __slots__ = ()

        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, value)
            its = known()
            if name == "_layout" and its is not None and its._layout is value:
                its._layout = Layout(its._layout.spans)

    collecting = engine.collecting(tracker._handle, Moving)
    collecting.layout = tracker._layout
    return collecting

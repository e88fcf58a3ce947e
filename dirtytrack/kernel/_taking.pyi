# SPDX-License-Identifier: MIT
"""What taking.c has: a collect, and its set, as objects of CPython itself."""

from collections.abc import Callable
from typing import Any

class Taken:
    """A dt_set, which is cleared with it."""

    delivered: int
    @property
    def address(self) -> int: ...

class Failed(Exception):
    """Its argument is a Taken that has nothing but the dt_failure."""

    args: tuple[Taken]

class Collecting:
    """Collects for a listener, whose handle the caller keeps; with a layout that its sets get.

    Args:
        listener: its address.
        made: the type of the sets.
    """

    layout: Any
    def __new__(cls, listener: int, made: type[Any], /) -> Collecting: ...
    def collect(self) -> Any: ...

def quick_collect(type_: type[Any], method: Callable[..., Any], words: str, /) -> Callable[..., Any]: ...
def guard(
    pid: int,
    pidfd: int,
    channel: int,
    freeze: int,
    timeout_ms: int,
    suspend_seccomp: int,
    fault_step: int,
    fault_tracker: int,
    /,
) -> int: ...

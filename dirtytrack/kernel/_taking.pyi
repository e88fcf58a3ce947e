# SPDX-License-Identifier: MIT
"""What taking.c has: the set of one collect as an object of CPython itself."""

from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")

class Taken:
    """A dt_set, which is cleared with it."""

    delivered: int
    @property
    def address(self) -> int: ...

class Failed(Exception):
    """Its argument is a Taken that has nothing but the dt_failure."""

    args: tuple[Taken]

def new(type_: type[_T], /) -> _T: ...
def taker(address: int, /) -> Callable[[Taken], Taken]: ...
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

# SPDX-License-Identifier: MIT
"""What can go wrong in a heap, by name.

::

    HeapException               never raised itself
    ├── BuildFailed             RuntimeError    the C files could not be compiled
    ├── HeapBusy                RuntimeError    a collection from within one, or from within running()
    ├── HeapClosed              RuntimeError
    ├── HeapCorrupt             RuntimeError    a reference leads to no object: something was missed
    ├── HeapExhausted           MemoryError     nothing is left after a full collection
    ├── WrongKind               TypeError       no such thing can be done to, or kept in, such an object
    └── LispFailed              RuntimeError    the program did something that it may not
"""

from __future__ import annotations

__all__ = [
    "BuildFailed",
    "HeapBusy",
    "HeapClosed",
    "HeapCorrupt",
    "HeapException",
    "HeapExhausted",
    "LispFailed",
    "WrongKind",
]


class HeapException(Exception):
    """Whatever is said here."""


class BuildFailed(HeapException, RuntimeError):
    """The heap's C files could not be compiled."""


class HeapBusy(HeapException, RuntimeError):
    """The heap was used, or a collection asked for, where the calling thread itself keeps the heap from going on."""


class HeapClosed(HeapException, RuntimeError):
    """The heap was closed."""


class HeapCorrupt(HeapException, RuntimeError):
    """A reference leads to no object. Attributes: holder, slot and value, addresses as they were at that time."""

    def __init__(self, what: str, *, holder: int = 0, slot: int = 0, value: int = 0) -> None:
        super().__init__(what)
        self.holder, self.slot, self.value = holder, slot, value


class HeapExhausted(HeapException, MemoryError):
    """The heap is as large as it may become, and full of objects that are reachable."""


class WrongKind(HeapException, TypeError):
    """Such an object cannot do, or hold, this."""


class LispFailed(HeapException, RuntimeError):
    """A program is wrong, or did what it may not."""

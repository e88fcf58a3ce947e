# SPDX-License-Identifier: MIT
"""A generational, mostly-concurrent heap whose write barrier is the page tables; and a Lisp that lives in it.

    from examples.heap import Heap

    with Heap() as heap:
        pair = heap.tuple(1, heap.string("two"))
        heap.full()

See docs/gc-heap.md.
"""

from .collector import Pause
from .errors import (
    BuildFailed,
    HeapBusy,
    HeapClosed,
    HeapCorrupt,
    HeapException,
    HeapExhausted,
    LispFailed,
    WrongKind,
)
from .heap import Heap, Numbers, Object
from .references import Ref, Value

__all__ = [
    "BuildFailed",
    "Heap",
    "HeapBusy",
    "HeapClosed",
    "HeapCorrupt",
    "HeapException",
    "HeapExhausted",
    "LispFailed",
    "Numbers",
    "Object",
    "Pause",
    "Ref",
    "Value",
    "WrongKind",
]

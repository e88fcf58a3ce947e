# SPDX-License-Identifier: MIT
"""What can go wrong with a write barrier, beside what can with any tracker.

::

    DirtyTrackError
    ├── InvalidMemory               ValueError
    │   ├── InvalidPointerFormat    no slot can hold an address so, or none of this heap
    │   ├── InvalidNursery          it is empty, overlaps the old generation, or cannot be pointed at
    │   ├── NurseryMoved            pages were dropped that may point where it is now
    │   └── CardsTooSmall           smaller than a page, which takes a mirror; or than 512 bytes
    └── BarrierBusy                 RuntimeError    a signal handler called what it interrupted
"""

from __future__ import annotations

from ..errors import DirtyTrackError, InvalidMemory

__all__ = ["BarrierBusy", "CardsTooSmall", "InvalidNursery", "InvalidPointerFormat", "NurseryMoved"]


class BarrierBusy(DirtyTrackError, RuntimeError):
    """A signal handler called a method of the very object in one of whose methods it interrupted its thread."""


class InvalidPointerFormat(InvalidMemory):
    """No slot can hold an address in this way, or the heap's slots are not where such slots can be."""


class InvalidNursery(InvalidMemory):
    """The young memory is empty, overlaps the old generation, or lies where no slot can point."""


class NurseryMoved(InvalidMemory):
    """The young memory is not part of what it was before: pages that were dropped may point into it."""


class CardsTooSmall(InvalidMemory):
    """Cards below a page take a mirror to compare with, and none is below 512 bytes."""

# SPDX-License-Identifier: MIT
"""The page tables as a write barrier, for authors of garbage collectors.

    from dirtytrack.gc import RememberedSet

    remembered = RememberedSet(tracker.regions, tracker)
    slots = remembered.minor(nursery_low, nursery_high)

Stores cost nothing but the first one to a page in an epoch, and the compiler knows of nothing. ``import dirtytrack``
does not import this. ``python -m dirtytrack.gc --cflags`` is for runtimes in C, without Python.
"""

from .cards import CardTable
from .crossing import CrossingMap
from .errors import BarrierBusy, CardsTooSmall, InvalidNursery, InvalidPointerFormat, NurseryMoved
from .marking import ConcurrentMark, MarkRound
from .pointers import PointerFormat
from .remembered import RememberedSet, Slots

__all__ = [
    "BarrierBusy",
    "CardTable",
    "CardsTooSmall",
    "ConcurrentMark",
    "CrossingMap",
    "InvalidNursery",
    "InvalidPointerFormat",
    "MarkRound",
    "NurseryMoved",
    "PointerFormat",
    "RememberedSet",
    "Slots",
]

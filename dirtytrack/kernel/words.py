# SPDX-License-Identifier: MIT
"""Words that point somewhere, cards and object starts in C: what `dirtytrack.gc` is made of."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from ..errors import InvalidMemory
from . import core, sets
from .failures import describe, raise_failure

if TYPE_CHECKING:
    from .core import CData

__all__ = [
    "Found",
    "Room",
    "add_starts",
    "cards",
    "clear_starts",
    "compare_cards",
    "dirty_cards",
    "dirty_runs",
    "find_slots",
    "mark_cards",
    "pages_of",
    "pointers",
    "redirect",
    "span",
    "start_at",
    "starts",
    "starts_in",
    "starts_room",
]


class Found:
    """What a search found."""

    __slots__ = ("_epoch", "_kept", "_slots", "count")

    def __init__(self, slots: Lent | None, kept: CData | None, epoch: int) -> None:
        self._slots, self._kept, self._epoch = slots, kept, epoch
        self.count: int = 0 if slots is None else slots.slots.count

    @property
    def addresses(self) -> memoryview:
        """Of the words."""
        lent = self._slots
        return _NONE if lent is None else sets.numbers(lent, lent.slots.addresses, self.count, 1)

    @property
    def targets(self) -> memoryview:
        """What they pointed at."""
        lent = self._slots
        return _NONE if lent is None else sets.numbers(lent, lent.slots.targets, self.count, 1)

    @property
    def kept(self) -> CData:
        """The pages that point into the young memory."""
        return sets.from_runs(b"", 0, epoch=self._epoch) if self._kept is None else self._kept

    @property
    def keeps(self) -> bool:
        """Whether there are such pages."""
        return self._kept is not None


_NONE = memoryview(bytes(8)).cast("Q")[:0]


class Room:
    """Memory for slots, which the next search uses again: to take it anew, and to touch it first, is a good part of a
    short pause. Its searches follow one another."""

    __slots__ = ("empty", "free")

    def __init__(self) -> None:
        self.free: CData | None = None  # slots
        self.empty: CData | None = None  # a set of pages in which nothing is

    def take(self) -> tuple[CData, CData]:
        """A dt_slots and an empty dt_set."""
        slots, self.free = self.free, None  # an interrupt loses it, and nobody has it twice
        kept, self.empty = self.empty, None
        if slots is None:
            slots = core.ffi.gc(core.ffi.new("dt_slots *"), core.lib.dt_slots_clear)
        return slots, core.new_set() if kept is None else kept


class Lent:
    """Slots that somebody looks at: who goes last, a result or one of its views, gives the room back."""

    __slots__ = ("_room", "slots")

    def __init__(self, slots: CData, room: Room) -> None:
        self.slots, self._room = slots, room

    def __del__(self) -> None:
        if self.slots.room <= _MOST_ROOM:
            self._room.free = self.slots


_MOST_ROOM = 1 << 20  # slots, of 16 bytes each: more is not kept from one search to the next


# ---- slots


def pointers(*, mask: int = 0, tag: int = 0, strip: int = 0, base: int = 0, shift: int = 0, narrow: bool) -> CData:
    """How a slot holds an address."""
    out = core.ffi.new("dt_pointers *")
    out.mask, out.tag, out.strip = mask, tag, strip
    out.base, out.shift, out.compressed = base, shift, narrow
    return out


def span(low: int, high: int) -> CData:
    return core.ffi.new("dt_run *", (low, high))


def find_slots(cset: CData, heap: CData, format: CData, young: CData, low: int, high: int, room: Room) -> Found:
    """Those in the set's pages that point into [low, high), a part of ``young``."""
    slots, kept = room.take()
    code = core.lib.dt_find_slots(cset, heap, len(heap), format, young, low, high, slots, kept)
    if code:
        raise_failure(code, kept.why, "look for slots")
    if kept.count:
        return Found(Lent(slots, room), kept, kept.epoch)
    core.lib.dt_set_clear(kept)
    room.free, room.empty = slots, kept
    return Found(None, None, cset.epoch)


def pages_of(addresses: Any, count: int) -> CData:
    """The set of pages that these addresses are in."""
    out = core.new_set()
    code = core.lib.dt_pages_of(core.ffi.from_buffer("uint64_t[]", addresses), count, out)
    if code:
        raise_failure(code, out.why, "make a set of pages")
    return out


def redirect(heap: CData, format: CData, slots: Any, targets: Any, count: int) -> None:
    """Write targets to slots, both buffers of 64-bit numbers."""
    why, ffi = core.new_failure(), core.ffi
    ours, theirs = ffi.from_buffer("uint64_t[]", slots), ffi.from_buffer("uint64_t[]", targets)
    code = core.lib.dt_redirect_slots(heap, len(heap), format, ours, theirs, count, why)
    if code == core.lib.DT_NOT_WATCHED:
        raise InvalidMemory(f"{why.start:#x} is no slot of this heap: outside it, or between two", start=why.start)
    if code == -errno.EINVAL:
        raise InvalidMemory(
            f"the slot at {why.start:#x} cannot hold its new target: bits of its tag are set in it, or it is too far "
            "from the base. The slots before it are written",
            start=why.start,
        )
    if code:
        raise_failure(code, why, "redirect slots")


# ---- cards


def cards(table: Any, address: int, shift: int) -> tuple[CData, Any]:
    """A table of cards in a buffer, and what must be held while it is used."""
    hold = core.pin(table, writable=True)
    out = core.ffi.new("dt_cards *")
    out.table, out.address, out.shift = hold, address, shift
    return out, hold


def mark_cards(cset: CData, start: int, end: int, table: CData) -> None:
    core.lib.dt_cards_mark(cset, start, end, table)


def compare_cards(cset: CData, memory: CData, table: CData, *, mark: bool) -> None:
    why = core.new_failure()
    code = core.lib.dt_cards_compare(cset, memory, table, mark, why)
    if code:
        raise_failure(code, why, "compare cards with their mirror")


def dirty_cards(table: CData, count: int) -> memoryview:
    """(n,) addresses of the dirty ones."""
    room = core.lib.dt_cards_dirty(table, count, core.ffi.NULL, 0)
    out = core.ffi.new("uint64_t[]", room)
    found = core.lib.dt_cards_dirty(table, count, out, room)  # somebody may have marked or cleaned some meanwhile
    return sets.numbers(out, out, min(found, room), 1)


def dirty_runs(table: CData, count: int) -> memoryview:
    """(n, 2) addresses [start, end) of runs of dirty ones."""
    room = core.lib.dt_cards_runs(table, count, core.ffi.NULL, 0)
    out = core.ffi.new("dt_run[]", room)
    found = core.lib.dt_cards_runs(table, count, out, room)
    return sets.numbers(out, out, min(found, room), 2)


# ---- object starts


def starts_room(nbytes: int, shift: int) -> tuple[int, int]:
    """Bytes of the bits, and of their summary."""
    return core.lib.dt_starts_bits(nbytes, shift), core.lib.dt_starts_summary(nbytes, shift)


def starts(bits: Any, summary: Any, address: int, nbytes: int, shift: int) -> tuple[CData, Any]:
    """A crossing map in two buffers, and what must be held while it is used."""
    holds = core.pin(bits, writable=True), core.pin(summary, writable=True)
    out = core.ffi.new("dt_starts *")
    out.bits, out.summary = (core.ffi.cast("uint64_t *", hold) for hold in holds)
    out.address, out.end, out.shift = address, address + nbytes, shift
    return out, holds


def add_starts(map: CData, addresses: Any, count: int) -> None:
    why = core.new_failure()
    if core.lib.dt_starts_add(map, core.ffi.from_buffer("uint64_t[]", addresses), count, why):
        raise InvalidMemory(
            f"no object can start at {why.start:#x}: this map is of {describe(map.address, map.end)}, in units of "
            f"{1 << map.shift} bytes. None was added",
            start=why.start,
        )


def clear_starts(map: CData, start: int, end: int) -> None:
    core.lib.dt_starts_clear(map, start, end)


def start_at(map: CData, address: int) -> int | None:
    out = core.ffi.new("uint64_t *")
    code = core.lib.dt_starts_at(map, address, out)
    if code == -errno.EINVAL:
        raise InvalidMemory(
            f"{address:#x} is not in this map: it is of {describe(map.address, map.end)}", start=address
        )
    return None if code else int(out[0])


def starts_in(map: CData, runs: Any, count: int) -> memoryview:
    """(n,) starts of the objects that may have a byte in a run of a buffer of 64-bit (start, end) pairs."""
    source = core.ffi.cast("dt_run *", core.ffi.from_buffer(runs)) if count else core.ffi.NULL
    room = core.lib.dt_starts_in(map, source, count, core.ffi.NULL, 0)
    out = core.ffi.new("uint64_t[]", room)
    found = core.lib.dt_starts_in(map, source, count, out, room)
    return sets.numbers(out, out, min(found, room), 1)

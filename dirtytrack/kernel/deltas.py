# SPDX-License-Identifier: MIT
"""Deltas in C: what `dirtytrack.delta` is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import InvalidDelta, InvalidMemory
from . import core, sets
from .failures import raise_failure

if TYPE_CHECKING:
    from .core import CData

__all__ = [
    "HEADER_BYTES",
    "Info",
    "Rooms",
    "Slot",
    "apply",
    "check",
    "checksum",
    "compose",
    "diff",
    "new_slot",
    "pieces",
    "room",
    "rows",
    "seal",
    "trimmed",
]

HEADER_BYTES = 24
_CHECKSUM = slice(16, 24)
_KEEP_BYTES = 1 << 20  # so much room may stay unused; more is given back, unless most of it is used


class Info(NamedTuple):
    """What a delta says of itself."""

    target_bytes: int
    changed_bytes: int
    pieces: int
    granule_bytes: int


class Slot:
    """Room for a delta, there before the call that fills it: what an interrupt behind that call leaves is not lost."""

    __slots__ = ("length", "out", "room")

    def __init__(self, out: CData, room: int) -> None:
        self.out, self.room = out, room
        self.length = core.ffi.new("uint64_t *")

    @property
    def nbytes(self) -> int:
        """Of the delta that is in it, 0 before."""
        return int(self.length[0])


class Rooms:
    """Room that is used again once nobody holds the delta in it: to fault memory in costs more than to fill it."""

    __slots__ = ("_spare",)

    def __init__(self) -> None:
        self._spare: list[tuple[CData, int]] = []

    def take(self, nbytes: int) -> Slot:
        """At least that many bytes."""
        try:
            memory, room = self._spare.pop()
        except IndexError:
            memory, room = core.ffi.NULL, 0
        if room < nbytes:
            memory, room = sets.new_bytes(nbytes), nbytes
        spare = self._spare

        def give_back(pointer: CData) -> None:
            spare[:] = [(memory, room)]  # one at most

        return Slot(core.ffi.gc(core.ffi.cast("uint8_t *", memory), give_back), room)


def new_slot(nbytes: int) -> Slot:
    return Slot(sets.new_bytes(nbytes), nbytes)


def room(cset: CData | None, extent: CData, granule: int) -> int:
    return core.lib.dt_delta_room(core.ffi.NULL if cset is None else cset, extent, granule)


def diff(cset: CData | None, extent: CData, granule: int, *, update: bool, slot: Slot) -> None:
    why = core.new_failure()
    within = core.ffi.NULL if cset is None else cset
    code = core.lib.dt_diff(within, extent, granule, update, slot.out, slot.room, slot.length, why)
    if code == core.lib.DT_TOO_SMALL:
        needed = core.lib.dt_delta_room(within, extent, granule)
        raise InvalidMemory(f"the output has {slot.room} bytes, this delta may take {needed}")
    if code:
        raise_failure(code, why, "compare the memory with its mirror")


def trimmed(slot: Slot) -> CData:
    """What the slot holds; copied where it holds little in much room."""
    used = slot.nbytes
    if slot.room - used <= _KEEP_BYTES or used > slot.room // 4:
        return slot.out
    out = sets.new_bytes(used)
    core.ffi.memmove(out, slot.out, used)
    return out


def checksum(delta: CData, nbytes: int) -> bytes:
    """Eight bytes."""
    number: int = core.lib.dt_delta_checksum(delta, nbytes)
    return number.to_bytes(8, "little")


def seal(delta: CData, nbytes: int) -> None:
    """Write the checksum to its place."""
    core.ffi.buffer(delta, HEADER_BYTES)[_CHECKSUM] = checksum(delta, nbytes)


def _check(code: int, why: CData, doing: str) -> None:
    if code == core.lib.DT_MALFORMED:
        raise InvalidDelta(
            f"cannot {doing}: these bytes are no delta, or a damaged one: what stands at byte {why.start} makes no "
            "sense. Nothing was written. Get it again from where it came from"
        )
    if code:
        raise_failure(code, why, doing)


def check(delta: CData, nbytes: int) -> Info:
    """Look at everything but the checksum.

    Raises:
        InvalidDelta: it is none.
    """
    out, why = core.ffi.new("dt_delta_info *"), core.new_failure()
    _check(core.lib.dt_delta_check(delta, nbytes, out, why), why, "read the delta")
    return Info(out.target_bytes, out.changed_bytes, out.pieces, out.granule_bytes)


def apply(delta: CData, nbytes: int, extent: CData) -> None:
    why = core.new_failure()
    _check(core.lib.dt_delta_apply(delta, nbytes, extent, why), why, "apply the delta")


def compose(first: tuple[CData, int], second: tuple[CData, int]) -> Slot:
    why, length = core.new_failure(), core.ffi.new("uint64_t *")
    call, doing = core.lib.dt_delta_compose, "compose the deltas"
    _check(call(*first, *second, core.ffi.NULL, 0, length, why), why, doing)
    slot = new_slot(length[0])
    _check(call(*first, *second, slot.out, slot.room, slot.length, why), why, doing)
    return slot


def pieces(delta: CData, nbytes: int) -> memoryview:
    """(n, 3): the offset of each run in the memory, its length, and where its bytes are in the delta."""
    call = core.lib.dt_delta_pieces
    count = call(delta, nbytes, core.ffi.NULL, 0)
    out = core.ffi.new("dt_piece[]", count)
    call(delta, nbytes, out, count)
    return sets.numbers(out, out, count, 3)


def rows(delta: CData, nbytes: int, offset: int, row_bytes: int, count: int, marks: Any = None) -> memoryview:
    """(n,) numbers of the rows from ``offset`` on that the delta changes; or one byte a row set to 1 in ``marks``."""
    call, null = core.lib.dt_delta_rows, core.ffi.NULL
    if marks is not None:
        call(delta, nbytes, offset, row_bytes, count, null, 0, core.ffi.from_buffer("uint8_t[]", marks))
        return memoryview(marks)
    found = call(delta, nbytes, offset, row_bytes, count, null, 0, null)
    out = core.ffi.new("uint64_t[]", found)
    call(delta, nbytes, offset, row_bytes, count, out, found, null)
    return sets.numbers(out, out, found, 1)

# SPDX-License-Identifier: MIT
"""CrossingMap: where objects start, so that the first object of a card or page can be found."""

from __future__ import annotations

import operator
from array import array
from typing import TYPE_CHECKING, Any

from ..dirtyset import DirtySet
from ..errors import InvalidMemory
from ..kernel import words
from ..kernel.abi import Address
from ..memory import allocate
from ..region import Region, range_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..memory import AnyBuffer, Memory

__all__ = ["CrossingMap"]


class CrossingMap:
    """Where the objects of a memory start: a bit for each unit of their alignment, which takes 1/64 of the memory where
    that is 8 bytes, and nothing for parts that hold no object.

    The allocator fills it: by `add`, in bulk, or in C by ``dt_starts_add`` on what `bits` and `summary` are. A dirty
    page or card says that its bytes changed; this says whose they are.

    Args:
        memory: a region, a buffer or (address, nbytes); it need not be tracked.
        alignment: of objects, in bytes: a power of two from 8 on, of which the memory's address is a multiple.

    Raises:
        InvalidMemory: there is no such alignment, or the memory does not have it.

    Thread safety: `add` and `discard` may be called beside each other and beside look-ups, by any thread; a look-up
    beside an ``add`` has the object or not.
    """

    def __init__(self, memory: Region | AnyBuffer | tuple[int, int], alignment: int = 8) -> None:
        start, end, _ = range_of(memory, "memory of objects")
        unit = operator.index(alignment)
        if unit < 8 or unit & (unit - 1) or unit > 1 << 30:
            raise InvalidMemory(f"objects are aligned to a power of two of bytes, 8 or more, not to {alignment}")
        if start % unit:
            raise InvalidMemory(
                f"the memory begins at {start:#x}, where no object aligned to {unit} bytes can", start=start
            )
        self._address, self._nbytes, self._alignment = Address(start), end - start, unit
        shift = unit.bit_length() - 1
        bits, summary = words.starts_room(end - start, shift)
        self._bits: Memory = allocate(bits, sparse=True, name="object starts")
        self._summary: Memory = allocate(summary, sparse=True, name="object starts, summary")
        self._map, self._holds = words.starts(self._bits, self._summary, start, end - start, shift)

    @property
    def address(self) -> Address:
        """Where the memory begins."""
        return self._address

    @property
    def nbytes(self) -> int:
        """Of the memory."""
        return self._nbytes

    @property
    def alignment(self) -> int:
        """Of objects, in bytes."""
        return self._alignment

    @property
    def bits(self) -> memoryview:
        """The map itself, for an allocator in C: bit i is the unit at ``address + i * alignment``, least significant
        first in words of 64 bits."""
        return memoryview(self._bits)

    @property
    def summary(self) -> memoryview:
        """A bit for each 64 words of `bits` that may have a bit set. Whoever sets bits sets these too."""
        return memoryview(self._summary)

    def add(self, starts: int | AnyBuffer | Iterable[int]) -> None:
        """Objects start there.

        Args:
            starts: an address; or any number of them, in any order: numbers, or a buffer of 64-bit ones.

        Raises:
            InvalidMemory: one is outside the memory or not aligned; none was added then.
        """
        packed = _packed(starts)
        if packed.nbytes:
            words.add_starts(self._map, packed, packed.nbytes // 8)

    def discard(self, start: int, end: int) -> None:
        """No object starts in [start, end) any more: it was freed, or moved. Beyond the memory nothing is meant."""
        if start < end:
            words.clear_starts(self._map, max(0, start), min(end, (1 << 64) - 1))

    def object_at(self, address: int) -> int | None:
        """The start of the object that an address is in, if it is in one: the last start at or before it.

        Returns:
            None where no object starts there or before.

        Raises:
            InvalidMemory: the address is not in this memory.
        """
        at = operator.index(address)
        if not self._address <= at < self._address + self._nbytes:
            raise InvalidMemory(f"{at:#x} is not in the memory of this map", start=at)
        return words.start_at(self._map, at)

    def objects_on(self, where: DirtySet | memoryview | Iterable[tuple[int, int]]) -> memoryview:
        """The starts of all objects that may have a byte in some ranges, each once, rising: read-only, format ``Q``.

        For each range that is the last one that starts at or before its first byte, which may end before it, and all
        that start in it. In C, by whole words of the map.

        Args:
            where: a DirtySet, `CardTable.dirty_ranges`, or pairs (start, end), sorted and disjoint.

        Raises:
            InvalidMemory: they are not so.
        """
        runs = where.runs if isinstance(where, DirtySet) else where
        packed = _packed_pairs(runs)
        return words.starts_in(self._map, packed, packed.nbytes // 16)

    def __contains__(self, address: object) -> bool:
        try:
            at = operator.index(address)  # type: ignore[arg-type]
        except TypeError:
            return False
        return self._address <= at < self._address + self._nbytes and words.start_at(self._map, at) == at

    def __repr__(self) -> str:
        return f"<CrossingMap of {self._nbytes} bytes at {self._address:#x}, objects aligned to {self._alignment}>"


def _packed(starts: Any) -> memoryview:
    if isinstance(starts, int):
        starts = (starts,)
    try:
        view = memoryview(starts)
    except TypeError:
        try:
            view = memoryview(array("Q", starts))
        except (TypeError, OverflowError, ValueError) as error:
            raise InvalidMemory(f"object starts are numbers, or a buffer of 64-bit numbers: {error}") from error
    if view.itemsize != 8 or not view.c_contiguous:
        raise InvalidMemory(
            f"object starts are 64-bit numbers, one after the other, not items of {view.itemsize} bytes"
        )
    return view


def _packed_pairs(runs: Any) -> memoryview:
    try:
        view = memoryview(runs)
    except TypeError:
        try:
            view = memoryview(array("Q", [number for pair in runs for number in pair]))
        except (TypeError, OverflowError) as error:
            raise InvalidMemory(f"ranges are pairs of 64-bit numbers (start, end): {error}") from error
    if view.itemsize != 8 or view.nbytes % 16 or not view.c_contiguous:
        raise InvalidMemory("ranges are pairs of 64-bit numbers, one after the other")
    flat = view.cast("B").cast("Q") if view.nbytes else view
    last = 0
    if view.nbytes and not isinstance(runs, memoryview):  # what C made is sorted
        for start, end in zip(flat[::2], flat[1::2], strict=True):
            if start < last or start >= end:
                raise InvalidMemory(f"ranges are sorted, disjoint and not empty: [{start:#x}, {end:#x}) is not")
            last = end
    return view

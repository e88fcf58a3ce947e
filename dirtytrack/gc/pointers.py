# SPDX-License-Identifier: MIT
"""How the words of a heap hold addresses."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

from ..kernel import core, words
from ..kernel.failures import describe
from .errors import InvalidNursery, InvalidPointerFormat

if TYPE_CHECKING:
    from ..region import Region

__all__ = ["PointerFormat"]

_ALL = (1 << 64) - 1


class PointerFormat:
    """How a slot, a word of the heap, holds an address. Made by `plain`, `tagged`, `compressed` or `conservative`.

    Slots lie at multiples of their size, counted from address 0. Immutable.

    Attributes:
        slot_bytes: 8, or 4 of compressed pointers.
    """

    __slots__ = ("_c", "_described", "_fields", "slot_bytes")

    slot_bytes: int

    def __init__(self, described: str, **fields: int) -> None:
        self._described = described
        self._fields = fields
        self._c: Any = None
        self.slot_bytes = 4 if fields.get("narrow") else 8

    @staticmethod
    def plain(alignment: int = 8) -> PointerFormat:
        """A word of 64 bits that is the address of an object.

        Args:
            alignment: of objects, in bytes, a power of two: a word that is no multiple of it is no pointer. 1 lets
                pointers into the middle of objects count too, as `conservative` does.

        Raises:
            InvalidPointerFormat: there is no such alignment.
        """
        unit = operator.index(alignment)
        if not 1 <= unit <= 1 << 30 or unit & (unit - 1):
            raise InvalidPointerFormat(f"objects are aligned to a power of two of bytes, not to {alignment}")
        return PointerFormat(f"plain({unit})", mask=unit - 1)

    @staticmethod
    def tagged(mask: int, tag: int | None = None) -> PointerFormat:
        """A word of 64 bits of which some bits are no part of the address, and are zero in every address.

        Args:
            mask: those bits: 0x7 for the lowest three, ``0xFFFF << 48`` for the highest sixteen.
            tag: what they are in a pointer, for tags that tell pointers from numbers; left out, whatever they are.

        Raises:
            InvalidPointerFormat: the mask is empty or leaves nothing, or the tag has bits outside it.
        """
        bits = operator.index(mask)
        if not 0 < bits < _ALL:
            raise InvalidPointerFormat(f"the mask of a tag is some of 64 bits, not {mask:#x}: plain() has no tag")
        if tag is None:
            return PointerFormat(f"tagged({bits:#x})", strip=bits)
        value = operator.index(tag)
        if value & ~bits:
            raise InvalidPointerFormat(f"the tag {tag:#x} has bits that are not in its mask {bits:#x}")
        return PointerFormat(f"tagged({bits:#x}, {value:#x})", strip=bits, mask=bits, tag=value)

    @staticmethod
    def compressed(base: int, shift: int = 3) -> PointerFormat:
        """A word of 32 bits: the address is ``base + (word << shift)``, and 0 is null.

        Args:
            base: where the heap begins, a multiple of ``1 << shift``.
            shift: 0 to 31; objects are aligned to ``1 << shift`` bytes.

        Raises:
            InvalidPointerFormat: it is not so, or the last word would be beyond the last address.
        """
        at, by = operator.index(base), operator.index(shift)
        if not 0 <= by <= 31:
            raise InvalidPointerFormat(f"a compressed pointer is shifted by 0 to 31 bits, not by {shift}")
        if at < 0 or at + (1 << 32 + by) > 1 << 64:
            raise InvalidPointerFormat(f"from {at:#x} on there are no {1 << 32 + by:#x} bytes of addresses")
        if at & ((1 << by) - 1):
            raise InvalidPointerFormat(
                f"the base {at:#x} is misaligned: objects would not lie at multiples of {1 << by}"
            )
        return PointerFormat(f"compressed({at:#x}, {by})", base=at, shift=by, narrow=True)

    @staticmethod
    def conservative() -> PointerFormat:
        """Any aligned word of 64 bits whose value lies in the range, whatever it means: numbers that look so count, and
        so do pointers into the middle of objects. What such a slot points at cannot be moved."""
        return PointerFormat("conservative()")

    def __repr__(self) -> str:
        return f"PointerFormat.{self._described}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PointerFormat) and self._described == other._described

    def __hash__(self) -> int:
        return hash(self._described)

    @property
    def _pointers(self) -> Any:
        """As the core wants it."""
        if self._c is None:
            fields = {"narrow": False, **self._fields}
            self._c = words.pointers(**fields)  # type: ignore[arg-type]
        return self._c

    def _require_heap(self, region: Region) -> None:
        if region.address % self.slot_bytes:
            raise InvalidPointerFormat(
                f"region {region.name!r} begins at {region.address:#x}, which is misaligned: slots of {self} lie at "
                f"multiples of {self.slot_bytes}",
                region=region,
            )

    def _require_nursery(self, low: int, high: int) -> None:
        if self._fields.get("narrow"):
            base, end = self._fields["base"], self._fields["base"] + (1 << 32 + self._fields["shift"])
            if low < base or high > end:
                raise InvalidNursery(
                    f"no slot of {self} can point to all of {describe(low, high)}: they reach {describe(base, end)}",
                    start=low,
                    end=high,
                )
        beyond = self._fields.get("strip", 0) & ~(core.PAGE_BYTES - 1)
        if (low | (high - 1)) & beyond:
            raise InvalidNursery(
                f"addresses in {describe(low, high)} have bits set that {self} takes for its tag",
                start=low,
                end=high,
            )

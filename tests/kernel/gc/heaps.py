# SPDX-License-Identifier: MIT
"""An old generation beside the obvious model of it, a dict of words; and pointer formats in plain Python."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from dirtytrack.gc import PointerFormat
from tests import oracle
from tests.strategies import Way

YOUNG = 0x7000_0000  # nothing needs to be mapped where pointers point
YOUNG_BYTES = 1 << 16
OLD = YOUNG - (1 << 20)  # where a moved object might be; it does not matter


@dataclass(frozen=True)
class Format:
    """How a word holds an address, written down again without the library."""

    name: str
    made: PointerFormat
    width: int
    encode: Callable[[int], int]
    decode: Callable[[int], int | None]
    """None of what is no pointer."""

    def __str__(self) -> str:
        return self.name


FORMATS = (
    Format("plain", PointerFormat.plain(), 8, lambda at: at & ~7, lambda word: None if word & 7 else word),
    Format("conservative", PointerFormat.conservative(), 8, lambda at: at, lambda word: word),
    Format("tagged", PointerFormat.tagged(7), 8, lambda at: at | 5, lambda word: word & ~7),
    Format(
        "tagged 1",
        PointerFormat.tagged(7, 1),
        8,
        lambda at: at & ~7 | 1,
        lambda word: word & ~7 if word & 7 == 1 else None,
    ),
    Format(
        "tagged above",
        PointerFormat.tagged(0xFFFF << 48, 0xFFF8 << 48),
        8,
        lambda at: at | 0xFFF8 << 48,
        lambda word: word & ~(0xFFFF << 48) if word >> 48 == 0xFFF8 else None,
    ),
    Format(
        "compressed",
        PointerFormat.compressed(YOUNG - (1 << 24), 3),
        4,
        lambda at: (at - YOUNG + (1 << 24)) >> 3 & 0xFFFFFFFF,
        lambda word: YOUNG - (1 << 24) + (word << 3) if word else None,
    ),
)


@dataclass
class Model:
    """The words of [address, address + nbytes) that are not zero, by address."""

    address: int
    nbytes: int
    format: Format
    words: dict[int, int] = field(default_factory=dict)

    def slots(self, low: int, high: int) -> dict[int, int]:
        """Every word that points into [low, high), with what it points at."""
        found = ((at, self.format.decode(word)) for at, word in sorted(self.words.items()))
        return {at: target for at, target in found if target is not None and low <= target < high}

    def write(self, index: int, values: list[int], way: Way) -> None:
        """Words from the index-th on, by that way, into the memory and here."""
        width = self.format.width
        at = self.address + index * width
        values = values[: self.nbytes // width - index]
        for i, value in enumerate(values):
            self.words[at + i * width] = value
        write_by(way, at, b"".join(value.to_bytes(width, "little") for value in values))

    def zero(self, start: int, end: int) -> None:
        for at in [at for at in self.words if start <= at < end]:
            del self.words[at]


def write_by(way: Way, address: int, data: bytes) -> None:
    """Put bytes there."""
    if way is Way.READ:  # read(2) into it
        reading, writing = os.pipe()
        try:
            os.write(writing, data)
            assert os.readv(reading, [(ctypes.c_char * len(data)).from_address(address)]) == len(data)
        finally:
            os.close(reading)
            os.close(writing)
    elif way is Way.THREAD:
        thread = threading.Thread(target=ctypes.memmove, args=(address, data, len(data)))
        thread.start()
        thread.join()
    elif way in (Way.SELF, Way.OTHER):
        oracle.write_process(os.getpid(), address, data)
    elif way is Way.PROC_MEM:
        fd = os.open("/proc/self/mem", os.O_RDWR)
        try:
            assert os.pwrite(fd, data, address) == len(data)
        finally:
            os.close(fd)
    else:
        oracle.poke_bytes(address, data)  # memcpy

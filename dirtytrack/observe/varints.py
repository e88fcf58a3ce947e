# SPDX-License-Identifier: MIT
"""Numbers as a recording has them: seven bits a byte, the lowest first; whole columns of them at once, by NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .arrays import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Numbers = NDArray[np.uint64]

__all__ = ["Reader", "decoded", "encoded", "number", "text"]

_MOST_BYTES = 10  # of 64 bits


def number(value: int) -> bytes:
    """One number, 0 to 2**64 - 1."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def text(words: str) -> bytes:
    """A string: how many bytes, then those, in UTF-8; what is no Unicode (file names may be anything) as it was."""
    data = words.encode("utf-8", "surrogateescape")
    return number(len(data)) + data


def encoded(column: Numbers) -> bytes:
    """All numbers of a column, one behind the other."""
    if not len(column):
        return b""
    lengths = np.ones(len(column), np.intp)
    for i in range(1, _MOST_BYTES):
        more = column >= np.uint64(1 << 7 * i)
        if not more.any():
            break
        lengths += more
    at = np.cumsum(lengths) - lengths
    out = np.empty(int(lengths.sum()), np.uint8)
    rest = column
    while len(rest):
        more = rest > np.uint64(0x7F)
        out[at] = (rest & np.uint64(0x7F)).astype(np.uint8) | (more.astype(np.uint8) << 7)
        at, rest = at[more] + 1, rest[more] >> np.uint64(7)
    return out.tobytes()


def decoded(data: bytes | memoryview, count: int) -> Numbers:
    """The numbers that these bytes are.

    Raises:
        ValueError: they are not so many, or a number has more than 64 bits.
    """
    octets = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(octets < 0x80)
    if len(ends) != count or (len(octets) and (not count or ends[-1] != len(octets) - 1)):
        raise ValueError(f"{count} numbers were announced, {len(ends)} are there")
    column = np.zeros(count, np.uint64)
    if not count:
        return column
    starts = np.concatenate((np.zeros(1, np.intp), ends[:-1] + 1))
    lengths = ends - starts + 1
    longest = int(lengths.max())
    if longest > _MOST_BYTES or (longest == _MOST_BYTES and (octets[ends[lengths == longest]] > 1).any()):
        raise ValueError("a number has more than 64 bits")
    for i in range(longest):
        has = lengths > i
        column[has] |= (octets[starts[has] + i] & 0x7F).astype(np.uint64) << np.uint64(7 * i)
    return column


class Reader:
    """Reads numbers and strings one by one.

    Raises ValueError where the bytes end too early.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        self._data, self._at = memoryview(data), 0

    def byte(self) -> int:
        """The next byte."""
        return self.take(1)[0]

    def take(self, nbytes: int) -> memoryview:
        """The next bytes."""
        if nbytes > len(self._data) - self._at:
            raise ValueError("it ends too early")
        self._at += nbytes
        return self._data[self._at - nbytes : self._at]

    def number(self) -> int:
        """The next number."""
        value = shift = 0
        while True:
            octet = self.byte()
            value |= (octet & 0x7F) << shift
            shift += 7
            if octet < 0x80:
                break
        if value >> 64:
            raise ValueError("a number has more than 64 bits")
        return value

    def text(self) -> str:
        """The next string."""
        return str(self.take(self.number()), "utf-8", "surrogateescape")

    def rest(self) -> memoryview:
        """What was not read yet."""
        return self.take(len(self._data) - self._at)

    def finish(self) -> None:
        """Raise ValueError unless all was read."""
        if self._at != len(self._data):
            raise ValueError(f"{len(self._data) - self._at} bytes are over")

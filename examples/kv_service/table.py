# SPDX-License-Identifier: MIT
"""A hash table laid out in memory: whoever has the memory has the table.

Page 0 says what it is. Behind it come slots of 256 bytes: hash, version, lengths, key, value. A key is in the first
slot from its hash on that has it (open addressing, linear probing); what was removed leaves a mark that is passed over.
"""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    import dirtytrack

_PAGE, _SLOT = 4096, 256
_HEADER, _MAGIC = struct.Struct("<8sQQQ"), b"kvtable1"  # and slots, keys, marks
_ENTRY = struct.Struct("<QQHH4x")  # hash, version, lengths of key and value
_EMPTY, _REMOVED, _FIRST = 0, 1, 2  # a hash is no smaller than _FIRST
ROOM = _SLOT - _ENTRY.size
"""How many bytes a key and its value may have together."""


class Entry(NamedTuple):
    """What a key has."""

    value: bytes
    version: int
    """How often the key was written, from 1."""


class TableFull(Exception):
    """Seven of eight slots are taken; this table does not grow."""


class Table:
    """The table in that memory.

    Args:
        memory: one that is all zero becomes an empty table.

    Raises:
        ValueError: it holds something else, or is too small.

    Thread safety: none.
    """

    def __init__(self, memory: dirtytrack.Memory) -> None:
        self.memory = memory
        self._slots = (memory.nbytes - _PAGE) // _SLOT
        if self._slots < 8:
            raise ValueError(f"a table takes {_PAGE + 8 * _SLOT} bytes at least, not {memory.nbytes}")
        magic, slots, self._keys, self._marks = _HEADER.unpack_from(memory, 0)
        if magic == bytes(8):
            self._count()
        elif magic != _MAGIC or slots != self._slots:
            raise ValueError("this memory holds something else, or a table of another size")

    def __len__(self) -> int:
        return int(self._keys)

    def __iter__(self) -> Iterator[bytes]:
        for slot in range(self._slots):
            hash_, _, key_bytes, _ = _ENTRY.unpack_from(self.memory, self._at(slot))
            if hash_ >= _FIRST:
                start = self._at(slot) + _ENTRY.size
                yield self.memory[start : start + key_bytes]

    def get(self, key: bytes) -> Entry | None:
        """What the key has, if anything."""
        slot, _ = self._find(key)
        return None if slot is None else self._entry(slot, len(key))

    def put(self, key: bytes, value: bytes) -> int:
        """Write it, and return its version.

        Raises:
            TableFull.
            ValueError: they are longer than `ROOM`.
        """
        if len(key) + len(value) > ROOM:
            raise ValueError(f"a key and its value have {ROOM} bytes together, not {len(key) + len(value)}")
        slot, free = self._find(key)
        version = 1
        if slot is not None:
            version += self._entry(slot, len(key)).version
        else:
            marked = _ENTRY.unpack_from(self.memory, self._at(free))[0] == _REMOVED
            if not marked and (self._keys + self._marks + 1) * 8 > self._slots * 7:
                raise TableFull(f"{self._keys} keys, and no room for another")
            slot, self._keys, self._marks = free, self._keys + 1, self._marks - marked
            self._count()
        at = self._at(slot)
        _ENTRY.pack_into(self.memory, at, _hash(key), version, len(key), len(value))
        self.memory[at + _ENTRY.size : at + _ENTRY.size + len(key) + len(value)] = key + value
        return version

    def remove(self, key: bytes) -> bool:
        """Remove it; whether it was there."""
        slot, _ = self._find(key)
        if slot is None:
            return False
        _ENTRY.pack_into(self.memory, self._at(slot), _REMOVED, 0, 0, 0)
        self._keys, self._marks = self._keys - 1, self._marks + 1
        self._count()
        return True

    @staticmethod
    def _at(slot: int) -> int:
        return _PAGE + slot * _SLOT

    def _count(self) -> None:
        _HEADER.pack_into(self.memory, 0, _MAGIC, self._slots, self._keys, self._marks)

    def _entry(self, slot: int, key_bytes: int) -> Entry:
        at = self._at(slot)
        _, version, _, value_bytes = _ENTRY.unpack_from(self.memory, at)
        start = at + _ENTRY.size + key_bytes
        return Entry(self.memory[start : start + value_bytes], version)

    def _find(self, key: bytes) -> tuple[int | None, int]:
        """The slot that has the key, if one has, and the one that would get it."""
        wanted, free = _hash(key), -1
        slot = wanted % self._slots
        while True:
            at = self._at(slot)
            hash_, _, key_bytes, _ = _ENTRY.unpack_from(self.memory, at)
            if hash_ == _EMPTY:
                return None, slot if free < 0 else free
            if hash_ == _REMOVED and free < 0:
                free = slot
            start = at + _ENTRY.size
            if hash_ == wanted and self.memory[start : start + key_bytes] == key:
                return slot, slot
            slot = (slot + 1) % self._slots


def _hash(key: bytes) -> int:
    found = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
    return max(found, _FIRST)

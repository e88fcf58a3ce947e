# SPDX-License-Identifier: MIT
"""Copies of what was saved last, against which a save is shrunk to the bytes that really changed."""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING

from ..delta import diff
from ..delta.encoded import most_nbytes
from ..kernel import core
from ..kernel.packing import pack, unpack
from ..memory import allocate

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ..memory import Memory

__all__ = ["Mirrors"]

_WORTH = 7 / 8  # of the pages: a delta that is longer is not worth putting together at the restore


class _Mirror:
    """Of one region."""

    def __init__(self, address: int, nbytes: int, granule: int) -> None:
        self.memory: Memory = allocate(nbytes, name="mirror of a checkpoint")
        self.address, self.nbytes, self.granule = self.memory.address, nbytes, granule
        self.skew = address % core.PAGE_BYTES  # pages are those of the buffer: each is saved as a whole
        self.page_count = -(-(self.skew + nbytes) // core.PAGE_BYTES)
        self.doubted: bytearray | None = bytearray(b"\1") * self.page_count
        """A byte a page: what it has there is perhaps not in the store. None: all is."""

    def pages(self, runs: memoryview) -> Iterator[tuple[int, int]]:
        """Which these runs touch."""
        numbers = iter(runs.cast("B").cast("Q"))
        for offset, nbytes in zip(numbers, numbers, strict=True):
            begin = self.skew + offset
            yield begin // core.PAGE_BYTES, -(-(begin + nbytes) // core.PAGE_BYTES)


class _Rooms(threading.local):
    def __init__(self) -> None:
        self.packed = self.delta = memoryview(bytearray())


class Mirrors:
    """One for each region, by number; they take as much memory again as the buffers.

    A mirror is brought up to date before what came of it is durable. Where that then fails, `doubt` says so of those
    bytes: until they were saved again they are stored whole, whatever the mirror has.

    Thread safety: `shrink` of different frames may be called from several threads; all else by one at a time.
    """

    def __init__(self) -> None:
        self._mirrors: dict[int, _Mirror] = {}
        self._rooms = _Rooms()

    def add(self, number: int, address: int, nbytes: int, granule: int) -> None:
        """Mirror a region, where that is not done yet. Nothing is known of it: its first save is whole."""
        if number not in self._mirrors:
            self._mirrors[number] = _Mirror(address, nbytes, granule)

    def keep_only(self, numbers: Iterable[int]) -> None:
        """Let go of all others."""
        for number in self._mirrors.keys() - set(numbers):
            del self._mirrors[number]

    def know(self, number: int, address: int, *, unpinned: bool) -> None:
        """What is stored of a region is what it has in memory, at that address."""
        mirror = self._mirrors[number]
        room = memoryview(mirror.memory)[: mirror.nbytes]
        pack(address, mirror.nbytes, struct.pack("=QQ", 0, mirror.nbytes), room, unpinned=unpinned)
        mirror.doubted = None

    def shrink(self, number: int, runs: memoryview, plain: memoryview, *, whole: bool) -> bytes | None:
        """Bring the mirror up to date with what a region has now in these runs.

        Args:
            number: of the region.
            runs: pairs of 64-bit numbers, offset and length.
            plain: their bytes, packed.
            whole: whether all of them are to be stored in any case.

        Returns:
            What is to be stored: an encoding of `dirtytrack.delta`, over the packed bytes; empty where nothing changed;
            None where it is better to store the bytes themselves.
        """
        mirror = self._mirrors[number]
        if whole or self._is_doubted(mirror, runs):
            unpack(mirror.address, mirror.nbytes, runs, plain)
            return None
        before = self._room("packed", plain.nbytes)
        pack(mirror.address, mirror.nbytes, runs, before)
        delta = diff(plain, before, None, mirror.granule, out=self._room("delta", most_nbytes(plain.nbytes)))
        if not delta:
            return b""
        unpack(mirror.address, mirror.nbytes, runs, plain)
        return bytes(delta.data) if delta.nbytes < _WORTH * plain.nbytes else None

    def _room(self, which: str, nbytes: int) -> memoryview:
        room: memoryview = getattr(self._rooms, which)
        if room.nbytes < nbytes:
            room = memoryview(bytearray(nbytes))
            setattr(self._rooms, which, room)
        return room[:nbytes]

    # ---- what may not be in the store

    def _is_doubted(self, mirror: _Mirror, runs: memoryview) -> bool:
        doubted = mirror.doubted
        return doubted is not None and any(doubted.find(1, first, last) >= 0 for first, last in mirror.pages(runs))

    def doubt(self, number: int, runs: memoryview) -> None:
        """What the mirror has in these runs may not be in the store."""
        mirror = self._mirrors.get(number)
        if mirror is not None:
            self._mark(mirror, runs, 1)

    def trust(self, number: int, runs: memoryview) -> None:
        """What the mirror has in these runs is in the store."""
        mirror = self._mirrors.get(number)
        if mirror is not None and mirror.doubted is not None:
            self._mark(mirror, runs, 0)
            if mirror.doubted.find(1) < 0:
                mirror.doubted = None

    def _mark(self, mirror: _Mirror, runs: memoryview, mark: int) -> None:
        if mirror.doubted is None:
            mirror.doubted = bytearray(mirror.page_count)
        for first, last in mirror.pages(runs):
            mirror.doubted[first:last] = bytes((mark,)) * (last - first)

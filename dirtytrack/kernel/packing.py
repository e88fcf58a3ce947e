# SPDX-License-Identifier: MIT
"""Runs of a memory, packed and put back, and checksums of bytes, in C without the GIL: for `dirtytrack.checkpoint`."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

from ..errors import InvalidMemory
from . import core
from .failures import raise_failure

if TYPE_CHECKING:
    from .core import CData

__all__ = ["PageDigests", "Xxh64", "all_zero", "begin_writing", "pack", "runs_nbytes", "unpack", "xxh64"]

_NO_RUNS = 2**64 - 1


def xxh64(data: Any, seed: int = 0) -> int:
    """XXH64 of a contiguous buffer."""
    core.load()
    pinned = core.pin(data, writable=False)
    return core.lib.dt_xxh64(pinned, len(pinned), seed)


class Xxh64:
    """XXH64 of what comes in parts, each but the last of a multiple of 32 bytes. One thread at a time."""

    __slots__ = ("_parts",)

    def __init__(self, seed: int = 0) -> None:
        core.load()
        self._parts = core.ffi.new("dt_xxh64_parts *")
        core.lib.dt_xxh64_begin(self._parts, seed)

    def add_read(self, file: int, room: Any, offset: int) -> int:
        """Read an open file into a writable contiguous buffer until that is full or the file ends.

        The whole 32 bytes of what came are a part: those behind them are left for `end`.

        Returns:
            How many bytes were read.

        Raises:
            OSError: as the system's; what was added by then is of no use.
        """
        pinned = core.pin(room, writable=True)
        done: int = core.lib.dt_read_adding(file, offset, pinned, len(pinned), self._parts)
        if done < 0:
            raise OSError(-done, os.strerror(-done))
        return done

    def end(self, data: Any) -> int:
        """The last part; the checksum of all."""
        pinned = core.pin(data, writable=False)
        return core.lib.dt_xxh64_end(self._parts, pinned, len(pinned))


def begin_writing(file: int, offset: int, nbytes: int) -> None:
    """Have the disk begin with these bytes of an open file. Nothing is waited for, and no error told: fsync does."""
    core.load()
    core.lib.dt_begin_writing(file, offset, nbytes)


def all_zero(data: Any) -> bool:
    """Whether each byte of a contiguous buffer is 0."""
    core.load()
    pinned = core.pin(data, writable=False)
    return bool(core.lib.dt_all_zero(pinned, len(pinned)))


class PageDigests:
    """Hashes of pages, of 128 bits, under a random key of its own: two pages that differ have the same one for at most
    one key in 2^64, whatever is in them. Any thread may call."""

    __slots__ = ("_key",)

    NBYTES = 16
    """Of a hash."""

    def __init__(self) -> None:
        core.load()
        self._key = os.urandom(core.PAGE_BYTES + 16)

    def of(self, pages: Any) -> bytes:
        """The hashes of a contiguous buffer's pages, one behind the other."""
        pinned = core.pin(pages, writable=False)
        if len(pinned) % core.PAGE_BYTES:
            raise InvalidMemory(f"{len(pinned)} bytes are no whole pages")
        count = len(pinned) // core.PAGE_BYTES
        out = core.ffi.new("uint64_t[]", 2 * count)
        core.lib.dt_digest_pages(pinned, count, core.PAGE_BYTES, core.ffi.from_buffer("uint8_t[]", self._key), out)
        return bytes(core.ffi.buffer(out, self.NBYTES * count))


def _spans(runs: Any) -> tuple[CData, int, CData]:
    pinned = core.pin(runs, writable=False)
    if len(pinned) % 16:
        raise InvalidMemory(f"runs are pairs of 64-bit numbers, offset and length: {len(pinned)} bytes are no pairs")
    return core.ffi.cast("dt_span *", pinned), len(pinned) // 16, pinned


def runs_nbytes(runs: Any, memory_nbytes: int) -> int | None:
    """How many bytes these runs have.

    Args:
        runs: a contiguous buffer of pairs of 64-bit numbers, offset and length.
        memory_nbytes: of the memory that they are of.

    Returns:
        None unless they are in order, disjoint, not empty, and within the memory.
    """
    core.load()
    spans, count, hold = _spans(runs)
    total = core.lib.dt_spans_nbytes(spans, count, memory_nbytes)
    del hold  # until here
    return None if total == _NO_RUNS else total


def _check(code: int, why: CData, doing: str, length: int, memory_nbytes: int) -> None:
    if code == core.lib.DT_TOO_SMALL:
        raise InvalidMemory(f"cannot {doing}: these runs do not have the {length} bytes that are given for them")
    if code == -errno.EINVAL:
        raise InvalidMemory(
            f"cannot {doing}: these runs are not in order, disjoint, not empty and within {memory_nbytes} bytes"
        )
    if code:
        raise_failure(code, why, doing)


def pack(address: int, nbytes: int, runs: Any, out: Any, *, unpinned: bool = False) -> None:
    """Copy the runs' bytes, one behind the other.

    Args:
        address, nbytes: the memory, which the caller holds.
        runs: as in `runs_nbytes`.
        out: a writable contiguous buffer of exactly as many bytes as the runs have.
        unpinned: the memory may vanish meanwhile, and that is to be an error and no signal.

    Raises:
        InvalidMemory: the runs are not within the memory, or not of that many bytes; nothing was copied.
        RegionGone: a page vanished.
    """
    core.load()
    spans, count, hold = _spans(runs)
    target, why = core.pin(out, writable=True), core.new_failure()
    extent = core.ffi.new("dt_extent *", (address, nbytes, core.ffi.NULL, unpinned, 0, core.ffi.NULL))
    code = core.lib.dt_pack(extent, spans, count, target, len(target), why)
    del hold
    _check(code, why, "pack the runs", len(target), nbytes)


def unpack(address: int, nbytes: int, runs: Any, data: Any | None, *, unpinned: bool = False) -> None:
    """Copy packed bytes back to where the runs are; see `pack`. Where ``data`` is None, the runs become zeros."""
    core.load()
    spans, count, hold = _spans(runs)
    why = core.new_failure()
    extent = core.ffi.new("dt_extent *", (address, nbytes, core.ffi.NULL, unpinned, 0, core.ffi.NULL))
    if data is None:
        length = core.lib.dt_spans_nbytes(spans, count, nbytes)
        code = core.lib.dt_unpack(extent, spans, count, core.ffi.NULL, length, why)
    else:
        source = core.pin(data, writable=False)
        length = len(source)
        code = core.lib.dt_unpack(extent, spans, count, source, length, why)
    del hold
    _check(code, why, "put the runs back", length, nbytes)

# SPDX-License-Identifier: MIT
"""Pages on the move, in C without the GIL: what `dirtytrack.migration` is made of."""

from __future__ import annotations

import hashlib
import mmap
import os
import socket
import struct
import sys
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from ..errors import InvalidMemory
from . import core, sets
from .failures import raise_failure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .core import CData

__all__ = [
    "DIGEST_BYTES",
    "STRETCH_BYTES",
    "FrameRoom",
    "Gate",
    "Mismatch",
    "Moving",
    "Room",
    "SocketBroke",
    "Taken",
    "page_digest",
    "round_trip_seconds",
]

DIGEST_BYTES = 16
STRETCH_BYTES = 16
_STRETCH = struct.Struct("=QII")
_KEY_EXTRA = 16
_PACKED_EXTRA = 2  # bytes a page
_NOWHERE = 2**64 - 1
_HEAD_BYTES = 32
_MOST_TIMEOUT_MS = 2**31 - 1
_MIN_RTT = slice(148, 152)  # of struct tcp_info in <linux/tcp.h>: tcpi_min_rtt, in microseconds (Linux 4.6)


class Mismatch(Exception):
    """What came is not what was sent: caught above, and told with what it was."""


class SocketBroke(Exception):
    """A socket failed beneath the core: caught above, which knows the peer. Its cause is the OSError."""


class Taken(NamedTuple):
    """What one look at some pages found."""

    stretches: int
    data_pages: int
    zero_pages: int
    same_pages: int
    packed_bytes: int
    """Of the room's ``packed``: the data by what differs from what was sent before; 0 where nobody keeps that."""


def _key(seed: bytes, page_bytes: int) -> bytes:
    return hashlib.shake_256(seed).digest(page_bytes + _KEY_EXTRA)


def round_trip_seconds(sock: socket.socket) -> float:
    """The shortest round trip that the kernel saw on a TCP connection, whatever this process's threads were busy with;
    0 of any other kind."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return 0.0
    told = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _MIN_RTT.stop)
    return int.from_bytes(told[_MIN_RTT], sys.byteorder) / 1e6


def page_digest(page: Any, seed: bytes) -> bytes:
    """The digest of one page under that seed."""
    core.load()
    nbytes = memoryview(page).nbytes
    if not 4096 <= nbytes <= 65536 or nbytes & (nbytes - 1):
        raise InvalidMemory(f"a page is a power of two from 4096 to 65536 bytes, not {nbytes}")
    pinned, key = core.pin(page, writable=False), core.ffi.from_buffer("uint8_t[]", _key(seed, nbytes))
    out = core.ffi.new("uint64_t[2]")
    core.lib.dt_page_digest(pinned, nbytes, key, out)
    return bytes(core.ffi.buffer(out))


class Moving:
    """A memory, and the table of what the other side has of it.

    Args:
        address, nbytes: the memory's bytes. The caller holds them.
        phase: how far into its first page it begins.
        page_bytes: a power of two from 4096 to 65536.
        seed: of the digests.
        unpinned: it may vanish beneath a copy.
        through: a region's handle, where its session compares.

    Thread safety: several threads may take or put different pages at once.
    """

    def __init__(
        self,
        address: int,
        nbytes: int,
        *,
        phase: int,
        page_bytes: int,
        seed: bytes,
        unpinned: bool = False,
        through: CData | None = None,
    ) -> None:
        core.load()
        ffi = core.ffi
        self.address, self.nbytes, self.phase, self.page_bytes = address, nbytes, phase, page_bytes
        self.pages = -(-(phase + nbytes) // page_bytes)
        self._key = ffi.from_buffer("uint8_t[]", _key(seed, page_bytes))
        self._table = sets.new_bytes(self.pages * DIGEST_BYTES)
        self.table = core.view_of(self._table, self.pages * DIGEST_BYTES)
        self._through = through
        extent = (address, nbytes, ffi.NULL, unpinned, 0, ffi.NULL if through is None else through)
        table = ffi.cast("uint64_t *", self._table)
        self._c = ffi.new("dt_moving *", (extent, phase, page_bytes, self.pages, self._key, table))
        self._sent: Any = None
        self._sent_table: Any = None
        self.zero = page_digest(bytes(page_bytes), seed)
        """The digest of a page of zeroes."""
        self.forget()

    def forget(self) -> None:
        """The other side has zeroes only."""
        block = self.zero * 4096
        for at in range(0, len(self.table), len(block)):
            self.table[at : at + len(block)] = block[: len(self.table) - at]

    def keep_sent(self) -> None:
        """From now on a copy of what was sent last, so that `take` can tell what differs from it. It is populated as
        pages are sent."""
        self._sent = mmap.mmap(-1, self.pages * self.page_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._sent_table = bytearray(self.zero * self.pages)

    def note(self, first: int, digests: Any) -> None:
        """What the other side said that it has, from a page on."""
        at = first * DIGEST_BYTES
        self.table[at : at + len(digests)] = digests

    def others(self, first: int, count: int) -> bool:
        """Whether any of these pages is not told as zero."""
        at = first * DIGEST_BYTES
        part = self.table[at : at + count * DIGEST_BYTES]
        return bytes(part) != self.zero * count  # which compares many at once, as a memoryview does not

    # ---- the source's

    def step(self, cset: CData, start: int, pages: int) -> int | None:
        """Where the part behind so many pages of a set begins; None behind the last."""
        at = core.lib.dt_set_step(cset, start, pages)
        return None if at == _NOWHERE else at

    def take(self, cset: CData, start: int, end: int, room: Room) -> Taken:
        """What the other side has not of the set's pages in [start, end), into that room.

        Raises:
            RegionGone: a page vanished beneath the copy.
        """
        ffi, moved, why = core.ffi, core.ffi.new("dt_moved *"), core.new_failure()
        sent = ffi.NULL
        if self._sent is not None:
            held = ffi.from_buffer("uint8_t[]", self._sent), ffi.from_buffer("uint8_t[]", self._sent_table)
            sent = ffi.new("dt_sent *", (held[0], ffi.cast("uint64_t *", held[1]), room.c_packed, 0))
        code = core.lib.dt_moving_take(
            self._c, cset, start, end, room.c_stretches, room.c_digests, room.c_data, room.pages, sent, moved, why
        )
        if code:
            raise_failure(code, why, "read the memory that is moved")
        packed = 0 if self._sent is None else sent.packed_bytes
        return Taken(moved.stretches, moved.data_pages, moved.zero_pages, moved.same_pages, packed)

    def send(
        self, cset: CData, start: int, end: int, file: int, timeout: float, room: FrameRoom, *, number: int, region: int
    ) -> tuple[int, int]:
        """What `take` would take, as frames of pages through a socket.

        Args:
            cset, start, end: as `take`.
            file: the socket's descriptor.
            timeout: seconds without any progress.
            room: for this thread.
            number, region: of the frames.

        Returns:
            How many bytes were sent, and how many pages they told.

        Raises:
            SocketBroke: the link is gone, or stands still.
            RegionGone: a page vanished beneath the copy.
        """
        sent, moved, why = core.ffi.new("uint64_t *"), core.ffi.new("dt_moved *"), core.new_failure()
        code = core.lib.dt_moving_send(
            self._c,
            cset,
            start,
            end,
            _link(file, timeout),
            region,
            number,
            room.pages,
            room.c_body,
            room.c_data,
            sent,
            moved,
            why,
        )
        if code:
            _raise_of_link(code, why, "read the memory that is moved")
        return int(sent[0]), int(moved.data_pages + moved.zero_pages)

    def differing(self, cset: CData, every: int) -> tuple[int, int]:
        """A look at one in ``every`` of the set's pages: at how many, and how many the other side has not as they are.

        Raises:
            RegionGone: a page vanished beneath the look.
        """
        looked, found, why = core.ffi.new("uint64_t *"), core.ffi.new("uint64_t *"), core.new_failure()
        code = core.lib.dt_moving_differing(self._c, cset, every, looked, found, why)
        if code:
            raise_failure(code, why, "read the memory that is moved")
        return int(looked[0]), int(found[0])

    # ---- the destination's

    def open(self, stretches: Any, count: int, packed: Any, out: Any) -> None:
        """The data of what the other side took, from what differs and what is in memory, for `put`.

        Raises:
            Mismatch: it is nothing of that kind.
            RegionGone: a page vanished beneath the copy.
        """
        why = core.new_failure()
        code = self._open(stretches, count, packed, out, why)
        if code == core.lib.DT_MALFORMED:
            raise Mismatch(f"page {why.start} of it is no difference from what is here")
        if code:
            raise_failure(code, why, "read the memory that is moved")

    def _open(self, stretches: Any, count: int, packed: Any, out: Any, why: CData) -> int:  # see _put
        held = [core.ffi.from_buffer("uint8_t[]", each) for each in (stretches, packed, out)]
        words = core.ffi.cast("dt_stretch *", held[0])
        return core.lib.dt_moving_open(self._c, words, count, held[1], len(packed), held[2], len(out), why)

    def expect(self, stretches: Any, count: int) -> list[memoryview] | None:
        """Where the data of what the other side took belongs, piece by piece, for a socket to bring there; `put` looks
        at it then. None where it must come through a buffer.

        Raises:
            Mismatch: it belongs nowhere.
        """
        places, why = core.ffi.new("uint64_t[]", count), core.new_failure()
        code = self._expect(stretches, count, places, why)
        if code == core.lib.DT_TOO_SMALL:
            return None
        if code:
            raise Mismatch(f"page {why.start} of it belongs nowhere")
        counts = (pages for _, pages, _ in _STRETCH.iter_unpack(stretches[: count * STRETCH_BYTES]))
        return [
            core.view_of(core.ffi.cast("uint8_t *", place), pages * self.page_bytes)
            for place, pages in zip(places, counts, strict=True)
            if place
        ]

    def _expect(self, stretches: Any, count: int, places: CData, why: CData) -> int:  # see _put
        words = core.ffi.cast("dt_stretch *", core.ffi.from_buffer("uint8_t[]", stretches))
        return core.lib.dt_moving_expect(self._c, words, count, places, why)

    def put(self, stretches: Any, count: int, digests: Any, data: Any, nbytes: int) -> None:
        """Write what the other side took; with None for data, look at what has come where `expect` said.

        Raises:
            Mismatch: it is not what it says, or belongs nowhere. Nothing was written; what is in its place already
                counts as unknown.
            RegionGone: a page vanished beneath the copy.
        """
        why = core.new_failure()
        code = self._put(stretches, count, digests, data, nbytes, why)
        if code == core.lib.DT_MALFORMED:
            raise Mismatch(f"page {why.start} of it is not what was sent, or belongs nowhere")
        if code:
            raise_failure(code, why, "write the memory that is moved")

    def _put(self, stretches: Any, count: int, digests: Any, data: Any, nbytes: int, why: CData) -> int:
        # In a frame that raises nothing: a garbage collection that meets a memoryview whose buffer is in use, both of
        # them in a cycle such as a traceback makes, crashes CPython up to 3.11 and 3.12.6 (gh-77894).
        ffi = core.ffi
        held = [ffi.NULL if each is None else ffi.from_buffer("uint8_t[]", each) for each in (stretches, digests, data)]
        words, sums = ffi.cast("dt_stretch *", held[0]), ffi.cast("uint64_t *", held[1])
        return core.lib.dt_moving_put(self._c, words, count, sums, held[2], nbytes, why)

    # ---- both sides'

    def digest(self, first: int, count: int, *, check: bool = False) -> int:
        """Digests of the pages as they are in memory, into the table; or compare with it.

        Returns:
            The first page that differs, or the number behind the last.

        Raises:
            RegionGone: a page vanished.
        """
        at, why = core.ffi.new("uint64_t *"), core.new_failure()
        code = core.lib.dt_moving_digest(self._c, first, count, check, at, why)
        if code:
            raise_failure(code, why, "read the memory that is moved")
        return int(at[0])


class Room:
    """What one frame of pages is made in, used again and again.

    Args:
        nbytes: of pages.
        page_bytes: of one.
        packed: whether also for what differs.
    """

    def __init__(self, nbytes: int, page_bytes: int, *, packed: bool = False) -> None:
        core.load()
        ffi = core.ffi
        self.pages = max(1, nbytes // page_bytes)
        self.page_bytes = page_bytes
        self.c_data = sets.new_bytes(self.pages * page_bytes)
        self.data = core.view_of(self.c_data, self.pages * page_bytes)
        room = self.pages * (page_bytes + _PACKED_EXTRA) if packed else 1
        self.c_packed = sets.new_bytes(room)
        self.packed = core.view_of(self.c_packed, room)
        self.c_stretches = ffi.new("dt_stretch[]", self.pages)
        self.stretches = core.view_of(self.c_stretches, self.pages * STRETCH_BYTES)
        self.c_digests = ffi.new("uint64_t[]", 2 * self.pages)
        self.digests = core.view_of(self.c_digests, self.pages * DIGEST_BYTES)


class Gate:
    """Who writes memory that comes, and whether anybody still may.

    Thread safety: for all threads of a destination.
    """

    def __init__(self) -> None:
        core.load()
        self._c = core.ffi.new("dt_gate *")

    @property
    def inside(self) -> int:
        """How many are writing."""
        return int(self._c.inside)

    @property
    def received_bytes(self) -> int:
        """By `receive` so far, in all threads."""
        return int(self._c.received_bytes)

    def enter(self) -> bool:
        """Whether the caller may write; if so, until `leave`."""
        return bool(core.lib.dt_gate_enter(self._c))

    def leave(self) -> None:
        """The caller has written."""
        core.lib.dt_gate_leave(self._c)

    def shut(self) -> int:
        """From now on nobody enters. How many are inside."""
        return core.lib.dt_gate_shut(self._c)

    def receive(
        self, memories: Sequence[Moving], file: int, timeout: float, room: FrameRoom
    ) -> tuple[bytes, memoryview]:
        """Put what frames of pages bring through a socket where it belongs, until one comes that is another, is not
        sound, or comes when the gate is shut: its header, and what was read of its body.

        Raises:
            SocketBroke: the link is gone, or nothing came in time.
            Mismatch: pages are not what was sent, or belong nowhere.
            RegionGone: a page vanished beneath the copy.
        """
        ffi, why = core.ffi, core.new_failure()
        first, body_bytes = ffi.new("uint8_t[]", _HEAD_BYTES), ffi.new("uint64_t *")
        all_of_them = ffi.new("dt_moving *[]", [moving._c for moving in memories])
        code = core.lib.dt_moving_receive(
            all_of_them, len(memories), _link(file, timeout), room.c_body, room.c_data, first, body_bytes, self._c, why
        )
        if code == core.lib.DT_MALFORMED:
            raise Mismatch(f"page {why.start} of it is not what was sent, or belongs nowhere")
        if code:
            _raise_of_link(code, why, "write the memory that is moved")
        return bytes(ffi.buffer(first)), core.view_of(room.c_body, int(body_bytes[0]))


class FrameRoom:
    """What frames of pages are made in, or read to, by one thread.

    Args:
        pages: of a frame that is sent, at most.
        page_bytes: of one.
        body_bytes: the longest body.
    """

    def __init__(self, pages: int, page_bytes: int, body_bytes: int = 0) -> None:
        core.load()
        self.pages = pages
        self.c_body = sets.new_bytes(max(body_bytes, pages * (STRETCH_BYTES + DIGEST_BYTES)))
        self.c_data = sets.new_bytes(pages * page_bytes)
        self.data = core.view_of(self.c_data, pages * page_bytes)


def _link(file: int, timeout: float) -> CData:
    return core.ffi.new("dt_link *", (file, min(int(timeout * 1000), _MOST_TIMEOUT_MS)))


def _raise_of_link(code: int, why: CData, doing: str) -> NoReturn:
    if why.step != core.lib.DT_STEP_SOCKET:
        raise_failure(code, why, doing)
    raise SocketBroke from OSError(-code, os.strerror(-code))

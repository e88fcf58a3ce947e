# SPDX-License-Identifier: MIT
"""What a destination has of one migration: its memory, and the attempts that fill it."""

from __future__ import annotations

import os
import secrets
import threading
from typing import TYPE_CHECKING, Any

from ..errors import CallbackFailed, DirtyTrackError, LayoutDiffers, MemoryDiffers, PeerLost, ProtocolViolated
from ..kernel.moving import DIGEST_BYTES, STRETCH_BYTES, FrameRoom, Gate, Mismatch, Moving
from ..memory import allocate, pin
from . import packing, wire
from .handover import DestinationHandOver
from .wire import BODY_BYTES, DATA_BYTES, Codec, Kind, RegionPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .journal import Journal
    from .transport import Link

    Given = Mapping[str, Any] | Callable[[list[RegionPlan]], Mapping[str, Any]] | None

__all__ = ["Receiver", "Session"]

_STRAIGHT_BYTES = 64 << 10  # a stretch of so many is worth a call of its own


class Session:
    """One migration: it outlives its attempts, so that what has arrived is not sent again.

    Args:
        migration: its number.
        journal: or None.
        given: memory by name, or what makes it, or None for fresh memory.
        max_bytes: the most that is taken.
    """

    def __init__(self, migration: bytes, journal: Journal | None, given: Given, max_bytes: int) -> None:
        self.hand_over = DestinationHandOver(migration, journal)
        self.secrets: dict[int, bytes] = {}
        self.memory: dict[str, Any] = {}
        self.tables: list[Moving] = []
        self.prepared: Any = None
        self._given, self._max_bytes = given, max_bytes
        self._plans: list[RegionPlan] = []
        self._seed = b""
        self._page_bytes = 0
        self._holds: list[Any] = []

    @property
    def secret(self) -> bytes:
        """Of the attempt that is under way."""
        return self.secrets[self.hand_over.attempt]

    def begin(self, attempt: int) -> None:
        """The next attempt, with a secret of its own."""
        self.hand_over.begin(attempt)
        self.secrets[attempt] = secrets.token_bytes(32)

    def open(self, said: dict[str, Any]) -> None:
        """Have memory as OPEN says.

        Raises:
            LayoutDiffers: it is not like what was given, or too much.
            ProtocolViolated: OPEN makes no sense.
            LimitReached: there is no memory.
            CallbackFailed: the function that makes it failed.
        """
        page_bytes = wire.field(said, "page_bytes", int, 65536)
        if page_bytes < 4096 or page_bytes & (page_bytes - 1):
            raise ProtocolViolated(f"a page is a power of two from 4096 to 65536 bytes, not {page_bytes}")
        plans, seed = wire.region_list(said, page_bytes), wire.hexadecimal(said, "seed", 32)
        if plans == self._plans and page_bytes == self._page_bytes and seed == self._seed:
            return
        total = sum(plan.nbytes for plan in plans)
        if total > self._max_bytes:
            raise LayoutDiffers(
                f"the source has {total} bytes of memory, this destination takes {self._max_bytes}: raise max_bytes"
            )
        if plans != self._plans:
            self.memory, self._plans = {}, []
            self.memory = self._made(plans)
            self._plans = plans
        self._page_bytes, self._seed = page_bytes, seed
        self._holds, self.tables = [], []
        for plan in plans:
            pinned = pin(self.memory[plan.name], what=f"memory for region {plan.name!r}")
            self._holds.append(pinned.hold)
            moving = Moving(
                pinned.address,
                pinned.nbytes if not self._fresh else plan.nbytes,
                phase=plan.phase,
                page_bytes=page_bytes,
                seed=seed,
                unpinned=pinned.hold is None,
            )
            self.tables.append(moving)
            if not self._fresh:
                moving.digest(0, moving.pages)
        self._fresh = False  # from now on there is something in it

    _fresh = False

    def _made(self, plans: list[RegionPlan]) -> dict[str, Any]:
        given = self._given
        if given is None:
            self._fresh = True
            return {plan.name: allocate(plan.nbytes, name=plan.name) for plan in plans}
        self._fresh = callable(given)
        if callable(given):
            try:
                given = given(list(plans))
            except DirtyTrackError:
                raise
            except Exception as error:
                raise CallbackFailed(f"memory() failed: {error!r}") from error
        theirs, ours = {plan.name: plan.nbytes for plan in plans}, dict(given)
        if theirs.keys() != ours.keys():
            raise LayoutDiffers(
                f"the source has the regions {sorted(theirs)}, this destination {sorted(ours)}: name them alike"
            )
        for name, nbytes in theirs.items():
            room = pin(ours[name], what=f"memory for region {name!r}").nbytes
            if room < nbytes or (room > nbytes and not self._fresh):
                raise LayoutDiffers(
                    f"region {name!r} has {nbytes} bytes at the source, {room} here: they are to be of one length"
                )
        return ours

    def tell(self, link: Link) -> None:
        """HAVE: what is here and not zero."""
        block = BODY_BYTES // DIGEST_BYTES
        for number, moving in enumerate(self.tables):
            for first in range(0, moving.pages, block):
                count = min(block, moving.pages - first)
                if moving.others(first, count):
                    body = moving.table[first * DIGEST_BYTES : (first + count) * DIGEST_BYTES]
                    link.send(Kind.HAVE, body, region=number, number=first)

    def verify(self) -> None:
        """Read all memory once more.

        Raises:
            MemoryDiffers: a page is not what arrived.
        """
        for plan, moving in zip(self._plans, self.tables, strict=True):
            page = moving.digest(0, moving.pages, check=True)
            if page < moving.pages:
                raise MemoryDiffers(
                    f"page {page} of region {plan.name!r} is not what arrived: somebody wrote to it at the destination"
                )

    def let_go(self) -> None:
        """Of the buffers: they are the embedder's now."""
        self._holds, self.tables = [], []


class Receiver:
    """The pages connections of one attempt.

    Args:
        session: whose memory.
        connections: how many there will be.
        codec: of the data.
        delta: whether they may tell what differs.
        failed: called when one fails, from its thread.
        arrived: called when all have said ROUND, from a thread.
    """

    def __init__(
        self,
        session: Session,
        connections: int,
        codec: Codec,
        delta: bool,
        failed: Callable[[BaseException], None],
        arrived: Callable[[int], None],
    ) -> None:
        self._session, self._codec, self._delta = session, codec, delta
        self._failed, self._arrived = failed, arrived
        self._lock = threading.Lock()
        self._wanted = connections
        self._links: list[Link] = []
        self._threads: list[threading.Thread] = []
        self._at: dict[int, int] = {}  # by connection, the round that it ended last
        self._told = -1
        self._over = False
        self.gate = Gate()  # which threads pass that write
        self.round = 0

    @property
    def received_bytes(self) -> int:
        """Over the wire so far."""
        return sum(link.received_bytes for link in tuple(self._links)) + self.gate.received_bytes

    def join(self, link: Link) -> bool:
        """Another connection; whether there is room for it."""
        with self._lock:
            if self._over or len(self._links) == self._wanted:
                return False
            number = len(self._links)
            self._links.append(link)
            thread = threading.Thread(target=self._run, args=(link, number), name=f"dirtytrack-receive-{number}")
            thread.daemon = True
            self._threads.append(thread)
            thread.start()
        return True

    def finish(self) -> None:
        """No more pages are taken: from here on nobody writes the memory.

        Raises:
            ProtocolViolated: a frame of them is coming just now.
        """
        with self._lock:
            self._over = True
        if self.gate.shut():
            raise _too_late()

    def close(self) -> None:
        """End the connections and their threads."""
        with self._lock:
            self._over = True
            links = tuple(self._links)
        self.gate.shut()
        for link in links:
            link.cut()
        for thread in self._threads:
            thread.join()
        for link in links:
            link.close()

    # ---- the threads

    def _run(self, link: Link, number: int) -> None:
        try:
            link.set_timeout(1e6)  # whether the source lives, the control connection knows
            if link.plain:
                # Its own descriptor: whoever closes the link meanwhile does not give its number to another file.
                try:
                    file = os.dup(link.sock.fileno())
                except OSError as error:  # closed already, or no descriptor is left
                    raise link._lost(error, "says nothing") from error
                try:
                    self._receive(link, number, file)
                finally:
                    os.close(file)
            else:
                self._receive(link, number, None)
        except BaseException as error:
            if not self._over or not isinstance(error, PeerLost):
                self._failed(error)

    def _receive(self, link: Link, number: int, file: int | None) -> None:
        room = None if file is None else FrameRoom(1, DATA_BYTES, BODY_BYTES)
        data = memoryview(bytearray(DATA_BYTES)) if room is None else room.data
        packed = memoryview(bytearray(DATA_BYTES)) if self._codec or self._delta else data
        while True:
            frame = self._next(link, file, room)
            if self._over:
                raise _too_late()
            if frame.kind is Kind.ROUND:
                self._ended(number, frame.header.number)
                continue
            if not self.gate.enter():
                raise _too_late()
            try:
                self._put(link, frame, data, packed)
            finally:
                self.gate.leave()

    def _next(self, link: Link, file: int | None, room: FrameRoom | None) -> wire.Frame:
        """The next frame that the core does not put where it belongs by itself."""
        if file is None or room is None:
            return link.expect(Kind.PAGES, Kind.ROUND)
        while True:
            try:
                frame = link.receive_pages(self.gate, self._session.tables, file, room)
            except Mismatch as error:
                raise ProtocolViolated(f"pages came damaged: {error}") from None
            if frame.kind in (Kind.PAGES, Kind.ROUND):
                return frame
            if frame.kind is not Kind.ALIVE:
                link.refuse_unexpected(frame)

    def _put(self, link: Link, frame: wire.Frame, data: memoryview, packed: memoryview) -> None:
        head, tables = frame.header, self._session.tables
        if head.region >= len(tables):
            raise ProtocolViolated(f"pages came for region {head.region}, and there are {len(tables)}")
        moving = tables[head.region]
        stretches, data_pages = wire.pages_of(head, frame.body, moving.page_bytes)
        nbytes = data_pages * moving.page_bytes
        bytes_in: Any = data[:nbytes]
        if head.codec is Codec.NONE:
            if head.data_bytes != nbytes:
                raise ProtocolViolated(f"{data_pages} pages came as {head.data_bytes} bytes")
            places = self._places(moving, frame.body, stretches, nbytes)
            if places is None:
                link.receive_data(bytes_in)
            else:
                bytes_in = None
                for place in places:
                    link.receive_data(place)
        elif head.codec is Codec.DELTA and self._delta:
            link.receive_data(packed[: head.data_bytes])
            try:
                moving.open(frame.body, stretches, packed[: head.data_bytes], bytes_in)
            except Mismatch as error:
                raise ProtocolViolated(f"pages came damaged: {error}") from None
        else:
            if head.codec is not self._codec:
                raise ProtocolViolated("pages came compressed otherwise than was agreed")
            link.receive_data(packed[: head.data_bytes])
            bytes_in = packing.decompress(head.codec, packed[: head.data_bytes], nbytes)
        digests = frame.body[stretches * STRETCH_BYTES :]
        try:
            moving.put(frame.body, stretches, digests, bytes_in, nbytes)
        except Mismatch as error:
            raise ProtocolViolated(f"pages came damaged: {error}") from None

    @staticmethod
    def _places(moving: Moving, body: Any, stretches: int, nbytes: int) -> list[memoryview] | None:
        """Where to receive to: the memory itself, if that takes few calls, else None.

        A page that turns out to be damaged is there then, and in no table; the attempt fails, and nothing runs.
        """
        if nbytes < stretches * _STRAIGHT_BYTES:
            return None
        try:
            return moving.expect(body, stretches)
        except Mismatch as error:
            raise ProtocolViolated(f"pages came damaged: {error}") from None

    def _ended(self, number: int, round_: int) -> None:
        with self._lock:
            self._at[number] = round_
            all_there = len(self._at) == self._wanted and set(self._at.values()) == {round_} and round_ > self._told
            if all_there:
                self._told = self.round = round_
        if all_there:
            self._arrived(round_)


def _too_late() -> ProtocolViolated:
    return ProtocolViolated("pages came after the last of them")

# SPDX-License-Identifier: MIT
"""The source's pages connections: rounds go in, frames go out, by as many threads as there are connections."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Any

from ..errors import PeerLost
from ..kernel.moving import DIGEST_BYTES, STRETCH_BYTES, FrameRoom, Room
from . import packing
from .wire import DATA_BYTES, Codec, Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ..dirtyset import DirtySet
    from ..kernel.moving import Moving
    from .transport import Budget, Link

__all__ = ["Part", "Senders"]

_CHUNK_BYTES = 256 << 10, DATA_BYTES  # at least and at most: each costs a turn of the interpreter on both sides
_FRAME_BYTES = 256 << 10  # where a frame costs no turn of the interpreter: what a processor's own cache holds
_PAYS = 0.7  # of the bytes: with more, what it costs the other side to put together is more than what it saves
_SHARES = 4  # of a connection in a round, if they are not too small: all have something to do until its end


class Part:
    """The pages of one region that a round sends.

    Args:
        region: its number.
        moving: its memory.
        dirty: its pages.
    """

    def __init__(self, region: int, moving: Moving, dirty: DirtySet) -> None:
        self.region, self.moving, self.dirty = region, moving, dirty

    def chunks(self, pages: int) -> Iterator[tuple[Part, int, int]]:
        """Cut into so many pages each: (this, start, end)."""
        runs = self.dirty.runs
        if not len(runs):
            return
        at: int | None = int(runs[0, 0])
        while at is not None:
            behind = self.moving.step(self.dirty._set, at, pages)
            yield self, at, int(runs[len(runs) - 1, 1]) if behind is None else behind
            at = behind


class _Round:
    """One round's chunks, which the threads take from in turn."""

    def __init__(self, number: int, parts: Sequence[Part], pages: int) -> None:
        self.number = number
        self._chunks = (chunk for part in parts for chunk in part.chunks(pages))
        self._lock = threading.Lock()

    def next(self) -> tuple[Part, int, int] | None:
        with self._lock:
            return next(self._chunks, None)


class Senders:
    """Threads that send rounds.

    Args:
        links: a connection each.
        page_bytes: of a page.
        codec: for the data.
        budget: the bandwidth that they share.
        delta: whether the memories keep what was sent.
    """

    def __init__(
        self, links: Sequence[Link], page_bytes: int, codec: Codec, budget: Budget, *, delta: bool = False
    ) -> None:
        self._delta = delta
        self._links, self._page_bytes, self._codec, self._budget = links, page_bytes, codec, budget
        self._stop = threading.Event()
        self._pages = [0] * len(links)  # by thread
        self._work: list[queue.SimpleQueue[_Round | None]] = [queue.SimpleQueue() for _ in links]
        self._done = threading.Semaphore(0)
        self.failure: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._run, args=(i,), name=f"dirtytrack-send-{i}", daemon=True)
            for i in range(len(links))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def sent_bytes(self) -> int:
        """Over the wire so far."""
        return sum(link.sent_bytes for link in self._links)

    @property
    def sent_pages(self) -> int:
        """That the other side had not as they are, so far."""
        return sum(self._pages)

    def begin(self, number: int, parts: Sequence[Part]) -> None:
        """Begin a round; `wait` waits for its end."""
        least, most = _CHUNK_BYTES
        share = sum(part.dirty.page_count for part in parts) * self._page_bytes // (_SHARES * len(self._links))
        nbytes = min(max(share, least), most, self._budget.most_at_once)
        work = _Round(number, parts, max(1, nbytes // self._page_bytes))
        self._left = len(self._work)
        for each in self._work:
            each.put(work)

    def wait(self, seconds: float) -> bool:
        """Whether the round has been sent, waiting for so long at most.

        Raises:
            Whatever a thread failed with.
        """
        while self._left and self.failure is None:
            if not self._done.acquire(timeout=seconds):
                return False
            self._left -= 1
        if self.failure is not None:
            raise self.failure
        return True

    def close(self) -> None:
        """End the threads, whatever they do, and the connections."""
        self._stop.set()
        for link, work in zip(self._links, self._work, strict=True):
            work.put(None)
            link.cut()
        for thread in self._threads:
            thread.join()
        for link in self._links:
            link.close()

    # ---- the threads

    def _run(self, number: int) -> None:
        link, work = self._links[number], self._work[number]
        try:
            send = self._sender(link)
            while (round_ := work.get()) is not None:
                while not self._stop.is_set() and self.failure is None and (chunk := round_.next()) is not None:
                    self._pages[number] += send(round_.number, *chunk)
                link.send(Kind.ROUND, number=round_.number)
                self._done.release()
        except BaseException as error:
            if self.failure is None and not self._stop.is_set():
                self.failure = error
            self._done.release()

    def _sender(self, link: Link) -> Callable[[int, Part, int, int], int]:
        if not link.plain or self._codec or self._delta or self._budget.limited:
            room, compress = Room(DATA_BYTES, self._page_bytes, packed=self._delta), packing.compressor(self._codec)
            return lambda number, part, start, end: self._send(link, number, part, start, end, room, compress)
        small = FrameRoom(max(1, _FRAME_BYTES // self._page_bytes), self._page_bytes)

        def send(number: int, part: Part, start: int, end: int) -> int:
            return link.send_pages(part.moving, part.dirty._set, start, end, small, number=number, region=part.region)

        return send

    def _send(self, link: Link, number: int, part: Part, start: int, end: int, room: Room, compress: Any) -> int:
        taken = part.moving.take(part.dirty._set, start, end, room)
        if not taken.stretches:
            return 0
        body = b"".join(
            (room.stretches[: taken.stretches * STRETCH_BYTES], room.digests[: taken.data_pages * DIGEST_BYTES])
        )
        data: Any = room.data[: taken.data_pages * self._page_bytes]
        codec = Codec.NONE
        if taken.packed_bytes and taken.packed_bytes < _PAYS * len(data):
            data, codec = room.packed[: taken.packed_bytes], Codec.DELTA
        elif compress is not None and len(data):
            packed = compress(data)
            if len(packed) < len(data):
                data, codec = packed, self._codec
        self._budget.spend(len(body) + len(data), self._stop)
        if self._stop.is_set():
            raise PeerLost("the migration ended")
        link.send(Kind.PAGES, body, data=data, number=number, region=part.region, codec=codec)
        return taken.data_pages + taken.zero_pages

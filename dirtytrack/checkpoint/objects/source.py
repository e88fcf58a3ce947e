# SPDX-License-Identifier: MIT
"""Reading a segment in an object store: by ranges, those that will be needed ahead and in parallel."""

from __future__ import annotations

import threading
from bisect import bisect_right
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import DamagedCheckpoint
from ...kernel.packing import xxh64
from ..crew import Crew
from .bucket import Absent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from .bucket import Bucket

__all__ = ["FIRST_NBYTES", "ObjectSource"]

FIRST_NBYTES = 64 << 10  # what is asked for to open a segment: header, and all of a small one
_BLOCK_NBYTES = 4 << 20
_GAP_NBYTES = 128 << 10  # to read over it is quicker than to ask again
_THREADS = 6


class ObjectSource:
    """A segment, to be read: see `Source`.

    Args:
        bucket, key: where it is.
        nbytes: of it.
        first: its first bytes.
        missing: called for the error where it is gone.
    """

    def __init__(
        self, bucket: Bucket, key: str, nbytes: int, first: memoryview, missing: Callable[[], Exception]
    ) -> None:
        self._bucket, self._key, self._first, self._missing = bucket, key, first, missing
        self.name, self.nbytes = key.rpartition("/")[2], nbytes
        self._ahead: _Ahead | None = None

    def will_read(self, spans: Iterable[tuple[int, int]]) -> None:
        """What will be read, in that order: offset and length. It is asked for ahead, in bounded memory."""
        if self._ahead is not None:
            self._ahead.close()
        known = self._first.nbytes
        blocks = list(_blocks((offset, nbytes) for offset, nbytes in spans if offset + nbytes > known))
        self._ahead = _Ahead(self, blocks) if len(blocks) > 1 or any(block.spans > 1 for block in blocks) else None

    def read_into(self, buffers: Sequence[Any], offset: int) -> None:
        """Fill buffers: see `Source.read_into`."""
        views = [view for view in (memoryview(buffer).cast("B") for buffer in buffers) if view.nbytes]
        total = sum(view.nbytes for view in views)
        if not total:
            return
        data, at = self._bytes(offset, total), 0
        for view in views:
            view[:] = data[at : at + view.nbytes]
            at += view.nbytes

    def read_summed(self, room: Any, offset: int) -> int:
        """Fill a buffer: see `Source.read_summed`."""
        self.read_into([room], offset)
        return xxh64(room)

    def _bytes(self, offset: int, nbytes: int) -> memoryview:
        if offset + nbytes <= self._first.nbytes:
            return self._first[offset : offset + nbytes]
        if offset + nbytes > self.nbytes:
            raise self._ends(offset)
        if self._ahead is not None and (found := self._ahead.take(offset, nbytes)) is not None:
            return found
        return self.fetch(offset, nbytes)

    def fetch(self, offset: int, nbytes: int) -> memoryview:
        """Ask for bytes."""
        try:
            data = self._bucket.get_range(self._key, offset, nbytes)
        except Absent as error:
            raise self._missing() from error
        if data.nbytes != nbytes:
            raise self._ends(offset + data.nbytes)
        return data

    def _ends(self, offset: int) -> DamagedCheckpoint:
        damage = f"the segment {self._bucket.where(self._key)} ends at {offset}, before what is in it does"
        return DamagedCheckpoint(damage, damage=(damage,))

    def close(self) -> None:
        """Let go of what was asked for ahead."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.close()


class _Block(NamedTuple):
    """Bytes that are asked for at once."""

    offset: int
    nbytes: int
    spans: int
    """How many reads it is for."""


def _blocks(spans: Iterable[tuple[int, int]]) -> Iterator[_Block]:
    block: _Block | None = None
    for offset, nbytes in spans:
        if not nbytes:
            continue
        if block is not None:
            end, reach = block.offset + block.nbytes, offset + nbytes - block.offset
            if end <= offset <= end + _GAP_NBYTES and reach <= _BLOCK_NBYTES:
                block = _Block(block.offset, reach, block.spans + 1)
                continue
            yield block
        block = _Block(offset, nbytes, 1)
    if block is not None:
        yield block


class _Ahead:
    """Blocks on their way, in their order; each is let go of when all of its reads were."""

    def __init__(self, source: ObjectSource, blocks: list[_Block]) -> None:
        self._blocks = blocks
        self._stack = ExitStack()
        crew = self._stack.enter_context(Crew(_THREADS))
        self._coming = crew.map(lambda block: source.fetch(block.offset, block.nbytes), blocks)
        self._stack.callback(self._coming.close)  # type: ignore[attr-defined]
        self._come = 0  # how many
        self._held: dict[int, tuple[memoryview, int]] = {}
        self._turn, self._mutex = threading.Lock(), threading.Lock()
        self._index = {block.offset: index for index, block in enumerate(blocks)}
        self._starts = sorted(self._index)

    def take(self, offset: int, nbytes: int) -> memoryview | None:
        """The bytes, where they are in a block that was not let go of; waits until it came."""
        start = self._starts[max(bisect_right(self._starts, offset) - 1, 0)]
        index = self._index[start]
        block = self._blocks[index]
        if not block.offset <= offset <= offset + nbytes <= block.offset + block.nbytes:
            return None
        while True:
            with self._mutex:
                if (held := self._held.get(index)) is not None:
                    data, left = held
                    if left == 1:
                        del self._held[index]
                    else:
                        self._held[index] = data, left - 1
                    return data[offset - block.offset :][:nbytes]
                if index < self._come:
                    return None  # read more often than was said
            with self._turn:
                if index < self._come:
                    continue
                try:
                    data = next(self._coming)
                except StopIteration:
                    return None  # one could not be had, which another thread tells, or we do when we ask for ours
                with self._mutex:
                    self._held[self._come] = data, self._blocks[self._come].spans
                    self._come += 1

    def close(self) -> None:
        with self._turn:
            self._stack.close()
            self._held.clear()

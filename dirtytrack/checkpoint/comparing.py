# SPDX-License-Identifier: MIT
"""What two generations differ in, byte by byte, without memory for either."""

from __future__ import annotations

from contextlib import ExitStack, closing
from itertools import takewhile
from typing import TYPE_CHECKING, Literal, NamedTuple

from ..delta import diff
from ..errors import InvalidCheckpoint
from .coding import Decoder
from .crew import Crew
from .joining import generation_of
from .reading import HeldFrames, Window, letting_go, reading_threads, target_of
from .segments import FRAME_NBYTES
from .store import open_store

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from .joining import AnyGeneration
    from .manifests import RegionEntry
    from .protocols import Store

__all__ = ["Comparison", "RegionComparison", "compare"]

_PAGE = 4096


class RegionComparison(NamedTuple):
    """What a buffer differs in."""

    name: str
    what: Literal["same", "changed", "added", "removed"]
    older_nbytes: int | None
    """None where the older generation does not have it."""
    newer_nbytes: int | None
    changed_nbytes: int
    """Bytes that are other, with those that only one of them has."""
    runs: tuple[tuple[int, int], ...]
    """Offsets and lengths of the blocks of 4096 bytes that have such bytes, neighbours as one."""


class Comparison(NamedTuple):
    """What `compare` found."""

    older: int
    newer: int
    regions: tuple[RegionComparison, ...]

    @property
    def changed_nbytes(self) -> int:
        """Of all buffers."""
        return sum(region.changed_nbytes for region in self.regions)


def compare(
    store: Store | str | os.PathLike[str],
    older: int,
    newer: int,
    *,
    decrypt: Callable[[bytes], bytes] | None = None,
    memory_bytes: int = 128 << 20,
    threads: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Comparison:
    """Find the bytes that differ between two generations of a store. What they have in common need not be read.

    Args:
        store: it, or its path.
        older, newer: their numbers, in any order.
        decrypt, threads: as with `restore`.
        memory_bytes: how much memory it takes, about; at least 8 MiB.
        progress: called with the bytes that were compared and those that there are.

    Raises:
        NoSuchGeneration, DamagedCheckpoint: one is not there, or not as it was written.
        InvalidCheckpoint, PermissionDenied, StoreFailed, UnsupportedKernel: as `restore` raises them.
    """
    if type(memory_bytes) is not int or memory_bytes < 8 * FRAME_NBYTES:
        raise InvalidCheckpoint(f"memory_bytes= is a number from {8 * FRAME_NBYTES} on, not {memory_bytes!r}")
    decoder = Decoder(decrypt)
    with letting_go(), open_store(store) as opened, opened.reading(), ExitStack() as stack:
        before, after = (
            stack.enter_context(closing(generation_of(opened, opened.manifest(each), decoder=decoder)))
            for each in (older, newer)
        )
        with Crew(reading_threads() if threads is None else threads) as crew:
            comparing = _Comparing(before, after, crew, memory_bytes, progress)
            return Comparison(older, newer, tuple(comparing.regions()))


class _Comparing:
    def __init__(
        self,
        before: AnyGeneration,
        after: AnyGeneration,
        crew: Crew,
        memory_bytes: int,
        progress: Callable[[int, int], object] | None,
    ) -> None:
        self._both, self._crew, self._progress = (before, after), crew, progress
        pairs = zip(before.manifest.segments, after.manifest.segments, strict=False)
        # Of generations of many ranks, whose segments are in their parts, none.
        self._common = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        # Two windows, and what `diff` makes of them.
        self._most = memory_bytes // 8 // FRAME_NBYTES * FRAME_NBYTES
        self._held_nbytes = memory_bytes // 4
        self._done = 0
        self._total = after.manifest.nbytes

    def regions(self) -> list[RegionComparison]:
        older, newer = ({region.name: region for region in each.regions} for each in self._both)
        return [self._region(older.get(name), newer.get(name)) for name in {**older, **newer}]

    def _region(self, older: RegionEntry | None, newer: RegionEntry | None) -> RegionComparison:
        known = newer or older
        assert known is not None
        if older is None or newer is None:
            self._count(newer.nbytes if newer else 0)
            return RegionComparison(
                known.name,
                "removed" if newer is None else "added",
                older.nbytes if older else None,
                newer.nbytes if newer else None,
                known.nbytes,
                ((0, known.nbytes),),
            )
        changed, blocks = self._changed(older, newer)
        most = max(older.nbytes, newer.nbytes)
        if (least := min(older.nbytes, newer.nbytes)) < most:
            changed += most - least
            blocks += range(least // _PAGE, -(-most // _PAGE))
        return RegionComparison(
            known.name, "changed" if changed else "same", older.nbytes, newer.nbytes, changed, _runs(blocks, most)
        )

    def _changed(self, older: RegionEntry, newer: RegionEntry) -> tuple[int, list[int]]:
        least, most = min(older.nbytes, newer.nbytes), self._most
        rooms = [bytearray(min(most, least)) for _ in self._both]
        held = [HeldFrames(self._held_nbytes // 2) for _ in self._both]
        changed, blocks = 0, list[int]()
        for low in range(0, least, most):
            nbytes = min(most, least - low)
            if self._may_differ(older, newer, low, low + nbytes):
                targets = [target_of(room).first(nbytes) for room in rooms]
                for each, region, target, frames in zip(self._both, (older, newer), targets, held, strict=True):
                    each.read([Window(region, low, target)], self._crew, frames)
                before, after = (memoryview(room)[:nbytes] for room in rooms)
                if found := diff(after, before, granule=_PAGE):
                    blocks += [(low + offset) // _PAGE for offset, _ in found]
                    changed += diff(after, before, granule=1).changed_nbytes
            self._count(nbytes)
        self._count(newer.nbytes - least)
        return changed, blocks

    def _may_differ(self, older: RegionEntry, newer: RegionEntry, low: int, high: int) -> bool:
        if (older.number, older.since, older.nbytes) != (newer.number, newer.since, newer.nbytes):
            return True
        return any(each.touched(older.number, low, high, self._common) for each in self._both)

    def _count(self, nbytes: int) -> None:
        self._done += nbytes
        if self._progress is not None:
            self._progress(self._done, self._total)


def _runs(blocks: list[int], nbytes: int) -> tuple[tuple[int, int], ...]:
    runs: list[tuple[int, int]] = []
    for block in blocks:
        start, end = block * _PAGE, min((block + 1) * _PAGE, nbytes)
        if runs and start <= sum(runs[-1]):
            runs[-1] = runs[-1][0], end - runs[-1][0]
        else:
            runs.append((start, end - start))
    return tuple(runs)

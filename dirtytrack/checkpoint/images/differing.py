# SPDX-License-Identifier: MIT
"""What two images of a process differ in: mappings, pages and, where there are symbols, objects."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from itertools import takewhile
from typing import TYPE_CHECKING, Literal, NamedTuple

from ...errors import UnsupportedKernel
from ..coding import Decoder
from ..crew import Crew
from ..reading import Generation, letting_go, reading_threads
from ..store import open_store
from .image import image_of
from .memory import ImageMemory, require_options
from .pairs import Compared, Comparing, Pair, pairs
from .symbols import Symbol, modules

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Sequence

    from ..protocols import Store
    from .image import ImageMapping, ProcessImage
    from .symbols import Module

__all__ = ["ImageComparison", "MappedRange", "MappingDifference", "ObjectDifference", "compare_images"]

_SHOWN_NBYTES = 16


class MappedRange(NamedTuple):
    """Where a mapping is, and how it may be used."""

    start: int
    end: int
    permissions: str


class MappingDifference(NamedTuple):
    """What became of a mapping, or of a part of one.

    Attributes:
        name: of its file, ``[heap]``, ``[stack]``, ``[anon]``.
        what: ``"same"`` and ``"changed"`` are in both; ``"moved"`` too, at another address, with its changes;
            ``"appeared"`` and ``"vanished"`` are in one; ``"grown"`` and ``"shrunk"`` are the parts by which one of
            those in both is longer or shorter.
        older, newer: where it is, in each; None where it is not there.
        changed_pages: how many differ.
        changed_nbytes: how many bytes differ.
        unknown_nbytes: how many bytes cannot be compared, since one of the images does not have them.
        runs: addresses, in the newer image, and lengths of the pages that differ, neighbours as one.
    """

    name: str
    what: Literal["same", "changed", "moved", "appeared", "vanished", "grown", "shrunk"]
    older: MappedRange | None
    newer: MappedRange | None
    changed_pages: int = 0
    changed_nbytes: int = 0
    unknown_nbytes: int = 0
    runs: tuple[tuple[int, int], ...] = ()


class ObjectDifference(NamedTuple):
    """An object of the program, or of a library, that differs.

    Attributes:
        module: the file that has it.
        name: what the file calls it.
        address, nbytes: where it is, and how long.
        changed_nbytes: how many of its bytes differ.
        older, newer: its bytes, in hexadecimal digits, where it is short.
    """

    module: str
    name: str
    address: int
    nbytes: int
    changed_nbytes: int
    older: str | None
    newer: str | None


class ImageComparison(NamedTuple):
    """What `compare_images` found.

    Attributes:
        older, newer: the generations.
        mappings: what became of each, by address.
        objects: that differ, by address; of those mappings whose symbols are known.
        threads_begun, threads_ended: numbers of threads that only one of them has.
        notes: what could not be looked at, and why, a sentence each.
    """

    older: int
    newer: int
    mappings: tuple[MappingDifference, ...]
    objects: tuple[ObjectDifference, ...]
    threads_begun: tuple[int, ...]
    threads_ended: tuple[int, ...]
    notes: tuple[str, ...]

    @property
    def changed_pages(self) -> int:
        """Of the mappings that both have."""
        return sum(each.changed_pages for each in self.mappings)

    @property
    def changed_nbytes(self) -> int:
        """Of the mappings that both have."""
        return sum(each.changed_nbytes for each in self.mappings)


def compare_images(
    store: Store | str | os.PathLike[str],
    older: int,
    newer: int,
    *,
    objects: bool = True,
    decrypt: Callable[[bytes], bytes] | None = None,
    memory_bytes: int = 128 << 20,
    threads: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> ImageComparison:
    """Find what differs between two images of a process. What they have in common need not be read.

    Mappings are told apart by address and by what they map; memory of no file that is elsewhere, with the same
    permissions, is taken for the same where half of the pages at its beginning are.

    Args:
        store: it, or its path.
        older, newer: their numbers, in any order.
        objects: look up which objects the bytes that differ are of, in the files that are mapped, as long as they are
            the same files.
        decrypt, threads: as with `restore`.
        memory_bytes: how much memory it takes, about; at least 8 MiB.
        progress: called with the bytes that were compared and those that there are.

    Raises:
        NoSuchGeneration, DamagedCheckpoint: one is not there, or not as it was written.
        InvalidCheckpoint: one is no image of a process.
        PermissionDenied, StoreFailed, UnsupportedKernel: as `restore` raises them.
    """
    require_options(memory_bytes, threads)
    decoder = Decoder(decrypt)
    with letting_go(), open_store(store) as opened, opened.reading():
        both = [(image_of(manifest), manifest) for manifest in map(opened.manifest, (older, newer))]
        found = [Generation(opened, manifest, decoder=decoder) for _, manifest in both]
        segments = zip(both[0][1].segments, both[1][1].segments, strict=False)
        common = len(list(takewhile(lambda pair: pair[0] == pair[1], segments)))
        with Crew(reading_threads() if threads is None else threads) as crew:
            before, after = (
                ImageMemory(image, generation, crew, memory_bytes // 2)
                for (image, _), generation in zip(both, found, strict=True)
            )
            return _compared(before, after, common, objects, progress)


def _compared(
    before: ImageMemory,
    after: ImageMemory,
    common: int,
    objects: bool,
    progress: Callable[[int, int], object] | None,
) -> ImageComparison:
    looking = _Looking(after if objects else None)
    comparing = Comparing(before, after, common, looking.take, progress)
    matched = pairs(before, after)
    rows = [_row(pair, comparing) for pair in comparing.following(matched)]
    rows.sort(key=lambda row: (row.newer or row.older or _NOWHERE).start)
    tids = [{thread.tid for thread in memory.image.threads} for memory in (before, after)]
    return ImageComparison(
        before.image.generation,
        after.image.generation,
        tuple(rows),
        looking.found(),
        tuple(sorted(tids[1] - tids[0])),
        tuple(sorted(tids[0] - tids[1])),
        (*_strangeness(before.image, after.image), *looking.notes),
    )


def _strangeness(older: ProcessImage, newer: ProcessImage) -> Iterator[str]:
    """What should make a reader wonder."""
    if (older.pid, older.executable) != (newer.pid, newer.executable):
        one, other = (f"{image.pid} ({image.executable or image.comm})" for image in (older, newer))
        yield f"these are images of two processes, {one} and {other}"


_NOWHERE = MappedRange(0, 0, "")


def _place(mapping: ImageMapping | None, start: int, nbytes: int) -> MappedRange | None:
    return None if mapping is None else MappedRange(start, start + nbytes, mapping.permissions)


def _row(pair: Pair, comparing: Comparing) -> MappingDifference:
    older = _place(pair.older, pair.start - pair.shift, pair.nbytes)
    newer = _place(pair.newer, pair.start, pair.nbytes)
    mapping = pair.newer or pair.older
    assert mapping is not None
    if pair.older is None or pair.newer is None:
        return MappingDifference(mapping.label, pair.what, older, newer)
    found: Compared = comparing.compare(pair)
    what: Literal["same", "changed", "moved"] = "same"
    if pair.shift:
        what = "moved"
    elif found.changed_nbytes or pair.older.permissions != pair.newer.permissions:
        what = "changed"
    return MappingDifference(mapping.label, what, older, newer, *found)


# ---- objects


class _Looking:
    """Which objects the bytes that differ are of."""

    def __init__(self, memory: ImageMemory | None) -> None:
        self.notes: list[str] = []
        self._modules: tuple[Module, ...] = ()
        self._changed = Counter[tuple[int, Symbol]]()
        self._bytes: dict[tuple[int, Symbol], tuple[str, str]] = {}
        if memory is None:
            return
        try:
            self._modules = modules(memory)
        except UnsupportedKernel as error:
            self.notes.append(str(error))
        self.notes += [
            f"{each.path}: its objects are not known: {each.problem}" for each in self._modules if each.problem
        ]

    def take(
        self, address: int, older: memoryview, newer: memoryview, changes: Callable[[], Sequence[tuple[int, int]]]
    ) -> None:
        """Bytes of both images, from an address in the newer one on, which differ there."""
        end = address + len(newer)
        for number, module in enumerate(self._modules):
            low, high = max(address, module.start), min(end, module.end)
            if low >= high:
                continue
            symbols = module.symbols(low, high)
            runs = changes() if symbols else ()
            starts, ends = [start for start, _ in runs], [stop for _, stop in runs]
            for symbol in symbols:
                first = bisect_right(ends, symbol.start - address)
                last = bisect_left(starts, symbol.end - address)
                nbytes = sum(
                    min(ends[at], symbol.end - address) - max(starts[at], symbol.start - address)
                    for at in range(first, last)
                )
                if nbytes:
                    self._count(number, symbol, nbytes, address, older, newer)

    def _count(
        self, number: int, symbol: Symbol, nbytes: int, address: int, older: memoryview, newer: memoryview
    ) -> None:
        self._changed[number, symbol] += nbytes
        low, high = symbol.start - address, symbol.end - address
        if high - low <= _SHOWN_NBYTES and low >= 0 and high <= len(newer):
            self._bytes[number, symbol] = older[low:high].hex(), newer[low:high].hex()

    def found(self) -> tuple[ObjectDifference, ...]:
        """All of them, by address."""
        ordered = sorted(self._changed.items(), key=lambda each: (each[0][1].start, -each[0][1].end))
        return tuple(
            ObjectDifference(
                self._modules[number].path,
                self._modules[number].name(symbol),
                symbol.start,
                symbol.end - symbol.start,
                nbytes,
                *self._bytes.get((number, symbol), (None, None)),
            )
            for (number, symbol), nbytes in ordered
        )

# SPDX-License-Identifier: MIT
"""Whether what is in a store is what was written: every byte of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..errors import DamagedCheckpoint, InvalidCheckpoint, NoSuchGeneration
from .base import RANKS, rank_folder
from .joining import opened_part, part_manifests, parts_of, told_of_part
from .manifests import manifest_name
from .protocols import Kept
from .ranked import Joined
from .segments import HEADER_NBYTES, MOST_FRAME_NBYTES, FrameKind, SegmentReader
from .store import open_store

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator

    from .manifests import Manifest, RegionEntry, SegmentEntry
    from .protocols import Store
    from .segments import Frame

__all__ = ["Report", "Verified", "frames_of", "uncovered", "verify"]


class Verified(NamedTuple):
    """A manifest that was looked at, with all that it names."""

    generation: int
    revision: int
    damage: tuple[str, ...]
    """What is damaged, a sentence each; none where all is as it was written."""


class Report(NamedTuple):
    """What `verify` found."""

    checked: tuple[Verified, ...]
    """Oldest first."""
    damage: tuple[str, ...]
    """What is wrong with the store itself."""
    strangers: tuple[str, ...]
    """What is there and belongs to no generation: leftovers of a save that was interrupted (the next writer removes
    them), a save that goes on, or files of somebody else."""
    read_nbytes: int

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged. Strangers are no damage."""
        return not self.damage and not any(each.damage for each in self.checked)

    @property
    def whole(self) -> int | None:
        """The newest of the generations that were looked at and are whole."""
        return max((each.generation for each in self.checked if not each.damage), default=None)


def verify(
    store: Store | str | os.PathLike[str],
    generation: int | None = None,
    *,
    all: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Report:
    """Read what is stored, and compare it with its checksums. Encrypted frames are checked as they are stored.

    Args:
        store: it, or its path.
        generation: which, with all its revisions; the newest where it is left out.
        all: every manifest that is there, with all that it names.
        progress: called with the bytes that were read and those that there are to read.

    Raises:
        InvalidCheckpoint: it is no store, or one of another version.
        NoSuchGeneration: it has no such generation, or none at all (unless ``all``).
        PermissionDenied, StoreFailed: it cannot be read.
    """
    with open_store(store) as opened, opened.reading():
        catalog = opened.catalog()
        if not all:
            wanted = generation if generation is not None else max(catalog, default=Kept(0, 0)).generation
            catalog = tuple(kept for kept in catalog if kept.generation == wanted)
            if not catalog:
                opened.manifest(generation)  # which says what there is
        return _Verifying(opened, progress).report(catalog)


class _Verifying:
    def __init__(self, store: Store, progress: Callable[[int, int], object] | None) -> None:
        self._store, self._progress = store, progress
        self._found: dict[SegmentEntry, tuple[str, ...]] = {}  # a segment that many manifests name is read once
        self._strangers = set[str]()  # within the parts that were looked at
        self._read = self._total = 0

    def report(self, catalog: tuple[Kept, ...]) -> Report:
        manifests = [(kept, *self._manifest(kept)) for kept in catalog]
        self._total = sum({entry: entry.nbytes for _, each, _ in manifests if each for entry in each.segments}.values())
        self._total += sum(
            part.stored_nbytes
            for _, each, _ in manifests
            if each and isinstance(each.ranks, Joined)
            for part in each.ranks.parts
            if part
        )
        checked = []
        for kept, manifest, damage in manifests:
            if manifest is not None:
                damage = tuple(self._damage(self._store, manifest))
                damage += tuple(each for rank in parts_of(manifest) for each in self._part(manifest, rank))
            checked.append(Verified(*kept, damage))
        strangers = (*self._store.strangers(), *sorted(self._strangers))
        return Report(tuple(checked), self._store.damage(), strangers, self._read)

    def _part(self, manifest: Manifest, rank: int) -> Iterator[str]:
        """What is damaged in what a rank has of a generation."""
        try:
            with opened_part(self._store, manifest, rank) as part:
                for made in part_manifests(part, manifest, rank):
                    yield from (told_of_part(rank, each) for each in self._damage(part, made))
                yield from (told_of_part(rank, each) for each in part.damage())
                within = f"{RANKS}/{rank_folder(rank)}"
                self._strangers.update(f"{within}/{each}" for each in part.strangers())
                there = {kept.generation for kept in self._store.catalog()}
                self._strangers.update(
                    f"{within}/manifests/{manifest_name(*kept)}"
                    for kept in part.catalog()
                    if kept.generation not in there
                )
        except DamagedCheckpoint as error:
            yield from error.damage

    def _manifest(self, kept: Kept) -> tuple[Manifest | None, tuple[str, ...]]:
        try:
            return self._store.manifest(*kept), ()
        except DamagedCheckpoint as error:
            return None, error.damage
        except (InvalidCheckpoint, NoSuchGeneration) as error:
            return None, (str(error),)

    def _damage(self, store: Store, manifest: Manifest) -> Iterator[str]:
        for entry in manifest.segments:
            if entry not in self._found:
                self._found[entry] = tuple(segment_damage(store, entry, self._count))
            yield from self._found[entry]
        if isinstance(manifest.ranks, Joined):  # all of it is in the parts
            return
        if not any(self._found[entry] for entry in manifest.segments):
            try:
                yield from (
                    f"{region.name!r} has no bytes at {at}"
                    for region, at in uncovered(manifest, frames_of(store, manifest))
                )
            except (DamagedCheckpoint, InvalidCheckpoint) as error:
                yield str(error)

    def _count(self, nbytes: int) -> None:
        self._read += nbytes
        if self._progress is not None:
            self._progress(self._read, self._total)


def segment_damage(store: Store, entry: SegmentEntry, count: Callable[[int], object]) -> Iterator[str]:
    """What is damaged in a segment: all of its bytes are read."""
    try:
        reader = SegmentReader(store.open_segment(entry.name), entry, store.store_id)
    except (DamagedCheckpoint, InvalidCheckpoint) as error:
        yield str(error)
        return
    with reader:
        count(HEADER_NBYTES + entry.index_nbytes)
        try:
            room = bytearray()
            reader.will_read(reader.frames())
            for frame in reader.frames():
                if len(room) < frame.stored_nbytes:
                    room = bytearray(min(max(2 * frame.stored_nbytes, 1 << 20), MOST_FRAME_NBYTES))
                stored = memoryview(room)[: frame.stored_nbytes]
                checksum = reader.read_summed(frame, stored)
                count(frame.stored_nbytes)
                try:
                    reader.check(frame, checksum)
                except DamagedCheckpoint as error:
                    yield from error.damage
        except (DamagedCheckpoint, InvalidCheckpoint) as error:
            yield str(error)


# ---- whether each byte of each region is there


def frames_of(store: Store, manifest: Manifest) -> Iterator[Frame]:
    """The frames of a generation that count, oldest first, from the indexes of its segments.

    Raises:
        DamagedCheckpoint, InvalidCheckpoint: an index is not what was written, or makes no sense.
    """
    for entry in manifest.segments:
        count = {region.number: region.nbytes for region in manifest.regions if region.since <= entry.generation}
        with SegmentReader(store.open_segment(entry.name), entry, store.store_id) as reader:
            for frame in reader.frames(count):
                if frame.region in count:
                    yield frame


def uncovered(manifest: Manifest, frames: Iterable[Frame]) -> list[tuple[RegionEntry, int]]:
    """The regions that have bytes which no frame tells, and where the first of those is. A delta tells none by itself.

    Args:
        manifest: of the generation.
        frames: of it, those that count.
    """
    told: dict[int, list[tuple[int, int]]] = {region.number: [] for region in manifest.regions}
    whole = {region.number: [(0, region.nbytes)] for region in manifest.regions}
    for frame in frames:
        known = told.get(frame.region)
        if known is None or known == whole[frame.region] or frame.kind == FrameKind.DELTA:
            continue
        numbers = iter(frame.runs.cast("B").cast("Q"))
        for offset, nbytes in zip(numbers, numbers, strict=True):
            if known and known[-1][0] <= offset <= known[-1][1]:
                known[-1] = known[-1][0], max(known[-1][1], offset + nbytes)
            else:
                known.append((offset, offset + nbytes))
    found = []
    for region in manifest.regions:
        at = 0
        for start, end in sorted(told[region.number]):
            if start > at:
                break
            at = max(at, end)
        if at < region.nbytes:
            found.append((region, at))
    return found

# SPDX-License-Identifier: MIT
"""Bringing a generation back: all of it or some of its buffers, into new memory or into what is given."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from contextlib import closing
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ..errors import DamagedCheckpoint, InvalidCheckpoint, InvalidMemory, NoSuchGeneration
from ..memory import allocate
from .buffers import array_of, describe, misfits
from .coding import Decoder
from .crew import Crew
from .joining import generation_of, opened_part, part_manifests, parts_of
from .reading import Target, Window, letting_go, reading_threads, target_of
from .store import open_store
from .verifying import segment_damage

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator

    from .buffers import Described, Saveable
    from .joining import AnyGeneration
    from .manifests import Manifest, RegionEntry, SegmentEntry
    from .protocols import Kept, Store

__all__ = ["State", "restore"]

_HUGE_BYTES = 2 << 20
_SPARSE_BYTES = 1 << 30
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # of Python 3.11


class State(Mapping[str, Any]):
    """A generation that was restored: its buffers by name, as arrays.

    New memory comes as an array of NumPy, as a tensor of PyTorch where one was saved, or as a memoryview where neither
    can be imported; given buffers come as they were given.

    Attributes:
        meta: what was saved with it.
        generation: which it is.
        parent: the generation that it continued, or None.
        created: when it was saved, in seconds since 1970.
        regions: what is known of the buffers, in the order in which they were first saved.
        manifest: all that is known of it.
        passed_over: why newer ones were not taken, where ``fallback`` was given and needed.

    Thread safety: everything may be called from any thread.
    """

    def __init__(
        self, manifest: Manifest, arrays: Mapping[str, Any], passed_over: tuple[DamagedCheckpoint, ...] = ()
    ) -> None:
        self.manifest, self._arrays, self.passed_over = manifest, dict(arrays), passed_over
        self.meta = manifest.meta
        self.generation, self.parent = manifest.generation, manifest.parent
        self.created = manifest.created
        self.regions = tuple(region for region in manifest.regions if region.name in self._arrays)

    def __getitem__(self, name: str) -> Any:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __repr__(self) -> str:
        return f"<State of generation {self.generation}: {', '.join(map(repr, self._arrays))}>"


def restore(
    store: Store | str | os.PathLike[str],
    *,
    generation: int | None = None,
    into: Mapping[str, Saveable] | None = None,
    fallback: bool = False,
    decrypt: Callable[[bytes], bytes] | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> State:
    """Bring a generation back.

    Every byte that is read is checked. What manifests and indexes can tell, and whether the buffers fit, is known
    before a byte of ``into`` is written; damage that is found behind that leaves them partly overwritten, and the error
    says so. It works where the kernel cannot track, and takes no more memory than the buffers and a few frames.

    Args:
        store: it, or its path.
        generation: which; the newest where it is left out.
        into: buffers by name, as they were saved: of the same length, and where both are known of the same type and
            shape. Only those are restored. Nobody else may write to them meanwhile. Left out: all, into new memory.
        fallback: where that generation is damaged, take the newest older one that is not; the state's
            ``passed_over`` tells.
        decrypt: undoes what ``encrypt=`` of `Checkpointer` did; called from several threads.
        threads: how many read, check and decompress; one for each processor, up to eight, where it is left out.
        progress: called with the stored bytes that are done and those that there are, now and then, in this thread;
            what it raises ends it.

    Raises:
        InvalidCheckpoint: it is no store, or one of another version; or it is encrypted, and ``decrypt`` is missing or
            of another key.
        NoSuchGeneration: it has no such generation, or none at all.
        DamagedCheckpoint: the generation is not what was written; ``damage`` tells what, ``whole`` which older
            generation is.
        InvalidMemory: the buffers do not fit, are read-only, or overlap.
        PermissionDenied, StoreFailed: it cannot be read.
        UnsupportedKernel: it is compressed, and the package zstandard is not installed.
        RegionGone: a page of a buffer vanished.

    Thread safety: may be called from any thread, beside a `Checkpointer` too.
    """
    if threads is not None and (type(threads) is not int or threads < 1):
        raise InvalidCheckpoint(f"threads= is a whole number from 1 on, not {threads!r}")
    with letting_go():
        return _restored(store, generation, into, fallback, Decoder(decrypt), threads or reading_threads(), progress)


def _restored(
    store: Store | str | os.PathLike[str],
    generation: int | None,
    into: Mapping[str, Saveable] | None,
    fallback: bool,
    decoder: Decoder,
    threads: int,
    progress: Callable[[int, int], object] | None,
) -> State:
    given = _described(into)
    with open_store(store) as opened, opened.reading():
        restoring = _Restoring(opened, given, decoder, threads, progress)
        passed_over: list[DamagedCheckpoint] = []
        for number, revisions in _candidates(opened, generation):
            try:
                manifest, arrays = restoring.first_of(number, revisions)
            except DamagedCheckpoint as error:
                passed_over.append(error)
                if not fallback:
                    break
                continue
            return State(manifest, arrays if into is None else into, tuple(passed_over))
        raise _refused(opened, passed_over, restoring.wrote, fallback) from passed_over[0]


def _described(into: Mapping[str, Saveable] | None) -> dict[str, Described] | None:
    if into is None:
        return None
    mapping: Any = into
    if not isinstance(mapping, Mapping) or not mapping:
        raise InvalidMemory("into= is a mapping from names to buffers, with one at least")
    given = {name: describe(name, buffer) for name, buffer in into.items()}
    ordered = sorted(given.values(), key=lambda each: each.address)
    for one, other in pairwise(ordered):
        if other.address < one.address + one.nbytes:
            raise InvalidMemory(f"buffers {one.name!r} and {other.name!r} are in the same memory, and are to differ")
    return given


def _candidates(store: Store, generation: int | None) -> Iterator[tuple[int, list[Kept]]]:
    """The generations to try, newest first, each with its revisions, highest first."""
    catalog = store.catalog()
    newest = max((kept.generation for kept in catalog), default=0) if generation is None else generation
    if not any(kept.generation == newest for kept in catalog):
        store.manifest(generation)  # which says what there is
    for number in sorted({kept.generation for kept in catalog if kept.generation <= newest}, reverse=True):
        yield number, sorted((kept for kept in catalog if kept.generation == number), reverse=True)


class _Restoring:
    def __init__(
        self,
        store: Store,
        given: dict[str, Described] | None,
        decoder: Decoder,
        threads: int,
        progress: Callable[[int, int], object] | None,
    ) -> None:
        self._store, self._given, self._decoder = store, given, decoder
        self._threads, self._progress = threads, progress
        self.wrote = False
        """Whether given buffers have been written to."""
        self._done = self._total = 0

    def first_of(self, number: int, revisions: list[Kept]) -> tuple[Manifest, dict[str, Any]]:
        """Restore the highest revision that is whole: all are the same, as other segments have it."""
        problem: DamagedCheckpoint | None = None
        for kept in revisions:
            try:
                return self._restored(kept)
            except DamagedCheckpoint as error:
                error.generation = number
                problem = problem or error
        assert problem is not None, "a generation has a revision"
        raise problem

    def _restored(self, kept: Kept) -> tuple[Manifest, dict[str, Any]]:
        manifest = self._store.manifest(*kept)
        with closing(generation_of(self._store, manifest, self._given, self._decoder)) as found:
            return self._read(manifest, found)

    def _read(self, manifest: Manifest, found: AnyGeneration) -> tuple[Manifest, dict[str, Any]]:
        memories: dict[str, Any] = {}
        if self._given is None:
            memories = {region.name: _memory(region, found) for region in found.regions}
            targets = {name: target_of(memory, fresh=True) for name, memory in memories.items()}
        else:
            if problems := misfits({region.name: region for region in manifest.regions}, self._given):
                raise InvalidMemory(
                    f"generation {manifest.generation} does not fit into these buffers, which are as they were: "
                    + "; ".join(problems)
                )
            targets = {name: _target(given) for name, given in self._given.items()}
        self._done, self._total = 0, sum(frame.stored_nbytes for frame in found.frames())
        with Crew(self._threads) as crew:
            self.wrote = self._given is not None
            windows = [Window(region, 0, targets[region.name]) for region in found.regions]
            found.read(windows, crew, count=self._count)
        return manifest, {
            region.name: array_of(memoryview(memories[region.name])[: region.nbytes], region.dtype, region.shape)
            for region in found.regions
            if region.name in memories
        }

    def _count(self, nbytes: int) -> None:
        self._done += nbytes
        if self._progress is not None:
            self._progress(self._done, self._total)


def _memory(region: RegionEntry, found: AnyGeneration) -> Any:
    if region.nbytes >= _SPARSE_BYTES and found.told_nbytes(region.number) < region.nbytes // 4:
        # As whoever saved it must have had it: the kernel does not promise more memory than there is.
        return mmap.mmap(-1, region.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    return allocate(region.nbytes, huge="transparent" if region.nbytes >= _HUGE_BYTES else None)


def _target(given: Described) -> Target:
    if given.hold is None:
        return Target(given.address, given.nbytes, None)
    return target_of(given.tracked)


def _refused(store: Store, passed_over: list[DamagedCheckpoint], wrote: bool, fallback: bool) -> DamagedCheckpoint:
    """The error for a generation that is damaged: with what is, and where else to go."""
    first = passed_over[0]
    assert first.generation is not None
    whole = None if fallback else _newest_whole(store, first.generation)
    message = f"generation {first.generation} of {store.name} is damaged: {'; '.join(first.damage)}. "
    if whole is not None:
        message += f"Generation {whole} is whole: pass generation={whole}, or fallback=True"
    else:
        message += "No older generation is whole"
    if wrote:
        message += ". The given buffers may have been overwritten in part"
    return DamagedCheckpoint(message, generation=first.generation, damage=first.damage, whole=whole)


def _newest_whole(store: Store, below: int) -> int | None:
    """The newest older generation of which every byte is as it was written."""
    looked: dict[SegmentEntry, bool] = {}  # a segment that many generations need is read once

    def whole(store: Store, manifest: Manifest) -> bool:
        for entry in manifest.segments:
            if entry not in looked:
                looked[entry] = not any(segment_damage(store, entry, int))
        return all(looked[entry] for entry in manifest.segments)

    def part_whole(manifest: Manifest, rank: int) -> bool:
        with opened_part(store, manifest, rank) as part:
            return any(whole(part, made) for made in part_manifests(part, manifest, rank))

    for kept in sorted((kept for kept in store.catalog() if kept.generation < below), reverse=True):
        try:
            manifest = store.manifest(*kept)
            if all(looked.get(entry, True) for entry in manifest.segments):
                generation_of(store, manifest).close()
                if whole(store, manifest) and all(part_whole(manifest, rank) for rank in parts_of(manifest)):
                    return kept.generation
        except (DamagedCheckpoint, InvalidCheckpoint, NoSuchGeneration):
            continue
    return None

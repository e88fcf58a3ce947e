# SPDX-License-Identifier: MIT
"""What becomes of older generations: compacted into one segment, kept for a while, removed."""

from __future__ import annotations

import math
import time
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..errors import DamagedCheckpoint, InvalidCheckpoint, NoSuchGeneration, StoreFailed
from ..kernel.packing import all_zero
from .coding import Decoder, Encoder
from .crew import Crew
from .joining import generation_of, parts_of
from .ranked import Joined
from .reading import Generation, HeldFrames, Window, letting_go, reading_threads, target_of
from .segments import FRAME_NBYTES, Codec, FrameKind
from .store import open_store

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Collection, Iterable, Iterator

    from .coding import Encoded
    from .manifests import Manifest, RegionEntry, SegmentEntry
    from .protocols import Kept, Store, Writer
    from .segments import SegmentWriter

__all__ = ["Named", "Pruned", "Retention", "compact", "compacted", "prune", "removable"]

_LEAST_MEMORY = 8 * FRAME_NBYTES


# ---- compaction


def compact(
    store: Store | str | os.PathLike[str],
    generation: int | None = None,
    *,
    compression: Literal["zstd", "same"] | None = "same",
    level: int = 1,
    encrypt: Callable[[bytes], bytes] | None = None,
    decrypt: Callable[[bytes], bytes] | None = None,
    memory_bytes: int = 128 << 20,
    threads: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Manifest:
    """Write all of a generation anew, as one that needs no older segment: a full one, made without the program.

    Who restores it gets the same, sooner. Older segments go with the generations that need them: see `prune`. Whatever
    interrupts it leaves the generation as it was. While a `Checkpointer` has the store, it compacts by itself.

    Args:
        store: it, or its path. Nobody else may write to it meanwhile.
        generation: which; the newest where it is left out.
        compression: of what is written; ``"same"`` is zstd where any of what is there is. ``level`` is zstd's.
        encrypt, decrypt: as with `Checkpointer` and `restore`. What is encrypted is never written as anything else.
        memory_bytes: how much memory it takes, about; at least 8 MiB.
        threads: how many read and compress; one for each processor, up to eight, where it is left out.
        progress: called with the bytes that are done and those that there are; what it raises ends it.

    Returns:
        The generation's manifest: a new one, or the one that is there where it needs no compaction.

    Raises:
        NoSuchGeneration, DamagedCheckpoint: it is not there, or not as it was written. Nothing was written.
        InvalidCheckpoint: it is encrypted, and ``encrypt`` or ``decrypt`` is missing or of another key.
        StoreBusy: somebody writes to the store.
        PermissionDenied, StoreFailed: it cannot be read, or written to.
    """
    if compression not in ("same", "zstd", None):
        raise InvalidCheckpoint(f'compression= is "same", "zstd" or None, not {compression!r}')
    if type(memory_bytes) is not int or memory_bytes < _LEAST_MEMORY:
        raise InvalidCheckpoint(f"memory_bytes= is a number from {_LEAST_MEMORY} on, not {memory_bytes!r}")
    decoder = Decoder(decrypt)
    with letting_go(), open_store(store) as opened, opened.writer() as writer:
        with opened.reading():
            manifest = opened.manifest(generation)
            for rank in parts_of(
                manifest
            ):  # that of all stays as it is: whichever revision a rank has, it says the same
                with closing(opened.part(rank)) as part:
                    compact(
                        part,
                        manifest.generation,
                        compression=compression,
                        level=level,
                        encrypt=encrypt,
                        decrypt=decrypt,
                        memory_bytes=memory_bytes,
                        threads=threads,
                        progress=progress,
                    )
            if isinstance(manifest.ranks, Joined):
                return manifest
            found = Generation(opened, manifest, decoder=decoder)
            if _is_compact(found.manifest):
                return found.manifest
            same = "zstd" if any(frame.codec == Codec.ZSTD for frame in found.frames()) else None
            made = _rewritten(
                opened,
                writer,
                found,
                Encoder(same if compression == "same" else compression, level, encrypt),  # type: ignore[arg-type]
                encrypt is not None,
                memory_bytes,
                threads,
                progress,
            )
        # What it replaces is needed no more. Where somebody reads that, `prune` removes it another time.
        writer.remove(_replaced(opened.catalog(), {made.generation: made.revision}))
    return made


def compacted(
    store: Store,
    writer: Writer,
    generation: int,
    encoder: Encoder,
    decoder: Decoder,
    *,
    encrypts: bool = False,
    memory_bytes: int = 64 << 20,
    threads: int | None = 1,
    progress: Callable[[int, int], object] | None = None,
) -> Manifest:
    """As `compact`, for who has the right to write already. What it replaces stays, until a `prune`.

    The manifest's segments take the place of all up to that generation in the manifests of later ones: those that
    belong to later generations, put behind them, make these as before.
    """
    with letting_go(), store.reading():
        found = Generation(store, store.manifest(generation), decoder=decoder)
        if _is_compact(found.manifest):
            return found.manifest
        return _rewritten(store, writer, found, encoder, encrypts, memory_bytes, threads, progress)


def _is_compact(manifest: Manifest) -> bool:
    return all(entry.generation == manifest.generation for entry in manifest.segments)


def _replaced(catalog: Iterable[Kept], by: dict[int, int]) -> list[Kept]:
    """The manifests that have a better one, by generation the revision of that."""
    return [kept for kept in catalog if kept.revision < by.get(kept.generation, 0)]


def _rewritten(
    store: Store,
    writer: Writer,
    found: Generation,
    encoder: Encoder,
    encrypts: bool,
    memory_bytes: int,
    threads: int | None,
    progress: Callable[[int, int], object] | None,
) -> Manifest:
    manifest = found.manifest
    if not encrypts and any(frame.encrypted for frame in found.frames()):
        raise InvalidCheckpoint(
            f"generation {manifest.generation} of {store.name} is encrypted, and is not written as anything else: pass "
            "encrypt= and decrypt="
        )
    segments = _Segments(writer, manifest.generation)
    try:
        with Crew(reading_threads() if threads is None else threads) as crew:
            done = 0
            for region, low, nbytes, window in _windows(found, crew, memory_bytes):
                if window is None:
                    segments.add(region, low, nbytes, None)
                else:
                    _write(segments, crew, encoder, region, low, window)
                done += nbytes
                if progress is not None:
                    progress(done, manifest.nbytes)
        entries = segments.finish()
        revisions = [kept.revision for kept in store.catalog() if kept.generation == manifest.generation]
        made = replace(
            manifest, revision=max(revisions, default=manifest.revision) + 1, kind="compacted", segments=entries
        )
        writer.publish(made)
    except BaseException:
        segments.abandon()
        raise
    return made


def _windows(
    found: Generation, crew: Crew, memory_bytes: int
) -> Iterator[tuple[RegionEntry, int, int, memoryview | None]]:
    """All bytes of a generation in order, some at a time: region, offset, how many, and the bytes, until the next are
    asked for; None where nothing but zeros was ever stored.

    A frame of a few scattered pages reaches over many windows: it is held until they are done, where there is room.
    """
    most = memory_bytes // 4 // FRAME_NBYTES * FRAME_NBYTES
    room = target_of(bytearray(min(most, max((region.nbytes for region in found.regions), default=0))))
    for region in found.regions:
        held = HeldFrames(memory_bytes // 4)
        for low in range(0, region.nbytes, most):
            nbytes = min(most, region.nbytes - low)
            if not found.touched(region.number, low, low + nbytes, but_zeros=True):
                yield region, low, nbytes, None
                continue
            window = room.first(nbytes)
            found.read([Window(region, low, window)], crew, held)
            assert window.view is not None, "it is a bytearray"
            yield region, low, nbytes, window.view


def _write(
    segments: _Segments, crew: Crew, encoder: Encoder, region: RegionEntry, low: int, window: memoryview
) -> None:
    chunks = [window[at : at + FRAME_NBYTES] for at in range(0, len(window), FRAME_NBYTES)]

    def encoded(chunk: memoryview) -> Encoded | None:
        return None if all_zero(chunk) else encoder.encode(chunk)

    for chunk, made in zip(chunks, crew.map(encoded, chunks), strict=True):
        segments.add(region, low, len(chunk), made)
        low += len(chunk)


class _Segments:
    """The segments of a generation that is written: one, or more where an index is full."""

    def __init__(self, writer: Writer, generation: int) -> None:
        self._writer, self._generation = writer, generation
        self._all: list[SegmentWriter] = []
        self._entries: list[SegmentEntry] = []
        self._zeros: tuple[RegionEntry, int, int] | None = None

    def add(self, region: RegionEntry, offset: int, nbytes: int, made: Encoded | None) -> None:
        """Write bytes, or None for zeros, of which one frame tells all that follow one another."""
        if made is None:
            if self._zeros is not None and self._zeros[0] is region:
                nbytes, offset = nbytes + self._zeros[2], self._zeros[1]
            else:
                self._flush()
            self._zeros = region, offset, nbytes
            return
        self._flush()
        self._segment().add(
            region.number,
            _run(offset, nbytes),
            made.stored,
            codec=made.codec,
            encrypted=made.encrypted,
            plain_nbytes=nbytes,
        )

    def _flush(self) -> None:
        if self._zeros is not None:
            region, offset, nbytes = self._zeros
            self._zeros = None
            self._segment().add(region.number, _run(offset, nbytes), kind=FrameKind.ZEROS)

    def _segment(self) -> SegmentWriter:
        if len(self._all) > len(self._entries):
            if self._all[-1].has_room(1):
                return self._all[-1]
            self._entries.append(self._all[-1].finish())
        self._all.append(self._writer.create_segment(self._generation))
        return self._all[-1]

    def finish(self) -> tuple[SegmentEntry, ...]:
        """Make all of it durable."""
        self._flush()
        if len(self._all) > len(self._entries):
            self._entries.append(self._all[-1].finish())
        return tuple(self._entries)

    def abandon(self) -> None:
        """Remove all of it."""
        for segment in self._all:
            segment.abandon()


def _run(offset: int, nbytes: int) -> bytes:
    return offset.to_bytes(8, "little") + nbytes.to_bytes(8, "little")


# ---- retention


@dataclass(frozen=True)
class Retention:
    """Which generations are kept: all that any of these keeps, and always the newest.

    Args:
        last: so many of the newest.
        every: each whose number is a multiple of it.
        age_seconds: those that are not older.

    Raises:
        InvalidCheckpoint: nothing was said, or a number that is none.
    """

    last: int | None = None
    every: int | None = None
    age_seconds: float | None = None

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        for name in ("last", "every"):
            value: Any = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise InvalidCheckpoint(f"{name}= is a whole number from 1 on, not {value!r}")
        age: Any = self.age_seconds
        if age is not None and not (type(age) in (int, float) and age >= 0):
            raise InvalidCheckpoint(f"age_seconds= is a time, not {age!r}")
        if self.last is self.every is self.age_seconds is None:
            raise InvalidCheckpoint("Retention() keeps nothing but the newest: say so by last=1, or what else is kept")

    def kept(self, generations: Collection[int], created: Callable[[int], float], now: float) -> set[int]:
        """Which of these are kept.

        Args:
            generations: their numbers.
            created: when one was made, in seconds since 1970.
            now: the same.
        """
        ordered = sorted(generations)
        found = set(ordered[-max(1, self.last or 1) :])
        if self.every is not None:
            found |= {number for number in ordered if not number % self.every}
        if self.age_seconds is not None:
            found |= {number for number in ordered if number not in found and now - created(number) <= self.age_seconds}
        return found


class Pruned(NamedTuple):
    """What `prune` did."""

    removed: tuple[int, ...]
    """The generations that are gone."""
    kept: tuple[int, ...]
    """Those that are to be kept."""
    put_off: tuple[int, ...]
    """Those that would have been removed, had nobody read: prune again later."""
    unreadable: tuple[str, ...] = ()
    """Why no segment can be removed, a sentence for each manifest that is kept and cannot be read: nobody knows which
    segments it names. Generations are removed all the same, without the room that they took."""


def prune(
    store: Store | str | os.PathLike[str], retention: Retention, *, now: float | None = None, dry_run: bool = False
) -> Pruned:
    """Remove generations that are not to be kept, and the segments that no other one needs.

    No generation needs another one: what is kept is restored as before. Kept is also the newest generation that can be
    restored, as far as manifests and indexes tell, whatever its number. Whatever interrupts this leaves each generation
    whole or gone; what else it leaves, the next writer removes. While somebody restores or verifies, nothing is
    removed. While a manifest that is kept cannot be read, the segments of what is removed stay; ``unreadable`` tells.

    Args:
        store: it, or its path. Nobody else may write to it meanwhile: a `Checkpointer` prunes by itself (``retain=``).
        retention: what is kept.
        now: in seconds since 1970, instead of the clock's.
        dry_run: remove nothing, tell only.

    Raises:
        StoreBusy: somebody writes to the store.
        PermissionDenied, StoreFailed: it cannot be read, or written to.
        InvalidCheckpoint: it is no store, or that is no `Retention`.
    """
    if not isinstance(retention, Retention):
        raise InvalidCheckpoint(f"a retention is a Retention, as Retention(last=10), not {retention!r}")
    with open_store(store) as opened:
        if dry_run:
            return _pruned(opened, opened.catalog(), removable(opened, retention, now=now), True)
        with opened.writer() as writer:
            catalog, gone = opened.catalog(), removable(opened, retention, now=now)
            done = writer.remove(gone) if gone else True
            if done:
                _prune_parts(opened)
            return _pruned(opened, catalog, gone, done)


def _prune_parts(store: Store) -> None:
    """Remove what ranks have of generations that are gone. Where somebody reads it, the next run does."""
    named = Named(kept.generation for kept in store.catalog())
    for rank in store.parts():
        with closing(store.part(rank)) as part, part.writer() as writer:
            writer.remove(removable(part, named, whole=0))


class Named(Retention):
    """Those that have these numbers, and no others.

    Args:
        generations: the numbers.
    """

    def __init__(self, generations: Iterable[int]) -> None:
        object.__setattr__(self, "_generations", frozenset(generations))

    def kept(self, generations: Collection[int], created: Callable[[int], float], now: float) -> set[int]:
        """Those of them that are kept."""
        found: frozenset[int] = self._generations  # type: ignore[attr-defined]
        return set(generations) & found


def _pruned(store: Store, catalog: Collection[Kept], gone: Collection[Kept], done: bool) -> Pruned:
    left = set(catalog) - set(gone)
    kept = {each.generation for each in left}
    removed = tuple(sorted({each.generation for each in gone} - kept))
    return Pruned(
        removed if done else (), tuple(sorted(kept)), () if done else removed, tuple(_unreadable(store, sorted(left)))
    )


def _unreadable(store: Store, left: Iterable[Kept]) -> Iterator[str]:
    """Of manifests, why they cannot be read, where they cannot."""
    for kept in left:
        try:
            store.manifest(*kept)
        except (DamagedCheckpoint, InvalidCheckpoint, StoreFailed) as error:
            yield str(error)
        except NoSuchGeneration:
            continue  # somebody removed it


def removable(
    store: Store, retention: Retention, *, now: float | None = None, whole: int | None = None
) -> tuple[Kept, ...]:
    """The manifests that a retention does not keep, and those that compacting has replaced; oldest first.

    Args:
        store: which.
        retention: what is kept.
        now: in seconds since 1970.
        whole: a generation that is known to be whole, so that nobody need look for one; 0 where none need be kept.
    """
    catalog = store.catalog()
    revisions: dict[int, list[Kept]] = {}
    for each in catalog:
        revisions.setdefault(each.generation, []).append(each)
    keep = retention.kept(revisions, _Ages(store, revisions), time.time() if now is None else now)
    if whole is None or (whole and whole not in keep):
        keep |= {next((number for number in sorted(revisions, reverse=True) if _whole(store, revisions[number])), 0)}
    gone = {each for each in catalog if each.generation not in keep}
    for number in keep & revisions.keys():
        if len(revisions[number]) > 1 and (best := _whole(store, revisions[number])):
            gone |= {each for each in revisions[number] if each < best}
    return tuple(sorted(gone))


def _whole(store: Store, revisions: Collection[Kept]) -> Kept | None:
    """The highest of these that can be restored, as far as manifest and indexes tell."""
    with store.reading():
        for each in sorted(revisions, reverse=True):
            try:
                generation_of(store, store.manifest(*each)).close()
            except (DamagedCheckpoint, InvalidCheckpoint, NoSuchGeneration):
                continue
            return each
    return None


class _Ages:
    """When generations were made. One whose manifest cannot be read is at least as old as the one after it."""

    def __init__(self, store: Store, generations: Iterable[int]) -> None:
        self._store, self._generations = store, sorted(generations)

    def __call__(self, generation: int) -> float:
        """In seconds since 1970; infinite where nobody knows."""
        for number in self._generations[self._generations.index(generation) :]:
            try:
                return self._store.manifest(number).created
            except (DamagedCheckpoint, InvalidCheckpoint, NoSuchGeneration):
                continue
        return math.inf

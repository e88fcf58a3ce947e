# SPDX-License-Identifier: MIT
"""Which generations a store has."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import DamagedCheckpoint, InvalidCheckpoint, NoSuchGeneration
from .joining import opened_part, part_manifests, parts_of, told_of_part
from .ranked import Joined
from .store import open_store

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from .manifests import Manifest, SegmentEntry
    from .protocols import Kept, Store

__all__ = ["Summary", "generations"]


class Summary(NamedTuple):
    """A generation, as far as its manifest tells."""

    generation: int
    revision: int
    """Higher than 0 where it was compacted."""
    kind: str | None
    """``"full"``, ``"increment"`` or ``"compacted"``; this and all below is None where the manifest is damaged."""
    parent: int | None
    created: float | None
    """In seconds since 1970."""
    nbytes: int | None
    """Of all buffers."""
    written_nbytes: int | None
    """What was stored for this generation."""
    stored_nbytes: int | None
    """Of all segments that it is restored from; others may need them too."""
    segment_count: int | None
    meta: Any
    damage: tuple[str, ...]
    """What can be seen to be damaged without reading it all; `verify` does that."""


def generations(store: Store | str | os.PathLike[str]) -> tuple[Summary, ...]:
    """What a store has, oldest generation first.

    Args:
        store: it, or its path.

    Raises:
        InvalidCheckpoint: it is no store, or one of another version.
        PermissionDenied, StoreFailed: it cannot be read.
    """
    with open_store(store) as opened, opened.reading():
        looked: dict[SegmentEntry, tuple[str, ...]] = {}
        best = {kept.generation: kept for kept in opened.catalog()}
        return tuple(_summary(opened, kept, looked) for kept in best.values())


def _summary(store: Store, kept: Kept, looked: dict[SegmentEntry, tuple[str, ...]]) -> Summary:
    try:
        manifest = store.manifest(kept.generation)
    except (DamagedCheckpoint, InvalidCheckpoint, NoSuchGeneration) as error:
        damage = error.damage if isinstance(error, DamagedCheckpoint) else (str(error),)
        return Summary(*kept, None, None, None, None, None, None, None, None, damage)
    missing = [*_all_missing(store, manifest, looked)]
    written, stored, count = _written_nbytes(manifest), manifest.stored_nbytes, len(manifest.segments)
    if isinstance(manifest.ranks, Joined):
        for rank in parts_of(manifest):
            try:
                with opened_part(store, manifest, rank) as part:
                    made = next(part_manifests(part, manifest, rank))
                    missing += [told_of_part(rank, each) for each in _all_missing(part, made, looked)]
            except DamagedCheckpoint as error:
                missing += error.damage
        parts = [part for part in manifest.ranks.parts if part is not None]
        written = sum(part.written_nbytes for part in parts)
        stored = sum(part.stored_nbytes for part in parts)
        count = sum(part.segment_count for part in parts)
    return Summary(
        generation=manifest.generation,
        revision=manifest.revision,
        kind=manifest.kind,
        parent=manifest.parent,
        created=manifest.created,
        nbytes=manifest.nbytes,
        written_nbytes=written,
        stored_nbytes=stored,
        segment_count=count,
        meta=manifest.meta,
        damage=tuple(missing),
    )


def _all_missing(store: Store, manifest: Manifest, looked: dict[SegmentEntry, tuple[str, ...]]) -> Iterator[str]:
    for entry in manifest.segments:
        if entry not in looked:
            looked[entry] = _missing(store, entry)
        yield from looked[entry]


def _written_nbytes(manifest: Manifest) -> int:
    return sum(entry.nbytes for entry in manifest.segments if entry.generation == manifest.generation)


def _missing(store: Store, entry: SegmentEntry) -> tuple[str, ...]:
    try:
        with closing(store.open_segment(entry.name)) as source:
            if source.nbytes == entry.nbytes:
                return ()
            return (f"the segment {entry.name} has {source.nbytes} bytes instead of {entry.nbytes}",)
    except DamagedCheckpoint as error:
        return error.damage

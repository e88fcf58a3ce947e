# SPDX-License-Identifier: MIT
"""What stores in directories and in object stores do alike: they say which store they are, and find the manifest that
is meant."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ..errors import DamagedCheckpoint, InvalidCheckpoint, NoSuchGeneration
from ..kernel.packing import xxh64
from .manifests import Manifest, manifest_name
from .protocols import Kept

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "MANIFESTS",
    "MARKER",
    "MARKER_NBYTES",
    "RANKS",
    "SEGMENTS",
    "BaseStore",
    "marker_of",
    "rank_folder",
    "rank_of_folder",
]

MARKER, SEGMENTS, MANIFESTS, RANKS = "dirtytrack-store", "segments", "manifests", "ranks"
MARKER_NBYTES = 128  # more is never read
_VERSION = 1
_RANK = re.compile(r"[0-9]{6}")
_MARKER = re.compile(rb"dirtytrack-store ([0-9]{1,9}) ([0-9a-f]{32}) ([0-9a-f]{16})\n")


def rank_folder(rank: int) -> str:
    """What the store of a rank's parts is called in the folder ``ranks``."""
    return f"{rank:06d}"


def rank_of_folder(name: str) -> int | None:
    """Whose parts are in the store of that name; None where it is no such name."""
    return int(name) if _RANK.fullmatch(name) else None


def marker_of(store_id: str) -> bytes:
    """What is in a store's marker."""
    text = f"{MARKER} {_VERSION} {store_id} ".encode()
    return text + b"%016x\n" % xxh64(text)


class BaseStore:
    """A store whose manifests are read by `catalog` and `read_manifest`, which its kind has."""

    store_id: str
    held_nbytes = 0
    """See `Store.held_nbytes`."""
    _damage: str | None = None

    @property
    def name(self) -> str:
        """For messages."""
        raise NotImplementedError

    def catalog(self) -> tuple[Kept, ...]:
        """The manifests that are there, oldest first."""
        raise NotImplementedError

    def read_manifest(self, kept: Kept) -> bytes:
        """The bytes of a manifest; one that is longer than any comes cut short.

        Raises:
            NoSuchGeneration: it is not there.
            DamagedCheckpoint: it is there, and cannot be read.
        """
        raise NotImplementedError

    # ---- which store it is

    def id_of_marker(self, data: bytes, where: str) -> str:
        """The store's id. A marker that is damaged does not take its checkpoints with it: each has the id.

        Args:
            data: the marker's bytes.
            where: it is.
        """
        found = _MARKER.fullmatch(data)
        if found is None or b"%016x" % xxh64(data[:-17]) != found[3]:
            damage = f"{where} is not what was written"
            return self.id_of_manifests(
                damage, DamagedCheckpoint(f"{damage}, and no checkpoint is there to be read", damage=(damage,))
            )
        if int(found[1]) != _VERSION:
            raise InvalidCheckpoint(
                f"{self.name} is a store of version {int(found[1])}, this library knows version {_VERSION}: update it"
            )
        return found[2].decode()

    def id_of_manifests(self, damage: str, otherwise: Exception) -> str:
        """The store's id from the newest manifest that is whole; where there is none, the other error is raised."""
        for kept in reversed(self.catalog()):
            try:
                store_id = Manifest.decode(self.read_manifest(kept)).store_id
            except (DamagedCheckpoint, InvalidCheckpoint):
                continue
            self._damage = damage
            return store_id
        raise otherwise

    def damage(self) -> tuple[str, ...]:
        """What is wrong with its marker, if anything."""
        return () if self._damage is None else (self._damage,)

    def repaired(self) -> None:
        """A writer wrote the marker anew."""
        self._damage = None

    # ---- which manifest is meant

    def manifest(self, generation: int | None = None, revision: int | None = None) -> Manifest:
        """Read a manifest: see `Store.manifest`."""
        catalog = self.catalog()
        wanted = generation if generation is not None else max(catalog, default=Kept(0, 0)).generation
        revisions = [kept for kept in catalog if kept.generation == wanted and revision in (None, kept.revision)]
        if not revisions:
            raise self._no_such(generation, revision, catalog)
        problem: DamagedCheckpoint | None = None
        for kept in reversed(revisions):
            try:
                return self.read(kept)
            except DamagedCheckpoint as error:
                problem = problem or error
        assert problem is not None
        raise problem

    def read(self, kept: Kept) -> Manifest:
        """Read one manifest; raises as `manifest`."""
        what = f"{MANIFESTS}/{manifest_name(*kept)} of {self.name}"
        try:
            manifest = Manifest.decode(self.read_manifest(kept), what)
        except DamagedCheckpoint as error:
            error.generation = kept.generation
            raise
        if manifest.store_id != self.store_id:
            raise InvalidCheckpoint(f"{what} cannot be: it is of another store")
        if (manifest.generation, manifest.revision) != kept:
            raise InvalidCheckpoint(
                f"{what} cannot be: it says that it is generation {manifest.generation}, revision {manifest.revision}"
            )
        return manifest

    def _no_such(self, generation: int | None, revision: int | None, catalog: Sequence[Kept]) -> NoSuchGeneration:
        numbers = sorted({kept.generation for kept in catalog})
        if not numbers:
            return NoSuchGeneration(f"the store {self.name} has no checkpoint yet")
        shown = ", ".join(map(str, numbers if len(numbers) <= 12 else [*numbers[:3], "…", *numbers[-6:]]))
        which = f"{generation}" if revision is None else f"{generation}, revision {revision}"
        return NoSuchGeneration(f"the store {self.name} has no generation {which}; it has {shown}")

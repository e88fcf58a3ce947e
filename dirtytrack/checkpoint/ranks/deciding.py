# SPDX-License-Identifier: MIT
"""What rank 0 does in a round: whether all is there and fits together, and then the manifest, which is the commit."""

from __future__ import annotations

import logging
from itertools import groupby
from typing import TYPE_CHECKING, Any

from ...errors import DirtyTrackError, RanksDisagree
from ..chains import removable
from ..manifests import Manifest
from ..ranked import Joined, PartEntry
from .layout import joined_regions, offer_of
from .rounds import Verdict, named_ranks

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ..chains import Retention
    from ..protocols import Store, Writer
    from .layout import Offer

__all__ = ["Deciding"]

_log = logging.getLogger("dirtytrack")


class Deciding:
    """From what all ranks said to what comes of it; called at rank 0, for one round after the other.

    A manifest that names parts is published when all of them are durable, and only then does anybody hear that it is
    there. What is to go, goes here first, and durably: the ranks remove their parts when they hear what is kept.

    Args:
        store, writer: that of all, and the right to write to it.
        run: 32 hexadecimal digits.
        parent: the generation that was resumed from, or None.
        retain: which generations are kept.
    """

    def __init__(self, store: Store, writer: Writer, run: str, parent: int | None, retain: Retention | None) -> None:
        self._store, self._writer, self._run = store, writer, run
        self._parent, self._retain = parent, retain

    def __call__(self, generation: int, said: Sequence[Mapping[str, Any]]) -> Verdict:
        """What comes of a generation.

        Args:
            generation: which.
            said: by each rank.
        """
        for kind in ("left", "failed"):
            ranks = [rank for rank, each in enumerate(said) if each["says"] == kind]
            if ranks:
                first = next((said[rank] for rank in ranks if said[rank]["why"]), said[ranks[0]])
                return Verdict(kind, tuple(ranks), first["why"] or "", first.get("errno"))
        try:
            manifest = self._manifest(generation, said)
        except RanksDisagree as error:
            return Verdict("disagree", says=str(error))
        self._writer.publish(manifest)
        self._parent = generation
        return Verdict("committed", kept=self._kept())

    def _manifest(self, generation: int, said: Sequence[Mapping[str, Any]]) -> Manifest:
        first = said[0]
        _require_same(said, "generation", "they save different generations: did each rank call save() as often?")
        _require_same(said, "meta_sha256", "they gave different meta: are they at the same step?")
        _require_same(said, "how", "different buffers are partitioned or replicated")
        offers = [{each.name: each for each in map(offer_of, rank["regions"])} for rank in said]
        regions, joined = joined_regions(offers, first["how"], generation)
        return Manifest(
            store_id=self._store.store_id,
            generation=generation,
            revision=0,
            parent=self._parent,
            created=first["created"],
            kind="full" if all(each["kind"] in ("full", None) for each in said) else "increment",
            page_bytes=first["page_bytes"],
            meta=first["meta"],
            regions=regions,
            segments=(),
            ranks=Joined(self._run, tuple(map(_part, said, offers)), joined),
        )

    def _kept(self) -> tuple[tuple[int, int], ...]:
        if self._retain is not None:
            try:
                gone = removable(self._store, self._retain, whole=self._parent)
                if gone:  # else, while somebody reads, another time
                    self._writer.remove(gone)
            except DirtyTrackError as error:
                _log.warning("older generations were not removed: %s", error)
        return _stretches(sorted({kept.generation for kept in self._store.catalog()}))


def _require_same(said: Sequence[Mapping[str, Any]], what: str, problem: str) -> None:
    other = [rank for rank, each in enumerate(said) if each[what] != said[0][what]]
    if other:
        raise RanksDisagree(f"rank 0 and {named_ranks(other)} disagree: {problem}")


def _part(said: Mapping[str, Any], offers: Mapping[str, Offer]) -> PartEntry | None:
    if not offers:
        return None
    return PartEntry(said["store_id"], said["written_nbytes"], said["stored_nbytes"], said["segment_count"])


def _stretches(numbers: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Numbers in order, as first and last of those that follow one another."""
    found = []
    for _, group in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        members = [number for _, number in group]
        found.append((members[0], members[-1]))
    return tuple(found)

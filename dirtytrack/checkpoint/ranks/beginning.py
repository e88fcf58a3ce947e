# SPDX-License-Identifier: MIT
"""How ranks begin to save together: step by step, each of which all can do, or none goes on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...errors import DamagedCheckpoint, InvalidCheckpoint, InvalidMemory, RanksDisagree
from ..buffers import describe
from ..chains import Retention
from ..coding import Decoder
from ..joining import opened_part, part_manifests
from ..ranked import Joined, Part
from ..restoring import State
from ..store import open_store
from .deciding import Deciding
from .layout import how_shared, joined_regions, misfitting, offer_of, shares_of
from .parts import Agreement, AsAgreed, NoPart, PartCheckpointer, PartStore
from .rounds import Rounds, agreed, named_ranks
from .sharing import filled, joined_manifest

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from contextlib import ExitStack

    from ..buffers import Described, Saveable
    from ..manifests import Manifest
    from ..protocols import Store, Writer
    from .communicators import Communicator
    from .layout import Share

__all__ = ["Beginning", "made_part"]


def made_part(
    agreement: Agreement,
    store: Store,
    buffers: Mapping[str, Saveable],
    options: Mapping[str, Any],
    *,
    resume: bool | int = False,
) -> PartCheckpointer:
    """What saves a rank's part, to that store of its own."""
    return PartCheckpointer(PartStore(store, agreement), buffers, resume=resume, retain=AsAgreed(agreement), **options)


class Beginning:
    """What a rank needs to save with the others.

    Args:
        comm: by what they talk.
        stack: lets go of what was opened.
        partition, replicated, resume, retain, options: see `coordinated`.

    Attributes:
        store: that of all ranks.
        part: what saves this rank's part.
        rounds: in which they are committed.
        agreement: what the part and the rounds know of the ranks.
        state: what was resumed from.
    """

    part: PartCheckpointer | NoPart
    rounds: Rounds
    agreement: Agreement
    store: Store

    def __init__(
        self,
        comm: Communicator,
        stack: ExitStack,
        partition: Mapping[str, int] | None,
        replicated: Collection[str],
        resume: bool | int,
        retain: Retention | None,
        options: dict[str, Any],
    ) -> None:
        self._comm, self._stack = comm, stack
        self._partition, self._replicated = partition, replicated
        self._resume, self._retain, self._options = resume, retain, options
        self.state: State | None = None
        self._buffers: dict[str, Saveable] = {}
        self._described: dict[str, Described] = {}
        self._how: dict[str, Any] = {}
        self._sizes: list[dict[str, int]] = []
        self._part_store: Store | None = None
        self._writer: Writer | None = None

    def begin(self, store: Store | str | os.PathLike[str], buffers: Mapping[str, Saveable]) -> None:
        """Take all steps. Raises as `coordinated`."""
        comm = self._comm
        self._require_alike(agreed(comm, "begin to save together", lambda: self._describe(buffers)))
        run, store_id = agreed(comm, "open the store", lambda: self._open(store) if not comm.rank else None)[0]
        agreed(comm, "open its part of the store", lambda: self._open_part(store, store_id))
        generation = agreed(comm, "find what to go on from", lambda: self._newest() if not comm.rank else None)[0]
        agreement = self.agreement = Agreement(Part(run, comm.rank, comm.size), self._how, self.store)
        goes_on = False
        if generation is not None:
            goes_on = all(agreed(comm, "go on from where it was", lambda: self._goes_on(generation)))
        following = agreed(
            comm,
            "begin to save" if generation is None else "fill its buffers",
            lambda: self._make(agreement, generation, goes_on),
        )
        decide = None
        if self._writer is not None:
            decide = Deciding(self.store, self._writer, run, generation, self._retain)
        self.rounds = agreement.rounds = Rounds(comm, max(following), decide)

    # ---- the steps

    def _describe(self, buffers: Any) -> dict[str, Any]:
        if not isinstance(buffers, Mapping):
            raise InvalidMemory("the buffers are a mapping from names to buffers, which may be empty at some ranks")
        if type(self._resume) not in (bool, int):
            raise InvalidCheckpoint(f"resume= is True, False or the number of a generation, not {self._resume!r}")
        if self._retain is not None and not isinstance(self._retain, Retention):
            raise InvalidCheckpoint(f"retain= is a Retention, as Retention(last=10), not {self._retain!r}")
        if self._options.get("when_busy", "wait") != "wait":
            raise InvalidCheckpoint(
                'when_busy= is "wait" where many ranks save together: whether to skip one, they would have to ask each '
                "other"
            )
        self._buffers = dict(buffers)
        self._described = {name: describe(name, buffer) for name, buffer in buffers.items()}
        self._how = dict(how_shared(self._described, self._partition, self._replicated))
        return {
            "how": self._how,
            "resume": self._resume,
            "offers": [[each.name, each.nbytes, each.dtype, each.shape] for each in self._described.values()],
        }

    def _require_alike(self, told: Sequence[Mapping[str, Any]]) -> None:
        for what, says in (
            ("how", "partition= or replicated="),
            ("resume", "resume="),
        ):
            other = [rank for rank, each in enumerate(told) if each[what] != told[0][what]]
            if other:
                raise RanksDisagree(
                    f"{says} is another at {named_ranks(other)} than at rank 0: all ranks give the same"
                )
        offers = [{each.name: each for each in map(offer_of, rank["offers"])} for rank in told]
        self._sizes = [{name: each.nbytes for name, each in offer.items()} for offer in offers]
        for name, how in self._how.items():
            if how != "replicated":
                continue
            for rank, offer in enumerate(offers):
                if offer.get(name) != offers[0].get(name):
                    raise RanksDisagree(
                        f"{name!r} is replicated, and at {named_ranks([rank])} of another length, type or shape than "
                        "at rank 0"
                    )
        joined_regions([self._saved(offer, rank) for rank, offer in enumerate(offers)], self._how, 1)
        if not any(offers):
            raise InvalidMemory("no rank gave any buffer: one at least is to be saved")

    def _saved(self, offers: Mapping[str, Any], rank: int) -> dict[str, Any]:
        """Of what a rank has, what it saves."""
        return {name: each for name, each in offers.items() if not rank or self._how.get(name) != "replicated"}

    def _open(self, store: Store | str | os.PathLike[str]) -> tuple[str, str]:
        self.store = self._stack.enter_context(open_store(store, create=True))
        self._writer = self._stack.enter_context(self.store.writer())
        return os.urandom(16).hex(), self.store.store_id

    def _open_part(self, store: Store | str | os.PathLike[str], store_id: str) -> None:
        if self._comm.rank:
            self.store = self._stack.enter_context(open_store(store))
        if self.store.store_id != store_id:
            raise RanksDisagree(
                f"{self.store.name} is another store here than at rank 0: is it a path that all ranks see the same "
                "directory by?"
            )
        if self._saved(self._described, self._comm.rank):
            self._part_store = self.store.part(self._comm.rank, create=True)
            self._stack.callback(self._part_store.close)

    def _newest(self) -> int | None:
        if self._resume is False or (self._resume is True and not self.store.catalog()):
            return None
        return joined_manifest(self.store, None if self._resume is True else self._resume).generation

    def _goes_on(self, generation: int) -> bool:
        """Whether this rank has the same as its part of that generation."""
        manifest = joined_manifest(self.store, generation)
        joined = manifest.ranks
        assert isinstance(joined, Joined)
        self._require_same_kinds(manifest, joined)
        if joined.size != self._comm.size:
            return False
        saved = self._saved(self._described, self._comm.rank)
        entry = joined.parts[self._comm.rank]
        if entry is None or self._part_store is None:
            return entry is None and self._part_store is None
        if entry.store_id != self._part_store.store_id:
            raise DamagedCheckpoint(
                f"{self._part_store.name} is another store than the one that rank {self._comm.rank} saved generation "
                f"{generation} to",
                generation=generation,
            )
        with opened_part(self.store, manifest, self._comm.rank) as part:
            made = next(part_manifests(part, manifest, self._comm.rank))
        return {region.name: region.nbytes for region in made.regions} == {
            name: each.nbytes for name, each in saved.items()
        }

    def _require_same_kinds(self, manifest: Manifest, joined: Joined) -> None:
        """What is shared is so as it was, and nothing is lacking."""
        for told in joined.regions:
            if told.how == "own" and (told.first != self._comm.rank or joined.size != self._comm.size):
                continue
            if told.name not in self._described:
                raise InvalidMemory(
                    f"to go on from a generation all of its buffers must be given, and there is none for "
                    f"{told.name!r}: pass it too, or restore_share() what you need and begin anew"
                )
            now = self._how.get(told.name, "own")
            if now != told.how:
                raise InvalidCheckpoint(
                    f"{told.name!r} is {told.how} in generation {manifest.generation}, and was given as {now}"
                )

    def _make(self, agreement: Agreement, generation: int | None, goes_on: bool) -> int:
        comm = self._comm
        decrypt, threads = self._options.get("decrypt"), self._options.get("threads")
        saved = {name: self._buffers[name] for name in self._saved(self._described, comm.rank)}
        manifest = None if generation is None else joined_manifest(self.store, generation)
        if manifest is not None:
            shares = self._shares(manifest)
            # What this rank saves, its Checkpointer fills itself, and knows what it goes on from.
            wanted = {name: share for name, share in shares.items() if not goes_on or name not in saved}
            with self.store.reading():
                filled(self.store, manifest, wanted, self._described, Decoder(decrypt), threads)
            self.state = State(manifest, {name: self._buffers[name] for name in shares})
        if self._part_store is None:
            self.part = NoPart(agreement)
            return self._following()
        self.part = made_part(
            agreement,
            self._part_store,
            saved,
            self._options,
            resume=generation if goes_on and generation is not None else False,
        )
        self._stack.callback(self.part.close)
        return max(self._following(), self.part.following)

    def _shares(self, manifest: Manifest) -> dict[str, Share]:
        shares = shares_of(manifest, self._comm.rank, self._comm.size, self._sizes, None)
        more = [name for name in self._described if name not in shares]
        if more:
            raise InvalidMemory(
                f"generation {manifest.generation} has no buffer {more[0]!r}: a program goes on with the buffers that "
                "it had"
            )
        if problems := misfitting(shares, self._described):
            raise InvalidMemory(
                f"generation {manifest.generation} does not fit into these buffers, which are as they were: "
                + "; ".join(problems)
            )
        return shares

    def _following(self) -> int:
        return 1 if self._writer is None else self._writer.next_generation()

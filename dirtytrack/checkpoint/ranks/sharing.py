# SPDX-License-Identifier: MIT
"""What a rank gets of a generation that ranks saved, as many or others."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

from ...errors import InvalidCheckpoint, InvalidMemory
from ...memory import allocate
from ..buffers import array_of, describe
from ..coding import Decoder
from ..crew import Crew
from ..joining import JoinedGeneration
from ..ranked import Joined
from ..reading import Target, Window, letting_go, reading_threads, target_of
from ..restoring import State
from ..store import open_store
from .communicators import communicator_of
from .layout import misfitting, shares_of
from .rounds import agreed

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    from ..buffers import Described, Saveable
    from ..manifests import Manifest
    from ..protocols import Store
    from .layout import Share

__all__ = ["filled", "joined_manifest", "restore_share"]


def joined_manifest(store: Store, generation: int | None) -> Manifest:
    """The manifest of a generation that ranks saved.

    Raises:
        NoSuchGeneration, DamagedCheckpoint: it is not there, or not as it was written.
        InvalidCheckpoint: one process saved it.
    """
    manifest = store.manifest(generation)
    if not isinstance(manifest.ranks, Joined):
        raise InvalidCheckpoint(
            f"generation {manifest.generation} of {store.name} is none that ranks saved together: restore() it"
        )
    return manifest


def restore_share(
    comm: Any,
    store: Store | str | os.PathLike[str],
    *,
    generation: int | None = None,
    names: Sequence[str] | None = None,
    into: Mapping[str, Saveable] | None = None,
    decrypt: Callable[[bytes], bytes] | None = None,
    threads: int | None = None,
) -> State:
    """Bring this rank's share of a generation back, at every rank: of partitioned buffers its part, all of replicated
    ones, and what was its own. All ranks of the communicator call this together, as many as saved it or others.

    Of a partitioned buffer, each rank reads only the bytes that are its share: whole frames of them, of about a
    megabyte each, from the parts of the ranks that saved them.

    Args:
        comm: by what the ranks talk: see `coordinated`.
        store: it, or its path, which may be another one at each rank, but of the same store.
        generation: which; the newest where it is left out.
        names: of the buffers; all where it is left out.
        into: this rank's buffers by name; only those are restored. Together, the ranks' parts of a partitioned buffer
            must have room for exactly what there is, divided between any two rows. Left out: new memory, and rows are
            divided evenly, the first ranks having one more where that does not come out even.
        decrypt, threads: as of `restore`.

    Returns:
        A `State`, by the names that the ranks gave.

    Raises:
        RankFailed, RankLost: another rank could not have its share; or the ranks do not reach one another.
        InvalidCheckpoint: it was saved by one process; or there is what is each rank's own, of another number of ranks;
            or fewer rows than ranks.
        InvalidMemory: the buffers do not fit.
        NoSuchGeneration, DamagedCheckpoint, PermissionDenied, StoreFailed, UnsupportedKernel: as of `restore`.

    Thread safety: as the communicator's. The kernel need not track.
    """
    talking = communicator_of(comm)
    try:
        given = None if into is None else {name: describe(name, buffer) for name, buffer in into.items()}
        with letting_go(), open_store(store) as opened, opened.reading():
            found: dict[str, State] = {}
            told = agreed(
                talking,
                "begin to restore",
                lambda: [
                    opened.store_id,
                    joined_manifest(opened, generation).generation if not talking.rank else 0,
                    None if given is None else {name: each.nbytes for name, each in given.items()},
                ],
            )
            sizes = None if given is None else [each[2] or {} for each in told]

            def restore_mine() -> None:
                if opened.store_id != told[0][0]:
                    raise InvalidCheckpoint(f"{opened.name} is another store than that of rank 0")
                manifest = joined_manifest(opened, told[0][1])
                wanted = given if given is not None else names
                shares = shares_of(manifest, talking.rank, talking.size, sizes, wanted)
                _require_there(shares, wanted, manifest)
                found["mine"] = _restored(opened, manifest, shares, into, given, Decoder(decrypt), threads)

            agreed(talking, "restore its share", restore_mine)
            return found["mine"]
    finally:
        talking.close()


def _require_there(shares: Mapping[str, Share], wanted: Any, manifest: Manifest) -> None:
    for name in wanted or ():
        if name not in shares:
            there = ", ".join(map(repr, list(shares)[:8])) or "none of these"
            raise InvalidCheckpoint(f"generation {manifest.generation} has no buffer {name!r} for this rank; {there}")


def _restored(
    store: Store,
    manifest: Manifest,
    shares: Mapping[str, Share],
    into: Mapping[str, Saveable] | None,
    given: Mapping[str, Described] | None,
    decoder: Decoder,
    threads: int | None,
) -> State:
    if given is not None:
        assert into is not None
        filled(store, manifest, shares, given, decoder, threads)
        return State(manifest, into)
    memories = {name: allocate(share.high - share.low) for name, share in shares.items()}
    targets = {name: target_of(memory, fresh=True) for name, memory in memories.items()}
    _read(store, manifest, shares, targets, decoder, threads)
    arrays = {
        name: array_of(memoryview(memories[name])[: share.entry.nbytes], share.entry.dtype, share.entry.shape)
        for name, share in shares.items()
    }
    return State(manifest, arrays)


def filled(
    store: Store,
    manifest: Manifest,
    shares: Mapping[str, Share],
    given: Mapping[str, Described],
    decoder: Decoder,
    threads: int | None,
) -> None:
    """Fill buffers with a rank's shares; whether they fit is known before a byte is overwritten.

    Raises:
        InvalidMemory: they do not fit.
        DamagedCheckpoint, InvalidCheckpoint, StoreFailed: as of `JoinedGeneration`.
    """
    if problems := misfitting(shares, {name: each for name, each in given.items() if name in shares}):
        raise InvalidMemory(
            f"generation {manifest.generation} does not fit into these buffers, which are as they were: "
            + "; ".join(problems)
        )
    targets = {
        name: Target(each.address, each.nbytes, None) if each.hold is None else target_of(each.tracked)
        for name, each in given.items()
        if name in shares
    }
    _read(store, manifest, shares, targets, decoder, threads)


def _read(
    store: Store,
    manifest: Manifest,
    shares: Mapping[str, Share],
    targets: Mapping[str, Target],
    decoder: Decoder,
    threads: int | None,
) -> None:
    spans = {share.region.name: (share.low, share.high) for share in shares.values()}
    with (
        closing(JoinedGeneration(store, manifest, spans.keys(), decoder, spans=spans)) as found,
        Crew(reading_threads() if threads is None else threads) as crew,
    ):
        windows = [
            Window(share.region, share.low, targets[name].first(share.high - share.low))
            for name, share in shares.items()
        ]
        found.read(windows, crew)

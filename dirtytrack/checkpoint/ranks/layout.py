# SPDX-License-Identifier: MIT
"""What the ranks' buffers are together: which are parts of one, which are the same at all, which are a rank's own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ...errors import InvalidCheckpoint, InvalidMemory, RanksDisagree
from ..buffers import misfits
from ..manifests import RegionEntry
from ..ranked import Joined, JoinedRegion
from .rounds import named_ranks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..buffers import Described
    from ..manifests import Manifest

    How = Literal["partitioned", "replicated", "own"]

__all__ = [
    "Offer",
    "Share",
    "divided",
    "how_shared",
    "joined_regions",
    "misfitting",
    "offer_of",
    "own_name",
    "shares_of",
]


class Offer(NamedTuple):
    """A rank's buffer, as others hear of it."""

    name: str
    nbytes: int
    dtype: str | None
    shape: tuple[int, ...] | None

    @property
    def row(self) -> tuple[str | None, tuple[int, ...] | None]:
        """What is the same of all parts of a buffer."""
        return self.dtype, None if self.shape is None else self.shape[1:]


def offer_of(given: Sequence[Any]) -> Offer:
    """An offer that has travelled."""
    name, nbytes, dtype, shape = given
    return Offer(name, nbytes, dtype, None if shape is None else tuple(shape))


def own_name(name: str, rank: int) -> str:
    """What a buffer is called of which each rank has one of its own."""
    return f"{name}[{rank}]"


def how_shared(
    buffers: Mapping[str, Described], partition: Any, replicated: Any
) -> dict[str, Literal["partitioned", "replicated"]]:
    """Which buffers are shared between ranks, and how, from what a program says; sorted by name.

    Raises:
        InvalidCheckpoint: it makes no sense.
    """
    if partition is not None and not isinstance(partition, Mapping):
        raise InvalidCheckpoint(f'partition= tells by name along which axis, as {{"grid": 0}}, not {partition!r:.100}')
    if isinstance(replicated, str) or not isinstance(replicated, Collection):
        raise InvalidCheckpoint(f'replicated= is a collection of names, as {{"weights"}}, not {replicated!r:.100}')
    found: dict[str, Literal["partitioned", "replicated"]] = {}
    for name, axis in (partition or {}).items():
        if axis != 0 or type(axis) is not int:
            raise InvalidCheckpoint(
                f"partition= says that {name!r} is divided along axis {axis!r}: buffers are divided along their first "
                "axis, which is 0; save what is divided otherwise as each rank's own"
            )
        found[name] = "partitioned"
    for name in replicated:
        if name in found:
            raise InvalidCheckpoint(f"{name!r} is either partitioned or replicated")
        found[name] = "replicated"
    for name, how in found.items():
        if name not in buffers:
            there = ", ".join(map(repr, list(buffers)[:8]))
            raise InvalidCheckpoint(f"there is no buffer {name!r} to be {how}; there are {there}")
        if how == "partitioned" and buffers[name].shape == ():
            raise InvalidCheckpoint(f"{name!r} has no axis along which it could be partitioned")
    return dict(sorted(found.items()))


# ---- joined


def joined_regions(
    offers: Sequence[Mapping[str, Offer]], how: Mapping[str, str], generation: int
) -> tuple[tuple[RegionEntry, ...], tuple[JoinedRegion, ...]]:
    """What the ranks' buffers are together.

    Args:
        offers: of each rank, by name. Of what is replicated only rank 0's count.
        how: those that are shared, and how.
        generation: that they are to be of.

    Raises:
        RanksDisagree: they do not fit together.
    """
    regions: list[RegionEntry] = []
    joined: list[JoinedRegion] = []

    def add(told: JoinedRegion, name: str, first: Offer, shape: tuple[int, ...] | None) -> None:
        regions.append(RegionEntry(len(regions), name, sum(told.nbytes), first.dtype, shape, generation))
        joined.append(told)

    for name, kind in how.items():
        having = offers[:1] if kind == "replicated" else offers
        lacking = [rank for rank, offer in enumerate(having) if name not in offer]
        if lacking:
            raise RanksDisagree(f"{named_ranks(lacking)} has no buffer {name!r}, which is {kind}")
        first = offers[0][name]
        if kind == "replicated":
            add(JoinedRegion(name, "replicated", 0, (first.nbytes,)), name, first, first.shape)
            continue
        parts = [offer[name] for offer in offers]
        for rank, part in enumerate(parts):
            if part.row != first.row:
                raise RanksDisagree(
                    f"{name!r} is partitioned along its first axis, and all else of it must be the same at all ranks: "
                    f"at rank 0 it is {_kind(first)}, at rank {rank} {_kind(part)}"
                )
        shape = None
        if first.shape is not None:
            shape = (sum(part.shape[0] for part in parts if part.shape), *first.shape[1:])
        add(JoinedRegion(name, "partitioned", 0, tuple(part.nbytes for part in parts)), name, first, shape)
    for rank, offer in enumerate(offers):
        for name, own in offer.items():
            if name not in how:
                add(JoinedRegion(name, "own", rank, (own.nbytes,)), own_name(name, rank), own, own.shape)
    names = [region.name for region in regions]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RanksDisagree(f"two buffers would be called {twice!r}: call one of them otherwise")
    return tuple(regions), tuple(joined)


def _kind(offer: Offer) -> str:
    return f"{offer.dtype or 'bytes'} of shape {offer.shape}" if offer.shape is not None else offer.dtype or "bytes"


# ---- divided again


class Share(NamedTuple):
    """What a rank is to have of a region."""

    name: str
    """What the rank calls it."""
    region: RegionEntry
    """Of the generation."""
    low: int
    high: int

    @property
    def entry(self) -> RegionEntry:
        """As a region of its own."""
        shape, nbytes = self.region.shape, self.high - self.low
        if shape and nbytes != self.region.nbytes:
            shape = (nbytes * shape[0] // self.region.nbytes, *shape[1:])
        return replace(self.region, name=self.name, nbytes=nbytes, shape=shape)


def divided(region: RegionEntry, size: int) -> list[int]:
    """How many bytes each of so many ranks has where nobody says: as many rows each, or one more at the first ranks.

    Raises:
        InvalidCheckpoint: there are fewer rows than ranks.
    """
    rows = region.nbytes if not region.shape else region.shape[0]
    if rows < size:
        raise InvalidCheckpoint(
            f"{region.name!r} has {rows} rows, which cannot be divided among {size} ranks: each must have one at least"
        )
    row = region.nbytes // rows
    return [(rows // size + (rank < rows % size)) * row for rank in range(size)]


def shares_of(
    manifest: Manifest, rank: int, size: int, given: Sequence[Mapping[str, int]] | None, names: Collection[str] | None
) -> dict[str, Share]:
    """What a rank is to have of a generation, by the name that it calls it.

    Args:
        manifest: of the generation.
        rank, size: which of how many ranks.
        given: for each rank, how many bytes its buffers have; None: divided evenly.
        names: which; None: all.

    Raises:
        InvalidCheckpoint: what there is cannot be divided so.
        InvalidMemory: the given buffers have room for more or for less.
    """
    joined = manifest.ranks
    assert isinstance(joined, Joined)
    found: dict[str, Share] = {}
    others: dict[str, int] = {}
    for region, told in zip(manifest.regions, joined.regions, strict=True):
        if names is not None and told.name not in names:
            continue
        if told.how == "replicated":
            found[told.name] = Share(told.name, region, 0, region.nbytes)
        elif told.how == "own":
            others[told.name] = others.get(told.name, 0) + 1
            if told.first == rank and joined.size == size:
                found[told.name] = Share(told.name, region, 0, region.nbytes)
        else:
            parts = divided(region, size) if given is None else [each.get(told.name, 0) for each in given]
            if sum(parts) != region.nbytes:
                raise InvalidMemory(
                    f"{told.name!r} has {region.nbytes} bytes in generation {manifest.generation}, and these {size} "
                    f"ranks together have room for {sum(parts)}: all of it must be divided among them"
                )
            found[told.name] = Share(told.name, region, sum(parts[:rank]), sum(parts[: rank + 1]))
    lost = [name for name in others if joined.size != size]
    if lost:
        raise InvalidCheckpoint(
            f"{lost[0]!r} is each rank's own in generation {manifest.generation}, which {joined.size} ranks saved, and "
            f"{size} ranks cannot divide it: go on with {joined.size}; or restore what is partitioned or replicated by "
            f"name, and each rank's own by restore(store)[{own_name(lost[0], 0)!r}] and so on"
        )
    return found


def misfitting(shares: Mapping[str, Share], given: Mapping[str, Described]) -> list[str]:
    """Why these buffers cannot take those shares: see `misfits`."""
    return misfits({name: share.entry for name, share in shares.items()}, given)

# SPDX-License-Identifier: MIT
"""What a manifest says of ranks: which part of a generation this is, or which parts one has."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

from .checking import HEX32, exactly, listed, matches, number, require

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .manifests import RegionEntry, SegmentEntry

__all__ = ["MOST_RANKS", "Joined", "JoinedRegion", "Part", "PartEntry", "ranks_of", "require_ranks"]

MOST_RANKS = 10**6
_MOST_NBYTES = 1 << 56
_HOW = ("partitioned", "replicated", "own")


@dataclass(frozen=True)
class Part:
    """Of a generation in the store of one rank: whose it is, and what it is a part of.

    Attributes:
        run: of which run of a program: 32 hexadecimal digits, drawn at random.
        rank, size: which of how many.
    """

    run: str
    rank: int
    size: int

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"run": self.run, "rank": self.rank, "size": self.size}


@dataclass(frozen=True)
class PartEntry:
    """What a rank has of a generation.

    Attributes:
        store_id: of the store that it is in.
        written_nbytes: that were stored for this generation.
        stored_nbytes, segment_count: of all segments that its part is restored from, when it was saved.
    """

    store_id: str
    written_nbytes: int
    stored_nbytes: int
    segment_count: int


@dataclass(frozen=True)
class JoinedRegion:
    """Where the bytes of a buffer are: with some ranks in a row, one behind the other.

    Attributes:
        name: what it is called there.
        how: ``"partitioned"`` along the first axis, all ranks have a part; ``"replicated"``, the first rank has it for
            all; or one rank's ``"own"``.
        first: the first of the ranks.
        nbytes: how many bytes each of them has.
    """

    name: str
    how: Literal["partitioned", "replicated", "own"]
    first: int
    nbytes: tuple[int, ...]

    def pieces(self) -> list[tuple[int, int, int]]:
        """For each rank: which it is, and where its bytes begin and end."""
        ends = list(accumulate(self.nbytes))
        return [
            (self.first + index, end - nbytes, end)
            for index, (nbytes, end) in enumerate(zip(self.nbytes, ends, strict=True))
        ]


@dataclass(frozen=True)
class Joined:
    """Of a generation that many ranks saved together.

    Attributes:
        run: as in each of its parts.
        parts: by rank; None for one that has no buffer.
        regions: of each region of the manifest, in the same order.
    """

    run: str
    parts: tuple[PartEntry | None, ...]
    regions: tuple[JoinedRegion, ...]

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return len(self.parts)

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "run": self.run,
            "parts": [None if part is None else vars(part) for part in self.parts],
            "regions": [{**vars(region), "nbytes": list(region.nbytes)} for region in self.regions],
        }


# ---- reading


def ranks_of(value: Any) -> Joined | Part | None:
    """What a manifest has as ``ranks``.

    Raises:
        InvalidCheckpoint: it makes no sense.
    """
    if value is None:
        return None
    if isinstance(value, dict) and "rank" in value:
        return Part(**exactly(value, {"run", "rank", "size"}, "ranks"))
    given = exactly(value, {"run", "parts", "regions"}, "ranks")
    parts = [
        None if each is None else PartEntry(**exactly(each, {field.name for field in fields(PartEntry)}, "a part"))
        for each in listed(given["parts"], "parts")
    ]
    regions = []
    for each in listed(given["regions"], "regions of ranks"):
        members = exactly(each, {field.name for field in fields(JoinedRegion)}, "a region of ranks")
        members["nbytes"] = tuple(listed(members["nbytes"], "a region's nbytes"))
        regions.append(JoinedRegion(**members))
    return Joined(given["run"], tuple(parts), tuple(regions))


def require_ranks(
    ranks: Joined | Part | None, regions: Sequence[RegionEntry], segments: Sequence[SegmentEntry]
) -> None:
    """Refuse what a manifest cannot say.

    Raises:
        InvalidCheckpoint.
    """
    if ranks is None:
        return
    matches(HEX32, ranks.run, "a run")
    if isinstance(ranks, Part):
        size = number(ranks.size, 1, MOST_RANKS, "a size")
        number(ranks.rank, 0, size - 1, "a rank")
        return
    number(len(ranks.parts), 1, MOST_RANKS, "how many parts there are")
    require(not segments, "it has parts and segments")
    for part in ranks.parts:
        if part is not None:
            matches(HEX32, part.store_id, "a part's store_id")
            number(part.written_nbytes, 0, _MOST_NBYTES, "a part's written_nbytes")
            number(part.stored_nbytes, 0, _MOST_NBYTES, "a part's stored_nbytes")
            number(part.segment_count, 0, _MOST_NBYTES, "a part's segment_count")
    require(len(ranks.regions) == len(regions), "there are not as many regions of ranks as regions")
    for joined, region in zip(ranks.regions, regions, strict=True):
        _require_region(joined, region, ranks.parts)


def _require_region(joined: JoinedRegion, region: RegionEntry, parts: tuple[PartEntry | None, ...]) -> None:
    require(joined.how in _HOW, f"how is none of {', '.join(_HOW)}")
    name: Any = joined.name
    require(isinstance(name, str) and 0 < len(name) <= 4096, "a region's name in the parts is no string, or too long")
    first = number(joined.first, 0, len(parts) - 1, "the first rank of a region")
    count = number(len(joined.nbytes), 1, len(parts) - first, "how many ranks a region is with")
    if joined.how == "partitioned":
        require(count == len(parts), "a region is partitioned, and not with all ranks")
    else:
        require(count == 1, f"a region is {joined.how}, and with several ranks")
    total = sum(number(nbytes, 1, _MOST_NBYTES, "a region's nbytes with a rank") for nbytes in joined.nbytes)
    require(total == region.nbytes, "what the ranks have of a region is not its nbytes")
    require(None not in parts[first : first + count], "a region is with a rank that has no part")

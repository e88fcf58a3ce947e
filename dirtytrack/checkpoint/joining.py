# SPDX-License-Identifier: MIT
"""Generations that many ranks saved together, read as if one had."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import DamagedCheckpoint, InvalidCheckpoint, NoSuchGeneration
from .ranked import Joined, Part
from .reading import Generation, Target, Window

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from .coding import Decoder
    from .crew import Crew
    from .manifests import Manifest, RegionEntry
    from .protocols import Store
    from .reading import HeldFrames
    from .segments import Frame

__all__ = [
    "AnyGeneration",
    "JoinedGeneration",
    "generation_of",
    "opened_part",
    "part_manifests",
    "parts_of",
    "told_of_part",
]


def generation_of(
    store: Store, manifest: Manifest, names: Collection[str] | None = None, decoder: Decoder | None = None
) -> AnyGeneration:
    """A generation with all that it is read from, whoever saved it; close it.

    Args:
        store, manifest, names, decoder: as of `Generation`.

    Raises:
        DamagedCheckpoint, InvalidCheckpoint, StoreFailed: as of `Generation`.
    """
    if isinstance(manifest.ranks, Joined):
        return JoinedGeneration(store, manifest, names, decoder)
    return Generation(store, manifest, names, decoder)


# ---- the parts


def told_of_part(rank: int, damage: str) -> str:
    """Damage, with whose it is."""
    return f"rank {rank}: {damage}"


def _damaged(manifest: Manifest, damage: Sequence[str]) -> DamagedCheckpoint:
    return DamagedCheckpoint(
        f"generation {manifest.generation} is damaged: {'; '.join(damage)}",
        generation=manifest.generation,
        damage=tuple(damage),
    )


@contextmanager
def opened_part(store: Store, manifest: Manifest, rank: int) -> Iterator[Store]:
    """The store of a rank's part of a generation; while in here, nothing of it is removed.

    Raises:
        DamagedCheckpoint: it is missing, or another one.
    """
    joined = manifest.ranks
    assert isinstance(joined, Joined)
    entry = joined.parts[rank]
    assert entry is not None, "who has no part is not asked for it"
    try:
        part = store.part(rank)
    except InvalidCheckpoint as error:
        raise _damaged(manifest, [told_of_part(rank, f"its part is not there: {error}")]) from error
    except DamagedCheckpoint as error:
        raise _damaged(manifest, [told_of_part(rank, each) for each in error.damage]) from error
    try:
        if part.store_id != entry.store_id:
            raise _damaged(
                manifest, [told_of_part(rank, f"{part.name} is another store than the one that was saved to")]
            )
        with part.reading():
            yield part
    finally:
        part.close()


def part_manifests(part: Store, manifest: Manifest, rank: int) -> Iterator[Manifest]:
    """The manifests of a rank's part of a generation: highest revision first, which all say the same.

    Raises:
        DamagedCheckpoint: there is none, none that can be read, or it is none of that part.
    """
    joined = manifest.ranks
    assert isinstance(joined, Joined)
    revisions = [kept for kept in part.catalog() if kept.generation == manifest.generation]
    problem = DamagedCheckpoint(
        "", damage=(told_of_part(rank, f"{part.name} has no generation {manifest.generation}"),)
    )
    found = 0
    for kept in reversed(revisions):
        try:
            made = part.manifest(*kept)
        except DamagedCheckpoint as error:
            problem.damage = tuple(told_of_part(rank, each) for each in error.damage)
            continue
        except NoSuchGeneration:  # compacted meanwhile; there is a higher one, or was a moment ago
            continue
        if made.ranks != Part(joined.run, rank, joined.size):
            problem.damage = (
                told_of_part(rank, f"generation {manifest.generation} of {part.name} is no part of this one"),
            )
            continue
        found += 1
        yield made
    if not found:
        raise _damaged(manifest, problem.damage)


def parts_of(manifest: Manifest) -> list[int]:
    """The ranks that have a part of a generation."""
    joined = manifest.ranks
    return [rank for rank, entry in enumerate(joined.parts) if entry] if isinstance(joined, Joined) else []


# ---- all of it


class _Piece(NamedTuple):
    """Bytes [low, high) of a joined region, and which region they are of a rank's part."""

    rank: int
    name: str
    low: int
    high: int


class JoinedGeneration:
    """What `Generation` is, of one that many ranks saved: its regions are joined from what the ranks have.

    Args:
        store: that of all; `Store.reading` as long as this is used.
        manifest: of the generation.
        names: of the regions that are looked for; all where left out.
        decoder: for its frames; without one no bytes can be read.
        spans: by name, the bytes [low, high) of a region that will be read; parts that have none of them are not even
            opened. All of it where a name, or all, is left out.

    Raises:
        DamagedCheckpoint: a part is missing, or what it says is not what was written. All that are are told.
        InvalidCheckpoint: what a part says makes no sense.

    Thread safety: one thread at a time.
    """

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        names: Collection[str] | None = None,
        decoder: Decoder | None = None,
        *,
        spans: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        joined = manifest.ranks
        assert isinstance(joined, Joined)
        self.manifest, self._store = manifest, store
        self.regions = tuple(region for region in manifest.regions if names is None or region.name in names)
        self._pieces: dict[int, list[_Piece]] = {}
        wanted: dict[int, list[_Piece]] = {}
        for region, told in zip(manifest.regions, joined.regions, strict=True):
            if names is not None and region.name not in names:
                continue
            begin, end = (spans or {}).get(region.name, (0, region.nbytes))
            self._pieces[region.number] = [_Piece(rank, told.name, low, high) for rank, low, high in told.pieces()]
            for piece in self._pieces[region.number]:
                if piece.low < end and piece.high > begin:
                    wanted.setdefault(piece.rank, []).append(piece)
        self._parts: dict[int, Generation] = {}
        self._regions: dict[int, dict[str, RegionEntry]] = {}
        damage: list[str] = []
        with ExitStack() as stack:
            for rank, pieces in sorted(wanted.items()):
                try:
                    part = stack.enter_context(opened_part(store, manifest, rank))
                    found = self._part(part, rank, pieces, decoder)
                except DamagedCheckpoint as error:
                    damage += error.damage
                else:
                    self._parts[rank] = found
                    self._regions[rank] = {region.name: region for region in found.regions}
            if damage:
                raise _damaged(manifest, damage)
            self._stack = stack.pop_all()

    def _part(self, part: Store, rank: int, pieces: Sequence[_Piece], decoder: Decoder | None) -> Generation:
        problem: DamagedCheckpoint | None = None
        for made in part_manifests(part, self.manifest, rank):
            there = {region.name: region.nbytes for region in made.regions}
            for piece in pieces:
                if there.get(piece.name) != piece.high - piece.low:
                    raise InvalidCheckpoint(
                        f"generation {self.manifest.generation} of {self._store.name} cannot be restored: rank {rank} "
                        f"is to have {piece.high - piece.low} bytes of {piece.name!r}, and has {there.get(piece.name)}"
                    )
            try:
                return Generation(part, made, {piece.name for piece in pieces}, decoder)
            except DamagedCheckpoint as error:
                problem = problem or error
        assert problem is not None, "it has a manifest"
        raise _damaged(self.manifest, [told_of_part(rank, each) for each in problem.damage]) from problem

    def close(self) -> None:
        """Let go of the parts."""
        self._stack.close()

    @property
    def segment_count(self) -> int:
        """How many segments it is read from."""
        return sum(part.segment_count for part in self._parts.values())

    def frames(self) -> Iterator[Frame]:
        """Those that count, of one part after the other."""
        for part in self._parts.values():
            yield from part.frames()

    def _within(self, number: int, low: int, high: int) -> Iterator[tuple[Generation, RegionEntry, int, int, int]]:
        """Of bytes [low, high) of a region: the parts that have them, as which region, from where to where in it, and
        where that begins from ``low``."""
        for piece in self._pieces[number]:
            begin, end = max(low, piece.low), min(high, piece.high)
            if begin < end:
                region = self._regions[piece.rank][piece.name]
                yield self._parts[piece.rank], region, begin - piece.low, end - piece.low, begin - low

    def told_nbytes(self, number: int) -> int:
        """As of `Generation`."""
        nbytes = sum(piece.high - piece.low for piece in self._pieces[number])
        return sum(part.told_nbytes(region.number) for part, region, *_ in self._within(number, 0, nbytes))

    def touched(self, number: int, low: int, high: int, since: int = 0, *, but_zeros: bool = False) -> bool:
        """As of `Generation`; ``since`` is 0."""
        return any(
            part.touched(region.number, begin, end, since, but_zeros=but_zeros)
            for part, region, begin, end, _ in self._within(number, low, high)
        )

    def read(
        self,
        windows: Sequence[Window],
        crew: Crew,
        held: HeldFrames | None = None,
        count: Callable[[int], object] = int,
    ) -> None:
        """As of `Generation`; what is held is not used."""
        shares: dict[int, list[Window]] = {}
        for window in windows:
            region, low, target = window
            for piece in self._pieces[region.number]:
                begin, end = max(low, piece.low), min(low + target.nbytes, piece.high)
                if begin < end:
                    shares.setdefault(piece.rank, []).append(
                        Window(
                            self._regions[piece.rank][piece.name],
                            begin - piece.low,
                            _slice(target, begin - low, end - low),
                        )
                    )
        for rank, share in sorted(shares.items()):
            try:
                self._parts[rank].read(share, crew, None, count)
            except DamagedCheckpoint as error:
                raise _damaged(self.manifest, [told_of_part(rank, each) for each in error.damage]) from error


def _slice(target: Target, low: int, high: int) -> Target:
    view: Any = None if target.view is None else target.view[low:high]
    return Target(target.address + low, high - low, view, target.fresh)


AnyGeneration = Generation | JoinedGeneration
"""A generation, whoever saved it."""

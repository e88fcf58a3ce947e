# SPDX-License-Identifier: MIT
"""Manifests: what a generation consists of. Their format is in docs/checkpoint-format.md."""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass, fields
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal

from ..errors import DamagedCheckpoint, InvalidCheckpoint
from .checking import HEX32 as _HEX32
from .checking import HEX64 as _HEX64
from .checking import exactly as _exactly
from .checking import listed as _list
from .checking import matches as _matches
from .checking import number as _number
from .checking import require as _require
from .programs import require_program
from .ranked import ranks_of, require_ranks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .ranked import Joined, Part

__all__ = [
    "MOST_GENERATION",
    "MOST_MANIFEST_NBYTES",
    "MOST_SEGMENT_NBYTES",
    "Manifest",
    "RegionEntry",
    "SegmentEntry",
    "manifest_name",
    "manifest_of_name",
    "segment_name",
    "segment_of_name",
]

VERSION = 1
MOST_MANIFEST_NBYTES = 16 << 20
MOST_GENERATION = 10**16 - 1
_MOST_REVISION = 10**9 - 1
MOST_SEGMENT_NBYTES = _MOST_NBYTES = 1 << 56  # all of an address space: of a region, of all regions, of a segment
_MAGIC = b"DTMANIFS"
_HEAD = struct.Struct("<8sIIQ")
_KINDS = ("full", "increment", "compacted")
_SEGMENT = re.compile(r"([0-9]{16})-([0-9a-f]{16})\.segment")
_MANIFEST = re.compile(r"([0-9]{16})\.(0|[1-9][0-9]{0,8})\.manifest")


# ---- names


def segment_name(generation: int, segment_id: bytes) -> str:
    """Of a segment's file; the id has 8 bytes."""
    return f"{generation:016d}-{segment_id.hex()}.segment"


def segment_of_name(name: str) -> tuple[int, bytes] | None:
    """Generation and id of a segment's file name, or None where it is none."""
    found = _SEGMENT.fullmatch(name)
    return (int(found[1]), bytes.fromhex(found[2])) if found and int(found[1]) else None


def manifest_name(generation: int, revision: int) -> str:
    """Of a manifest's file."""
    return f"{generation:016d}.{revision}.manifest"


def manifest_of_name(name: str) -> tuple[int, int] | None:
    """Generation and revision of a manifest's file name, or None where it is none."""
    found = _MANIFEST.fullmatch(name)
    return (int(found[1]), int(found[2])) if found and int(found[1]) else None


# ---- what is in them


@dataclass(frozen=True)
class RegionEntry:
    """A buffer, as it was when the generation was made.

    Attributes:
        number: what frames call it; unique, and that of the same name in the generations before.
        name: as the user gave it; unique.
        nbytes: its length.
        dtype, shape: of its elements, or None where they are not known.
        since: the generation from which on frames of this number count: those of older segments are another buffer's.
    """

    number: int
    name: str
    nbytes: int
    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    since: int = 1


@dataclass(frozen=True)
class SegmentEntry:
    """A segment that is needed to restore the generation.

    Attributes:
        name: of its file, in the store's folder ``segments``.
        generation: that it was written for.
        nbytes: of the file.
        index_offset, index_nbytes: where its index is: behind the last frame, up to the file's end.
        index_sha256: of the index, in 64 hexadecimal digits.
    """

    name: str
    generation: int
    nbytes: int
    index_offset: int
    index_nbytes: int
    index_sha256: str


@dataclass(frozen=True)
class Manifest:
    """All that is needed to restore a generation. Immutable; checked when it is made.

    Attributes:
        store_id: of its store, in 32 hexadecimal digits.
        generation, revision: which it is. A generation that was compacted has a higher revision, which says the same
            with other segments.
        parent: the generation that was continued, or None. For information: restoring never looks there.
        created: seconds since 1970.
        kind: what was saved, ``"full"``, ``"increment"`` or ``"compacted"``.
        page_bytes: of the machine that saved it.
        meta: what the user gave, as JSON has it.
        regions: in the order of their numbers.
        segments: oldest generation first; frames of a later one overwrite those of an earlier one.
        ranks: of a generation that many ranks saved together, what each of them has of it, and there are no segments
            here (`Joined`); of what one of them has, which it is (`Part`). None for all else.
        threads: of the image of a process, what it was: docs/checkpoint-format.md. None for any other.

    Raises:
        InvalidCheckpoint: it makes no sense; the message tells where.
    """

    store_id: str
    generation: int
    revision: int
    parent: int | None
    created: float
    kind: Literal["full", "increment", "compacted"]
    page_bytes: int
    meta: Any
    regions: tuple[RegionEntry, ...]
    segments: tuple[SegmentEntry, ...]
    ranks: Joined | Part | None = None
    threads: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        _validate(self)

    @property
    def name(self) -> str:
        """Of its file."""
        return manifest_name(self.generation, self.revision)

    @property
    def nbytes(self) -> int:
        """Of all regions."""
        return sum(region.nbytes for region in self.regions)

    @property
    def stored_nbytes(self) -> int:
        """Of all segments."""
        return sum(segment.nbytes for segment in self.segments)

    def encode(self) -> bytes:
        """What is in its file.

        Raises:
            InvalidCheckpoint: ``meta`` is nothing that JSON knows, or all of it is too long.
        """
        members = {field.name: getattr(self, field.name) for field in fields(self)}
        members["regions"] = [_plain(region) for region in self.regions]
        members["segments"] = [_plain(segment) for segment in self.segments]
        members["ranks"] = None if self.ranks is None else self.ranks.plain()
        body = _json(members)
        head = _HEAD.pack(_MAGIC, VERSION, 0, len(body))
        if len(head) + len(body) + 32 > MOST_MANIFEST_NBYTES:
            raise InvalidCheckpoint(
                f"the manifest of generation {self.generation} would take {len(body)} bytes, {MOST_MANIFEST_NBYTES} "
                "are the most: "
                + (
                    "keep less in meta, or compact, which makes one segment of many"
                    if self.threads is None
                    else f"process {self.threads['pid']} has {len(self.threads['threads'])} threads and "
                    f"{len(self.threads['mappings'])} mappings, whose registers and names are kept there"
                )
            )
        return head + body + sha256(head + body).digest()

    @staticmethod
    def decode(data: bytes, what: str = "the manifest") -> Manifest:
        """Read a manifest; all of it is checked.

        Args:
            data: the file's bytes.
            what: how a message calls it.

        Raises:
            DamagedCheckpoint: it is not what was written.
            InvalidCheckpoint: of another version, or what was written makes no sense.
        """
        members = _members(data, what)
        try:
            return _decoded(members)
        except InvalidCheckpoint as error:
            raise InvalidCheckpoint(f"{what} cannot be: {error}") from error


def _plain(entry: RegionEntry | SegmentEntry) -> dict[str, Any]:
    return {field.name: getattr(entry, field.name) for field in fields(entry)}


def _json(value: Any) -> bytes:
    try:
        text = json.dumps(value, ensure_ascii=True, allow_nan=False, sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"meta is kept as JSON, which has no word for this: {error}") from error
    return text.encode("ascii")


# ---- reading


def _members(data: bytes, what: str) -> dict[str, Any]:
    if len(data) > MOST_MANIFEST_NBYTES:
        raise InvalidCheckpoint(f"{what} has {len(data)} bytes, {MOST_MANIFEST_NBYTES} are the most")
    if len(data) < _HEAD.size + 32 or data[:8] != _MAGIC:
        raise _damaged(what, "it does not begin as one, or is cut short")
    _, version, zero, nbytes = _HEAD.unpack_from(data)
    whole = sha256(data[:-32]).digest() == data[-32:]
    if version != VERSION and whole:
        raise InvalidCheckpoint(f"{what} is of version {version}, this library reads version {VERSION}: update it")
    if not whole or zero or nbytes != len(data) - _HEAD.size - 32:
        raise _damaged(what, "its SHA-256 is another")
    try:
        # A number of thousands of digits is a ValueError, and so is text that is no UTF-8.
        members = json.loads(data[_HEAD.size : -32].decode(), object_pairs_hook=_once, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"{what} cannot be: {error}") from error
    if not isinstance(members, dict):
        raise InvalidCheckpoint(f"{what} cannot be: it is no object of JSON")
    return members


def _damaged(what: str, why: str) -> DamagedCheckpoint:
    damage = f"{what} is not what was written: {why}"
    return DamagedCheckpoint(damage, damage=(damage,))


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return members


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")


def _decoded(members: dict[str, Any]) -> Manifest:
    given = _exactly(members, {field.name for field in fields(Manifest)}, "it")
    given["ranks"] = ranks_of(given["ranks"])
    given["regions"] = tuple(_entry(RegionEntry, each, "a region") for each in _list(given["regions"], "regions"))
    given["segments"] = tuple(_entry(SegmentEntry, each, "a segment") for each in _list(given["segments"], "segments"))
    return Manifest(**given)


def _entry(kind: Any, value: Any, what: str) -> Any:
    given = _exactly(value, {field.name for field in fields(kind)}, what)
    if "shape" in given and given["shape"] is not None:
        given["shape"] = tuple(_list(given["shape"], "a shape"))
    return kind(**given)


# ---- what makes sense


def _validate(manifest: Manifest) -> None:
    _matches(_HEX32, manifest.store_id, "store_id")
    generation = _number(manifest.generation, 1, MOST_GENERATION, "generation")
    _number(manifest.revision, 0, _MOST_REVISION, "revision")
    if manifest.parent is not None:
        _number(manifest.parent, 1, generation - 1, "parent")
    created: Any = manifest.created
    _require(type(created) in (int, float) and 0 <= created < 1e12 and math.isfinite(created), "created is no time")
    _require(manifest.kind in _KINDS, f"kind is none of {', '.join(_KINDS)}")
    page = _number(manifest.page_bytes, 512, 1 << 30, "page_bytes")
    _require(not page & (page - 1), "page_bytes is no power of two")
    _validate_regions(manifest.regions, generation)
    _validate_segments(manifest.segments, generation)
    require_ranks(manifest.ranks, manifest.regions, manifest.segments)
    if manifest.threads is not None:
        require_program(manifest.threads, page, manifest.regions)


def _validate_regions(regions: tuple[RegionEntry, ...], generation: int) -> None:
    last, total, names = -1, 0, set[str]()
    for region in regions:
        last = _number(region.number, last + 1, 2**32 - 1, "a region's number")
        name: Any = region.name
        _require(isinstance(name, str) and len(name) <= 4096, "a region's name is no string, or too long")
        _require(name not in names, f"two regions are called {name[:40]!r}")
        names.add(name)
        total += _number(region.nbytes, 1, _MOST_NBYTES, "a region's nbytes")
        _number(region.since, 1, generation, "a region's since")
        dtype: Any = region.dtype
        _require(dtype is None or (isinstance(dtype, str) and len(dtype) <= 4096), "a dtype is no string, or too long")
        if region.shape is not None:
            shape: Any = region.shape
            _require(isinstance(shape, tuple) and len(shape) <= 64, "a shape has more than 64 dimensions")
            elements = math.prod(_number(length, 1, region.nbytes, "a length in a shape") for length in shape)
            _require(region.nbytes % elements == 0, "a shape does not fit its nbytes")
    _require(total <= _MOST_NBYTES, "all regions together are larger than any memory")


def _validate_segments(segments: tuple[SegmentEntry, ...], generation: int) -> None:
    last, names = 1, set[str]()
    for segment in segments:
        last = _number(segment.generation, last, generation, "a segment's generation")
        _matches(_SEGMENT, segment.name, "a segment's name")
        _require(segment.name not in names, "a segment stands twice")
        names.add(segment.name)
        _require(int(segment.name[:16]) == last, "a segment's name is of another generation")
        nbytes = _number(segment.nbytes, 0, _MOST_NBYTES, "a segment's nbytes")
        offset = _number(segment.index_offset, 4096, nbytes, "an index_offset")
        _number(segment.index_nbytes, nbytes - offset, nbytes - offset, "an index_nbytes")
        _matches(_HEX64, segment.index_sha256, "an index_sha256")

# SPDX-License-Identifier: MIT
"""Frames: what stands on the wire, byte by byte (docs/migration-protocol.md). No sockets and no memory."""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
from enum import IntEnum
from typing import Any, NamedTuple, TypeVar

from ..errors import ProtocolViolated
from ..kernel.moving import DIGEST_BYTES, STRETCH_BYTES
from ..kernel.packing import xxh64

__all__ = [
    "DATA_BYTES",
    "HEADER_BYTES",
    "MOST_REGIONS",
    "PREAMBLE",
    "VERSION",
    "Codec",
    "Frame",
    "Header",
    "Kind",
    "field",
    "frame",
    "header",
    "json_of",
    "mac",
    "pages_of",
    "preamble_of",
    "region_list",
    "require_checksum",
    "seconds",
]

VERSION = 1
_MAGIC = b"DTMIGR"
PREAMBLE = _MAGIC + VERSION.to_bytes(2, "little")
_FRAME = struct.Struct("<4sBBHIIQQ")
_FRAME_MAGIC = b"DTMF"
HEADER_BYTES = _FRAME.size
_UNCHECKED = slice(0, 24)

BODY_BYTES = 1 << 20
BODY_BYTES_BEFORE_WELCOME = 4096
DATA_BYTES = 1 << 20
MOST_REGIONS = 4096
MOST_CONNECTIONS = 64
_MOST_REGION_BYTES = 1 << 48
_STRETCH = struct.Struct("<QII")


class Kind(IntEnum):
    """Types of frames."""

    HELLO = 1
    CHALLENGE = 2
    PROOF = 3
    WELCOME = 4
    OPEN = 5
    HAVE = 6
    OPENED = 7
    PAGES = 8
    ROUND = 9
    ARRIVED = 10
    STATE = 11
    FINISH = 12
    READY = 13
    COMMIT = 14
    COMMITTED = 15
    ABORT = 16
    ABORTED = 17
    REFUSED = 18
    ALIVE = 19
    ASK = 20
    STANDS = 21


class Codec(IntEnum):
    """How the data of PAGES are compressed."""

    NONE = 0
    ZSTD = 1
    LZ4 = 2
    DELTA = 3


class Header(NamedTuple):
    """The first 32 bytes of a frame."""

    kind: Kind
    codec: Codec
    region: int
    body_bytes: int
    data_bytes: int
    number: int
    checksum: int


class Frame(NamedTuple):
    """A frame without its data, which are read to where they are used."""

    header: Header
    body: memoryview | bytes

    @property
    def kind(self) -> Kind:
        """Its type."""
        return self.header.kind


def frame(
    kind: Kind,
    body: Any = b"",
    *,
    number: int = 0,
    region: int = 0,
    codec: Codec = Codec.NONE,
    data_bytes: int = 0,
) -> tuple[bytes, bytes]:
    """A frame's header and body.

    Args:
        kind: its type.
        body: bytes, or what becomes JSON.
        number, region, codec, data_bytes: as in the header.
    """
    if not isinstance(body, (bytes, bytearray, memoryview)):
        body = json.dumps(body).encode()
    elif not isinstance(body, bytes):
        body = bytes(body)
    head = _FRAME.pack(_FRAME_MAGIC, kind, codec, region, len(body), data_bytes, number, 0)[_UNCHECKED]
    return head + _checksum(head, body).to_bytes(8, "little"), body


def _checksum(head: Any, body: Any) -> int:
    seed = xxh64(head)
    return xxh64(body, seed) if len(body) else seed


def header(data: Any, *, welcome: bool = True) -> Header:
    """Read a header.

    Args:
        data: its 32 bytes.
        welcome: whether the other side has shown who it is; if not, little is allowed to it.

    Raises:
        ProtocolViolated: it is none.
    """
    magic, kind, codec, region, body_bytes, data_bytes, number, checksum = _FRAME.unpack(data)
    if magic != _FRAME_MAGIC:
        raise ProtocolViolated(f"what came is no frame: it begins with {bytes(magic)!r}")
    if kind not in _KINDS or codec not in _CODECS:
        raise ProtocolViolated(f"what came is no frame of this version: type {kind}, codec {codec}")
    most = BODY_BYTES if welcome else BODY_BYTES_BEFORE_WELCOME
    most_data = DATA_BYTES if welcome and kind == Kind.PAGES else 0
    if body_bytes > most or data_bytes > most_data or (codec and kind != Kind.PAGES):
        raise ProtocolViolated(
            f"a frame {Kind(kind).name} of {body_bytes} + {data_bytes} bytes is longer than the {most} + {most_data} "
            "that are allowed, or compressed where nothing is"
        )
    return Header(Kind(kind), Codec(codec), region, body_bytes, data_bytes, number, checksum)


_KINDS = frozenset(Kind)
_CODECS = frozenset(Codec)


def require_checksum(head: Any, body: Any, found: Header) -> None:
    """Look at a frame's checksum.

    Raises:
        ProtocolViolated: it is another.
    """
    if _checksum(bytes(head[_UNCHECKED]), body) != found.checksum:
        raise ProtocolViolated(f"a frame {found.kind.name} is damaged: its checksum is another")


def preamble_of(data: bytes, who: str) -> None:
    """Look at the first eight bytes of a connection.

    Raises:
        ProtocolViolated: another protocol, or another version of this one.
    """
    if data[:6] != _MAGIC:
        raise ProtocolViolated(f"{who} speaks another protocol: it begins with {data!r}")
    version = int.from_bytes(data[6:8], "little")
    if version != VERSION:
        raise ProtocolViolated(
            f"{who} speaks version {version} of the migration protocol, this side version {VERSION}: "
            "install the same version of dirtytrack on both"
        )


# ---- bodies


def json_of(found: Frame) -> dict[str, Any]:
    """The JSON object that a body is.

    Raises:
        ProtocolViolated: it is none.
    """
    try:
        value = json.loads(bytes(found.body))
    except (ValueError, RecursionError) as error:
        raise ProtocolViolated(f"the body of a frame {found.kind.name} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ProtocolViolated(f"the body of a frame {found.kind.name} is no JSON object")
    return value


_T = TypeVar("_T")


def field(found: dict[str, Any], name: str, kind: type[_T], most: int | None = None) -> _T:
    """A field of a JSON object. ``most``: of a number, or of how many characters or items.

    Raises:
        ProtocolViolated: it is missing, of another type, negative, or more than that.
    """
    value = found.get(name)
    if type(value) is kind:
        size = len(value) if isinstance(value, (str, list)) else int(found[name])
        if size >= 0 and (most is None or size <= most):
            return value
    raise ProtocolViolated(f"the field {name!r} is missing, or is not what it should be: {str(value)[:80]}")


def seconds(found: dict[str, Any], name: str) -> float:
    """A field of milliseconds, at least one, in seconds.

    Raises:
        ProtocolViolated: it is none.
    """
    return max(field(found, name, int, 1 << 40), 1) / 1000


def hexadecimal(found: dict[str, Any], name: str, nbytes: int) -> bytes:
    """A field of so many bytes in hexadecimal digits.

    Raises:
        ProtocolViolated: it is none.
    """
    text = field(found, name, str, 2 * nbytes)
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if len(value) != nbytes:
        raise ProtocolViolated(f"the field {name!r} is no {2 * nbytes} hexadecimal digits")
    return value


class RegionPlan(NamedTuple):
    """A region as it is told in OPEN."""

    name: str
    nbytes: int
    phase: int


def region_list(found: dict[str, Any], page_bytes: int) -> list[RegionPlan]:
    """The regions of OPEN.

    Raises:
        ProtocolViolated: they are none.
    """
    plans = []
    for each in field(found, "regions", list, MOST_REGIONS):
        if not isinstance(each, dict):
            raise ProtocolViolated("a region in OPEN is no JSON object")
        plan = RegionPlan(
            field(each, "name", str, 1024),
            field(each, "nbytes", int, _MOST_REGION_BYTES),
            field(each, "phase", int, page_bytes - 1),
        )
        if not plan.nbytes:
            raise ProtocolViolated(f"the region {plan.name!r} in OPEN is empty")
        plans.append(plan)
    if not plans or len({plan.name for plan in plans}) != len(plans):
        raise ProtocolViolated("OPEN names no region, or two alike")
    return plans


def pages_of(found: Header, body: Any, page_bytes: int) -> tuple[int, int]:
    """How many stretches, and how many pages of data, the body of PAGES has.

    Raises:
        ProtocolViolated: its stretches and digests do not fit each other.
    """
    data_pages = taken = stretches = 0
    end = found.body_bytes
    while taken + data_pages * DIGEST_BYTES < end:
        if end - taken < STRETCH_BYTES:
            break
        _, count, kind = _STRETCH.unpack_from(body, taken)
        taken += STRETCH_BYTES
        stretches += 1
        if kind == 0:
            data_pages += count
    if taken + data_pages * DIGEST_BYTES != end or data_pages * page_bytes > DATA_BYTES:
        raise ProtocolViolated("the stretches and the digests of a frame PAGES do not fit each other")
    return stretches, data_pages


# ---- who is who


def mac(key: bytes, word: bytes, role: str, migration: bytes, attempt: int, nonces: bytes) -> str:
    """What proves who knows the key, in hexadecimal digits."""
    said = b"\0".join((word, role.encode(), migration)) + attempt.to_bytes(8, "little") + nonces
    return hmac.new(key, said, hashlib.sha256).hexdigest()

# SPDX-License-Identifier: MIT
"""The records of a recording, to bytes and back: see docs/recording-format.md."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import InvalidRecording
from ..process.mappings import Mapping
from .arrays import np
from .varints import Reader, decoded, encoded, number, text
from .written import Written

if TYPE_CHECKING:
    Table = tuple[Mapping, ...]

__all__ = [
    "END",
    "EPOCH",
    "FIRST",
    "HEADER_BYTES",
    "MAPPINGS",
    "SESSION",
    "End",
    "EpochRecord",
    "Header",
    "Place",
    "Session",
    "changed",
    "changes",
    "damaged",
    "in_order",
    "places",
    "record",
    "tables",
]

VERSION = 1
HEADER_BYTES = 24
FIRST = HEADER_BYTES  # where the first record is
SESSION, MAPPINGS, EPOCH, END = 1, 2, 3, 4
_KINDS = (SESSION, MAPPINGS, EPOCH, END)
_MAGIC = b"DTR"
_HEADER = struct.Struct("<3sBB7xd")  # and a checksum
_FRAME = struct.Struct("<BI")  # kind, length; a checksum behind the body
_CHECKSUM = struct.Struct("<I")
_OVERHEAD_BYTES = _FRAME.size + _CHECKSUM.size
_MOST_BODY_BYTES = 1 << 30
_STATES = ("tracked", "untracked", "excluded")
_WORTH_PACKING_BYTES = 64
_MOST_UNIT_LOG2 = 40
_BY_ADDRESS = attrgetter("start", "end", "name", "permissions", "offset", "device", "inode", "state", "reason")


class Header(NamedTuple):
    """What a recording begins with."""

    page_log2: int
    begun: float
    """Seconds since 1970."""

    def __bytes__(self) -> bytes:
        head = _HEADER.pack(_MAGIC, VERSION, self.page_log2, self.begun)
        return head + _CHECKSUM.pack(zlib.crc32(head))

    @staticmethod
    def read(data: bytes, name: str) -> Header:
        """The header of these bytes.

        Raises:
            InvalidRecording: they begin with none, or with one of another version.
        """
        if not data:
            raise InvalidRecording(f"{name} is empty: nothing was recorded into it")
        if data[:3] != _MAGIC[: len(data)]:
            raise InvalidRecording(f"{name} is no recording: it does not begin as one")
        if len(data) > 3 and data[3] != VERSION:
            raise InvalidRecording(f"{name} is a recording of version {data[3]}, this library reads version {VERSION}")
        if len(data) < HEADER_BYTES:
            raise InvalidRecording(
                f"{name} is cut short: it has {len(data)} bytes, and the header of a recording has {HEADER_BYTES}. "
                "Record again"
            )
        (told,) = _CHECKSUM.unpack_from(data, _HEADER.size)
        _, _, page_log2, begun = _HEADER.unpack_from(data)
        if told != zlib.crc32(data[: _HEADER.size]) or not 9 <= page_log2 <= 30 or any(data[5:12]):
            raise InvalidRecording(f"{name} is damaged: the checksum of its header is another")
        return Header(page_log2, begun)


class Place(NamedTuple):
    """Where in the file a record is."""

    kind: int
    start: int
    end: int

    def body(self, data: bytes) -> memoryview:
        """Its body."""
        return memoryview(data)[self.start + _FRAME.size : self.end - _CHECKSUM.size]


def record(kind: int, body: bytes) -> bytes:
    """A record of that body."""
    framed = _FRAME.pack(kind, len(body)) + body
    return framed + _CHECKSUM.pack(zlib.crc32(framed))


def _whole(data: bytes, at: int) -> Place | None:
    """The record at that place, if there is a whole one."""
    if at + _OVERHEAD_BYTES > len(data):
        return None
    kind, length = _FRAME.unpack_from(data, at)
    end = at + length + _OVERHEAD_BYTES
    if kind not in _KINDS or end > len(data):
        return None
    (told,) = _CHECKSUM.unpack_from(data, end - _CHECKSUM.size)
    if told != zlib.crc32(memoryview(data)[at : end - _CHECKSUM.size]):
        return None
    return Place(kind, at, end)


def places(data: bytes, name: str) -> Iterator[Place]:
    """Where the records are, in order, up to a tail that was torn off.

    Raises:
        InvalidRecording: a record that is not the last is damaged, since another stands behind it.
    """
    at = FIRST
    while (place := _whole(data, at)) is not None:
        yield place
        at = place.end
    if at + _FRAME.size <= len(data):
        _, length = _FRAME.unpack_from(data, at)
        if _whole(data, at + length + _OVERHEAD_BYTES) is not None:
            raise InvalidRecording(
                f"{name} is damaged at byte {at}: the checksum of a record is another, and more stands behind it"
            )


# ---- bodies


@dataclass(frozen=True)
class Session:
    """One recorder's work: what it recorded. A recording that was appended to has several.

    Attributes:
        begun_ns: since the recording's beginning.
        pid: of the process; 0 where it is not known.
        first_write_ns: what the first write to a page in an epoch costs the target, as measured where it was recorded;
            0 where it was not.
        command: what is recorded, in words.
    """

    begun_ns: int
    pid: int
    first_write_ns: int
    command: str

    def __bytes__(self) -> bytes:
        numbers = (self.begun_ns, self.pid, self.first_write_ns)
        return record(SESSION, b"".join(map(number, numbers)) + text(self.command))

    @staticmethod
    def read(body: memoryview) -> Session:
        """As written."""
        reader = Reader(body)
        found = Session(reader.number(), reader.number(), reader.number(), reader.text())
        reader.finish()
        return found


@dataclass(frozen=True)
class End:
    """How a session ended.

    Attributes:
        ended_ns: since the recording's beginning.
        cpu_ns: what the recorder's own thread took of a processor, system calls included.
        reason: why.
    """

    ended_ns: int
    cpu_ns: int
    reason: str

    def __bytes__(self) -> bytes:
        return record(END, number(self.ended_ns) + number(self.cpu_ns) + text(self.reason))

    @staticmethod
    def read(body: memoryview) -> End:
        """As written."""
        reader = Reader(body)
        found = End(reader.number(), reader.number(), reader.text())
        reader.finish()
        return found


def _packed(body: bytes) -> bytes:
    """By zlib where that is shorter."""
    if len(body) >= _WORTH_PACKING_BYTES:
        packed = zlib.compress(body, 1)
        if len(packed) + 4 < len(body):
            return b"\x01" + number(len(body)) + packed
    return b"\x00" + body


def _unpacked(reader: Reader) -> Reader:
    method = reader.byte()
    if not method:
        return Reader(reader.rest())
    if method != 1:
        raise ValueError(f"packing method {method} is not known")
    length = reader.number()
    if length > _MOST_BODY_BYTES:
        raise ValueError(f"{length} bytes are more than a record has")
    unpacking = zlib.decompressobj()
    try:
        body = unpacking.decompress(reader.rest(), length + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if len(body) != length or not unpacking.eof or unpacking.unused_data:
        raise ValueError(f"it does not unpack to {length} bytes")
    return Reader(body)


@dataclass(frozen=True)
class EpochRecord:
    """An epoch, or several that were put together.

    Attributes:
        first, epochs: the number of the first, and how many.
        begun_ns, lasted_ns: since the recording's beginning.
        collect_ns: what the collects took.
        resident_pages: what a full copy would take at the end; 0 where it is not known.
        written: the pages.
    """

    first: int
    epochs: int
    begun_ns: int
    lasted_ns: int
    collect_ns: int
    resident_pages: int
    written: Written

    def __bytes__(self) -> bytes:
        what = self.written
        ends = what.starts + what.lengths
        gaps = what.starts.copy()
        gaps[1:] -= ends[:-1]
        columns = [gaps, what.lengths - 1]
        if what.unit_log2:
            columns.append(what.counts - 1)
        numbers = (self.first, self.epochs - 1, self.begun_ns, self.lasted_ns, self.collect_ns, self.resident_pages)
        head = b"".join(map(number, (*numbers, what.unit_log2, len(gaps))))
        return record(EPOCH, head + _packed(b"".join(encoded(column.astype(np.uint64)) for column in columns)))

    @staticmethod
    def read(body: memoryview, page_log2: int) -> EpochRecord:
        """As written.

        Raises:
            ValueError: it was not written so.
        """
        reader = Reader(body)
        first, more, begun, lasted, collect, resident, unit_log2, count = (reader.number() for _ in range(8))
        if unit_log2 > _MOST_UNIT_LOG2:
            raise ValueError(f"cells of 2**{unit_log2} pages are not known")
        columns = 3 if unit_log2 else 2
        stream = _unpacked(reader).rest()
        if count > len(stream):
            raise ValueError(f"{count} runs do not fit into {len(stream)} bytes")
        numbers = decoded(stream, columns * count).reshape(columns, count)
        room = 1 << 63 - page_log2 - unit_log2
        if count and (int(numbers.max()) >= room or float(numbers[:2].sum(dtype=np.float64)) + count >= room):
            raise ValueError("its runs leave the address space")
        gaps, lengths = numbers[0].astype(np.int64), numbers[1].astype(np.int64) + 1
        counts = numbers[2].astype(np.int64) + 1 if unit_log2 else np.ones(count, np.int64)
        if count and (int(counts.max()) > 1 << unit_log2 or (not unit_log2 and not gaps[1:].all())):
            raise ValueError("its runs are not in the one form that they have")
        starts = np.cumsum(gaps) + np.cumsum(lengths) - lengths
        written = Written(unit_log2, starts, lengths, counts)
        return EpochRecord(first, more + 1, begun, lasted, collect, resident, written)


def changes(before: Sequence[Mapping], after: Sequence[Mapping]) -> bytes:
    """The record that makes one table of mappings of another; nothing where they are the same."""
    if before is after:
        return b""
    known, wanted = set(before), set(after)
    gone = [i for i, mapping in enumerate(before) if mapping not in wanted]
    new = [mapping for mapping in after if mapping not in known]
    if not gone and not new:
        return b""
    body = [number(len(gone))]
    last = -1
    for i in gone:
        body.append(number(i - last - 1))
        last = i
    body.append(number(len(new)))
    for mapping in new:
        numbers = (mapping.start, mapping.nbytes, mapping.offset, mapping.inode, _STATES.index(mapping.state))
        body += map(number, numbers)
        body += map(text, (mapping.permissions, mapping.device, mapping.name, mapping.reason))
    return record(MAPPINGS, _packed(b"".join(body)))


def changed(before: Sequence[Mapping], body: memoryview) -> Table:
    """The table that `changes` made this record for.

    Raises:
        ValueError: it was not written so.
    """
    reader = _unpacked(Reader(body))
    gone, at = set[int](), -1
    for _ in range(reader.number()):
        at += reader.number() + 1
        if at >= len(before):
            raise ValueError(f"mapping {at} of {len(before)} cannot have gone")
        gone.add(at)
    table = [mapping for i, mapping in enumerate(before) if i not in gone]
    for _ in range(reader.number()):
        start, nbytes, offset, inode, state = (reader.number() for _ in range(5))
        if state >= len(_STATES):
            raise ValueError(f"state {state} of a mapping is not known")
        permissions, device, name, reason = (reader.text() for _ in range(4))
        table.append(
            Mapping(
                start=start,
                end=start + nbytes,
                permissions=permissions,
                offset=offset,
                device=device,
                inode=inode,
                name=name,
                state=_STATES[state],
                reason=reason,
            )
        )
    reader.finish()
    return in_order(table)


def in_order(table: Iterable[Mapping]) -> Table:
    """The mappings by address: the order by which records count them."""
    return tuple(sorted(table, key=_BY_ADDRESS))


def tables(data: bytes, found: Iterable[Place], name: str) -> Iterator[tuple[Place, Any]]:
    """Each record with what it says; an epoch with the table of mappings as of its end, since it is read when wanted.

    Raises:
        InvalidRecording: a record says what cannot be.
    """
    table: Table = ()
    for place in found:
        try:
            if place.kind == SESSION:
                table = ()
                yield place, Session.read(place.body(data))
            elif place.kind == MAPPINGS:
                table = changed(table, place.body(data))
                yield place, table
            elif place.kind == EPOCH:
                yield place, table
            else:
                yield place, End.read(place.body(data))
        except (ValueError, UnicodeDecodeError) as error:
            raise damaged(name, place, error) from error


def damaged(name: str, place: Place, error: Exception) -> InvalidRecording:
    """What is told of a record whose checksum is right and whose content cannot be."""
    return InvalidRecording(f"{name} is damaged at byte {place.start}: {error}")

# SPDX-License-Identifier: MIT
"""Older epochs in less room: neighbours in time are put together, then pages into cells; the newest stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import LimitReached
from .arrays import np
from .records import EPOCH, MAPPINGS, SESSION, EpochRecord, Place, changes, in_order, places, tables

if TYPE_CHECKING:
    from .records import Table

__all__ = ["coarsened"]

_FEW = 8  # epochs that are not put together any more before cells are made larger
_MOST_UNIT_LOG2 = 40
_CELLS_WITHOUT_GONE_LOG2 = 4  # mappings that are gone take room, too; cells of so many pages are rarely of one mapping


@dataclass(frozen=True)
class _Entry:
    """A record, or several that were put together."""

    kind: int
    session: int
    data: bytes
    table: Table
    """In force after it."""
    epoch: EpochRecord | None = None


def coarsened(data: bytes, most_nbytes: int, page_log2: int, name: str) -> bytes:
    """The records of a recording (without its header) in no more than so many bytes. What was appended to those may be
    appended to these.

    The newest half of the room is for epochs as they are. What is older is put together, two by two, until it
    fits; where that alone does not do it, pages are counted by cells, which grow. Sessions are never put together.

    Raises:
        LimitReached: the tables of mappings alone take more.
        InvalidRecording: the recording is damaged.
    """
    entries = list(_entries(data, name))
    last = {entry.session: entry.table for entry in entries}
    least_nbytes = sum(len(changes((), table)) for table in last.values())
    for keep_nbytes in (most_nbytes // 2, most_nbytes // 4, most_nbytes // 16, 0):
        if least_nbytes > most_nbytes:
            break
        kept = _kept(entries, keep_nbytes)
        old = [_decoded(entry, page_log2) for entry in entries[: len(entries) - kept]]
        newest = entries[len(entries) - kept :]
        fits = _squeezed(old, newest, most_nbytes, page_log2)
        if fits is not None:
            return fits
    raise LimitReached(
        f"{name} does not fit into {most_nbytes} bytes, however coarse: the tables of its mappings and its "
        "sessions alone take more. Give it a larger size_budget",
        feature="size_budget",
    )


def _entries(data: bytes, name: str) -> Iterator[_Entry]:
    session = -1
    table: Table = ()
    for place, what in tables(data, places(data, name), name):
        if place.kind == MAPPINGS:
            table = what
            continue  # made anew, for those records that stay
        if place.kind == SESSION:
            session, table = session + 1, ()
        yield _Entry(place.kind, session, data[place.start : place.end], table)


def _kept(entries: Sequence[_Entry], most_nbytes: int) -> int:
    """How many of the newest stay as they are."""
    nbytes = kept = 0
    for at in range(len(entries) - 1, -1, -1):
        before = entries[at - 1].table if at and entries[at - 1].session == entries[at].session else ()
        nbytes += len(entries[at].data) + len(changes(before, entries[at].table))
        if nbytes > most_nbytes:
            break
        kept += 1
    return kept


def _decoded(entry: _Entry, page_log2: int) -> _Entry:
    if entry.kind != EPOCH:
        return entry
    place = Place(EPOCH, 0, len(entry.data))
    return replace(entry, epoch=EpochRecord.read(place.body(entry.data), page_log2))


def _squeezed(old: list[_Entry], newest: Sequence[_Entry], most_nbytes: int, page_log2: int) -> bytes | None:
    unit_log2 = 0
    after = (newest or old)[-1].table  # what is appended tells of what changed since then
    while unit_log2 <= _MOST_UNIT_LOG2:
        result = _written([*old, *newest], after)
        if len(result) <= most_nbytes:
            return result
        before = len(old)
        old = _paired(old, page_log2)
        if len(old) == before or len(old) <= _FEW:
            unit_log2 += 1
            old = _in_cells(old, unit_log2)
        if unit_log2 >= _CELLS_WITHOUT_GONE_LOG2:
            old = _without_gone(old, newest)
    return None


def _written(entries: Sequence[_Entry], after: Table) -> bytes:
    """Their records, with the table of mappings that is to be in force behind them."""
    out = bytearray()
    session = -1
    table: Table = ()
    for entry in entries:
        if entry.session != session:
            session, table = entry.session, ()
        if entry.kind == EPOCH:
            out += changes(table, entry.table)
            table = entry.table
        out += entry.data
    return bytes(out + changes(table, after))


def _paired(old: Sequence[_Entry], page_log2: int) -> list[_Entry]:
    """Each two neighbouring epochs of one session as one."""
    result = list[_Entry]()
    waiting = False  # whether the last of them has no other half yet
    for entry in old:
        last = result[-1] if result else None
        if waiting and last is not None and last.session == entry.session and last.epoch and entry.epoch:
            result[-1] = _together(last, entry, last.epoch, entry.epoch, page_log2)
            waiting = False
        else:
            result.append(entry)
            waiting = entry.kind == EPOCH
    return result


def _together(a: _Entry, b: _Entry, one: EpochRecord, other: EpochRecord, page_log2: int) -> _Entry:
    epoch = EpochRecord(
        first=one.first,
        epochs=one.epochs + other.epochs,
        begun_ns=one.begun_ns,
        lasted_ns=other.begun_ns + other.lasted_ns - one.begun_ns,
        collect_ns=one.collect_ns + other.collect_ns,
        resident_pages=other.resident_pages,
        written=one.written | other.written,
    )
    return _Entry(EPOCH, b.session, bytes(epoch), _both(a.table, b.table, epoch, page_log2), epoch)


def _both(a: Table, b: Table, epoch: EpochRecord, page_log2: int) -> Table:
    """The later table, and of the earlier one what was written and is gone since; never two for one address."""
    known = set(b)
    gone = [mapping for mapping in a if mapping not in known]
    if not gone:
        return b
    ends = np.maximum.accumulate(np.array([mapping.end for mapping in b], np.uint64))
    starts = [mapping.start for mapping in b] + [1 << 64]
    unit_bytes = 1 << page_log2 + epoch.written.unit_log2
    first = epoch.written.starts * unit_bytes
    last = first + epoch.written.lengths * unit_bytes
    more = []
    for mapping in gone:
        after = int(np.searchsorted(ends, np.uint64(mapping.start), "right"))
        at = int(np.searchsorted(last, mapping.start, "right"))
        if starts[after] >= mapping.end and at < len(first) and first[at] < mapping.end:
            more.append(mapping)
    return in_order([*b, *more])


def _in_cells(old: Sequence[_Entry], unit_log2: int) -> list[_Entry]:
    result = []
    for entry in old:
        if entry.epoch is not None:
            epoch = replace(entry.epoch, written=entry.epoch.written.coarser(unit_log2))
            entry = replace(entry, data=bytes(epoch), epoch=epoch)
        result.append(entry)
    return result


def _without_gone(old: Sequence[_Entry], newest: Sequence[_Entry]) -> list[_Entry]:
    """One table for each session: that of the epoch behind, else of its last one."""
    last = {entry.session: entry.table for entry in old if entry.epoch is not None}
    last.update({entry.session: entry.table for entry in newest[:1] if entry.kind == EPOCH})
    return [replace(entry, table=last.get(entry.session, entry.table)) for entry in old]

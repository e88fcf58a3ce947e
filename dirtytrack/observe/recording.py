# SPDX-License-Identifier: MIT
"""Recording: what was written, epoch by epoch, read from a file. Its format is in docs/recording-format.md."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, overload

from ..errors import InvalidRecording, PermissionDenied
from .arrays import np
from .records import END, EPOCH, FIRST, MAPPINGS, SESSION, End, EpochRecord, Header, Session, damaged, places, tables

if TYPE_CHECKING:
    from ..process.mappings import Mapping
    from .records import Place, Table

__all__ = ["Epoch", "Recording"]

_NS = 1e9


class Epoch:
    """One epoch of a recording; or several older ones that were put together to save room. Immutable.

    Attributes:
        number: as the tracker counted it; of the first, where several were put together.
        epochs: how many they are.
        begun, ended: in seconds since the recording's beginning.
        collect_seconds: what its collect (or all their collects) took.
        resident_pages: how many pages a full copy would have had at its end; 0 where it is not known.
        mappings: of the process at its end, by address; where several epochs were put together, also those that had
            been written and were gone by then.
        page_bytes: of a page.
        record, written: the same as arrays, for analyses.

    Thread safety: everything may be called from any thread.
    """

    def __init__(self, found: EpochRecord, page_bytes: int, mappings: Table) -> None:
        self.number, self.epochs = found.first, found.epochs
        self.begun, self.ended = found.begun_ns / _NS, (found.begun_ns + found.lasted_ns) / _NS
        self.collect_seconds = found.collect_ns / _NS
        self.resident_pages = found.resident_pages
        self.page_bytes = page_bytes
        self.mappings = mappings
        self.record, self.written = found, found.written

    @property
    def seconds(self) -> float:
        """How long it lasted."""
        return self.ended - self.begun

    @property
    def coarse(self) -> int:
        """Pages per cell: 1 at full resolution; more, a power of two, where space was saved."""
        return self.written.unit_pages

    @property
    def exact(self) -> bool:
        """Whether it is one epoch, at full resolution."""
        return self.epochs == 1 and self.coarse == 1

    @property
    def page_count(self) -> int:
        """Pages that were written at least once. Of coarse cells no less than that, and perhaps more."""
        return self.written.page_count

    @cached_property
    def runs(self) -> memoryview:
        """Read-only, format ``Q``, shape (n, 2): sorted, disjoint [start, end) addresses.

        At full resolution as `DirtySet.runs`. Else each is one or several cells, with as many pages written in each;
        neighbours that differ in that touch.
        """
        unit_bytes, what = self.page_bytes * self.coarse, self.written
        runs = np.empty((len(what.starts), 2), np.uint64)
        runs[:, 0] = what.starts * unit_bytes
        runs[:, 1] = (what.starts + what.lengths) * unit_bytes
        return _numbers(runs)

    @cached_property
    def run_pages(self) -> memoryview:
        """Read-only, format ``Q``, shape (n,): how many pages of each run were written at least once."""
        return _numbers((self.written.lengths * self.written.counts).astype(np.uint64))

    def __repr__(self) -> str:
        several = f"s {self.number} to {self.number + self.epochs - 1}" if self.epochs > 1 else f" {self.number}"
        cells = "" if self.coarse == 1 else f", in cells of {self.coarse}"
        return f"<Epoch{several}: {self.page_count} pages{cells}, {self.begun:.3f} to {self.ended:.3f} s>"


def _numbers(array: np.ndarray[tuple[int, ...], np.dtype[np.uint64]]) -> memoryview:
    """A read-only view with the format that Python knows; memoryview.cast knows no shape with a zero."""
    if not len(array):
        shape = (1, *array.shape[1:])
        return memoryview(bytes(8 * int(np.prod(shape)))).cast("B").cast("Q", shape)[:0]
    return memoryview(array.tobytes()).cast("B").cast("Q", array.shape)


class Recording(Sequence[Epoch]):
    """The epochs of a file, as of when it was opened: a sequence of `Epoch`, oldest first, each decoded when asked for.

    A file may be read while it is being written, and while it is rewritten to keep within its budget: what is read is
    what was there when it was opened. A record at the end that was cut off, since the recorder was killed or the disk
    full, is left out, and ``torn_nbytes`` tells how much that was.

    Attributes:
        path: of the file.
        nbytes: of the file.
        page_bytes: of a page.
        begun: in seconds since 1970.
        sessions: who was recorded, and by whom; one, unless the recording was appended to.
        ends: how each session ended; without those that run still, or were killed.
        ended: how the last one did; None where it runs still, or was killed.
        torn_nbytes: bytes at the end that are no whole record.

    Thread safety: everything may be called from any thread.
    """

    def __init__(self, data: bytes, name: str = "the recording") -> None:
        self.path = name
        self.nbytes = len(data)
        self._data = data
        header = Header.read(data, name)
        self.page_bytes, self.begun = 1 << header.page_log2, header.begun
        self._page_log2 = header.page_log2
        self._epochs: list[tuple[Place, Table]] = []
        sessions, ends = list[Session](), list[End]()
        self._table: Table = ()
        self.ended: End | None = None
        end = FIRST
        for place, what in tables(data, places(data, name), name):
            end = place.end
            if place.kind == EPOCH:
                self._epochs.append((place, what))
            elif place.kind == MAPPINGS:
                self._table = what
            elif place.kind == SESSION:
                self._table = ()
                sessions.append(what)
                self.ended = None
            elif place.kind == END:
                ends.append(what)
                self.ended = what
        self.sessions, self.ends = tuple(sessions), tuple(ends)
        self.torn_nbytes = len(data) - end

    @staticmethod
    def open(path: str | os.PathLike[str]) -> Recording:
        """Read a file.

        Raises:
            InvalidRecording: there is no such file; it is no recording, one of another version, or damaged.
            PermissionDenied: it may not be read.
        """
        try:
            data = Path(path).read_bytes()
        except PermissionError as error:
            raise PermissionDenied(f"{path} may not be read: {error.strerror}", errno=error.errno) from error
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise InvalidRecording(f"{path} cannot be read: {why}", errno=getattr(error, "errno", None)) from error
        return Recording(data, os.fspath(path))

    def __len__(self) -> int:
        return len(self._epochs)

    @overload
    def __getitem__(self, index: int) -> Epoch: ...

    @overload
    def __getitem__(self, index: slice) -> list[Epoch]: ...

    def __getitem__(self, index: int | slice) -> Epoch | list[Epoch]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place, table = self._epochs[index]
        return Epoch(self._record(place), self.page_bytes, table)

    def __iter__(self) -> Iterator[Epoch]:
        return (self[i] for i in range(len(self)))

    def _record(self, place: Place) -> EpochRecord:
        try:
            return EpochRecord.read(place.body(self._data), self._page_log2)
        except ValueError as error:
            raise damaged(self.path, place, error) from error

    @property
    def mappings(self) -> tuple[Mapping, ...]:
        """As of the last epoch."""
        return self._epochs[-1][1] if self._epochs else self._table

    @property
    def seconds(self) -> float:
        """From the recording's beginning to the end of its last epoch."""
        return self[-1].ended if self else 0.0

    def __repr__(self) -> str:
        return f"<Recording {self.path!r}: {len(self)} epochs in {self.nbytes} bytes>"

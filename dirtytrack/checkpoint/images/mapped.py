# SPDX-License-Identifier: MIT
"""What of a process's mappings is saved, and why not."""

from __future__ import annotations

import re
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from ...errors import TargetGone
from ...kernel.core import PAGE_BYTES
from ...kernel.targets import Row
from ...process.mappings import Filter, called, is_anonymous
from .space import joined, pages_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ...dirtyset import DirtySet
    from ...process import Mapping

__all__ = ["Kind", "Marks", "Piece", "Plan", "pieces_of", "rows_of"]

_MEMORY_TYPES = ("tmpfs", "ramfs", "hugetlbfs")
_MEMORY_NAMES = ("/memfd:", "/SYSV", "/dev/zero", "/anon_hugepage")
_UNREADABLE = ("[vvar", "[vsyscall", "[uprobes")
_LINE = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) (.)(.)(.)(.) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) ([0-9]+) *(.*)\n")
_HEAD = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) ")


class Kind(Enum):
    """Where a mapping's content is kept."""

    ANONYMOUS = "anonymous"
    """In it alone."""
    FILE = "file"
    """Private: pages that were not written are those of a file that lasts."""
    MEMORY = "memory"
    """Shared memory, and files that go with the process: nowhere else once it has ended."""
    SHARED_FILE = "shared file"
    """In a file that lasts."""
    KERNEL = "kernel"
    """The kernel's code for programs, [vdso]."""


_TRACKED = (Kind.ANONYMOUS, Kind.FILE, Kind.MEMORY)


class Piece(NamedTuple):
    """A mapping, and what becomes of it."""

    row: Row
    kind: Kind
    why: str | None
    """Why nothing of it is saved; None: it is, or may be."""

    @property
    def mapping(self) -> Mapping:
        """As users are told."""
        return called(self.row, "")


class Marks:
    """What only /proc/PID/smaps and mountinfo tell of mappings: which are marked MADV_DONTDUMP or are no memory at all,
    and whose files are in memory only."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._memory = self._memory_devices()
        self._marked: list[tuple[int, int, bool]] = []
        self.look()

    def _memory_devices(self) -> set[tuple[int, int]]:
        try:
            with open(f"/proc/{self._pid}/mountinfo") as file:
                lines = [line.split(" - ", 1) for line in file]
        except OSError:
            return set()
        found = set()
        for mount, kind in lines:
            if kind.split()[0] in _MEMORY_TYPES:
                major, minor = mount.split()[2].split(":")
                found.add((int(major), int(minor)))
        return found

    def look(self) -> None:
        """Look at the marks of all mappings: some milliseconds for each GiB that is populated."""
        found, start, end = [], 0, 0
        try:
            with open(f"/proc/{self._pid}/smaps", "rb") as file:
                for line in file:
                    if line.startswith(b"VmFlags:"):
                        flags = line.split()
                        found.append((start, end, b"dd" in flags or b"io" in flags))
                    elif head := _HEAD.match(line):
                        start, end = int(head[1], 16), int(head[2], 16)
        except (FileNotFoundError, ProcessLookupError) as error:
            raise TargetGone(f"process {self._pid} ended", errno=error.errno, pid=self._pid) from error
        self._marked = found

    def knows(self, rows: Iterable[Row]) -> bool:
        """Whether each mapping is one that was looked at, or part of one, or grew of one."""
        at, marked = 0, self._marked
        for row in rows:
            while at < len(marked) and marked[at][1] <= row.start:
                at += 1
            if at == len(marked) or marked[at][0] >= row.end:
                return False
        return True

    def is_marked(self, row: Row) -> bool:
        """Whether any of it is marked."""
        return any(on and start < row.end and row.start < end for start, end, on in self._marked_near(row))

    def _marked_near(self, row: Row) -> Iterable[tuple[int, int, bool]]:
        low, high = 0, len(self._marked)
        while low < high:
            middle = (low + high) // 2
            if self._marked[middle][1] <= row.start:
                low = middle + 1
            else:
                high = middle
        while low < len(self._marked) and self._marked[low][0] < row.end:
            yield self._marked[low]
            low += 1

    def kind_of(self, row: Row) -> Kind:
        """Where its content is kept."""
        if row.name == "[vdso]":
            return Kind.KERNEL
        if is_anonymous(row):
            return Kind.ANONYMOUS
        lasting = row.inode and not row.name.startswith(_MEMORY_NAMES) and not row.name.endswith(" (deleted)")
        if not lasting or row.device in self._memory:
            return Kind.MEMORY
        return Kind.SHARED_FILE if row.shared else Kind.FILE


def rows_of(text: bytes) -> list[Row]:
    """The mappings that /proc/PID/maps tells: all but [vsyscall], which is no process's own."""
    rows = []
    for start, end, r, w, x, s, offset, major, minor, inode, name in _LINE.findall(text):
        low = int(start, 16)
        if low >> 63:
            continue
        rows.append(
            Row(
                low,
                int(end, 16),
                int(offset, 16),
                int(inode),
                (int(major, 16), int(minor, 16)),
                r == b"r",
                w == b"w",
                x == b"x",
                s == b"s",
                PAGE_BYTES,
                name.replace(b"\\012", b"\n").decode(errors="surrogateescape"),  # all that is written otherwise
            )
        )
    return rows


def pieces_of(rows: Iterable[Row], marks: Marks, chosen: Filter) -> list[Piece]:
    """What becomes of each mapping."""
    return [Piece(row, marks.kind_of(row), _why_not(row, marks, chosen)) for row in rows]


def _why_not(row: Row, marks: Marks, chosen: Filter) -> str | None:
    if row.name.startswith(_UNREADABLE):
        return "unreadable"
    if chosen.excludes(row):
        return "excluded"
    if row.name != "[vdso]" and marks.is_marked(row):
        return "dont dump"
    if row.shared and not row.writable and marks.kind_of(row) is Kind.SHARED_FILE:
        return "file"
    return None


class Plan:
    """What becomes of all mappings of a process.

    Attributes:
        pieces: all of them, by address.
        always: those that are saved as a whole, whatever is in them: private memory.
        looked_at: others, of which the pages that are saved must be known at each save.
        files: those of them that are private and a file's; in_files: their pages.
        trackable: what is saved and, if it is tracked, is saved by what was written alone. Not so are shared files that
            last: a page that comes into the page table without being written is to be saved too.
    """

    def __init__(self, pieces: list[Piece]) -> None:
        saved = [piece for piece in pieces if piece.why is None]
        self.pieces = pieces
        self.always = _pages(piece for piece in saved if _is_own(piece))
        self.looked_at = [piece for piece in saved if not _is_own(piece)]
        self.files = [piece for piece in saved if piece.kind is Kind.FILE]
        self.in_files = _pages(self.files)
        self.trackable = _pages(piece for piece in saved if piece.kind in _TRACKED)


def _pages(pieces: Iterable[Piece]) -> DirtySet:
    return pages_of(joined((piece.row.start, piece.row.end) for piece in pieces))


def _is_own(piece: Piece) -> bool:
    """Private memory; but what may neither be read nor written is often nothing but address space."""
    return piece.kind is Kind.ANONYMOUS and (piece.row.readable or piece.row.writable)

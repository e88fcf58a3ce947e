# SPDX-License-Identifier: MIT
"""Which pages of another process have anything in them, without touching any.

A page that was armed and never populated looks like one in swap (docs/kernel-notes.md), and so does one that the kernel
is moving. Its entry in the page map tells them apart, to whom the kernel shows it: CAP_SYS_ADMIN. Everybody else takes
what looks like swap for populated, and reads it.
"""

from __future__ import annotations

import errno
import os
from array import array
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import TargetGone
from ...kernel import core
from ...kernel.abi import PageCategory
from ...pagemap import Pagemap
from .mapped import Kind
from .space import joined, pages_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ...dirtyset import DirtySet
    from ...kernel.targets import Row
    from .mapped import Piece
    from .space import Ranges

__all__ = ["Populated"]

_CONTENT = PageCategory.PRESENT | PageCategory.SWAPPED
_LONG_NBYTES = 16 * core.PAGE_BYTES
_ENTRIES = 1 << 16
_PRESENT, _SWAPPED = 1 << 63, 1 << 62
_MARKER = 0x1F
"""The type of a swap entry that is a marker: armed and never populated, or a guard page."""
_FRAME = (1 << 55) - 1


class Populated:
    """Looks at the pages of a process.

    Args:
        pid: the process.

    Thread safety: one thread at a time.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._pagemap = Pagemap(pid)
        try:
            self._entries = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self._pagemap.close()
            raise TargetGone(f"process {pid} ended", errno=error.errno, pid=pid) from error
        self._shown = _entries_are_shown()

    def close(self) -> None:
        """Let go of the process."""
        self._pagemap.close()
        if self._entries >= 0:
            os.close(self._entries)
            self._entries = -1

    # ---- by mapping

    def of(self, piece: Piece, start: int | None = None, end: int | None = None) -> Ranges:
        """The pages of a mapping, or of a part of it, that are to be saved."""
        low = piece.row.start if start is None else start
        high = piece.row.end if end is None else end
        if piece.kind is Kind.KERNEL:
            return [(low, high)]
        if piece.kind is Kind.MEMORY:
            return self._in_memory(piece.row, low, high)
        if piece.kind is Kind.SHARED_FILE:
            return self._scanned(low, high, PageCategory.PRESENT, 0)
        return self._private(low, high, PageCategory.FILE if piece.kind is Kind.FILE else PageCategory.PFNZERO)

    def anonymous(self, start: int, end: int) -> Ranges:
        """The pages with content of private anonymous memory, which may be several mappings."""
        return self._private(start, end, PageCategory.PFNZERO)

    def all_of(self, pieces: Sequence[Piece]) -> dict[int, Ranges]:
        """As `of`, of many mappings, by where they begin: private neighbours of files are looked at as one."""
        out: dict[int, Ranges] = {}
        at = 0
        while at < len(pieces):
            group = [pieces[at]]
            at += 1
            if group[0].kind is not Kind.FILE:
                out[group[0].row.start] = self.of(group[0])
                continue
            while at < len(pieces) and pieces[at].kind is Kind.FILE and pieces[at].row.start == group[-1].row.end:
                group.append(pieces[at])
                at += 1
            found = self._private(group[0].row.start, group[-1].row.end, PageCategory.FILE)
            for piece in group:
                low, high = piece.row.start, piece.row.end
                out[low] = [(max(a, low), min(b, high)) for a, b in found if a < high and low < b] if found else []
        return out

    def parted(self, pages: DirtySet, pieces: Iterable[Piece]) -> DirtySet:
        """Those of the pages, none of them of files that last, that have anything in them. Short runs are taken as they
        are: to look would take longer than to read them."""
        absent: Ranges = []
        rows = iter(pieces)
        piece = next(rows, None)
        numbers = pages.runs.cast("B").cast("Q").tolist() if pages else []
        for start, stop in zip(numbers[::2], numbers[1::2], strict=True):
            if stop - start < _LONG_NBYTES:
                continue
            while piece is not None and start < stop:
                if piece.row.end <= start:
                    piece = next(rows, None)
                    continue
                end = min(stop, piece.row.end)
                at = start
                for low, high in self.of(piece, start, end):
                    if low > at:
                        absent.append((at, low))
                    at = high
                if at < end:
                    absent.append((at, end))
                start = end
        return pages - pages_of(joined(absent)) if absent else pages

    # ---- by kind

    def _scanned(self, start: int, end: int, any_of: PageCategory, but: int) -> Ranges:
        found = self._pagemap.scan(
            start, end, category_mask=but, category_inverted=but, category_anyof_mask=any_of, return_mask=any_of
        )
        return joined((part.start, part.end) for part in found)

    def _private(self, start: int, end: int, but: PageCategory) -> Ranges:
        out: Ranges = []
        found = self._pagemap.scan(
            start, end, category_mask=but, category_inverted=but, category_anyof_mask=_CONTENT, return_mask=_CONTENT
        )
        for part in found:
            if part.categories & PageCategory.PRESENT or not self._shown:
                out.append((part.start, part.end))
            else:
                out += self._but_markers(part.start, part.end)
        return joined(out)

    def _but_markers(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Of what looks like swap, what is no marker."""
        page = core.PAGE_BYTES
        for low in range(start, end, _ENTRIES * page):
            high = min(low + _ENTRIES * page, end)
            data = os.pread(self._entries, (high - low) // page * 8, low // page * 8)
            if len(data) < (high - low) // page * 8:
                yield low, high  # whoever reads it will be told why
                continue
            if data == data[:8] * (len(data) // 8) and _is_marker(int.from_bytes(data[:8], "little")):
                continue
            for at, entry in enumerate(array("Q", data)):
                if not _is_marker(entry):
                    yield low + at * page, low + (at + 1) * page

    def _in_memory(self, row: Row, start: int, end: int) -> Ranges:
        """Of shared memory: what is in the page table, and what the file has."""
        found = self._scanned(start, end, PageCategory.PRESENT, 0)
        if not row.shared:
            found += self._private(start, end, PageCategory.FILE)
        file = self._file_of(row)
        if file < 0:
            return [(start, end)]  # nobody can say; to read a hole of it may take memory
        try:
            found += _data(file, row, start, end)
        finally:
            os.close(file)
        return joined(found)

    def _file_of(self, row: Row) -> int:
        """A descriptor of a mapping's file, which its name need not lead to; -1 where none is to be had."""
        process = Path(f"/proc/{self._pid}")
        paths = [process / "map_files" / f"{row.start:x}-{row.end:x}"]
        with suppress(OSError):
            paths += (process / "fd").iterdir()
        for path in paths:
            try:
                about = path.stat()
                if about.st_ino != row.inode or (os.major(about.st_dev), os.minor(about.st_dev)) != row.device:
                    continue
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue
        return -1


def _is_marker(entry: int) -> bool:
    return bool(entry & _SWAPPED) and not entry & _PRESENT and entry & 0x1F == _MARKER


def _entries_are_shown() -> bool:
    """Whether the kernel shows what is in page map entries: of a page of our own, which frame it is in."""
    ours = core.pin(bytearray(b"populated"), writable=True)
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        file.seek(core.address_of(ours) // core.PAGE_BYTES * 8)
        entry = int.from_bytes(file.read(8), "little")
    return bool(entry & _PRESENT and entry & _FRAME)


def _data(file: int, row: Row, start: int, end: int) -> Iterator[tuple[int, int]]:
    """What a file has of a mapping."""
    page = core.PAGE_BYTES
    at, last = row.offset + start - row.start, row.offset + end - row.start
    base = row.start - row.offset
    while at < last:
        try:
            data = os.lseek(file, at, os.SEEK_DATA)
            hole = os.lseek(file, data, os.SEEK_HOLE)
        except OSError as error:
            if error.errno != errno.ENXIO:  # nothing behind it; else nobody can say
                yield base + at, end
            return
        data, hole = data // page * page, -(-hole // page) * page
        if data >= last:
            return
        yield base + max(data, at), base + min(hole, last)
        at = hole

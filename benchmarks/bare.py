# SPDX-License-Identifier: MIT
"""Compiles bare.c with the system's C compiler and calls it."""

from __future__ import annotations

import ctypes
import mmap
import os
import shlex
import subprocess
import tempfile
from array import array
from pathlib import Path
from typing import Any

PAGE = mmap.PAGESIZE
# How many regions one PAGEMAP_SCAN of the bare loop may return; resumed when full. With more than 341 (8 KiB) the
# kernel (6.18) takes its buffer from the page allocator, at 0.5 µs a call; with fewer there are more calls.
VECTOR_REGIONS = 341
FLAGS = ("-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread")


def address_of(buffer: Any) -> int:
    """The address of a writable buffer; the caller keeps the buffer alive."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def compiled(name: str) -> ctypes.CDLL:
    """The functions of a C file in this directory."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "compiled.so"
        subprocess.run([*compiler, *FLAGS, "-o", str(library), str(Path(__file__).with_name(name))], check=True)
        return ctypes.CDLL(str(library))


class Bare:
    """The functions of bare.c. The timed ones return nanoseconds that C measured."""

    def __init__(self) -> None:
        self._lib = compiled("bare.c")
        u64, pointer = ctypes.c_uint64, ctypes.c_void_p
        self._declare("bare_open", ctypes.c_int)
        self._declare("bare_populate", ctypes.c_int, u64, u64)
        self._declare("bare_write", None, u64, u64, pointer, u64, u64, ctypes.c_uint8)
        self._declare(
            "bare_collect",
            ctypes.c_int64,
            ctypes.c_int,
            u64,
            u64,
            pointer,
            u64,
            u64,
            u64,
            pointer,
            pointer,
            u64,
            pointer,
        )
        self._declare(
            "bare_listen",
            ctypes.c_int64,
            ctypes.c_int,
            u64,
            u64,
            pointer,
            u64,
            u64,
            u64,
            pointer,
            u64,
            pointer,
            u64,
            pointer,
        )
        self._declare("bare_ranges", ctypes.c_int64, ctypes.c_int, pointer, u64, pointer, u64, u64, pointer, pointer)
        self._declare("bare_read", ctypes.c_int64, ctypes.c_int, pointer, u64, pointer)
        self._declare("bare_mappings", ctypes.c_int64, ctypes.c_int, pointer)
        self._declare("bare_compare", ctypes.c_int64, u64, u64, pointer, u64, pointer, pointer)
        self._declare("bare_gather", ctypes.c_int64, pointer, u64, pointer)
        self._declare("bare_changed", ctypes.c_int64, pointer, u64, u64, pointer, u64, pointer)
        self._vector = bytearray(24 * VECTOR_REGIONS)
        self._kept = bytearray(16)
        self._bitmaps = bytearray(8)
        self._pages = ctypes.c_uint64()
        self._pagemap = self._checked(self._lib.bare_open())

    def _declare(self, name: str, result: Any, *arguments: Any) -> None:
        function = getattr(self._lib, name)
        function.restype, function.argtypes = result, arguments

    @staticmethod
    def _checked(result: int) -> int:
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return result

    def close(self) -> None:
        os.close(self._pagemap)

    def populate(self, address: int, nbytes: int) -> None:
        """Fills memory, in small pages."""
        self._checked(self._lib.bare_populate(address, nbytes))

    def write(self, address: int, pages: array[int], at: int = 0, value: int = 2) -> None:
        """One store to each of these pages, `at` bytes into the page."""
        self._lib.bare_write(address, PAGE, pages.buffer_info()[0], len(pages), at, value)

    def collect(self, start: int, end: int, passes: int = 1, mirror: int | None = None) -> tuple[int, int]:
        """`passes` scans that re-arm, and copies to the mirror if there is one: (ns, pages found)."""
        each = self._room(start, end, passes)
        elapsed = self._checked(
            self._lib.bare_collect(
                self._pagemap,
                start,
                end,
                address_of(self._vector),
                VECTOR_REGIONS,
                PAGE,
                passes,
                mirror,
                address_of(self._kept),
                each,
                ctypes.addressof(self._pages),
            )
        )
        return elapsed, self._pages.value

    def listen(self, start: int, end: int, passes: int) -> tuple[int, int]:
        """As `collect`, each listener having a bitmap of what the others found: (ns, pages found by all of them)."""
        each, words = self._room(start, end, passes), -(-(end - start) // PAGE // 64)
        if len(self._bitmaps) < 8 * words * passes:
            self._bitmaps = bytearray(8 * words * passes)
        elapsed = self._checked(
            self._lib.bare_listen(
                self._pagemap,
                start,
                end,
                address_of(self._vector),
                VECTOR_REGIONS,
                PAGE,
                passes,
                address_of(self._kept),
                each,
                address_of(self._bitmaps),
                words,
                ctypes.addressof(self._pages),
            )
        )
        return elapsed, self._pages.value

    def ranges(self, ranges: array[int], pagemap: int | None = None) -> tuple[int, int]:
        """One scan that re-arms for each of start, end, start, end, ...: (ns, pages found)."""
        count = len(ranges) // 2
        self._room(0, sum(ranges[1::2]) - sum(ranges[::2]) + count * 2 * PAGE, 1)
        elapsed = self._checked(
            self._lib.bare_ranges(
                self._pagemap if pagemap is None else pagemap,
                ranges.buffer_info()[0],
                count,
                address_of(self._vector),
                VECTOR_REGIONS,
                PAGE,
                address_of(self._kept),
                ctypes.addressof(self._pages),
            )
        )
        return elapsed, self._pages.value

    def read(self, pid: int, runs: array[int], out: int) -> int:
        """The runs of another process, one behind the other: ns."""
        return self._checked(self._lib.bare_read(pid, runs.buffer_info()[0], len(runs) // 2, out))

    def mappings(self, maps: int) -> int:
        """One look at each writable mapping of a process: ns."""
        return self._checked(self._lib.bare_mappings(maps, ctypes.addressof(self._pages)))

    def _room(self, start: int, end: int, passes: int) -> int:
        """Makes room for what each pass may find, and returns how many runs that is."""
        each = (end - start) // PAGE // 2 + 1
        if len(self._kept) < 16 * each * passes:
            self._kept = bytearray(16 * each * passes)
        return each

    def compare(self, address: int, nbytes: int, mirror: int) -> tuple[int, int]:
        """memcmp of each page with the mirror's, and memcpy where they differ: (ns, pages that differed)."""
        self._room(address, address + nbytes, 1)
        where, pages = address_of(self._kept), ctypes.addressof(self._pages)
        elapsed: int = self._lib.bare_compare(address, nbytes, mirror, PAGE, where, pages)
        return elapsed, self._pages.value

    def gather(self, runs: array[int], out: int) -> int:
        """memcpy of each run, one behind the other: ns."""
        elapsed: int = self._lib.bare_gather(runs.buffer_info()[0], len(runs) // 2, out)
        return elapsed

    def changed(self, runs: array[int], base: int, mirror: int) -> tuple[int, int]:
        """memcmp of each page in the runs with the mirror's: (ns, pages that differ)."""
        elapsed: int = self._lib.bare_changed(
            runs.buffer_info()[0], len(runs) // 2, base, mirror, PAGE, ctypes.addressof(self._pages)
        )
        return elapsed, self._pages.value

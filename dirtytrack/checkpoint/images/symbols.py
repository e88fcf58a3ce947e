# SPDX-License-Identifier: MIT
"""Which objects lie where in a process: the data symbols of the ELF files that it maps, by pyelftools.

A file counts only while it is the one that was mapped: by device and inode, and by build ID where the image has it.
"""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import UnsupportedKernel

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .image import ImageMapping
    from .memory import ImageMemory

__all__ = ["Module", "Symbol", "SymbolTable", "modules", "table_of"]

_SYMBOL = struct.Struct("<IBBHQQ")
_STT_OBJECT, _STT_COMMON, _SHN_UNDEF = 1, 5, 0
_MOST_HEADER = 4096
_DEBUG = Path("/usr/lib/debug/.build-id")
_PAGE = 4096


class Symbol(NamedTuple):
    """An object of a program: [start, end) in the process. What it is called, `Module.name` tells."""

    start: int
    end: int
    number: int


class Module(NamedTuple):
    """An ELF file that a process maps, with the objects in it.

    Attributes:
        path: of the file.
        bias: what is added to the addresses in the file.
        start, end: what it takes of the process, from its first byte to its last.
        problem: why its objects are not known, or None.
        table: they, where it has any.
    """

    path: str
    bias: int
    start: int
    end: int
    problem: str | None
    table: SymbolTable | None

    def symbols(self, start: int, end: int) -> list[Symbol]:
        """The objects that have bytes in [start, end), by address."""
        if self.table is None:
            return []
        within = self.table.within(start - self.bias, end - self.bias)
        return [Symbol(low + self.bias, high + self.bias, number) for low, high, number in within]

    def name(self, symbol: Symbol) -> str:
        """What the file calls an object; the plainest of several names."""
        assert self.table is not None, "who has a symbol has it from there"
        return self.table.name(symbol.number)


class SymbolTable:
    """The data symbols of a file: thousands, of which few are asked for, so that names are made then.

    Args:
        found: where each begins and ends, and where its name is.
        names: of all, each ended by a zero byte.
    """

    def __init__(self, found: list[tuple[int, int, int]], names: bytes) -> None:
        found.sort()
        self._found, self._names = found, names
        self._starts = [start for start, _, _ in found]
        self._longest = max((end - start for start, end, _ in found), default=0)

    def __len__(self) -> int:
        return len(self._found)

    def within(self, low: int, high: int) -> Iterator[tuple[int, int, int]]:
        """Start, end and number of those that have bytes in [low, high), in order; aliases once."""
        last: tuple[int, int] | None = None
        for number in range(bisect_right(self._starts, low - self._longest), bisect_left(self._starts, high)):
            start, end, _ = self._found[number]
            if end > low and (start, end) != last:
                last = start, end
                yield start, end, number

    def name(self, number: int) -> str:
        """Of an object, by the number of its first alias."""
        found = self._found
        start, end, _ = found[number]
        names = list[str]()
        while number < len(found) and found[number][:2] == (start, end):
            offset = found[number][2]
            names.append(self._names[offset : self._names.find(b"\0", offset)].decode(errors="replace"))
            number += 1
        return min(names, key=lambda name: (len(name) - len(name.lstrip("_")), len(name), name))


def modules(memory: ImageMemory) -> tuple[Module, ...]:
    """The ELF files that a process maps, by address.

    Raises:
        UnsupportedKernel: the package pyelftools is not installed.
    """
    by_file: dict[tuple[str, int], list[ImageMapping]] = {}
    for mapping in memory.image.mappings:
        if mapping.is_file and mapping.inode:
            by_file.setdefault((mapping.path, mapping.inode), []).append(mapping)
    elffile = _elffile()
    found = [
        _module(elffile, memory, mappings)
        for mappings in by_file.values()
        if any(mapping.permissions[2] == "x" for mapping in mappings)
    ]
    return tuple(sorted(found, key=lambda module: module.start))


def _elffile() -> Any:
    try:
        from elftools.elf import elffile
    except ImportError as error:
        raise UnsupportedKernel(
            "objects are looked up by the package pyelftools, which is not installed: pip install dirtytrack[symbols]",
            feature="pyelftools",
        ) from error
    return elffile


def _module(elffile: Any, memory: ImageMemory, mappings: Sequence[ImageMapping]) -> Module:
    path, start, end = mappings[0].path, mappings[0].start, mappings[-1].end
    unknown = Module(path, 0, start, end, None, None)
    if not memory.is_still(mappings[0]):
        return unknown._replace(problem="the file that was mapped is not there any more, or was written since")
    try:
        with open(path, "rb") as file:
            opened = elffile.ELFFile(file)
            if opened.elfclass != 64 or not opened.little_endian:
                return unknown._replace(problem="it is no ELF file of 64 bits")
            loads = [segment.header for segment in opened.iter_segments("PT_LOAD")]
            bias = _bias(loads, mappings)
            if bias is None:
                return unknown._replace(problem="it is mapped in a way that its headers do not tell")
            build_id = _build_id(opened)
            if not _same_build(memory, bias, build_id, loads):
                return unknown._replace(problem="the file is another now: its build ID differs")
            end = max(end, bias + max(load.p_vaddr + load.p_memsz for load in loads))
            table = table_of(opened)
    except Exception as error:  # pyelftools raises what struct, construct and codecs raise at a file that is damaged
        return unknown._replace(problem=f"the file cannot be read as ELF: {str(error) or type(error).__name__}")
    debug = _of_debug_file(elffile, build_id)
    return Module(path, bias, start, end, None, debug or table)


def _bias(loads: Sequence[Any], mappings: Sequence[ImageMapping]) -> int | None:
    """What is added to the addresses in the file."""
    for mapping in mappings:
        for load in loads:
            if load.p_offset // _PAGE * _PAGE == mapping.offset:
                return int(mapping.start - load.p_vaddr // _PAGE * _PAGE)
    return None


def _build_id(opened: Any) -> str | None:
    for segment in opened.iter_segments("PT_NOTE"):
        for note in segment.iter_notes():
            if note.n_type == "NT_GNU_BUILD_ID" and note.n_name == "GNU":
                return str(note.n_desc)
    return None


def _same_build(memory: ImageMemory, bias: int, build_id: str | None, loads: Sequence[Any]) -> bool:
    """Whether the memory of the process has that build ID, as far as it is kept."""
    if build_id is None or not loads:
        return True
    wanted = bytes.fromhex(build_id)
    first = min(load.p_vaddr for load in loads) // _PAGE * _PAGE + bias
    kept = memory.bytes_at(first, _MOST_HEADER)
    if kept is None or b"GNU\0" not in kept:
        return True
    return wanted in kept


# ---- tables


def table_of(opened: Any) -> SymbolTable | None:
    """Of .symtab, or of .dynsym where it was stripped; None where it has neither.

    The entries are unpacked here: pyelftools makes an object of each, which takes a hundred times as long;
    tests/unit/checkpoint/test_image_symbols.py compares both.
    """
    for name in (".symtab", ".dynsym"):
        section = opened.get_section_by_name(name)
        if section is not None and section.header.sh_type != "SHT_NOBITS":
            names = opened.get_section(section.header.sh_link).data()
            return SymbolTable(
                [
                    (value, value + nbytes, at)
                    for at, info, _, where, value, nbytes in _SYMBOL.iter_unpack(section.data())
                    if nbytes and info & 15 in (_STT_OBJECT, _STT_COMMON) and where != _SHN_UNDEF
                ],
                names,
            )
    return None


def _of_debug_file(elffile: Any, build_id: str | None) -> SymbolTable | None:
    """Of what a distribution keeps apart from a stripped file."""
    if build_id is None or len(build_id) < 4:
        return None
    try:
        with open(_DEBUG / build_id[:2] / f"{build_id[2:]}.debug", "rb") as file:
            return table_of(elffile.ELFFile(file))
    except Exception:  # none is there, or one that is damaged: then what the file itself says
        return None

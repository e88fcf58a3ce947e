# SPDX-License-Identifier: MIT
"""Tables of symbols against pyelftools' own, symbol by symbol, and how long each takes."""

from __future__ import annotations

import os
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest
from elftools.elf.elffile import ELFFile

from dirtytrack.checkpoint.images.symbols import SymbolTable, table_of


def large() -> Path:
    """The largest program that is surely here: the interpreter, or the library that it is in."""
    library = Path(sysconfig.get_config_var("LIBDIR") or "/", sysconfig.get_config_var("LDLIBRARY") or "none")
    return library if library.suffix == ".so" and library.exists() else Path(os.path.realpath(sys.executable))


def test_a_table_has_what_pyelftools_finds_one_by_one() -> None:
    with large().open("rb") as file:
        opened = ELFFile(file)
        began = time.perf_counter()
        found = table_of(opened)
        ours = time.perf_counter() - began
        assert found is not None
        section: Any = opened.get_section_by_name(".symtab") or opened.get_section_by_name(".dynsym")
        began = time.perf_counter()
        wanted: dict[tuple[int, int], set[str]] = {}
        count = 0
        for symbol in section.iter_symbols():
            count += 1
            if symbol.entry.st_info.type in ("STT_OBJECT", "STT_COMMON") and symbol.entry.st_shndx != "SHN_UNDEF":
                start, nbytes = symbol.entry.st_value, symbol.entry.st_size
                if nbytes:
                    wanted.setdefault((start, start + nbytes), set()).add(symbol.name)
        theirs = time.perf_counter() - began
    told = list(found.within(0, 1 << 64))
    assert [(start, end) for start, end, _ in told] == sorted(wanted)
    for start, end, number in told:
        assert found.name(number) in wanted[start, end]
    assert count > 1000
    assert ours < theirs / 3, f"{count} symbols: {ours:.3f} s here, {theirs:.3f} s there: take pyelftools' own"


@pytest.mark.parametrize(
    ("low", "high", "names"),
    [
        (0, 10, []),
        (0, 11, ["plain"]),
        (13, 14, ["plain"]),
        (14, 15, []),
        (20, 21, ["whole"]),
        (50, 51, ["whole", "part"]),
        (51, 90, ["whole", "part"]),
        (54, 90, ["whole"]),
        (100, 200, []),
    ],
)
def test_which_objects_have_bytes_where(low: int, high: int, names: list[str]) -> None:
    text = b"\0__plain\0plain\0_plain\0whole\0part\0"
    at = {name: text.index(b"\0" + name + b"\0") + 1 for name in (b"__plain", b"plain", b"_plain", b"whole", b"part")}
    table = SymbolTable(
        [(20, 100, at[b"whole"]), (50, 54, at[b"part"]), (10, 14, at[b"__plain"]), (10, 14, at[b"plain"]),
         (10, 14, at[b"_plain"])], text
    )  # fmt: skip
    assert [table.name(number) for _, _, number in table.within(low, high)] == names
    assert len(table) == 5

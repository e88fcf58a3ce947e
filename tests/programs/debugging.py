# SPDX-License-Identifier: MIT
"""What gdb says of a core file, and what is in one: page by page."""

from __future__ import annotations

import os
import re
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from shutil import which
from typing import Any

import pytest
from elftools.elf.elffile import ELFFile

__all__ = ["GDB", "gdb", "needs_gdb", "notes_of", "numbers_of", "pages_of", "threads_of"]

PAGE = 4096
GDB = which("gdb")
needs_gdb = pytest.mark.skipif(GDB is None, reason="no gdb is here: make programs installs it")

_HEAD = struct.Struct("<IIQQQQQQ")
_MARK = "=====8<====="
_HARMLESS = r"^\d+\s+\S+: No such file or directory\.$"  # a library's source


def gdb(program: str | Path, core: Path, *commands: str) -> list[str]:
    """What each command prints. gdb must have nothing to warn of."""
    words = ["gdb", "-nx", "-batch", "-iex", "set debuginfod enabled off", "-iex", "set width 0"]
    words += ["-iex", "set auto-load python-scripts off", str(program), str(core)]
    for command in commands:
        words += ["-ex", f"echo {_MARK}\\n", "-ex", command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60, env=_environment())
    complaints = [line for line in done.stderr.splitlines() if line.strip() and not re.search(_HARMLESS, line)]
    assert done.returncode == 0 and not complaints, done.stdout + done.stderr
    return [part.strip("\n") for part in done.stdout.split(f"{_MARK}\n")[1:]]


def _environment() -> dict[str, str]:
    """gdb has a Python of its own, which is not to be led to ours."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | {"LC_ALL": "C.UTF-8"}


def numbers_of(program: str | Path, core: Path) -> dict[int, int]:
    """By thread, the number that gdb gives it."""
    (told,) = gdb(program, core, "info threads")
    return {int(tid): int(number) for number, tid in re.findall(r"^\W*(\d+) .*?LWP (\d+)", told, re.MULTILINE)}


def threads_of(program: str | Path, core: Path) -> dict[int, list[str]]:
    """By thread, the functions of its frames, innermost first."""
    (told,) = gdb(program, core, "thread apply all bt")
    found: dict[int, list[str]] = {}
    for part in re.split(r"^Thread ", told, flags=re.MULTILINE)[1:]:
        head, *lines = part.splitlines()
        match = re.search(r"LWP (\d+)", head)
        assert match, head
        frames = [re.match(r"#\d+ +(?:0x[0-9a-f]+ in )?(\S+)", line) for line in lines]
        found[int(match[1])] = [frame[1] for frame in frames if frame]
    return found


def notes_of(core: Path) -> dict[str, object]:
    """What a core says of threads (their registers, by number), of the auxiliary vector, and of files."""
    found: dict[str, object] = {}
    with core.open("rb") as file:
        segment: Any
        (segment,) = ELFFile(file).iter_segments("PT_NOTE")
        for note in segment.iter_notes():
            if note.n_type == "NT_PRSTATUS":
                tid = int.from_bytes(note.n_descdata[32:36], "little")
                found[f"registers of {tid}"] = note.n_descdata[112:328].hex()
            elif note.n_type == "NT_AUXV":
                found["auxv"] = note.n_descdata
            elif note.n_type == "NT_FILE":
                told = note.n_desc  # whose unit is another in each
                places = [
                    (each.vm_start, each.vm_end, each.page_offset * told.page_size) for each in told.Elf_Nt_File_Entry
                ]
                found["files"] = list(zip(places, note.n_desc.filename, strict=True))
    return found


def pages_of(core: Path) -> Iterator[tuple[int, bytes | None]]:
    """Each page of a core: its address and bytes, None where they are not in the file."""
    data = core.read_bytes()
    (offset,) = struct.unpack_from("<Q", data, 32)
    (count,) = struct.unpack_from("<H", data, 56)
    for number in range(count):
        kind, _, at, address, _, filled, nbytes, _ = _HEAD.unpack_from(data, offset + 56 * number)
        if kind == 1:
            for i in range(0, nbytes, PAGE):
                yield address + i, data[at + i : at + i + PAGE] if i < filled else None

# SPDX-License-Identifier: MIT
"""Programs that are attached to, and what must be true of them afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from dirtytrack import PageCategory, Pagemap, ScanFlag
from dirtytrack.errors import NotRegistered

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "programs"


@cache
def built(name: str) -> Path:
    """A C program of this folder."""
    BUILD.mkdir(parents=True, exist_ok=True)
    source, program = HERE / f"{name}.c", BUILD / name
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        made = program.with_suffix(f".{os.getpid()}")
        subprocess.run(
            ["cc", "-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", source, "-o", made], check=True
        )
        made.rename(program)
    return program


class Program:
    """A running program that answers a line on its standard input with ``well``, or with what is wrong."""

    def __init__(self, command: Sequence[object], pass_fds: Sequence[int] = ()) -> None:
        self.process = subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=pass_fds
        )
        self.pid = self.process.pid
        assert self.answer() == "up"

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def ask(self, line: str = "") -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        status = self.process.wait(timeout=30)
        self.process.stdout.close()
        return status


@contextmanager
def running(*command: object, pass_fds: Sequence[int] = ()) -> Iterator[Program]:
    """A program of `built`, by name and arguments, or any other command. It must end well."""
    first = (
        built(str(command[0])) if isinstance(command[0], str) and (HERE / f"{command[0]}.c").exists() else command[0]
    )
    program = Program([first, *command[1:]], pass_fds)
    try:
        yield program
    except BaseException:
        program.process.kill()
        program.process.communicate()
        raise
    assert program.close() == 0


def python(code: str) -> list[object]:
    return [sys.executable, "-u", "-c", code]


def protected(pid: int) -> int:
    """Bytes of mappings that are registered for write protection with any userfaultfd."""
    total = 0
    with Pagemap(pid) as pagemap, open(f"/proc/{pid}/maps") as lines:
        for line in lines:
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            if line.split()[1][1] != "w":
                continue
            try:
                found = pagemap.scan(
                    start,
                    start + 4096,
                    category_mask=PageCategory.WPALLOWED,
                    return_mask=PageCategory.WPALLOWED,
                    flags=ScanFlag.CHECK_WPASYNC,
                )
            except NotRegistered:
                continue
            total += end - start if found else 0  # nothing is found where the mapping went away meanwhile
    return total


def descriptors(program: Program) -> list[str]:
    """When all of its threads have come as far as to wait."""
    assert program.ask() == "well"
    return _descriptors(program.pid)


def _descriptors(pid: int) -> list[str]:
    return sorted(str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir())


def tracers(pid: int) -> set[str]:
    """TracerPid of each thread."""
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        fields = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines() if ":" in line)
        found.add(fields["TracerPid"].strip())
    return found


def is_unharmed(program: Program, *, fds: list[str] | None = None) -> None:
    """It goes on, says so itself, and nothing of ours is left."""
    assert program.ask() == "well"
    assert tracers(program.pid) == {"0"}
    assert protected(program.pid) == 0
    if fds is not None:
        assert _descriptors(program.pid) == fds

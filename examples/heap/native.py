# SPDX-License-Identifier: MIT
"""The heap's C files, compiled when they are first needed and loaded through cffi."""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from cffi import FFI

from .errors import BuildFailed

__all__ = ["ffi", "library"]

HERE = Path(__file__).parent
SOURCES = tuple(HERE / f"{name}.c" for name in ("memory", "mutators", "old", "minor", "mark", "verify", "lisp"))
HEADERS = (HERE / "heap.h", HERE / "internal.h")
FLAGS = ("-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-fPIC", "-shared", "-pthread", "-fno-omit-frame-pointer")


def _declarations() -> str:
    lines = HEADERS[0].read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith("#"))


ffi: Any = FFI()  # what its structs have is known to C only
ffi.cdef(_declarations())


def build(folder: Path, flags: tuple[str, ...] = ()) -> Path:
    """The library, compiled into a folder unless it is there: its name tells what it was made of.

    Raises:
        BuildFailed: there is no C compiler, or it finds fault.
    """
    command = [*shlex.split(os.environ.get("CC", "cc")), *FLAGS, *flags]
    what = repr(command).encode() + b"".join(path.read_bytes() for path in (*SOURCES, *HEADERS))
    built = folder / f"heap-{hashlib.sha256(what).hexdigest()[:16]}.so"
    if built.exists():
        return built
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / "heap.so"
        try:
            done = subprocess.run([*command, "-o", made, *SOURCES], capture_output=True, text=True, check=False)
        except OSError as error:
            raise BuildFailed(f"cannot run the C compiler {command[0]!r}: {error}. Install one, or set CC") from error
        if done.returncode:
            raise BuildFailed(f"{shlex.join(command)} failed:\n{done.stderr}")
        made.replace(built)
    return built


@functools.cache
def library() -> Any:
    """What heap.h declares."""
    folder = os.environ.get("EXAMPLES_HEAP_BUILD") or HERE.parents[1] / "build" / "heap"
    flags = tuple(shlex.split(os.environ.get("EXAMPLES_HEAP_CFLAGS", "")))
    return ffi.dlopen(str(build(Path(folder), flags)))

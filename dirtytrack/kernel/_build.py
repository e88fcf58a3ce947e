# SPDX-License-Identifier: MIT
"""Builds `dirtytrack.kernel._core` from csrc/. Run by setup.py, never imported by the package.

The headers are what cffi reads: each C function is declared once. Their lines that begin with ``#`` are for the C
compiler alone, so nothing that both must know may stand in a macro. The extension holds a second module, `_taking`:
see taking.c.
"""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

CSRC = Path(__file__).parent / "csrc"
PUBLIC_HEADERS = ("dirtytrack.h", "baseline.h")


def declarations(header: str) -> str:
    """Return a header's text without its preprocessor lines."""
    lines = (CSRC / header).read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith("#"))


def _files(pattern: str) -> list[str]:
    """Return paths relative to the project's root, as setuptools demands."""
    return sorted(f"dirtytrack/kernel/csrc/{path.name}" for path in CSRC.glob(pattern))


ffibuilder = FFI()
for _header in PUBLIC_HEADERS:
    ffibuilder.cdef(declarations(_header))
ffibuilder.set_source(
    "dirtytrack.kernel._core",
    "\n".join(f'#include "{header}"' for header in PUBLIC_HEADERS),
    sources=[*_files("*.c"), "dirtytrack/kernel/taking.c"],
    include_dirs=["dirtytrack/kernel/csrc"],
    depends=_files("*.h"),  # also what brings the headers into the sdist
    extra_compile_args=["-std=gnu11", "-fvisibility=hidden", "-pthread"],
    extra_link_args=["-pthread"],
)

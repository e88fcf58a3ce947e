# SPDX-License-Identifier: MIT
"""The C core as files, for runtimes that compile it in."""

from __future__ import annotations

from pathlib import Path

from ..errors import UnsupportedKernel

__all__ = ["headers", "sources"]

_FOLDER = Path(__file__).parent / "csrc"


def headers() -> Path:
    """The folder of dirtytrack.h.

    Raises:
        UnsupportedKernel: this install came without it.
    """
    if not (_FOLDER / "dirtytrack.h").exists():
        raise UnsupportedKernel(
            f"the C core's files are not in {_FOLDER}: install dirtytrack from a wheel or its sources", feature="csrc"
        )
    return _FOLDER


def sources() -> list[Path]:
    """The C files, all of which are compiled and linked."""
    return sorted(headers().glob("*.c"))

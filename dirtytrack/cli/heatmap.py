# SPDX-License-Identifier: MIT
"""`dirtytrack heatmap`: which memory was written when, as a map: in the terminal, as a picture, as a page."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from .. import observe
from ..errors import KernelRefused, PermissionDenied
from . import recorded
from .strip import can_write, wants_colour

if TYPE_CHECKING:
    from ..observe import Recording

__all__ = ["add_arguments", "run"]

_CELLS = {"": (40, 80), ".png": (760, 926), ".html": (1024, 2048)}
"""By the output's ending: how many rows and columns at most, where not told otherwise."""


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 16384:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 16384")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `dirtytrack heatmap` takes."""
    recorded.add_file(parser)
    parser.add_argument(
        "-o", "--output", metavar="OUT", help="write a picture (.png) or a page (.html) in place of text"
    )
    parser.add_argument("--rows", type=_count, help="parts of the memory that is shown, at most")
    parser.add_argument("--columns", type=_count, help="parts of the time, at most")


def run(args: argparse.Namespace) -> int:
    """Draw the map.

    Returns:
        0; 2 where the output's name ends in neither .png nor .html.

    Raises:
        InvalidRecording: the file is no recording, or nothing was written in it.
        PermissionDenied, KernelRefused: a file may not, or cannot, be read or written.
        UnsupportedKernel: a package is missing.
    """
    ending = Path(args.output).suffix.lower() if args.output else ""
    if ending not in _CELLS or (args.output and not ending):
        print(f"dirtytrack heatmap: {args.output} ends in neither .png nor .html", file=sys.stderr)
        return 2
    recording = recorded.opened(args)
    colour = not ending and wants_colour(sys.stdout)
    rows, columns = _CELLS[ending]
    if not ending:
        from ..observe.text import LABEL_COLUMNS

        size = shutil.get_terminal_size()
        columns = max(16, size.columns - LABEL_COLUMNS - 1)
        rows = max(8, size.lines - 6) * (2 if colour else 1)
    rows, columns = args.rows or rows, args.columns or columns
    heat = observe.heat_map(recording, rows=rows, columns=columns)
    if not ending:
        for line in observe.heat_text(heat, columns, colour=colour, plain=not can_write(sys.stdout, "░█▀…┄")):
            print(line)
        return 0
    beside = Path(f"{args.output}.{os.getpid()}.new")
    try:
        if ending == ".png":
            observe.heat_png(heat, beside, title=_title(recording))
        else:
            beside.write_text(observe.heat_page(heat, title=_title(recording)), encoding="utf-8")
        beside.replace(args.output)
    except OSError as error:
        if not isinstance(error, (KernelRefused, PermissionDenied)):
            kind = PermissionDenied if isinstance(error, PermissionError) else KernelRefused
            raise kind(f"{args.output} cannot be written: {error.strerror}", errno=error.errno) from error
        raise
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
    print(f"{args.output}: {Path(args.output).stat().st_size:,} bytes")
    return 0


def _title(recording: Recording) -> str:
    """Who was recorded, and when."""
    who = list(dict.fromkeys(session.command or f"process {session.pid}" for session in recording.sessions))
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(recording.begun))
    return f"{', '.join(who) or recording.path}, {when}: memory written"

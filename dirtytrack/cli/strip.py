# SPDX-License-Identifier: MIT
"""Lines of bars: a heat strip (where in memory the dirty pages are), a sparkline (how much it was of late); and the
screen that they are drawn on."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from typing import TextIO

__all__ = ["Screen", "can_write", "heat", "sparkline", "wants_colour"]

_BARS = " ▁▂▃▄▅▆▇█"
_PLAIN = " .:-=+*%#"
_COLOURS = ("", "34", "34", "36", "36", "32", "33", "33", "31")  # blue, cyan, green, yellow, red


def heat(bitmap: bytes | memoryview, pages: int, cells: int) -> list[float]:
    """The dirty share, 0 to 1, of each of `cells` equal parts of a region.

    Args:
        bitmap: One bit a page, LSB first, as `DirtySet.bitmap` has it.
        pages: How many pages the region has.
        cells: How many parts to make; fewer where there are fewer pages.
    """
    bits = int.from_bytes(bitmap, "little")
    cells = min(cells, pages)
    shares = []
    for cell in range(cells):
        first, last = pages * cell // cells, pages * (cell + 1) // cells
        part = bits >> first & (1 << last - first) - 1
        shares.append(part.bit_count() / (last - first))
    return shares


def sparkline(values: Sequence[float], width: int, *, plain: bool = False) -> str:
    """The last ``width`` values as bars, against the largest of them, right-aligned; what is nothing is blank."""
    shown = values[-width:] if width > 0 else ()
    bars, most = _PLAIN if plain else _BARS, max(shown, default=0.0)
    drawn = (bars[0 if value <= 0 else min(8, 1 + int(value / most * 8))] for value in shown)
    return "".join(drawn).rjust(width)


class Screen:
    """Standard output for what stays, standard error for progress that is overwritten, on a terminal only.

    Args:
        quiet: Nothing goes to standard output (`--json` prints its document itself).
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._out, self._progress = sys.stdout, sys.stderr
        self._moving = self._progress.isatty() and os.environ.get("TERM") != "dumb"
        self._shown_at = 0.0
        self._shown = False
        self.colour = wants_colour(self._out)
        self._levels = _BARS if can_write(self._out, _BARS) else _PLAIN
        self.columns = shutil.get_terminal_size().columns

    def line(self, text: str = "", style: str = "") -> None:
        """Print a line; `style` is an SGR code such as "1" for bold."""
        if self._quiet:
            return
        self.clear()
        print(f"\x1b[{style}m{text}\x1b[0m" if style and self.colour else text, file=self._out, flush=True)

    def progress(self, text: str, *, now: bool = False) -> None:
        """Show what is being done in place of what was shown before; at most ten times a second unless `now`."""
        moment = time.monotonic()
        if self._moving and (now or moment - self._shown_at >= 0.1):
            self._shown_at, self._shown = moment, True
            print(f"\r\x1b[K{text[: self.columns - 1]}", end="", file=self._progress, flush=True)

    def clear(self) -> None:
        """Take the progress away."""
        if self._shown:
            self._shown = False
            print("\r\x1b[K", end="", file=self._progress, flush=True)

    def strip(self, shares: Sequence[float]) -> str:
        """Draw a heat strip: blank is clean, any dirty page shows, the scale is by square root."""
        drawn, current = [], ""
        for share in shares:
            level = 0 if share <= 0 else min(8, 1 + int(share**0.5 * 8))
            if self.colour and level and _COLOURS[level] != current:
                current = _COLOURS[level]
                drawn.append(f"\x1b[{current}m")
            drawn.append(self._levels[level])
        return "".join(drawn) + ("\x1b[0m" if current else "")


def can_write(stream: TextIO, text: str) -> bool:
    """Whether a stream's encoding has all these characters."""
    try:
        text.encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def wants_colour(stream: TextIO) -> bool:
    """Whether colours go to a stream: to a terminal only, and to none that does not want them."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

# SPDX-License-Identifier: MIT
"""A heat map in characters, for a terminal or a log."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..process.mappings import named
from .colours import TERMINAL, levels
from .units import show_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .heat import HeatMap, Stretch

__all__ = ["LABEL_COLUMNS", "heat_text"]

LABEL_COLUMNS = 34
"""How many columns stand before the map."""
_SHADES, _PLAIN_SHADES = " ░▒▓█", " .:+#"
_COLOUR_LEVELS = len(TERMINAL)


def heat_text(heat: HeatMap, columns: int, *, colour: bool, plain: bool = False) -> Iterator[str]:
    """The lines of a map, ``columns`` wide without the labels.

    With ``colour`` a line has two rows of the map, one above the other, in ANSI's 256 colours; without, one row, in
    shades. ``plain`` is ASCII only. Blank is clean.
    """
    grid = levels(heat.across(columns), _COLOUR_LEVELS if colour else len(_SHADES))
    fold = ("~ " if plain else "┄ ") * (columns // 2)
    last = ""
    for i, stretch in enumerate(heat.stretches):
        if i:
            gap = stretch.start - heat.stretches[i - 1].end
            yield f"{show_bytes(gap) + ' not shown':>{LABEL_COLUMNS - 1}} {_styled(fold, '2', colour)}".rstrip()
        step = 2 if colour else 1
        for row in range(stretch.first, stretch.first + stretch.rows, step):
            label = _label(heat, stretch, row, row + step)
            shown, last = label if label != last or row == stretch.first else "", label
            start = stretch.start + (row - stretch.first) * heat.row_bytes
            head = f"{start:>12x} {_fitting(shown, LABEL_COLUMNS - 14, plain=plain):<{LABEL_COLUMNS - 14}} "
            if colour:
                lower = grid[:, row + 1] if row + 1 < stretch.first + stretch.rows else None
                yield head + _halves(grid[:, row], lower)
            else:
                shades = _PLAIN_SHADES if plain else _SHADES
                yield (head + "".join(shades[max(0, level)] for level in grid[:, row].tolist())).rstrip()
    begun, ended = f"{heat.begun:.1f} s", f"{heat.ended:.1f} s"
    yield " " * LABEL_COLUMNS + begun + ended.rjust(columns - len(begun))
    shown_bytes = sum(stretch.end - stretch.start for stretch in heat.stretches)
    yield (
        f"{show_bytes(shown_bytes)} of memory in rows of {show_bytes(heat.row_bytes)}, {len(heat.columns)} columns of "
        "time; the more of a row an epoch writes, the " + ("lighter" if colour else "denser")
    )


def _fitting(name: str, room: int, *, plain: bool) -> str:
    """The end of a name says more than its beginning."""
    return name if len(name) <= room else ("~" if plain else "…") + name[1 - room :]


def _label(heat: HeatMap, stretch: Stretch, row: int, until: int) -> str:
    start = stretch.start + (row - stretch.first) * heat.row_bytes
    end = min(stretch.end, stretch.start + (until - stretch.first) * heat.row_bytes)
    found = heat.names(start, end)
    names = list(dict.fromkeys(named(place.name) for place in found))
    return ", ".join(names[:2]) + (f" +{len(names) - 2}" if len(names) > 2 else "")


def _styled(text: str, style: str, colour: bool) -> str:
    return f"\x1b[{style}m{text}\x1b[0m" if colour else text


def _halves(upper: NDArray[np.int64], lower: NDArray[np.int64] | None) -> str:
    """Two rows in one line: the colour of the character above, that of its background below."""
    out, style = [], ""
    below = lower.tolist() if lower is not None else [0] * len(upper)
    for up, down in zip(upper.tolist(), below, strict=True):
        front = f"38;5;{TERMINAL[up]}" if up > 0 else ""
        back = f"48;5;{TERMINAL[down]}" if down > 0 else ""
        character = " "
        if front:
            character = "▀"
        elif back:
            character, front, back = "▄", f"38;5;{TERMINAL[down]}", ""
        wanted = ";".join(filter(None, (front, back)))
        if wanted != style:
            out.append(f"\x1b[0;{wanted}m" if wanted else "\x1b[0m")
            style = wanted
        out.append(character)
    return "".join(out).rstrip() + ("\x1b[0m" if style else "")

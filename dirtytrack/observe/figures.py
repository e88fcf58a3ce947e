# SPDX-License-Identifier: MIT
"""Numbers as people read them: amounts of bytes in three digits, sparklines."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["amount", "named", "sparkline"]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_BARS = "▁▂▃▄▅▆▇█"
_PLAIN_BARS = "_.-=+*%#"


def amount(nbytes: float) -> str:
    """Three digits and a unit: "4.19 MiB". Nothing is "0"."""
    if nbytes <= 0:
        return "0"
    value = float(nbytes)
    for unit in _UNITS:
        if value < 999.5 or unit == _UNITS[-1]:
            break
        value /= 1024
    if unit == "B":
        return f"{value:.0f} B"
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"


def sparkline(values: Sequence[float], width: int, *, plain: bool = False) -> str:
    """The last ``width`` values as bars, against the largest of them, right-aligned; what is nothing is blank."""
    shown = values[-width:] if width > 0 else ()
    bars, most = _PLAIN_BARS if plain else _BARS, max(shown, default=0.0)
    drawn = (" " if value <= 0 else bars[min(7, int(value / most * 8))] for value in shown)
    return "".join(drawn).rjust(width)


def named(name: str) -> str:
    """A mapping's name; memory without one goes by what `process.attach` calls it."""
    return name or "[anon]"

# SPDX-License-Identifier: MIT
"""Draws docs/density.svg: adaptive and plain tracking at each density, as multiples of the best of all other ways.

Run it as ``python docs/draw_density.py docs/benchmarks.json docs/density.svg``; ``make bench-docs`` measures first.
Standard library only.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

WIDTH, TOP, LEFT, RIGHT = 880, 84, 62, 16
PANEL_HEIGHT, BELOW, BETWEEN = 150, 52, 14
INK, FAINT, GRID = "#1d2733", "#5d6b7a", "#e3e8ee"
ADAPTIVE, PLAIN, ALLOWED = "#e8743b", "#2563a8", "#2f8f6b"
MOST_OF_BEST = 1.1

Told = dict[str, Any]
Point = tuple[float, float, float]  # share of the pages, adaptive and plain as multiples of the best


def text(x: float, y: float, what: str, *, size: int = 11, fill: str = INK, extra: str = "") -> str:
    """A line of text with its baseline at y."""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}"{extra}>{escape(what)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str, extra: str = "") -> str:
    """A thin straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{extra}/>'


def panels(told: Told) -> dict[str, dict[str, list[Point]]]:
    """The points of each size and pattern."""
    out: dict[str, dict[str, list[Point]]] = {}
    rows = [row for row in told["rows"] if row["benchmark"] == "density"]
    for best, plain in zip(rows[::2], rows[1::2], strict=True):  # as the benchmark tells them
        size, pattern, *_ = best["name"].removeprefix("density ").split(", ")
        point = best["share"], best["ours_ns"] / best["bare_ns"], plain["bare_ns"] / best["bare_ns"]
        out.setdefault(size, {}).setdefault(pattern, []).append(point)
    return out


def draw(told: Told) -> str:
    """The whole picture."""
    sizes = panels(told)
    patterns = list(next(iter(sizes.values())))
    every = [point for size in sizes.values() for points in size.values() for point in points]
    ratios = [ratio for _, *both in every for ratio in both]
    low, high = math.log2(min(*ratios, 0.9)) - 0.1, math.log2(max(*ratios, 1.2)) + 0.1
    width = (WIDTH - LEFT - RIGHT + BETWEEN) / len(patterns) - BETWEEN
    height = TOP + len(sizes) * (PANEL_HEIGHT + BELOW)
    title = "An epoch of adaptive and of plain tracking, as multiples of the best other way"
    size_of_all = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size_of_all} font-family="system-ui, sans-serif" role="img">',
        "<!-- SPDX-License-Identifier: MIT; drawn by docs/draw_density.py -->",
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff"/>',
        text(16, 26, title, size=15, extra=' font-weight="600"'),
        text(16, 45, "by the share of pages written in each epoch; logarithmic; lower is better", size=12, fill=FAINT),
    ]
    for at, colour, what in (
        (560, ADAPTIVE, "adaptive"),
        (640, PLAIN, "plain"),
        (700, ALLOWED, f"{MOST_OF_BEST:g} times the best"),
    ):
        out += [line(at, 41, at + 18, 41, colour, ' stroke-width="3"'), text(at + 23, 45, what, size=12, fill=colour)]
    for i, (size, by_pattern) in enumerate(sizes.items()):
        top = TOP + i * (PANEL_HEIGHT + BELOW)
        bottom = top + PANEL_HEIGHT

        def y(ratio: float, top: float = top) -> float:
            return top + PANEL_HEIGHT * (high - math.log2(ratio)) / (high - low)

        for j, pattern in enumerate(patterns):
            left = LEFT + j * (width + BETWEEN)
            points = by_pattern[pattern]
            step = width / max(1, len(points) - 1)
            out.append(text(left, top - 8, f"{size}, {pattern}", extra=' font-weight="600"'))
            for power in range(math.ceil(low), math.floor(high) + 1):
                out.append(line(left, y(2.0**power), left + width, y(2.0**power), GRID))
                if not j:
                    label = text(
                        left - 8, y(2.0**power) + 4, f"{2.0**power:g}x", fill=FAINT, extra=' text-anchor="end"'
                    )
                    out.append(label)
            out.append(line(left, y(MOST_OF_BEST), left + width, y(MOST_OF_BEST), ALLOWED, ' stroke-dasharray="4 3"'))
            for which, colour, thick in ((2, PLAIN, 1.8), (1, ADAPTIVE, 3.0)):
                path = " ".join(f"{left + k * step:.1f},{y(point[which]):.1f}" for k, point in enumerate(points))
                out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{thick}"/>')
            for k, point in enumerate(points):
                anchor = "middle" if 0 < k < len(points) - 1 else "end" if k else "start"  # within the panel
                below = bottom + (14 if k % 2 else 26)  # side by side they would touch
                label = f"{point[0] * 100:g}" + ("" if k else " %")
                out.append(text(left + k * step, below, label, size=10, fill=FAINT, extra=f' text-anchor="{anchor}"'))
    return "\n".join([*out, "</svg>", ""])


if __name__ == "__main__":
    measured = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(draw(measured), encoding="utf-8")

# SPDX-License-Identifier: MIT
"""Draws docs/epochs.svg: what an epoch costs by each method, from what the benchmark measured. Standard library only.

Run it as ``python docs/draw_epochs.py docs/benchmarks.json docs/epochs.svg``; ``make bench-docs`` measures first.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 880, 480
LEFT, RIGHT, TOP, BOTTOM = 86, 660, 66, 420
LABEL_APART = 17
INK, FAINT, GRID = "#1d2733", "#5d6b7a", "#e3e8ee"
COLOURS = {
    "nothing tracked": "#9aa5b1",
    "dirtytrack": "#e8743b",
    "mprotect + SIGSEGV": "#2563a8",
    "synchronous userfaultfd": "#7b4fa3",
    "memcmp with a copy": "#2f8f6b",
    "xxh3 of every page": "#b08a00",
    "copy of everything": "#4aa3c7",
    "fork": "#c2406b",
}
OTHER = "#444444"


def text(x: float, y: float, what: str, *, size: int = 12, fill: str = INK, extra: str = "") -> str:
    """A line of text with its baseline at y."""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}"{extra}>{escape(what)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    """A thin straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def apart(wanted: list[float]) -> list[float]:
    """Label positions, from the top down, near where they belong and no nearer to each other than LABEL_APART."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    placed = [0.0] * len(wanted)
    at = -math.inf
    for i in order:
        at = placed[i] = max(wanted[i], at + LABEL_APART)
    over = at - BOTTOM
    for i in reversed(order):  # what was pushed out at the bottom goes up again
        if over <= 0:
            break
        placed[i] -= over
        above = [placed[j] for j in order if wanted[j] < wanted[i]]
        over = max(above) + LABEL_APART - placed[i] if above else 0
    return placed


def draw(told: dict[str, Any]) -> str:
    """The whole picture."""
    rows = [row for row in told["rows"] if row["benchmark"] == "epoch"]
    shares = sorted({row["share"] for row in rows})
    methods = list(dict.fromkeys(row["method"] for row in rows))
    times = {(row["method"], row["share"]): row["ours_ns"] / 1e6 for row in rows}
    low, high = math.floor(math.log10(min(times.values()))), math.ceil(math.log10(max(times.values())))
    begin, end = math.log10(shares[0]), math.log10(shares[-1])

    def x(share: float) -> float:
        return LEFT + (RIGHT - LEFT) * (math.log10(share) - begin) / (end - begin)

    def y(milliseconds: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (math.log10(milliseconds) - low) / (high - low)

    title = f"One epoch over {rows[0]['name'].split(',')[0].removeprefix('epoch ')}: writes, finding them, copying them"
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif" role="img">',
        "<!-- SPDX-License-Identifier: MIT; drawn by docs/draw_epochs.py -->",
        f"<title>{escape(title)}, by each method</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>',
        text(16, 26, title, size=15, extra=' font-weight="600"'),
        text(16, 45, "milliseconds, both axes logarithmic; lower is better", fill=FAINT),
    ]
    for power in range(low, high + 1):
        out.append(line(LEFT, y(10**power), RIGHT, y(10**power), GRID))
        label = f"{10**power:,} ms" if power >= 0 else f"{10.0**power:g} ms"
        out.append(text(LEFT - 10, y(10**power) + 4, label, fill=FAINT, extra=' text-anchor="end"'))
    for share in shares:
        out.append(line(x(share), TOP, x(share), BOTTOM, GRID))
        out.append(text(x(share), BOTTOM + 20, f"{share * 100:g} %", fill=FAINT, extra=' text-anchor="middle"'))
    middle = (LEFT + RIGHT) / 2
    out.append(text(middle, BOTTOM + 42, "pages written in the epoch", fill=FAINT, extra=' text-anchor="middle"'))
    labels = apart([y(times[method, shares[-1]]) for method in methods])
    for method, beside in zip(methods, labels, strict=True):
        colour, ours = COLOURS.get(method, OTHER), method == "dirtytrack"
        points = [(x(share), y(times[method, share])) for share in shares]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        dashes = ' stroke-dasharray="4 4"' if method == "nothing tracked" else ""
        thick = 3.5 if ours else 1.8
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{thick}"{dashes}/>')
        out += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{thick + 0.8:.1f}" fill="{colour}"/>' for px, py in points]
        out.append(line(RIGHT + 5, points[-1][1], RIGHT + 22, beside, colour))
        weight = ' font-weight="600"' if ours else ""
        out.append(text(RIGHT + 27, beside + 4, method, fill=colour, extra=weight))
    return "\n".join([*out, "</svg>", ""])


if __name__ == "__main__":
    measured = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(draw(measured), encoding="utf-8")

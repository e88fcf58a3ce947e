# SPDX-License-Identifier: MIT
"""Draws docs/saving.svg: how fast a program goes on that saves each second, by how much of its memory it writes.

Run it as ``python docs/draw_saving.py docs/checkpointing.json docs/saving.svg``; ``make bench-checkpoint`` measures
first. Standard library only.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

WIDTH, LEFT, RIGHT, TOP, ROW = 720, 120, 190, 76, 34
INK, FAINT, BAR = "#1d2733", "#5d6b7a", "#e8743b"


def text(x: float, y: float, what: str, *, size: int = 12, fill: str = INK, extra: str = "") -> str:
    """A line of text with its baseline at y."""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}"{extra}>{escape(what)}</text>'


def draw(told: dict[str, Any]) -> str:
    """The whole picture."""
    rows = [row for row in told["rows"] if row["benchmark"] == "checkpoint_beside" and "stalls" in row["result"]]
    speeds = [row["bare_ns"] / row["ours_ns"] for row in rows]
    scale = (WIDTH - LEFT - RIGHT) / max(1.0, *speeds)
    height = TOP + ROW * len(rows) + 16
    title = "A program that saves each second, beside the same one that does not"
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif" role="img">',
        "<!-- SPDX-License-Identifier: MIT; drawn by docs/draw_saving.py -->",
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff"/>',
        text(16, 26, title, size=15, extra=' font-weight="600"'),
        text(
            16, 45, "its speed, by the share of its pages that it writes over and over; the line is 100 %", fill=FAINT
        ),
    ]
    for number, (row, speed) in enumerate(zip(rows, speeds, strict=True)):
        y = TOP + number * ROW
        stalls = row["result"].rpartition("stalls ")[2]
        out += [
            text(LEFT - 10, y + 16, f"{100 * row['share']:g} % hot", extra=' text-anchor="end"'),
            f'<rect x="{LEFT}" y="{y}" width="{speed * scale:.1f}" height="22" rx="3" fill="{BAR}"/>',
            text(LEFT + max(speed, 1) * scale + 10, y + 16, f"{100 * speed:.0f} %, stalls of {stalls}"),
        ]
    mark = LEFT + scale
    out.append(f'<line x1="{mark:.1f}" y1="{TOP - 8}" x2="{mark:.1f}" y2="{height - 12}" stroke="{FAINT}"/>')
    return "\n".join([*out, "</svg>", ""])


if __name__ == "__main__":
    measured = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(draw(measured), encoding="utf-8")

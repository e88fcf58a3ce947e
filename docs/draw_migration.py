# SPDX-License-Identifier: MIT
"""Draws docs/migrating.svg, and writes the table of docs/migration.md, from what ``benchmarks.migrating`` measured.

Run it as ``python docs/draw_migration.py docs/moving.json docs/migrating.json docs/migration.md docs/migrating.svg``.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

_BULK = re.compile(r"(<!-- bulk -->\n).*?(<!-- end -->)", re.DOTALL)
_PLACE = re.compile(r"(<!-- measured -->\n).*?(<!-- end -->)", re.DOTALL)
WIDTH, HEIGHT = 760, 380
LEFT, RIGHT, TOP, BOTTOM = 70, 600, 62, 320
INK, FAINT, GRID = "#1d2733", "#5d6b7a", "#e3e8ee"
COLOURS = {"dirtytrack": "#e8743b", "as predicted": "#9aa5b1", "with delta=True": "#3f8f5b", "QEMU": "#2563a8"}


def render_bulk(page: str, told: dict[str, Any]) -> str:
    """The page with what the bulk takes."""
    head = ("", "ours", "the loop", "")
    rows = [head, ("---",) * len(head)]
    rows += [
        (row["name"], f"{row['ours_ns'] / 1e6:,.0f} ms", f"{row['bare_ns'] / 1e6:,.0f} ms", row["result"])
        for row in told["rows"]
    ]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    where = f"{told['kernel']}, {told['machine']}, {told['python']}, on {told['date']}"
    lines += ["", f"{where}; medians of {told['rows'][0]['rounds']} rounds or more; `{told['command']}`."]
    return _BULK.sub(lambda found: "\n".join([found[1], *lines, "", found[2]]), page)


def render(page: str, told: dict[str, Any]) -> str:
    """The page with what was measured of downtime."""
    head = ("written", "who", "in all", "sent", "rounds", "downtime", "predicted")
    rows = [head, ("---",) * len(head)]
    rows += [
        (
            f"{row['dirty_mib']:g} MiB/s",
            row["who"],
            f"{row['seconds']:.2f} s",
            f"{row['sent_mib']:.0f} MiB",
            str(row["rounds"]),
            f"{row['downtime_ms']:.1f} ms",
            "" if row["predicted_ms"] is None else f"{row['predicted_ms']:.1f} ms",
        )
        for row in told["rows"]
    ]
    first = told["rows"][0]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    where = f"{told['kernel']}, {told['machine']}, {told['python']}, on {told['date']}"
    cap = "no limit" if first["bandwidth_mb"] is None else f"{first['bandwidth_mb']:g} MB/s"
    how = f"{first['mib']} MiB of memory, bandwidth {cap}, goal {told['goal_ms']:g} ms"
    lines += ["", f"{where}; {how}; `{told['command']}`."]
    return _PLACE.sub(lambda found: "\n".join([found[1], *lines, "", found[2]]), page)


def text(x: float, y: float, what: str, *, size: int = 12, fill: str = INK, extra: str = "") -> str:
    """A line of text with its baseline at y."""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}"{extra}>{escape(what)}</text>'


def draw(told: dict[str, Any]) -> str:
    """Downtime by how fast memory is written."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in told["rows"]:
        name = {"QEMU": "QEMU", "dirtytrack": "dirtytrack", "dirtytrack, delta": "with delta=True"}[
            row["who"] if row["who"].startswith("dirtytrack") else "QEMU"
        ]
        lines.setdefault(name, []).append((row["dirty_mib"], row["downtime_ms"]))
        if row["who"] == "dirtytrack":
            lines.setdefault("as predicted", []).append((row["dirty_mib"], row["predicted_ms"]))
    right: float = max(x for line in lines.values() for x, _ in line) or 1.0
    top: float = 20 * (1 + max(told["goal_ms"], *(y for line in lines.values() for _, y in line)) // 20)

    def x(rate: float) -> float:
        return LEFT + (RIGHT - LEFT) * rate / right

    def y(ms: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * ms / top

    title = "Downtime by how fast memory is written"
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif" role="img">',
        "<!-- SPDX-License-Identifier: MIT; drawn by docs/draw_migration.py -->",
        f"<title>{title}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>',
        text(16, 26, title, size=15, extra=' font-weight="600"'),
        text(16, 45, f"milliseconds; lower is better, and {told['goal_ms']:g} ms was the goal", fill=FAINT),
    ]
    for step in range(5):
        ms = top * step / 4
        out.append(f'<line x1="{LEFT}" y1="{y(ms):.1f}" x2="{RIGHT}" y2="{y(ms):.1f}" stroke="{GRID}"/>')
        out.append(text(LEFT - 8, y(ms) + 4, f"{ms:g} ms", fill=FAINT, extra=' text-anchor="end"'))
    rates = dict.fromkeys(row["dirty_mib"] for row in told["rows"])
    out += [text(x(rate), BOTTOM + 20, f"{rate:g}", fill=FAINT, extra=' text-anchor="middle"') for rate in rates]
    middle = (LEFT + RIGHT) / 2
    out.append(text(middle, BOTTOM + 42, "MiB written in a second", fill=FAINT, extra=' text-anchor="middle"'))
    for number, (name, line) in enumerate(lines.items()):
        colour = COLOURS[name]
        dashes = ' stroke-dasharray="4 4"' if name == "as predicted" else ""
        points = " ".join(f"{x(rate):.1f},{y(ms):.1f}" for rate, ms in line)
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2.5"{dashes}/>')
        out += [f'<circle cx="{x(rate):.1f}" cy="{y(ms):.1f}" r="3.3" fill="{colour}"/>' for rate, ms in line]
        out.append(text(RIGHT + 16, TOP + 16 + 22 * number, name, fill=colour, extra=' font-weight="600"'))
    return "\n".join([*out, "</svg>", ""])


if __name__ == "__main__":
    bulk, measured = (json.loads(Path(name).read_text(encoding="utf-8")) for name in sys.argv[1:3])
    page = Path(sys.argv[3])
    page.write_text(render_bulk(render(page.read_text(encoding="utf-8"), measured), bulk), encoding="utf-8")
    Path(sys.argv[4]).write_text(draw(measured), encoding="utf-8")

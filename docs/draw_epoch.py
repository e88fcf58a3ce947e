# SPDX-License-Identifier: MIT
"""Draws docs/epoch.svg: what happens to a few pages in two epochs. Standard library only.

Run it as ``python docs/draw_epoch.py docs/epoch.svg``, or ``make docs/epoch.svg``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.sax.saxutils import escape

PAGES = 20
WIDTH, HEIGHT = 880, 378
LEFT, CELL, TALL = 220, 32, 26
ARMED, WRITTEN, INK, FAINT, ACCENT = "#dfe7f1", "#e8743b", "#1d2733", "#5d6b7a", "#2563a8"
FIRST, SECOND = {3, 4, 5, 11, 16}, {4, 12, 13}
ROWS = (  # top, what the program sees, what that means, pages written so far
    (56, "start()", "all pages write-protected", set[int]()),
    (116, "epoch 1: writes", "the first write to a page: one fault", FIRST),
    (226, "epoch 2 has begun", "those pages are protected again", set[int]()),
    (286, "epoch 2: writes", "page 4 once more, 12 and 13", SECOND),
)
COLLECTS = ((176, 1, FIRST), (346, 2, SECOND))


def text(x: float, y: float, what: str, *, size: int = 13, fill: str = INK, extra: str = "") -> str:
    """A line of text with its baseline at y."""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}"{extra}>{escape(what)}</text>'


def runs(pages: set[int]) -> str:
    """Half-open runs of page numbers, as a DirtySet gives them."""
    out, numbers = [], sorted(pages)
    for page in numbers:
        if page - 1 not in pages:
            end = next(n for n in range(page, PAGES + 1) if n not in pages)
            out.append(f"[{page}, {end})")
    return " ".join(out)


def strip(top: int, title: str, note: str, written: set[int]) -> list[str]:
    """One row of pages with its caption at the left."""
    out = [text(16, top + 11, title, extra=' font-weight="600"'), text(16, top + 27, note, size=11, fill=FAINT)]
    for page in range(PAGES):
        fill = WRITTEN if page in written else ARMED
        x = LEFT + page * CELL
        out.append(f'<rect x="{x}" y="{top}" width="{CELL - 3}" height="{TALL}" rx="3" fill="{fill}"/>')
        number_fill = "#ffffff" if page in written else FAINT
        middle = x + (CELL - 3) / 2
        out.append(text(middle, top + 17, str(page), size=10, fill=number_fill, extra=' text-anchor="middle"'))
    return out


def collect(y: int, epoch: int, pages: set[int]) -> list[str]:
    """The line between two epochs."""
    found = f"DirtySet(epoch={epoch}): pages {runs(pages)}"
    right = LEFT + PAGES * CELL - 3
    dashes = f'stroke="{ACCENT}" stroke-width="1.5" stroke-dasharray="5 4"'
    return [
        f'<line x1="{LEFT}" y1="{y - 20}" x2="{right}" y2="{y - 20}" {dashes}/>',
        text(16, y, "collect()", fill=ACCENT, extra=' font-weight="600"'),
        text(16, y + 16, "one scan: read and re-arm", size=11, fill=FAINT),
        text(LEFT, y, found, fill=ACCENT, extra=' font-weight="600"'),
    ]


def draw() -> str:
    """The whole picture."""
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif" role="img">',
        "<!-- SPDX-License-Identifier: MIT; drawn by docs/draw_epoch.py -->",
        "<title>Two epochs: pages written after start() or collect() are what the next collect() returns</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>',
        f'<rect x="{LEFT}" y="20" width="14" height="14" rx="3" fill="{ARMED}"/>',
        text(LEFT + 21, 32, "protected, not written in this epoch", size=12, fill=FAINT),
        f'<rect x="{LEFT + 250}" y="20" width="14" height="14" rx="3" fill="{WRITTEN}"/>',
        text(LEFT + 271, 32, "written: further writes run at full speed", size=12, fill=FAINT),
    ]
    for row in ROWS:
        out += strip(*row)
    for line in COLLECTS:
        out += collect(*line)
    return "\n".join([*out, "</svg>", ""])


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(draw(), encoding="utf-8")

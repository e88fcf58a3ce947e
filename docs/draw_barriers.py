# SPDX-License-Identifier: MIT
"""Writes the tables of docs/gc.md and draws docs/barriers.svg, from docs/barriers.json. Standard library only.

Run it as ``python docs/draw_barriers.py docs/barriers.json docs/gc.md docs/barriers.svg``; ``make bench-barriers``
measures first.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

NAMES = {
    "none": "none: all is searched",
    "cards": "software cards, 512 B",
    "mprotect": "mprotect + SIGSEGV",
    "plain": "dirtytrack, plain",
    "adaptive": "dirtytrack, adaptive",
    "stop": "libgc, stop the world",
    "incremental": "libgc, incremental",
    "generational": "libgc, generational",
}
COLOURS = {"none": "#9aa5b1", "cards": "#2f8f6b", "mprotect": "#7b4fa3", "plain": "#2563a8", "adaptive": "#e8743b"}
WIDTH, TOP, LEFT, RIGHT, HEIGHT, BETWEEN, BELOW = 880, 86, 66, 16, 210, 14, 44
INK, FAINT, GRID = "#1d2733", "#5d6b7a", "#e3e8ee"
STORE_PAGES = 16384  # of old objects, as benchmarks/barriers.c has them
SHOWN = (1, 256)  # stores a page in the table; all of them are in the plot
_PLACE = re.compile(r"(<!-- barriers: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
Told = dict[str, Any]


def show(ns: float) -> str:
    """A time with its unit."""
    for unit, scale in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if ns >= scale:
            return f"{ns / scale:.3g} {unit}" if ns < 100 * scale else f"{ns / scale:.0f} {unit}"
    return f"{ns:.0f} ns"


def table(head: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def pauses(row: Told) -> list[str]:
    """Its three columns."""
    return [show(row["pause_p50_ns"]), show(row["pause_p99_ns"]), show(row["pause_max_ns"])]


def programs(told: Told) -> str:
    """GCBench by each barrier, and on libgc."""
    rows = [row for row in told["rows"] if row["program"] == "gcbench"]
    best = next(row["total_ns"] for row in rows if row["barrier"] == "cards")
    lines = [
        [NAMES[row["barrier"]], show(row["total_ns"]), f"{row['total_ns'] / best:.2f}", *pauses(row)] for row in rows
    ]
    out = table(["GCBench with", "total", "of cards'", "pause p50", "p99", "longest"], lines)
    return f"{out}\n\n{told['without_libgc']}" if told["without_libgc"] else out


RESERVED = {
    "alone": "the 64 pages alone",
    "untracked": "64 GiB reserved, untracked",
    "sparse": "64 GiB reserved and tracked",
    "markers": 'the same with `arm="all"`',
}


def reservations(told: Told) -> str:
    """What a reservation costs a process that touches 64 pages of it."""
    lines = []
    for row in told["rows"]:
        if row["program"] == "reservation":
            tables = row["page_table_bytes"]
            shown = f"{tables / (1 << 20):.1f} MiB" if tables >= 1 << 20 else f"{tables >> 10} KiB"
            minor = "" if row["minor_ns"] is None else show(row["minor_ns"])
            lines.append([RESERVED[row["how"]], shown, show(row["fork_ns"]), minor])
    return table(["heap", "page tables", "`fork()`", "`minor()`"], lines)


def search(told: Told) -> str:
    """minor() against a bare scan and loop, and its reading against the loop alone."""
    rows = [row for row in told["rows"] if row["program"] == "search"]
    lines = []
    for whole, alone in zip(rows[::2], rows[1::2], strict=True):
        where = whole["name"].removeprefix("minor, ")
        speeds = [f"{row['bare_ns'] / row['ours_ns']:.2f}" for row in (whole, alone)]
        lines.append([where, show(whole["ours_ns"]), show(whole["bare_ns"]), speeds[0], speeds[1]])
    return table(["heap", "`minor()`", "bare", "speed", "without the bare scan"], lines)


def loads(told: Told) -> list[tuple[float, int, bool, dict[str, Told]]]:
    """The rows of each load, by barrier."""
    out: dict[tuple[float, int, bool], dict[str, Told]] = {}
    for row in told["rows"]:
        if row["program"] == "stores":
            out.setdefault((row["share"], row["per_page"], row["anew"]), {})[row["barrier"]] = row
    return [(*load, rows) for load, rows in out.items()]


def densities(told: Told) -> str:
    """What an epoch costs, by how many pages are written and how often."""
    lines = []
    for share, per_page, anew, rows in loads(told):
        if anew and per_page not in SHOWN:
            continue
        best = min(row["total_ns"] for row in rows.values())
        where = f"{share * 100:g} %" + ("" if anew else ", the same")
        for name, row in rows.items():
            total = show(row["total_ns"])
            cells = [where, f"{per_page:,}", NAMES[name], show(row["mutator_ns"]), *pauses(row)]
            lines.append([*cells, f"**{total}**" if row["total_ns"] == best else total])
            where = ""
    head = ["pages written", "stores a page", "barrier", "mutator", "pause p50", "p99", "longest", "total"]
    return table(head, lines)


def per_page(told: Told, share: float, name: str) -> tuple[float, float, int]:
    """What a dirty page costs, and each further store to it, in nanoseconds; and the most stores that were measured."""
    pages = share * STORE_PAGES
    times = {n: rows[name]["total_ns"] / pages for s, n, anew, rows in loads(told) if s == share and anew}
    most = max(times)
    return times[1], (times[most] - times[1]) / (most - 1), most


def break_even(told: Told) -> str:
    """From how many stores a page on a page barrier takes no more than cards."""
    lines = []
    for share in sorted({share for share, *_ in loads(told)}):
        card_page, card_store, most = per_page(told, share, "cards")
        for name in ("plain", "adaptive"):
            page, store, _ = per_page(told, share, name)
            if page <= card_page:
                even = "always"
            elif store >= card_store:
                even = f"never: up to {most:,} cards win"
            else:
                stores = 1 + (page - card_page) / (card_store - store)
                even = f"{stores:,.0f}" if stores <= most else f"more than {most:,}, the most that was measured"
            cells = [f"{share * 100:g} %", NAMES[name], show(page - card_page) if page > card_page else "less"]
            lines.append([*cells, f"{store:.2f} ns", f"{card_store:.2f} ns", even])
    head = [
        "pages written",
        "barrier",
        "a dirty page costs more by",
        "a store",
        "with cards",
        "break-even, stores a page",
    ]
    return table(head, lines)


def wins(told: Told) -> str:
    """The sentence that says who wins."""
    new = [(share, n, rows) for share, n, anew, rows in loads(told) if anew]
    won = [(share, n) for share, n, rows in new if min(rows, key=lambda name: rows[name]["total_ns"]) == "cards"]
    ours = [
        f"{n:,} stores to {share * 100:g} % of the pages"
        for share, n, rows in new
        if min(rows["plain"]["total_ns"], rows["adaptive"]["total_ns"]) < rows["cards"]["total_ns"]
    ]
    rest = f"Less than cards a page barrier took at {'; '.join(ours)}." if ours else "A page barrier took less in none."
    return f"**Software cards took the least time in {len(won)} of {len(new)} loads.** {rest}"


def machine(told: Told) -> str:
    """Where and when."""
    return f"{told['kernel']}, {told['machine']}, {told['python']}, on {told['date']}; `{told['command']}`."


PARTS = {
    "search": search,
    "reservations": reservations,
    "gcbench": programs,
    "stores": densities,
    "even": break_even,
    "wins": wins,
    "machine": machine,
}


def render(page: str, told: Told) -> str:
    """The page with what was measured."""
    return _PLACE.sub(lambda found: f"{found[1]}\n{PARTS[found[2]](told)}\n\n{found[3]}", page)


def text(x: float, y: float, what: str, *, size: int = 11, fill: str = INK, extra: str = "") -> str:
    """A line of text with its baseline at y."""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}"{extra}>{escape(what)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str, extra: str = "") -> str:
    """A thin straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{extra}/>'


def draw(told: Told) -> str:
    """The time of an epoch by stores a page: a panel for each density."""
    by_share: dict[float, list[tuple[int, dict[str, Told]]]] = {}
    for share, per, anew, rows in loads(told):
        if anew:
            by_share.setdefault(share, []).append((per, rows))
    every = [row["total_ns"] for points in by_share.values() for _, rows in points for row in rows.values()]
    low, high = math.floor(math.log10(min(every))), math.ceil(math.log10(max(every)))
    most = math.log2(max(per for points in by_share.values() for per, _ in points))
    width, bottom = (WIDTH - LEFT - RIGHT + BETWEEN) / len(by_share) - BETWEEN, TOP + HEIGHT
    title = "An epoch: the program's stores and the pause after them, with each write barrier"
    size = f'viewBox="0 0 {WIDTH} {bottom + BELOW}" width="{WIDTH}" height="{bottom + BELOW}"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif" role="img">',
        "<!-- SPDX-License-Identifier: MIT; drawn by docs/draw_barriers.py -->",
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{bottom + BELOW}" rx="8" fill="#ffffff"/>',
        text(16, 26, title, size=15, extra=' font-weight="600"'),
    ]
    for i, (name, colour) in enumerate(COLOURS.items()):
        at = 16 + i * 168
        out += [line(at, 44, at + 18, 44, colour, ' stroke-width="3"'), text(at + 23, 48, NAMES[name], fill=colour)]
    for k, (share, points) in enumerate(sorted(by_share.items())):
        left = LEFT + k * (width + BETWEEN)
        out.append(text(left, TOP - 10, f"{share * 100:g} % of the pages", extra=' font-weight="600"'))
        for power in range(low, high + 1):
            y = bottom - HEIGHT * (power - low) / (high - low)
            out.append(line(left, y, left + width, y, GRID))
            if not k:
                out.append(text(left - 8, y + 4, show(10.0**power), fill=FAINT, extra=' text-anchor="end"'))
        for name, colour in COLOURS.items():
            places = [
                (
                    left + width * math.log2(per) / most,
                    bottom - HEIGHT * (math.log10(rows[name]["total_ns"]) - low) / (high - low),
                )
                for per, rows in points
            ]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            thick = 3.0 if name in ("plain", "adaptive") else 1.8
            out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{thick}"/>')
            out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{thick:.1f}" fill="{colour}"/>' for x, y in places]
        for per in sorted({per for points in by_share.values() for per, _ in points}):
            x = left + width * math.log2(per) / most
            anchor = "start" if per == 1 else "end" if math.log2(per) == most else "middle"
            label = f"{per:,}" if per < 1024 else f"{per // 1024} Ki"
            out.append(text(x, bottom + 16, label, size=10, fill=FAINT, extra=f' text-anchor="{anchor}"'))
    middle = (LEFT + WIDTH - RIGHT) / 2
    out.append(text(middle, bottom + 34, "stores to a written page", fill=FAINT, extra=' text-anchor="middle"'))
    return "\n".join([*out, "</svg>", ""])


if __name__ == "__main__":
    measured = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    page = Path(sys.argv[2])
    page.write_text(render(page.read_text(encoding="utf-8"), measured), encoding="utf-8")
    Path(sys.argv[3]).write_text(draw(measured), encoding="utf-8")

# SPDX-License-Identifier: MIT
"""Writes what was measured into docs/performance.md, between its markers. Standard library only.

Run it as ``python docs/draw_tables.py docs/benchmarks.json docs/performance.md``; ``make bench-docs`` measures first.
``<!-- table: NAME -->`` ... ``<!-- end -->`` holds the table of the benchmark NAME, ``<!-- machine -->`` ...
``<!-- end -->`` where it was measured.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

Told = dict[str, Any]


def time(ns: float) -> str:
    """As the benchmarks print it, three digits."""
    for unit, scale in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if ns >= scale:
            return f"{ns / scale:.3g} {unit}" if ns < 100 * scale else f"{ns / scale:.0f} {unit}"
    return f"{ns:.0f} ns"


def percent(share: float) -> str:
    """A share of the pages; small memory rounds it to whole pages, so two digits are enough."""
    return f"{100 * share:.2g} %" if share < 1 else "100 %"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def against_bare(name: str, rows: list[Told]) -> str:
    """One line a row, as printed."""
    out = []
    for row in rows:
        what = row["name"].removeprefix(f"{name} ")
        what = re.sub(r"([\d.e-]+) dirty", lambda share: f"{percent(float(share[1]))} written", what)
        bare = time(row["bare_ns"]) if row["bare_ns"] is not None else ""
        target = row["target"].replace(">=", "≥").replace("<=", "≤") + ("" if row["ok"] else ", **missed**")
        out.append([what.replace("|", "&#124;"), time(row["ours_ns"]), bare, row["result"], target])
    return table(["", "ours", "bare", "", "target"], out)


def epochs(rows: list[Told]) -> str:
    """One line a share of written pages, one column a method."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    known = {(row["share"], row["method"]): row["ours_ns"] for row in rows}
    lines = [
        [percent(share), *(time(known[share, method]) for method in methods)]
        for share in dict.fromkeys(row["share"] for row in rows)
    ]
    return table(["written", *methods], lines)


def densities(rows: list[Told]) -> str:
    """One line a size, pattern and share of written pages: both rows of the benchmark in one."""
    lines = []
    for best, plain in zip(rows[::2], rows[1::2], strict=True):
        size, pattern, *_ = best["name"].removeprefix("density ").split(", ")
        beyond = best["result"].rpartition(", ")[2].removesuffix(" pages")
        ratios = [
            f"{row['ours_ns'] / row['bare_ns']:.2f}x" + ("" if row["ok"] else ", **missed**") for row in (plain, best)
        ]
        times = [time(best["ours_ns"]), time(plain["bare_ns"]), f"{time(best['bare_ns'])}, {best['method']}"]
        lines.append([size, pattern, percent(best["share"]), *times, *ratios, beyond.replace("%", " %")])
    return table(["", "", "written", "adaptive", "plain", "the best", "of plain", "of the best", "pages beyond"], lines)


def machine(told: Told) -> str:
    """Where and when, in a sentence; and what is to be known where it was not one run."""
    where = f"{told['kernel']}, {told['machine']}, {told['python']}, on {told['date']}; `{told['command']}`."
    others: dict[str, list[str]] = {}
    for name, origin in told.get("elsewhere", {}).items():
        others.setdefault(origin, []).append(f"`{name}`")
    apart = [f"Of another run are {', '.join(names)}: {origin}." for origin, names in others.items()]
    return " ".join([where, *apart, *([told["note"]] if "note" in told else [])])


def missed(told: Told) -> str:
    """How many rows there are, and how many missed their targets."""
    aimed = [row for row in told["rows"] if row["target"]]
    return f"{len(aimed)} rows have a target; {sum(not row['ok'] for row in aimed)} of them missed it."


RENDERED = {"epoch": epochs, "density": densities}


def render(text: str, told: Told) -> str:
    """The page with its marked parts rewritten."""

    def part(match: re.Match[str]) -> str:
        marker, name = match[1], match[2]
        if marker == "machine":
            body = machine(told)
        elif marker == "missed":
            body = missed(told)
        else:
            rows = [row for row in told["rows"] if row["benchmark"] == name]
            if not rows:
                raise SystemExit(f"nothing was measured by the benchmark {name!r}")
            body = RENDERED[name](rows) if name in RENDERED else against_bare(name, rows)
        return f"{match[0].partition('-->')[0]}-->\n\n{body}\n\n<!-- end -->"

    return re.sub(r"<!-- (machine|missed|table: (\w+)) -->.*?<!-- end -->", part, text, flags=re.DOTALL)


if __name__ == "__main__":
    page = Path(sys.argv[2])
    measured = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    page.write_text(render(page.read_text(encoding="utf-8"), measured), encoding="utf-8")

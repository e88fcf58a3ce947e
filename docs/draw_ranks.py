# SPDX-License-Identifier: MIT
"""Writes the tables of docs/ranks.md from what ``benchmarks.ranks`` measured. Standard library only.

Run it as ``python docs/draw_ranks.py docs/ranks.json docs/ranks.md``.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

_MEASURED = re.compile(r"(<!-- measured -->\n).*?(<!-- end -->)", re.DOTALL)
_MODELLED = re.compile(r"(<!-- modelled -->\n).*?(<!-- end -->)", re.DOTALL)


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """Markdown; the first row is the head."""
    return [f"| {' | '.join(row)} |" for row in (rows[0], ("---",) * len(rows[0]), *rows[1:])]


def ms(value: float) -> str:
    """Milliseconds, two digits behind the point where it is short."""
    return f"{value:.2f} ms" if abs(value) < 10 else f"{value:.1f} ms"


def measured(told: dict[str, Any]) -> list[str]:
    """What was measured here."""
    rows: list[tuple[str, ...]] = [("ranks", "stall, together", "by itself", "durable, together", "by itself", "more")]
    rows += [
        (
            str(row["ranks"]),
            ms(row["stall_together_ms"]),
            ms(row["stall_alone_ms"]),
            ms(row["durable_together_ms"]),
            ms(row["durable_alone_ms"]),
            ms(row["overhead_ms"]),
        )
        for row in told["rows"]
    ]
    where = f"{told['kernel']}, {told['machine']}, {told['python']}, on {told['date']}"
    rounds = min(row["rounds"] for row in told["rows"])
    how = f"{told['rows'][0]['mib']} MiB a rank, not compressed; medians of {rounds} rounds or more"
    return [*table(rows), "", f"{where}; {how}; `{told['command']}`.{told.get('note', '')}"]


def modelled(told: dict[str, Any]) -> list[str]:
    """What was simulated."""
    rows: list[tuple[str, ...]] = [
        ("ranks", "from a rank's own save on", "until the slowest", "talking", "deciding", "the manifest")
    ]
    rows += [
        (
            f"{row['ranks']:,}",
            ms(row["in_all_ms"]),
            ms(row["slowest_ms"]),
            ms(row["talking_ms"]),
            ms(row["deciding_ms"]),
            f"{row['manifest_nbytes'] / 1e3:,.1f} kB",
        )
        for row in told["modelled"]
    ]
    return table(rows)


def render(page: str, told: dict[str, Any]) -> str:
    """The page with its tables."""
    for place, lines in ((_MEASURED, measured(told)), (_MODELLED, modelled(told))):
        body = "\n".join(lines)
        page = place.sub(lambda found, body=body: f"{found[1]}\n{body}\n\n{found[2]}", page)  # type: ignore[misc]
    return page


if __name__ == "__main__":
    where = Path(sys.argv[2])
    where.write_text(
        render(where.read_text(encoding="utf-8"), json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))),
        encoding="utf-8",
    )

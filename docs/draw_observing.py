# SPDX-License-Identifier: MIT
"""Writes the table of docs/observe.md from docs/observing.json, which ``python -m benchmarks.observe --write`` made."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

_PLACE = re.compile(r"(<!-- measured -->\n).*?(<!-- end -->)", re.DOTALL)


def render(page: str, told: dict[str, Any]) -> str:
    """The page with what was measured."""
    head = ("load", "requests/s", "with it", "of redis a request", "with it", "pages an epoch", "recorder", "file")
    rows = [head, ("---",) * len(head)]
    rows += [
        (
            row["load"],
            f"{row['without_per_second']:,.0f}",
            f"x {row['ratio']:.3f}",
            f"{row['without_us']:.2f} µs",
            f"x {row['cpu_ratio']:.3f}",
            f"{row['pages_an_epoch']:,.0f}",
            f"{row['cpu_share']:.2%} of a processor",
            f"{row['file_bytes_a_page']:.2f} bytes a page",
        )
        for row in told["rows"]
    ]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    where = f"{told['kernel']}, {told['machine']}, {told['python']}, on {told['date']}"
    first = told["rows"][0]
    how = f"epochs of {first['every_ms']:g} ms, medians of {first['rounds']} pairs"
    lines += ["", f"{where}; {how}; `{told['command']}`."]
    return _PLACE.sub(lambda found: "\n".join([found[1], *lines, "", found[2]]), page)


if __name__ == "__main__":
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    page = target.read_text(encoding="utf-8")
    target.write_text(render(page, json.loads(source.read_text(encoding="utf-8"))), encoding="utf-8")

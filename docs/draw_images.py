# SPDX-License-Identifier: MIT
"""Writes the table of docs/process-images.md from what ``python -m benchmarks.process_images --write`` made."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

_PLACE = re.compile(r"(<!-- measured -->\n).*?(<!-- end -->)", re.DOTALL)
_MIB = 1 << 20


def render(page: str, told: dict[str, Any]) -> str:
    """The page with what was measured."""
    head = ("", "copied before", "while frozen", "frozen", "at most", "ping", "written", "durable after")
    rows = [head, ("---", *("---:",) * (len(head) - 1))]
    for row in told["rows"]:
        is_core = row["way"] == "gcore"
        rows.append(
            (
                row["way"] + ("" if row["precopy"] or is_core else ", nothing copied before"),
                f"{(row['dirty_bytes'] - row['frozen_bytes']) / _MIB:,.0f} MiB",
                f"{row['frozen_bytes'] / _MIB:,.1f} MiB",
                "" if is_core else f"{row['frozen_ms']:,.1f} ms",
                "" if is_core else f"{row['longest_frozen_ms']:,.1f} ms",
                f"{row['ping_ms']:,.1f} ms",
                f"{row['written_bytes'] / _MIB:,.1f} MiB",
                f"{row['seconds']:,.2f} s",
            )
        )
    lines = [f"| {' | '.join(row)} |" for row in rows]
    where = f"{told['kernel']}, {told['machine']}, {told['python']}, on {told['date']}"
    lines += ["", f"{where}; `{told['command']}`."]
    return _PLACE.sub(lambda found: "\n".join([found[1], *lines, "", found[2]]), page)


if __name__ == "__main__":
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    page = target.read_text(encoding="utf-8")
    target.write_text(render(page, json.loads(source.read_text(encoding="utf-8"))), encoding="utf-8")

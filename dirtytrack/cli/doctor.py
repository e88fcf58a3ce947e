# SPDX-License-Identifier: MIT
"""`dirtytrack doctor`: what tracking needs, whether it is there, why not, and what mends it."""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import Any

from .. import __version__, probe
from ..kernel.support import KernelSupport, system

__all__ = ["add_arguments", "report", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this command's options."""
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.epilog = "Exit status: 0 only if tracking works."


def report(support: KernelSupport) -> dict[str, Any]:
    """Return everything that was found, in words and numbers that JSON has."""
    numbers = support._asdict()
    numbers["features"] = {"bits": int(support.features), "names": _names(support.features)}
    numbers["categories"] = {"bits": int(support.categories), "names": _names(support.categories)}
    return {
        "version": __version__,
        **system(),
        "tracking": support.tracking,
        "why_not": support.why_not,
        "remedies": list(support.remedies),
        "checks": [check._asdict() for check in support.checks()],
        "kernel": numbers,
    }


def _names(flags: Any) -> list[str]:
    known = [member.name for member in type(flags) if member.value & flags]
    rest = int(flags) & ~sum(member.value for member in type(flags))
    return known + ([hex(rest)] if rest else [])


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 only if tracking works."""
    support = probe()
    if args.json:
        print(json.dumps(report(support), indent=2))
        return 0 if support.tracking else 1
    where = system()
    print(
        f"dirtytrack {__version__}, {where['system']} {where['release']} {where['machine']}, Python {where['python']}\n"
    )
    for check in support.checks():
        mark = "ok" if check.ok else "NO" if check.needed else "--"
        print(
            textwrap.fill(f"{check.name}: {check.detail}", 100, initial_indent=f"  {mark}  ", subsequent_indent=" " * 6)
        )
    print()
    if support.tracking:
        print("Tracking works.")
        return 0
    print(textwrap.fill(f"Tracking does not work. {support.why_not}", 100))
    for remedy in support.remedies:
        print(textwrap.fill(remedy, 100, initial_indent="  * ", subsequent_indent="    "))
    return 1

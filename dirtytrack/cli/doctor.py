# SPDX-License-Identifier: MIT
"""`dirtytrack doctor`: what tracking needs, whether it is there, why not, and what mends it; all of it by trying."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterable
from typing import Any

from .. import __version__, probe
from ..kernel.support import Check, KernelSupport, system
from ..kernel.trial import knows_guard_pages
from .doctor_costs import compare_costs, costs, instead
from .doctor_holes import Hole, holes, lines
from .doctor_surroundings import surroundings
from .truth import broken, document, markdown, registering, rows

__all__ = ["add_arguments", "report", "run"]

_GUARDED = (
    "this kernel has them: MADV_GUARD_INSTALL over an armed page of a file or of shared memory may never return (seen "
    "on Linux 6.18, 7.1 and 7.3; --truth tries it), so do not track such memory where its owner puts guard pages in"
)
_REPORT = "please report this kernel with the output of `dirtytrack doctor --json`"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this command's options."""
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument(
        "--truth",
        action="store_true",
        help="instead, the whole table of what this kernel tells of each thing that can happen to memory, in Markdown",
    )
    parser.epilog = (
        "Exit status: 0 only if tracking works and nothing was missed that is not documented. Nothing of the system is "
        "changed."
    )


def report(support: KernelSupport) -> dict[str, Any]:
    """Return everything that was found, in words and numbers that JSON has."""
    numbers = support._asdict()
    numbers["features"] = {"bits": int(support.features), "names": _names(support.features)}
    numbers["categories"] = {"bits": int(support.categories), "names": _names(support.categories)}
    found: dict[str, Any] = {
        "version": __version__,
        **system(),
        "tracking": support.tracking,
        "why_not": support.why_not,
        "remedies": list(support.remedies),
        "checks": [check._asdict() for check in support.checks()],
        "kernel": numbers,
        **surroundings(support),
        "guard_pages": not support.problem and knows_guard_pages(),
        "holes": [],
        "costs": [],
        "compare_costs": [],
        "missed": False,
    }
    if not support.problem:
        found["compare_costs"] = [cost._asdict() for cost in compare_costs(found["headroom_bytes"])]
        if not support.tracking:
            found["remedies"].append(instead(found["compare_costs"]))
    if support.tracking:
        tried = list(holes())
        found["holes"] = [{**hole._asdict(), "ok": hole.ok} for hole in tried]
        found["missed"] = not all(hole.ok for hole in tried)
        found["costs"] = [cost._asdict() for cost in costs(found["headroom_bytes"])]
    return found


def _names(flags: Any) -> list[str]:
    known = [member.name for member in type(flags) if member.value & flags]
    rest = int(flags) & ~sum(member.value for member in type(flags))
    return known + ([hex(rest)] if rest else [])


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 only if tracking works."""
    support = probe()
    if args.truth and support.tracking:
        return _truth(as_json=args.json)
    found = report(support)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        _print(found, support.checks())
    return 0 if support.tracking and not found["missed"] else 1


# ---- in words -------------------------------------------------------------------------------------------------------


def _title() -> str:
    where = system()
    return (
        f"dirtytrack {__version__}, {where['system']} {where['release']} {where['machine']}, Python {where['python']}"
    )


def _line(mark: str, text: str) -> None:
    print(textwrap.fill(text, 100, initial_indent=f"  {mark}  ", subsequent_indent=" " * 6, break_on_hyphens=False))


def _print_checks(checks: Iterable[dict[str, Any]]) -> None:
    for check in checks:
        mark = "ok" if check["ok"] else "NO" if check["needed"] else "--"
        idle = mark != "--" or check["detail"].endswith("not needed")
        mends = "" if idle or not check["remedy"] else f"; what mends it: {check['remedy']}"
        _line(mark, f"{check['name']}: {check['detail']}{mends}")


def _print(found: dict[str, Any], checks: list[Check]) -> None:
    print(f"{_title()}\n")
    _print_checks(check._asdict() for check in checks)
    for title, key in (("Permissions", "permissions"), ("Container", "container"), ("Limits", "limits")):
        if found[key]:
            print(f"\n{title}")
            _print_checks(found[key])
    if found["holes"]:
        _print_tried(found)
    print()
    if not found["tracking"]:
        print(textwrap.fill(f"Tracking does not work. {found['why_not']}", 100))
        for remedy in found["remedies"]:
            print(textwrap.fill(remedy, 100, initial_indent="  * ", subsequent_indent="    "))
    elif found["missed"]:
        print(textwrap.fill(f"Tracking works, but a change was missed that no document names: {_REPORT}.", 100))
    else:
        print("Tracking works.")


def _print_tried(found: dict[str, Any]) -> None:
    print("\nHoles, each tried")
    tried = [Hole(**{name: hole[name] for name in Hole._fields}) for hole in found["holes"]]
    for mark, text in lines(tried):
        _line(mark, text)
    if found["guard_pages"]:
        _line("--", f"guard pages: {_GUARDED}")
    print("\nCosts")
    for cost in found["costs"] + found["compare_costs"]:
        if cost["measured"] is None:
            _line("--", f"{cost['name']}: not measured: {cost['why_not']}")
        else:
            _line("ok", f"{cost['name']}: {cost['measured']:,} {cost['unit']}")


def _truth(*, as_json: bool) -> int:
    registered, found = list(registering()), list(rows())
    missed = any(broken(row) for row in found)
    if as_json:
        where = {"version": __version__, **system(), "missed": missed}
        print(json.dumps({**where, **document(registered, found)}, indent=2))
    else:
        print(markdown(_title(), registered, found), end="")
        if missed:
            print(f"\nA change was missed that no document names, or could not be tried: {_REPORT}.")
    return 1 if missed else 0

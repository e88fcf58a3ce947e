# SPDX-License-Identifier: MIT
"""docs/support-matrix.md, made from the results that are kept."""

from __future__ import annotations

import sys
from pathlib import Path

from .plan import DESELECTED, KNOWN, OF_SOUND_KERNELS
from .results import REFUSED, Counts, Result, kept

__all__ = ["PAGE", "page"]

PAGE = Path(__file__).parents[1] / "docs" / "support-matrix.md"

_HEAD = """\
# Support matrix

What `make kernels` found: Debian's kernels, each booted in an emulated machine of its own, with the C core's tests, the
doctor and, on x86-64, the Python tests run there. This page is made by `python -m kernels.matrix` from
`kernels/results`.

- **SOUND**: the scan alone sees every page that was written, or discarded, or never touched.
- **HOLEY**: it does not see discarded pages whose page table was freed, nor memory never touched. The session finds out
  by trying, and looks for them by a second scan before each collect; `dirtytrack doctor` tells.
- **refused**: the kernel cannot track; opening a session raises `UnsupportedKernel`, which names what is missing.
"""
_TRUTH = """
`dirtytrack doctor --truth` tries every way in which memory changes, on every kind of memory. What it said of each
kernel is kept in `kernels/results` too.
"""


def _table(*rows: tuple[str, ...]) -> str:
    head, *rest = rows
    lines = [head, tuple("---" for _ in head), *rest]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _told(counts: Counts | None) -> str:
    if counts is None:
        return "not run"
    words = [f"{counts['passed']:,} passed"]
    words += [f"**{counts['failed']} failed**"] if counts["failed"] else []
    words += [f"{counts['expected']} failed as they should"] if counts["expected"] else []
    words += [f"{counts['skipped']} skipped"] if counts["skipped"] else []
    within = f" in {counts['seconds']:.0f} s" if counts["seconds"] else ""
    words += [f"{counts['not_reached']:,} not reached{within}"] if counts["not_reached"] else []
    return ", ".join(words)


def _c(result: Result) -> str:
    if result["behaviour"] == REFUSED:
        return f"{sum(one['passed'] for one in result['c'].values()):,} passed, those without tracking"
    failed = sum(one["failed"] for one in result["c"].values())
    return f"{sum(one['passed'] for one in result['c'].values()):,} passed" + (
        f", **{failed} failed**" if failed else ""
    )


def _row(result: Result) -> tuple[str, ...]:
    how = {"kvm": "virtualized", "tcg": "emulated"}[result["accelerator"]]
    processor = {"amd64": "x86-64", "arm64": "arm64"}[result["architecture"]]
    truth = {"": "not run", "ok": "nothing missed"}.get(result["truth"], f"**{result['truth']}**")
    return (
        f"`{result['release']}`",
        f"{processor}, {how}",
        result["behaviour"],
        _c(result),
        _told(result["python"]),
        truth,
        result["why"],
    )


def _problems(results: list[Result]) -> str:
    lines = []
    for result in results:
        alike: dict[str, list[str]] = {}
        for problem in result["problems"]:
            known = next((start for start in KNOWN if problem.startswith(start)), problem)
            alike.setdefault(known, []).append(problem)
        for known, problems in alike.items():
            what = f"`{problems[0]}`" if len(problems) == 1 else f"{len(problems)} times `{known}`"
            lines.append(f"- `{result['release']}`: {what} ({KNOWN.get(known, 'not explained yet')})\n")
    return "\n## What was not as it should be\n\n" + "".join(lines) if lines else ""


def _refusals(results: list[Result]) -> str:
    text = ""
    for result in results:
        if result["refusal"]:
            text += f"\n## How {result['release']} is refused\n\n```text\n{result['doctor']}\n```\n\n"
            text += f"And by `dirtytrack.track`:\n\n```text\n{result['refusal']}\n```\n"
    return text


def _left_out(results: list[Result]) -> str:
    text = "\n## What was not run there\n\n"
    text += _table(("tests", "why"), *((f"`{start}`", why) for start, why in DESELECTED.items()))
    text += (
        '\nTests that need no tracking, such as those of `backend="compare"`, run on a kernel that refuses it only: '
        "they ask\nthe others nothing.\n"
    )
    text += "\nOn a HOLEY kernel these fail, and should:\n\n"
    text += _table(("tests", "why"), *((f"`{start}`", why) for start, why in OF_SOUND_KERNELS.items()))
    reasons: dict[str, dict[str, int]] = {}
    for result in results:
        if result["behaviour"] != REFUSED:
            for reason, number in result["skipped"].items():
                reasons.setdefault(reason, {})[result["release"]] = number
    if reasons:
        text += "\nSkipped, since the machine or its kernel does not have what they need:\n\n"
        rows = []
        for reason, numbers in sorted(reasons.items()):
            releases = ", ".join(f"`{release}`" for release in numbers)
            rows.append((reason.replace("|", "/"), str(max(numbers.values())), releases))
        text += _table(("why", "tests at most", "on"), *rows)
    return text


def page(results: list[Result]) -> str:
    """Return the page's text."""
    head = ("kernel", "machine", "behaviour", "C tests", "Python tests", "`doctor --truth`", "why this one")
    packages = "".join(f"- `{result['package']}`\n" for result in results)
    return (
        _HEAD
        + "\n"
        + _table(head, *map(_row, results))
        + _TRUTH
        + _problems(results)
        + _refusals(results)
        + _left_out(results)
        + f"\n## The packages\n\nFrom Debian's archive:\n\n{packages}"
    )


if __name__ == "__main__":
    PAGE.write_text(page(kept()), encoding="utf-8")
    print(f"{PAGE.relative_to(Path.cwd())} from {len(kept())} results", file=sys.stderr)

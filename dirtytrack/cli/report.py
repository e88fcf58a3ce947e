# SPDX-License-Identifier: MIT
"""`dirtytrack report`: what a recording has."""

from __future__ import annotations

import argparse
import json
import time
from typing import TYPE_CHECKING, Any

from . import recorded
from .strip import Screen

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..observe import Epoch, Recording, Trace, WorkingSet

__all__ = ["add_arguments", "run"]

_SHOWN_MAPPINGS = 15
_HOT_SHARES = (0.5, 0.9)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this command's options."""
    recorded.add_file(parser)
    recorded.add_mapping(parser)
    parser.add_argument("--json", action="store_true", help="for machines")


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    recording = recorded.opened(args)
    epochs = recorded.epochs_of(recording, args)
    found = report(recording, epochs)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)
    return 0


def report(recording: Recording, epochs: Sequence[Epoch]) -> dict[str, Any]:
    """Everything that is told, in words and numbers that JSON has."""
    from ..observe import Trace, by_mapping, rates

    trace = Trace(epochs)
    times = rates(epochs)
    pages = sum(epoch.page_count for epoch in epochs)
    seconds = sum(epoch.seconds for epoch in epochs)
    last = recording.sessions[-1] if recording.sessions else None
    cpu = sum(end.cpu_ns for end in recording.ends) / 1e9
    return {
        "file": recording.path,
        "nbytes": recording.nbytes,
        "torn_nbytes": recording.torn_nbytes,
        "begun": recording.begun,
        "pid": last.pid if last else 0,
        "command": last.command if last else "",
        "sessions": len(recording.sessions),
        "ended": recording.ended.reason if recording.ended is not None else "",
        "page_bytes": recording.page_bytes,
        "epochs": sum(epoch.epochs for epoch in epochs),
        "epochs_at_full_resolution": len(trace),
        "epoch_seconds": trace.epoch_seconds if len(trace) else None,
        "seconds": seconds,
        "pages": pages,
        "bytes_per_second": pages * recording.page_bytes / seconds if seconds else 0.0,
        "resident_pages": epochs[-1].resident_pages,
        "recorder_cpu_seconds": cpu if len(recording.ends) == len(recording.sessions) else None,
        "rates": [rate._asdict() for rate in times],
        "mappings": [share._asdict() for share in by_mapping(epochs)],
        "working_set": _windows(trace),
        "hot": [_hot(trace, share) for share in _HOT_SHARES],
    }


def _windows(trace: Trace) -> list[dict[str, float]]:
    """w(T) for windows of 1, 2, 4, … epochs, and of all."""
    if not len(trace):
        return []
    written: WorkingSet = trace.working_set()
    lengths = [1]
    while lengths[-1] * 2 < len(trace):
        lengths.append(lengths[-1] * 2)
    if lengths[-1] != len(trace):
        lengths.append(len(trace))
    return [
        {
            "epochs": length,
            "seconds": length * trace.epoch_seconds,
            "mean_pages": float(written.pages[length - 1]),
            "largest_pages": trace.largest(length),
        }
        for length in lengths
    ]


def _hot(trace: Trace, share: float) -> dict[str, Any]:
    found = trace.hot_set(share)
    return {**found._asdict(), "ranges": [each._asdict() for each in found.ranges]}


# ---- in words -------------------------------------------------------------------------------------------------------


def _print(found: dict[str, Any]) -> None:
    from ..observe.units import show_bytes, show_seconds

    screen, page = Screen(), found["page_bytes"]
    what = f"process {found['pid']}" if found["pid"] else "this process's own memory"
    screen.line(f"{found['file']}: {what}" + (f": {found['command']}" if found["command"] else ""), "1")
    begun = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found["begun"]))
    each = f", {show_seconds(found['epoch_seconds'])} each" if found["epoch_seconds"] else ""
    screen.line(f"{found['epochs']} epochs in {show_seconds(found['seconds'])} since {begun}{each}; {_end_of(found)}")
    coarse = found["epochs"] - found["epochs_at_full_resolution"]
    if coarse:
        screen.line(
            f"{coarse} older epochs were coarsened to save room: what is said of them is at least so much, once"
        )
    if found["torn_nbytes"]:
        screen.line(f"{found['torn_nbytes']} bytes at the end are no whole record, and were left out")
    if found["recorder_cpu_seconds"]:
        share = found["recorder_cpu_seconds"] / found["seconds"] if found["seconds"] else 0.0
        screen.line(f"recording took {share:.2%} of one processor")

    peak = max(rate["bytes_per_second"] for rate in found["rates"])
    screen.line(f"\nRate: {show_bytes(found['bytes_per_second'])}/s on average, {show_bytes(peak)}/s at most", "1")
    screen.line("  " + screen.strip([rate["bytes_per_second"] / peak if peak else 0.0 for rate in found["rates"]]))

    screen.line("\nMappings", "1")
    for mapping in found["mappings"][:_SHOWN_MAPPINGS]:
        if not mapping["pages"] and not mapping["untracked"]:
            continue
        many = f" ({mapping['mappings']})" if mapping["mappings"] > 1 else ""
        why = f"; not tracked: {mapping['untracked']}" if mapping["untracked"] else ""
        screen.line(
            f"  {mapping['share']:6.1%}  {show_bytes(mapping['distinct_pages'] * page):>10} of "
            f"{show_bytes(mapping['nbytes']):>10}  {mapping['name']}{many}{why}"
        )
    if found["working_set"]:
        screen.line("\nWritten working set: distinct bytes written in a window of time", "1")
        for window in found["working_set"]:
            mean, largest = window["mean_pages"] * page, window["largest_pages"] * page
            screen.line(
                f"  {show_seconds(window['seconds']):>8}  {show_bytes(mean):>10}, {show_bytes(largest)} at most"
            )
    screen.line("\nHot set", "1")
    for hot in found["hot"]:
        screen.line(
            f"  {hot['share']:.0%} of all writes go to {show_bytes(hot['pages'] * page)}, of "
            f"{show_bytes(hot['of_pages'] * page)} that are written at all"
        )
    for part in found["hot"][-1]["ranges"]:
        start, end = part["start"], part["end"]
        screen.line(f"  {part['share']:6.1%}  {start:#x}..{end:#x}  {show_bytes(end - start):>10}  {part['mapping']}")


def _end_of(found: dict[str, Any]) -> str:
    return found["ended"].partition(". ")[0] or "its recorder runs still, or was killed"

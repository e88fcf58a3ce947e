# SPDX-License-Identifier: MIT
"""`dirtytrack scan`: what a process writes in one epoch, by its mappings."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .. import process
from ..errors import TargetGone
from ..observe import Sample, Watch
from ..observe.units import show_bytes
from ..process.mappings import named
from .strip import Screen
from .watching import Choice, process_id, seconds

if TYPE_CHECKING:
    from ..process import Mapping

__all__ = ["add_arguments", "run"]

_ROW = "{:>10}  {:>12}  {:>7}  {:>10}  {:>14}  {}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `dirtytrack scan` takes."""
    parser.add_argument("pid", type=process_id, metavar="PID", help="the process")
    parser.add_argument(
        "--every", "--seconds", type=seconds, default=1.0, metavar="TIME", help="length of an epoch (1s), as in 100ms"
    )
    parser.add_argument(
        "--watch",
        type=seconds,
        nargs="?",
        const=0.0,
        metavar="TIME",
        help="epoch after epoch (of that length), until Ctrl-C or the end of the process",
    )
    Choice.add_arguments(parser)
    parser.add_argument(
        "--all",
        action="store_true",
        help="also the mappings in which nothing was written, and the names of those left out",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document an epoch, each in a line")
    parser.epilog = (
        "The process is stopped once, shortly, when it is attached. Pages count as written whole, and a mapping that "
        "cannot be tracked counts as wholly written."
    )


def run(args: argparse.Namespace) -> int:
    """Attach, wait, and say what was written.

    Returns:
        0, also where a watched process ended; 1 where it ended before the first epoch did.

    Raises:
        PermissionDenied, UnsupportedKernel, TargetGone, and what else `process.attach` raises.
    """
    screen = Screen(quiet=args.json)
    every = args.watch or args.every
    with process.attach(args.pid, include=args.include, exclude=args.exclude) as tracker:
        watch = Watch(tracker, ())
        due = time.monotonic()
        for number in range(1 if args.watch is None else sys.maxsize):
            due = max(due + every, time.monotonic())
            _wait(due, screen, args.pid)
            try:
                rates = watch.sample()
            except TargetGone as gone:
                if not number:
                    raise
                screen.clear()
                print(f"dirtytrack scan: {gone}", file=sys.stderr)
                return 0
            if args.json:
                print(json.dumps(_document(args.pid, tracker.attach_stall, rates, everything=args.all)), flush=True)
            else:
                _tell(screen, args.pid, rates, tracker.mappings, everything=args.all)
    return 0


def _wait(until: float, screen: Screen, pid: int) -> None:
    while (left := until - time.monotonic()) > 0:
        screen.progress(f"process {pid}: {left:.0f} s to go")
        time.sleep(min(left, 0.5))


def _tell(screen: Screen, pid: int, rates: Sample, mappings: Sequence[Mapping], *, everything: bool) -> None:
    written = sorted(rates.mappings, key=lambda row: (-row.dirty_bytes, row.mapping.start))
    shown = [row for row in written if row.dirty_bytes or everything]
    places = sum(bool(row.dirty_bytes) for row in written)
    screen.line(
        f"process {pid}, epoch {rates.epoch}: {show_bytes(rates.dirty_bytes)} written in {rates.seconds:.3f} s, "
        f"{show_bytes(rates.bytes_per_second)}/s, in {places} of {len(written)} mappings",
        "1",
    )
    if rates.untracked_bytes:
        screen.line(f"{show_bytes(rates.untracked_bytes)} of that counts as written because it is not tracked", "1")
    screen.line(_ROW.format("written", "a second", "of it", "size", "address", "mapping"), "2")
    for row in shown:
        name = named(row.mapping.name)
        if row.mapping.state == "untracked":
            name += f"  (not tracked: {row.mapping.reason})"
        cells = (
            show_bytes(row.dirty_bytes),
            show_bytes(row.bytes_per_second) + "/s",
            f"{row.share:.1%}",
            show_bytes(row.mapping.nbytes),
        )
        screen.line(_ROW.format(*cells, f"{row.mapping.start:x}", name))
    left_out = [each for each in mappings if each.state == "excluded" and "w" in each.permissions]
    if left_out:
        size = show_bytes(sum(each.nbytes for each in left_out))
        names = ": " + ", ".join(sorted({named(each.name) for each in left_out})) if everything else ""
        screen.line(
            f"not watched, since not chosen: {size} in {len(left_out)} writable mappings; see --include{names}", "2"
        )


def _document(pid: int, attach_stall: float, rates: Sample, *, everything: bool) -> dict[str, Any]:
    return {
        "pid": pid,
        "epoch": rates.epoch,
        "seconds": rates.seconds,
        "attach_stall_seconds": attach_stall,
        "collect_seconds": rates.collect_seconds,
        "dirty_bytes": rates.dirty_bytes,
        "bytes_per_second": rates.bytes_per_second,
        "mappings": [
            {
                "start": row.mapping.start,
                "end": row.mapping.end,
                "permissions": row.mapping.permissions,
                "name": row.mapping.name,
                "state": row.mapping.state,
                "reason": row.mapping.reason,
                "dirty_bytes": row.dirty_bytes,
            }
            for row in rates.mappings
            if row.dirty_bytes or everything
        ],
    }

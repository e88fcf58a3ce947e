# SPDX-License-Identifier: MIT
"""`dirtytrack plan`: what checkpoints and live migration of a recorded program would cost, and whether they pay."""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import TYPE_CHECKING, Any

from . import quantities, recorded

if TYPE_CHECKING:
    from ..observe import Checkpoints, Precopy

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this command's options."""
    recorded.add_file(parser)
    parser.add_argument(
        "--interval", type=quantities.seconds, default=30.0, metavar="TIME", help="of checkpoints (30s)"
    )
    parser.add_argument(
        "--bandwidth", type=quantities.bandwidth, default=1.25e9, metavar="RATE", help="of store and network (10Gbit)"
    )
    parser.add_argument(
        "--downtime",
        type=quantities.seconds,
        default=0.05,
        metavar="TIME",
        help="that migration may stop it for (50ms)",
    )
    parser.add_argument(
        "--first-write",
        type=quantities.seconds,
        metavar="TIME",
        help="what the first write to a page costs the program; left out, what was measured where it was recorded",
    )
    recorded.add_mapping(parser)
    parser.add_argument("--json", action="store_true", help="for machines")


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    from ..observe import checkpoints, precopy

    recording = recorded.opened(args)
    epochs = recorded.epochs_of(recording, args)
    first_write = args.first_write
    if first_write is None:
        first_write = recording.sessions[-1].first_write_ns / 1e9 if recording.sessions else 0.0
    saves = checkpoints(
        epochs, interval=args.interval, bandwidth=args.bandwidth, first_write=first_write, name=args.file
    )
    moves = precopy(epochs, bandwidth=args.bandwidth, downtime=args.downtime, name=args.file)
    if args.json:
        document: dict[str, Any] = {
            "interval_seconds": args.interval,
            "bandwidth_bytes_per_second": args.bandwidth,
            "downtime_seconds": args.downtime,
            "first_write_seconds": first_write,
            "checkpoints": {
                **saves._asdict(),
                "asked": saves.asked._asdict(),
                "intervals": [each._asdict() for each in saves.intervals],
            },
            "precopy": {**moves._asdict(), "rounds": [each._asdict() for each in moves.rounds]},
        }
        print(json.dumps(document, indent=2))
    else:
        _print(saves, moves, args.bandwidth, first_write)
    return 0


def _told(text: str) -> None:
    print(textwrap.fill(text, 100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False))


def _print(saves: Checkpoints, moves: Precopy, bandwidth: float, first_write: float) -> None:
    from ..observe.units import show_bandwidth, show_bytes, show_seconds

    print(f"Checkpoints at {show_bandwidth(bandwidth)}, {show_seconds(first_write)} for each first write to a page")
    for each in (*saves.intervals, saves.asked):
        asked = "  <- asked for" if each is saves.asked else ""
        print(
            f"  {show_seconds(each.interval_seconds):>8}  {show_bytes(each.nbytes):>10}"
            f"  {show_seconds(each.seconds):>8}  {each.share_of_full:7.1%} of a full copy{asked}"
        )
    print(f"  {'full':>8}  {show_bytes(saves.full_nbytes):>10}  {show_seconds(saves.full_seconds):>8}")
    if saves.break_even_seconds is None:
        print("  break-even: none within what was recorded: a full copy costs more at every interval")
    else:
        print(f"  break-even: from {show_seconds(saves.break_even_seconds)} on a full copy costs no more")
    _told(saves.verdict)
    if saves.beyond:
        _told("The interval is longer than what was recorded, and is reckoned from how sizes grew: record longer.")
    print(f"\nPre-copy migration at {show_bandwidth(bandwidth)}")
    for number, (nbytes, seconds) in enumerate(moves.rounds, 1):
        print(f"  round {number:2}  {show_bytes(nbytes):>10}  {show_seconds(seconds):>8}")
    print(
        f"  stop      {show_bytes(moves.downtime_seconds * bandwidth):>10}  {show_seconds(moves.downtime_seconds):>8}"
        f", {show_seconds(moves.worst_downtime_seconds)} at the busiest"
    )
    _told(moves.verdict)
    if moves.beyond:
        _told("A round takes longer than what was recorded, and is reckoned from how sizes grew: record longer.")

# SPDX-License-Identifier: MIT
"""`dirtytrack receive`: listen for a program that `dirtytrack migrate` moves, and run it here."""

from __future__ import annotations

import argparse
import sys

from ..errors import HandOverInDoubt, MigrationFailed
from . import quantities
from .moving import ProgressLine, add_trust, target, tls_of, token_of

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this command's options."""
    parser.add_argument("target", metavar="MODULE:FUNCTION", help="makes of what arrived what will run")
    parser.add_argument(
        "--listen",
        default="tcp://127.0.0.1:0",
        metavar="ADDRESS",
        help="tcp://host:port or unix:///path (default: a free port of 127.0.0.1)",
    )
    parser.add_argument("--max-bytes", type=quantities.nbytes, metavar="SIZE", help="the most memory to take")
    parser.add_argument("--attempts", type=int, metavar="N", help="give up after so many (default: never)")
    parser.add_argument("--journal", metavar="FILE", default="receive.journal", help="(default: receive.journal)")
    add_trust(parser)
    parser.epilog = (
        "MODULE:FUNCTION is called with a dirtytrack.migration.Arrival before the source hands over, and returns what "
        "to call when it has. What that returns, where it is a number, is the exit status. Needs no kernel that tracks."
    )


def run(args: argparse.Namespace) -> int:
    """Receive, and run it."""
    from ..migration import Destination

    prepare = target(args.target)
    line = ProgressLine(sys.stderr, f"To decide: dirtytrack migrate --resolve {args.journal}")
    with Destination(
        args.listen,
        prepare=prepare,
        max_bytes=args.max_bytes,
        token=token_of(args),
        tls=tls_of(args, server=True),
        journal=args.journal,
        doubt_timeout=None,
        progress=line,
    ) as destination:
        print(f"listens on {destination.address}", flush=True)
        left = args.attempts
        while True:
            try:
                arrival = destination.receive()
                break
            except HandOverInDoubt:
                raise
            except MigrationFailed as error:
                line.end()
                print(f"dirtytrack: {error}", file=sys.stderr)
                left = None if left is None else left - 1
                if left == 0:
                    return 1
        line.end()
        print("runs here", flush=True)
        status = arrival.prepared() if callable(arrival.prepared) else 0
    return status if isinstance(status, int) else 0

# SPDX-License-Identifier: MIT
"""`dirtytrack migrate`: run a program here, move it elsewhere, or resolve a hand-over that is in doubt."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from ..errors import HandOverInDoubt, InvalidMemory, JournalUnusable, MigrationFailed
from . import quantities
from .moving import ProgressLine, add_trust, target, tls_of, token_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..migration import Goal, Source

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this command's options."""
    where = (
        parser.add_argument("target", metavar="MODULE:FUNCTION", help="starts the program, returns its Source"),
        parser.add_argument("to", metavar="ADDRESS", help="tcp://host:port or unix:///path, where `receive` is"),
    )
    parser.add_argument("--after", type=quantities.seconds, metavar="TIME", help="let the program run so long first")
    parser.add_argument(
        "--max-downtime", type=quantities.seconds, default=0.3, metavar="TIME", help="the goal (default: 300ms)"
    )
    parser.add_argument("--max-time", type=quantities.seconds, metavar="TIME", help="the most that all of it may take")
    parser.add_argument("--max-bytes", type=quantities.nbytes, metavar="SIZE", help="the most to send")
    parser.add_argument(
        "--on-divergence",
        choices=("proceed", "slow", "abort"),
        default="proceed",
        help="when memory is written faster than it is sent (default: proceed)",
    )
    parser.add_argument("--connections", type=int, default=2, metavar="N", help="for the bulk (default: 2)")
    parser.add_argument("--bandwidth", type=quantities.bandwidth, metavar="RATE", help="the most to use: 1Gbit")
    parser.add_argument("--compress", choices=("zstd", "lz4"))
    parser.add_argument("--delta", action="store_true", help="send only what differs of a page that was sent before")
    parser.add_argument("--verify", action="store_true", help="read all memory once more at the end, on both sides")
    parser.add_argument("--attempts", type=int, default=1, metavar="N", help="try so often (default: 1)")
    parser.add_argument("--journal", metavar="FILE", default="migrate.journal", help="(default: migrate.journal)")
    add_trust(parser)
    doubt = parser.add_argument_group("a hand-over in doubt")
    doubt.add_argument(
        "--resolve",
        action=_Instead,
        instead_of=where,
        metavar="JOURNAL",
        help="say where a hand-over stands; with --runs, decide",
    )
    doubt.add_argument("--runs", choices=("source", "destination"), help="say the same with both sides' journals")
    parser.epilog = (
        "MODULE:FUNCTION is called with the options of dirtytrack.migration.Source that are given here. It starts the "
        "program, in this process, and returns its Source; or that and a function that waits for the program's end, "
        "which is called when all attempts have failed. Exit status: 0 when it has moved, 1 when not, 3 in doubt."
    )
    parser.set_defaults(refuse=parser.error)


class _Instead(argparse.Action):
    """An option in the place of arguments, which options may then stand between: not so with ``nargs="?"``."""

    def __init__(self, instead_of: Sequence[argparse.Action], **options: Any) -> None:
        super().__init__(**options)
        self._instead_of = instead_of

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        setattr(namespace, self.dest, values)
        for each in self._instead_of:
            each.required = False


def run(args: argparse.Namespace) -> int:
    """Move, or resolve."""
    if args.resolve is not None:
        return _resolve(args)
    if args.runs is not None:
        args.refuse("--runs decides about --resolve JOURNAL")
    from ..migration import Goal, Source

    goal = Goal(args.max_downtime, args.max_time, args.max_bytes, args.on_divergence)
    line = ProgressLine(sys.stderr, f"To decide: dirtytrack migrate --resolve {args.journal}")
    made: Any = target(args.target)(
        connections=args.connections,
        bandwidth=args.bandwidth,
        compress=args.compress,
        delta=args.delta,
        verify=args.verify,
        token=token_of(args),
        tls=tls_of(args, server=False),
        journal=args.journal,
        doubt_timeout=None,
        progress=line,
    )
    source, wait = made if isinstance(made, tuple) else (made, None)
    if not isinstance(source, Source):
        raise InvalidMemory(f"{args.target} returned no Source, but a {type(source).__name__}")
    with source:
        if args.after is not None:
            time.sleep(args.after)
        return _move(args, source, goal, line, wait)


def _move(
    args: argparse.Namespace, source: Source, goal: Goal, line: ProgressLine, wait: Callable[[], object] | None
) -> int:
    from ..observe.units import show_bytes, show_seconds

    for left in reversed(range(args.attempts)):
        try:
            moved = source.migrate(args.to, goal)
        except HandOverInDoubt as error:
            line.end()
            print(f"dirtytrack: {error}", file=sys.stderr)
            return 3
        except MigrationFailed as error:
            line.end()
            print(f"dirtytrack: {error}", file=sys.stderr)
            if left:
                continue
            if wait is not None:
                print("dirtytrack: the program runs on here", file=sys.stderr)
                wait()
            return 1
        line.end()
        print(
            f"moved in {show_seconds(moved.seconds)} and {len(moved.rounds)} rounds, {show_bytes(moved.sent_bytes)} "
            f"sent; downtime {show_seconds(moved.downtime)}, predicted {show_seconds(moved.predicted_downtime)}: "
            f"{moved.reason}"
        )
        return 0
    args.refuse("--attempts is at least 1")
    return 2


# ---- in doubt


def _resolve(args: argparse.Namespace) -> int:
    from ..migration.journal import add_verdict, read

    records = read(args.resolve)
    about = next((each for each in reversed(records) if "role" in each), None)
    if about is None:
        raise JournalUnusable(f"the journal {args.resolve} says of no attempt: there is nothing to resolve")
    migration, attempt, role = str(about["id"]), int(about["attempt"]), str(about["role"])
    mine = [each for each in records if each.get("id") == migration and each.get("attempt") == attempt]
    state = next((str(each["state"]) for each in reversed(mine) if "state" in each), "before the decision")
    verdict = next((str(each["verdict"]) for each in reversed(mine) if "verdict" in each), None)
    print(f"{role} of migration {migration}, attempt {attempt}: {state}; the address is {about.get('address')}")
    if verdict is not None:
        print(f"the verdict is: the {verdict} runs")
    in_doubt = state in ("committing", "prepared")
    if args.runs is None:
        print(
            "in doubt: decide by --runs source or --runs destination, and say the same with the other side's journal"
            if in_doubt
            else "not in doubt: nothing to resolve"
        )
        return 3 if in_doubt and verdict is None else 0
    if not in_doubt:
        raise InvalidMemory(f"this side is not in doubt ({state}): a verdict would change nothing")
    add_verdict(args.resolve, migration, attempt, args.runs)
    print(f"said: the {args.runs} runs. Say the same with the other side's journal")
    return 0

# SPDX-License-Identifier: MIT
"""`dirtytrack top`: what processes write, live."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from ..errors import UnsupportedKernel
from .keys import Keys
from .strip import can_write
from .watching import Choice, Watched, add_metrics, descendants, metrics_at, process_id, seconds

if TYPE_CHECKING:
    from rich.live import Live

    from ..observe import Metrics
    from .top_screen import Line, View

__all__ = ["add_arguments", "run"]

_GONE_SECONDS = 60  # how long a child that ended is still shown
_LOOK_SECONDS = 0.25  # how soon a terminal of another size is noticed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `dirtytrack top` takes."""
    parser.add_argument("pids", nargs="+", type=process_id, metavar="PID", help="a process to watch")
    parser.add_argument("--tree", action="store_true", help="and all that come from them, new ones too")
    Choice.add_arguments(parser)
    parser.add_argument("--every", type=seconds, default=1.0, metavar="TIME", help="length of an epoch (1s)")
    parser.add_argument("--for", "--seconds", type=seconds, metavar="TIME", dest="seconds", help="end after so long")
    add_metrics(parser)
    parser.add_argument("--mappings", action="store_true", help="begin with the mappings of the first process")
    parser.epilog = (
        "Each process is stopped once, shortly, when it is attached. DIRTY/S is what the last epoch "
        "wrote; 1 S, 10 S and 60 S are what was written at least once in these times (+: watched for less so far)."
    )


def run(args: argparse.Namespace) -> int:
    """Watch until `q`, until time is up, or until the terminal goes.

    Returns:
        0; 1 where no process could be attached; 2 where there is no terminal.

    Raises:
        UnsupportedKernel: the package that draws the screen is missing.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        print("dirtytrack top: needs a terminal; `dirtytrack scan PID --watch --json` does not", file=sys.stderr)
        return 2
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError as error:
        raise UnsupportedKernel(
            "the screen is drawn by the package rich, which is not installed: pip install dirtytrack[observe]",
            feature="rich",
        ) from error
    from .top_screen import View

    pids = descendants(args.pids) if args.tree else args.pids
    watched = {pid: Watched(pid, Choice.of(args)) for pid in pids}
    before = {number: signal.signal(number, _ended) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        for one in watched.values():
            one.attach()
        if not any(one.watched for one in watched.values()):
            for one in watched.values():
                print(f"dirtytrack top: {one.pid}: {one.problem}", file=sys.stderr)
            return 1
        view = View(args.every, plain=not can_write(sys.stdout, "▁↑…"))
        if args.mappings:
            view.mappings_of = next(pid for pid, one in watched.items() if one.watched)
        console = Console(highlight=False)
        with ExitStack() as stack:
            metrics = None
            if args.metrics is not None:
                metrics = stack.enter_context(metrics_at(args.metrics, partial(setattr, view, "remark")))
            keys = stack.enter_context(Keys())
            live = stack.enter_context(Live(console=console, screen=True, auto_refresh=False, transient=True))
            _loop(args, watched, view, keys, live, metrics)
    finally:
        for one in watched.values():
            one.detach()
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _ended(number: int, frame: object) -> None:
    """On a signal that ends us, the terminal is put back first."""
    raise SystemExit(128 + number)


def _loop(
    args: argparse.Namespace,
    watched: dict[int, Watched],
    view: View,
    keys: Keys,
    live: Live,
    metrics: Metrics | None,
) -> None:
    """Sample when it is time, obey keys at once, and draw what changed."""
    begun = time.monotonic()
    due, drawn = begun + args.every, None
    view.update(_lines(watched))
    while not view.done:
        now = time.monotonic()
        if args.seconds is not None and now - begun >= args.seconds:
            return
        if now >= due:
            if args.tree:
                _attach_new(args, watched)
            for one in watched.values():
                one.sample(metrics)
            view.update(_lines(watched))
            due, drawn = max(due + args.every, time.monotonic()), None  # late is late: no epoch is made up for
        size = live.console.size
        if size != drawn:
            live.update(view.render(size.width, size.height), refresh=True)
            drawn = size
        pressed = keys.pressed(min(_LOOK_SECONDS, due - time.monotonic()))
        if pressed is None:
            return
        for key in pressed:
            view.press(key)
            drawn = None


def _lines(watched: dict[int, Watched]) -> list[Line]:
    from .top_screen import Line

    return [Line(one.pid, one.name, one.rates, one.problem, one.gone) for one in watched.values()]


def _attach_new(args: argparse.Namespace, watched: dict[int, Watched]) -> None:
    """Take in what came from the processes meanwhile, and forget what came and went."""
    now = time.monotonic()
    for pid in [pid for pid, one in watched.items() if one.gone and now - one.ended_at > _GONE_SECONDS]:
        if pid not in args.pids:
            del watched[pid]
    for pid in descendants(args.pids):
        if pid not in watched:
            watched[pid] = Watched(pid, Choice.of(args))
            watched[pid].attach()

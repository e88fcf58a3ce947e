# SPDX-License-Identifier: MIT
"""`dirtytrack record`: which pages a program writes, epoch by epoch, into a file, until it or the recorder ends."""

from __future__ import annotations

import argparse
import shlex
import signal
import subprocess
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import psutil

from . import quantities

if TYPE_CHECKING:
    from ..observe import Metrics, Observed, Recorder
    from ..process import ProcessTracker

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this command's options."""
    parser.add_argument("-p", "--pid", type=int, help="a running process to attach to")
    parser.add_argument(
        "-o", "--output", metavar="FILE", required=True, help="the recording; what is there is replaced"
    )
    parser.add_argument("--append", action="store_true", help="go on with the recording that is there")
    parser.add_argument("--every", type=quantities.seconds, default=0.1, metavar="TIME", help="an epoch (100ms)")
    parser.add_argument("--for", type=quantities.seconds, metavar="TIME", dest="seconds", help="stop after so long")
    parser.add_argument(
        "--size-budget",
        type=quantities.nbytes,
        metavar="SIZE",
        help="the most that the file takes: 64MiB; older epochs are coarsened",
    )
    parser.add_argument("--include", action="append", metavar="NAME", help="only mappings of this name, as in a shell")
    parser.add_argument(
        "--exclude", action="append", metavar="NAME", help="not those; may be given several times, as --include"
    )
    parser.add_argument(
        "--metrics",
        type=quantities.address,
        metavar="[HOST]:PORT",
        help="serve them to Prometheus; on the loopback if no host is named",
    )
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="a program to start and record")
    parser.epilog = (
        "Exit status: the command's, where one was started; else 0. Ctrl-C ends the recording of a running process, "
        "which is let go unharmed. A command that was started gets Ctrl-C itself, and is recorded until it ends."
    )
    parser.set_defaults(refuse=parser.error)


def run(args: argparse.Namespace) -> int:
    """Record until the program ends, the time is over, or somebody says so."""
    from ..observe import Metrics, Recorder
    from ..process import attach

    words = args.words[1:] if args.words[:1] == ["--"] else args.words
    if (args.pid is None) == (not words):
        args.refuse("either --pid PID or -- COMMAND: one of them says what to record")
    child = None
    if words:
        try:
            child = _started(words)
        except OSError as error:
            print(f"dirtytrack: {words[0]} cannot be started: {error.strerror}", file=sys.stderr)
            return 127 if isinstance(error, FileNotFoundError) else 126  # as a shell does
    pid = args.pid if child is None else child.pid
    with ExitStack() as stack:
        if child is not None:
            stack.callback(_end, child)
        tracker = stack.enter_context(attach(pid, include=args.include, exclude=args.exclude))
        metrics = None if args.metrics is None else stack.enter_context(Metrics(*args.metrics))
        recorder = Recorder(
            tracker,
            args.output,
            every=args.every,
            size_budget=args.size_budget,
            append=args.append,
            command=_command_of(pid, words),
            told=None if metrics is None else _teller(metrics, pid),
        )
        if metrics is not None:
            print(f"metrics: http://{args.metrics[0]}:{metrics.port}/metrics", file=sys.stderr)
        _record(recorder, child, args.seconds)
        print(_summary(args.output, recorder, tracker), file=sys.stderr)
        tracker.detach()
        if child is None:
            return 0
        status = child.wait()
        return status if status >= 0 else 128 - status


# ---- the program


def _started(words: list[str]) -> subprocess.Popen[bytes]:
    """The command, stopped as soon as its program has been loaded."""
    child = subprocess.Popen(words)  # returns once exec() has succeeded
    child.send_signal(signal.SIGSTOP)
    return child


def _end(child: subprocess.Popen[bytes]) -> None:
    """What was started and cannot be recorded, or no longer, is ended; never left stopped."""
    if child.poll() is None:
        child.terminate()
        child.send_signal(signal.SIGCONT)
        child.wait()


def _command_of(pid: int, words: list[str]) -> str:
    if words:
        return shlex.join(words)
    try:
        return shlex.join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return ""


def _teller(metrics: Metrics, pid: int) -> Any:
    def tell(epoch: Observed) -> None:
        metrics.observe(
            epoch.dirty.runs,
            epoch.mappings,
            pid=pid,
            seconds=epoch.seconds,
            collect_seconds=epoch.collect_seconds,
            cpu_seconds=epoch.cpu_seconds,
        )

    return tell


# ---- recording


class _Enough(Exception):
    """Somebody said so by a signal."""


def _enough(number: int, frame: object) -> None:
    raise _Enough


def _record(recorder: Recorder, child: subprocess.Popen[bytes] | None, seconds: float | None) -> None:
    """Until the target has gone, the time is over, or a signal says so."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        try:
            if child is None:
                signal.signal(signal.SIGINT, _enough)
                signal.signal(signal.SIGTERM, _enough)
            else:
                signal.signal(signal.SIGINT, lambda *_: None)  # the terminal sends it to the child as well
                signal.signal(signal.SIGTERM, lambda *_: child.terminate())
            recorder.start()
            if child is not None:
                child.send_signal(signal.SIGCONT)
            recorder.wait(seconds)
        except _Enough:
            pass
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        recorder.stop()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _summary(path: str, recorder: Recorder, tracker: ProcessTracker) -> str:
    from ..observe.units import show_bytes, show_seconds

    did = recorder.statistics()
    ended = f"; {recorder.gone}" if recorder.gone is not None else ""
    late = f", {did.late} of them late" if did.late else ""
    cost = (
        f"recording took {show_seconds(did.cpu_seconds)} of processor time, {did.cpu_share:.2%} of one processor; "
        f"process {tracker.pid} stood still for {show_seconds(tracker.attach_stall)} to be attached to"
    )
    if recorder.first_write_seconds and did.seconds:
        slowed = recorder.first_write_seconds * did.pages
        cost += (
            f", and lost about {show_seconds(slowed)} ({slowed / did.seconds:.2%} of the time) to first writes, at "
            f"{show_seconds(recorder.first_write_seconds)} each"
        )
    return (
        f"{path}: {did.epochs} epochs{late} in {show_seconds(did.seconds)}, {did.pages} pages written, "
        f"{show_bytes(did.nbytes)}{ended}\n{cost}"
    )

# SPDX-License-Identifier: MIT
"""`dirtytrack record`: which pages a program writes, epoch by epoch, into a file, until it or the recorder ends."""

from __future__ import annotations

import argparse
import os
import select
import shlex
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import psutil

from ..errors import DirtyTrackError, TargetGone
from ..kernel import targets
from . import quantities
from .watching import Choice, add_metrics, metrics_at, process_id

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..observe import Metrics, Observed, Recorder, RecorderStatistics
    from ..process import ProcessTracker

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this command's options."""
    parser.add_argument("-p", "--pid", type=process_id, help="a running process to attach to")
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
    Choice.add_arguments(parser)
    add_metrics(parser)
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="a program to start and record")
    parser.epilog = (
        "Exit status: the command's, where one was started; else 0. Ctrl-C ends the recording of a running process, "
        "which is let go unharmed. A command that was started gets Ctrl-C itself, and is recorded until it ends."
    )
    parser.set_defaults(refuse=parser.error)


def run(args: argparse.Namespace) -> int:
    """Record until the program ends, the time is over, or somebody says so."""
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
    with ExitStack() as stack:
        target = _Target(args.pid if child is None else child.pid, child, args)
        stack.callback(target.leave)
        target.attach(stack)
        metrics = None
        if args.metrics is not None:
            metrics = stack.enter_context(metrics_at(args.metrics, lambda page: print(page, file=sys.stderr)))
        target.record(stack, metrics)
        print(target.summary(), file=sys.stderr)
        if child is None:
            return 0
        status = child.wait()
        return status if status >= 0 else 128 - status


# ---- the program


def _started(words: list[str]) -> subprocess.Popen[bytes]:
    """The command, stopped as soon as its program has been loaded."""
    child = subprocess.Popen(words)
    try:
        targets.await_memory(child.pid)  # stopped before, it would never have its own
    except DirtyTrackError:
        child.kill()
        child.wait()
        raise
    child.send_signal(signal.SIGSTOP)
    return child


def _teller(metrics: Metrics, pid: int) -> Callable[[Observed], None]:
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


class _Target:
    """The program that is recorded: attached to, and again when it has replaced itself by exec."""

    def __init__(self, pid: int, child: subprocess.Popen[bytes] | None, args: argparse.Namespace) -> None:
        self._pid, self._child, self._args = pid, child, args
        self._until = None if args.seconds is None else time.monotonic() + args.seconds
        self._tracker: ProcessTracker | None = None
        self._recorder: Recorder | None = None
        self._did: list[RecorderStatistics] = []
        self._stalls: list[float] = []
        self._same = -1
        self._begun = False

    def attach(self, stack: ExitStack) -> None:
        """Attach to it; what has begun as another process under the same number is refused."""
        from ..process import attach

        if self._same < 0:
            with suppress(OSError):  # what is wrong with the number, attach() says better
                self._same = os.pidfd_open(self._pid)
                stack.callback(os.close, self._same)
        tracker = attach(self._pid, include=self._args.include, exclude=self._args.exclude)
        self._tracker = stack.enter_context(tracker)
        self._stalls.append(tracker.attach_stall)

    def leave(self) -> None:
        """A command that could not be recorded is ended, since it stands still; one that runs is waited for."""
        if self._child is not None and self._child.poll() is None:
            if not self._begun:
                self._child.terminate()
                self._child.send_signal(signal.SIGCONT)
            self._child.wait()

    def _runs(self) -> bool:
        """Whether the very process is still there: a pidfd is readable once it has ended (pidfd_open(2))."""
        return self._same >= 0 and not select.select([self._same], [], [], 0)[0]

    def record(self, stack: ExitStack, metrics: Metrics | None) -> None:
        """Until it has ended, the time is over, or a signal says so."""
        from ..observe import Recorder

        while True:
            assert self._tracker is not None
            self._recorder = Recorder(
                self._tracker,
                self._args.output,
                every=self._args.every,
                size_budget=self._args.size_budget,
                append=self._args.append or bool(self._did),
                command=self._command(),
                told=None if metrics is None else _teller(metrics, self._pid),
            )
            enough = self._record(self._recorder)
            self._did.append(self._recorder.statistics())
            self._tracker.detach()
            if enough or self._recorder.gone is None or not self._runs():
                return
            try:
                self.attach(stack)
            except DirtyTrackError as error:
                if not isinstance(error, TargetGone):
                    print(f"dirtytrack: it replaced itself, and is recorded no longer: {error}", file=sys.stderr)
                return

    def _record(self, recorder: Recorder) -> bool:
        """With one tracker; whether it is enough."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        child, enough = self._child, False
        try:
            try:
                if child is None:
                    signal.signal(signal.SIGINT, _enough)
                    signal.signal(signal.SIGTERM, _enough)
                else:
                    signal.signal(signal.SIGINT, lambda *_: None)  # the terminal sends it to the child as well
                    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
                recorder.start()
                if child is not None and not self._begun:
                    child.send_signal(signal.SIGCONT)
                self._begun = True
                left = None if self._until is None else max(self._until - time.monotonic(), 0.0)
                enough = not recorder.wait(left)
            except _Enough:
                enough = True
            for number in before:
                signal.signal(number, signal.SIG_IGN)
            recorder.stop()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return enough

    def _command(self) -> str:
        try:
            return shlex.join(psutil.Process(self._pid).cmdline())
        except psutil.Error:
            return ""

    def summary(self) -> str:
        """What was recorded, and what it cost."""
        from ..observe.units import show_bytes, show_seconds

        assert self._recorder is not None
        epochs, late, pages = (
            sum(each) for each in zip(*((did.epochs, did.late, did.pages) for did in self._did), strict=True)
        )
        seconds, cpu = (sum(each) for each in zip(*((did.seconds, did.cpu_seconds) for did in self._did), strict=True))
        gone = self._recorder.gone
        lines = [
            f"{self._args.output}: {epochs} epochs" + (f", {late} of them late," if late else "") + " in "
            f"{show_seconds(seconds)}, {pages} pages written, {show_bytes(self._did[-1].nbytes)}"
        ]
        if len(self._did) > 1:
            lines.append(f"it replaced itself by exec and was attached to again: {len(self._did)} sessions, with gaps")
        if gone is not None:
            lines.append(str(gone).partition(". ")[0])
        if seconds:
            lines.append(
                f"recording took {show_seconds(cpu)} of processor time, {cpu / seconds:.2%} of one processor; process "
                f"{self._pid} stood still for {show_seconds(max(self._stalls))} to be attached to"
            )
            first = self._recorder.first_write_seconds
            lines.append(
                f"first writes to a page cost it about {show_seconds(first * pages)}, {first * pages / seconds:.2%} of "
                f"the time, at {show_seconds(first)} each (measured here)"
            )
        return "\n".join(lines)

# SPDX-License-Identifier: MIT
"""Processes that a command watches: attached one by one, each with what became of it."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil

from .. import process
from ..errors import DirtyTrackError, TargetGone
from ..kernel.core import PAGE_BYTES
from ..observe import Sample, Watch
from . import quantities

if TYPE_CHECKING:
    from ..observe import Metrics
    from ..process import ProcessTracker

__all__ = ["Choice", "Watched", "add_metrics", "descendants", "metrics_at", "process_id", "seconds"]

_LEAST_SECONDS, _MOST_SECONDS = 0.01, 86400


class Choice(NamedTuple):
    """Which mappings are watched, as `process.attach` takes it."""

    include: list[str] | None
    exclude: list[str] | None

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the options of this."""
        parser.add_argument(
            "--include",
            action="append",
            metavar="NAME",
            help="only mappings of this name (* and ? as in a shell, [anon] for none), also of files and shared "
            "memory; may be repeated. Left out: all private anonymous memory",
        )
        parser.add_argument("--exclude", action="append", metavar="NAME", help="not mappings of this name")

    @staticmethod
    def of(args: argparse.Namespace) -> Choice:
        """What was chosen."""
        return Choice(args.include, args.exclude)


def add_metrics(parser: argparse.ArgumentParser) -> None:
    """Declare the option to serve metrics."""
    parser.add_argument(
        "--metrics",
        type=quantities.address,
        metavar="[HOST]:PORT",
        help="serve them to Prometheus; on the loopback if no host is named",
    )


def metrics_at(address: tuple[str, int], tell: Callable[[str], object]) -> Metrics:
    """Serve them, and tell where."""
    from ..observe import Metrics

    made = Metrics(*address)
    tell(f"metrics: http://{address[0]}:{made.port}/metrics")
    return made


class Watched:
    """A process that is watched, was, or could not be.

    Attributes:
        pid: its number.
        name: its command, in short.
        rates: what it wrote as of the last `sample`, or None before the first.
        problem: why it is not watched (any more), or "".
        gone: whether that is because it ended.
        ended_at: when it was found out, by `time.monotonic`.
    """

    def __init__(self, pid: int, choice: Choice) -> None:
        self.pid = pid
        self._choice = choice
        self.name = _name_of(pid)
        self.rates: Sample | None = None
        self.problem = ""
        self.gone = False
        self.ended_at = 0.0
        self._tracker: ProcessTracker | None = None
        self._watch: Watch | None = None

    @property
    def watched(self) -> bool:
        """Whether it still is."""
        return self._watch is not None

    def attach(self) -> None:
        """Begin. What goes wrong is told by ``problem``."""
        try:
            self._tracker = process.attach(self.pid, include=self._choice.include, exclude=self._choice.exclude)
            self._watch = Watch(self._tracker)
        except DirtyTrackError as error:
            self._end(error)

    def sample(self, metrics: Metrics | None = None) -> None:
        """End an epoch, where it is watched, and tell the metrics of it."""
        if self._watch is None:
            return
        try:
            self.rates = rates = self._watch.sample()
            if metrics is not None:
                metrics.observe(
                    self._watch.dirty.runs,
                    self._watch.source.mappings,
                    pid=self.pid,
                    seconds=rates.seconds,
                    collect_seconds=rates.collect_seconds,
                    page_bytes=PAGE_BYTES,
                )
        except DirtyTrackError as error:
            self._end(error)

    def detach(self) -> None:
        """Let go of it."""
        tracker, self._tracker, self._watch = self._tracker, None, None
        if tracker is not None:
            with suppress(TargetGone):
                tracker.detach()

    def _end(self, error: DirtyTrackError) -> None:
        self.ended_at = time.monotonic()
        self.gone = isinstance(error, TargetGone)
        self.problem = str(error)
        with suppress(DirtyTrackError):
            self.detach()


def _name_of(pid: int) -> str:
    """The program's name and arguments, as far as they may be read."""
    try:
        found = psutil.Process(pid)
        words = found.cmdline()
        return " ".join([Path(words[0]).name, *words[1:]]) if words else found.name()
    except (psutil.Error, OSError):
        return ""


def descendants(pids: Iterable[int]) -> list[int]:
    """These processes and all that come from them and still run, each once; but not this one and what comes from it."""
    named = list(dict.fromkeys(pids))
    found = dict.fromkeys(child for pid in named for child in _children(pid))
    for ours in (os.getpid(), *_children(os.getpid())):
        found.pop(ours, None)
    return list(dict.fromkeys([*named, *found]))


def _children(pid: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return []


def process_id(text: str) -> int:
    """A process's number, as argparse wants it."""
    try:
        pid = int(text)
    except ValueError:
        pid = 0
    if not 0 < pid < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text!r} is not the number of a process")
    return pid


def seconds(text: str) -> float:
    """A length of time, as argparse wants it: seconds, or a number with a unit."""
    try:
        value = float(text)
    except ValueError:
        value = quantities.seconds(text)
    if not _LEAST_SECONDS <= value <= _MOST_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time from {_LEAST_SECONDS} to {_MOST_SECONDS} seconds")
    return value

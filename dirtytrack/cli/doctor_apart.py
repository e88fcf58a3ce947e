# SPDX-License-Identifier: MIT
"""Runs one job after the other in a child process, since a job may hang or kill it: the next one gets a new child."""

from __future__ import annotations

import json
import os
import select
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

__all__ = ["Job", "run_apart"]


class Job(NamedTuple):
    """Something to try."""

    run: Callable[[], dict[str, Any]]
    """What it returns must be what JSON has."""
    seconds: float = 30.0
    """Given up after that."""


def run_apart(jobs: Sequence[Job]) -> Iterator[dict[str, Any]]:
    """Each job's result, in order; ``{"failed": why}`` where it raised, hung or killed its process."""
    done = 0
    while done < len(jobs):
        reads, child = _start(jobs, done)
        try:
            for result in _results(reads, child, jobs[done:]):
                done += 1
                yield result
                if "failed" in result:
                    break  # what a job left behind is not the next one's
        finally:
            os.close(reads)
            _end(child)


def _start(jobs: Sequence[Job], first: int) -> tuple[int, int]:
    reads, writes = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads: the child starts none of theirs
        child = os.fork()
    if child:
        os.close(writes)
        return reads, child
    try:  # pragma: no cover
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
        os.close(reads)
        for job in jobs[first:]:
            os.write(writes, json.dumps(_attempt(job)).encode() + b"\n")
    finally:
        os._exit(0)


def _attempt(job: Job) -> dict[str, Any]:
    try:
        return job.run()
    except BaseException as error:
        return {"failed": f"{type(error).__name__}: {error}"}


def _results(reads: int, child: int, jobs: Sequence[Job]) -> Iterator[dict[str, Any]]:
    rest = b""
    poll = select.poll()
    poll.register(reads, select.POLLIN)
    for job in jobs:
        end = time.monotonic() + job.seconds
        while b"\n" not in rest:
            if not poll.poll(max(0, end - time.monotonic()) * 1000):
                yield {"failed": f"did not return within {job.seconds:g} s"}
                return
            more = os.read(reads, 1 << 16)
            if not more:
                ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
                killed = ended is not None and ended.si_code != os.CLD_EXITED
                how = signal.Signals(ended.si_status).name if ended and killed else "an exit"
                yield {"failed": f"ended its process by {how}"}
                return
            rest += more
        line, _, rest = rest.partition(b"\n")
        yield json.loads(line)


def _end(child: int) -> None:
    """SIGKILL; and not to wait for ever for a process that not even that ends."""
    try:
        os.kill(child, signal.SIGKILL)
        for _ in range(200):
            if os.waitpid(child, os.WNOHANG)[0]:
                return
            time.sleep(0.01)
    except (ProcessLookupError, ChildProcessError):
        return

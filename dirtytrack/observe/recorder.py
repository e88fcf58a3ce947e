# SPDX-License-Identifier: MIT
"""Recorder: a thread that collects at a steady pace and writes what it finds to a recording."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

from ..errors import AlreadyStarted, DirtyTrackError, InvalidRecording, NotStarted, TargetGone
from ..kernel.core import PAGE_BYTES
from ..memory import allocate
from ..tracker import track
from .arrays import np
from .source import source_of
from .writer import RecordingWriter

if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from types import TracebackType

    from typing_extensions import Self

    from ..dirtyset import DirtySet
    from ..process.mappings import Mapping
    from ..tracker import DirtyTracker
    from .source import Source

__all__ = ["Observed", "Recorder", "RecorderStatistics", "first_write_seconds"]

_TRIED_PAGES = 1024
_ROUNDS = 3


class Observed(NamedTuple):
    """An epoch that was just recorded, for those who want to be told at once."""

    dirty: DirtySet
    mappings: tuple[Mapping, ...]
    seconds: float
    """How long it lasted."""
    collect_seconds: float
    cpu_seconds: float
    """What the recorder's thread took of a processor so far."""


class RecorderStatistics(NamedTuple):
    """What a recorder did, and what it cost."""

    epochs: int
    pages: int
    """Written pages, each once an epoch."""
    nbytes: int
    """Of the file."""
    seconds: float
    cpu_seconds: float
    """Processor time of the recorder's own thread, its system calls and coarsening included."""
    late: int
    """Epochs that lasted half as long again as they should, or longer."""

    @property
    def cpu_share(self) -> float:
        """Of one processor."""
        return self.cpu_seconds / self.seconds if self.seconds else 0.0


def first_write_seconds() -> float:
    """What the first write to a page in an epoch costs, measured here and now on memory of our own; 0 if that fails."""
    memory = allocate(_TRIED_PAGES * PAGE_BYTES)
    bytes_in, costs = np.frombuffer(memory, np.uint8), []
    bytes_in[::PAGE_BYTES] = 1
    try:
        with track(memory, exact=True) as tracker:
            for _ in range(_ROUNDS):
                tracker.collect()
                began = time.perf_counter()
                bytes_in[::PAGE_BYTES] = 2
                first = time.perf_counter()
                bytes_in[::PAGE_BYTES] = 3
                costs.append(max((first - began) - (time.perf_counter() - first), 0.0))
    except DirtyTrackError:
        return 0.0
    return min(costs) / _TRIED_PAGES


class Recorder:
    """Collects from a source every so often, in a thread of its own, and writes each epoch to a file.

    ``with observe.Recorder(tracker, "run.dtr"): ...`` records what the block writes. The first epoch has what the
    source had pending, too. Nobody else may collect from the source meanwhile: what they take is not in the recording.

    Args:
        source: a started `DirtyTracker`, a `ProcessTracker`, or another `Source`.
        path, size_budget, append: as `RecordingWriter` takes them.
        every: seconds from one collect to the next. One that comes late is not caught up with.
        command: what is recorded, in words.
        told: called in the recorder's thread with each epoch, as `Observed`.

    Attributes:
        first_write_seconds: what the first write to a page in an epoch costs here, as measured when this was made.

    Raises:
        InvalidRecording: ``every`` is no time; and as `RecordingWriter`.
        PermissionDenied, LimitReached, KernelRefused: as `RecordingWriter`.

    Thread safety: everything may be called from any thread.
    """

    def __init__(
        self,
        source: DirtyTracker | Source,
        path: str | os.PathLike[str],
        *,
        every: float = 0.1,
        size_budget: int | None = None,
        append: bool = False,
        command: str = "",
        told: Callable[[Observed], None] | None = None,
    ) -> None:
        if not 0 < every < float("inf"):
            raise InvalidRecording(f"every is a time in seconds, more than none, not {every}")
        self._source, self._every, self._told = source_of(source), every, told
        self._pid = int(getattr(self._source, "pid", 0))
        self._process: psutil.Process | None = None
        if self._pid:
            with suppress(psutil.Error):
                self._process = psutil.Process(self._pid)
        self.first_write_seconds = first_write_seconds()
        self._writer = RecordingWriter(
            path,
            size_budget=size_budget,
            append=append,
            pid=self._pid,
            command=command,
            first_write_seconds=self.first_write_seconds,
        )
        self._wanted, self._over = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._gone: TargetGone | None = None
        self._epochs = self._pages = self._late = 0
        self._begun = self._seconds = self._cpu = 0.0

    # ---- from outside

    def start(self) -> None:
        """Begin.

        Raises:
            AlreadyStarted: it was started before.
        """
        if self._thread is not None:
            raise AlreadyStarted("this recorder was started before: make another one, with append=True")
        self._begun = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="dirtytrack recorder", daemon=True)
        self._thread.start()

    def stop(self) -> RecorderStatistics:
        """Collect once more, and end the recording. May be called again.

        Raises:
            NotStarted: it was not started.
            Exception: what ended the recorder before, unless that was the target's end.
        """
        if self._thread is None:
            raise NotStarted("this recorder was not started: call start()")
        self._wanted.set()
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self.statistics()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it ends by itself, because the target did or something failed; whether it has."""
        return self._over.wait(timeout)

    @property
    def gone(self) -> TargetGone | None:
        """How the target ended, if it did."""
        return self._gone

    def statistics(self) -> RecorderStatistics:
        """What it did so far."""
        return RecorderStatistics(self._epochs, self._pages, self._writer.nbytes, self._seconds, self._cpu, self._late)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
        except Exception:
            if error is None:
                raise

    # ---- the thread

    def _run(self) -> None:
        reason = "stopped"
        began = time.thread_time()
        try:
            self._loop(began)
        except TargetGone as gone:
            self._gone, reason = gone, str(gone)
        except BaseException as error:
            self._error, reason = error, f"failed: {error}"
        finally:
            cpu = time.thread_time() - began
            try:
                self._writer.close(reason, cpu)
            except DirtyTrackError as error:
                self._error = self._error or error
            self._cpu = cpu + self._writer.coarsening_seconds
            self._over.set()

    def _loop(self, cpu_began: float) -> None:
        begun = due = self._begun
        while True:
            due = max(due + self._every, time.monotonic())
            last = self._wanted.wait(max(due - time.monotonic(), 0.0))
            began = time.monotonic()
            dirty = self._source.collect()
            ended = time.monotonic()
            mappings = self._source.mappings
            self._write(dirty, mappings, begun, ended, ended - began)
            self._late += ended - begun > 1.5 * self._every
            self._seconds, self._cpu = (
                ended - self._begun,
                time.thread_time() - cpu_began + self._writer.coarsening_seconds,
            )
            if self._told is not None:
                self._told(Observed(dirty, mappings, ended - begun, ended - began, self._cpu))
            if last:
                return
            begun = ended

    def _write(
        self, dirty: DirtySet, mappings: tuple[Mapping, ...], begun: float, ended: float, collect_seconds: float
    ) -> None:
        try:
            self._writer.write(
                dirty.runs,
                mappings,
                number=dirty.epoch,
                begun=begun,
                ended=ended,
                collect_seconds=collect_seconds,
                resident_pages=self._resident_pages(mappings),
            )
        except BaseException:
            put_back: Any = getattr(self._source, "put_back", None)
            if put_back is not None:  # it was not recorded, so whoever collects next has it
                with suppress(DirtyTrackError):
                    put_back(dirty)
            raise
        self._epochs += 1
        self._pages += dirty.page_count

    def _resident_pages(self, mappings: tuple[Mapping, ...]) -> int:
        """What a full copy would take: what is mapped and not excluded; of a process, no more than it has in memory of
        its own (resident and not shared, statm's words: proc(5)), which takes one small file to read."""
        mapped = sum(mapping.nbytes for mapping in mappings if mapping.state != "excluded") // PAGE_BYTES
        if self._process is None:
            return mapped
        try:
            memory = self._process.memory_info()
        except psutil.Error:
            return 0
        return min(mapped, (memory.rss - memory.shared) // PAGE_BYTES)

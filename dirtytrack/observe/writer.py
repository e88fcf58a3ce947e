# SPDX-License-Identifier: MIT
"""RecordingWriter: a recording on its way to a file. Its format is in docs/recording-format.md."""

from __future__ import annotations

import errno as _errno
import fcntl
import logging
import os
import stat
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import (
    DirtyTrackError,
    InvalidRecording,
    KernelRefused,
    LimitReached,
    PermissionDenied,
    SessionClosed,
)
from ..kernel.core import PAGE_BYTES
from .coarsen import coarsened
from .recording import Recording
from .records import HEADER_BYTES, End, EpochRecord, Header, Session, changes, in_order
from .written import Written

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from typing_extensions import Self

    from ..process.mappings import Mapping

__all__ = ["LEAST_BUDGET_BYTES", "RecordingWriter"]

_log = logging.getLogger("dirtytrack.observe")

LEAST_BUDGET_BYTES = 16 << 10
_FULL = (_errno.ENOSPC, _errno.EDQUOT, _errno.EFBIG, _errno.ENOMEM, _errno.EMFILE, _errno.ENFILE)
_NS = 1e9
_AGES = 1e9  # seconds, which no clock that began at the machine's start reaches


class RecordingWriter:
    """Writes epochs to a file, each in one system call, so that it can be read while it grows.

    Args:
        path: of the file. What is there is replaced by a new file, which readers of the old one do not notice.
        append: go on with the recording that is there, as a new session; a torn tail is cut off first.
        size_budget: the most bytes that the file may have; left out, it grows. Before it would grow beyond, it is
            rewritten with its older epochs coarsened (see `Epoch`), as a new file that takes the place of the old one.
            That is made in a thread, in good time; only what grows too fast for that waits for it.
        pid, command: what is recorded, for those who read it.
        first_write_seconds: what the first write to a page costs there, for those who plan.

    Raises:
        InvalidRecording: ``append``, and what is there is no recording, or one of pages of another size; or the path is
            no regular file, or in no folder; or the budget is less than 16 KiB; or another writer has
            the file.
        PermissionDenied, LimitReached, KernelRefused: the file cannot be made or written.

    Attributes:
        coarsening_seconds: processor time that coarsening took so far, in a thread of its own.

    Thread safety: one thread at a time.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        append: bool = False,
        size_budget: int | None = None,
        pid: int = 0,
        command: str = "",
        first_write_seconds: float = 0.0,
    ) -> None:
        if size_budget is not None and size_budget < LEAST_BUDGET_BYTES:
            raise InvalidRecording(
                f"size_budget is {size_budget} bytes: a recording takes {LEAST_BUDGET_BYTES} at least"
            )
        self._path = Path(os.path.realpath(path))
        self._name = os.fspath(path)
        self._budget = size_budget
        self.coarsening_seconds = 0.0
        self._table: tuple[Mapping, ...] = ()
        self._given: Sequence[Mapping] = ()  # as given: the same object again needs no look
        self._last = 0
        self._last_ns = 0
        self._file = -1
        self._coarser: _Coarser | None = None
        now = time.time()
        self._page_log2 = PAGE_BYTES.bit_length() - 1
        try:
            if append and self._path.exists():
                self._reopen()
            else:
                self._create(bytes(Header(self._page_log2, now)))
                self._header = Header(self._page_log2, now)
        except BaseException as error:
            self._abandon()
            if isinstance(error, OSError) and not isinstance(error, DirtyTrackError):
                raise self._failure(error) from error
            raise
        self._offset_ns = max(round((now - self._header.begun) * _NS), self._last_ns) - time.monotonic_ns()
        self._write(bytes(Session(self._now_ns(), pid, round(first_write_seconds * _NS), command)))

    # ---- the file

    def _failure(self, error: OSError) -> Exception:
        doing = f"{self._name} cannot be written: {error.strerror}"
        if isinstance(error, PermissionError):
            return PermissionDenied(doing, errno=error.errno)
        if error.errno in (_errno.ENOENT, _errno.ENOTDIR):
            return InvalidRecording(f"{doing}. Make its folder first", errno=error.errno)
        if error.errno in _FULL:
            return LimitReached(f"{doing}. Make room, or give a size_budget", errno=error.errno, feature="file")
        return KernelRefused(doing, errno=error.errno)

    def _abandon(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _lock(self, file: int) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InvalidRecording(
                f"{self._name} is being written by another recorder: wait for it, or record to another file",
                errno=error.errno,
            ) from error

    def _require_regular(self, mode: int) -> None:
        if not stat.S_ISREG(mode):
            raise InvalidRecording(f"{self._name} is no regular file, and a recording is written to one")

    def _create(self, data: bytes) -> None:
        """Make a new file, whole, and put it in the place of what is there."""
        before = -1
        with suppress(FileNotFoundError):
            self._require_regular(self._path.stat().st_mode)
            if self._file < 0:  # nobody else may be writing what is replaced
                before = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        beside = self._path.with_name(f".{self._path.name}.{os.getpid()}.new")
        try:
            if before >= 0:
                self._lock(before)
            file = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                self._lock(file)
                _write_all(file, data)
                os.fsync(file)
                beside.replace(self._path)
            except BaseException:
                os.close(file)
                with suppress(OSError):
                    beside.unlink()
                raise
        finally:
            if before >= 0:
                os.close(before)
        self._abandon()
        self._file, self._nbytes = file, len(data)

    def _reopen(self) -> None:
        self._file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        self._require_regular(os.fstat(self._file).st_mode)
        self._lock(self._file)
        recording = Recording.open(self._path)
        if recording.page_bytes != PAGE_BYTES:
            raise InvalidRecording(
                f"{self._name} is a recording of pages of {recording.page_bytes} bytes; here they have {PAGE_BYTES}"
            )
        self._header = Header(self._page_log2, recording.begun)
        self._nbytes = recording.nbytes - recording.torn_nbytes
        os.ftruncate(self._file, self._nbytes)
        if recording:
            last = recording[-1]
            self._last, self._last_ns = last.number + last.epochs - 1, round(last.ended * _NS)
        for each in recording.ends:
            self._last_ns = max(self._last_ns, each.ended_ns)

    def _write(self, data: bytes) -> None:
        """All of it, or nothing."""
        if self._file < 0:
            raise SessionClosed(f"{self._name} is closed: make another RecordingWriter, with append=True")
        try:
            if self._budget is not None and self._kept_within(self._budget, data):
                return
            try:
                _write_all(self._file, data)
            except BaseException:
                with suppress(OSError):  # what is left of it then is a torn tail
                    os.ftruncate(self._file, self._nbytes)
                raise
        except DirtyTrackError:
            raise
        except OSError as error:
            raise self._failure(error) from error
        self._nbytes += len(data)

    def _kept_within(self, budget: int, more: bytes) -> bool:
        """Coarsen in good time, in a thread, so that no collect waits for it; at the last moment, here. Whether what
        is to be written was written by that."""
        room = budget - HEADER_BYTES
        full = self._nbytes + len(more) > budget
        if self._coarser is not None and (full or self._coarser.done()):
            self._take_over(self._coarser)
            full = self._nbytes + len(more) > budget
        if full:
            data = os.pread(self._file, self._nbytes, 0) + more
            try:
                rest = coarsened(data, room // 2, self._page_log2, self._name)
            except LimitReached:
                rest = coarsened(data, room, self._page_log2, self._name)
            self._create(data[:HEADER_BYTES] + rest)
            return True
        if self._coarser is None and self._nbytes + len(more) > budget * 3 // 4:
            self._coarser = _Coarser(os.pread(self._file, self._nbytes, 0), room // 2, self._page_log2, self._name)
        return False

    def _take_over(self, coarser: _Coarser) -> None:
        """What was coarsened meanwhile takes the place of what it was made of; what was appended since stays."""
        rest = coarser.result()
        self._coarser = None
        self.coarsening_seconds += coarser.cpu_seconds
        if rest is not None:
            since = os.pread(self._file, self._nbytes - coarser.nbytes, coarser.nbytes)
            self._create(os.pread(self._file, HEADER_BYTES, 0) + rest + since)

    # ---- what is written

    def _now_ns(self) -> int:
        return time.monotonic_ns() + self._offset_ns

    @property
    def nbytes(self) -> int:
        """Of the file."""
        return self._nbytes

    def write(
        self,
        runs: memoryview,
        mappings: Sequence[Mapping],
        *,
        number: int,
        begun: float,
        ended: float,
        collect_seconds: float = 0.0,
        resident_pages: int = 0,
    ) -> None:
        """Write an epoch.

        Args:
            runs: as `DirtySet.runs`: (n, 2) addresses, of whole pages, sorted, disjoint, coalesced.
            mappings: as of now.
            number: of the epoch. One that is not behind the last is counted on from there.
            begun, ended: by `time.monotonic`.
            collect_seconds: what the collect took.
            resident_pages: what a full copy would have; 0 where it is not known.

        Raises:
            SessionClosed: after `close`.
            LimitReached: the disk is full, or the budget too small for the tables of mappings alone. The epoch was not
                written then; the file is as it was.
            PermissionDenied, KernelRefused: it cannot be written.
            InvalidRecording: a time that is none, or runs that are not as described. Nothing was written.
        """
        for what, seconds in (("begun", begun), ("ended", ended), ("collect_seconds", collect_seconds)):
            if not 0 <= seconds < _AGES:
                raise InvalidRecording(f"{what} is a time in seconds, not {seconds}: nothing was written")
        begun_ns = max(round(begun * _NS) + self._offset_ns, self._last_ns)
        lasted_ns = max(round((ended - begun) * _NS), 0)
        number = max(number, self._last + 1)
        record = EpochRecord(
            first=number,
            epochs=1,
            begun_ns=begun_ns,
            lasted_ns=lasted_ns,
            collect_ns=round(collect_seconds * _NS),
            resident_pages=resident_pages,
            written=Written.of(runs, self._page_log2),
        )
        table = self._table if mappings is self._given else in_order(mappings)
        self._write(changes(self._table, table) + bytes(record))
        self._table, self._given = table, mappings
        self._last, self._last_ns = number, begun_ns + lasted_ns

    def close(self, reason: str = "stopped", cpu_seconds: float = 0.0) -> None:
        """End the session.

        Args:
            reason: why it ends.
            cpu_seconds: what the recorder's own thread took; coarsening is added.

        Raises:
            LimitReached, PermissionDenied, KernelRefused: the end cannot be written; the file is closed all the same.
        """
        if self._file < 0:
            return
        try:
            if self._coarser is not None:
                self._take_over(self._coarser)
            cpu_seconds += self.coarsening_seconds
            self._write(bytes(End(self._now_ns(), round(cpu_seconds * _NS), reason)))
        finally:
            self._abandon()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("stopped" if error is None else f"failed: {error}")

    def __del__(self) -> None:
        with suppress(Exception):
            self._abandon()

    def __reduce__(self) -> Any:
        raise TypeError("a RecordingWriter cannot be pickled: it has a file open")


class _Coarser:
    """Coarsens in a thread of its own."""

    def __init__(self, data: bytes, most_nbytes: int, page_log2: int, name: str) -> None:
        self.nbytes, self.cpu_seconds = len(data), 0.0
        self._result: bytes | None = None
        self._thread = threading.Thread(
            target=self._run, args=(data, most_nbytes, page_log2, name), name="dirtytrack coarsening", daemon=True
        )
        self._thread.start()

    def _run(self, data: bytes, most_nbytes: int, page_log2: int, name: str) -> None:
        began = time.thread_time()
        try:
            self._result = coarsened(data, most_nbytes, page_log2, name)
        except DirtyTrackError as error:  # perhaps it fits at the last moment, when it may take all of the budget
            _log.info("%s could not be coarsened beforehand: %s", name, error)
        finally:
            self.cpu_seconds = time.thread_time() - began

    def done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> bytes | None:
        """Waits for it."""
        self._thread.join()
        return self._result


def _write_all(file: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]

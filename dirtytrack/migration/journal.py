# SPDX-License-Identifier: MIT
"""The journal of a hand-over: lines that are on disk before the step that they name is taken."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import zlib
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import JournalUnusable

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Journal", "add_verdict", "read"]

_MOST_BYTES = 1 << 20


def _line(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, sort_keys=True).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _records(data: bytes, path: object) -> list[dict[str, Any]]:
    """What is whole. A last line without its end was being written when the process died: it was never acted on."""
    found: list[dict[str, Any]] = []
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        try:
            crc, _, text = line.partition(b" ")
            record = json.loads(text) if int(crc, 16) == zlib.crc32(text) else None
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise JournalUnusable(
                f"line {number} of the journal {path} is damaged: it is no journal of dirtytrack, or something else "
                "wrote to it. Decide by looking at both sides"
            )
        found.append(record)
    return found


def _mend(fd: int) -> None:
    """Take away what a process that died had begun to write."""
    data = os.pread(fd, _MOST_BYTES, 0)
    if data and not data.endswith(b"\n"):
        os.ftruncate(fd, data.rfind(b"\n") + 1)


def _append(fd: int, record: dict[str, Any]) -> None:
    line = _line(record)
    if os.write(fd, line) != len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fsync(fd)


def _unusable(path: object, doing: str, error: OSError, hint: str = "") -> JournalUnusable:
    return JournalUnusable(
        f"the journal {path} cannot be {doing}: {error.strerror}{hint}", errno=error.errno, feature=str(path)
    )


def read(path: str | Path) -> list[dict[str, Any]]:
    """All that a journal says, the oldest first.

    Raises:
        JournalUnusable: it cannot be read, or is none.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST_BYTES)
    except OSError as error:
        raise _unusable(path, "read", error) from error
    return _records(data, path)


def add_verdict(path: str | Path, migration: str, attempt: int, runs: str) -> None:
    """Say in a journal which side runs: whoever waits in doubt acts by it.

    Raises:
        JournalUnusable: it cannot be written.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        try:
            with suppress(BlockingIOError):  # who has it lives, and ends its own lines
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _mend(fd)
            _append(fd, {"verdict": runs, "id": migration, "attempt": attempt})
        finally:
            os.close(fd)
    except OSError as error:
        raise _unusable(path, "written", error) from error


class Journal:
    """A journal that this process writes; nobody else may have it open so.

    Args:
        path: the file; made where it is not there, for its owner's eyes only.

    Raises:
        JournalUnusable: it cannot be written, is something else, or another process has it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = os.fspath(path)
        self._fd = -1
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _mend(self._fd)
            self._sync_directory()
        except OSError as error:
            self.close()
            why = "a process that runs has it" if isinstance(error, BlockingIOError) else error.strerror
            raise JournalUnusable(
                f"the journal {self.path} cannot be used: {why}. Name another file",
                errno=error.errno,
                feature=self.path,
            ) from error
        try:
            self.before = self.records()
            """What was in it when it was opened."""
            if os.fstat(self._fd).st_size > _MOST_BYTES // 2:
                raise JournalUnusable(f"the journal {self.path} is full. Name another file", feature=self.path)
        except JournalUnusable:
            self.close()
            raise

    def _sync_directory(self) -> None:
        fd = os.open(Path(self.path).resolve().parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def add(self, **record: Any) -> None:
        """Write a line, and have it on disk.

        Raises:
            JournalUnusable: the disk is full or broken; the step is not to be taken.
        """
        try:
            _append(self._fd, record)
        except OSError as error:
            raise _unusable(self.path, "written", error, ". Make room, or name another file") from error

    def records(self) -> list[dict[str, Any]]:
        """All that it says, the oldest first.

        Raises:
            JournalUnusable: it cannot be read, or is none.
        """
        try:
            data = os.pread(self._fd, _MOST_BYTES, 0)
        except OSError as error:
            raise _unusable(self.path, "read", error) from error
        return _records(data, self.path)

    def verdict(self, migration: str, attempt: int) -> str | None:
        """What somebody said by `add_verdict`: the last word counts."""
        said = None
        for record in self.records():
            if record.get("id") == migration and record.get("attempt") == attempt:
                said = record.get("verdict", said)
        return said if said in ("source", "destination") else None

    def close(self) -> None:
        """Let go of it. A second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

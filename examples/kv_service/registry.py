# SPDX-License-Identifier: MIT
"""Who is alive, and who serves: what a cluster keeps in etcd or Consul, and this one machine in a directory.

A process is alive for as long as it has the lock on its file, which the kernel takes back when it dies, however. Who is
about to serve writes its name to the file `owner` first. So whoever waits in doubt can know: see `verdict`.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Literal


class Registry:
    """The directory, as one process sees it.

    Args:
        directory: the same for all.
        name: this process's; None for one that only looks.
    """

    def __init__(self, directory: str | Path, name: str | None = None) -> None:
        self.directory, self.name = Path(directory), name
        self._lock = -1

    # ---- of this process

    def register(self, **addresses: str) -> None:
        """Be alive, and reachable there."""
        self._write(f"{self.name}.json", json.dumps(addresses))
        new = self.directory / f".{self.name}.alive"
        self._lock = os.open(new, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        new.replace(self.directory / f"{self.name}.alive")  # locked from the first moment that somebody sees it

    def claim(self) -> None:
        """Be the one who serves: on disk when this returns, and not a moment later may the first client be served."""
        self._write("owner", self.name or "")

    def _write(self, file: str, text: str) -> None:
        new = self.directory / f".{file}.{self.name}"
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.write(fd, text.encode())
            os.fsync(fd)
        finally:
            os.close(fd)
        new.replace(self.directory / file)

    def say(self, what: str) -> None:
        """A line in the log that all share, with the monotonic clock, which they share too."""
        fd = os.open(self.directory / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(fd, f"{time.monotonic()} {self.name} {what}\n".encode())
        os.close(fd)

    # ---- of all

    def log(self) -> list[tuple[float, str, str]]:
        """Its lines: when, who, what."""
        try:
            lines = (self.directory / "log").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [(float(at), who, what) for at, who, what in (line.split(" ", 2) for line in lines)]

    def owner(self) -> str | None:
        """Who serves, or did when it died."""
        try:
            return (self.directory / "owner").read_text()
        except FileNotFoundError:
            return None

    def address(self, name: str, what: str) -> str:
        """Raises KeyError if nobody of that name was ever alive."""
        try:
            found = json.loads((self.directory / f"{name}.json").read_text())[what]
        except FileNotFoundError:
            raise KeyError(f"nobody is called {name!r}") from None
        return str(found)

    def alive(self, name: str) -> bool:
        """Whether that process runs."""
        try:
            fd = os.open(self.directory / f"{name}.alive", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def verdict(self, other: str) -> Literal["source", "destination"] | None:
        """For the one ambiguous moment of a hand-over, on either side, whose other side is that one.

        Both live: they can ask one another, and nothing needs to be decided. A source that is dead never runs again,
        and its destination has everything. A destination that is dead and never was the owner never served anybody; one
        that was the owner took with it what it had promised.
        """
        if self.alive(other):
            return None
        mine = self.name == self.owner()
        if mine:  # we are the source, and nobody has served after us
            return "source"
        return "destination"

# SPDX-License-Identifier: MIT
"""What tests take from the machine, and put back: its settings, its huge pages, a place on its disk."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HUGE_PAGE, GIGANTIC_PAGE = 2 << 20, 1 << 30


class NotHere(Exception):
    """This machine does not provide that kind of memory; why not."""


_LOCK = Path(tempfile.gettempdir()) / "dirtytrack-tests.lock"
_held = 0


@contextmanager
def machine_lock() -> Iterator[None]:
    """Of all test runs on this machine one at a time; may be taken again by who has it."""
    global _held
    if _held:
        _held += 1
        try:
            yield
        finally:
            _held -= 1
        return
    fd = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        _held = 1
        yield
    finally:
        _held = 0
        fcntl.flock(fd, fcntl.LOCK_UN)  # closing would not do while a forked child has it too
        os.close(fd)


# ---- settings -------------------------------------------------------------------------------------------------------


@contextmanager
def setting(path: Path, value: str) -> Iterator[None]:
    """A setting of the kernel's, put back afterwards; under the lock, so that no other run changes it meanwhile.

    Raises:
        NotHere: it is not there, or not for this user to change.
    """
    with machine_lock():
        yield from _set(path, value)


def _set(path: Path, value: str) -> Iterator[None]:
    try:
        before = path.read_text().strip()
        chosen = before[before.index("[") + 1 : before.index("]")] if "[" in before else before
        if chosen != value:
            path.write_text(value)
    except OSError as error:
        raise NotHere(f"cannot set {path} to {value}: {error}") from error
    try:
        yield
    finally:
        if chosen != value:
            path.write_text(chosen)


# ---- the pool of huge pages -----------------------------------------------------------------------------------------


class Pool:
    """What the tests need of the machine's huge pages of one size: added when needed, put back at the end of the run.

    Other test runs may do the same at the same time: each adds and takes away its own, under the lock.
    """

    def __init__(self, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self._folder = Path(f"/sys/kernel/mm/hugepages/hugepages-{page_bytes >> 10}kB")
        self._added = 0

    def _number(self, name: str) -> int:
        return int((self._folder / name).read_text())

    def _resize(self, pages: int) -> int:
        (self._folder / "nr_hugepages").write_text(str(pages))
        return self._number("nr_hugepages")

    def ensure(self, pages: int) -> None:
        """Have so many pages free; to be called, and the pages mapped, under the lock."""
        if not self._folder.exists():
            raise NotHere(f"no hugetlb pages of {self.page_bytes >> 20} MiB on this machine")
        reserved = self._number("resv_hugepages")
        if reserved >> 63:  # below 0 for a moment, while something still holds pages of a mapping that has gone
            reserved = 0
        lacks = pages - (self._number("free_hugepages") - reserved)
        if lacks > 0:
            before = self._number("nr_hugepages")
            try:
                gained = self._resize(before + lacks) - before
            except OSError as error:
                raise NotHere(f"the pool lacks {lacks} huge pages, and {self._folder}/nr_hugepages: {error}") from error
            self._added += gained
            if gained < lacks:
                raise NotHere(f"no {lacks} huge pages of {self.page_bytes >> 20} MiB free in one piece, but {gained}")

    def put_back(self) -> None:
        if self._added:
            with machine_lock():
                self._resize(max(0, self._number("nr_hugepages") - self._added))
            self._added = 0


POOLS = {size: Pool(size) for size in (HUGE_PAGE, GIGANTIC_PAGE)}


# ---- disks ----------------------------------------------------------------------------------------------------------


def on_disk(folder: Path) -> Path:
    """A folder that is not in memory: there a file's pages are written back, and read again."""
    for choice in (folder, Path("/var/tmp"), Path.cwd()):
        if file_system(choice) != "tmpfs" and os.access(choice, os.W_OK):
            return choice
    raise NotHere(f"neither {folder} nor /var/tmp nor this folder is on a disk")


def file_system(path: Path) -> str:
    """The type of the file system that a path is on."""
    best, kind = "", ""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, what, *_ = line.split()
        if (path.resolve().is_relative_to(where)) and len(where) >= len(best):
            best, kind = where, what
    return kind

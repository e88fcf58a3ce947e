# SPDX-License-Identifier: MIT
"""Throw-away memory of every kind, and what can happen to memory: the doctor tries it. By ctypes, loaded at need.

Nothing here changes the system: no setting, no mount, no reserve of huge pages. What a machine lacks is `NotHere`.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import core
from .mappings import sys_is_there, thp_bytes

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["KINDS", "Area", "Kind", "NotHere", "dumpable", "knows_guard_pages"]

_PAGE = core.PAGE_BYTES
_FAILED = (1 << 64) - 1
_PRIVATE, _SHARED, _ANONYMOUS = mmap.MAP_PRIVATE, mmap.MAP_SHARED, mmap.MAP_ANONYMOUS
_MAP_DROPPABLE, _MAP_FIXED, _MAP_NORESERVE, _MAP_HUGETLB = 0x08, 0x10, 0x4000, 0x40000
_MFD_CLOEXEC, _MFD_HUGETLB = 1, 4
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2
_PUNCH_HOLE, _ZERO_RANGE = 3, 0x11
_MEMFD_SECRET = 447
_IPC_PRIVATE, _IPC_CREAT, _IPC_RMID = 0, 0o1000, 0
_PR_GET_DUMPABLE = 3
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE


class NotHere(Exception):
    """This machine or kernel cannot provide that, or do it; why not."""


def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = libc.mremap.restype = libc.shmat.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mprotect.argtypes = libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.msync.argtypes = libc.madvise.argtypes
    libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    libc.shmget.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_int]
    libc.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
    libc.shmdt.argtypes = [ctypes.c_void_p]
    libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    libc.syscall.restype = ctypes.c_long
    return libc


def _why(what: str) -> NotHere:
    number = ctypes.get_errno()
    return NotHere(f"{what}: {errno.errorcode.get(number, number)}, {os.strerror(number)}")


def _ok(returned: int, what: str) -> None:
    if returned != 0:
        raise _why(what)


def _mapped(nbytes: int, flags: int, fd: int = -1, rights: int = _READ_WRITE, align: int = _PAGE) -> int:
    """The address of a new mapping."""
    libc = _libc()
    if align == _PAGE:
        at = libc.mmap(None, nbytes, rights, flags, fd, 0)
    else:
        hole = libc.mmap(None, nbytes + align, 0, _PRIVATE | _ANONYMOUS, -1, 0)
        if hole is None or hole == _FAILED:
            raise _why("mmap")
        start = -(-hole // align) * align
        # SAFETY: within what was just reserved, so nobody else's mapping is replaced.
        at = libc.mmap(start, nbytes, rights, flags | _MAP_FIXED, fd, 0)
        if start > hole:
            libc.munmap(hole, start - hole)
        libc.munmap(start + nbytes, hole + align - start)
    if at is None or at == _FAILED:
        raise _why("mmap")
    return int(at)


class Area:
    """Throw-away memory of one kind, in units: what one store makes dirty at most. Unmapped by leaving the ``with``."""

    def __init__(self, address: int, nbytes: int, unit_bytes: int = _PAGE, fd: int = -1) -> None:
        self.address, self.nbytes, self.unit_bytes, self.fd = address, nbytes, unit_bytes, fd
        self._alias = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        libc = _libc()
        libc.munmap(self.address, self.nbytes)
        if self._alias:
            libc.munmap(self._alias, self.nbytes)
        if self.fd >= 0:
            os.close(self.fd)

    # ---- looking and storing

    @property
    def pages(self) -> int:
        """How many base pages it has."""
        return self.nbytes // _PAGE

    def read(self) -> bytes:
        """All of it, which makes its pages present."""
        return ctypes.string_at(self.address, self.nbytes)

    def fill(self, byte: int) -> None:
        """Store to all of it."""
        ctypes.memset(self.address, byte, self.nbytes)

    def at(self, unit: int) -> int:
        """Where a unit begins."""
        return self.address + unit * self.unit_bytes

    def store(self, unit: int, byte: int = 7) -> None:
        """Store one byte."""
        ctypes.memset(self.at(unit) + 8, byte, 1)

    def load(self, unit: int) -> bytes:
        """Read one byte of a unit."""
        return ctypes.string_at(self.at(unit) + 8, 1)

    def view(self, unit: int) -> memoryview:
        """A unit as a buffer, for the system to write to."""
        return memoryview((ctypes.c_char * self.unit_bytes).from_address(self.at(unit))).cast("B")

    # ---- madvise

    def _advise(self, what: str, advice: int, unit: int, units: int) -> None:
        _ok(_libc().madvise(self.at(unit), units * self.unit_bytes, advice), what)

    def discard(self, unit: int, units: int = 1) -> None:
        """MADV_DONTNEED."""
        self._advise("MADV_DONTNEED", 4, unit, units)

    def discard_locked(self, unit: int, units: int = 1) -> None:
        """MADV_DONTNEED_LOCKED (Linux 5.18)."""
        self._advise("MADV_DONTNEED_LOCKED", 24, unit, units)

    def free(self, unit: int, units: int = 1) -> None:
        """MADV_FREE: discarded when the system needs memory."""
        self._advise("MADV_FREE", 8, unit, units)

    def remove(self, unit: int, units: int = 1) -> None:
        """MADV_REMOVE: a hole in what is shared."""
        self._advise("MADV_REMOVE", 9, unit, units)

    def page_out(self, unit: int, units: int = 1) -> None:
        """MADV_PAGEOUT: reclaim now."""
        self._advise("MADV_PAGEOUT", 21, unit, units)

    def populate(self, unit: int, units: int = 1) -> None:
        """MADV_POPULATE_WRITE: as if stored to, with nothing changed."""
        self._advise("MADV_POPULATE_WRITE", 23, unit, units)

    def collapse(self, unit: int, units: int = 1) -> None:
        """MADV_COLLAPSE: into huge pages, now (Linux 6.1)."""
        self._advise("MADV_COLLAPSE", 25, unit, units)

    def guard(self, unit: int) -> None:
        """MADV_GUARD_INSTALL (Linux 6.13). Over an armed page of a file it may never return: only where it may hang."""
        self._advise("MADV_GUARD_INSTALL", 102, unit, 1)

    def unguard(self, unit: int) -> None:
        """MADV_GUARD_REMOVE."""
        self._advise("MADV_GUARD_REMOVE", 103, unit, 1)

    # ---- the file beneath

    def _fallocate(self, what: str, mode: int, unit: int, units: int) -> None:
        done = _libc().fallocate(self.fd, mode, unit * self.unit_bytes, units * self.unit_bytes)
        _ok(done, what)

    def punch(self, unit: int, units: int = 1) -> None:
        """A hole, through the descriptor."""
        self._fallocate("FALLOC_FL_PUNCH_HOLE", _PUNCH_HOLE, unit, units)

    def zero(self, unit: int, units: int = 1) -> None:
        """Zeroes, through the descriptor."""
        self._fallocate("FALLOC_FL_ZERO_RANGE", _ZERO_RANGE, unit, units)

    def cut(self, unit: int) -> None:
        """Truncate from there on, and grow again."""
        os.ftruncate(self.fd, unit * self.unit_bytes)
        os.ftruncate(self.fd, self.nbytes)

    def write_file(self, unit: int) -> None:
        """write(2) to the file."""
        try:
            os.pwrite(self.fd, b"\x5a" * 8, unit * self.unit_bytes + 8)
        except OSError as error:
            raise NotHere(f"write(2): {error.strerror}") from error

    def write_back(self) -> None:
        """To the disk."""
        _ok(_libc().msync(self.address, self.nbytes, 4), "msync")

    # ---- mappings

    def map_again(self) -> None:
        """A second mapping of the same shared memory."""
        self._alias = _mapped(self.nbytes, _SHARED, self.fd)

    def store_by_alias(self, unit: int) -> None:
        """Store through the second mapping."""
        ctypes.memset(self._alias + unit * self.unit_bytes + 8, 0x5A, 1)

    def move(self) -> None:
        """Elsewhere, by mremap."""
        libc = _libc()
        target = libc.mmap(None, self.nbytes + self.unit_bytes, 0, _PRIVATE | _ANONYMOUS, -1, 0)
        if target is None or target == _FAILED:
            raise _why("mmap")
        start = -(-target // self.unit_bytes) * self.unit_bytes
        # SAFETY: onto what was just reserved, which is long enough from the next whole unit on.
        moved = libc.mremap(self.address, self.nbytes, self.nbytes, _MREMAP_MAYMOVE | _MREMAP_FIXED, start)
        if moved is None or moved == _FAILED:
            why = _why("mremap")
            libc.munmap(target, self.nbytes + self.unit_bytes)
            raise why
        if start > target:
            libc.munmap(target, start - target)
        if target + self.unit_bytes > start:
            libc.munmap(start + self.nbytes, target + self.unit_bytes - start)
        self.address = int(moved)

    def map_over(self) -> None:
        """Fresh private memory in its place."""
        # SAFETY: over our own mapping only.
        _libc().mmap(self.address, self.nbytes, _READ_WRITE, _PRIVATE | _ANONYMOUS | _MAP_FIXED, -1, 0)

    def protect(self, *, writable: bool) -> None:
        """Read-only, or writable again."""
        _ok(_libc().mprotect(self.address, self.nbytes, _READ_WRITE if writable else mmap.PROT_READ), "mprotect")

    def lock(self) -> None:
        """In memory, for good (mlock)."""
        _ok(_libc().mlock(self.address, self.nbytes), "mlock")


# ---- how each kind is mapped ----------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """A kind of memory."""

    name: str
    make: Callable[[int], Area]
    """Maps so many units; raises `NotHere`."""
    units: int = 8
    """How many the doctor maps to try something."""
    shared: bool = False
    file: bool = False
    """There is something beneath with a descriptor."""
    huge: bool = False
    """Only where the kernel really gave a transparent huge page is it what it says."""


def _with_file(fd: int, nbytes: int, flags: int, unit_bytes: int = _PAGE, rights: int = _READ_WRITE) -> Area:
    try:
        os.ftruncate(fd, nbytes)
        if unit_bytes == _PAGE:
            os.pwrite(fd, b"\1" * nbytes, 0)  # what is private and never written differs from what is empty
        return Area(_mapped(nbytes, flags, fd, rights), nbytes, unit_bytes, fd)
    except OSError as error:
        os.close(fd)
        raise NotHere(str(error)) from error
    except NotHere:
        os.close(fd)
        raise


def _plain(flags: int, rights: int = _READ_WRITE) -> Callable[[int], Area]:
    return lambda units: Area(_mapped(units * _PAGE, flags, rights=rights), units * _PAGE)


def _memfd(flags: int) -> Callable[[int], Area]:
    return lambda units: _with_file(os.memfd_create("dirtytrack doctor", _MFD_CLOEXEC), units * _PAGE, flags)


def _device(units: int) -> Area:
    try:
        fd = os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise NotHere(str(error)) from error
    return Area(_mapped(units * _PAGE, _PRIVATE, fd), units * _PAGE, fd=fd)


def _disk(flags: int, *, read_only: bool = False) -> Callable[[int], Area]:
    def make(units: int) -> Area:
        finders: tuple[Callable[[], str], ...] = (lambda: "/var/tmp", tempfile.gettempdir, os.getcwd)
        for find in finders:
            with suppress(OSError):
                folder = find()
                if _file_system(folder) in ("tmpfs", "ramfs", "rootfs", ""):
                    continue
                fd, name = tempfile.mkstemp(dir=folder)
                again = os.open(name, os.O_RDONLY | os.O_CLOEXEC) if read_only else -1
                Path(name).unlink()
                if not read_only:
                    return _with_file(fd, units * _PAGE, flags)
                os.ftruncate(fd, units * _PAGE)
                os.close(fd)
                return Area(_mapped(units * _PAGE, flags, again, mmap.PROT_READ), units * _PAGE, fd=again)
        raise NotHere("no folder on a disk that may be written to")

    return make


def _file_system(path: str) -> str:
    """The type of the file system that a path is on; empty where nobody can tell."""
    best, kind = "", ""
    with suppress(OSError), open("/proc/self/mounts") as lines:
        for line in lines:
            where, what = line.split()[1:3]
            inside = path == where or path.startswith(where.rstrip("/") + "/")
            if inside and len(where) >= len(best):
                best, kind = where, what
    return kind


def _transparent(flags: int) -> Callable[[int], Area]:
    def make(units: int) -> Area:
        size = thp_bytes()
        if not size:
            raise NotHere(
                "this kernel has no transparent huge pages"
                if sys_is_there()
                else "how large a transparent huge page is cannot be told: /sys is not mounted here"
            )
        nbytes, fd = units * size, -1
        if flags & _SHARED:
            fd = os.memfd_create("dirtytrack doctor", _MFD_CLOEXEC)
            os.ftruncate(fd, nbytes)
        try:
            area = Area(_mapped(nbytes, flags, fd, align=size), nbytes, size, fd)
        except NotHere:
            if fd >= 0:
                os.close(fd)
            raise
        if _libc().madvise(area.address, nbytes, mmap.MADV_HUGEPAGE):
            why = _why("MADV_HUGEPAGE")
            area.__exit__(None, None, None)
            raise why
        return area

    return make


def _hugetlb(*, shared: bool) -> Callable[[int], Area]:
    def make(units: int) -> Area:
        size = _huge_page_bytes()
        try:
            if shared:
                fd = os.memfd_create("dirtytrack doctor", _MFD_CLOEXEC | _MFD_HUGETLB)
                return _with_file(fd, units * size, _SHARED, size)
            return Area(_mapped(units * size, _PRIVATE | _ANONYMOUS | _MAP_HUGETLB), units * size, size)
        except (OSError, NotHere) as error:
            free = _hugetlb_number(size, "free_hugepages")
            raise NotHere(
                f"the pool of huge pages has {free} free, and it takes {units} (vm.nr_hugepages)"
                if free is not None
                else f"no hugetlb memory: {error}"
            ) from error

    return make


def _huge_page_bytes() -> int:
    with suppress(OSError, ValueError), open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("Hugepagesize:"):
                return int(line.split()[1]) << 10
    raise NotHere("this kernel has no hugetlb memory")


def _hugetlb_number(page_bytes: int, name: str) -> int | None:
    with suppress(OSError, ValueError), open(f"/sys/kernel/mm/hugepages/hugepages-{page_bytes >> 10}kB/{name}") as file:
        return int(file.read())
    return None


def _secret(units: int) -> Area:
    fd = int(_libc().syscall(_MEMFD_SECRET, 0))
    if fd < 0:
        raise _why("memfd_secret")
    try:
        os.set_inheritable(fd, False)
        os.ftruncate(fd, units * _PAGE)
        return Area(_mapped(units * _PAGE, _SHARED, fd), units * _PAGE, fd=fd)
    except (OSError, NotHere) as error:
        os.close(fd)
        raise NotHere(str(error)) from error


def _system_v(units: int) -> Area:
    libc = _libc()
    number = libc.shmget(_IPC_PRIVATE, units * _PAGE, _IPC_CREAT | 0o600)
    if number < 0:
        raise _why("shmget")
    at = libc.shmat(number, None, 0)
    libc.shmctl(number, _IPC_RMID, None)  # it goes with its last mapping
    if at is None or at == _FAILED:
        raise _why("shmat")
    return Area(int(at), units * _PAGE)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("anonymous", _plain(_PRIVATE | _ANONYMOUS)),
        Kind("anonymous, 4 MiB", _plain(_PRIVATE | _ANONYMOUS | _MAP_NORESERVE), units=(4 << 20) // _PAGE),
        Kind("transparent huge", _transparent(_PRIVATE | _ANONYMOUS), units=3, huge=True),
        Kind("transparent huge shared", _transparent(_SHARED), units=3, shared=True, file=True, huge=True),
        Kind("memfd shared", _memfd(_SHARED), shared=True, file=True),
        Kind("memfd private", _memfd(_PRIVATE), file=True),
        Kind("file shared", _disk(_SHARED), shared=True, file=True),
        Kind("file private", _disk(_PRIVATE), file=True),
        Kind("hugetlb private", _hugetlb(shared=False), units=3),
        Kind("hugetlb shared", _hugetlb(shared=True), units=3, shared=True, file=True),
        Kind("anonymous shared", _plain(_SHARED | _ANONYMOUS), shared=True),
        Kind("/dev/zero private", _device),
        Kind("System V shared", _system_v, shared=True),
        Kind("memfd_secret", _secret, shared=True),
        Kind("anonymous read-only", _plain(_PRIVATE | _ANONYMOUS, mmap.PROT_READ)),
        Kind("anonymous without access", _plain(_PRIVATE | _ANONYMOUS, 0)),
        Kind("file shared, opened read-only", _disk(_SHARED, read_only=True), shared=True),
        Kind("MAP_DROPPABLE", _plain(_MAP_DROPPABLE | _ANONYMOUS)),
    )
}
"""By name."""


# ---- questions ------------------------------------------------------------------------------------------------------


def dumpable() -> int:
    """1: other processes of this user may look at this one's memory; 0 or 2: only root may, this one's pagemap too."""
    return int(_libc().prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0))


def knows_guard_pages() -> bool:
    """Whether this kernel has MADV_GUARD_INSTALL, tried on memory that nobody arms."""
    with KINDS["anonymous"].make(1) as area:
        try:
            area.guard(0)
        except NotHere:
            return False
    return True

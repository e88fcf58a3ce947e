# SPDX-License-Identifier: MIT
"""Every kind of memory that this machine can provide, in one table.

A `Kind` maps an `Area` of so many units, a unit being what the kernel resolves for that memory: what one store makes
dirty. So a test in units is the same test on a base page, on a huge page and on a gigantic one.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests import oracle
from tests.kernel.host import GIGANTIC_PAGE, HUGE_PAGE, POOLS, NotHere, file_system, machine_lock, on_disk, setting
from tests.oracle import PAGE

_MAP_FIXED_NOREPLACE, _MAP_HUGETLB, _MAP_HUGE_SHIFT = 0x100000, 0x40000, 26
_MFD_CLOEXEC, _MFD_HUGETLB = 1, 4
_SHM_HUGETLB, _IPC_PRIVATE, _IPC_CREAT, _IPC_RMID = 0o4000, 0, 0o1000, 0
_MEMFD_SECRET = 447
_MADV_HUGEPAGE = 14
_MNT_DETACH = 2
_PRIVATE_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_SHARED_ANONYMOUS = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.sbrk.restype = ctypes.c_void_p
_libc.sbrk.argtypes = [ctypes.c_long]
_libc.shmat.restype = ctypes.c_void_p
_libc.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
_libc.shmget.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_int]
_libc.shmdt.argtypes = [ctypes.c_void_p]


def _fail(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")


# ---- an area --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Area:
    """Mapped memory of one kind, in units."""

    address: int
    nbytes: int
    granule: int
    """Bytes in a unit."""
    fd: int = -1
    """The file beneath, where there is one."""

    @property
    def end(self) -> int:
        return self.address + self.nbytes

    @property
    def memory(self) -> tuple[int, int]:
        return self.address, self.nbytes

    @property
    def units(self) -> int:
        return self.nbytes // self.granule

    @property
    def unit_pages(self) -> int:
        return self.granule // PAGE

    def at(self, unit: int, offset: int = 0) -> int:
        return self.address + unit * self.granule + offset

    def store(self, unit: int, data: bytes = b"\7") -> None:
        oracle.poke_bytes(self.at(unit, 8), data)

    def load(self, unit: int) -> bytes:
        return oracle.peek_bytes(self.at(unit, 8), 1)

    def fill(self, byte: int, units: range | None = None) -> None:
        chosen = range(self.units) if units is None else units
        ctypes.memset(self.at(chosen.start), byte, len(chosen) * self.granule)

    def content(self) -> list[bytes]:
        """Of each unit its first 64 bytes: the tests store there."""
        return [oracle.peek_bytes(self.at(unit), 64) for unit in range(self.units)]

    def of_pages(self, pages: Iterable[int]) -> set[int]:
        """The units that these pages, counted from the area's first, are in."""
        return {page // self.unit_pages for page in pages}

    def of_runs(self, runs: Iterable[tuple[int, ...]]) -> set[int]:
        """The units that runs of addresses (start, end, ...) touch."""
        return self.of_pages((page - self.address) // PAGE for run in runs for page in range(run[0], run[1], PAGE))


def _place(nbytes: int, flags: int, fd: int = -1, align: int = HUGE_PAGE) -> int:
    """mmap, readable and writable, at a place of its own."""
    rights = mmap.PROT_READ | mmap.PROT_WRITE
    at = oracle._libc.mmap(oracle.free_place(nbytes, align), nbytes, rights, flags | _MAP_FIXED_NOREPLACE, fd, 0)
    if at == oracle.MAP_FAILED:
        raise _fail("mmap")
    return int(at)


# ---- how each kind is mapped ----------------------------------------------------------------------------------------

Mapper = Callable[[int, Path], AbstractContextManager[tuple[int, int]]]
"""Maps so many bytes, with a file in that folder if it needs one: (address, descriptor or -1)."""


@contextmanager
def _mapped(nbytes: int, flags: int, fd: int = -1, align: int = HUGE_PAGE) -> Iterator[tuple[int, int]]:
    try:
        at = _place(nbytes, flags, fd, align)
        try:
            yield at, fd
        finally:
            oracle.unmap(at, nbytes)
    finally:
        if fd >= 0:
            os.close(fd)


def _filled(fd: int, nbytes: int) -> int:
    """A file that has content, so that what is private and never written differs from what is empty."""
    for offset in range(0, nbytes, PAGE):
        os.pwrite(fd, b"\1" * PAGE, offset)
    return fd


def _anonymous(nbytes: int, folder: Path) -> AbstractContextManager[tuple[int, int]]:
    return _mapped(nbytes, _PRIVATE_ANONYMOUS)


def _anonymous_shared(nbytes: int, folder: Path) -> AbstractContextManager[tuple[int, int]]:
    return _mapped(nbytes, _SHARED_ANONYMOUS)


def _zero_device(flags: int) -> Mapper:
    return lambda nbytes, _folder: _mapped(nbytes, flags, os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC))


def _memfd(flags: int) -> Mapper:
    return lambda nbytes, _folder: _mapped(nbytes, flags, _filled(os.memfd_create("kind"), nbytes))


def _file_in(folder: Path, nbytes: int) -> int:
    fd, name = tempfile.mkstemp(dir=folder)
    Path(name).unlink()
    return _filled(fd, nbytes)


def _disk_file(flags: int) -> Mapper:
    return lambda nbytes, folder: _mapped(nbytes, flags, _file_in(on_disk(folder), nbytes))


def _tmpfs(nbytes: int, folder: Path) -> AbstractContextManager[tuple[int, int]]:
    shm = Path("/dev/shm")
    if file_system(shm) != "tmpfs":
        raise NotHere("/dev/shm is no tmpfs")
    return _mapped(nbytes, mmap.MAP_SHARED, _file_in(shm, nbytes))


def _overlay(flags: int) -> Mapper:
    """A file of an overlay, which is mounted for as long as it takes to open it."""

    @contextmanager
    def mapper(nbytes: int, folder: Path) -> Iterator[tuple[int, int]]:
        with tempfile.TemporaryDirectory(dir=on_disk(folder)) as name:
            parts = {part: Path(name) / part for part in ("lower", "upper", "work", "merged")}
            for part in parts.values():
                part.mkdir()
            options = f"lowerdir={parts['lower']},upperdir={parts['upper']},workdir={parts['work']}"
            merged = os.fsencode(parts["merged"])
            if _libc.mount(b"overlay", merged, b"overlay", 0, options.encode()) != 0:
                raise NotHere(f"mounting an overlay: {os.strerror(ctypes.get_errno())}")
            try:
                fd = _file_in(parts["merged"], nbytes)
            finally:
                _libc.umount2(merged, _MNT_DETACH)
            with _mapped(nbytes, flags, fd) as found:
                yield found

    return mapper


def _secret(nbytes: int, folder: Path) -> AbstractContextManager[tuple[int, int]]:
    fd = int(_libc.syscall(_MEMFD_SECRET, 0))
    if fd < 0:
        raise NotHere(f"memfd_secret: {os.strerror(ctypes.get_errno())} (secretmem.enable=1 at boot)")
    os.set_inheritable(fd, False)
    os.ftruncate(fd, nbytes)
    return _mapped(nbytes, mmap.MAP_SHARED, fd)


@contextmanager
def _system_v(nbytes: int, folder: Path, extra: int = 0) -> Iterator[tuple[int, int]]:
    number = _libc.shmget(_IPC_PRIVATE, nbytes, _IPC_CREAT | 0o600 | extra)
    if number < 0:
        raise _fail("shmget")
    at = _libc.shmat(number, oracle.free_place(nbytes), 0)
    _libc.shmctl(number, _IPC_RMID, None)  # it goes with its last mapping
    if at == oracle.MAP_FAILED:
        raise _fail("shmat")
    try:
        yield at, -1
    finally:
        _libc.shmdt(at)


_KEPT_BYTES = 32 * PAGE


@functools.cache
def _heap_at() -> int:
    """Between two of the C library's own pieces of its heap, for good: nobody can give back what lies in the middle."""
    at = _libc.sbrk(_KEPT_BYTES + PAGE)
    if at == oracle.MAP_FAILED:
        raise NotHere("this C library gives no heap by sbrk")
    return int(-(-at // PAGE) * PAGE)


@functools.cache
def _stack_at() -> int:
    """On the main thread's stack, 1 MiB below what it has used so far: the kernel lets it grow by being touched."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("[stack]")]
    if not lines:
        raise NotHere("no mapping is called [stack]")
    at = int(lines[0].split("-")[0], 16) - (1 << 20) - _KEPT_BYTES
    oracle.poke_bytes(at, b"\0")
    return at


def _kept(where: Callable[[], int]) -> Mapper:
    @contextmanager
    def mapper(nbytes: int, folder: Path) -> Iterator[tuple[int, int]]:
        assert nbytes <= _KEPT_BYTES
        at = where()
        oracle.discard(at, nbytes)
        yield at, -1

    return mapper


def _transparent(shared: bool) -> Mapper:
    folder_of_settings = Path("/sys/kernel/mm/transparent_hugepage")

    @contextmanager
    def mapper(nbytes: int, folder: Path) -> Iterator[tuple[int, int]]:
        name, value = ("shmem_enabled", "advise") if shared else ("enabled", "madvise")
        fd = os.memfd_create("kind") if shared else -1
        if shared:
            os.ftruncate(fd, nbytes)
        flags = mmap.MAP_SHARED if shared else _PRIVATE_ANONYMOUS
        with setting(folder_of_settings / name, value), _mapped(nbytes, flags, fd) as (at, fd):
            oracle.discard(at, nbytes, _MADV_HUGEPAGE)
            ctypes.memset(at, 0, nbytes)
            found = oracle.categories(at, at + PAGE)[0]
            if not found & oracle.HUGE:
                raise NotHere("the kernel gave no transparent huge page")
            yield at, fd

    return mapper


def _hugetlb(form: str, page_bytes: int = HUGE_PAGE) -> Mapper:
    size = (page_bytes.bit_length() - 1) << _MAP_HUGE_SHIFT

    @contextmanager
    def mapper(nbytes: int, folder: Path) -> Iterator[tuple[int, int]]:
        pool = POOLS[page_bytes]
        spare = nbytes // page_bytes if page_bytes == HUGE_PAGE else 0  # for the copies that a forked child makes
        with machine_lock():
            pool.ensure(nbytes // page_bytes + spare)
            if form == "System V":
                mapping = _system_v(nbytes, folder, _SHM_HUGETLB | size)
            elif form == "memfd":
                fd = os.memfd_create("kind", _MFD_CLOEXEC | _MFD_HUGETLB | size)
                os.ftruncate(fd, nbytes)
                mapping = _mapped(nbytes, mmap.MAP_SHARED, fd, page_bytes)
            else:
                sharing = _SHARED_ANONYMOUS if form == "shared" else _PRIVATE_ANONYMOUS
                mapping = _mapped(nbytes, sharing | _MAP_HUGETLB | size, align=page_bytes)
            found = mapping.__enter__()
        try:
            yield found
        finally:
            mapping.__exit__(None, None, None)

    return mapper


# ---- the table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of memory."""

    name: str
    mapper: Mapper
    backing: str
    """``anonymous``, ``shmem``, ``file`` or ``hugetlb``: what holds a page that no page table knows."""
    shared: bool = False
    """A forked child writes the same memory."""
    granule: int = PAGE
    page_bytes: int = PAGE
    """What a mapping's length is a multiple of."""
    pinnable: bool = True
    """The kernel may take its pages for itself: O_DIRECT, process_vm_writev."""
    kept: bool = False
    """There is one of it in a process, which stays: no test may map anything in its place."""

    @property
    def private_file(self) -> bool:
        """Pages never written are the file's, pages written are a copy."""
        return not self.shared and self.backing in ("shmem", "file")

    @contextmanager
    def map(self, units: int, folder: Path) -> Iterator[Area]:
        """An area of at least so many units.

        Raises:
            NotHere: the machine does not provide it.
        """
        nbytes = -(-units * self.granule // self.page_bytes) * self.page_bytes
        try:
            mapping = self.mapper(nbytes, folder)
            address, fd = mapping.__enter__()
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENODEV, errno.ENOMEM):
                raise NotHere(f"{self.name}: {error}") from error
            raise
        try:
            yield Area(address, nbytes, self.granule, fd)
        finally:
            mapping.__exit__(None, None, None)

    def __str__(self) -> str:
        return self.name


_hugetlb_kind = functools.partial(Kind, backing="hugetlb", granule=HUGE_PAGE, page_bytes=HUGE_PAGE)
KINDS: tuple[Kind, ...] = (
    Kind("private anonymous", _anonymous, "anonymous"),
    Kind("brk heap", _kept(_heap_at), "anonymous", kept=True),
    Kind("stack", _kept(_stack_at), "anonymous", kept=True),
    Kind("/dev/zero private", _zero_device(mmap.MAP_PRIVATE), "anonymous"),
    Kind("transparent huge private", _transparent(False), "anonymous", page_bytes=HUGE_PAGE),
    Kind("shared anonymous", _anonymous_shared, "shmem", shared=True),
    Kind("/dev/zero shared", _zero_device(mmap.MAP_SHARED), "shmem", shared=True),
    Kind("memfd shared", _memfd(mmap.MAP_SHARED), "shmem", shared=True),
    Kind("tmpfs file", _tmpfs, "shmem", shared=True),
    Kind("System V", _system_v, "shmem", shared=True),
    Kind("transparent huge shared", _transparent(True), "shmem", shared=True, page_bytes=HUGE_PAGE),
    Kind("memfd_secret", _secret, "secret", shared=True, pinnable=False),
    Kind("memfd private", _memfd(mmap.MAP_PRIVATE), "shmem"),
    Kind("disk file shared", _disk_file(mmap.MAP_SHARED), "file", shared=True),
    Kind("disk file private", _disk_file(mmap.MAP_PRIVATE), "file"),
    Kind("overlay file shared", _overlay(mmap.MAP_SHARED), "file", shared=True),
    Kind("overlay file private", _overlay(mmap.MAP_PRIVATE), "file"),
    _hugetlb_kind("hugetlb private", _hugetlb("private")),
    _hugetlb_kind("hugetlb shared", _hugetlb("shared"), shared=True),
    _hugetlb_kind("hugetlb memfd", _hugetlb("memfd"), shared=True),
    _hugetlb_kind("hugetlb System V", _hugetlb("System V"), shared=True),
)
_gigantic_kind = functools.partial(Kind, backing="hugetlb", granule=GIGANTIC_PAGE, page_bytes=GIGANTIC_PAGE)
GIGANTIC: tuple[Kind, ...] = (
    _gigantic_kind("hugetlb 1G private", _hugetlb("private", GIGANTIC_PAGE)),
    _gigantic_kind("hugetlb 1G shared", _hugetlb("shared", GIGANTIC_PAGE), shared=True),
)
"""Apart from the others: a machine that has run for a while may have no gibibyte in one piece."""


def some(*names: str) -> tuple[Kind, ...]:
    """Kinds by name."""
    by_name = {kind.name: kind for kind in (*KINDS, *GIGANTIC)}
    return tuple(by_name[name] for name in names)

# SPDX-License-Identifier: MIT
"""An independent client of PAGEMAP_SCAN and userfaultfd, in plain `fcntl` and `struct`: the tests' second opinion.

It shares no code with the library, and is built to be obviously right rather than fast: one ioctl asks about one page.
Beside it stand the system calls that Python has not, by which tests write, discard and re-map behind everybody's back.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import mmap
import os
import platform
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PAGE = mmap.PAGESIZE

WPALLOWED, WRITTEN, FILE, PRESENT, SWAPPED, PFNZERO, HUGE = (1 << bit for bit in range(7))
KNOWN = (1 << 7) - 1
WP_MATCHING, CHECK_WPASYNC = 1, 2

_READ_WRITE = 3 << 30
_PAGEMAP_SCAN = _READ_WRITE | 96 << 16 | ord("f") << 8 | 16
_UFFDIO_API = _READ_WRITE | 24 << 16 | 0xAA << 8 | 0x3F
_UFFDIO_REGISTER = _READ_WRITE | 32 << 16 | 0xAA << 8
_UFFDIO_UNREGISTER = 2 << 30 | 16 << 16 | 0xAA << 8 | 1
_UFFDIO_WRITEPROTECT = _READ_WRITE | 24 << 16 | 0xAA << 8 | 6
_USERFAULTFD = {"x86_64": 323, "aarch64": 282}
_WP_HUGETLBFS_SHMEM, _WP_UNPOPULATED, _WP_ASYNC = 1 << 12, 1 << 13, 1 << 15
_REQUEST = struct.Struct("12Q")  # struct pm_scan_arg
_FOUND = struct.Struct("3Q")  # struct page_region

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.syscall.restype = ctypes.c_long
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mremap.restype = ctypes.c_void_p
_libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
_libc.process_vm_writev.argtypes = [
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    *[ctypes.c_ulong] * 2,
]
_libc.process_vm_writev.restype = ctypes.c_ssize_t
_libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
_python = ctypes.PyDLL(None)  # keeps the GIL

MAP_FAILED = ctypes.c_void_p(-1).value


# ---- PAGEMAP_SCAN -------------------------------------------------------------------------------------------------


def scan_once(
    fd: int,
    start: int,
    end: int,
    *,
    mask: int = 0,
    inverted: int = 0,
    anyof: int = 0,
    returned: int = KNOWN,
    flags: int = 0,
    max_pages: int = 0,
    room: int = 4,
) -> list[tuple[int, int, int]]:
    """One ioctl, as it is: (start, end, categories) of what fits into `room`."""
    vector = array.array("Q", bytes(_FOUND.size * room))
    at = vector.buffer_info()[0]
    arguments = (_REQUEST.size, flags, start, end, 0, at, room, max_pages, inverted, mask, anyof, returned)
    request = bytearray(_REQUEST.pack(*arguments))
    count = fcntl.ioctl(fd, _PAGEMAP_SCAN, request, True)
    return [_FOUND.unpack_from(vector, i * _FOUND.size) for i in range(count)]


def categories(start: int, end: int, fd: int | None = None) -> list[int]:
    """The categories of each page of [start, end), by one ioctl a page; 0 where nothing is mapped."""
    own = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC) if fd is None else fd
    try:
        told = []
        for page in range(start, end, PAGE):
            found = scan_once(own, page, page + PAGE)
            told.append(found[0][2] if found else 0)
        return told
    finally:
        if fd is None:
            os.close(own)


def matches(page: int, mask: int, inverted: int, anyof: int) -> bool:
    """The kernel's rule, from its documentation, for the categories of one page."""
    seen = page ^ inverted
    return seen & mask == mask and (not anyof or bool(seen & anyof))


def written(start: int, end: int) -> set[int]:
    """Numbers of the pages in [start, end) that were written since they were armed."""
    return {number for number, bits in enumerate(categories(start, end)) if bits & WRITTEN}


def exact(start: int, end: int) -> set[int]:
    """Numbers of the pages that the one scan which arms reports: nothing beside it, no remedy after it.

    In one call, which hugetlb memory needs to be armed at all.
    """
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        flags = WP_MATCHING | CHECK_WPASYNC
        room = (end - start) // PAGE // 2 + 1
        found = scan_once(fd, start, end, mask=WRITTEN, returned=WRITTEN, flags=flags, room=room)
    finally:
        os.close(fd)
    return {(page - start) // PAGE for first, last, _ in found for page in range(first, last, PAGE)}


@contextmanager
def userfaultfd() -> Iterator[int]:
    """A descriptor for asynchronous write protection, as the selftests of the kernel open it."""
    user_mode_only = 1
    fd = int(_libc.syscall(_USERFAULTFD[platform.machine()], os.O_CLOEXEC | os.O_NONBLOCK | user_mode_only))
    _check(fd, "userfaultfd")
    try:
        features = _WP_HUGETLBFS_SHMEM | _WP_UNPOPULATED | _WP_ASYNC
        fcntl.ioctl(fd, _UFFDIO_API, struct.pack("3Q", 0xAA, features, 0))
        yield fd
    finally:
        os.close(fd)


def register(uffd: int, start: int, end: int) -> None:
    """UFFDIO_REGISTER for write protection; arms nothing."""
    fcntl.ioctl(uffd, _UFFDIO_REGISTER, struct.pack("4Q", start, end - start, 2, 0))


def unregister(uffd: int, start: int, end: int) -> None:
    fcntl.ioctl(uffd, _UFFDIO_UNREGISTER, struct.pack("2Q", start, end - start))


def disarm(uffd: int, start: int, end: int) -> None:
    """UFFDIO_WRITEPROTECT, the other way round: pages may be written without a fault."""
    fcntl.ioctl(uffd, _UFFDIO_WRITEPROTECT, struct.pack("3Q", start, end - start, 0))


def arm(uffd: int, start: int, end: int) -> None:
    """UFFDIO_WRITEPROTECT: arms pages and *erases* what was written before, so that nobody is told."""
    fcntl.ioctl(uffd, _UFFDIO_WRITEPROTECT, struct.pack("3Q", start, end - start, 1))


# ---- memory ---------------------------------------------------------------------------------------------------------


def address_of(buffer: Any) -> int:
    """Where a writable buffer's bytes are."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def peek_bytes(address: int, nbytes: int) -> bytes:
    return ctypes.string_at(address, nbytes)


def poke_bytes(address: int, data: bytes) -> None:
    """A plain store, wherever it goes."""
    ctypes.memmove(address, data, len(data))


def _check(code: int, what: str) -> None:
    if code < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def write_process(pid: int, address: int, data: bytes) -> None:
    """process_vm_writev: the kernel writes into the memory of `pid`."""
    source = ctypes.create_string_buffer(data, len(data))
    local = struct.pack("2Q", ctypes.addressof(source), len(data))
    remote = struct.pack("2Q", address, len(data))
    done = _libc.process_vm_writev(pid, local, 1, remote, 1, 0)
    _check(done, "process_vm_writev")
    assert done == len(data)


def map_at(address: int, nbytes: int, *, fd: int = -1, extra: int = 0) -> int:
    """mmap: private and anonymous, or shared of a descriptor; MAP_FIXED where `address` is not 0."""
    flags = (mmap.MAP_SHARED if fd >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) | extra | (0x10 if address else 0)
    at = _libc.mmap(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0)
    _check(-1 if at == MAP_FAILED else 0, "mmap")
    return int(at)


def unmap(address: int, nbytes: int) -> None:
    _check(_libc.munmap(address, nbytes), "munmap")


def protect(address: int, nbytes: int, rights: int) -> None:
    _check(_libc.mprotect(address, nbytes, rights), "mprotect")


def move(address: int, nbytes: int) -> int:
    """mremap to a place of the kernel's choice, which the old mapping leaves."""
    to = map_at(0, nbytes)
    at = _libc.mremap(address, nbytes, nbytes, 3, to)  # MREMAP_MAYMOVE | MREMAP_FIXED
    _check(-1 if at == MAP_FAILED else 0, "mremap")
    return int(at)


def remap(address: int, old_nbytes: int, new_nbytes: int, flags: int = 1, to: int = 0) -> int:
    """mremap as it is: MREMAP_MAYMOVE (1), MREMAP_FIXED (2), MREMAP_DONTUNMAP (4)."""
    at = _libc.mremap(address, old_nbytes, new_nbytes, flags, to)
    _check(-1 if at == MAP_FAILED else 0, "mremap")
    return int(at)


def discard(address: int, nbytes: int, advice: int = mmap.MADV_DONTNEED) -> None:
    _check(_libc.madvise(address, nbytes, advice), "madvise")


def synchronise(address: int, nbytes: int) -> None:
    """msync: a file's pages are written back now."""
    _check(_libc.msync(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), 4), "msync")


_APART_BEGIN, _APART_GAP_BYTES = 1 << 45, 4 << 20
_taken = _APART_BEGIN


def free_place(nbytes: int, align: int = 2 << 20) -> int:
    """Addresses that are used by nobody, far from where the kernel maps by itself, and with nothing beside them.

    There a test may unmap a part, and map or grow into what is free: nothing else of this process comes to lie there.
    """
    global _taken
    at = -(-(_taken + _APART_GAP_BYTES) // align) * align
    _taken = at + nbytes
    return at


@contextmanager
def apart(nbytes: int) -> Iterator[int]:
    """As `mapped`, at a place of its own."""
    at = map_at(free_place(nbytes), nbytes)
    try:
        yield at
    finally:
        unmap(at, nbytes)


@contextmanager
def mapped(nbytes: int) -> Iterator[int]:
    """The address of private anonymous memory that nobody pins."""
    at = map_at(0, nbytes)
    try:
        yield at
    finally:
        unmap(at, nbytes)


# ---- processes ------------------------------------------------------------------------------------------------------


def allow_any_tracer() -> None:
    """Let children write into this process where the Yama module guards it; elsewhere this does nothing."""
    _libc.prctl(0x59616D61, ctypes.c_ulong(-1).value, 0, 0, 0)


def become_nobody() -> None:
    """From root to a user without any right, as if this program had been started by them."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        _check(_libc.prctl(4, 1, 0, 0, 0), "PR_SET_DUMPABLE")  # exec would do this; /proc/self/pagemap needs it


def raw_fork() -> int:
    """The C library's fork, of which Python and its hooks hear nothing."""
    return int(_python.fork())

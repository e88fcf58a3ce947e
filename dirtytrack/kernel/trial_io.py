# SPDX-License-Identifier: MIT
"""What the kernel and devices write into throw-away memory: reads that wait, direct ones, io_uring.

All of it into unit 1 of an area. What this machine forbids or lacks is `NotHere`.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from . import core
from .trial import Area, NotHere

__all__ = [
    "Ring",
    "begin_read",
    "direct_read",
    "end_read",
    "punch_part",
    "read_by_ring",
    "read_into_registered",
    "register_buffer",
    "write_by_process_vm",
]

_NEW = b"\x5a" * 8
_AT = 8
"""Where in the unit."""
_SETUP, _ENTER, _REGISTER = 425, 426, 427
_READ_FIXED, _READ = 4, 22
_GETEVENTS, _REGISTER_BUFFERS, _UNREGISTER_BUFFERS = 1, 0, 1
_PUNCH_HOLE = 3
_PENDING: dict[int, Any] = {}
"""What was begun before the memory was armed, by its address."""


def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = libc.process_vm_writev.restype = ctypes.c_ssize_t
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    libc.process_vm_writev.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong,
    ]  # fmt: skip
    return libc


def _refused(what: str, number: int) -> NotHere:
    return NotHere(f"{what}: {errno.errorcode.get(number, number)}, {os.strerror(number)}")


def _call(what: str, *arguments: int) -> int:
    done = int(_libc().syscall(*[ctypes.c_long(number) for number in arguments]))
    if done < 0:
        raise _refused(what, ctypes.get_errno())
    return done


def _address_of(buffer: bytearray) -> int:
    return ctypes.addressof((ctypes.c_char * len(buffer)).from_buffer(buffer))


# ---- reads ----------------------------------------------------------------------------------------------------------


def begin_read(area: Area) -> None:
    """A thread waits in read(2), with the memory as its buffer."""
    reads, writes = os.pipe()
    # SAFETY: the thread ends before the area does: end_read joins it, and the end of this process ends it.
    thread = threading.Thread(target=os.readv, args=(reads, [area.view(1)[_AT : _AT + len(_NEW)]]), daemon=True)
    thread.start()
    _PENDING[area.address] = thread, reads, writes


def end_read(area: Area) -> None:
    """What it waits for comes."""
    thread, reads, writes = _PENDING.pop(area.address)
    try:
        os.write(writes, _NEW)
        thread.join()
    finally:
        os.close(reads)
        os.close(writes)


def direct_read(area: Area) -> None:
    """O_DIRECT: the disk writes to the memory, past the page cache."""
    for folder in ("/var/tmp", tempfile.gettempdir()):
        with suppress(OSError):
            fd, name = tempfile.mkstemp(dir=folder)
            try:
                os.write(fd, b"\x5a" * core.PAGE_BYTES)
                os.fsync(fd)
                direct = os.open(name, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
            finally:
                os.close(fd)
                Path(name).unlink()
            try:
                if os.readv(direct, [area.view(1)[: core.PAGE_BYTES]]) == core.PAGE_BYTES:
                    return
            finally:
                os.close(direct)
    raise NotHere("no folder whose files can be read by O_DIRECT into this memory")


def write_by_process_vm(area: Area) -> None:
    """process_vm_writev, as a debugger writes."""
    source = bytearray(_NEW)
    ours = bytearray(struct.pack("2Q", _address_of(source), len(source)))
    theirs = bytearray(struct.pack("2Q", area.at(1) + _AT, len(source)))
    done = _libc().process_vm_writev(os.getpid(), _address_of(ours), 1, _address_of(theirs), 1, 0)
    if done != len(source):
        raise _refused("process_vm_writev", ctypes.get_errno())


# ---- the file beneath -----------------------------------------------------------------------------------------------


def punch_part(area: Area) -> None:
    """A hole of less than a page, which the kernel fills with zeroes where the page stays."""
    if _libc().fallocate(area.fd, _PUNCH_HOLE, area.unit_bytes + _AT, area.unit_bytes // 2):
        raise _refused("FALLOC_FL_PUNCH_HOLE", ctypes.get_errno())


# ---- io_uring -------------------------------------------------------------------------------------------------------


class Ring:
    """An io_uring of four entries, in plain system calls; with a buffer that the kernel pins, where one is given."""

    def __init__(self, address: int = 0, nbytes: int = 0) -> None:
        parameters = bytearray(120)
        self._fd = _call("io_uring_setup", _SETUP, 4, _address_of(parameters))
        numbers = struct.unpack("30I", parameters)
        self._tail, self._head, self._array = numbers[11], numbers[20], numbers[16]
        self._completed, self._mask = numbers[25], numbers[1] - 1
        self._ring = mmap.mmap(self._fd, max(self._array + 4 * numbers[0], self._completed + 16 * numbers[1]))
        self._entries = mmap.mmap(self._fd, 64 * numbers[0], offset=0x10000000)
        self._operation = _READ
        if nbytes:
            vector = bytearray(struct.pack("2Q", address, nbytes))
            try:
                _call("io_uring_register", _REGISTER, self._fd, _REGISTER_BUFFERS, _address_of(vector), 1)
            except NotHere:
                self.close()
                raise
            self._operation = _READ_FIXED

    def read(self, fd: int, address: int, nbytes: int) -> None:
        """Read what is there into memory, and wait for it."""
        entry = struct.pack("BBHiQQIIQH22x", self._operation, 0, 0, fd, 0, address, nbytes, 0, 0, 0)
        self._entries[: len(entry)] = entry
        (tail,) = struct.unpack_from("I", self._ring, self._tail)
        struct.pack_into("I", self._ring, self._array + 4 * (tail & 3), 0)
        struct.pack_into("I", self._ring, self._tail, tail + 1)
        _call("io_uring_enter", _ENTER, self._fd, 1, 1, _GETEVENTS, 0, 0)
        (head,) = struct.unpack_from("I", self._ring, self._head)
        _, done, _ = struct.unpack_from("QiI", self._ring, self._completed + 16 * (head & self._mask))
        struct.pack_into("I", self._ring, self._head, head + 1)
        if done != nbytes:
            raise _refused("a read by io_uring", -done)

    def close(self) -> None:
        """What was pinned is let go of at once: closing alone does so some time later."""
        if self._operation == _READ_FIXED:
            _call("io_uring_register", _REGISTER, self._fd, _UNREGISTER_BUFFERS, 0, 0)
        self._entries.close()
        self._ring.close()
        os.close(self._fd)


@contextmanager
def _full_pipe() -> Iterator[int]:
    reads, writes = os.pipe()
    try:
        os.write(writes, _NEW)
        yield reads
    finally:
        os.close(reads)
        os.close(writes)


def read_by_ring(area: Area) -> None:
    """A read by io_uring, asked for and ended here."""
    ring = Ring()
    try:
        with _full_pipe() as reads:
            ring.read(reads, area.at(1) + _AT, len(_NEW))
    finally:
        ring.close()


def register_buffer(area: Area) -> None:
    """The unit becomes a registered buffer of an io_uring, which the kernel pins."""
    _PENDING[area.address] = Ring(area.at(1), area.unit_bytes)


def read_into_registered(area: Area) -> None:
    """A read into the buffer that was registered."""
    ring = _PENDING.pop(area.address)
    try:
        with _full_pipe() as reads:
            ring.read(reads, area.at(1) + _AT, len(_NEW))
    finally:
        ring.close()

# SPDX-License-Identifier: MIT
"""An io_uring in plain system calls: reads into memory, at once or while somebody else does something."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct

from tests import oracle

_SETUP, _ENTER, _REGISTER = 425, 426, 427
_READ_FIXED, _READ = 4, 22
_GETEVENTS, _UNREGISTER_BUFFERS = 1, 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _call(what: str, *arguments: int) -> int:
    done = _libc.syscall(*[ctypes.c_long(number) for number in arguments])
    if done < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return int(done)


class Ring:
    """An io_uring of four entries; with a registered buffer, where one is given, which the kernel pins for good.

    Raises:
        OSError: it is forbidden here (kernel.io_uring_disabled, seccomp), or the memory cannot be registered.
    """

    def __init__(self, registered: tuple[int, int] | None = None) -> None:
        parameters = bytearray(120)
        self._fd = _call("io_uring_setup", _SETUP, 4, oracle.address_of(parameters))
        numbers = struct.unpack("30I", parameters)
        self._tail, self._array, self._cqes = numbers[11], numbers[16], numbers[25]
        self._head, self._completed = numbers[20], numbers[21]
        self._ring = mmap.mmap(self._fd, max(self._array + 4 * numbers[0], self._cqes + 16 * numbers[1]))
        self._entries = mmap.mmap(self._fd, 64 * numbers[0], offset=0x10000000)
        self._fixed = False
        if registered is not None:
            iovec = bytearray(struct.pack("2Q", *registered))
            try:
                _call("io_uring_register", _REGISTER, self._fd, 0, oracle.address_of(iovec), 1)
            except OSError:
                self.close()
                raise
            self._fixed = True

    def submit(self, fd: int, address: int, nbytes: int, offset: int = 0) -> None:
        """Begin a read."""
        operation = _READ_FIXED if self._fixed else _READ
        self._entries[:64] = struct.pack("BBHiQQIIQH22x", operation, 0, 0, fd, offset, address, nbytes, 0, 0, 0)
        (tail,) = struct.unpack_from("I", self._ring, self._tail)
        struct.pack_into("I", self._ring, self._array + 4 * (tail & 3), 0)
        struct.pack_into("I", self._ring, self._tail, tail + 1)
        assert _call("io_uring_enter", _ENTER, self._fd, 1, 0, 0, 0, 0) == 1

    def wait(self) -> int:
        """Until it has ended; what it returned."""
        _call("io_uring_enter", _ENTER, self._fd, 0, 1, _GETEVENTS, 0, 0)
        (head,) = struct.unpack_from("I", self._ring, self._head)
        (completed,) = struct.unpack_from("I", self._ring, self._completed)
        assert head != completed
        _, done, _ = struct.unpack_from("QiI", self._ring, self._cqes + 16 * (head & 7))
        struct.pack_into("I", self._ring, self._head, head + 1)
        if done < 0:
            raise OSError(-done, f"io_uring read: {os.strerror(-done)}")
        return int(done)

    def close(self) -> None:
        if self._fixed:
            _call("io_uring_register", _REGISTER, self._fd, _UNREGISTER_BUFFERS, 0, 0)  # closing does so later
        self._entries.close()
        self._ring.close()
        os.close(self._fd)

    def __enter__(self) -> Ring:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

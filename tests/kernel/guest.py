# SPDX-License-Identifier: MIT
"""A virtual machine in plain ioctls of /dev/kvm: one processor, which stores to a list of addresses until it is told.

It runs in 32-bit protected mode without paging, since real mode reaches 1 MiB and huge pages are farther apart. Its
program and the list lie in memory of their own, so that what is written to the memory under test is its stores alone.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
import struct
from collections.abc import Sequence
from contextlib import suppress

from tests import oracle
from tests.kernel.host import NotHere
from tests.oracle import PAGE

_CREATE_VM, _VCPU_MMAP_SIZE, _CREATE_VCPU, _RUN = 0xAE01, 0xAE04, 0xAE41, 0xAE80
_SET_USER_MEMORY_REGION, _GET_DIRTY_LOG = 0x4020AE46, 0x4010AE42
_GET_REGS, _SET_REGS, _GET_SREGS, _SET_SREGS = 0x8090AE81, 0x4090AE82, 0x8138AE83, 0x4138AE84
_SET_MSRS, _KVMCLOCK_CTRL = 0x4008AE89, 0xAEAD
_LOG_DIRTY_PAGES = 1
_EXIT_REASON, _EXIT_HLT = 8, 5

_OWN_BYTES = 64 << 10
_CODE, _STOP, _LIST = 0x1000, 0x1FFC, 0x2000
RAM = 16 << 20
"""Where the guest has the memory under test; aligned, so that the processor may map huge pages of it as such."""

_PROGRAM = bytes.fromhex(
    "be 00200000"  # again: mov esi, _LIST
    "ad"  # next: lodsd
    "85c0 7406"  # test eax, eax; jz round
    "ffc1"  # inc ecx
    "8908"  # mov [eax], ecx
    "ebf5"  # jmp next
    "833d fc1f0000 00"  # round: cmp dword [_STOP], 0
    "74e7"  # je again
    "f4"  # hlt
)


class Guest:
    """A guest whose memory, or a part of it, is this.

    Args:
        address: where that memory is; of at least 4 KiB alignment.
        nbytes: whole pages.
        log: whether KVM keeps its own dirty log. With it, KVM maps page by page; without it, huge pages as such.

    Raises:
        NotHere: no /dev/kvm that this user may open, or another kind of processor.
    """

    def __init__(self, address: int, nbytes: int, *, log: bool) -> None:
        if platform.machine() != "x86_64":
            raise NotHere("the tests' guest is a program for x86-64")
        try:
            self._kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise NotHere(f"/dev/kvm: {error}") from error
        self._fds = [self._kvm]
        self._mappings: list[mmap.mmap] = []
        self.pages = nbytes // PAGE
        try:
            self._start(address, nbytes, log)
        except BaseException:
            self.close()
            raise

    def _start(self, address: int, nbytes: int, log: bool) -> None:
        self._vm = self._opened(fcntl.ioctl(self._kvm, _CREATE_VM, 0))
        self._own = self._mapping(mmap.mmap(-1, _OWN_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self._give(0, 0, 0, _OWN_BYTES, oracle.address_of(self._own))
        self._give(1, _LOG_DIRTY_PAGES if log else 0, RAM, nbytes, address)
        self._vcpu = self._opened(fcntl.ioctl(self._vm, _CREATE_VCPU, 0))
        shared_bytes = fcntl.ioctl(self._kvm, _VCPU_MMAP_SIZE, 0)
        self._state = self._mapping(mmap.mmap(self._vcpu, shared_bytes))
        self._own[_CODE : _CODE + len(_PROGRAM)] = _PROGRAM
        sregs = bytearray(312)
        fcntl.ioctl(self._vcpu, _GET_SREGS, sregs, True)
        everything = 0, 0xFFFFFFFF  # base, limit
        code, data = (0x08, 0xB), (0x10, 0x3)  # selector, type
        for number in range(6):  # cs, ds, es, fs, gs, ss
            selector, kind = data if number else code
            flat = struct.pack("QIH8B2x", *everything, selector, kind, 1, 0, 1, 1, 0, 1, 0)
            sregs[24 * number : 24 * (number + 1)] = flat
        (cr0,) = struct.unpack_from("Q", sregs, 224)
        struct.pack_into("Q", sregs, 224, cr0 | 1)
        fcntl.ioctl(self._vcpu, _SET_SREGS, sregs, True)
        self.stamp = 0

    def _opened(self, fd: int) -> int:
        self._fds.append(fd)
        os.set_inheritable(fd, False)
        return fd

    def _mapping(self, mapping: mmap.mmap) -> mmap.mmap:
        self._mappings.append(mapping)
        return mapping

    def _give(self, slot: int, flags: int, at: int, nbytes: int, address: int) -> None:
        fcntl.ioctl(self._vm, _SET_USER_MEMORY_REGION, struct.pack("2I3Q", slot, flags, at, nbytes, address))

    # ---- running ----------------------------------------------------------------------------------------------------

    def run(self, offsets: Sequence[int], *, until_stopped: bool = False) -> None:
        """Have it store a number of 4 bytes, each greater than the one before, at each of these offsets in the memory.

        Args:
            offsets: in bytes, in this order.
            until_stopped: over and over, until another thread calls `stop`; else once.
        """
        listed = struct.pack(f"{len(offsets) + 1}I", *[RAM + offset for offset in offsets], 0)
        assert _LIST + len(listed) <= _OWN_BYTES
        self._own[_LIST : _LIST + len(listed)] = listed
        self._own[_STOP] = not until_stopped
        registers = bytearray(144)
        rcx, rip, rflags = 16, 128, 136
        for register, value in ((rcx, self.stamp), (rip, _CODE), (rflags, 2)):
            struct.pack_into("Q", registers, register, value)
        fcntl.ioctl(self._vcpu, _SET_REGS, registers)
        while True:
            with suppress(InterruptedError):
                fcntl.ioctl(self._vcpu, _RUN, 0)
                break
        (reason,) = struct.unpack_from("I", self._state, _EXIT_REASON)
        assert reason == _EXIT_HLT, f"the guest left for reason {reason}"
        fcntl.ioctl(self._vcpu, _GET_REGS, registers, True)
        (self.stamp,) = struct.unpack_from("Q", registers, rcx)

    def stop(self) -> None:
        """From another thread: its program ends after this round of the list."""
        self._own[_STOP] = 1

    def keep_its_clock_at(self, offset: int) -> None:
        """Have KVM itself write the time there (kvmclock), when the guest runs next and after each `tell_the_time`."""
        msr_kvm_system_time_new, enabled = 0x4B564D01, 1
        wanted = bytearray(struct.pack("2I2IQ", 1, 0, msr_kvm_system_time_new, 0, RAM + offset | enabled))
        assert fcntl.ioctl(self._vcpu, _SET_MSRS, wanted, True) == 1

    def tell_the_time(self) -> None:
        """KVM writes it when the guest runs next, through the mapping of the page that it has."""
        fcntl.ioctl(self._vcpu, _KVMCLOCK_CTRL, 0)

    def logged(self) -> set[int]:
        """Numbers of the pages that KVM saw the guest write since it was asked last; it forgets them."""
        bitmap = ctypes.create_string_buffer((self.pages + 63) // 64 * 8)
        fcntl.ioctl(self._vm, _GET_DIRTY_LOG, struct.pack("2IQ", 1, 0, ctypes.addressof(bitmap)))
        bits = int.from_bytes(bitmap.raw, "little")
        return {page for page in range(self.pages) if bits >> page & 1}

    def close(self) -> None:
        for mapping in self._mappings:
            mapping.close()
        for fd in reversed(self._fds):
            os.close(fd)
        self._fds, self._mappings = [], []

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

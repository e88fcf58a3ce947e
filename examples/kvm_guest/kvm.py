# SPDX-License-Identifier: MIT
"""/dev/kvm by cffi: what of <linux/kvm.h> a machine with one processor takes, and a class around it."""

from __future__ import annotations

import errno
import mmap
import os
import platform
from typing import TYPE_CHECKING, Any

import cffi

if TYPE_CHECKING:
    import dirtytrack

ffi = cffi.FFI()
ffi.cdef("""
    struct kvm_userspace_memory_region {
        uint32_t slot, flags;
        uint64_t guest_phys_addr, memory_size, userspace_addr;
    };
    struct kvm_dirty_log { uint32_t slot, padding; uint64_t dirty_bitmap; };
    struct kvm_regs {
        uint64_t rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags;
    };
    struct kvm_segment {
        uint64_t base;
        uint32_t limit;
        uint16_t selector;
        uint8_t type, present, dpl, db, s, l, g, avl, unusable, padding;
    };
    struct kvm_dtable { uint64_t base; uint16_t limit, padding[3]; };
    struct kvm_sregs {
        struct kvm_segment cs, ds, es, fs, gs, ss, tr, ldt;
        struct kvm_dtable gdt, idt;
        uint64_t cr0, cr2, cr3, cr4, cr8, efer, apic_base, interrupt_bitmap[4];
    };
    struct kvm_run {
        uint8_t request_interrupt_window, immediate_exit, padding1[6];
        uint32_t exit_reason;
        uint8_t ready_for_interrupt_injection, if_flag;
        uint16_t flags;
        uint64_t cr8, apic_base;
        struct { uint8_t direction, size; uint16_t port; uint32_t count; uint64_t data_offset; } io;
    };
    int ioctl(int fd, unsigned long request, ...);
""")
libc: Any = ffi.dlopen(None)

PAGE = mmap.PAGESIZE
API_VERSION = 12
LOG_DIRTY_PAGES = 1
EXIT_IO, EXIT_HLT = 2, 5
IO_OUT = 1


def _request(number: int, reads: str = "", writes: str = "") -> int:
    """An ioctl's number, as <asm/ioctl.h> makes it; from the process's point of view."""
    direction = 2 * bool(reads) + bool(writes)
    nbytes = ffi.sizeof(reads or writes) if direction else 0
    return direction << 30 | nbytes << 16 | 0xAE << 8 | number


_GET_API_VERSION, _CREATE_VM, _GET_VCPU_MMAP_SIZE = _request(0x00), _request(0x01), _request(0x04)
_CREATE_VCPU, _RUN = _request(0x41), _request(0x80)
_GET_DIRTY_LOG = _request(0x42, writes="struct kvm_dirty_log")
_SET_USER_MEMORY_REGION = _request(0x46, writes="struct kvm_userspace_memory_region")
_GET_REGS, _SET_REGS = _request(0x81, reads="struct kvm_regs"), _request(0x82, writes="struct kvm_regs")
_GET_SREGS, _SET_SREGS = _request(0x83, reads="struct kvm_sregs"), _request(0x84, writes="struct kvm_sregs")


class NoKvm(Exception):
    """There is no /dev/kvm that this user may open, or the processor is of another kind."""


class Machine:
    """A virtual machine with one processor, whose memory begins at its address 0.

    Args:
        ram: its memory, which stays the caller's.

    Raises:
        NoKvm: this host makes no virtual machines, and why.

    Thread safety: `run` in one thread, `dirty_log` and `leave` in any.
    """

    def __init__(self, ram: dirtytrack.Memory) -> None:
        if platform.machine() != "x86_64":
            raise NoKvm(f"the guest is a program for x86-64, not {platform.machine()}")
        try:
            self._fds = [os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)]
        except OSError as error:
            raise NoKvm(f"/dev/kvm: {error.strerror}") from error
        self.ram = ram
        try:
            kvm = self._fds[0]
            if self._call(kvm, _GET_API_VERSION) != API_VERSION:
                raise NoKvm("/dev/kvm speaks another version than 12")
            self._vm = self._opened(self._call(kvm, _CREATE_VM, ffi.cast("long", 0)))
            given = {"memory_size": ram.nbytes, "userspace_addr": ram.address, "flags": LOG_DIRTY_PAGES}
            self._call(self._vm, _SET_USER_MEMORY_REGION, ffi.new("struct kvm_userspace_memory_region *", given))
            self._vcpu = self._opened(self._call(self._vm, _CREATE_VCPU, ffi.cast("long", 0)))
            self._shared = mmap.mmap(self._vcpu, self._call(kvm, _GET_VCPU_MMAP_SIZE))
            self._bytes = ffi.from_buffer(self._shared, require_writable=True)
            self.exit: Any = ffi.cast("struct kvm_run *", self._bytes)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _call(fd: int, request: int, argument: Any = ffi.NULL) -> int:
        result = int(libc.ioctl(fd, request, argument))  # cffi lets go of the GIL
        if result < 0:
            raise OSError(ffi.errno, f"KVM request {request:#x}: {os.strerror(ffi.errno)}")
        return result

    def _opened(self, fd: int) -> int:
        self._fds.append(fd)
        os.set_inheritable(fd, False)
        return fd

    # ---- running

    def run(self) -> int:
        """Run the guest until it leaves.

        Returns:
            Why, as <linux/kvm.h> numbers it; 0 if `leave` or a signal made it.
        """
        try:
            self._call(self._vcpu, _RUN)
        except OSError as error:
            if error.errno in (errno.EINTR, errno.EAGAIN):
                return 0
            raise
        return int(self.exit.exit_reason)

    def leave(self, wanted: bool) -> None:
        """Have `run` return at once, as soon as what the guest last asked of us is done; or no longer."""
        self.exit.immediate_exit = wanted

    def told(self) -> tuple[int, int]:
        """The port and the 4 bytes that the guest wrote to it, after EXIT_IO."""
        io = self.exit.io
        if (io.direction, io.size, io.count) != (IO_OUT, 4, 1):
            raise RuntimeError(f"the guest asks for what it has no device for: {io.size} bytes of port {io.port:#x}")
        at = int(io.data_offset)
        return int(io.port), int.from_bytes(self._shared[at : at + 4], "little")

    # ---- its state

    @property
    def registers(self) -> Any:
        """A copy of struct kvm_regs; assign one to set them. The guest must not run."""
        found = ffi.new("struct kvm_regs *")
        self._call(self._vcpu, _GET_REGS, found)
        return found

    @registers.setter
    def registers(self, wanted: Any) -> None:
        self._call(self._vcpu, _SET_REGS, wanted)

    @property
    def special(self) -> Any:
        """A copy of struct kvm_sregs: segments, control registers, modes."""
        found = ffi.new("struct kvm_sregs *")
        self._call(self._vcpu, _GET_SREGS, found)
        return found

    @special.setter
    def special(self, wanted: Any) -> None:
        self._call(self._vcpu, _SET_SREGS, wanted)

    def dirty_log(self) -> int:
        """Which pages KVM itself saw written since it was asked last: bit n for page n. It forgets them."""
        bitmap = ffi.new("uint64_t[]", -(-self.ram.nbytes // PAGE // 64))
        where = int(ffi.cast("uintptr_t", bitmap))
        self._call(self._vm, _GET_DIRTY_LOG, ffi.new("struct kvm_dirty_log *", {"dirty_bitmap": where}))
        return int.from_bytes(ffi.buffer(bitmap), "little")

    def close(self) -> None:
        """End it. Its memory stays. A second call does nothing."""
        shared = self.__dict__.pop("_shared", None)
        if shared is not None:
            self.exit = ffi.NULL
            ffi.release(self.__dict__.pop("_bytes"))
            shared.close()
        for fd in reversed(self._fds):
            os.close(fd)
        self._fds = []

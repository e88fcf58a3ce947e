# SPDX-License-Identifier: MIT
"""The guest: a program that walks its memory and writes numbers, each one greater than the one before it.

It runs in 64-bit mode, by page tables in its own memory, in which the processor sets bits as it goes. Of each page the
lower half is the program's; in the upper half is something from the start, as in the memory of any machine in use.

The program checks itself: before it writes into a page it looks for the number that it wrote there on its last walk. A
page that is lost or late on its way to another host is told by the guest.
"""

from __future__ import annotations

import math
import os
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from .kvm import PAGE, Machine, ffi

if TYPE_CHECKING:
    import dirtytrack

TOLD_PORT, LOST_PORT = 0x10, 0x11
CODE, TABLES, DATA = 0x1000, 0x2000, 0x200000  # where they are in its memory
MOST_BYTES = 1 << 30  # as much as its one directory of 2 MiB pages maps
HALF = PAGE // 2

# r8: the last number; r9: the page for the next one, and r10 where in the page; r11: numbers until it tells us, every
# rbx of them; r12: how many pages; r13: how far from one to the next; r14: where they begin
ASSEMBLY = """
next:   inc r8
        mov rdi, r9
        shl rdi, 12
        add rdi, r14
        lea rsi, [r10 - 8]
        and esi, 0x7f8
        mov rax, r8
        sub rax, r12
        jae known
        xor eax, eax
known:  cmp [rdi + rsi], rax
        jne lost
        mov [rdi + r10], r8
        add r9, r13
        cmp r9, r12
        jb inside
        sub r9, r12
inside: test r9, r9
        jnz burst
        add r10, 8
        and r10d, 0x7f8
burst:  dec r11
        jnz next
        mov r11, rbx
        mov eax, r8d
        out 0x10, eax
        jmp next
lost:   mov eax, r8d
        out 0x11, eax
        hlt
"""
PROGRAM = bytes.fromhex(
    "49ffc0 4c89cf 48c1e70c 4c01f7 498d72f8 81e6f8070000 4c89c0 4c29e0 7302 31c0 48390437 752e 4e890417 4d01e9 4d39e1"
    "7203 4d29e1 4d85c9 750b 4983c208 4181e2f8070000 49ffcb 75b5 4989db 4489c0 e710 ebab 4489c0 e711 f4"
)
STORE = PROGRAM.index(bytes.fromhex("4e890417"))

_STATE, _STATE_MAGIC = struct.Struct("<16s144s312sQd"), b"kvm_guest state1"
STATE_NBYTES = _STATE.size


class State(NamedTuple):
    """All of a guest that is not in its memory."""

    registers: bytes
    special: bytes
    told: int
    """The last number that it told us."""
    numbers_per_second: float

    def pack(self) -> bytes:
        return bytes(_STATE.pack(_STATE_MAGIC, *self))

    @staticmethod
    def unpack(blob: bytes) -> State:
        """Raises ValueError if that is none."""
        if len(blob) != _STATE.size or not blob.startswith(_STATE_MAGIC):
            raise ValueError("this is no state of a guest")
        return State(*_STATE.unpack(blob)[1:])


def save(machine: Machine, told: int, numbers_per_second: float) -> State:
    """The state of a guest that does not run."""
    return State(bytes(ffi.buffer(machine.registers)), bytes(ffi.buffer(machine.special)), told, numbers_per_second)


def load(machine: Machine, state: State) -> None:
    """Give it to another."""
    machine.special = ffi.from_buffer("struct kvm_sregs *", state.special)
    machine.registers = ffi.from_buffer("struct kvm_regs *", state.registers)


def boot(machine: Machine, burst: int) -> None:
    """What firmware does: the program and its page tables into memory, the processor to the beginning.

    Args:
        machine: of 4 MiB to 1 GiB.
        burst: after how many numbers it tells us the last one.
    """
    ram = machine.ram
    if not 2 * DATA <= ram.nbytes <= MOST_BYTES:
        raise ValueError(f"the guest's memory is {2 * DATA} to {MOST_BYTES} bytes, not {ram.nbytes}")
    ram[CODE : CODE + len(PROGRAM)] = PROGRAM
    present_writable, huge = 3, 0x80
    struct.pack_into("<Q", ram, TABLES, TABLES + PAGE | present_writable)
    struct.pack_into("<Q", ram, TABLES + PAGE, TABLES + 2 * PAGE | present_writable)
    for number in range(512):
        struct.pack_into("<Q", ram, TABLES + 2 * PAGE + 8 * number, number << 21 | huge | present_writable)
    pattern = os.urandom(16 * PAGE)
    for at in range(DATA + HALF, ram.nbytes, PAGE):
        start = at // PAGE * 17 % (len(pattern) - HALF)
        ram[at : at + HALF] = pattern[start : start + HALF]

    special: Any = machine.special
    flat: dict[str, int] = {"limit": 0xFFFFFFFF, "present": 1, "s": 1, "g": 1}
    special.cs = {**flat, "selector": 0x08, "type": 11, "l": 1}
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(special, name, {**flat, "selector": 0x10, "type": 3, "db": 1})
    special.cr3, special.cr4 = TABLES, 1 << 5  # physical address extension
    special.efer = 1 << 8 | 1 << 10  # long mode, on and in use
    special.cr0 |= 1 << 31 | 1  # paging, protection
    machine.special = special

    pages = (ram.nbytes - DATA) // PAGE
    registers: Any = machine.registers
    registers.rip, registers.rflags, registers.r14 = CODE, 2, DATA
    registers.rbx = registers.r11 = burst
    registers.r12, registers.r13 = pages, stride(pages)
    machine.registers = registers


def stride(pages: int) -> int:
    """Far from page to page, by the golden section, and through all of them."""
    wanted = int(pages * 0.618)
    while math.gcd(wanted, pages) != 1:
        wanted += 1
    return wanted


def written(state: State) -> int:
    """The last number that is in its memory. It may have been stopped after counting and before writing."""
    registers: Any = ffi.from_buffer("struct kvm_regs *", state.registers)
    return int(registers.r8) - int(CODE < registers.rip <= CODE + STORE)


def replay(ram: dirtytrack.Memory, start: int, end: int) -> None:
    """Write what the guest writes after number `start`, up to `end`: its program told once more, in Python."""
    pages = (ram.nbytes - DATA) // PAGE
    step = stride(pages)
    for number in range(start, end):
        at = DATA + number * step % pages * PAGE + number // pages * 8 % HALF
        struct.pack_into("<Q", ram, at, number + 1)

# SPDX-License-Identifier: MIT
"""QEMU moving a guest between two processes: a boot sector that writes memory, so many pages a second."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_TSC_SECONDS = 0.1
_READY = 0x500  # where the guest says that it has populated its memory

# 32-bit protected mode, flat. It populates its pages, says so, and then writes one after the other of the hot ones,
# each when its time has come by the time-stamp counter.
_PROGRAM = """
.code16
.globl _start
_start:
    cli
    xor %ax, %ax
    mov %ax, %ds
    in $0x92, %al
    or $2, %al
    out %al, $0x92
    lgdt table_pointer
    mov %cr0, %eax
    or $1, %eax
    mov %eax, %cr0
    ljmp $8, $flat
.code32
flat:
    mov $16, %ax
    mov %ax, %ds
    mov %ax, %ss
    mov $LOW, %edi
    mov $PAGES, %ecx
populate:
    mov %edi, (%edi)
    movl $0x5a5a5a5a, 2048(%edi)
    add $4096, %edi
    loop populate
    movl $1, READY
    rdtsc
    mov %eax, %esi
    xor %ebp, %ebp
again:
    mov $LOW, %edi
    mov $HOT, %ecx
next:
    add $CYCLES, %esi
wait:
    pause
    rdtsc
    sub %esi, %eax
    js wait
    inc %ebp
    mov %ebp, 8(%edi)
    add $4096, %edi
    loop next
    jmp again
.align 8
table:
    .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff
table_pointer:
    .word 23
    .long table
.org 510
    .word 0xaa55
"""


def tools_missing(which: Callable[[str], str | None]) -> list[str]:
    """What is not installed."""
    return [name for name in ("qemu-system-x86_64", "as", "ld") if which(name) is None]


def _cycles_per_second(folder: Path) -> float:
    """Of the time-stamp counter."""
    source, program = folder / "tsc.c", folder / "tsc"
    source.write_text(
        "#include <stdio.h>\n#include <time.h>\n#include <x86intrin.h>\n"
        "int main(void){struct timespec a,b;clock_gettime(CLOCK_MONOTONIC,&a);unsigned long long x=__rdtsc();"
        "do clock_gettime(CLOCK_MONOTONIC,&b);while((b.tv_sec-a.tv_sec)*1000000000LL+b.tv_nsec-a.tv_nsec<100000000);"
        'printf("%llu\\n",(unsigned long long)__rdtsc()-x);}'
    )
    subprocess.run(["gcc", "-O1", str(source), "-o", str(program)], check=True)
    return int(subprocess.run([str(program)], check=True, capture_output=True).stdout) / _TSC_SECONDS


def boot_sector(folder: Path, *, low: int, pages: int, hot: int, per_second: float) -> Path:
    """A disk of one sector that populates pages from an address on, and then writes the first of them in turn."""
    cycles = int(_cycles_per_second(folder) / per_second) if per_second else 0x7FFFFFFF
    words = {"LOW": low, "PAGES": pages, "HOT": hot, "CYCLES": min(cycles, 0x7FFFFFFF), "READY": _READY}
    text = "".join(f".set {name}, {value}\n" for name, value in words.items()) + _PROGRAM
    (folder / "boot.s").write_text(text)
    out = folder / "boot.img"
    subprocess.run(["as", "--32", "-o", folder / "boot.o", folder / "boot.s"], check=True)
    link = ["ld", "-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary", "-o", str(out), str(folder / "boot.o")]
    subprocess.run(link, check=True)
    assert out.stat().st_size == 512, "one sector"
    return out


class _Machine:
    """One QEMU process, and its monitor."""

    def __init__(self, folder: Path, name: str, sector: Path, mib: int, accelerator: str, *more: str) -> None:
        path = folder / f"{name}.qmp"
        words = ["qemu-system-x86_64", "-accel", accelerator, "-m", str(mib), "-display", "none", "-nodefaults"]
        words += ["-drive", f"file={sector},format=raw,if=ide,snapshot=on", "-qmp", f"unix:{path},server=on,wait=off"]
        with (folder / f"{name}.log").open("w") as log:
            self.process = subprocess.Popen([*words, *more], stderr=log)
        self._sock = socket.socket(socket.AF_UNIX)
        for _ in range(200):
            try:
                self._sock.connect(str(path))
                break
            except OSError:
                time.sleep(0.05)
        self._file = self._sock.makefile("rw")
        self._file.readline()
        self.ask("qmp_capabilities")

    def ask(self, what: str, **arguments: Any) -> Any:
        self._file.write(json.dumps({"execute": what, "arguments": arguments}) + "\n")
        self._file.flush()
        while "return" not in (said := json.loads(self._file.readline())):
            if "error" in said:
                raise RuntimeError(f"{what}: {said['error']['desc']}")
        return said["return"]

    def close(self) -> None:
        self._sock.close()
        self.process.terminate()
        self.process.wait()


class Qemu:
    """Two machines: one that runs, and one that waits for it.

    Args:
        folder: for sockets.
        sector: what the first boots.
        mib: of memory.
    """

    def __init__(self, folder: Path, sector: Path, mib: int) -> None:
        self.accelerator = "kvm" if os.access("/dev/kvm", os.R_OK | os.W_OK) else "tcg"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._to = f"tcp:127.0.0.1:{free.getsockname()[1]}"
        self._there = _Machine(folder, "there", sector, mib, self.accelerator, "-incoming", self._to)
        self._here = _Machine(folder, "here", sector, mib, self.accelerator)

    def migrate(self, bandwidth: float | None, max_downtime: float) -> dict[str, Any]:
        """What query-migrate says at the end."""
        ready = {"command-line": f"xp /1xw {_READY}"}
        for _ in range(600):
            if self._here.ask("human-monitor-command", **ready).strip().endswith("0x00000001"):
                break
            time.sleep(0.05)
        else:
            raise RuntimeError("the guest did not come up")
        time.sleep(0.2)
        limits = {"max-bandwidth": int(bandwidth or 1 << 40), "downtime-limit": int(max_downtime * 1000)}
        self._here.ask("migrate-set-parameters", **limits)
        self._here.ask("migrate", uri=self._to)
        until = time.monotonic() + 60
        while (told := self._here.ask("query-migrate"))["status"] not in ("completed", "failed"):
            if time.monotonic() > until:
                raise RuntimeError("it did not converge in a minute")
            time.sleep(0.02)
        if told["status"] == "failed":
            raise RuntimeError(f"QEMU's migration failed: {told}")
        return dict(told)

    def close(self) -> None:
        self._here.close()
        self._there.close()

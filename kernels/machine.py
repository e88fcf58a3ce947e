# SPDX-License-Identifier: MIT
"""An emulated machine, from its first instruction until it turns itself off."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from .archive import Kernel

__all__ = ["ACCELERATOR", "Step", "boot", "steps_of"]


def _virtualizes() -> bool:
    """Whether the processor does. A /dev/kvm without that runs only kernels that were made for it."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return ("vmx" in flags or "svm" in flags) and os.access("/dev/kvm", os.R_OK | os.W_OK)


ACCELERATOR = "kvm" if _virtualizes() else "tcg"
"""For this machine's own architecture; others are emulated in software."""
_MEMORY = "3G"


class Step(NamedTuple):
    """One thing that was run there."""

    output: str
    status: int | None
    """137: killed for taking too long; None: it did not end, nor did the machine by itself."""
    seconds: float


# Emulated in software a machine has one processor: with two, each change of a page table stops both, and the C tests
# took eight times as long.
def _command(kernel: Kernel, disk: Path, log: Path, environment: Mapping[str, object]) -> list[str]:
    if kernel.architecture == "amd64":
        words = ["qemu-system-x86_64", "-accel", ACCELERATOR]
        words += ["-cpu", "max", "-smp", "2"] if ACCELERATOR == "kvm" else ["-cpu", "max,-la57", "-smp", "1"]
        serial, out = "ttyS0", "ttyS1"
        words += ["-serial", f"file:{log}", "-serial", "stdio"]
    else:
        words = ["qemu-system-aarch64", "-machine", "virt", "-accel", "tcg", "-cpu", "cortex-a72", "-smp", "1"]
        serial, out = "ttyAMA0", "hvc0"  # there is but one serial port
        words += ["-serial", f"file:{log}"]
        words += ["-chardev", "stdio,id=out", "-device", "virtio-serial-pci", "-device", "virtconsole,chardev=out"]
    settings = " ".join(f"{name}={value}" for name, value in environment.items())
    words += ["-m", _MEMORY, "-display", "none", "-nodefaults", "-no-reboot"]
    words += ["-kernel", str(kernel.image)]
    start = f"console={serial} loglevel=5 panic=-1 mitigations=off root=/dev/nvme0n1 rw init=/init OUT={out}"
    words += ["-append", f"{start} {settings}"]
    # Writes go to a temporary file, so each machine finds the disk as it was made.
    words += ["-drive", f"file={disk},format=raw,if=none,id=disk,snapshot=on,cache=unsafe"]
    return [*words, "-device", "nvme,serial=disk,drive=disk"]


def steps_of(output: str) -> dict[str, Step]:
    """What a machine printed, by step."""
    found: dict[str, Step] = {}
    for part in output.replace("\r", "").split("@@@ BEGIN ")[1:]:
        name, _, rest = part.partition("\n")
        ended = re.search(rf"^@@@ END {re.escape(name)} (\d+) (\d+)$", rest, re.MULTILINE)
        if ended:
            found[name] = Step(rest[: ended.start()].strip(), int(ended[1]), int(ended[2]) / 100)
        else:
            found[name] = Step(rest.strip(), None, 0.0)
    return found


def boot(kernel: Kernel, disk: Path, log: Path, seconds: float, environment: Mapping[str, object]) -> None:
    """Boot, and wait for the end.

    Args:
        kernel: what to boot.
        disk: of `kernels.disk`.
        log: what the kernel says; beside it, with the suffix ``.out``, goes what the steps print.
        seconds: after these the machine is turned off.
        environment: for its first process.
    """
    with log.with_name(f"{log.name.removesuffix('.log')}.out").open("wb") as file:
        try:
            command = _command(kernel, disk, log, environment)
            subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, timeout=seconds, check=True)
        except subprocess.TimeoutExpired:
            file.write(b"\n")

# SPDX-License-Identifier: MIT
"""The guest for the commands: ``dirtytrack receive examples.kvm_guest.commands:prepare`` waits for it, and
``dirtytrack migrate examples.kvm_guest.commands:start ADDRESS`` starts one here and moves it there.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import dirtytrack
from dirtytrack.migration import Source

from .vmm import Vmm

if TYPE_CHECKING:
    from collections.abc import Callable

    from dirtytrack.migration import Arrival

MIB = 1 << 20


def start(**options: Any) -> tuple[Source, Callable[[], int]]:
    """A guest of 128 MiB that runs. Returns its source, and what to wait for when it does not move."""
    vmm = Vmm(dirtytrack.allocate(128 * MIB, name="ram"))
    vmm.boot(numbers_per_second=10_000)
    vmm.resume()
    hooks: dict[str, Any] = {"pause": vmm.pause, "resume": vmm.resume, "state": vmm.state, "slow": vmm.slow}
    return Source({"ram": vmm.machine.ram}, **hooks, **options), lambda: _watch(vmm)


def prepare(arrival: Arrival) -> Callable[[], int]:
    """A guest that arrived. Returns what runs it."""
    vmm = Vmm(arrival.memory["ram"])
    vmm.load(arrival.state)

    def run() -> int:
        print(f"the guest goes on from {vmm.told:,}", flush=True)
        vmm.resume()
        return _watch(vmm)

    return run


def _watch(vmm: Vmm) -> int:
    """Until Ctrl-C, or the guest says that something is wrong."""
    with vmm:
        try:
            while True:
                time.sleep(0.5)
                vmm.require()
                print(f"the guest is at {vmm.told:,}", flush=True)
        except KeyboardInterrupt:
            return 0

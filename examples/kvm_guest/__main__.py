# SPDX-License-Identifier: MIT
"""Moves a virtual machine to another process while it runs, and looks whether everything is as it was.

Run it as ``python -m examples.kvm_guest``. The destination is a second Python process. The exit status is 0 only if no
number of the guest is missing, its memory is identical, and KVM's own dirty log has no page that was not reported; it
is 77 where there is no /dev/kvm.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import dirtytrack
from dirtytrack.migration import Arrival, Destination, Goal, Migrated, Progress, Source

from . import guest
from .kvm import NoKvm
from .vmm import Vmm
from .witness import WitnessedTracker

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
NOT_HERE = 77


def digest(ram: dirtytrack.Memory) -> str:
    return hashlib.sha256(memoryview(ram)).hexdigest()


class Receiving:
    """The destination's machine: made as soon as a source is there, since that takes longer than to load a guest."""

    def __init__(self) -> None:
        self.vmm: Vmm | None = None

    def memory(self, regions: list[Any]) -> dict[str, dirtytrack.Memory]:
        self.abandon()
        (ram,) = regions
        self.vmm = Vmm(dirtytrack.allocate(ram.nbytes, name=ram.name))
        return {ram.name: self.vmm.machine.ram}

    def prepare(self, arrival: Arrival) -> Vmm:
        """Everything is there, and the source has not decided: the guest is loaded, and does not run."""
        assert self.vmm is not None, "memory() was called"
        self.vmm.load(arrival.state)
        return self.vmm

    def abandon(self) -> None:
        vmm, self.vmm = self.vmm, None
        if vmm is not None:
            vmm.close()


def destination(seconds: float) -> int:
    """The other process: runs the guest for so long when it has come, and tells what became of it."""
    receiving = Receiving()
    with Destination(memory=receiving.memory, prepare=receiving.prepare) as listening:
        print(json.dumps({"address": listening.address}), flush=True)
        arrival = listening.receive(timeout=60)
    with arrival.prepared as vmm:
        began = vmm.told
        vmm.resume()
        time.sleep(seconds)
        vmm.pause()
        number = guest.written(guest.State.unpack(vmm.state()))
        told = {"began": began, "heard": vmm.heard, "number": number, "digest": digest(vmm.machine.ram)}
        print(json.dumps(told), flush=True)
    return 0


def tell(progress: Progress) -> None:
    if progress.phase == "rounds" and progress.reason:
        speed, written = progress.bytes_per_second / MIB, progress.dirty_bytes_per_second / MIB
        print(f"  round {progress.round}: {speed:,.0f} MiB/s, {written:,.0f} MiB/s of pages written; {progress.reason}")


def migrate(vmm: Vmm, session: dirtytrack.UffdSession, address: str, goal: Goal) -> tuple[Migrated, int, int]:
    """Move it there.

    Returns:
        What it was like; how many collects KVM's log was held against, and how many pages it had.
    """
    tracker = WitnessedTracker(session, vmm.machine)
    with Source(tracker, pause=vmm.pause, resume=vmm.resume, state=vmm.state, slow=vmm.slow, progress=tell) as source:
        moved = source.migrate(address, goal)
    return moved, *tracker.check()


def check(vmm: Vmm, stopped: bytes, there: dict[str, Any]) -> None:
    """Raises RuntimeError unless the guest went on there from where it stood here."""
    if there["began"] != vmm.told or there["heard"][0][1] <= vmm.told:
        raise RuntimeError(f"it told {vmm.told} here, and went on from {there['began']} to {there['heard']}")
    # Its memory here is as it was left. What it wrote since is written once more, by another program.
    guest.replay(vmm.machine.ram, guest.written(guest.State.unpack(stopped)), there["number"])
    if digest(vmm.machine.ram) != there["digest"]:
        raise RuntimeError("its memory there is not what it must be")


def main(options: argparse.Namespace) -> int:
    ram = dirtytrack.allocate(options.mib * MIB, name="ram")
    goal = Goal(max_downtime=options.downtime, on_divergence=options.on_divergence)
    command = [sys.executable, "-m", __package__ or "", "receive", "--seconds", str(options.seconds)]
    with (
        Vmm(ram) as vmm,
        dirtytrack.UffdSession() as session,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as other,
    ):
        assert other.stdout is not None, "it is a pipe"
        address = json.loads(other.stdout.readline())["address"]
        session.register(ram, name="ram")
        vmm.boot(options.rate)
        vmm.resume()
        time.sleep(options.seconds)
        moved, collects, pages = migrate(vmm, session, address, goal)
        there = json.loads(other.stdout.readline())
        check(vmm, vmm.state(), there)
    gap = there["heard"][0][0] - vmm.heard[-1][0]
    print(f"{moved.sent_bytes:,} bytes sent in {moved.seconds:.2f} s; {moved.reason}")
    print(f"neither ran for {moved.downtime * 1e3:.1f} ms; between two numbers that the guest told: {gap * 1e3:.1f} ms")
    print(f"KVM logged {pages:,} pages before {collects} collects: all were reported")
    print(f"numbers 1 to {there['number']:,} without a gap, and {ram.nbytes:,} bytes of memory are identical")
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.kvm_guest", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("role", nargs="?", choices=["move", "receive"], default="move", help=argparse.SUPPRESS)
    parser.add_argument("--mib", type=int, default=256, help="the guest's memory, 4 to 1024 (default: 256)")
    parser.add_argument(
        "--rate", type=float, default=10_000, help="numbers a second, each to another page; 0: all it can"
    )
    parser.add_argument("--seconds", type=float, default=0.5, help="how long it runs before, and after")
    parser.add_argument("--downtime", type=float, default=0.02, help="how long neither side may run, in seconds")
    parser.add_argument("--on-divergence", choices=["proceed", "slow", "abort"], default="proceed")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    options = parse(sys.argv[1:])
    try:
        sys.exit(destination(options.seconds) if options.role == "receive" else main(options))
    except NoKvm as missing:
        print(f"not run: {missing}", file=sys.stderr)
        sys.exit(NOT_HERE)

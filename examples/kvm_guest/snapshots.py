# SPDX-License-Identifier: MIT
"""Snapshots of a virtual machine that runs: the first has all of its memory, each other what was written since.

Run it as ``python -m examples.kvm_guest.snapshots``. It takes some, goes back to each, and lets the guest run on from
there. The exit status is 0 only if each brings back, byte for byte, what was there; 77 where there is no /dev/kvm.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import dirtytrack
from dirtytrack.checkpoint import Checkpointer, Save, restore

from . import guest
from .kvm import PAGE, NoKvm
from .vmm import Vmm

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator

    from typing_extensions import Self

MIB = 1 << 20
NOT_HERE = 77


class Snapshots:
    """Takes them. The guest stands still while its dirty pages are copied; they are written while it runs on.

    Args:
        store: a directory.
        vmm: whose guest.
        look: called at each while the guest stands still.
    """

    def __init__(self, store: str | os.PathLike[str], vmm: Vmm, look: Callable[[], object] = int) -> None:
        self._vmm, self._look = vmm, look
        # What is not in the guest's memory is kept beside it, in memory of its own: both are of one moment.
        self._state = dirtytrack.allocate(PAGE, name="state")
        buffers = {"ram": vmm.machine.ram, "state": self._state}
        self._saves = Checkpointer(store, buffers, quiesce=self._still, track={"exact": True})

    @contextmanager
    def _still(self) -> Iterator[None]:
        self._vmm.pause()
        try:
            state = self._vmm.state()
            self._state[: len(state)] = state
            self._look()
            yield
        finally:
            self._vmm.resume()

    def take(self) -> Save:
        """Take one; it is durable when `Save.wait` returns."""
        return self._saves.save()

    def close(self) -> None:
        self._saves.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def load(store: str | os.PathLike[str], ram_bytes: int, generation: int | None = None) -> Vmm:
    """A machine as it was when that snapshot was taken, which does not run yet."""
    ram, state = dirtytrack.allocate(ram_bytes, name="ram"), dirtytrack.allocate(PAGE, name="state")
    restore(store, generation=generation, into={"ram": ram, "state": state})
    vmm = Vmm(ram)
    try:
        vmm.load(state[: guest.STATE_NBYTES])
    except BaseException:
        vmm.close()
        raise
    return vmm


def digest(ram: dirtytrack.Memory) -> str:
    return hashlib.sha256(memoryview(ram)).hexdigest()


def main(options: argparse.Namespace) -> int:
    seen: list[tuple[str, int]] = []  # of each: what was in memory, how many pages KVM had logged since the last
    with tempfile.TemporaryDirectory() as store, Vmm(dirtytrack.allocate(options.mib * MIB, name="ram")) as vmm:

        def look() -> None:
            seen.append((digest(vmm.machine.ram), vmm.machine.dirty_log().bit_count()))

        vmm.boot(options.rate)
        vmm.resume()
        with Snapshots(store, vmm, look) as snapshots:
            saves: list[Save] = []
            for _ in range(options.snapshots):
                time.sleep(options.seconds)
                saves.append(snapshots.take())
                saves[-1].wait()
        for save, (wanted, logged) in zip(saves, seen, strict=True):
            print(f"  {save.kind} {save.generation}: {save.bytes_written:,} bytes stored; KVM logged {logged:,} pages")
            if save.kind == "increment" and save.bytes_dirty != (logged + 1) * PAGE:  # and the page of the state
                raise RuntimeError(f"{save.bytes_dirty // PAGE} pages were dirty to us")
            with load(store, options.mib * MIB, save.generation) as before:
                if digest(before.machine.ram) != wanted:
                    raise RuntimeError(f"generation {save.generation} is not what was there")
                told = before.told
                before.resume()
                while before.told < told + 1000:  # and it looks at its own pages as it goes
                    before.require()
                    time.sleep(0.01)
    print(f"{len(saves)} snapshots, each of which is identical to what it is of, and runs on")
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--mib", type=int, default=128, help="the guest's memory, 4 to 1024 (default: 128)")
    parser.add_argument("--rate", type=float, default=10_000, help="numbers a second; 0: as many as it can")
    parser.add_argument("--seconds", type=float, default=0.3, help="from one to the next")
    parser.add_argument("--snapshots", type=int, default=3, help="how many (default: 3)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        sys.exit(main(parse(sys.argv[1:])))
    except NoKvm as missing:
        print(f"not run: {missing}", file=sys.stderr)
        sys.exit(NOT_HERE)

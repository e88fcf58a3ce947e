# SPDX-License-Identifier: MIT
"""Heat that spreads over a plate, on several ranks of MPI, which goes on where it was on another number of ranks.

Run it as ``python examples/ranks_simulation.py``, where mpi4py and mpiexec are (``pip install mpi4py mpich``). It
starts itself on two ranks, kills one of them with SIGKILL, goes on with one, kills that, and ends on two: the exit
status is 0 only if what comes of it is the same to the bit as without ranks, checkpoints and kills.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np

from dirtytrack.checkpoint import coordinated, restore

ROWS, COLUMNS, STEPS, RUNS = 400, 512, 60, (2, 1, 2)
NOT_HERE = 77
MPIEXEC = which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def first_plate(low: int = 0, high: int = ROWS) -> Any:
    """Rows [low, high) of the plate, with a row above and one below that belong to others, or to nobody."""
    plate = np.zeros((high - low + 2, COLUMNS))
    for row in range(max(low, 180), min(high, 220)):
        plate[row - low + 1, 100:400] = 100.0
    return plate


def spread(plate: Any) -> None:
    """One step. Nothing happens beyond the rows next to those that are warm already, so nothing is written there."""
    warm = np.flatnonzero(plate.any(axis=1))
    if len(warm):
        part = plate[max(warm[0] - 2, 0) : warm[-1] + 3]
        around = part[:-2, 1:-1] + part[2:, 1:-1] + part[1:-1, :-2] + part[1:-1, 2:]
        part[1:-1, 1:-1] += 0.2 * (around - 4 * part[1:-1, 1:-1])


def exchange_halo(comm: Any, plate: Any) -> None:
    """The rows at the edges go to the neighbours. This is the program's own talking, beside that of its saves."""
    from mpi4py import MPI

    above = comm.rank - 1 if comm.rank else MPI.PROC_NULL
    below = comm.rank + 1 if comm.rank + 1 < comm.size else MPI.PROC_NULL
    comm.Sendrecv(plate[1], above, recvbuf=plate[-1], source=below)
    comm.Sendrecv(plate[-2], below, recvbuf=plate[0], source=above)


def run(store: str) -> None:
    """What each rank has to do: name its rows, resume, save. It is the same for the first run and for any other."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    low, high = (ROWS * each // comm.size for each in (comm.rank, comm.rank + 1))
    plate = first_plate(low, high)
    rows = plate[1:-1]  # what is this rank's: the halo is its neighbours'
    with coordinated(comm, store, {"plate": rows}, partition={"plate": 0}, resume=True, compression=None) as ckpt:
        first = 0 if ckpt.resumed is None else ckpt.resumed.meta["step"] + 1
        if not comm.rank:
            print("from step", first, "on", comm.size, flush=True)
        for number in range(first, STEPS):
            exchange_halo(comm, plate)
            spread(plate)
            save = ckpt.save({"step": number})
            if number % 10 == 9:
                save.wait()  # only to be able to say:
                print("durable", number, os.getpid(), flush=True)


def run_and_kill(store: str, size: int, after: int | None) -> None:
    """Start it on so many ranks, and kill one as soon as it says that a step from ``after`` on is durable."""
    command = [str(MPIEXEC), "-n", str(size), sys.executable, __file__, store]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as launcher:
        assert launcher.stdout is not None
        killed = False
        for line in launcher.stdout:
            word, *numbers = line.split() or [""]  # the launcher has a say too, of ranks that were killed
            if word == "from":
                print(line.strip(), "ranks")
            elif word == "durable" and after is not None and int(numbers[0]) >= after and not killed:
                print(f"  step {numbers[0]}; kill -9 of a rank")
                os.kill(int(numbers[1]), signal.SIGKILL)
                killed = True
    assert killed == (after is not None)
    assert (launcher.returncode == 0) == (after is None)


def main() -> int:
    if len(sys.argv) > 1:
        run(sys.argv[1])
        return 0
    if not find_spec("mpi4py") or MPIEXEC is None:
        print("mpi4py or mpiexec is not here: pip install mpi4py mpich", file=sys.stderr)
        return NOT_HERE
    with tempfile.TemporaryDirectory() as directory:
        store = str(Path(directory) / "store")
        for number, size in enumerate(RUNS, 1):
            run_and_kill(store, size, STEPS * number // len(RUNS) - 10 if number < len(RUNS) else None)
        state = restore(store)
    unbroken = first_plate()
    for _ in range(STEPS):
        spread(unbroken)
    ok = np.array_equal(state["plate"], unbroken[1:-1]) and state.meta == {"step": STEPS - 1}
    print(f"{state.generation} generations on {RUNS} ranks: {'identical' if ok else 'DIFFERENT'}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())

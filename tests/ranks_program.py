# SPDX-License-Identifier: MIT
"""A program of many ranks on MPI that is killed: `mpiexec -n 2 python -m tests.ranks_program STORE REPORT STEPS`.

What its grid is at a step follows from the number of the step alone, however many ranks there are, so that whoever
looks at a generation knows what it must be.
"""

from __future__ import annotations

import os
import random
import sys
from typing import Any

import numpy as np

__all__ = ["COLUMNS", "ROWS", "Grid", "rows_of"]

ROWS, COLUMNS = 60, 700


class Grid:
    """Rows [low, high) of the grid, from the first step on."""

    def __init__(self, low: int = 0, high: int = ROWS, cells: Any = None) -> None:
        self.low, self.high = low, high
        self.cells: Any = np.zeros((high - low, COLUMNS)) if cells is None else cells

    def step(self, number: int) -> None:
        draw = random.Random(number)
        for _ in range(6):
            row, column, value = draw.randrange(ROWS), draw.randrange(COLUMNS - 100), draw.random()
            if self.low <= row < self.high:
                self.cells[row - self.low, column : column + 100] += value
        if self.low == 0:
            self.cells[0, 0] = number


def rows_of(rank: int, size: int) -> tuple[int, int]:
    """Which rows are a rank's: unevenly, so that they do not begin where pages do."""
    cuts = [0, *(ROWS * each // size - each for each in range(1, size)), ROWS]
    return cuts[rank], cuts[rank + 1]


def main(store: str, report: str, steps: int) -> None:
    from mpi4py import MPI

    from dirtytrack.checkpoint import Retention, coordinated, tending

    tending._SPARE_NBYTES = 64 << 10  # so that such small stores are compacted
    comm = MPI.COMM_WORLD
    file = os.open(report, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def say(*words: object) -> None:
        os.write(file, (" ".join(map(str, words)) + "\n").encode())

    say("pid", comm.rank, os.getpid())
    grid = Grid(*rows_of(comm.rank, comm.size))
    with coordinated(
        comm, store, {"grid": grid.cells}, partition={"grid": 0}, resume=True, retain=Retention(last=3), compact=0.5
    ) as ckpt:
        first = 0 if ckpt.resumed is None else ckpt.resumed.meta["step"]
        say("from", comm.rank, first)
        for number in range(first + 1, first + steps + 1):
            grid.step(number)
            save = ckpt.save({"step": number})
            comm.allreduce(number)  # the program's own talking goes on beside
            if number % 3:
                save.wait()
                say("committed", comm.rank, number)
    say("end", comm.rank, number)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))

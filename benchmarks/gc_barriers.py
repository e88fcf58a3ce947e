# SPDX-License-Identifier: MIT
"""``python -m benchmarks.gc_barriers``: what write barriers cost a program and its pauses, side by side.

One heap and the same programs (barriers.c) with each barrier, and GCBench on libgc beside them (libgc.c; Debian's
libgc-dev). All times are processor time of the one thread that runs, in the kernel too: what else the machine does
meanwhile is not in them. Beside them, what the search for slots takes (gc.py), and what a reservation of 64 GiB costs a
heap (reservations.py). The rows go into docs/barriers.json by ``--write``, and from there into docs/gc.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from dirtytrack.kernel import sources

from .bare import Bare
from .gc import gc
from .harness import Settings, machine, show_bytes, show_ns
from .reservations import HOW

HERE = Path(__file__).parent
BARRIERS = {
    "none": "no barrier",
    "cards": "software cards",
    "mprotect": "mprotect + SIGSEGV",
    "plain": "dirtytrack, plain",
    "adaptive": "dirtytrack, adaptive",
}
LIBGC = {"stop": "libgc", "incremental": "libgc, incremental", "generational": "libgc, generational"}
SHARES, PER_PAGE = (0.001, 0.01, 0.1, 1.0), (1, 16, 256, 4096, 65536)
STORE_PAGES, MOST_STORES = 16384, 1 << 24  # the first as in barriers.c; an epoch of more would last too long
PARTS = ("gcbench", *(f"{share * 100:g}%" for share in SHARES), "search", "reservations")
WARM = 10  # epochs that are not counted: in which pages are touched first, and the adaptive tracker learns


@dataclass(frozen=True)
class Load:
    """An epoch of the program: which share of the old pages it writes, and how many pointers to each."""

    share: float
    per_page: int
    anew: bool = True
    """Other pages in each epoch, rather than the same."""


@dataclass(frozen=True)
class Row:
    """A program with a barrier. Of each epoch: the medians."""

    program: str
    barrier: str
    total_ns: float
    """Of stores and the pause after them; of GCBench, all of it."""
    pause_p50_ns: float
    pause_p99_ns: float
    pause_max_ns: float
    pauses: int
    mutator_ns: float | None = None
    share: float | None = None
    per_page: int | None = None
    anew: bool | None = None


def loads() -> Iterator[Load]:
    """What is measured: each density, up to as many stores as an epoch can have."""
    for share in SHARES:
        for per_page in PER_PAGE:
            if share * STORE_PAGES * per_page <= MOST_STORES:
                yield Load(share, per_page)
    yield Load(0.1, 16, anew=False)


class Programs:
    """barriers.c with the core, and libgc.c where libgc is there, compiled."""

    def __init__(self, folder: Path, *, optimised: bool = True) -> None:
        self._folder = folder
        self._compiler = [*shlex.split(os.environ.get("CC", "cc")), "-O2" if optimised else "-O0", "-std=gnu11"]
        warnings, include = ["-Wall", "-Wextra", "-Werror"], f"-I{sources.headers()}"
        self._run("-pthread", include, "-c", *map(str, sources.sources()))
        core = sorted(map(str, folder.glob("*.o")))
        source = str(HERE / "barriers.c")
        for name, define in (("barriers", "-UCARDS"), ("cards", "-DCARDS")):
            self._run(*warnings, include, define, source, *core, "-pthread", "-lm", "-o", name)
        self.without_libgc = ""
        """Why libgc is not measured."""
        try:
            self._run(*warnings, str(HERE / "libgc.c"), "-lgc", "-o", "libgc")
        except subprocess.CalledProcessError as failed:
            if "gc.h" not in failed.stderr and "-lgc" not in failed.stderr:
                raise
            self.without_libgc = "libgc is not here: apt-get install libgc-dev"

    def _run(self, *words: str) -> None:
        done = subprocess.run([*self._compiler, *words], cwd=self._folder, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.stderr.write(done.stderr)
            raise subprocess.CalledProcessError(done.returncode, words, stderr=done.stderr)

    def told(self, program: str, *arguments: object) -> dict[str, Any]:
        """What one run prints."""
        name = program if program == "libgc" else "cards" if arguments[0] == "cards" else "barriers"
        words = [str(self._folder / name), *map(str, arguments)]
        out: dict[str, Any] = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
        return out


def _pauses(samples: Sequence[float]) -> dict[str, Any]:
    ordered = sorted(samples) or [0.0]
    last = len(ordered) - 1
    return {
        "pause_p50_ns": median(ordered),
        "pause_p99_ns": ordered[min(last, len(ordered) * 99 // 100)],
        "pause_max_ns": ordered[-1],
        "pauses": len(samples),
    }


def stores(programs: Programs, load: Load, rounds: int, epochs: int) -> Iterator[Row]:
    """Each barrier in turn. That no slot is missed is looked at in each epoch, by the program itself."""
    mutator: dict[str, list[float]] = {name: [] for name in BARRIERS}
    pause: dict[str, list[float]] = {name: [] for name in BARRIERS}
    pattern = "anew" if load.anew else "same"
    for turn in range(rounds):
        for name in list(BARRIERS)[:: -1 if turn % 2 else 1]:
            found = programs.told("barriers", name, "stores", load.share, load.per_page, pattern, epochs, WARM)
            mutator[name] += found["mutator_ns"]
            pause[name] += found["pause_ns"]
    for name in BARRIERS:
        total = median(a + b for a, b in zip(mutator[name], pause[name], strict=True))
        yield Row("stores", name, total, mutator_ns=median(mutator[name]), **_pauses(pause[name]), **asdict(load))


def gcbench(programs: Programs, depth: int, rounds: int) -> Iterator[Row]:
    """GCBench with each barrier, and on libgc."""
    totals: dict[str, list[float]] = {}
    pauses: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name in BARRIERS:
            found = programs.told("barriers", name, "gcbench", depth)
            totals.setdefault(name, []).append(found["total_ns"])
            pauses.setdefault(name, []).extend(found["pause_ns"])
        for name in () if programs.without_libgc else LIBGC:
            totals.setdefault(name, []).append(programs.told("libgc", depth, name, "total")["total_ns"])
            pauses.setdefault(name, []).extend(programs.told("libgc", depth, name, "pauses")["pause_ns"])
    for name, samples in totals.items():
        yield Row("gcbench", name, median(samples), **_pauses(pauses[name]))


def reservations(rounds: int, gibibytes: int) -> Iterator[dict[str, Any]]:
    """A heap of 64 pages, alone and in a large reservation: each in a process of its own."""
    for how in HOW:
        words = [sys.executable, "-m", "benchmarks.reservations", how, str(rounds), str(gibibytes)]
        done = subprocess.run(words, check=True, capture_output=True, text=True, cwd=HERE.parent)
        yield {"program": "reservation", **json.loads(done.stdout)}


def measured(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows that are asked for."""
    parts = options.only or list(PARTS)
    with tempfile.TemporaryDirectory() as folder:
        programs = Programs(Path(folder), optimised=not options.tiny)
        options.without_libgc = programs.without_libgc
        if programs.without_libgc:
            print(programs.without_libgc)
        if "gcbench" in parts:
            yield from map(asdict, gcbench(programs, options.depth, options.rounds))
        for load in [Load(0.01, 16), Load(0.1, 1, anew=False)] if options.tiny else loads():
            if f"{load.share * 100:g}%" in parts:
                yield from map(asdict, stores(programs, load, options.rounds, options.epochs))
    if "search" in parts:
        settings = Settings(seconds=options.seconds)
        if options.tiny:
            settings = Settings(seconds=0.0, least_rounds=2, most_rounds=2, tiny=True)
        bare = Bare()
        yield from ({"program": "search", **row.as_json()} for row in gc(settings, bare))
        bare.close()
    if "reservations" in parts:
        yield from reservations(3 if options.tiny else 50, 8 if options.tiny else 64)


def line(row: dict[str, Any]) -> str:
    """As it is printed."""
    if row["program"] == "reservation":
        minor = "" if row["minor_ns"] is None else f", a minor collection {show_ns(row['minor_ns'])}"
        tables = f"{show_bytes(row['page_table_bytes'])} of page tables"
        return f"{row['how']:<16} {show_bytes(row['nbytes'])}: {tables}, a fork {show_ns(row['fork_ns'])}{minor}"
    if row["program"] == "search":
        return f"{row['name']:<60} {show_ns(row['ours_ns']):>9}, bare {show_ns(row['bare_ns'])}, {row['result']}"
    what = row["program"] if row["share"] is None else f"{row['share']:.1%} x {row['per_page']}"
    name = {**BARRIERS, **LIBGC}[row["barrier"]]
    return (
        f"{what:<16} {name:<22} {show_ns(row['total_ns']):>9}, pauses {show_ns(row['pause_p50_ns'])}, p99 "
        f"{show_ns(row['pause_p99_ns'])}, {show_ns(row['pause_max_ns'])} at most"
    )


def part_of(row: dict[str, Any]) -> str:
    """Which of `PARTS` measured it."""
    if row["program"] == "stores":
        return f"{row['share'] * 100:g}%"
    return "reservations" if row["program"] == "reservation" else str(row["program"])


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gc_barriers", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=2, help="of each barrier (2)")
    parser.add_argument("--epochs", type=int, default=50, help="of each round (50)")
    parser.add_argument("--depth", type=int, default=18, help="of GCBench (18)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each row of the search for slots (1)")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="some parts; --write leaves the others' rows there")
    parser.add_argument("--tiny", action="store_true", help="only see whether it runs; the numbers mean nothing")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write it to a file as JSON, beside what is printed")
    options = parser.parse_args()
    if options.tiny:
        options.rounds, options.epochs, options.depth = 1, 2, 12
    where = machine() | {"command": "python -m benchmarks.gc_barriers"}
    rows = list(measured(options))
    print("\n".join(map(line, rows)))
    if options.write:
        others: list[dict[str, Any]] = []
        if options.only and options.write.exists():
            before = json.loads(options.write.read_text(encoding="utf-8"))
            others = [row for row in before["rows"] if part_of(row) not in options.only]
        order = list(PARTS)
        rows = sorted([*others, *rows], key=lambda row: order.index(part_of(row)))
        document = {**where, "without_libgc": options.without_libgc, "rows": rows}
        options.write.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

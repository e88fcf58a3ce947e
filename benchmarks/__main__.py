# SPDX-License-Identifier: MIT
"""``python -m benchmarks [NAME ...]``: runs them and prints each ratio beside its target."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .algebra import algebra
from .bare import Bare
from .checkpoint import checkpoint, checkpoint_beside
from .checkpoint_restore import checkpoint_restore
from .collect import collect, listeners
from .comparing import comparing
from .content import changed, collect_into, gather
from .delta import delta
from .density import density, phases, policy
from .epoch import epoch
from .gc import gc
from .harness import Benchmark, Row, Settings, machine
from .importing import import_
from .migration import migration
from .objects import objects
from .process import attaching, process, reading
from .regions import regions
from .remedies import remedies
from .zarr_rows import zarr_rows

BENCHMARKS: dict[str, Benchmark] = {
    "collect": collect,
    "listeners": listeners,
    "gather": gather,
    "collect_into": collect_into,
    "changed": changed,
    "delta": delta,
    "comparing": comparing,
    "gc": gc,
    "algebra": algebra,
    "import": import_,
    "regions": regions,
    "remedies": remedies,
    "epoch": epoch,
    "density": density,
    "phases": phases,
    "policy": policy,
    "process": process,
    "reading": reading,
    "attaching": attaching,
    "checkpoint": checkpoint,
    "checkpoint_beside": checkpoint_beside,
    "checkpoint_restore": checkpoint_restore,
    "migration": migration,
    "objects": objects,
    "zarr_rows": zarr_rows,
}

BY_NAME = {"checkpoint", "checkpoint_beside", "checkpoint_restore", "gc", "migration", "objects", "zarr_rows"}
"""What runs only when it is asked for: its numbers stand on other pages (make bench-checkpoint, …), or on none."""


def write(path: Path, where: dict[str, Any], told: list[dict[str, Any]]) -> None:
    """After each benchmark, so that nothing is lost to an interrupt. The file keeps what it has of others, and says
    where that was measured."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
    measured = {row["benchmark"] for row in told}
    kept = [row for row in known["rows"] if row["benchmark"] not in measured]
    origin = ", ".join(str(known.get(key)) for key in ("kernel", "machine", "python", "date"))
    if "note" in known:
        origin += f" ({known['note']})"
    elsewhere = {row["benchmark"]: known.get("elsewhere", {}).get(row["benchmark"], origin) for row in kept}
    rows = sorted(kept + told, key=lambda row: list(BENCHMARKS).index(row["benchmark"]))
    text = json.dumps({**where, **({"elsewhere": elsewhere} if kept else {}), "rows": rows}, indent=1)
    spare = path.with_name(path.name + ".new")
    spare.write_text(text + "\n", encoding="utf-8")
    spare.replace(path)


def main() -> int:
    """Exit status 0 whatever the targets say: a missed one is for a person to judge, on a machine that they know."""
    names = "\n".join(f"  {name:<20}{(run.__doc__ or '').splitlines()[0]}" for name, run in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="What dirtytrack costs, against bare C in the same run.",
        epilog=f"benchmarks:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which to run (all but " + ", ".join(BY_NAME) + ")")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="have that JSON in a file, in place of what it has of these"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="how long to measure each row (2)")
    parser.add_argument("--tiny", action="store_true", help="only see whether they run; the numbers mean nothing")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(BENCHMARKS))
    if unknown:
        parser.error(f"no benchmark is called {', '.join(unknown)}")
    settings = Settings(seconds=options.seconds)
    if options.tiny:
        settings = Settings(seconds=0.0, least_rounds=2, most_rounds=2, tiny=True)

    where: dict[str, Any] = machine()
    if not options.json:
        for key, value in where.items():
            print(f"{key + ':':<9}{value}")
    rows, told, bare = list[Row](), list[dict[str, Any]](), Bare()
    for name in options.names or [name for name in BENCHMARKS if name not in BY_NAME]:
        for row in BENCHMARKS[name](settings, bare):
            rows.append(row)
            told.append({"benchmark": name, **row.as_json()})
            if not options.json:
                print(row, flush=True)
        if options.write:
            write(options.write, where, told)
    bare.close()
    missed = [row for row in rows if not row.ok]
    if options.json:
        json.dump({**where, "rows": told}, sys.stdout, indent=1)
        print()
    else:
        print(f"{len(rows)} rows, {len(missed)} missed:" if missed else f"{len(rows)} rows, every target met")
        for row in missed:
            print(f"  {row.name}: {row.result}, target {row.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

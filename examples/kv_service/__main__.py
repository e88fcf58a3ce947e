# SPDX-License-Identifier: MIT
"""Moves a key-value service to another process while clients use it, and looks whether they could have noticed.

Run it as ``python -m examples.kv_service``. The exit status is 0 only if what the clients saw is what one table would
have answered that does one command after the other: no write lost, none done twice.
"""

from __future__ import annotations

import argparse
import asyncio
import sys

from .client import Client
from .cluster import Cluster, Load
from .history import check
from .process import run


async def main(options: argparse.Namespace) -> int:
    with Cluster(options.mib) as cluster:
        cluster.start("A", "B")
        async with Load(cluster.registry) as load:
            await asyncio.sleep(options.seconds)
            with Client(cluster.registry, "operator") as operator:
                moved = await operator.migrate("B")
            await asyncio.sleep(options.seconds)
        with Client(cluster.registry, "reader") as reader:
            counters = [await reader.get(f"counter-{number}") for number in range(4)]
    commands = check(load.history)
    total = sum(value for value in counters if isinstance(value, int))
    longest, moves = max(each.longest for each in load.clients), sum(each.moves for each in load.clients)
    print(f"moved in {moved['rounds']} rounds; neither served for {moved['downtime'] * 1e3:.1f} ms")
    print(f"{len(load.clients)} clients heard {moves} times that it moved; the longest wait: {longest * 1e3:.1f} ms")
    print(f"{commands:,} commands could have been done one after the other; counted to {total:,}")
    if total != load.counted or moves != len(load.clients):
        print(f"but {load.counted:,} were to be counted")
        return 1
    print("their answers are identical to those of one table")
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.kv_service", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("role", nargs="?", choices=["move", "serve", "receive"], default="move", help=argparse.SUPPRESS)
    parser.add_argument("name", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("directory", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--mib", type=int, default=64, help="the table's memory (default: 64)")
    parser.add_argument("--seconds", type=float, default=0.7, help="how long clients use it before, and after")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    options = parse(sys.argv[1:])
    if options.role == "move":
        sys.exit(asyncio.run(main(options)))
    run(options.role, options.name, options.directory, options.mib)

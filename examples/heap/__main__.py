# SPDX-License-Identifier: MIT
"""``python -m examples.heap gcbench --size 14``: run a program, and tell what the collector did meanwhile."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from .heap import Heap
from .lisp import Lisp

PROGRAMS = Path(__file__).with_name("programs")
SIZES = {"gcbench": 12, "queens": 9, "derivative": 3, "table": 1000}


def main() -> int:
    """What the command does."""
    parser = argparse.ArgumentParser(prog="python -m examples.heap", description=__doc__)
    parser.add_argument("program", choices=sorted(SIZES))
    parser.add_argument("--size", type=int, help="what the program's `size` is")
    parser.add_argument("--eden", type=int, default=1024, metavar="KIB", help="where objects are born (default: 1024)")
    parser.add_argument("--stress", action="store_true", help="a minor collection before each allocation")
    parser.add_argument("--verify", action="store_true", help="read the whole heap after each collection")
    asked = parser.parse_args()
    size = SIZES[asked.program] if asked.size is None else asked.size
    with Heap(eden_bytes=asked.eden << 10, stress=asked.stress, verify=asked.verify) as heap:
        lisp = Lisp(heap)
        began = time.perf_counter()
        value = lisp.run_file(PROGRAMS / f"{asked.program}.lisp", size=size)
        took = time.perf_counter() - began
        print(lisp.show(value))
        numbers, pauses = heap.numbers(), [pause for pause in heap.pauses if pause.what != "look"]
        del value
    seconds = sorted(pause.seconds for pause in pauses) or [0.0]
    median, late, longest = (1e3 * seconds[int(share * (len(seconds) - 1))] for share in (0.5, 0.99, 1))
    print(f"{took:.2f} s, of which {sum(seconds):.2f} s in {len(pauses)} pauses")
    print(f"pauses of {median:.2f} ms in the median, {late:.2f} ms at the 99th percentile, {longest:.2f} ms at most")
    print(f"{numbers.minors} minor collections, {numbers.fulls} full ones, {numbers.cycles} beside the program")
    print(f"{numbers.promoted_bytes >> 10} KiB became old, {numbers.freed_bytes >> 10} KiB of that were freed")
    print(f"{numbers.redirected_slots} old slots led to young objects, as the page tables told")
    return 0


if __name__ == "__main__":
    sys.exit(main())

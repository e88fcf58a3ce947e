# SPDX-License-Identifier: MIT
"""The Lisp programs of examples/heap, and what they must answer, computed without them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from examples.heap import Heap
from examples.heap.lisp import Lisp

PROGRAMS = Path(__file__).parents[3] / "examples" / "heap" / "programs"
QUEENS = {4: 2, 5: 10, 6: 4, 7: 40, 8: 92, 9: 352}
DERIVATIVES = (
    "((+ (* 6 (^ x 5)) (* 3 (* (* 2 x) y))) 252)",
    "((+ (* 30 (^ x 4)) (* 6 y)) 510 252)",
    "((* 120 (^ x 3)) 960 510 252)",
    "((* 360 (^ x 2)) 1440 960 510 252)",
)


def nodes(depth: int) -> int:
    return (1 << depth + 1) - 1


def gcbench(size: int) -> int:
    short_lived = sum(4 * size // depth * 2 * nodes(depth) for depth in range(2, size + 1, 2))
    return short_lived + nodes(size) + sum(range(16 * size))


def table(size: int) -> str:
    seed, counts = 1, Counter[int]()
    for _ in range(10 * size):
        counts[seed // 65536 % size] += 1
        seed = (seed * 1103515245 + 12345) % 2147483648
    checksum = 0
    for key in sorted(counts):
        checksum = (checksum * 31 + key + counts[key]) % 1000003
    return f"({len(counts)} {max(counts.values())} {checksum})"


def expected(program: str, size: int) -> str:
    if program == "derivative":
        return DERIVATIVES[size - 1]
    if program == "table":
        return table(size)
    return str(gcbench(size) if program == "gcbench" else QUEENS[size])


def answer(heap: Heap, program: str, size: int) -> str:
    lisp = Lisp(heap)
    return lisp.show(lisp.run_file(PROGRAMS / f"{program}.lisp", size=size))

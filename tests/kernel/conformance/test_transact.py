# SPDX-License-Identifier: MIT
"""Writers and scans at the same time, round by round: the selftest's `transact_test`, and the same by trackers.

In each round threads store to pages of their own while one scan runs; a second follows when they are done. A page may
be in both (its writer was between the fault and the store), never in neither. The storms (test_storm.py) do so without
rounds. Takes about 2 s of CI's 20 min.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kernel.kinds import KINDS, Area, Kind, some
from tests.kernel.watched import Bare, Watched
from tests.oracle import PAGE

THREADS = 6
_memset = ctypes.CDLL(None).memset  # without the GIL, so that it runs beside the scan
_memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]


@contextmanager
def writers(area: Area, each: int) -> Iterator[Callable[[], None]]:
    """Threads of which each stores to its units in every round; the callable begins one, or ends it."""
    barrier = threading.Barrier(THREADS + 1, timeout=60)
    finished = threading.Event()

    def write(first: int) -> None:
        number = 0
        while True:
            barrier.wait()
            if finished.is_set():
                return
            number = number % 250 + 1
            for unit in range(first, first + each):
                _memset(area.at(unit), number, 64)
            barrier.wait()

    threads = [threading.Thread(target=write, args=(number * each,)) for number in range(THREADS)]
    for one in threads:
        one.start()

    def step() -> None:
        barrier.wait()

    try:
        yield step
    finally:
        finished.set()
        barrier.wait()
        for one in threads:
            one.join()


def rounds(area: Area, each: int, number: int, take: Callable[[], set[int]]) -> None:
    wanted = set(range(THREADS * each))
    with writers(area, each) as step:
        for _ in range(number):
            step()
            during = take()
            step()
            after = take()
            assert during | after == wanted, "none lost, and no other reported"
        assert take() == set()


def test_a_thousand_rounds_asked_of_the_page_map(tmp_path: Path) -> None:
    [kind] = some("private anonymous")
    with kind.map(THREADS * 32, tmp_path) as area, Bare(area) as bare:
        area.fill(0)
        assert bare.take() == set(range(area.units))
        rounds(area, 8, 1000, bare.take)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rounds_by_a_tracker(kind: Kind, tmp_path: Path) -> None:
    each = 5 if kind.granule == PAGE else 1
    with kind.map(THREADS * each, tmp_path) as area, Watched(area, compare=False) as watched:
        rounds(area, each, 60, watched.collect)

# SPDX-License-Identifier: MIT
"""What finding and copying the changes of the same epochs costs by each method people use.

The stores of the real run are repeated, in order, on fresh memory of the same size for each method, by one loop in C.
A method ends each epoch with a mirror that equals the memory; that is checked, outside the time. Its cost is how much
longer the writer takes than untracked, and the time to start and to collect.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple
from zlib import crc32

from .. import allocate, track
from ..kernel.baseline import ProtectedPages, compare_into, replay

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .demo_index import WriteLog

__all__ = ["ROUNDS", "Cost", "compare", "new_mirror"]

ROUNDS = 2  # the cheapest of so many is what counts
_PAGE = mmap.PAGESIZE

Collect = Callable[[], int]  # makes the mirror equal; returns how many pages it copied
Method = Callable[["Buffer", mmap.mmap], AbstractContextManager[Collect]]


class Cost(NamedTuple):
    """What one method costs over all epochs."""

    method: str
    start_seconds: float
    write_seconds: float
    collect_seconds: float
    pages_copied: int

    def over(self, untracked: Cost) -> float:
        """Seconds that the method adds to the untracked run."""
        return self.start_seconds + self.write_seconds - untracked.write_seconds + self.collect_seconds


def new_mirror(nbytes: int) -> mmap.mmap:
    """Zeroes, every page in place: nobody's collect is to pay for the mirror's own page faults."""
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)


@contextmanager
def _untracked(memory: Buffer, mirror: mmap.mmap) -> Iterator[Collect]:
    yield lambda: 0


@contextmanager
def _dirtytrack(memory: Buffer, mirror: mmap.mmap) -> Iterator[Collect]:
    with track(memory) as tracker:
        yield lambda: tracker.collect_into(mirror).page_count


@contextmanager
def _protect(memory: Buffer, mirror: mmap.mmap) -> Iterator[Collect]:
    with ProtectedPages(memory) as pages:
        yield lambda: pages.collect_into(mirror)


@contextmanager
def _compare(memory: Buffer, mirror: mmap.mmap) -> Iterator[Collect]:
    yield lambda: compare_into(memory, mirror)


@contextmanager
def _copy(memory: Buffer, mirror: mmap.mmap) -> Iterator[Collect]:
    with memoryview(memory).cast("B") as source, memoryview(mirror) as target:

        def collect() -> int:
            target[:] = source  # one memcpy
            return len(source) // _PAGE

        yield collect


@contextmanager
def _hash(memory: Buffer, mirror: mmap.mmap) -> Iterator[Collect]:
    # The fastest hash of the standard library: about 200 ns of each page's time are Python's. A hash that costs nothing
    # would still have to read all memory, as the comparison does.
    with memoryview(memory).cast("B") as source, memoryview(mirror) as target:
        pages = [source[start : start + _PAGE] for start in range(0, len(source), _PAGE)]
        known = [crc32(bytes(_PAGE))] * len(pages)  # fresh memory is zeroes: nothing to read at the start

        def collect() -> int:
            nonlocal known
            before, known = known, list(map(crc32, pages))
            changed = [number for number, (old, new) in enumerate(zip(before, known, strict=True)) if old != new]
            for number in changed:
                target[number * _PAGE : (number + 1) * _PAGE] = pages[number]
            return len(changed)

        try:
            yield collect
        finally:
            for page in pages:
                page.release()


_METHODS: dict[str, Method] = {
    "untracked": _untracked,
    "dirtytrack": _dirtytrack,
    "mprotect + SIGSEGV": _protect,
    "compare every page with a copy": _compare,
    "copy everything": _copy,
    "hash every page (zlib.crc32)": _hash,
}


def _measure(name: str, method: Method, epochs: Sequence[WriteLog], nbytes: int) -> Cost:
    writing = collecting = 0.0
    pages = 0
    memory, mirror = allocate(nbytes), new_mirror(nbytes)  # freed with the last reference, whatever happens
    begin = perf_counter()
    with method(memory, mirror) as collect:
        starting = perf_counter() - begin
        for log in epochs:
            begin = perf_counter()
            replay(memory, log.spans, log.data)
            written = perf_counter()
            pages += collect()
            collecting += perf_counter() - written
            writing += written - begin
    if method is not _untracked and compare_into(memory, mirror):
        raise AssertionError(f"{name}: the mirror differs from the memory")
    return Cost(name, starting, writing, collecting, pages)


def compare(epochs: Sequence[WriteLog], nbytes: int, tell: Callable[[str], None]) -> tuple[Cost, list[Cost]]:
    """Replay all epochs by every method.

    Args:
        epochs: The stores of each epoch.
        nbytes: Size of the memory.
        tell: Called with what is about to be measured.

    Returns:
        The untracked run, and each method's cost, ours first.
    """
    best: dict[str, Cost] = {}
    for turn in range(1, ROUNDS + 1):
        for name, method in _METHODS.items():
            tell(f"{name}, round {turn} of {ROUNDS}")
            cost = _measure(name, method, epochs, nbytes)
            if name not in best or sum(cost[1:4]) < sum(best[name][1:4]):
                best[name] = cost
    untracked, *costs = best.values()
    return untracked, costs

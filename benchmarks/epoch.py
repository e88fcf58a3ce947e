# SPDX-License-Identifier: MIT
"""A whole epoch, by each way to keep a mirror of memory that is being written.

An epoch is the program's writes (one store to each page that it writes), finding what was written, making ready for the
next epoch, and copying what was found to a mirror. Python's clock is read around all of it, for every method alike.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import mmap
import os
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from statistics import median

import dirtytrack

from .bare import PAGE, Bare, address_of, compiled
from .harness import GIB, Row, Settings, alone, rounds, scattered, show_bytes

SHARES = (0.001, 0.01, 0.1, 1.0)
LEAST_ROUNDS, MOST_ROUNDS, MOST_SECONDS = 3, 7, 20.0  # of one share, all methods in turn
UNTRACKED, FORK, DIRTYTRACK = "nothing tracked", "fork", "dirtytrack"

Collect = Callable[[], object]  # makes the mirror equal
Clock = Callable[[], int]  # nanoseconds


class Ways:
    """The methods over one memory and its mirror, in turn. Making ready for the first epoch is not in the time."""

    def __init__(self, bare: Bare, nbytes: int, clock: Clock = time.perf_counter_ns) -> None:
        self.clock = clock
        self.memory = dirtytrack.allocate(nbytes, name="benchmark")
        self.mirror = dirtytrack.allocate(nbytes, name="mirror")
        self.address, self._to = address_of(self.memory), address_of(self.mirror)
        for address in (self.address, self._to):
            bare.populate(address, nbytes)
        self.mirror.madvise(mmap.MADV_DONTFORK)  # a child needs no page tables for it
        self._lib = compiled("epoch.c")
        self._hash, self._known = _xxh3(), array("Q", bytes(nbytes // PAGE * 8))
        self.methods: dict[str, Callable[[], AbstractContextManager[Collect]]] = {
            UNTRACKED: self._untracked,
            DIRTYTRACK: self._dirtytrack,
            "mprotect + SIGSEGV": self._mprotect,
            "synchronous userfaultfd": self._uffd,
            "memcmp with a copy": self._memcmp,
            "xxh3 of every page": self._xxh3,
            "copy of everything": self._copy,
            FORK: self._fork,
        }

    def synchronise(self) -> None:
        self._call("copy_collect", self.address, self.memory.nbytes, self._to)

    def equal(self) -> bool:
        return self.same(self.memory, self.mirror)

    def same(self, memory: dirtytrack.Memory, mirror: dirtytrack.Memory) -> bool:
        return bool(self._call("equal", address_of(memory), memory.nbytes, address_of(mirror)))

    def _call(self, name: str, *arguments: object) -> int:
        function = getattr(self._lib, name)
        code: int = function(*(ctypes.c_uint64(each) if isinstance(each, int) else each for each in arguments))
        if code < 0:
            raise OSError(-code, f"{name}: {os.strerror(-code)}")
        return code

    @contextmanager
    def _untracked(self) -> Iterator[Collect]:
        yield lambda: None

    @contextmanager
    def _dirtytrack(self) -> Iterator[Collect]:
        with dirtytrack.UffdSession() as session:
            session.register(self.memory)
            with dirtytrack.DirtyTracker(session, exact=True) as tracker:  # one epoch is no time to adapt in
                yield lambda: tracker.collect_into(self.mirror)

    @contextmanager
    def _mprotect(self) -> Iterator[Collect]:
        self._call("mprotect_begin", self.address, self.memory.nbytes, PAGE)
        yield lambda: self._call("mprotect_collect", self._to)
        self._call("mprotect_end")

    @contextmanager
    def _uffd(self) -> Iterator[Collect]:
        self._call("uffd_begin", self.address, self.memory.nbytes, PAGE)
        yield lambda: self._call("uffd_collect", self._to)
        self._call("uffd_end")

    @contextmanager
    def _memcmp(self) -> Iterator[Collect]:
        yield lambda: self._call("memcmp_collect", self.address, self.memory.nbytes, PAGE, self._to)

    @contextmanager
    def _xxh3(self) -> Iterator[Collect]:
        known = self._known.buffer_info()[0]

        def collect() -> int:
            return self._call("hash_collect", self.address, self.memory.nbytes, PAGE, self._to, known, self._hash)

        collect()  # learns the hashes
        yield collect

    @contextmanager
    def _copy(self) -> Iterator[Collect]:
        yield lambda: self._call("copy_collect", self.address, self.memory.nbytes, self._to)

    @contextmanager
    def _fork(self) -> Iterator[Collect]:
        """The child keeps the memory as it was before the writes. It tells and copies nothing."""
        child = ctypes.c_int()
        begin = self.clock()
        self._call("fork_begin", ctypes.byref(child))
        self.forked_ns = self.clock() - begin
        yield lambda: self._call("fork_end", child)


def _xxh3() -> object:
    """XXH3 as the xxhash package brings it, with the widest instructions of this processor where it can choose."""
    module = importlib.util.find_spec("xxhash._xxhash")
    if module is None or module.origin is None:
        raise ModuleNotFoundError("the xxhash package is not installed: pip install xxhash")
    library = ctypes.CDLL(module.origin)
    function = getattr(library, "XXH3_64bits_dispatch", None) or library.XXH3_64bits
    return ctypes.cast(function, ctypes.c_void_p)


def measure(bare: Bare, ways: Ways, name: str, pages: array[int], value: int) -> int:
    """Nanoseconds of one epoch."""
    method = ways.methods[name]
    with method() as collect:
        begin = ways.clock()
        bare.write(ways.address, pages, value=value)
        collect()
        elapsed = ways.clock() - begin
    if name == FORK:
        elapsed += ways.forked_ns
    if name in (UNTRACKED, FORK):
        ways.synchronise()
    return elapsed


def epoch(settings: Settings, bare: Bare) -> Iterator[Row]:
    """The writes, finding them and copying them out, by each method people use; no targets."""
    nbytes = settings.sizes(GIB)[-1]
    ways = Ways(bare, nbytes)
    value = 0
    for share in SHARES:
        pages = scattered(nbytes // PAGE, share)
        samples: dict[str, list[int]] = {name: [] for name in ways.methods}
        gc.collect()
        limits = Settings(0.0, 2, 2) if settings.tiny else Settings(MOST_SECONDS, LEAST_ROUNDS, MOST_ROUNDS)
        for turn in rounds(limits):
            for name, taken in samples.items():
                value = value % 255 + 1  # another one each time, so that each page differs from the mirror
                taken.append(measure(bare, ways, name, pages, value))
                if not turn and not ways.equal():
                    raise AssertionError(f"{name}: the mirror differs from the memory")
        ours = median(samples[DIRTYTRACK])
        for name, taken in samples.items():
            row = alone(
                taken,
                f"epoch {show_bytes(nbytes)}, {share:.4g} dirty, {name}",
                f"{median(taken) / ours:.3g} of dirtytrack's",
                "",
                True,
            )
            yield replace(row, share=share, method=name)

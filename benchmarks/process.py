# SPDX-License-Identifier: MIT
"""Another process: an epoch over its mappings, its bytes, and how long it stands still when it is attached to."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median

from dirtytrack import DirtySet
from dirtytrack.process import ProcessTracker, attach

from .bare import PAGE, Bare, address_of
from .harness import KIB, MIB, Row, Settings, alone, flat, paired, scattered, show_bytes, show_ns

MAPPINGS = 32
SHARES = (0.0, 0.01, 0.1)
MOST_RATIO = 1.1
LEAST_SPEED = 0.9
ATTACHES = 200

TARGET = """
import ctypes, mmap, sys
count, nbytes = int(sys.argv[1]), int(sys.argv[2])
private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
memory = []
for _ in range(count):
    memory.append(mmap.mmap(-1, nbytes, flags=private))
    if len(memory) % 2: memory[-1].madvise(mmap.MADV_DONTFORK)  # else neighbours are joined
    memory[-1][:] = bytes(nbytes)
for m in memory: print(ctypes.addressof(ctypes.c_char.from_buffer(m)))
print(flush=True)
pages = []
for line in sys.stdin.buffer:
    if line.startswith(b"pages"):
        pages = [(memory[p // (nbytes // 4096)], p % (nbytes // 4096) * 4096) for p in map(int, line.split()[1:])]
    else:
        for m, at in pages: m[at] = 7
    sys.stdout.buffer.write(b".")
    sys.stdout.flush()
"""


class Target:
    """A process with mappings, pages of which it writes when it is asked to."""

    def __init__(self, count: int, nbytes: int) -> None:
        command = [sys.executable, "-c", TARGET, str(count), str(nbytes)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stdin is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        self.pid = self._process.pid
        starts = [int(line) for line in iter(self._out.readline, b"\n")]
        self.ranges = [(start, start + nbytes) for start in starts]

    def tell(self, line: str) -> None:
        self._in.write(line.encode() + b"\n")
        self._in.flush()
        self._out.read(1)

    def close(self) -> None:
        self._in.close()
        self._process.wait()
        self._out.close()


@contextmanager
def tracked(count: int, nbytes: int) -> Iterator[tuple[Target, ProcessTracker]]:
    target = Target(count, nbytes)
    try:
        with attach(target.pid, include=target.ranges) as tracker:
            tracker.collect()
            yield target, tracker
    finally:
        target.close()


class Epochs:
    """Ours and the bare loop over one target."""

    def __init__(self, bare: Bare, target: Target, tracker: ProcessTracker) -> None:
        self._bare, self._tracker = bare, tracker
        self._ranges = array("Q", [at for span in sorted(target.ranges) for at in span])
        self._pagemap, self._maps = (os.open(f"/proc/{target.pid}/{name}", os.O_RDONLY) for name in ("pagemap", "maps"))
        self.expected = 0

    def ours(self) -> int:
        begin = time.perf_counter_ns()
        dirty = self._tracker.collect()
        elapsed = time.perf_counter_ns() - begin
        assert dirty.page_count == self.expected
        return elapsed

    def scans(self) -> int:
        elapsed, found = self._bare.ranges(self._ranges, self._pagemap)
        assert found == self.expected, f"the bare loop found {found} pages of {self.expected}"
        return elapsed

    def scans_and_mappings(self) -> int:
        return self._bare.mappings(self._maps) + self.scans()

    def close(self) -> None:
        os.close(self._pagemap)
        os.close(self._maps)


def process(settings: Settings, bare: Bare) -> Iterator[Row]:
    """An epoch over the mappings of another process, against a bare scan of each and a bare look at what is mapped."""
    for nbytes in (64 * KIB,) if settings.tiny else (64 * KIB, MIB, 4 * MIB):
        with tracked(MAPPINGS, nbytes) as (target, tracker), tracked(1, PAGE) as (other, another):
            epochs, rehearsal = Epochs(bare, target, tracker), Epochs(bare, other, another)
            for share in SHARES:
                pages = scattered(MAPPINGS * nbytes // PAGE, share)
                target.tell(" ".join(["pages", *map(str, pages)]))
                tracker.collect()
                epochs.expected = len(pages)

                def prepare(target: Target = target, rehearsal: Epochs = rehearsal) -> None:
                    target.tell("write")
                    rehearsal.ours()  # as in the other benchmarks, both sides are called once just before
                    rehearsal.scans_and_mappings()

                name = f"{MAPPINGS} mappings of {show_bytes(nbytes)}, {share:.4g} dirty"
                yield paired(settings, prepare, epochs.ours, epochs.scans_and_mappings).cost_row(name, MOST_RATIO, 0)
                yield paired(settings, prepare, epochs.ours, epochs.scans).told_row(f"{name}, bare scans alone")
            epochs.close()
            rehearsal.close()


def reading(settings: Settings, bare: Bare) -> Iterator[Row]:
    """The dirty bytes of another process, against bare process_vm_readv of the same runs."""
    page = bytearray(PAGE)

    def rehearse(pid: int, tracker: ProcessTracker, dirty: DirtySet) -> None:
        tracker.read(dirty, page)
        bare.read(pid, flat(dirty.runs), address_of(page))

    for nbytes in (64 * KIB,) if settings.tiny else (MIB, 4 * MIB):
        with tracked(MAPPINGS, nbytes) as (target, tracker), tracked(1, PAGE) as (other, another):
            out = bytearray(MAPPINGS * nbytes)
            other.tell("pages 0")
            other.tell("write")
            little = another.collect()
            for share in (0.1, 1.0):
                target.tell(" ".join(["pages", *map(str, scattered(MAPPINGS * nbytes // PAGE, share))]))
                target.tell("write")
                dirty = tracker.collect()
                runs = flat(dirty.runs)

                def ours(tracker: ProcessTracker = tracker, dirty: DirtySet = dirty, out: bytearray = out) -> int:
                    begin = time.perf_counter_ns()
                    tracker.read(dirty, out)
                    return time.perf_counter_ns() - begin

                def loop(pid: int = target.pid, runs: array[int] = runs, out: bytearray = out) -> int:
                    return bare.read(pid, runs, address_of(out))

                pair = paired(settings, partial(rehearse, other.pid, another, little), ours, loop)
                yield pair.speed_row(f"{MAPPINGS} mappings of {show_bytes(nbytes)}, {share:.4g} dirty", LEAST_SPEED)


def attaching(settings: Settings, bare: Bare) -> Iterator[Row]:
    """How long a process stands still when it is attached to."""
    del bare
    target = Target(MAPPINGS, 64 * KIB)
    try:
        stalls = []
        for _ in range(5 if settings.tiny else ATTACHES):
            with attach(target.pid) as tracker:
                stalls.append(int(tracker.attach_stall * 1e9))
    finally:
        target.close()
    worst = sorted(stalls)[len(stalls) * 99 // 100]
    yield alone(stalls, f"{len(stalls)} attaches", f"p50 {show_ns(median(stalls))}, p99 {show_ns(worst)}", "", True)

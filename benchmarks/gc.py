# SPDX-License-Identifier: MIT
"""A minor collection's search for slots against the loop that everybody writes, over the same pages."""

from __future__ import annotations

import ctypes
import time
from array import array
from collections.abc import Iterator

import dirtytrack
from dirtytrack.gc import PointerFormat, RememberedSet

from .bare import PAGE, Bare, address_of, compiled
from .harness import MIB, Arena, Pair, Row, Settings, arena, paired, scattered, show_bytes

NBYTES = 256 * MIB
SHARES = (0.001, 0.01, 0.1, 1.0)
MOST_RATIO, MOST_EXTRA_NS = 1.25, 25_000  # 0.8 of the speed; or what Python takes, where that is more
YOUNG, YOUNG_BYTES = 1 << 40, 4 * MIB  # pointers only point there


class Loop:
    """The loop of gc.c."""

    def __init__(self) -> None:
        self._slots = compiled("gc.c").gc_slots
        u64, pointer = ctypes.c_uint64, ctypes.c_void_p
        self._slots.restype, self._slots.argtypes = ctypes.c_int64, [pointer, u64, u64, u64, pointer, pointer]
        self._found = ctypes.c_uint64()

    def __call__(self, runs: array[int], out: bytearray) -> tuple[int, int]:
        """(ns, slots found)."""
        at, found = runs.buffer_info()[0], ctypes.addressof(self._found)
        elapsed: int = self._slots(at, len(runs) // 2, YOUNG, YOUNG + YOUNG_BYTES, address_of(out), found)
        return elapsed, self._found.value


class Rehearsal:
    """What is measured, on a page of its own just before: see harness.Rehearsal."""

    def __init__(self, space: Arena, session: dirtytrack.UffdSession, loop: Loop) -> None:
        self._memory, self._space, self._loop = dirtytrack.allocate(PAGE), space, loop
        region = session.register(self._memory)
        tracker = dirtytrack.DirtyTracker(session, [region], exact=True)
        tracker.start()
        self._remembered = RememberedSet(region, tracker, nursery=(YOUNG, YOUNG + YOUNG_BYTES))
        self._runs, self._out = array("Q", (region.start, region.end)), bytearray(PAGE)

    def __call__(self) -> None:
        self._space.rehearse()
        self._memory[0] = 1
        self._loop(self._runs, self._out)
        self._remembered.minor(YOUNG, YOUNG + YOUNG_BYTES)


def minor(
    settings: Settings,
    bare: Bare,
    space: Arena,
    session: dirtytrack.UffdSession,
    share: float,
    slot_every: int,
) -> tuple[Pair, Pair]:
    """All of minor() beside PAGEMAP_SCAN and the loop, and beside the loop alone. One word in so many is a slot."""
    region, loop = space.region, Loop()
    pointers = PointerFormat.conservative()  # as the loop has it
    rehearse = Rehearsal(space, session, loop)
    pages = scattered(space.page_count, share)
    words = memoryview(space.memory).cast("Q")
    words[:] = memoryview(bytes(space.memory.nbytes)).cast("Q")
    stride = PAGE // 8
    if slot_every:
        for page in pages:
            first = page * stride
            count = len(range(3, stride, slot_every))
            words[first + 3 : first + stride : slot_every] = memoryview(array("Q", [YOUNG + 64] * count))
    remembered = RememberedSet(region, space.trackers[0], pointers=pointers, nursery=(YOUNG, YOUNG + YOUNG_BYTES))
    runs = array("Q")
    for page in pages:
        start = region.start + page * PAGE
        if runs and runs[-1] == start:
            runs[-1] = start + PAGE
        else:
            runs.extend((start, start + PAGE))
    expected = len(pages) * len(range(3, stride, slot_every)) if slot_every else 0
    out = bytearray(8 * max(expected, 1))

    def prepare() -> None:
        bare.write(region.address, pages)
        rehearse()

    def ours() -> int:
        begin = time.perf_counter_ns()
        slots = remembered.minor(YOUNG, YOUNG + YOUNG_BYTES)
        elapsed = time.perf_counter_ns() - begin
        assert (len(slots), slots.page_count) == (expected, len(pages)) or slots.whole_heap
        return elapsed

    def both() -> int:
        elapsed, found = bare.collect(region.start, region.end)
        assert found == len(pages)
        return elapsed + reading()

    def reading() -> int:
        elapsed, found = loop(runs, out)
        assert found == expected
        return elapsed

    prepare()
    ours()  # the first reads everything
    return paired(settings, prepare, ours, both), paired(settings, prepare, ours, reading)


def gc(settings: Settings, bare: Bare) -> Iterator[Row]:
    """RememberedSet.minor() against PAGEMAP_SCAN and a loop over the words, in C; and against that loop alone."""
    for nbytes in settings.sizes(NBYTES):
        for slot_every in (0, 64):
            density = f"1 slot in {slot_every} words" if slot_every else "no slots"
            with arena(bare, nbytes) as space, dirtytrack.UffdSession() as session:
                for share in SHARES:
                    where = f"{show_bytes(nbytes)}, {share:.4g} dirty, {density}"
                    whole, scan = minor(settings, bare, space, session, share, slot_every)
                    yield whole.cost_row(f"minor, {where}", MOST_RATIO, MOST_EXTRA_NS)
                    yield scan.told_row(f"minor beside the loop alone, {where}")

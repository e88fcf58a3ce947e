# SPDX-License-Identifier: MIT
"""What each remedy adds to a collect, where the kernel or the kind of memory needs it.

Two sessions over memory of the same kind and size, with the remedy and without, collect after the same writes, in turn.
A remedy is one entry of REMEDIES.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import dirtytrack

from .bare import PAGE, Bare, address_of
from .harness import MIB, Row, Settings, paired, scattered, show_bytes

NBYTES = 256 * MIB
SHARES = (0.0, 0.01, 0.1, 1.0)
ABSENT, NO_ABSENT, NO_LOST = 1, 2, 4  # `enum dt_remedy` in csrc/dirtytrack.h


@dataclass(frozen=True)
class Side:
    """How a session is opened and what it tracks."""

    remedy: int = 0
    events: bool = False
    shared: bool = False
    arm: str | None = None


REMEDIES: dict[str, tuple[Side, Side]] = {  # with, without
    "R1, private memory": (Side(ABSENT), Side(NO_ABSENT)),
    "R2, shared memory": (Side(shared=True), Side(NO_LOST, shared=True)),
    'arm="present"': (Side(arm="present"), Side(arm="all")),
    "events=True": (Side(events=True), Side()),
}


@contextmanager
def tracked(bare: Bare, side: Side, nbytes: int) -> Iterator[tuple[int, dirtytrack.DirtyTracker]]:
    """(address, tracker) of populated memory."""
    memory = dirtytrack.allocate(nbytes, shared=side.shared, name="benchmark")
    bare.populate(address_of(memory), nbytes)
    with dirtytrack.UffdSession(events=side.events, _remedy=side.remedy) as session:
        session.register(memory, arm=side.arm, blind_spots="accepted")
        with dirtytrack.DirtyTracker(session, exact=True) as tracker:
            yield address_of(memory), tracker


def collecting(tracker: dirtytrack.DirtyTracker, pages: array[int]) -> Callable[[], int]:
    clock = time.perf_counter_ns

    def collect() -> int:
        begin = clock()
        dirty = tracker.collect()
        elapsed = clock() - begin
        assert dirty.page_count == len(pages)
        return elapsed

    return collect


def remedies(settings: Settings, bare: Bare) -> Iterator[Row]:
    """A collect with each remedy against one without it, on the same kind of memory; no targets."""
    nbytes = settings.sizes(NBYTES)[-1]
    for name, sides in REMEDIES.items():
        managers: list[AbstractContextManager[tuple[int, dirtytrack.DirtyTracker]]]
        managers = [tracked(bare, side, nbytes) for side in sides]
        with managers[0] as (address, tracker), managers[1] as (other_address, other):
            for share in SHARES:
                pages = scattered(nbytes // PAGE, share)

                def prepare(
                    pages: array[int] = pages, address: int = address, other_address: int = other_address
                ) -> None:
                    bare.write(address, pages)
                    bare.write(other_address, pages)

                tracker.collect(), other.collect()
                pair = paired(settings, prepare, collecting(tracker, pages), collecting(other, pages))
                yield pair.told_row(f"{name}, {show_bytes(nbytes)}, {share:.4g} dirty")

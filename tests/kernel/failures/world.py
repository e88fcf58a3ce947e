# SPDX-License-Identifier: MIT
"""What the tests of failures share: a session that must be usable after each of them, and memory that nobody holds."""

from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import os

import dirtytrack
from dirtytrack import DirtyTracker, Memory, UffdSession
from tests import oracle
from tests.oracle import PAGE

PAGES = 16
MAP_HUGETLB, MAP_NORESERVE = 0x40000, 0x4000
HUGE_BYTES = 2 << 20


def write(memory: Memory, page: int) -> None:
    memory[page * PAGE] ^= 0xFF


def map_raw(pages: int, at: int = 0, flags: int = 0) -> int:
    """The address of new private memory that nobody holds."""
    return oracle.map_at(at, pages * PAGE, extra=flags)


def map_huge() -> int:
    """The address of a hugetlb page's mapping; takes no huge page, as long as nothing touches it."""
    return map_raw(HUGE_BYTES // PAGE, flags=MAP_HUGETLB | MAP_NORESERVE)


def unmap(address: int, pages: int) -> None:
    oracle.unmap(address, pages * PAGE)


def take_the_last_descriptors() -> list[int]:
    held: list[int] = []
    while True:
        try:
            held.append(os.open(os.devnull, os.O_RDONLY))
        except OSError as error:
            assert error.errno == errno.EMFILE
            return held


def take_the_last_mappings() -> None:
    for rights in itertools.cycle((mmap.PROT_READ, 0)):  # so that none is joined to the one before
        try:
            oracle.protect(map_raw(1), PAGE, rights)
        except OSError as error:
            assert error.errno == errno.ENOMEM
            return


class World:
    """A session with one region that is tracked."""

    def __init__(self) -> None:
        self.memory = dirtytrack.allocate(PAGES * PAGE, name="world")
        self.session = UffdSession()
        self.region = self.session.register(self.memory)
        self.tracker = DirtyTracker(self.session, [self.region])
        self.tracker.start()

    def assert_usable(self) -> None:
        """The tracker finds a write, and a new one of the session does; where the test closed it, a new session."""
        closed = self.session.closed
        assert_finds_a_write(self.tracker if self.tracker.epoch and not closed else None)
        assert_finds_a_write(None if closed else DirtyTracker(self.session, [self.region]))


def assert_finds_a_write(tracker: DirtyTracker | None = None) -> None:
    """By this tracker of a world's region, or by a new session."""
    memory: Memory
    if tracker is None:
        memory = dirtytrack.allocate(PAGES * PAGE)
        tracker = DirtyTracker((session := UffdSession()), [session.register(memory)])
    region = tracker.regions[0]
    if not tracker.epoch:
        tracker.start()
        assert not tracker.collect()
    address = region.start + 5 * PAGE
    ctypes.memset(address, ctypes.string_at(address, 1)[0] ^ 0xFF, 1)
    assert 5 in list(tracker.collect().pages(region))

# SPDX-License-Identifier: MIT
"""O_DIRECT reads that are in flight while their memory is collected: really missed, and made right by `in_flight`.

The disk is held up, so that a flight lasts until it is told to land; where that is not possible these are skipped.
A flight within one epoch is in conformance/test_kernel_writes.py. Takes under 1 s of CI's 20 min.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import oracle
from tests.kernel import pressure
from tests.kernel.host import on_disk
from tests.kernel.kinds import Area, some
from tests.kernel.ring import Ring
from tests.kernel.watched import Watched
from tests.oracle import PAGE

PAGES = 4
UNITS = set(range(2, 2 + PAGES))

_libc = ctypes.CDLL(None, use_errno=True)
_libc.pread.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long]

kinds = pytest.mark.parametrize(
    "kind",
    some("private anonymous", "memfd shared", "transparent huge private"),
    ids=str,
)
how = pytest.mark.parametrize("how", ["io_uring", "pread in a thread"])


class SlowFile(NamedTuple):
    fd: int
    go_on: Callable[[], None]


@contextmanager
def flight(how: str, area: Area, slow: SlowFile) -> Iterator[Callable[[], None]]:
    """A read into units 2 to 5 has begun; what is given lets it end, and waits for that."""
    if how == "io_uring":
        with Ring() as ring:
            ring.submit(slow.fd, area.at(2), PAGES * PAGE)

            def land() -> None:
                slow.go_on()
                assert ring.wait() == PAGES * PAGE

            yield land
    else:
        reader = threading.Thread(target=_libc.pread, args=(slow.fd, area.at(2), PAGES * PAGE, 0))
        reader.start()

        def join() -> None:
            slow.go_on()
            reader.join()

        try:
            yield join
        finally:
            join()


@pytest.fixture
def slow_file(tmp_path: Path) -> Iterator[SlowFile]:
    path = on_disk(tmp_path) / "slow"
    path.write_bytes(b"\x66" * PAGES * PAGE)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    os.fsync(fd)
    try:
        with pressure.slow_disk(path) as go_on:
            yield SlowFile(fd, go_on)
    finally:
        os.close(fd)


def taken_by_the_device(area: Area) -> None:
    """The kernel's hold on the pages is a write to each: it shows, and then the pages may be armed again."""
    while area.of_pages(oracle.written(area.address, area.end)) < UNITS:
        assert area.load(5) == b"\x03"


@kinds
@how
def test_the_exact_scan_misses_what_a_device_writes_later(area: Area, how: str, slow_file: SlowFile) -> None:
    area.fill(3)
    with oracle.userfaultfd() as uffd:
        oracle.register(uffd, area.address, area.end)
        oracle.arm(uffd, area.address, area.end)
        with flight(how, area, slow_file) as land:
            taken_by_the_device(area)
            assert area.of_pages(oracle.exact(area.address, area.end)) == UNITS
            assert area.load(2) == area.load(5) == b"\x03", "nothing has arrived: a copy made now would be old"
            land()
            assert area.load(2) == area.load(5) == b"\x66"
            assert oracle.exact(area.address, area.end) == set(), "this kernel sees it: no blind spot any more"


@kinds
@how
def test_a_declared_flight_is_dirty_until_it_has_landed(watched: Watched, how: str, slow_file: SlowFile) -> None:
    area = watched.area
    with watched.session.in_flight((area.at(2), PAGES * PAGE)), flight(how, area, slow_file) as land:
        taken_by_the_device(area)
        for _ in range(2):
            assert watched.collect() == UNITS
        assert area.load(5) == b"\x03"
        land()
    assert area.load(5) == b"\x66"
    assert watched.collect() == UNITS
    assert watched.collect() == set()

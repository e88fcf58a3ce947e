# SPDX-License-Identifier: MIT
"""Ways to change an area's content that the exact scan does not see; for which kinds of memory, and what helps.

Each changes unit 3, or all from there on, of an area that has content.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress

import pytest

from tests import oracle
from tests.kernel.host import NotHere
from tests.kernel.kinds import KINDS, Area, some
from tests.oracle import PAGE

UNIT = 3
NEW = b"\x5a" * 8

_MADV_REMOVE, _MADV_DONTNEED_LOCKED = 9, 24
_KEEP_SIZE_AND_PUNCH, _KEEP_SIZE_AND_ZERO = 3, 0x11
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


def alias_of(area: Area) -> Area:
    """Another mapping of shared memory in this process."""
    if area.granule == PAGE:
        at = oracle.remap(area.address, 0, area.nbytes)
    else:  # the kernel duplicates no hugetlb mapping, but root can open what is beneath any
        try:
            fd = os.open(f"/proc/self/map_files/{area.address:x}-{area.end:x}", os.O_RDWR | os.O_CLOEXEC)
        except PermissionError as error:
            raise NotHere(f"a second mapping: {error}") from error
        at = oracle.map_at(0, area.nbytes, fd=fd)
        os.close(fd)
    return Area(at, area.nbytes, area.granule, area.fd)


def store_by_alias(area: Area) -> None:
    alias = alias_of(area)
    alias.store(UNIT, NEW)
    oracle.unmap(alias.address, alias.nbytes)


def store_by_child(area: Area) -> None:
    child = os.fork()
    if not child:
        with suppress(BaseException):
            area.store(UNIT, NEW)
        os._exit(0)
    os.waitpid(child, 0)


def store_by_stranger(area: Area) -> None:
    """A process that has nothing of this one's but the file."""
    program = (
        "import mmap, sys; number, nbytes = map(int, sys.argv[2:]); file = open(sys.argv[1], 'r+b'); "
        "mmap.mmap(file.fileno(), nbytes)[number : number + 8] = b'\\x5a' * 8"
    )
    path = f"/proc/{os.getpid()}/fd/{area.fd}"
    numbers = str(UNIT * area.granule + 8), str(area.nbytes)
    subprocess.run([sys.executable, "-S", "-c", program, path, *numbers], check=True, timeout=60)


def write_to_file(area: Area) -> None:
    assert os.pwrite(area.fd, NEW, UNIT * area.granule + 8) == len(NEW)


def fallocate(area: Area, mode: int, units: int = 1) -> None:
    done = _libc.fallocate(area.fd, mode, UNIT * area.granule, units * area.granule)
    assert done == 0, os.strerror(ctypes.get_errno())


def punch(area: Area, units: int = 1) -> None:
    fallocate(area, _KEEP_SIZE_AND_PUNCH, units)


def zero_range(area: Area) -> None:
    fallocate(area, _KEEP_SIZE_AND_ZERO)


def punch_and_look(area: Area) -> None:
    punch(area)
    assert area.load(UNIT) == b"\0"


def remove(area: Area) -> None:
    oracle.discard(area.at(UNIT), area.granule, _MADV_REMOVE)


def discard(area: Area) -> None:
    oracle.discard(area.at(UNIT), area.granule)


def discard_locked(area: Area) -> None:
    oracle.discard(area.at(UNIT), area.granule, _MADV_DONTNEED_LOCKED)


def truncate_and_grow(area: Area) -> None:
    os.ftruncate(area.fd, UNIT * area.granule)
    os.ftruncate(area.fd, area.nbytes)


Way = Callable[[Area], None]
SHARED_FILES = ("memfd shared", "tmpfs file", "disk file shared", "overlay file shared")
PRIVATE_FILES = ("memfd private", "disk file private", "overlay file private")
ALL_SHARED = tuple(kind.name for kind in KINDS if kind.shared)

# Only declaring such a write helps: no page table of this process ever knew.
UNDECLARED: dict[str, tuple[Way, tuple[str, ...]]] = {
    "a store through another mapping": (store_by_alias, ALL_SHARED),
    "a store by a forked child": (store_by_child, ALL_SHARED),
    "a store by another process": (store_by_stranger, (*SHARED_FILES, "hugetlb memfd")),
    "write(2) to the file": (write_to_file, (*SHARED_FILES, "transparent huge shared")),
    "a hole punched, and looked at": (punch_and_look, (*SHARED_FILES, "hugetlb memfd")),
}
# The file, beneath private pages that were never written.
BENEATH: dict[str, Way] = {"write(2) to the file": write_to_file, "a hole punched": punch}

# Remedies look for these, after the scan, which misses them.
DISCARDS: dict[str, tuple[Way, tuple[str, ...]]] = {
    "MADV_DONTNEED": (discard, (*PRIVATE_FILES, "hugetlb private")),
    "MADV_DONTNEED_LOCKED": (discard_locked, (*PRIVATE_FILES, "hugetlb private")),
    "MADV_REMOVE": (remove, (*SHARED_FILES, "shared anonymous", "System V", "hugetlb shared", "hugetlb memfd")),
    "a hole punched": (punch, (*SHARED_FILES, "hugetlb memfd")),
    "a range zeroed": (zero_range, ("disk file shared",)),
    "truncated and grown again": (truncate_and_grow, (*SHARED_FILES, *PRIVATE_FILES)),
}


def rows(table: dict[str, tuple[Way, tuple[str, ...]]]) -> pytest.MarkDecorator:
    cases = [
        pytest.param(kind, way, id=f"{name}-{kind}") for name, (way, kinds) in table.items() for kind in some(*kinds)
    ]
    return pytest.mark.parametrize(("kind", "way"), cases)

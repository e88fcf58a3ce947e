# SPDX-License-Identifier: MIT
"""Advice about memory: what discards it is reported, what leaves it alone is not, on every kind.

Discards that only remedies find (of private files, of holes in shared memory) are in the tests of the remedies and in
test_unseen.py. Takes about 2 s of CI's 20 min.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

import pytest

from tests import oracle
from tests.kernel.kinds import KINDS, Area, Kind, some
from tests.kernel.watched import Watched

UNIT = 3
DONTNEED, FREE, COLD, PAGEOUT, POPULATE_READ, POPULATE_WRITE, DONTNEED_LOCKED = 4, 8, 20, 21, 22, 23, 24
NORMAL, RANDOM, SEQUENTIAL, WILLNEED, NOHUGEPAGE, UNMERGEABLE, DODUMP, DOFORK = 0, 1, 2, 3, 15, 13, 17, 11

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mlock.argtypes = _libc.munlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 3, ctypes.c_char_p]

ANONYMOUS = [kind for kind in KINDS if kind.backing == "anonymous"]
SHARED = [kind for kind in KINDS if kind.shared and kind.backing in ("shmem", "file")]
on_every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
anonymous = pytest.mark.parametrize("kind", ANONYMOUS, ids=str)


def advise(area: Area, advice: int, units: range | None = None) -> bool:
    """Whether the kernel takes such advice for this memory."""
    chosen = range(area.units) if units is None else units
    try:
        oracle.discard(area.at(chosen.start), len(chosen) * area.granule, advice)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EFAULT, errno.EPERM):
            raise
        return False
    return True


ONE = range(UNIT, UNIT + 1)
HARMLESS = {
    "normal": NORMAL,
    "random": RANDOM,
    "sequential": SEQUENTIAL,
    "will need": WILLNEED,
    "cold": COLD,
    "populate, to read": POPULATE_READ,
    "no huge pages": NOHUGEPAGE,
    "not to be merged": UNMERGEABLE,
    "part of a core dump": DODUMP,
    "inherited by children": DOFORK,
}


@on_every_kind
@pytest.mark.parametrize("advice", HARMLESS)
def test_advice_that_changes_nothing_is_no_write(kind: Kind, watched: Watched, advice: str) -> None:
    taken = advise(watched.area, HARMLESS[advice])
    assert taken or kind.name != "private anonymous", "which takes all of them"
    assert watched.collect() == set()
    watched.area.store(UNIT)
    assert watched.collect() == {UNIT}, "armed all the while"


@on_every_kind
@pytest.mark.parametrize("advice", [POPULATE_WRITE, None], ids=["populate, to write", "lock"])
def test_advice_that_writes_is_reported_at_most_as_a_write(kind: Kind, watched: Watched, advice: int | None) -> None:
    """EXTRA: every page may be reported, none is lost, and afterwards all is exact again."""
    area = watched.area
    area.store(1, b"\x31")
    if advice is None:
        locked = _libc.mlock(area.address, area.nbytes) == 0
        assert locked or not kind.pinnable
    else:
        assert advise(area, advice) or not kind.pinnable
    assert watched.collect() >= {1}
    if advice is None:
        _libc.munlock(area.address, area.nbytes)
        assert watched.collect() == set()
    area.store(UNIT)
    assert watched.collect() == {UNIT}


# ---- discards -------------------------------------------------------------------------------------------------------


@anonymous
@pytest.mark.parametrize("advice", [DONTNEED, DONTNEED_LOCKED], ids=["dontneed", "dontneed_locked"])
@pytest.mark.parametrize("looked_at", [False, True])
def test_discarded_anonymous_pages_are_reported(area: Area, advice: int, looked_at: bool) -> None:
    """Also where the page was read since, and is the zero page now."""
    area.fill(3)
    with Watched(area, compare=looked_at) as watched:
        assert advise(area, advice, ONE)
        if looked_at:
            assert area.load(UNIT) == b"\0"
            assert oracle.categories(area.at(UNIT), area.at(UNIT + 1))[0] & oracle.PFNZERO
        assert watched.collect() == {UNIT}
        area.store(UNIT)
        assert watched.collect() == {UNIT}
        assert watched.collect() == set()


@anonymous
def test_a_dirty_page_that_is_discarded_is_reported_once(watched: Watched) -> None:
    watched.area.store(UNIT)
    assert advise(watched.area, DONTNEED, ONE)
    assert watched.collect() == {UNIT}
    assert watched.collect() == set()


@anonymous
@pytest.mark.parametrize("collected_between", [False, True])
def test_freed_pages_are_reported_when_they_are_reclaimed(watched: Watched, collected_between: bool) -> None:
    """MADV_FREE: the bytes stay until the kernel wants the page; a store takes the advice back."""
    area = watched.area
    assert advise(area, FREE)
    if collected_between:
        assert watched.collect() == set(), "nothing has changed yet"
    area.store(UNIT, b"\x77")
    assert advise(area, PAGEOUT)
    gone = {unit for unit in range(area.units) if area.load(unit) == b"\0"}
    assert UNIT not in gone, "that one was wanted after all"
    assert watched.collect() >= gone | {UNIT}
    area.store(1)
    assert watched.collect() == {1}


@pytest.mark.parametrize("kind", SHARED, ids=str)
@pytest.mark.parametrize("advice", [DONTNEED, PAGEOUT, COLD], ids=["dontneed", "pageout", "cold"])
def test_a_discard_that_keeps_the_content_of_shared_memory_loses_nothing(watched: Watched, advice: int) -> None:
    area = watched.area
    area.store(1)
    assert advise(area, advice)
    assert watched.collect() >= {1}
    watched.collect()
    area.store(UNIT)
    assert watched.collect() >= {UNIT}
    assert watched.collect() == set()


@pytest.mark.parametrize("kind", SHARED, ids=str)
def test_the_exact_scan_knows_that_shared_memory_keeps_its_content(area: Area) -> None:
    area.fill(3)
    with oracle.userfaultfd() as uffd:
        oracle.register(uffd, area.address, area.end)
        oracle.arm(uffd, area.address, area.end)
        assert advise(area, DONTNEED)
        assert oracle.exact(area.address, area.end) == set()
        assert area.load(UNIT) == b"\x03"
        area.store(UNIT)
        assert oracle.exact(area.address, area.end) == {UNIT}


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", some("disk file shared", "disk file private", "tmpfs file", "memfd shared"), ids=str)
@pytest.mark.parametrize("how", ["msync", "fsync", "fadvise"])
def test_writing_a_file_back_is_no_write_to_memory(watched: Watched, how: str) -> None:
    area = watched.area
    for unit in (1, 2):
        area.store(unit)
        if how == "msync":
            oracle.synchronise(area.address, area.nbytes)
        else:
            os.fsync(area.fd)
        if how == "fadvise":
            os.posix_fadvise(area.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert watched.collect() == {unit}, "written back, and dirty for us still"
        oracle.synchronise(area.address, area.nbytes)
        assert watched.collect() == set()


def test_a_name_is_no_write(tmp_path: Path) -> None:
    [kind] = some("private anonymous")
    with kind.map(8, tmp_path) as area, Watched(area) as watched:
        _libc.prctl(0x53564D41, 0, area.address, area.nbytes, b"a name")
        assert watched.collect() == set()
        area.store(1)
        assert watched.collect() == {1}

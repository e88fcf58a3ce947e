# SPDX-License-Identifier: MIT
"""Guard pages (MADV_GUARD_INSTALL, Linux 6.13) in memory that is tracked: where that hangs, and what trackers say else.

Over an armed page of a file or of shared memory the call spins in the kernel. Should that test fail one day, that
kernel has mended it: then `GuardPageWarning` and the doctor's line can be taken back for it. Whatever may hang is done
in a process of its own. Takes about 3 s of CI's 20 min.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dirtytrack import PageCategory, probe
from dirtytrack.cli.doctor_apart import Job, run_apart
from tests import oracle
from tests.kernel.host import NotHere
from tests.kernel.kinds import KINDS, Area, Kind
from tests.kernel.watched import Watched
from tests.oracle import PAGE

INSTALL, REMOVE = 102, 103
UNIT = 3
TICKS = os.sysconf("SC_CLK_TCK")

GUARDABLE = [kind for kind in KINDS if kind.granule == PAGE and kind.backing != "secret" and not kind.kept]
SPINS = [kind for kind in GUARDABLE if kind.backing != "anonymous"]


@pytest.fixture(autouse=True)
def _guard_pages() -> None:
    if not probe().categories & PageCategory.GUARD:
        raise NotHere("this kernel has no guard pages, or reports none (Linux 6.15)")


def has_guard(area: Area, unit: int) -> bool:
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        guard = PageCategory.GUARD
        return bool(oracle.scan_once(fd, area.at(unit), area.at(unit + 1), mask=guard, returned=guard))
    finally:
        os.close(fd)


# ---- where it hangs -------------------------------------------------------------------------------------------------


def armed_and_guarded(area: Area, say: Callable[[bytes], object]) -> None:
    with oracle.userfaultfd() as uffd:
        oracle.register(uffd, area.address, area.end)
        oracle.arm(uffd, area.address, area.end)
        say(b"armed")
        oracle.discard(area.at(UNIT), PAGE, INSTALL)
        say(b"returned")


def system_ticks(pid: int) -> int:
    """Processor time that a process has spent in the kernel."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[12])


@pytest.mark.parametrize("kind", SPINS, ids=str)
@pytest.mark.parametrize("populated", [True, False], ids=["a page", "a marker"])
def test_over_an_armed_page_it_spins_until_the_process_is_killed(area: Area, populated: bool) -> None:
    """Armed pages that have content, and the markers of armed pages that have none in the page table."""
    if populated:
        area.fill(3)
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        with suppress(BaseException):
            if populated:
                area.content()  # into the child's own page table
            armed_and_guarded(area, lambda word: os.write(writes, word))
        os._exit(0)
    os.close(writes)
    try:
        assert os.read(reads, 100) == b"armed"
        before, end = system_ticks(child), time.monotonic() + 30
        while system_ticks(child) < before + TICKS // 10:
            ended = select.select([reads], [], [], 0.01)[0]
            assert not ended, f"it ended, saying {os.read(reads, 100)!r}: this kernel has mended it"
            assert time.monotonic() < end, "neither did it return, nor did it spin"
    finally:
        os.kill(child, signal.SIGKILL)
        began = time.monotonic()
        _, status = os.waitpid(child, 0)
        os.close(reads)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert time.monotonic() - began < 10, "that ends it at once"


# ---- where it does not ----------------------------------------------------------------------------------------------


def told_by_a_tracker(area: Area, *, dirty: bool) -> dict[str, Any]:
    """What a tracker says of a page that becomes a guard page and is none any more, epoch by epoch."""
    area.fill(3)
    with Watched(area, compare=False) as watched:
        watched.collect()
        if dirty:
            area.store(UNIT)
        oracle.discard(area.at(UNIT), PAGE, INSTALL)
        guarded = has_guard(area, UNIT)
        told = [sorted(watched.collect()), sorted(watched.collect())]
        area.store(UNIT + 1)
        told.append(sorted(watched.collect()))
        still = has_guard(area, UNIT)
        oracle.discard(area.at(UNIT), PAGE, REMOVE)
        told += [sorted(watched.collect()), sorted(watched.collect())]
        content = area.load(UNIT)[0]
        area.store(UNIT)
        told.append(sorted(watched.collect()))
    return {"guarded": [guarded, still], "told": told, "content": content}


def assert_told(kind: Kind, area: Area, *, dirty: bool) -> None:
    [found] = run_apart([Job(lambda: told_by_a_tracker(area, dirty=dirty), 20)])
    assert "failed" not in found
    assert found["guarded"] == [True, True], "and arming does not take it away"
    put_in, taken_out, stored = [UNIT], [UNIT], [UNIT]
    assert found["told"] == [put_in, [], [UNIT + 1], taken_out, [], stored]
    assert found["content"] == (7 if kind.shared else 1 if kind.private_file else 0), "what is private is gone"


@pytest.mark.parametrize("kind", GUARDABLE, ids=str)
def test_over_a_dirty_page_it_returns_and_the_page_is_dirty(kind: Kind, area: Area) -> None:
    assert_told(kind, area, dirty=True)


@pytest.mark.parametrize("kind", [kind for kind in GUARDABLE if kind.backing == "anonymous"], ids=str)
def test_over_an_armed_page_of_private_anonymous_memory_it_returns_too(kind: Kind, area: Area) -> None:
    assert_told(kind, area, dirty=False)

# SPDX-License-Identifier: MIT
"""The core's allocations and kernel calls fail on purpose, one by one: nothing is lost, nothing leaks.

Takes 30 s of CI's 20 min.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import dirtytrack
from dirtytrack import DirtySet, DirtyTracker, Region, RegionGone, UffdSession
from tests.asked import EMULATED, SANITIZED, SOAK, fewer
from tests.kernel import injected
from tests.kernel.injected import FAILURES, LOW, OPERATIONS, VARIANTS, World
from tests.opened import descriptors
from tests.oracle import PAGE
from tests.sandbox import failing

Operation = Callable[[World], None]
DO_NOT_FAIL = {"declare", "put_back", "suspend", "close", "drop"}  # they ask nothing of the kernel that they must have
LOOK_FOR_ABSENT = (injected.collect, injected.collect_into, injected.start, injected.add, injected.stop)

KERNEL_CALLS = (
    *("SCAN", "REGISTER", "UNREGISTER", "PROTECT", "API", "OPEN_USER_MODE", "OPEN_PAGEMAP", "COPY", "MAPS"),
    "OPEN_USER_MODE OPEN_DEVICE OPEN_FULL",
)
ERRNOS = (errno.EPERM, errno.ENOMEM, errno.EFAULT, errno.EINVAL, errno.EIO, errno.EAGAIN, errno.ENOENT)
SOME_ERRNOS = ERRNOS if SOAK else (errno.ENOMEM, errno.EAGAIN)
"""What each variant beside the plain one is tried with: what is undone is the same whatever the kernel's word was."""
PLAIN_ERRNOS = ERRNOS if SOAK else SOME_ERRNOS if EMULATED else (*SOME_ERRNOS, errno.EPERM, errno.EFAULT)


MOST_MAPPINGS = 40  # whoever looks for other mappings asks of each that this process has


def fails_at(sites: str, number: int, after: bool, operation: Operation, *how: Any, times: int = 1) -> Iterator[int]:
    """Fails the first call at these sites, then the second, until the operation makes no more of them."""
    for nth in range(1, MOST_MAPPINGS) if sites == "MAPS" else itertools.count(1):
        world = World(*how)
        failed = False
        try:
            with failing(*sites.split(), number=number, nth=nth, times=times, after=after) as calls:
                operation(world)
        except RegionGone as gone:
            failed = gone.region is None or gone.region is not world.lost
        except FAILURES:
            failed = True
        world.verify()
        world.close()
        assert failed <= (calls.seen >= nth), "failed by itself"
        if calls.seen < nth:
            return
        yield nth


def cases(*how: Any, operation: Operation) -> int:
    gc.collect()
    before = len(descriptors()), mapping_count()
    done = sum(1 for _ in fails_at("ALLOCATE", errno.ENOMEM, False, operation, *how))
    for sites in KERNEL_CALLS:
        for number in PLAIN_ERRNOS if how[0] == "plain" else SOME_ERRNOS:
            if (sites, number) == ("MAPS", errno.ENOENT):
                continue  # the kernel's word for "nothing is mapped there"
            for after in (False, True):
                try:
                    for _ in fails_at(sites, number, after, operation, *how):
                        done += 1
                        assert done < 5000
                except Exception as error:
                    error.args = (f"{sites} {errno.errorcode[number]} after={after}: {error}",)
                    raise
    gc.collect()
    assert len(descriptors()) == before[0]
    assert mapping_count() <= before[1] + 4
    return done


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_call_of_an_operation_fails_once(operation: Operation, variant: str) -> None:
    done = cases(variant, operation=operation)
    assert done or operation.__name__ in DO_NOT_FAIL or variant == "suspended"


@pytest.mark.parametrize(
    "operation", [each for each in OPERATIONS if each is not injected.scan], ids=lambda each: each.__name__
)
@pytest.mark.parametrize(
    ("variant", "backend"),
    [
        ("plain", "compare"),
        *(pytest.param(variant, "compare", marks=pytest.mark.soak) for variant in VARIANTS if variant != "plain"),
        pytest.param("plain", "compare-hashes", marks=pytest.mark.soak),
    ],
)
def test_each_call_of_an_operation_fails_once_where_memory_is_compared(
    operation: Operation, variant: str, backend: str
) -> None:
    done = cases(variant, 0, 1, backend, operation=operation)
    assert done or operation.__name__ in DO_NOT_FAIL | {"unregister", "resume"} or variant == "suspended"


@pytest.mark.parametrize("operation", injected.OF_ITS_OWN, ids=lambda operation: operation.__name__)
def test_each_call_fails_once_on_other_kinds_of_memory(operation: Operation) -> None:
    assert cases("plain", operation=operation)


@pytest.mark.parametrize("operation", LOOK_FOR_ABSENT, ids=lambda operation: operation.__name__)
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_call_of_an_operation_fails_once_where_absent_pages_are_looked_for(
    operation: Operation, variant: str
) -> None:
    assert cases(variant, 1, operation=operation) or variant == "suspended"


@pytest.mark.parametrize("sites", ["SCAN", "ALLOCATE"])
def test_a_collect_of_many_scans_fails_midway(sites: str) -> None:
    """More runs than one scan can tell, so that a later scan fails when earlier ones have taken their pages."""
    pages = 20_000
    memory = dirtytrack.allocate(pages * PAGE)
    with UffdSession() as session:
        region = session.register(memory)
        first, second = (DirtyTracker(session, exact=True) for _ in range(2))
        first.start()
        second.start()
        expected = list(range(0, pages, 2))
        for number, after in ((errno.EPERM, False), (errno.EPERM, True), (errno.EFAULT, True), (errno.EIO, True)):
            for nth in (1, 2):
                for page in expected:
                    memory[page * PAGE] ^= 1
                try:
                    with failing(sites, number=number, nth=nth, after=after) as calls:
                        found = first.collect()
                except FAILURES:
                    found = first.collect()
                assert calls.seen >= nth or sites == "ALLOCATE"
                assert set(expected) <= set(found.pages(region))
                assert set(expected) <= set(second.collect().pages(region)), "another listener lost them"


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_from_each_call_on_all_fail_and_then_no_more(operation: Operation) -> None:
    """What undoes a failed step fails too."""
    sites = (
        ("ALLOCATE", errno.ENOMEM),
        ("SCAN", errno.EPERM),
        ("SCAN", errno.EIO),
        ("ALLOCATE REGISTER UNREGISTER PROTECT SCAN MAPS COPY", errno.EIO),
        ("OPEN_USER_MODE OPEN_DEVICE OPEN_FULL OPEN_PAGEMAP API", errno.EMFILE),
    )
    for variant in VARIANTS:
        for site, number in sites:
            for nth in fails_at(site, number, False, operation, variant, times=0):
                assert nth < 200


# ---- leaks ----------------------------------------------------------------------------------------------------------


def mapping_count() -> int:
    if SANITIZED:
        return 0  # it maps as it likes
    return Path("/proc/self/maps").read_text().count("\n")


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks"]]
    _fields_ += [(name, ctypes.c_size_t) for name in ["fsmblks", "uordblks", "fordblks", "keepcost"]]


def heap_bytes() -> int:
    """In use, of the C library's heap: the core's, and a part of Python's; 0 where it does not tell."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except AttributeError:  # before glibc 2.33
        return 0
    mallinfo2.restype = _Mallinfo2
    told = mallinfo2()
    return int(told.uordblks + told.hblkhd)


def failing_calls(world: World, count: int) -> None:
    """Calls until so many have failed; what succeeds is undone."""
    tracker, session = world.first.tracker, world.session
    mirror = bytearray(len(LOW) * PAGE)
    some = (world.base + 6 * PAGE, PAGE)
    ways: list[tuple[str, int, Callable[[], object]]] = [
        ("API", errno.EINVAL, UffdSession),
        ("OPEN_PAGEMAP", errno.EMFILE, UffdSession),
        ("SCAN", errno.ENOTTY, UffdSession),
        ("REGISTER", errno.ENOMEM, lambda: session.register(some)),
        ("REGISTER", errno.EBUSY, lambda: dirtytrack.track(some, session=session)),
        ("REGISTER", errno.EIO, lambda: tracker.add(some)),
        ("PROTECT", errno.EIO, lambda: tracker.add(world.spare)),
        ("PROTECT", errno.ENOMEM, lambda: DirtyTracker(session, [world.spare]).start()),
        ("SCAN", errno.EIO, tracker.collect),
        ("SCAN", errno.EIO, tracker.peek),
        ("SCAN", errno.EIO, lambda: tracker.remove(world.high)),
        ("SCAN", errno.EIO, tracker.stop),
        ("COPY", errno.EFAULT, lambda: world.second.tracker.collect_into(mirror)),
        ("MAPS", errno.EIO, lambda: session.register(some)),
    ]
    ways += [("ALLOCATE", errno.ENOMEM, call) for _, _, call in ways]
    failed = 0
    for i in itertools.count():
        if failed == count:
            return
        sites, number, call = ways[i % len(ways)]
        ctypes.memset(world.base + (i % 20) * PAGE, i & 0xFF, 1)
        nth = 1 + i // len(ways) % 2 if sites == "ALLOCATE" else 1
        times = 0 if sites == "ALLOCATE" else 1
        try:
            with failing(sites, number=number, nth=nth, times=times):
                result = call()
        except FAILURES:
            failed += 1
            continue
        if not tracker.epoch:
            tracker.start()
        elif world.high not in tracker.regions:
            tracker.add(world.high)
        if isinstance(result, DirtySet):
            tracker.put_back(result)
            world.second.tracker.put_back(result)
        elif isinstance(result, Region):
            if result in tracker.regions:
                tracker.put_back(tracker.remove(result))
            if result is not world.spare:
                session.unregister(result)
        del result


def test_ten_thousand_failing_calls_leak_nothing() -> None:
    world = World()
    failing_calls(world, 1000)  # what is allocated once and kept
    gc.collect()
    world.verify()
    before = len(descriptors()), mapping_count()
    heap = heap_bytes()
    failing_calls(world, fewer(10_000))
    gc.collect()
    grown = heap_bytes() - heap
    assert len(descriptors()) == before[0]
    assert mapping_count() <= before[1] + 4
    if not SANITIZED:  # its heap does not tell
        assert grown < 100_000, "ten bytes a call"
    world.verify()
    world.close()

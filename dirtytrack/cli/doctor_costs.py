# SPDX-License-Identifier: MIT
"""What tracking costs on this machine, measured in well under a second, on throw-away memory in a child process."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator
from contextlib import closing
from time import perf_counter_ns
from typing import Any, NamedTuple

from .. import CompareSession, DirtyTracker, PageCategory, Pagemap, UffdSession, allocate
from ..kernel.baseline import replay
from ..kernel.core import PAGE_BYTES
from ..memory import Memory
from .doctor_apart import Job, run_apart

__all__ = ["Cost", "compare_costs", "costs", "instead"]

_ROUNDS = 3  # the cheapest of so many is what counts
_RESERVED_BYTES, _TAKEN_BYTES = 1 << 30, 128 << 20
_COMPARED_BYTES = 64 << 20


class Cost(NamedTuple):
    """One thing's cost, or why there is none."""

    name: str
    unit: str
    measured: float | None
    """In that unit; None where it could not be measured."""
    why_not: str = ""


class _Stores:
    """One store to each page, by one loop in C."""

    def __init__(self, memory: Memory, stride_bytes: int = PAGE_BYTES) -> None:
        self._memory = memory
        self.count = memory.nbytes // stride_bytes
        self._spans = array("Q", [number for i in range(self.count) for number in (i * stride_bytes, 1)])
        self._data = bytes(self.count)

    def __call__(self) -> int:
        begin = perf_counter_ns()
        replay(self._memory, self._spans, self._data)
        return perf_counter_ns() - begin


def _first_stores_and_idle_scans() -> dict[str, Any]:
    pages = 8192
    with UffdSession() as session, closing(allocate(pages * PAGE_BYTES)) as memory:
        stores = _Stores(memory)
        stores()
        region = session.register(memory)
        tracker = DirtyTracker(session)
        tracker.start()
        first, again, idle = [], [], []
        for _ in range(_ROUNDS):
            first.append(stores())
            again.append(stores())
            if tracker.collect().page_count != pages:
                raise AssertionError("a store was not reported")
            begin = perf_counter_ns()
            tracker.collect()
            idle.append(perf_counter_ns() - begin)
        tracker.stop()
        session.unregister(region)
    return {"fault": (min(first) - min(again)) / pages, "idle": min(idle) / pages}


def _splits() -> dict[str, Any]:
    with UffdSession() as session, closing(allocate(16 << 20, huge="transparent")) as memory:
        _Stores(memory)()
        with Pagemap() as pagemap:
            huge = PageCategory.HUGE
            end = memory.address + memory.nbytes
            found = pagemap.scan(memory.address, end, category_mask=huge, return_mask=huge)
            nbytes = sum(found.page_regions[i, 1] - found.page_regions[i, 0] for i in range(len(found)))
        if nbytes < memory.nbytes:
            raise LookupError("the kernel gave no transparent huge page")
        region = session.register(memory)
        tracker = DirtyTracker(session)
        tracker.start()
        stores = _Stores(memory, memory.page_bytes)
        took = stores()
        tracker.stop()
        session.unregister(region)
    return {"split": took / stores.count / 1000}


def _fork_ns() -> int:
    begin = perf_counter_ns()
    child = os.fork()
    if not child:
        os._exit(0)
    took = perf_counter_ns() - begin
    os.waitpid(child, 0)
    return took


def _forks() -> dict[str, Any]:
    with UffdSession() as session, closing(allocate(_RESERVED_BYTES)) as memory:
        _Stores(memory, memory.nbytes)()  # what was never touched at all is not copied by fork()
        without = min(_fork_ns() for _ in range(_ROUNDS))
        region = session.register(memory, arm="all")
        tracker = DirtyTracker(session)
        tracker.start()
        markers = min(_fork_ns() for _ in range(_ROUNDS))
        tracker.stop()
        session.unregister(region)
    return {"fork": without / 1000, "fork with markers": markers / 1000}


def _comparing() -> dict[str, Any]:
    found: dict[str, Any] = {}
    with closing(allocate(_COMPARED_BYTES)) as memory:
        memory[:] = b"\1" * memory.nbytes
        for name, hashes in (("compare", False), ("compare-hashes", True)):
            with CompareSession(hashes=hashes) as session:
                region = session.register(memory)
                tracker = DirtyTracker(session)
                tracker.start()
                took = []
                for number in range(_ROUNDS):
                    memory[number * PAGE_BYTES] ^= 1
                    begin = perf_counter_ns()
                    dirty = tracker.collect()
                    took.append(perf_counter_ns() - begin)
                    if dirty.page_count != 1:
                        raise AssertionError("a change was not reported")
                gibs = memory.nbytes / (1 << 30)
                found[name] = min(took) / 1e6 / gibs
                found[f"{name} kept"] = session.kept_bytes / (1 << 20) / gibs
                tracker.stop()
                session.unregister(region)
    return found


def _too_little() -> dict[str, Any]:
    raise MemoryError(f"less than {_TAKEN_BYTES >> 20} MiB left in the memory cgroup")


_Plan = tuple[tuple[Callable[[], dict[str, Any]], tuple[tuple[str, str, str], ...]], ...]


def costs(room_bytes: int | None = None) -> Iterator[Cost]:
    """Measure what tracking costs.

    Args:
        room_bytes: what the memory cgroup leaves, or None. Where that is little, nothing is measured: beyond it the
            kernel kills.
    """
    plan: _Plan = (
        (_first_stores_and_idle_scans, (("fault", "first store to an armed page", "ns"),
                                        ("idle", "idle collect, a page", "ns"))),
        (_splits, (("split", "first store to an armed transparent huge page, which splits it", "µs"),)),
        (_forks, (("fork", "fork() of this process", "µs"),
                  ("fork with markers", "the same with 1 GiB armed, of which one page was touched", "µs"))),
    )  # fmt: skip
    yield from _measured(plan, room_bytes)


def compare_costs(room_bytes: int | None = None) -> Iterator[Cost]:
    """Measure what `CompareSession` costs, whether tracking works or not; the argument is as of `costs`."""
    plan: _Plan = (
        (_comparing, (("compare", 'backend="compare", a collect of 1 GiB', "ms"),
                      ("compare kept", "memory that it takes for 1 GiB", "MiB"),
                      ("compare-hashes", 'backend="compare-hashes", a collect of 1 GiB', "ms"),
                      ("compare-hashes kept", "memory that it takes for 1 GiB", "MiB"))),
    )  # fmt: skip
    yield from _measured(plan, room_bytes)


def instead(found: list[dict[str, Any]]) -> str:
    """What to do where tracking does not work, with its price in these costs."""
    price = [f"{cost['measured']:,.0f} {cost['unit']}" for cost in found if cost["measured"] is not None]
    told = 'none of these: track(..., backend="compare") compares all of the memory with a copy at each collect'
    if len(price) < 4:
        return f'{told}; backend="compare-hashes" with hashes'
    return (
        f'{told}, here {price[0]} a GiB, and takes {price[1]} for it; backend="compare-hashes" compares with hashes, '
        f"{price[2]} and {price[3]}"
    )


def _measured(plan: _Plan, room_bytes: int | None) -> Iterator[Cost]:
    if room_bytes is not None and room_bytes < _TAKEN_BYTES:
        jobs = [Job(_too_little)] * len(plan)
    else:
        jobs = [Job(measure) for measure, _ in plan]
    try:
        results = list(run_apart(jobs))
    except OSError as error:  # no descriptor or process is left
        results = [{"failed": f"{type(error).__name__}: {error}"}] * len(plan)
    for (_, told), found in zip(plan, results, strict=True):
        for key, name, unit in told:
            value = found.get(key)
            yield Cost(name, unit, None if value is None else round(value, 1), str(found.get("failed", "")))

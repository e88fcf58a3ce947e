# SPDX-License-Identifier: MIT
"""Object graphs under any sequence of stores and collections: what is reachable is kept, what is not is freed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from examples.heap import Heap
from tests.asked import SOAK
from tests.kernel import host
from tests.kernel.gc.graphs import STORES, Graph, Kind, Store

LENGTHS = st.one_of(st.integers(0, 6), st.sampled_from((60, 300, 700, 1100, 2500)))  # cells, and runs of blocks
KINDS: tuple[Kind, ...] = ("tuple", "tuple", "tuple", "bytes", "array")


class Machine(RuleBasedStateMachine):
    """One thread's graph; how the heap is made is said by the test."""

    options: dict[str, Any]

    @initialize(promote_age=st.integers(0, 2), stress=st.booleans(), adaptive=st.booleans())
    def begin(self, promote_age: int, stress: bool, adaptive: bool) -> None:
        self.stress = stress
        self.heap = Heap(
            eden_bytes=16384,
            survivor_bytes=4096,
            promote_age=promote_age,
            stress=stress,
            adaptive=adaptive,
            verify=True,
            concurrent=False,
            **self.options,
        )
        self.graph = Graph(self.heap)
        self.graph.make("tuple", 4)

    def teardown(self) -> None:
        if hasattr(self, "heap"):
            self.graph.held.clear()
            self.heap.close()

    def held(self, data: st.DataObject, *, tuples: bool = False) -> int | None:
        numbers = [n for n in self.graph.held if not tuples or self.graph.nodes[n].slots]
        return data.draw(st.sampled_from(numbers)) if numbers else None

    # ---- what mutators do

    @rule(kind=st.sampled_from(KINDS), length=LENGTHS)
    def make(self, kind: Kind, length: int) -> None:
        if len(self.graph.held) < 40:
            self.graph.make(kind, length)

    @rule(count=st.sampled_from((20, 400)))
    def make_garbage(self, count: int) -> None:
        for _ in range(20 if self.stress else count):
            self.heap.tuple(0)

    @rule(data=st.data(), how=st.sampled_from(STORES))
    def store(self, data: st.DataObject, how: Store) -> None:
        holder = self.held(data, tuples=True)
        if holder is not None:
            index = data.draw(st.integers(0, len(self.graph.nodes[holder].slots) - 1))
            value = data.draw(st.none() | st.sampled_from(list(self.graph.held)))
            self.graph.store(holder, index, value, how)

    @rule(data=st.data())
    def follow(self, data: st.DataObject) -> None:
        holder = self.held(data, tuples=True)
        if holder is not None:
            filled = [i for i, slot in enumerate(self.graph.nodes[holder].slots) if slot is not None]
            if filled:
                self.graph.follow(holder, data.draw(st.sampled_from(filled)))

    @precondition(lambda self: len(self.graph.held) > 1)
    @rule(data=st.data(), share=st.sampled_from((1, 2, 5)))
    def drop(self, data: st.DataObject, share: int) -> None:
        for number in list(self.graph.held)[:: data.draw(st.integers(1, 4))][:share]:
            self.graph.drop(number)

    # ---- what collectors do

    def there(self) -> dict[int, str]:
        found: dict[int, str] = {}
        for each in self.heap.objects():
            number = each.first >> 1 if each.kind == "tuple" else each.first
            if number:  # garbage has 0
                assert number not in found, f"object {number} is there twice"
                found[number] = each.generation
        return found

    @rule()
    def minor(self) -> None:
        fulls = self.heap.numbers().fulls
        self.heap.minor()
        there = self.there()
        assert self.graph.reachable() <= set(there)
        if self.heap.numbers().fulls == fulls:  # none was due
            old = [number for number, generation in there.items() if generation == "old"]
            assert set(there) <= self.graph.reachable(*old)  # an old one counts as alive, whether it is or not
        self.graph.forget_freed(there)

    @rule()
    def full(self) -> None:
        self.heap.full()
        there = self.there()
        assert set(there) == self.graph.reachable()
        assert len(self.heap.objects()) == len(there)
        self.graph.forget_freed(there)

    @rule()
    def cycle(self) -> None:
        assert self.heap.cycle()
        there, reachable = self.there(), self.graph.reachable()
        assert reachable <= set(there)
        assert {number for number, generation in there.items() if generation == "old"} <= reachable
        self.graph.forget_freed(there)

    @rule()
    def shrink(self) -> None:
        self.heap.shrink()

    @rule()
    def compare(self) -> None:
        self.graph.compare_all()

    @invariant()
    def the_held_are_as_they_should_be(self) -> None:
        if hasattr(self, "graph"):
            for number in list(self.graph.held)[-3:]:
                self.graph.compare(number)


SMALL: dict[str, Any] = {"old_bytes": 4 << 20, "segment_bytes": 512 << 10}
HEAPS: dict[str, dict[str, Any]] = {
    "base": SMALL,
    "transparent": {"huge": "transparent", "old_bytes": 6 << 20, "segment_bytes": 2 << 20},
    "hugetlb": {"huge": "2M", "old_bytes": 6 << 20, "segment_bytes": 2 << 20},
}


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    with ExitStack() as stack:
        if request.param == "hugetlb":
            try:
                stack.enter_context(host.machine_lock())
                host.POOLS[host.HUGE_PAGE].ensure(4)
            except host.NotHere as why:
                pytest.skip(str(why))
        yield HEAPS[request.param]


@pytest.mark.timeout(0 if SOAK else 120)
@pytest.mark.parametrize("memory", HEAPS, indirect=True)
def test_what_is_reachable_is_kept_and_all_else_is_freed(memory: dict[str, Any]) -> None:
    class Case(Machine):
        options = memory

    examples = 400 if SOAK else 20 if memory is SMALL else 6
    run_state_machine_as_test(
        Case,
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )

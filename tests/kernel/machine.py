# SPDX-License-Identifier: MIT
"""The state machine that chooses what happens next to a world; the world checks."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

import dirtytrack
from tests.kernel.shadow import EAGER, Listener, Missed, OtherProcess, World
from tests.oracle import PAGE
from tests.strategies import Kind, Mapped, Span, Way, spans, ways

MOST_REGIONS, MOST_LISTENERS = 6, 3


numbers = st.integers(0, 1000)


class Machine(RuleBasedStateMachine):
    """Chooses what happens next; the world checks."""

    kind: Kind | Mapped
    other: OtherProcess | None
    remedy: int = 0
    backend: str = "kernel"
    world: World

    @initialize(populated=st.booleans(), data=st.data())
    def begin(self, populated: bool, data: st.DataObject) -> None:
        self.world = World(self.kind, populated, self.other, self.remedy, self.backend)
        for _ in range(2):
            self.world.register(self.draw_region(data))
        self.world.listen(self.world.regions[:1])

    def teardown(self) -> None:
        if hasattr(self, "world"):
            try:
                if self.world.suspended:
                    self.world.resume()
                for listener in list(self.world.listeners):
                    self.world.collect(listener)
                    self.world.stop(listener)
            finally:
                self.world.close()

    def draw_region(self, data: st.DataObject) -> Span:
        """All of it; any part; or, most often, a few pages, so that regions come apart too."""
        match data.draw(st.sampled_from(("few", "few", "any", "all"))):
            case "all":
                return Span(0, self.world.nbytes)
            case "few":
                return data.draw(spans(self.world.nbytes, 16 * PAGE))
            case _:
                return data.draw(spans(self.world.nbytes))

    def a_listener(self, number: int) -> Listener:
        return self.world.listeners[number % len(self.world.listeners)]

    def a_region(self, number: int) -> dirtytrack.Region:
        return self.world.regions[number % len(self.world.regions)]

    def one_of(self, listener: Listener, number: int) -> dirtytrack.Region | None:
        """None (all of them) in half of the cases."""
        mine = list(listener.watches)
        return mine[number // 2 % len(mine)] if mine and number % 2 else None

    def has_listener(self) -> bool:
        return bool(self.world.listeners)

    def has_region(self) -> bool:
        return bool(self.world.regions)

    @rule(data=st.data(), way=ways())
    def write(self, data: st.DataObject, way: Way) -> None:
        self.world.write(data.draw(spans(self.world.nbytes, 6 * PAGE)), way)

    @precondition(lambda self: self.remedy & EAGER and self.world.listeners)
    @rule(number=numbers, data=st.data(), epochs=st.integers(1, 3), apart=st.sampled_from((1, 1, 3)))
    def write_again(self, number: int, data: st.DataObject, epochs: int, apart: int) -> None:
        """The same pages in each epoch: they are assumed from the second on, or the third where they lie apart."""
        span = data.draw(spans(self.world.nbytes, 40 * PAGE))
        parts = [span] if apart == 1 else [Span(page * PAGE + 7, page * PAGE + 9) for page in span.pages[::apart]]
        for epoch in range(epochs + 1):
            for part in parts:
                self.world.write(part, Way.STORE)
            if epoch < epochs:
                self.world.collect(self.a_listener(number))

    @rule(data=st.data())
    def write_here_and_there(self, data: st.DataObject) -> None:
        for page in data.draw(st.sets(st.integers(0, self.world.nbytes // PAGE - 1), max_size=40)):
            self.world.write(Span(page * PAGE + 7, page * PAGE + 9), Way.STORE)

    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        span = data.draw(spans(self.world.nbytes))
        pages = span.pages
        self.world.discard(Span(pages.start * PAGE, pages.stop * PAGE))

    @precondition(lambda self: len(self.world.regions) < MOST_REGIONS)
    @rule(data=st.data())
    def register(self, data: st.DataObject) -> None:
        self.world.register(self.draw_region(data))

    @precondition(has_region)
    @rule(number=numbers)
    def unregister(self, number: int) -> None:
        self.world.unregister(self.a_region(number))

    @precondition(has_region)
    @rule(number=numbers)
    def write_protect(self, number: int) -> None:
        self.world.session.write_protect(self.a_region(number))

    @precondition(lambda self: len(self.world.listeners) < MOST_LISTENERS)
    @rule(chosen=st.integers(0, (1 << MOST_REGIONS) - 1), exact=st.sampled_from((False, False, False, True)))
    def listen(self, chosen: int, exact: bool) -> None:
        """An exact one forbids that blocks are assumed, which they are in worlds of `EAGER`."""
        self.world.listen([region for i, region in enumerate(self.world.regions) if chosen >> i & 1], exact=exact)

    @precondition(lambda self: self.world.listeners and self.world.regions)
    @rule(number=numbers, region=numbers)
    def add(self, number: int, region: int) -> None:
        self.world.add(self.a_listener(number), self.a_region(region))

    @precondition(lambda self: self.world.listeners and len(self.world.regions) < MOST_REGIONS)
    @rule(number=numbers, data=st.data(), past=st.integers(0, 3))
    def grow(self, number: int, data: st.DataObject, past: int) -> None:
        """A region that adjoins one that is watched, or overlaps its end."""
        listener = self.a_listener(number)
        for region in list(listener.watches)[:1]:
            end = region.address + region.nbytes - self.world.base
            start = max(0, end - past * 1000)
            if start < self.world.nbytes:
                more = data.draw(spans(self.world.nbytes - start, 8 * PAGE))
                self.world.add(listener, self.world.register(Span(start, start + more.end - more.start)))

    @precondition(has_listener)
    @rule(number=numbers, region=numbers)
    def remove(self, number: int, region: int) -> None:
        listener = self.a_listener(number)
        mine = list(listener.watches)
        if mine:
            self.world.remove(listener, mine[region % len(mine)])

    @precondition(has_listener)
    @rule(number=numbers)
    def stop(self, number: int) -> None:
        self.world.stop(self.a_listener(number))

    @precondition(has_listener)
    @rule(number=numbers)
    def drop(self, number: int) -> None:
        self.world.drop(self.a_listener(number))

    @precondition(has_listener)
    @rule(number=numbers, region=numbers)
    def collect(self, number: int, region: int) -> None:
        listener = self.a_listener(number)
        self.world.collect(listener, self.one_of(listener, region))

    @precondition(has_listener)
    @rule(number=numbers, region=numbers, budget_seconds=st.sampled_from((0.0, 1e-5, 60.0)))
    def collect_on_a_budget(self, number: int, region: int, budget_seconds: float) -> None:
        listener = self.a_listener(number)
        dirty = self.world.collect(listener, self.one_of(listener, region), budget_seconds)
        assert dirty.complete or budget_seconds < 60

    @precondition(has_listener)
    @rule(number=numbers)
    def collect_in_steps(self, number: int) -> None:
        self.world.collect_in_steps(self.a_listener(number))

    @precondition(has_listener)
    @rule(number=numbers, region=numbers)
    def collect_into(self, number: int, region: int) -> None:
        listener = self.a_listener(number)
        self.world.collect_into(listener, self.one_of(listener, region))

    @precondition(has_listener)
    @rule(number=numbers, region=numbers)
    def peek_and_collect(self, number: int, region: int) -> None:
        listener = self.a_listener(number)
        chosen = self.one_of(listener, region)
        seen = self.world.peek(listener, chosen)
        if not seen <= self.world.collect(listener, chosen):
            raise Missed("a peek saw more than the collect after it")

    @precondition(has_listener)
    @rule(number=numbers, region=numbers)
    def peek(self, number: int, region: int) -> None:
        listener = self.a_listener(number)
        self.world.peek(listener, self.one_of(listener, region))

    @precondition(has_listener)
    @rule(number=numbers, region=numbers)
    def a_consumer_puts_back(self, number: int, region: int) -> None:
        listener = self.a_listener(number)
        self.world.collect_and_put_back(listener, self.one_of(listener, region))

    @precondition(has_listener)
    @rule(number=numbers, region=numbers, into=st.booleans())
    def a_collect_fails(self, number: int, region: int, into: bool) -> None:
        listener = self.a_listener(number)
        self.world.collect_and_fail(listener, self.one_of(listener, region), into)

    @rule(data=st.data())
    def mark_dirty(self, data: st.DataObject) -> None:
        self.world.mark_dirty(data.draw(spans(self.world.nbytes, 20 * PAGE)))

    @precondition(lambda self: len(self.world.flights) < 2)
    @rule(data=st.data())
    def take_off(self, data: st.DataObject) -> None:
        self.world.take_off(data.draw(spans(self.world.nbytes, 4 * PAGE)))

    @precondition(lambda self: self.world.flights)
    @rule(number=numbers)
    def land(self, number: int) -> None:
        self.world.land(number % len(self.world.flights))

    @rule(really=st.integers(0, 3))
    def suspend_or_resume(self, really: int) -> None:
        if self.world.suspended:
            self.world.resume()
        elif not really:
            self.world.suspend()


def run(
    kind: Kind | Mapped,
    chosen: settings,
    other: OtherProcess | None = None,
    remedy: int = 0,
    backend: str = "kernel",
) -> None:
    """Drive worlds of this kind of memory, with these remedies (enum dt_remedy)."""
    members = {"kind": kind, "other": other, "remedy": remedy, "backend": backend}
    run_state_machine_as_test(type(f"Machine_{kind.name}", (Machine,), members), settings=chosen)

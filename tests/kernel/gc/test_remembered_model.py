# SPDX-License-Identifier: MIT
"""A remembered set beside a dict of words: whatever is written, by whatever way, each minor() has all slots that point
into the young memory, and no other. That the machine notices a broken barrier is proven by breaking it."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.errors import FlakyFailure, FlakyStrategyDefinition
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from dirtytrack import DirtySet, DirtyTracker, UffdSession, allocate
from dirtytrack.gc import RememberedSet
from dirtytrack.kernel import core, words
from tests import oracle
from tests.kernel.gc.heaps import FORMATS, OLD, YOUNG, YOUNG_BYTES, Format, Model
from tests.oracle import PAGE
from tests.strategies import Kind, Way

PAGES = 24
MEMORY, COPY = 8, 1024  # bits of enum dt_site
ENDS = (YOUNG, YOUNG + 8, YOUNG + YOUNG_BYTES // 2, YOUNG + YOUNG_BYTES - 8)
BEYOND = (YOUNG - 8, YOUNG + YOUNG_BYTES, OLD, 8)


class Machine(RuleBasedStateMachine):
    """One heap of two regions, of which one is raw memory that is read by copies; a remembered set, and a checkpointer
    that listens to the same memory."""

    kind: Kind
    format: Format

    def __init__(self) -> None:
        super().__init__()
        shared, huge = self.kind.value
        self.memory = allocate(PAGES * PAGE, shared=shared, huge=huge)
        self.memory[0 : len(self.memory) : PAGE] = bytes(
            len(self.memory) // PAGE
        )  # huge pages are there before it is armed
        self.session = UffdSession()
        half = PAGES // 2 * PAGE
        first = self.session.register(memoryview(self.memory)[:half], name="first", blind_spots="accepted")
        rest = self.session.register(
            (self.memory.address + half, PAGES * PAGE - half - 16), name="rest", blind_spots="accepted"
        )
        self.tracker = DirtyTracker(self.session)
        self.other = DirtyTracker(self.session)
        for tracker in (self.tracker, self.other):
            tracker.start()
        self.mirror = bytearray(PAGES * PAGE)
        self.remembered = RememberedSet(
            (first, rest), self.tracker, pointers=self.format.made, nursery=(YOUNG, YOUNG + YOUNG_BYTES)
        )
        self.model = Model(self.memory.address, PAGES * PAGE - 16, self.format)
        self.read_first = False

    def teardown(self) -> None:
        self.session.close()

    # ---- mutators

    @rule(
        page=st.integers(0, PAGES - 1),
        within=st.one_of(st.integers(0, 3), st.integers(0, PAGE // 4 - 1), st.sampled_from((509, 510, 511, 1023))),
        values=st.lists(st.sampled_from((*ENDS, *BEYOND)), min_size=1, max_size=5),
        way=st.sampled_from(Way),
    )
    def store_pointers(self, page: int, within: int, values: list[int], way: Way) -> None:
        index = min(page * PAGE // self.format.width + within, self.model.nbytes // self.format.width - 1)
        self.model.write(index, [self.format.encode(value) for value in values], way)

    @rule(page=st.integers(0, PAGES - 2), seed=st.integers(0, 1 << 63), way=st.sampled_from(Way))
    def store_numbers(self, page: int, seed: int, way: Way) -> None:
        width = self.format.width
        values = [seed * (i + 1) * 0x9E3779B97F4A7C15 >> 3 & ((1 << 8 * width) - 1) for i in range(PAGE // width)]
        values[7::90] = [YOUNG + i for i in range(len(values[7::90]))]
        self.model.write(page * PAGE // width, values, way)

    @rule(page=st.integers(0, PAGES - 1), count=st.integers(1, 4))
    def discard(self, page: int, count: int) -> None:
        end = min(page + count, PAGES)
        self.memory.discard(page * PAGE, (end - page) * PAGE)
        self.model.zero(self.memory.address + page * PAGE, self.memory.address + end * PAGE)

    # ---- the collector

    def minor(self, low: int, high: int) -> None:
        expected = self.model.slots(low, high)
        slots = self.remembered.minor(low, high)
        self.read_first = True
        found = dict(zip(slots, slots.targets, strict=True))
        differ = sorted(found.items() ^ expected.items())
        assert not differ[:5]  # the first of them: pytest takes minutes to explain more
        assert list(slots) == sorted(expected)
        young = self.model.slots(YOUNG, YOUNG + YOUNG_BYTES)
        assert {page for run in slots.kept for page in range(run.start, run.end, PAGE)} == {at & -PAGE for at in young}

    @rule(part=st.sampled_from(((0, YOUNG_BYTES), (0, YOUNG_BYTES), (0, 16), (YOUNG_BYTES // 2, YOUNG_BYTES))))
    def collect_young(self, part: tuple[int, int]) -> None:
        self.minor(YOUNG + part[0], YOUNG + part[1])

    @rule(share=st.integers(0, 3), nursery_empty=st.booleans(), forget=st.booleans(), twice=st.booleans())
    def collect_and_move(self, share: int, nursery_empty: bool, forget: bool, twice: bool) -> None:
        """Of the slots some are redirected, or all; promoted objects point into the young memory, or nothing does."""
        if not forget:
            self.move(share)
            return
        with self.remembered.forget_own_writes(nursery_empty=nursery_empty):
            self.move(3 if nursery_empty else share)
            if not nursery_empty:
                self.store_pointers(share, 9, [ENDS[share]], Way.STORE)
        if twice:
            self.minor(YOUNG, YOUNG + YOUNG_BYTES)

    def move(self, share: int) -> None:
        slots = self.remembered.minor(YOUNG, YOUNG + YOUNG_BYTES)
        self.read_first = True
        targets = [OLD if share == 3 or i % 3 < share else at for i, at in enumerate(slots.targets)]
        slots.redirect([at & ~7 for at in targets] if self.format.width == 8 else targets)
        for slot in slots:
            word = int.from_bytes(oracle.peek_bytes(slot, self.format.width), "little")
            self.model.words[slot] = word
        if self.format.name != "conservative":  # whose words may lie between objects, and are numbers then
            assert [self.format.decode(self.model.words[slot]) for slot in slots] == targets

    @rule(page=st.integers(0, PAGES - 1))
    def retain(self, page: int) -> None:
        self.remembered.retain([self.memory.address + page * PAGE + 8])

    @rule()
    def doubt(self) -> None:
        self.remembered.remember_all()

    @rule(site=st.sampled_from((MEMORY, 1, COPY)), nth=st.integers(1, 8))
    def fail(self, site: int, nth: int) -> None:
        """A call fails somewhere inside, or not; what it found is in the next one."""
        core.lib.dt_fail(site, nth, 1, 12, 0)
        try:
            self.remembered.minor(YOUNG, YOUNG + YOUNG_BYTES)
        except (MemoryError, OSError):
            return
        finally:
            core.lib.dt_fail(0, 0, 0, 0, 0)

    # ---- the other listener

    @rule()
    def checkpoint(self) -> None:
        dirty = self.other.collect()
        for start, end in dirty:
            at = start - self.memory.address
            self.mirror[at : at + end - start] = oracle.peek_bytes(start, end - start)
        now = self.memory[: PAGES * PAGE]
        lost = [page for page in range(PAGES) if now[page * PAGE :][:PAGE] != self.mirror[page * PAGE :][:PAGE]]
        assert not lost, "pages that the other listener was not told of"


def run(kind: Kind, format: Format, examples: int = 25, steps: int = 30, **options: Any) -> None:
    machine = type("Machine", (Machine,), {"kind": kind, "format": format})
    chosen = settings(max_examples=examples, stateful_step_count=steps, **options)
    run_state_machine_as_test(machine, settings=chosen)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("kind", [Kind.PRIVATE, Kind.SHARED, Kind.HUGE], ids=lambda kind: kind.name.lower())
def test_the_machine_and_the_model_agree(kind: Kind, format: Format) -> None:
    run(kind, format)


@pytest.mark.soak
@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.name.lower())
def test_the_machine_and_the_model_agree_for_long(kind: Kind, format: Format) -> None:
    run(kind, format, 1000, 60)


# ---- the tests can fail


@contextmanager
def broken(how: str) -> Iterator[None]:
    """A barrier or a remembered set with one thing wrong."""
    patch = pytest.MonkeyPatch()
    collect, find, minor = DirtyTracker.collect, words.find_slots, RememberedSet.minor
    if how == "a dirty page is dropped now and then":
        seen = Counter[int]()  # of each tracker by itself, so that each example goes as it went before

        def dropping(self: DirtyTracker, *arguments: Any, **options: Any) -> DirtySet:
            dirty = collect(self, *arguments, **options)
            kept = []
            for start, end in dirty:
                for page in range(start, end, PAGE):
                    seen[id(self)] += 1
                    if seen[id(self)] % 20:
                        kept.append((page, page + PAGE))
            return dirty & DirtySet.from_runs(kept)

        patch.setattr(DirtyTracker, "collect", dropping)
    elif how == "the last word of a page is not read":

        def short(*arguments: Any) -> words.Found:
            found = find(*arguments)
            kept = [i for i, at in enumerate(found.addresses) if at % PAGE < PAGE - 8]
            return Picked(found, kept)

        patch.setattr(words, "find_slots", short)
    elif how == "nothing is retained":

        def forgetful(self: RememberedSet, low: int, high: int) -> Any:
            slots = minor(self, low, high)
            self._retained = DirtySet()
            return slots

        patch.setattr(RememberedSet, "minor", forgetful)
    else:  # a failure loses what was collected
        patch.setattr(RememberedSet, "_undo", losing)
    try:
        yield
    finally:
        patch.undo()


def losing(remembered: RememberedSet, dirty: DirtySet, known: bool) -> None:
    remembered._heap.settle()


class Picked(words.Found):
    """Some of what was found."""

    def __init__(self, found: words.Found, kept: list[int]) -> None:
        super().__init__(found._slots, found._kept, found._epoch)
        self.count = len(kept)
        self._addresses, self._targets = picked(found.addresses, kept), picked(found.targets, kept)

    @property
    def addresses(self) -> memoryview:
        return self._addresses

    @property
    def targets(self) -> memoryview:
        return self._targets


def picked(numbers: memoryview, chosen: list[int]) -> memoryview:
    return memoryview(array("Q", [numbers[i] for i in chosen]))


@pytest.mark.parametrize(
    "how",
    [
        "a dirty page is dropped now and then",
        "the last word of a page is not read",
        "nothing is retained",
        "a failure loses what was collected",
    ],
)
def test_the_machine_notices(how: str) -> None:
    with broken(how), pytest.raises((AssertionError, FlakyFailure, FlakyStrategyDefinition)):
        run(Kind.PRIVATE, FORMATS[0], 1000, 40, phases=[Phase.generate], derandomize=True, report_multiple_bugs=False)

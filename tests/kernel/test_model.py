# SPDX-License-Identifier: MIT
"""A state machine drives sessions, regions and listeners through everything at once, beside a model that is obvious.

Kinds of memory, ways to write, discards, regions that come, go, grow and overlap, listeners of different rhythm,
consumers that fail, and each way to collect: what happens is in machine.py, what must follow in shadow.py. That the two
notice an engine that is broken is proven here too, by breaking it. Takes 60 s of CI's 20 min.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from unittest import mock

import pytest
from hypothesis import Phase, settings
from hypothesis.errors import FlakyFailure, FlakyStrategyDefinition

import dirtytrack
from dirtytrack import DirtySet, DirtyTracker, Region, UffdSession
from dirtytrack.kernel import core, engine, sets
from tests import oracle
from tests.asked import fewer
from tests.kernel.machine import run
from tests.kernel.shadow import EAGER, Listener, Missed, OtherProcess, World
from tests.oracle import PAGE
from tests.strategies import Kind, Mapped, Span, Way


@pytest.fixture(scope="module")
def other() -> Iterator[OtherProcess]:
    made = OtherProcess()
    yield made
    made.close()


UNTOLD = 64  # enum dt_remedy
EVERY_KIND: tuple[Kind | Mapped, ...] = (*Kind, *Mapped)


@pytest.mark.parametrize("kind", EVERY_KIND, ids=lambda kind: kind.name.lower())
def test_the_machine_and_the_model_agree(kind: Kind | Mapped, backend: str, other: OtherProcess) -> None:
    examples = 80 if kind is Kind.PRIVATE else 25
    if backend != "kernel":
        examples = 40 if kind is Kind.PRIVATE else 5  # the kinds are all alike to it
    run(kind, settings(max_examples=fewer(examples), stateful_step_count=45), other, backend=backend)


@pytest.mark.parametrize(
    "kind", [Kind.PRIVATE, Kind.SHARED, Kind.HUGE, Mapped.FILE], ids=lambda kind: kind.name.lower()
)
def test_the_machine_and_the_model_agree_where_blocks_are_assumed(kind: Kind | Mapped, other: OtherProcess) -> None:
    run(kind, settings(max_examples=fewer(25), stateful_step_count=45), other, remedy=EAGER)


@pytest.mark.soak
@pytest.mark.parametrize("kind", EVERY_KIND, ids=lambda kind: kind.name.lower())
def test_the_machine_and_the_model_agree_for_long(kind: Kind | Mapped, backend: str, other: OtherProcess) -> None:
    run(kind, settings(max_examples=3000, stateful_step_count=120), other, backend=backend)


# ---- the test of the test -----------------------------------------------------------------------------------------


def prepared(kind: Kind = Kind.PRIVATE) -> tuple[World, Listener]:
    world = World(kind, populated=True)
    return world, world.listen([world.register(Span(0, world.nbytes))])


def test_the_model_notices_an_erased_bit() -> None:
    world, listener = prepared()
    page = world.base + 5 * PAGE
    world.write(Span(5 * PAGE, 5 * PAGE + 1), Way.STORE)
    oracle.arm(world.session.fileno(), page, page + PAGE)
    with pytest.raises(Missed, match=r"pages \[5\]"):
        world.collect(listener)
    world.close()


def test_the_model_notices_a_mirror_that_is_behind() -> None:
    world, listener = prepared()
    world.write(Span(3 * PAGE, 4 * PAGE), Way.READ)
    with mock.patch("dirtytrack.DirtySet.copy_to"), pytest.raises(AssertionError, match="mirror"):
        world.collect(listener)
    world.close()


def test_the_model_notices_pages_that_were_not_written() -> None:
    world, listener = prepared()
    world.session.mark_dirty((world.base, 1))
    with pytest.raises(AssertionError, match="not written"):
        world.collect(listener)
    world.close()


# Engines that are broken, each in one way.


def erases_bits(world: World, listener: Listener, *arguments: Any, **options: Any) -> DirtySet:
    """It arms the pages of a region before it looks which were written."""
    if not world.suspended:
        for region in listener.watches:
            with suppress(OSError):
                oracle.arm(world.session.fileno(), region.start, region.end)
    return HONEST_WORLD_COLLECT(world, listener, *arguments, **options)


def robs_the_others(world: World, listener: Listener, *arguments: Any, **options: Any) -> DirtySet:
    for other in world.listeners:
        if other is not listener:
            DirtyTracker.collect(other.tracker)
    return HONEST_WORLD_COLLECT(world, listener, *arguments, **options)


def leaves_the_rest(tracker: DirtyTracker, region: Region | None = None, **options: Any) -> DirtySet:
    """What a budget left is said to be clean."""
    dirty = HONEST_COLLECT(tracker, region, **options)
    dirty._set.complete = 1
    return dirty


def test_a_rest_that_is_said_to_be_clean_is_found_out() -> None:
    """Not left to chance: a budget of no time ends the collect behind the first range."""
    world = World(Kind.PRIVATE, populated=True)
    listener = world.listen([world.register(Span(0, PAGE)), world.register(Span(8 * PAGE, 9 * PAGE))])
    world.write(Span(5, 9), Way.STORE)
    world.write(Span(8 * PAGE + 5, 8 * PAGE + 9), Way.STORE)
    with mock.patch.object(DirtyTracker, "collect", leaves_the_rest), found_out():
        world.collect(listener, budget_seconds=0)
    world.close()


def loses_what_fails(cset: Any) -> None:
    cset.delivered = 1
    core.lib.dt_set_clear(cset)


def takes_the_added_for_clean(listener: Any, handle: Any, find: Any, region: Region) -> None:
    HONEST_ADD(listener, handle, find, region)
    cset = engine.collect(listener, region, -1.0, find)
    cset.delivered = 1


def drops_a_final_set(listener: Any, region: Region, find: Any) -> Any:
    engine.collect(listener, region, -1.0, find).delivered = 1
    return HONEST_REMOVE(listener, region, find)


def drops_the_last_set(listener: Any, find: Any) -> Any:
    engine.collect(listener, None, -1.0, find).delivered = 1
    return HONEST_STOP(listener, find)


def overlooks_what_is_pending(listener: Any, region: Region | None, find: Any) -> Any:
    return sets.from_runs(b"", 0)


def copies_nothing(listener: Any, region: Region | None, extents: Any, find: Any) -> Any:
    return engine.collect(listener, region, -1.0, find)


def resumes_as_if_nothing_had_been(world: World) -> None:
    HONEST_WORLD_RESUME(world)
    for listener in world.listeners:
        DirtyTracker.collect(listener.tracker)


def does_nothing(*arguments: Any, **options: Any) -> None:
    pass


HONEST_WORLD_COLLECT, HONEST_WORLD_RESUME, HONEST_COLLECT = World.collect, World.resume, DirtyTracker.collect
HONEST_ADD, HONEST_REMOVE, HONEST_STOP = engine.add, engine.remove, engine.stop
FOUND_OUT = "are missing|the mirror is the memory|saw more than the collect"


@contextmanager
def found_out() -> Iterator[None]:
    """The world complains. Where the clock takes part Hypothesis may not see it twice: it was seen none the less."""
    before = Missed.seen
    with pytest.raises((AssertionError, FlakyFailure, FlakyStrategyDefinition)) as caught:
        yield
    if isinstance(caught.value, FlakyStrategyDefinition):  # then it does not say what it saw
        assert Missed.seen > before
        return
    seen = caught.value.exceptions if isinstance(caught.value, FlakyFailure) else (caught.value,)
    assert all(isinstance(each, AssertionError) and re.search(FOUND_OUT, str(each)) for each in seen), caught.value


BROKEN: list[tuple[Any, str, Callable[..., Any]]] = [
    (World, "collect", erases_bits),
    (World, "collect", robs_the_others),
    (core, "give_back", loses_what_fails),
    (engine, "add", takes_the_added_for_clean),
    (engine, "remove", drops_a_final_set),
    (engine, "stop", drops_the_last_set),
    (engine, "peek", overlooks_what_is_pending),
    (engine, "collect_into", copies_nothing),
    (engine, "put_back", does_nothing),
    (engine, "mark_dirty", does_nothing),
    (engine, "flight", does_nothing),
    (World, "resume", resumes_as_if_nothing_had_been),
]


@pytest.mark.parametrize(
    ("owner", "name", "broken"), BROKEN, ids=[f"{name}-{does.__name__}" for _, name, does in BROKEN]
)
def test_a_broken_engine_is_found_out(owner: Any, name: str, broken: Callable[..., Any]) -> None:
    chosen = settings(
        max_examples=400,
        stateful_step_count=40,
        database=None,
        derandomize=True,
        phases=(Phase.generate,),
        report_multiple_bugs=False,
    )
    with mock.patch.object(owner, name, broken), found_out():
        run(Kind.PRIVATE, chosen)


NO_ABSENT, NO_LOST, NO_ALIAS = 2, 4, 8  # enum dt_remedy


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [(Mapped.HUGETLB, NO_LOST), (Mapped.FILE, NO_LOST), (Kind.SHARED, NO_LOST)],
    ids=lambda part: part.name.lower() if isinstance(part, (Kind, Mapped)) else "R2",
)
def test_a_remedy_that_is_off_is_found_out(kind: Kind | Mapped, remedy: int) -> None:
    chosen = settings(
        max_examples=400, stateful_step_count=40, database=None, derandomize=True, phases=(Phase.generate,)
    )
    with found_out():
        run(kind, chosen, remedy=remedy)


def test_assumed_blocks_that_nobody_is_told_of_are_found_out() -> None:
    chosen = settings(
        max_examples=400, stateful_step_count=40, database=None, derandomize=True, phases=(Phase.generate,)
    )
    with found_out():
        run(Kind.PRIVATE, chosen, remedy=EAGER | UNTOLD)


@pytest.mark.parametrize("remedy", [0, NO_ABSENT, NO_LOST, NO_ABSENT | NO_LOST])
def test_a_huge_page_that_is_gone_without_a_marker_is_found_by_either_remedy(remedy: int) -> None:
    """Kernels that need R1 for small pages are tried by `make kernels`."""
    world = World(Mapped.HUGETLB, populated=True, remedy=remedy)
    listener = world.listen([world.register(Span(0, world.nbytes))])
    world.write(Span(5, 9), Way.STORE)
    world.discard(Span(0, PAGE))
    if remedy == NO_ABSENT | NO_LOST:
        with pytest.raises(Missed):
            world.collect(listener)
    else:
        assert world.collect(listener).page_count == 512
    world.close()


def test_aliases_that_are_off_are_found_out() -> None:
    memory = dirtytrack.allocate(4 * PAGE, shared=True)
    with mmap.mmap(memory.fileno(), memory.nbytes) as alias:
        for remedy, pages in ((0, [2]), (NO_ALIAS, [])):
            with UffdSession(_remedy=remedy) as session:
                region = session.register(memory, blind_spots="accepted")
                tracker = DirtyTracker(session)
                tracker.start()
                alias[2 * PAGE] = 1
                assert list(tracker.collect().pages(region)) == pages
                assert region.aliases == (1 if pages else 0)

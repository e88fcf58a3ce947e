# SPDX-License-Identifier: MIT
"""Each sentence of the contract about trackers: epochs, who is told of what, pages that come back, parts, mirrors.

The shared session and the audit are in test_contract_shared.py, memory that goes away in test_contract_gone.py,
threads, finalisers and handlers in test_contract_threads.py, forks in test_contract_forks.py; how calls fail is in
the folder failures. Takes under 1 s of CI's 20 min.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest

import dirtytrack
from dirtytrack import DirtySet, DirtyTracker, Memory, Region, Session
from tests.kernel.backends import has_bits, session_of
from tests.kernel.listening import pages_of
from tests.oracle import PAGE

PAGES = 16


@pytest.fixture
def session(backend: str) -> Iterator[Session]:
    with session_of(backend) as made:
        yield made


@pytest.fixture
def memory() -> Memory:
    return dirtytrack.allocate(PAGES * PAGE, name="memory")


@pytest.fixture
def region(session: Session, memory: Memory) -> Region:
    return session.register(memory)


def armed(session: Session, *regions: Region) -> DirtyTracker:
    tracker = DirtyTracker(session, regions or None)
    tracker.start()
    return tracker


def write(memory: Memory, *pages: int) -> None:
    for page in pages:
        memory[page * PAGE] = (memory[page * PAGE] + 1) % 256


# ---- epochs ---------------------------------------------------------------------------------------------------------


def test_epochs_count_the_collects_of_one_listener(session: Session, memory: Memory, region: Region) -> None:
    tracker, other = DirtyTracker(session), armed(session)
    assert tracker.epoch == 0
    with tracker:
        assert tracker.epoch == 1
        mirror = bytearray(memory)
        takes: tuple[Callable[[], DirtySet], ...] = (
            tracker.collect,
            lambda: tracker.collect(region),
            lambda: tracker.collect("memory"),
            lambda: tracker.collect(budget_seconds=0),
            lambda: tracker.collect(budget_seconds=10),
            lambda: tracker.collect_into(mirror),
            lambda: tracker.collect_into(mirror, region),
        )
        for number, take in enumerate(takes, 1):
            assert tracker.peek().epoch == tracker.epoch == number
            tracker.put_back(tracker.peek())
            assert take().epoch == number, "any collect closes the open epoch"
            assert tracker.epoch == number + 1
        assert tracker.remove(region).epoch == 8, "and so does a final set"
        assert tracker.stop().epoch == 9
        assert tracker.epoch == 0
        tracker.start()
        assert tracker.epoch == 1
    assert tracker.epoch == 0
    assert other.epoch == 1, "each listener has its own"


def test_start_clears_only_the_callers_pending(session: Session, memory: Memory, region: Region) -> None:
    other, tracker = armed(session), armed(session)
    write(memory, 1)
    tracker.put_back(other.peek())
    tracker.stop()
    write(memory, 2)
    tracker.start()
    assert not tracker.peek()
    assert not tracker.collect(), "epoch 1 begins clean"
    write(memory, 3)
    assert pages_of(tracker.collect(), region) == [3]
    assert pages_of(other.collect(), region) == [1, 2, 3]


def test_a_tracker_without_regions_takes_the_sessions_as_of_start(session: Session, memory: Memory) -> None:
    tracker = DirtyTracker(session)
    early = session.register((memory.address, PAGE))
    tracker.start()
    late = session.register((memory.address + PAGE, PAGE))
    assert list(tracker.regions) == [early]
    write(memory, 0, 1)
    assert tracker.stop().page_count == 1
    tracker.start()
    assert list(tracker.regions) == [early, late]


# ---- several listeners ----------------------------------------------------------------------------------------------


def test_three_rhythms_each_get_all(session: Session, memory: Memory, region: Region) -> None:
    rhythms = (1, 3, 7)
    trackers = [armed(session) for _ in rhythms]
    owed: list[set[int]] = [set() for _ in rhythms]
    for step in range(1, 43):
        written = {step * 5 % PAGES, step * step % PAGES}
        write(memory, *written)
        for rhythm, tracker, pages in zip(rhythms, trackers, owed, strict=True):
            pages |= written
            if step % rhythm == 0:
                assert set(pages_of(tracker.collect(), region)) == pages
                pages.clear()
    assert [tracker.epoch for tracker in trackers] == [43, 15, 7]


def _start(session: Session, region: Region) -> None:
    armed(session)


def _collect(session: Session, region: Region) -> None:
    tracker = armed(session)
    tracker.collect()
    tracker.collect(region)
    tracker.collect(budget_seconds=1)
    tracker.collect_into(bytearray(region.nbytes))


def _add(session: Session, region: Region) -> None:
    armed(session, session.register(bytearray(PAGE))).add(region)


def _add_an_overlap(session: Session, region: Region) -> None:
    armed(session, session.register(bytearray(PAGE))).add((region.address, region.nbytes // 2))


def _remove(session: Session, region: Region) -> None:
    armed(session).remove(region)


def _stop(session: Session, region: Region) -> None:
    armed(session).stop()


def _unregister(session: Session, region: Region) -> None:
    again = session.register((region.address, region.nbytes))
    armed(session, again).stop()
    session.unregister(again)


def _write_protect(session: Session, region: Region) -> None:
    session.write_protect(region)
    session.write_protect(session.register((region.address, region.nbytes // 2)))


def _drop(session: Session, region: Region) -> None:
    armed(session)
    gc.collect(0)


@pytest.mark.parametrize(
    "step", [_start, _collect, _add, _add_an_overlap, _remove, _stop, _unregister, _write_protect, _drop]
)
def test_each_step_that_arms_tells_the_other_listeners(
    session: Session, memory: Memory, region: Region, step: Callable[[Session, Region], None]
) -> None:
    first, second = armed(session, region), armed(session, region)
    second.collect()
    write(memory, 2, 12)
    assert has_bits(session, region.start, region.end, {2, 12})
    step(session, region)
    assert has_bits(session, region.start, region.start + region.nbytes // 2, set()), "it did arm"
    write(memory, 5)
    step(session, region)
    for tracker in (first, second):
        assert pages_of(tracker.collect(), region) == [2, 5, 12]
        assert not tracker.collect()


def test_a_step_of_a_running_tracker_tells_the_others(session: Session, memory: Memory, region: Region) -> None:
    """As above, and what comes between arming and the step, which only the step's own scan can find."""
    other = armed(session)
    steps: tuple[Callable[[DirtyTracker], DirtySet], ...] = (
        lambda tracker: tracker.collect(),
        lambda tracker: tracker.collect(region),
        lambda tracker: tracker.remove(region),
        lambda tracker: tracker.stop(),
    )
    for step in steps:
        tracker = armed(session)
        write(memory, 3, 9)
        assert pages_of(step(tracker), region) == [3, 9]
        assert has_bits(session, region.start, region.end, set())
        assert pages_of(other.collect(), region) == [3, 9]


def test_started_while_suspended_and_again_after(session: Session) -> None:
    """A region that nobody had armed before the session was suspended is still told to those who waited."""
    memory = dirtytrack.allocate(8 * PAGE)
    region = session.register(memory)
    session.suspend()
    first = armed(session)
    session.resume()
    assert first.collect().page_count == 8
    write(memory, 1)
    second = armed(session)
    assert not second.collect()
    assert pages_of(first.collect(), region) == [1]


def test_resume_tells_everybody(session: Session, memory: Memory, region: Region) -> None:
    part = session.register((memory.address + 4 * PAGE, 2 * PAGE))
    whole, half = armed(session, region), armed(session, part)
    write(memory, 1)
    session.suspend()
    session.resume()
    assert half.collect().page_count == 2
    assert whole.collect().page_count == PAGES


# ---- pages that come back -------------------------------------------------------------------------------------------


def test_put_back_is_to_this_listener_alone(session: Session, memory: Memory, region: Region) -> None:
    tracker, other = armed(session), armed(session)
    write(memory, 1, 2, 3)
    dirty = tracker.collect()
    other.collect()
    tracker.put_back(dirty)
    assert not other.peek()
    assert tracker.peek() == dirty
    write(memory, 7)
    assert pages_of(tracker.collect(), region) == [1, 2, 3, 7]
    assert pages_of(other.collect(), region) == [7]


def test_put_back_a_part_and_what_is_foreign(session: Session, memory: Memory, region: Region) -> None:
    low = session.register((memory.address, 4 * PAGE), name="low")
    whole, tracker = armed(session, region), armed(session, low)
    write(memory, *range(8))
    dirty = whole.collect()
    tracker.collect()
    tracker.put_back(dirty)
    assert pages_of(tracker.collect(), low) == [0, 1, 2, 3], "pages that it does not watch are passed over"
    tracker.put_back(dirty - tracker.peek())
    write(memory, 5)
    half = dirty.in_region(low) & whole.peek() | dirty.in_region(low)
    whole.put_back(half - tracker.collect())
    whole.put_back(DirtySet())
    assert pages_of(whole.collect(), region) == [5]
    whole.put_back(dirty)
    assert not tracker.collect(), "of another listener's set"
    assert pages_of(whole.collect(), region) == list(range(8))


def test_put_back_a_set_of_another_session(session: Session, memory: Memory, region: Region) -> None:
    tracker = armed(session)
    elsewhere = dirtytrack.allocate(4 * PAGE)
    with session_of(session.backend) as foreign:
        stranger = armed(foreign, foreign.register(elsewhere))
        write(elsewhere, 1)
        tracker.put_back(stranger.collect())
    assert not tracker.collect()


def test_peek_sees_what_is_pending_and_changes_nothing(session: Session, memory: Memory, region: Region) -> None:
    other, tracker = armed(session), armed(session)
    write(memory, 1)
    other.collect()
    write(memory, 2)
    session.mark_dirty((memory.address + 3 * PAGE, 1))
    assert has_bits(session, region.start, region.end, {2})
    for _ in range(2):
        assert pages_of(tracker.peek(), region) == [1, 2, 3]
        assert pages_of(tracker.peek("memory"), region) == [1, 2, 3]
    assert has_bits(session, region.start, region.end, {2}), "nothing was armed"
    assert pages_of(other.peek(), region) == [2, 3]
    assert pages_of(tracker.collect(), region) == [1, 2, 3]
    assert not tracker.peek()
    assert pages_of(other.collect(), region) == [2, 3]


# ---- growing, parts, budgets ----------------------------------------------------------------------------------------


def test_what_is_added_is_wholly_dirty_for_the_one_who_added_it(
    session: Session, memory: Memory, region: Region
) -> None:
    low = session.register((memory.address, 4 * PAGE))
    other, tracker = armed(session, region), armed(session, low)
    write(memory, 2)
    assert tracker.add(region) is region
    assert pages_of(tracker.peek(), region) == list(range(PAGES))
    assert pages_of(tracker.collect(), region) == list(range(PAGES))
    assert not tracker.collect()
    assert pages_of(other.collect(), region) == [2]
    late = dirtytrack.allocate(2 * PAGE)
    added = tracker.add(late, name="late")
    assert added in session.regions
    assert pages_of(tracker.collect("late"), added) == [0, 1]
    write(late, 1)
    assert pages_of(tracker.collect(added), added) == [1]


@pytest.mark.parametrize("by_name", [False, True])
def test_one_region_is_collected_and_the_others_wait(session: Session, memory: Memory, by_name: bool) -> None:
    low = session.register((memory.address, 4 * PAGE), name="low")
    high = session.register((memory.address + 4 * PAGE, 4 * PAGE), name="high")
    tracker = armed(session)
    write(memory, 1, 3, 4, 6)
    dirty = tracker.collect("low" if by_name else low)
    assert [run.start for run in dirty] == [memory.address + PAGE, memory.address + 3 * PAGE]
    assert pages_of(dirty, low) == [1, 3]
    assert not tracker.peek(low)
    write(memory, 2)
    rest = tracker.collect()
    assert pages_of(rest, high) == [0, 2]
    assert pages_of(rest, low) == [2]


def test_one_of_two_that_overlap_leaves_the_other_pending(session: Session, memory: Memory) -> None:
    low = session.register((memory.address, 6 * PAGE))
    high = session.register((memory.address + 4 * PAGE, 6 * PAGE))
    tracker = armed(session)
    write(memory, 2, 5, 9)
    assert pages_of(tracker.collect(low), low) == [2, 5]
    assert not tracker.collect(low)
    assert pages_of(tracker.collect(high), high) == [1, 5]
    assert not tracker.collect()


@pytest.mark.parametrize("second_start", [4 * PAGE, 3 * PAGE + 100, 2 * PAGE, 0])
def test_overlapping_and_touching_regions_are_each_whole(session: Session, memory: Memory, second_start: int) -> None:
    low = session.register((memory.address, 4 * PAGE - 200), name="low")
    high = session.register((memory.address + second_start, 4 * PAGE), name="high")
    tracker = armed(session)
    for page in range(10):
        write(memory, page)
        dirty = tracker.collect()
        first = second_start // PAGE
        expected = [page] if page < 4 or (first <= page and page * PAGE < second_start + 4 * PAGE) else []
        assert [run.start for run in dirty] == [memory.address + at * PAGE for at in expected]
        assert pages_of(dirty, low) == [at for at in expected if at < 4]
        assert pages_of(dirty, high) == [at - first for at in expected if at * PAGE >= high.start - memory.address]
        assert dirty.page_count == len(expected), "each page once"
    write(memory, 3)
    tracker.remove(low)
    assert tracker.collect().page_count == (1 if second_start < 4 * PAGE else 0), "still the other's"


def test_a_budget_of_nothing_still_gets_all_in_the_end(session: Session) -> None:
    big = dirtytrack.allocate(512 << 20)
    region = session.register(big)
    tracker, other = armed(session), armed(session)
    written = set(range(0, region.page_count, 4099)) | {region.page_count - 1}
    write(big, *written)
    found: set[int] = set()
    parts: list[DirtySet] = []
    while found != written:
        assert tracker.peek().page_count == len(written) - len(found), "the rest stays pending"
        dirty = tracker.collect(budget_seconds=0)
        assert dirty.epoch == len(parts) + 1
        assert not found & set(pages_of(dirty, region)), "each page once"
        found |= set(pages_of(dirty, region))
        parts.append(dirty)
        assert len(parts) <= region.page_count, "each call comes further"
    assert len(parts) > 1
    assert not parts[0].complete
    assert "incomplete" in repr(parts[0])
    write(big, 7)
    last = tracker.collect(budget_seconds=60)
    assert last.complete
    assert pages_of(last, region) == [7]
    assert set(pages_of(other.collect(), region)) == written | {7}


# ---- mirrors --------------------------------------------------------------------------------------------------------


def test_a_refused_mirror_consumes_nothing(session: Session, memory: Memory) -> None:
    low = session.register((memory.address, 4 * PAGE), name="low")
    high = session.register((memory.address + 8 * PAGE, 4 * PAGE), name="high")
    tracker = armed(session)
    good, both = bytearray(4 * PAGE), bytearray(8 * PAGE)
    write(memory, 1, 9)
    view = memoryview(both)
    for refused in (
        {"low": good},
        {"low": good, "high": bytearray(4 * PAGE - 1)},
        {"low": good, "high": bytes(4 * PAGE)},
        {"low": good, "high": good},
        {"low": view[: 4 * PAGE], "high": view[4 * PAGE - 1 : -1]},
        {"low": good, "high": (low.address, 4 * PAGE)},
        {"low": good, "high": (high.address + PAGE, 4 * PAGE)},
    ):
        with pytest.raises(dirtytrack.InvalidMemory):
            tracker.collect_into(refused)  # type: ignore[arg-type]
        assert not any(good), "nothing was copied"
        assert not any(both)
    assert tracker.epoch == 1
    assert tracker.peek().page_count == 2, "nothing was armed"
    touching: dict[str, memoryview] = {"low": view[: 4 * PAGE], "high": view[4 * PAGE :]}
    dirty = tracker.collect_into(touching)
    assert pages_of(dirty, low) == pages_of(dirty, high) == [1]
    assert both[PAGE] == both[5 * PAGE] == 1


def test_what_a_mirror_gets_is_one_region_where_one_is_asked_for(session: Session, memory: Memory) -> None:
    low = session.register((memory.address, 4 * PAGE), name="low")
    session.register((memory.address + 2 * PAGE, 4 * PAGE), name="high")
    tracker = armed(session)
    mirror = bytearray(4 * PAGE)
    write(memory, 1, 3, 5)
    for asked in (low, "low"):
        tracker.collect_into(mirror, asked)
        assert mirror == memory[: 4 * PAGE]
    mirrors = {"low": mirror, "high": bytearray(4 * PAGE)}
    assert tracker.collect_into(mirrors).page_count == 2
    assert mirrors["high"] == memory[2 * PAGE : 6 * PAGE]

# SPDX-License-Identifier: MIT
"""Calls that come too early, too late, twice, in the wrong session or in a forked child. Under 1 s of CI's 20 min."""

from __future__ import annotations

import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator

import pytest

import dirtytrack
from dirtytrack import DirtyTracker, Pagemap, UffdSession
from dirtytrack.layout import Layout
from tests.kernel.failures.world import PAGES, World, assert_finds_a_write, write
from tests.oracle import PAGE
from tests.points import Points, collect_as_its_caller, moved_meanwhile
from tests.sandbox import run_in_child


def test_a_closed_session(world: World) -> None:
    dirty = world.tracker.collect()
    world.session.close()
    world.session.close()
    session, tracker, region = world.session, world.tracker, world.region
    for call in (
        lambda: session.register(bytearray(PAGE)),
        lambda: session.unregister(region),
        lambda: session.write_protect(region),
        lambda: session.mark_dirty(region),
        lambda: session.in_flight(region).__enter__(),
        session.suspend,
        session.resume,
        session.statistics,
        lambda: DirtyTracker(session),
        tracker.start,
        tracker.collect,
        lambda: tracker.collect(region),
        lambda: tracker.collect(budget_seconds=1),
        lambda: tracker.collect_into(bytearray(PAGES * PAGE)),
        tracker.peek,
        tracker.stop,
        tracker.statistics,
        lambda: tracker.put_back(dirty),
        lambda: tracker.remove(region),
        lambda: tracker.add(region),
        lambda: dirtytrack.track(bytearray(PAGE), session=session),
    ):
        with pytest.raises(dirtytrack.SessionClosed):
            call()
    assert session.closed
    assert session.fileno() == -1
    assert "closed" in repr(session)


def test_a_closed_pagemap(world: World) -> None:
    pagemap = Pagemap()
    pagemap.close()
    pagemap.close()
    with pytest.raises(ValueError, match="closed"):
        pagemap.scan(0, PAGE)
    assert pagemap.fileno() == -1


def test_a_flight_that_has_landed(world: World) -> None:
    with world.session.in_flight(world.region) as flight:
        assert world.tracker.collect().page_count == PAGES
    with pytest.raises(dirtytrack.InvalidMemory, match="in flight"):
        flight.__exit__(None, None, None)
    assert world.tracker.collect().page_count == PAGES
    assert not world.tracker.collect()


def test_unregister_while_it_is_watched(world: World) -> None:
    write(world.memory, 2)
    with pytest.raises(dirtytrack.InvalidMemory, match=r"tracker\.remove"):
        world.session.unregister(world.region)
    assert list(world.tracker.collect().pages(world.region)) == [2]


def test_a_region_that_was_unregistered(world: World) -> None:
    region = world.session.register(bytearray(4 * PAGE), name="gone")
    world.session.unregister(region)
    tracker = DirtyTracker(world.session, [region])
    for call in (
        lambda: world.session.unregister(region),
        lambda: world.session.write_protect(region),
        lambda: world.tracker.add(region),
        tracker.start,
    ):
        with pytest.raises(dirtytrack.NotRegistered, match="gone"):
            call()
    assert not tracker.epoch
    assert world.tracker.regions == (world.region,)


def test_a_region_of_another_session(world: World) -> None:
    with UffdSession() as other:
        region = other.register(dirtytrack.allocate(PAGES * PAGE), name="foreign")
        for refuses in (
            lambda: world.session.unregister(region),
            lambda: world.session.write_protect(region),
            lambda: world.tracker.add(region),
            DirtyTracker(world.session, [region]).start,
        ):
            with pytest.raises(dirtytrack.NotRegistered, match="foreign"):
                refuses()
        for call in (world.tracker.collect, world.tracker.remove, world.tracker.peek):
            with pytest.raises(dirtytrack.InvalidMemory, match="foreign"):
                call(region)
        assert_finds_a_write(DirtyTracker(other, [region]))
    assert world.tracker.regions == (world.region,)


def test_a_tracker_that_is_not_running(world: World) -> None:
    dirty = world.tracker.stop()
    region = world.region
    for tracker in (world.tracker, DirtyTracker(world.session)):
        for call in (
            tracker.collect,
            lambda tracker=tracker: tracker.collect(budget_seconds=1),
            tracker.peek,
            tracker.stop,
            lambda tracker=tracker: tracker.put_back(dirty),
            lambda tracker=tracker: tracker.add(region),
            lambda tracker=tracker: tracker.collect(region),
            lambda tracker=tracker: tracker.remove(region),
        ):
            with pytest.raises(dirtytrack.NotStarted):
                call()
        assert tracker.epoch == 0


def test_add_a_buffer_to_a_tracker_that_is_not_running(world: World) -> None:
    world.tracker.stop()
    buffer = bytearray(PAGE)
    with pytest.raises(dirtytrack.NotStarted):
        world.tracker.add(buffer)
    buffer.append(1)
    assert world.session.regions == (world.region,)


def test_starting_twice(world: World) -> None:
    write(world.memory, 4)
    with pytest.raises(dirtytrack.AlreadyStarted, match="add"):
        world.tracker.start()
    with pytest.raises(dirtytrack.AlreadyStarted), world.tracker:
        pass
    assert world.tracker.epoch == 1
    assert list(world.tracker.collect().pages(world.region)) == [4]


def test_a_region_that_is_watched_already(world: World) -> None:
    with pytest.raises(dirtytrack.InvalidMemory, match="already"):
        world.tracker.add(world.region)
    with pytest.raises(dirtytrack.InvalidMemory, match="already"):
        DirtyTracker(world.session, [world.region, world.region]).start()
    assert world.tracker.regions == (world.region,)


def reads(dirty: dirtytrack.DirtySet, mirror: bytearray) -> Iterator[Callable[[], object]]:
    yield dirty.gather
    yield lambda: dirty.scatter(bytes(dirty.nbytes))
    yield lambda: dirty.copy_to(mirror)
    yield lambda: dirty.changed(mirror)


def test_bytes_of_a_region_that_was_unregistered(world: World) -> None:
    memory = dirtytrack.allocate(4 * PAGE, name="second")
    tracker = DirtyTracker(world.session, [world.session.register(memory)])
    tracker.start()
    write(memory, 1)
    dirty = tracker.stop()
    world.session.unregister(dirty_region := world.session.regions[-1])
    assert dirty_region.name == "second"
    for call in reads(dirty, bytearray(4 * PAGE)):
        with pytest.raises(dirtytrack.NotRegistered, match="unregistered"):
            call()
    assert dirty.page_count == 1
    assert list(dirty.pages("second")) == [1]


def test_bytes_after_the_session_was_closed(world: World) -> None:
    write(world.memory, 1)
    dirty = world.tracker.collect()
    world.session.close()
    for call in reads(dirty, bytearray(PAGES * PAGE)):
        with pytest.raises(dirtytrack.SessionClosed, match="closed"):
            call()
    assert list(dirty.pages(world.region)) == [1]


def test_bytes_of_a_set_that_was_pickled(world: World) -> None:
    write(world.memory, 1)
    dirty = pickle.loads(pickle.dumps(world.tracker.collect()))
    for call in reads(dirty, bytearray(PAGES * PAGE)):
        with pytest.raises(dirtytrack.NotRegistered, match="pickle"):
            call()
    assert list(dirty.pages("world")) == [1]


def test_ctrl_c_in_a_collect(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        signal.raise_signal(signal.SIGINT)

    tracker = world.tracker
    layout = tracker._layout
    write(world.memory, 3)
    calls: tuple[Callable[[], object], ...] = (
        tracker.collect,
        lambda: tracker.collect(world.region),
        lambda: tracker.collect_into(bytearray(PAGES * PAGE)),
        lambda: tracker.remove(world.region),
        tracker.stop,
    )
    for call in calls:
        with monkeypatch.context() as patch:
            patch.setattr("dirtytrack.dirtyset.DirtySet.__init__", interrupted)
            patch.setattr(Layout, "until", interrupted)
            patch.setattr(tracker, "_collecting", moved_meanwhile(tracker))
            with pytest.raises(KeyboardInterrupt):
                call()
        tracker._layout = layout
        assert list(tracker.peek().pages(world.region)) == [3]
    points = Points(2, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        points.call(lambda: collect_as_its_caller(tracker))  # as it returns: nobody has the set
    assert list(tracker.peek().pages(world.region)) == [3]
    assert list(tracker.collect().pages(world.region)) == [3]


def test_ctrl_c_twice_before_a_final_set_was_given_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    tracker = world.tracker
    write(world.memory, 3)
    calls: tuple[Callable[[], object], ...] = (lambda: tracker.remove(world.region), tracker.stop)
    for call in calls:
        with monkeypatch.context() as patch:
            patch.setattr(tracker, "_refresh", interrupted)
            patch.setattr("dirtytrack.kernel.core.give_back", interrupted)
            with pytest.raises(KeyboardInterrupt) as caught:
                call()
        assert isinstance(caught.value.__context__, KeyboardInterrupt), "each was interrupted"
        del caught  # which has the frame that had the set
        tracker._refresh()
        assert list(tracker.peek().pages(world.region)) == [3]


def test_pickling_what_belongs_to_this_process(world: World) -> None:
    with Pagemap() as pagemap:
        for thing in (world.session, world.tracker, world.region, world.memory, pagemap):
            with pytest.raises(TypeError, match="cannot be pickled"):
                pickle.dumps(thing)


def in_the_child(parents: World, pagemap: Pagemap) -> None:
    for call in (
        parents.tracker.collect,
        parents.tracker.peek,
        parents.tracker.stop,
        parents.tracker.statistics,
        lambda: parents.tracker.put_back(dirtytrack.DirtySet()),
        lambda: parents.session.register(bytearray(PAGE)),
        parents.session.suspend,
        lambda: parents.session.mark_dirty(parents.region),
        lambda: DirtyTracker(parents.session),
        lambda: pagemap.scan(0, PAGE),
    ):
        with pytest.raises(dirtytrack.UsedAfterFork):
            call()
    assert parents.session.fileno() == -1
    assert_finds_a_write()


def forked() -> None:
    tracked, pagemap = World(), Pagemap()
    write(tracked.memory, 3)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            in_the_child(tracked, pagemap)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert list(tracked.tracker.collect().pages(tracked.region)) == [3]
    assert_finds_a_write(tracked.tracker)


def test_used_after_a_fork() -> None:
    run_in_child(forked)

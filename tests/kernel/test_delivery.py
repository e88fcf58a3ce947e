# SPDX-License-Identifier: MIT
"""Whatever happens inside a call, wherever it happens, no page is lost, and what is watched is known.

An interrupt at each point of each call, and at each point a signal handler that makes each of the other calls. Exact
pages are compared; storms of real signals are in test_interrupts.py and test_contract_threads.py. Takes about 10 s of
CI's 20 min.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dirtytrack
from dirtytrack import DirtySet, DirtyTracker, SessionClosed
from tests import oracle
from tests.kernel.backends import session_of
from tests.oracle import PAGE
from tests.points import Points, collect_as_its_caller

# An interrupt that meets a finaliser is ignored by Python, which says so.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
PAGES = 8
OWED = {("low", 1), ("low", 5), ("high", 2)}
"""What the tracker of each test waits for: the first page from another's collect, the others from the kernel."""


@pytest.fixture(scope="module", autouse=True)
def no_descriptor_leaks() -> Iterator[None]:
    before = len(list(Path("/proc/self/fd").iterdir()))
    yield
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


class Interrupted(BaseException):
    pass


def interrupt() -> None:
    raise Interrupted


class World:
    """Two regions, a tracker with pages to collect, another listener, and something of each kind for the calls."""

    def __init__(self, running: bool = True, backend: str = "kernel") -> None:
        self.memories = {name: dirtytrack.allocate(PAGES * PAGE, name=name) for name in ("low", "high")}
        self.session = session_of(backend)
        self.regions = {name: self.session.register(memory) for name, memory in self.memories.items()}
        self.low, self.high = self.regions.values()
        self.tracker, self.other = self.listener(), self.listener()
        self.mirrors = {region: bytearray(region.nbytes) for region in self.regions.values()}
        self.extra = bytearray(3 * PAGE)
        self.other.start()
        if running:
            self.tracker.start()
        self.write("low", 1)
        self.other.collect()
        self.write("low", 5)
        self.write("high", 2)

    def listener(self) -> DirtyTracker:
        return DirtyTracker(self.session, self.regions.values())

    def write(self, name: str, page: int) -> None:
        memory = self.memories[name]
        memory[page * PAGE] = memory[page * PAGE] % 255 + 1

    def pages(self, *sets: object) -> set[tuple[str, int]]:
        """Of sets, and not of what else a call may return."""
        found = set()
        for dirty in sets:
            for run in dirty if isinstance(dirty, DirtySet) else ():
                for address in range(*run, PAGE):
                    for name, region in self.regions.items():
                        if region.start <= address < region.end:
                            found.add((name, (address - region.start) // PAGE))
        return found

    def end(self) -> None:
        """Everything can be let go of, and nothing stays."""
        if self.session.fileno() < 0 and not self.session.closed:
            self.session.resume()
        for tracker in (self.tracker, self.other):
            if tracker.epoch and not self.session.closed:
                tracker.stop()
        gc.collect(0)
        for region in self.session.regions:
            self.session.unregister(region)
        assert self.session.regions == ()
        for region in self.regions.values():
            bits = oracle.categories(region.start, region.end)
            assert not any(found & oracle.WPALLOWED for found in bits), "still registered"
        self.extra.append(1)  # nobody holds it
        self.session.close()


Call = Callable[[World], object]


def at_each_point(
    call: Call, act: Call, check: Callable[[World, object], None], running: bool = True, backend: str = "kernel"
) -> int:
    """Do something at each point of a call, each time in a new world, and check. Returns how many points there are."""
    for nth in itertools.count(1):
        world = World(running, backend)
        points = Points(nth, lambda here=world: act(here))  # type: ignore[misc]
        try:
            check(world, points.call(lambda here=world: call(here)))  # type: ignore[misc]
        except Interrupted as kept:  # and its traceback: whoever keeps it must not keep pages back
            check(world, kept)
            del kept
        except BaseException as error:
            raise AssertionError(f"at point {nth}, {points.where}: {error!r}") from error
        world.end()
        if not points.where:
            assert nth > 1, "there was nothing to interrupt"
            return nth - 1
    raise AssertionError


# ---- interrupts -----------------------------------------------------------------------------------------------------

TAKES: dict[str, Call] = {
    "collect": lambda world: collect_as_its_caller(world.tracker),
    "collect a region": lambda world: world.tracker.collect(world.low),
    "collect by name": lambda world: world.tracker.collect("low"),
    "collect on a budget": lambda world: world.tracker.collect(budget_seconds=60),
    "collect_into": lambda world: world.tracker.collect_into(world.mirrors),
    "collect a region into": lambda world: world.tracker.collect_into(world.mirrors[world.low], "low"),
    "remove": lambda world: world.tracker.remove("low"),
    "stop": lambda world: world.tracker.stop(),
    "peek": lambda world: world.tracker.peek(),
}


@pytest.mark.parametrize("take", TAKES)
def test_interrupted_at_any_point_all_is_pending_still(take: str, backend: str) -> None:
    def check(world: World, result: object) -> None:
        if not isinstance(result, Interrupted):
            return
        assert world.tracker.epoch
        assert set(world.tracker.regions) == {world.low, world.high}
        assert world.pages(world.tracker.peek()) == OWED
        world.write("high", 7)
        assert world.pages(world.tracker.collect_into(world.mirrors)) == OWED | {("high", 7)}
        for region, mirror in world.mirrors.items():
            for page in (page for name, page in OWED if name == region.name):
                assert mirror[page * PAGE] == world.memories[region.name][page * PAGE] != 0
        assert world.pages(world.other.collect()) == OWED - {("low", 1)} | {("high", 7)}

    assert at_each_point(TAKES[take], lambda _: interrupt(), check, backend=backend) >= 2


def _resume(world: World) -> None:
    world.session.suspend()
    world.session.resume()


def _in_a_with(world: World) -> None:
    with world.tracker:
        pass


CHANGES: dict[str, Call] = {
    "start": lambda world: world.tracker.start(),
    "with": _in_a_with,
    "add a region": lambda world: world.tracker.remove("high") and world.tracker.add(world.high),
    "add a buffer": lambda world: world.tracker.add(world.extra),
    "register": lambda world: world.session.register(world.extra),
    "unregister": lambda world: world.session.unregister(world.session.register(world.extra)),
    "put back": lambda world: world.tracker.put_back(world.other.peek()),
    "track": lambda world: dirtytrack.track(world.extra, session=world.session).start(),
    "suspend": lambda world: world.session.suspend(),
    "resume": _resume,
    "write_protect": lambda world: world.session.write_protect(world.low),
    "mark_dirty": lambda world: world.session.mark_dirty(world.extra),
    "listen": lambda world: DirtyTracker(world.session),
}


@pytest.mark.parametrize("change", CHANGES)
def test_interrupted_at_any_point_a_change_loses_nothing_and_can_be_made_again(change: str, backend: str) -> None:
    running = change not in ("start", "with")

    def check(world: World, _: object) -> None:
        del _
        gc.collect(0)
        if world.session.fileno() < 0:
            world.session.resume()
        whole = {("low", page) for page in range(PAGES)} | {("high", page) for page in range(PAGES)}
        assert OWED - {("low", 1)} <= world.pages(world.other.collect()) <= whole
        if not world.tracker.epoch:
            assert not running
            world.tracker.start()
        if world.high not in world.tracker.regions:
            world.tracker.add(world.high)
        found = world.pages(world.tracker.collect())
        assert not running or {("low", 1), ("low", 5)} <= found
        for name, page in itertools.product(world.regions, range(PAGES)):
            world.write(name, page)
        assert world.pages(world.tracker.collect()) == whole, "it watches what it says"

    at_each_point(CHANGES[change], lambda _: interrupt(), check, running, backend)


# ---- handlers that call the library ---------------------------------------------------------------------------------


def quietly(call: Call, *errors: type[Exception]) -> Call:
    """With these as a result, instead of raising them."""

    def calls(world: World) -> object:
        try:
            return call(world)
        except errors as error:
            return error.with_traceback(None)

    return calls


def _puts_back(world: World) -> object:
    dirty = world.tracker.collect()
    quietly(lambda world: world.tracker.put_back(dirty), dirtytrack.NotStarted)(world)
    return dirty


IDLE = (dirtytrack.NotStarted, dirtytrack.AlreadyStarted, dirtytrack.InvalidMemory)
MEMBERS: dict[str, Call] = {
    "collect": quietly(TAKES["collect"], *IDLE),
    "collect_into": quietly(lambda world: world.tracker.collect_into(world.mirrors), *IDLE),
    "start": quietly(lambda world: world.tracker.start(), *IDLE),
    "stop": quietly(lambda world: world.tracker.stop(), *IDLE),
    "add": quietly(lambda world: world.tracker.add(world.high), *IDLE),
    "remove": quietly(lambda world: world.tracker.remove(world.high), *IDLE),
    "put back": quietly(_puts_back, *IDLE),
}


@pytest.mark.parametrize("inner", MEMBERS)
@pytest.mark.parametrize("call", MEMBERS)
def test_a_handler_changes_what_is_watched_at_any_point(call: str, inner: str) -> None:
    running = call != "start"
    results: list[object] = []

    def handle(world: World) -> None:
        results[:] = [MEMBERS[inner](world)]

    def check(world: World, result: object) -> None:
        found = world.pages(result, *results)
        if world.tracker.epoch:
            found |= world.pages(world.tracker.collect())
        if running and "start" not in (call, inner):
            assert found >= OWED, "lost"
        assert world.pages(world.other.collect()) == OWED - {("low", 1)}
        if world.tracker.epoch:
            for name, page in itertools.product(world.regions, range(PAGES)):
                world.write(name, page)
            dirty = world.tracker.collect()
            assert dirty.nbytes == dirty.page_count * PAGE, "of each page it is known whose it is"
            assert dirty.nbytes == sum(region.nbytes for region in world.tracker.regions)
            world.tracker.stop()
        world.tracker.start()
        assert set(world.tracker.regions) == {world.low, world.high}
        world.write("high", 3)
        assert world.pages(world.tracker.collect()) == {("high", 3)}
        results.clear()

    at_each_point(MEMBERS[call], handle, check, running)


def _flies(world: World) -> None:
    with world.session.in_flight(world.high):
        pass


GONE = (SessionClosed, dirtytrack.NotRegistered, dirtytrack.NotStarted, dirtytrack.InvalidMemory)
SESSIONS: dict[str, Call] = {
    "register": quietly(lambda world: world.session.register(world.extra), *GONE),
    "unregister": quietly(lambda world: world.session.unregister(world.session.register(world.extra)), *GONE),
    "track": quietly(lambda world: dirtytrack.track(world.extra, session=world.session).start(), *GONE),
    "copy": quietly(lambda world: world.tracker.collect().copy_to(world.mirrors), *GONE),
    "collect_into": quietly(lambda world: world.tracker.collect_into(world.mirrors), *GONE),
    "resume": quietly(_resume, *GONE),
    "flight": quietly(_flies, *GONE),
    "look": lambda world: (world.session.regions, repr(world.tracker), repr(world.session)),
    "close": lambda world: world.session.close(),
}


@pytest.mark.parametrize("inner", SESSIONS)
@pytest.mark.parametrize("call", SESSIONS)
def test_a_handler_changes_the_session_at_any_point(call: str, inner: str) -> None:
    def check(world: World, _: object) -> None:
        if "close" in (call, inner):
            assert not world.session.closed or world.session.regions == ()
            return
        assert all(region.registered for region in world.session.regions)
        world.write("low", 3)
        assert ("low", 3) in world.pages(world.tracker.collect())

    at_each_point(SESSIONS[call], SESSIONS[inner], check)


def test_a_set_that_somebody_looked_at_is_delivered_however_it_ends() -> None:
    """What a collect gave goes back where an error takes it away unseen: not otherwise."""
    world = World()
    with pytest.raises(ZeroDivisionError):
        1 // (world.tracker.collect().page_count - len(OWED))
    assert not world.tracker.collect()
    world.write("low", 3)
    try:
        raise Interrupted
    except Interrupted:
        world.tracker.collect()  # thrown away, while an error is handled
    assert not world.tracker.collect()
    world.end()

# SPDX-License-Identifier: MIT
"""Mirrors of memory that is really tracked: what they are told makes another copy equal, whatever goes wrong."""

from __future__ import annotations

import errno
import gc
import itertools
import mmap
import os
import pickle
import threading
import time
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

import dirtytrack
from dirtytrack import InvalidMemory, NotStarted, RegionGone, SessionClosed, UffdSession
from dirtytrack.delta import ArrayChanges, Delta, Mirror, apply, array_changes, compose, diff
from tests.oracle import PAGE
from tests.points import Points
from tests.sandbox import failing


class Follower:
    """A mirror, and a replica that knows nothing but the mirror's deltas."""

    def __init__(self, memory: Any, **options: Any) -> None:
        self.memory = memory
        self.mirror = Mirror(memory, **options)
        self.replica = bytearray(self.mirror.data)

    def update(self) -> Delta:
        delta = self.mirror.update()
        apply(bytes(delta), self.replica)
        return delta

    def verify(self) -> None:
        self.update()
        assert self.replica == self.mirror.data == bytes(self.memory)


def test_a_mirror_follows_its_memory() -> None:
    random = Random(1)
    memory = bytearray(random.randbytes(50 * PAGE + 123))
    with Mirror(memory) as mirror:
        replica = bytearray(mirror.data)
        assert replica == memory
        assert not mirror.update()
        lagging, owed = bytearray(replica), Delta.from_bytes(bytes(mirror.update()))
        for _ in range(100):
            expected = dict[int, int]()
            for _ in range(random.randrange(20)):
                at, value = random.randrange(len(memory)), random.randrange(256)
                if memory[at] != value:
                    expected[at // 8] = at
                memory[at] = value
            memory[7] = memory[7]  # a silent store
            delta = mirror.update()
            apply(delta, replica)
            assert replica == mirror.data == memory
            assert {at // 8 + i for at, data in delta for i in range(-(-len(data) // 8))} <= expected.keys()
            owed = compose(owed, delta)
        apply(owed, lagging)
        assert lagging == memory
    assert (mirror.nbytes, mirror.granule) == (len(memory), 8)
    assert mirror.data.readonly
    with pytest.raises((NotStarted, SessionClosed)):
        mirror.update()
    with pytest.raises(TypeError, match="follows this process's memory"):
        pickle.dumps(mirror)


def test_a_tracker_of_several_regions_has_a_mirror_each() -> None:
    one, two = bytearray(9 * PAGE), np.zeros(5000, np.float32)
    with dirtytrack.track({"one": one, "two": two}) as tracker:
        with pytest.raises(InvalidMemory, match=r"which region\?.*'one', 'two'"):
            Mirror(tracker)
        with pytest.raises(InvalidMemory, match="no such region"):
            Mirror(tracker, "three")
        with pytest.raises(InvalidMemory, match="no name can be given"):
            Mirror(tracker, "one", name="x")
        first, second = Mirror(tracker, "one"), Mirror(tracker, tracker.regions[1])
        assert (first.granule, second.granule) == (8, 4)
        one[5000], two[77] = 1, 2
        assert [at for at, _ in first.update()] == [5000]
        two[78] = 3
        assert list(second.update().changed(two)) == [77, 78]
        assert not first.update()
        with pytest.raises(InvalidMemory, match="given its tracker"):
            first.move_to(bytearray(9 * PAGE))
        first.close()  # not its tracker
        assert tracker.epoch
    with pytest.raises(NotStarted):
        Mirror(dirtytrack.track(one))
    with pytest.raises(InvalidMemory, match="region= is for a tracker"):
        Mirror(one, "one")
    with pytest.raises(InvalidMemory, match="power of two"):
        Mirror(one, granule=3)
    one += b"x"  # nobody holds it


def test_regions_and_their_ends() -> None:
    memory = bytearray(6 * PAGE)
    view = memoryview(memory)[100 : 4 * PAGE]
    with UffdSession() as session:
        region = session.register(view, name="part")
        tracker = dirtytrack.DirtyTracker(session)
        tracker.start()
        before = bytearray(view)
        memory[99], memory[100], memory[4 * PAGE - 1], memory[4 * PAGE] = 1, 2, 3, 4
        dirty = tracker.collect()
        delta = diff(region, before, dirty, 1)
        assert [(at, bytes(data)) for at, data in delta] == [(0, b"\2"), (len(view) - 1, b"\3")]
        assert diff(view, before, dirty, 1) == delta
        memory[100:110] = bytes(10)
        apply(diff(before, bytes(view)), region)
        assert memory[100:110] == bytes(10)
        apply(delta, region)  # what it writes is dirty
        assert tracker.collect().page_count == 2
        with pytest.raises(InvalidMemory, match="nobody watched"):
            diff(memory, bytes(len(memory)), dirty)
        tracker.stop()
        session.unregister(region)
        with pytest.raises(dirtytrack.NotRegistered):
            apply(delta, region)
        with pytest.raises(dirtytrack.NotRegistered):
            diff(region, before, dirty)


def test_memory_that_vanishes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(8 * PAGE))
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 8 * PAGE)
        follower = Follower(memory, blind_spots="accepted")
        memory[0] = memory[7 * PAGE] = 1
        os.truncate(file.fileno(), 6 * PAGE)
        with pytest.raises(RegionGone):
            follower.mirror.update()
        assert follower.mirror.data[0] == 0  # whole or not at all
        with pytest.raises(RegionGone):
            diff(memory, bytes(8 * PAGE))
        with pytest.raises(RegionGone):
            apply(diff(b"x" * 8 * PAGE, bytes(8 * PAGE)), memory)
        os.truncate(file.fileno(), 8 * PAGE)
        memory[3 * PAGE] = 1
        follower.verify()
        follower.mirror.close()


def test_raw_memory() -> None:
    memory = dirtytrack.allocate(8 * PAGE)
    with Mirror((memory.address, memory.nbytes)) as mirror:
        memory[PAGE] = 5
        assert [at for at, _ in mirror.update()] == [PAGE]
    other = dirtytrack.allocate(8 * PAGE)
    apply(diff((memory.address, memory.nbytes), (other.address, other.nbytes)), (other.address, other.nbytes))
    assert other[:] == memory[:]


@pytest.mark.parametrize("after", [False, True])
def test_a_failed_update_loses_nothing(after: bool) -> None:
    memory = dirtytrack.allocate(16 * PAGE)
    follower, failed = Follower(memory), 0
    for nth in itertools.count(1):
        memory[nth % 16 * PAGE] = memory[(nth * 7) % (16 * PAGE)] = nth % 256
        delta: Delta | None = None
        with failing("SCAN", "COPY", "ALLOCATE", number=errno.ENOMEM, nth=nth, after=after) as calls:
            try:
                delta = follower.mirror.update()
            except (MemoryError, dirtytrack.DirtyTrackError):
                failed += 1
        if delta is not None:
            apply(delta, follower.replica)
        follower.verify()
        if calls.seen < nth:
            break
    assert failed == nth - 1 > 1
    follower.mirror.close()


class Interrupted(BaseException):
    pass


def test_an_interrupt_anywhere_loses_nothing() -> None:
    def interrupt() -> None:
        raise Interrupted

    memory = bytearray(40 * PAGE)
    follower = Follower(memory)
    stopped = 0
    for nth in itertools.count(1):
        memory[nth * 97 % len(memory)] ^= 0x55
        points = Points(nth, interrupt)
        delta: Any = None
        try:
            delta = points.call(follower.mirror.update)
        except Interrupted:
            stopped += 1
        if delta is not None:
            apply(delta, follower.replica)
        follower.verify()
        if not points.where:
            break
    assert stopped > 20
    follower.mirror.close()


def test_writers_beside_it_do_not_part_the_copy_from_the_deltas() -> None:
    words = np.zeros(1 << 16, np.uint64)
    follower = Follower(words)
    stop = threading.Event()

    def write(seed: int) -> None:
        generator = np.random.default_rng(seed)
        while not stop.is_set():
            start = int(generator.integers(0, len(words) - 5000))
            words[start : start + 5000] = generator.integers(0, 2**63, 5000, np.uint64)  # without the GIL

    writers = [threading.Thread(target=write, args=(seed,)) for seed in range(2)]
    for writer in writers:
        writer.start()
    try:
        end = time.monotonic() + 1
        while time.monotonic() < end:
            follower.update()
            assert follower.replica == follower.mirror.data  # torn or not: what was told is what was copied
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    follower.verify()
    follower.mirror.close()


def test_updates_from_several_threads_follow_one_another() -> None:
    memory = bytearray(64 * PAGE)
    mirror = Mirror(memory)
    replica = bytearray(memory)
    found = list[tuple[int, int]]()
    lock = threading.Lock()

    def work(seed: int) -> None:
        random = Random(seed)
        for _ in range(200):
            memory[random.randrange(len(memory))] = 1
            with lock:  # the deltas must be kept in order
                found.extend((at, len(data)) for at, data in mirror.update())

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for at, nbytes in found:
        replica[at : at + nbytes] = memory[at : at + nbytes]
    assert replica == memory
    mirror.close()


def test_a_mirror_in_a_cycle_with_its_error_is_collected() -> None:
    """Which crashed CPython 3.11, as long as the core held the copy by a memoryview (gh-77894)."""

    def fail() -> None:
        mirror = Mirror(bytearray(4 * PAGE))
        with failing("COPY", number=errno.EIO), pytest.raises(dirtytrack.DirtyTrackError) as error:
            mirror.update()
        kept: list[Any] = [error.value, mirror]
        kept.append(kept)

    for _ in range(20):
        fail()
        gc.collect()


def test_room_is_used_again_when_nobody_holds_the_delta() -> None:
    memory = np.zeros(1 << 20, np.uint8)
    with Mirror(memory) as mirror:
        memory[:] = 1
        kept = mirror.update()
        memory[:] = 2
        views = [data for _, data in mirror.update()]  # their delta is gone, they hold it
        memory[:] = 3
        mirror.update()
        memory[:] = 4
        mirror.update()
        assert all(data == b"\1" * len(data) for _, data in kept)
        assert all(data == b"\2" * len(data) for data in views)


ARRAYS: list[Any] = [
    np.zeros((300, 70), np.float32),
    np.zeros((50, 3, 7), np.int16),
    np.zeros(9999, np.uint8),
    np.zeros((100, 10), np.complex128),
    np.zeros(500, [("a", "i4"), ("b", "f8")]),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: str(array.dtype))
def test_array_changes(array: Any) -> None:
    random = Random(2)
    flat = array.reshape(-1)
    with array_changes(array) as changes:
        assert isinstance(changes, ArrayChanges)
        assert not len(changes())
        for _ in range(30):
            wanted = sorted(random.sample(range(array.size), random.randrange(20)))
            for index in wanted:
                other = np.frombuffer(random.randbytes(array.itemsize), array.dtype)[0]
                while other.tobytes() == flat[index].tobytes():
                    other = np.frombuffer(random.randbytes(array.itemsize), array.dtype)[0]
                flat[index] = other
            flat[3] = flat[3]
            what = random.choice(("elements", "rows", "mask"))
            answer = np.asarray(changes.changed(what))  # type: ignore[arg-type]
            if what == "mask":
                assert answer.shape == array.shape
                assert np.flatnonzero(answer).tolist() == wanted
            elif what == "rows":
                assert answer.tolist() == sorted({index // (array.size // len(array)) for index in wanted})
            else:
                assert answer.tolist() == wanted
        array[0] = 1
        with pytest.raises(InvalidMemory, match="not 'columns'"):
            changes.changed("columns")  # type: ignore[arg-type]
        assert len(changes())  # it was not taken
        assert changes.mirror.data == array.tobytes()
    with pytest.raises(InvalidMemory, match="not C-contiguous"):
        array_changes(np.zeros((10, 10))[:, ::2])


def test_a_mirror_moves() -> None:
    first, second = bytearray(b"a" * 3 * PAGE), bytearray(b"a" * 3 * PAGE)
    second[5000] = 0
    mirror = Mirror(first)
    first[100] = 1  # of no interest any more
    with pytest.raises(InvalidMemory, match="has 5 bytes"):
        mirror.move_to(bytearray(5))
    assert [at for at, _ in mirror.update()] == [96]
    delta = mirror.move_to(second)
    assert [at for at, _ in delta] == [96, 5000]
    first[0] = 5
    second[0] = 6
    assert [(at, data[0]) for at, data in mirror.update()] == [(0, 6)]
    first += b"x"  # let go of
    mirror.close()
    second += b"x"

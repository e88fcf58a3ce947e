# SPDX-License-Identifier: MIT
"""Memory moves between two processes while it is written, and is right to the byte."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dirtytrack
from dirtytrack import CallbackFailed, MemoryDiffers, MigrationAborted, NotStarted, PeerRefused
from dirtytrack.errors import MigrationFailed
from dirtytrack.migration import Arrival, Destination, Goal, Progress, Source
from tests.kernel.migration.conftest import Cast
from tests.kernel.migration.parties import MIB


def move(cast: Cast, *nbytes: int, here: dict[str, Any] | None = None, there: dict[str, Any] | None = None) -> Any:
    receiving, address = cast.destination(**(there or {}))
    sending = cast.source(*nbytes, **(here or {}))
    sending.tell("migrate", address)
    moved, found, stores = sending.hear("moved")
    right, theirs, _ = receiving.hear("runs")
    assert right
    assert theirs == found
    assert stores > 0
    assert cast.log.never_both() == "destination"
    return moved


@contextmanager
def here_both(**options: Any) -> Iterator[tuple[Destination, Callable[[], list[Arrival]]]]:
    """A destination in a thread of this process, and what arrived."""
    found: list[Arrival] = []

    def receive() -> None:
        try:
            found.append(receiving.receive(timeout=20))
        except (MigrationFailed, NotStarted):
            pass

    with Destination(**options) as receiving:
        thread = threading.Thread(target=receive)
        thread.start()

        def arrivals() -> list[Arrival]:
            thread.join(20)
            return found

        try:
            yield receiving, arrivals
        finally:
            receiving.close()  # and whoever waits for a source waits no longer
            arrivals()


@pytest.mark.parametrize("connections", [1, 2, 5])
def test_memory_moves_while_it_is_written(cast: Cast, connections: int) -> None:
    moved = move(cast, 16 * MIB, here={"connections": connections, "goal": Goal(max_downtime=0.02)})
    assert moved.rounds[0].moved_bytes >= 8 * MIB
    assert moved.downtime < 1


def test_several_regions_of_odd_lengths(cast: Cast) -> None:
    move(cast, 3 * MIB, 4096, 5 * MIB + 4096)


def test_shared_memory(cast: Cast) -> None:
    moved = move(cast, 16 * MIB, here={"shared": True, "fill": 0.25})
    assert moved.rounds[0].moved_bytes < 8 * MIB


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_compressed(cast: Cast, codec: str) -> None:
    moved = move(cast, 8 * MIB, here={"compress": codec})
    assert moved.sent_bytes < moved.rounds[0].moved_bytes // 4


@pytest.mark.parametrize("options", [{}, {"compress": "zstd", "verify": True}], ids=["alone", "and compressed"])
def test_what_differs(cast: Cast, options: dict[str, Any]) -> None:
    """The program writes 8 bytes here and there, so a page that was sent before takes little."""
    goal = Goal(max_downtime=0.001, max_time=0.4)
    moved = move(cast, 16 * MIB, here={"delta": True, "bandwidth": 100e6, "goal": goal, **options})
    again = [each for each in moved.rounds[1:] if each.moved_bytes > 64 << 10]
    assert again, moved.rounds
    # Of pages that are written for the first time there is nothing to differ from.
    assert sum(each.sent_bytes for each in again) < sum(each.moved_bytes for each in again) / 4


def test_what_differs_from_memory_that_is_there_already() -> None:
    """Of what an earlier attempt brought, the source has no copy: pages are whole until they were sent anew."""
    memory, there = dirtytrack.allocate(4 * MIB, name="m"), bytearray(4 * MIB)
    memory[:] = there[:] = os.urandom(4 * MIB)
    there[5] ^= 1
    for at in range(0, len(memory), 8192):
        memory[at] ^= 1
    stop = threading.Event()

    def write() -> None:
        for count in range(1 << 30):
            if stop.is_set():
                return
            memory[count * 40960 % len(memory) + 8] ^= 1

    writer = threading.Thread(target=write)

    def pause() -> None:
        stop.set()
        writer.join()

    goal = Goal(max_downtime=0.001, max_time=0.3)
    with (
        here_both(memory={"m": there}) as (receiving, arrivals),
        Source(memory, pause=pause, resume=stop.clear, delta=True, bandwidth=50e6, verify=True) as source,
    ):
        writer.start()
        moved = source.migrate(receiving.address, goal)
        assert arrivals()
    assert there == memory[:]
    assert moved.rounds[0].sent_bytes > 1.9 * MIB  # as it differs, and nobody has both
    assert sum(each.sent_bytes for each in moved.rounds[1:]) < sum(each.moved_bytes for each in moved.rounds[1:])


def test_what_pause_and_state_take_is_predicted() -> None:
    """As told; and once an attempt has measured it, as it was."""
    memory = dirtytrack.allocate(MIB, name="m")
    memory[:8] = b"anything"

    def state() -> bytes:
        time.sleep(0.15)
        return b""

    def refuse(_: Arrival) -> None:
        raise ValueError("not yet")

    def pause() -> None:
        time.sleep(0.05)

    options: dict[str, Any] = {"pause": pause, "resume": lambda: None, "state": state}
    with Source(memory, stop_seconds=0.2, **options) as source, here_both() as (receiving, _):
        moved = source.migrate(receiving.address, Goal(max_downtime=1.0))
    assert 0.2 <= moved.stop_seconds <= moved.downtime
    assert 0.2 <= moved.predicted_downtime < 0.4
    with Source(memory, **options) as source:
        with here_both(prepare=refuse) as (receiving, _), pytest.raises(PeerRefused):
            source.migrate(receiving.address)
        with here_both() as (receiving, _):
            moved = source.migrate(receiving.address, Goal(max_downtime=1.0))
        assert 0.2 <= moved.predicted_downtime < 0.6


def test_all_memory_read_once_more(cast: Cast) -> None:
    move(cast, 8 * MIB, here={"verify": True})


def test_over_a_unix_socket(cast: Cast, tmp_path: Path) -> None:
    move(cast, 4 * MIB, there={"listen": f"unix://{tmp_path}/socket"})


def test_with_a_token(cast: Cast) -> None:
    move(cast, 4 * MIB, here={"token": "secret"}, there={"token": "secret"})


def test_the_destination_needs_no_tracking(cast: Cast) -> None:
    without = ("seccomp-enosys", "no-device", "no-pagemap-scan")
    move(cast, 4 * MIB, there={"restrictions": without})


def test_what_was_never_populated_is_neither_touched_nor_sent() -> None:
    memory = dirtytrack.allocate(1024 * MIB, name="sparse")
    for at in range(0, len(memory), 16 * MIB):
        memory[at : at + 4] = b"full"
    with here_both() as (receiving, arrivals), Source({"sparse": memory}) as sending:
        moved = sending.migrate(receiving.address)
        (arrival,) = arrivals()
    assert moved.sent_bytes < MIB
    for each in (memory, arrival.memory["sparse"]):
        assert dirtytrack.pagemap.present(each).page_count < 64 * 512 + 1  # at most a huge page for each
    assert all(arrival.memory["sparse"][at : at + 5] == b"full\0" for at in range(0, len(memory), 16 * MIB))


def test_pages_of_zeroes_are_told_and_not_sent() -> None:
    memory = dirtytrack.allocate(32 * MIB, name="zeroes")
    memory[:] = bytes(len(memory))
    memory[5] = 5
    with here_both() as (receiving, arrivals), Source({"zeroes": memory}) as sending:
        moved = sending.migrate(receiving.address)
        (arrival,) = arrivals()
    assert moved.rounds[0].moved_bytes == 32 * MIB
    assert moved.sent_bytes < 64 << 10
    assert arrival.memory["zeroes"][:8] == memory[:8]


def test_memory_that_begins_and_ends_within_pages() -> None:
    whole, there = np.zeros(3 * MIB, np.uint8), np.zeros(3 * MIB, np.uint8)
    part = whole[1000 : 2 * MIB + 77]
    whole[:] = np.random.default_rng(3).integers(0, 256, len(whole), np.uint8)
    mine = there[33 : 33 + len(part)]
    mine[::5000] = 9  # what is there already is no hindrance
    with here_both(memory={"part": mine}) as (receiving, arrivals), Source({"part": part}) as sending:
        sending.migrate(receiving.address)
        arrivals()
    assert (mine == part).all()
    assert not there[:33].any()
    assert not there[33 + len(part) :].any()


def test_what_the_destination_has_already_is_not_sent() -> None:
    memory, there = dirtytrack.allocate(16 * MIB, name="table"), bytearray(16 * MIB)
    memory[:] = np.random.default_rng(3).bytes(len(memory))
    there[:] = memory
    memory[7 * MIB] ^= 1
    there[12 * MIB : 13 * MIB] = bytes(MIB)
    with here_both(memory={"table": there}) as (receiving, arrivals), Source({"table": memory}) as sending:
        moved = sending.migrate(receiving.address)
        arrivals()
    assert there == memory[:]
    assert moved.sent_bytes < MIB + (256 << 10)


def test_a_tracker_that_runs_keeps_what_it_had_when_a_migration_fails() -> None:
    memory = dirtytrack.allocate(MIB, name="m")
    with dirtytrack.track(memory) as tracker, Source(tracker, timeout=1) as sending:
        memory[4096] = 1

        def refuse(arrival: Arrival) -> None:
            raise ValueError("not today")

        with here_both(prepare=refuse) as (receiving, _), pytest.raises(PeerRefused, match="not today"):
            sending.migrate(receiving.address)
        assert sending.may_run
        assert memory.address + 4096 in tracker.collect()


def test_a_backend_that_compares_moves_too() -> None:
    memory = dirtytrack.allocate(2 * MIB, name="m")
    memory[:] = np.random.default_rng(3).bytes(len(memory))
    watching = dirtytrack.track(memory, backend="compare")
    with watching as tracker, Source(tracker) as sending, here_both() as (receiving, arrivals):
        sending.migrate(receiving.address)
        (arrival,) = arrivals()
    assert arrival.memory["m"][:] == memory[:]


def test_what_prepare_made_is_there_when_it_runs() -> None:
    memory = dirtytrack.allocate(MIB, name="m")
    memory[3] = 3

    def prepare(arrival: Arrival) -> tuple[int, bytes]:
        return arrival.memory["m"][3], arrival.state

    with here_both(prepare=prepare) as (receiving, arrivals), Source(memory, state=lambda: b"state") as sending:
        sending.migrate(receiving.address)
        (arrival,) = arrivals()
    assert arrival.prepared == (3, b"state")


def test_a_bandwidth_is_kept_to(cast: Cast) -> None:
    moved = move(cast, 8 * MIB, here={"bandwidth": 20e6})
    assert moved.sent_bytes / moved.seconds < 24e6


def test_slowing_the_source_makes_it_converge(cast: Cast) -> None:
    goal = Goal(max_downtime=0.05, on_divergence="slow")
    moved = move(cast, 8 * MIB, here={"bandwidth": 30e6, "hot": 0.8, "goal": goal})
    assert moved.predicted_downtime <= 0.05


def test_a_write_that_nobody_saw_is_found_by_verify() -> None:
    memory = dirtytrack.allocate(MIB, name="m", shared=True)
    memory[:] = np.random.default_rng(3).bytes(len(memory))

    def behind_its_back() -> None:
        os.pwrite(memory.fileno(), b"unseen", 5 * 4096)  # by a descriptor: no page table has it

    watching = dirtytrack.track(memory, blind_spots="accepted")
    source = Source(watching, pause=behind_its_back, resume=lambda: None, verify=True, timeout=5)
    with watching, source, here_both() as (receiving, _):
        with pytest.raises(MemoryDiffers, match="page 5 of region 'm'"):
            source.migrate(receiving.address)
        assert source.may_run


def test_somebody_calls_abort() -> None:
    memory = dirtytrack.allocate(4 * MIB, name="m")
    memory[:] = np.random.default_rng(3).bytes(len(memory))

    def enough(told: Progress) -> None:
        if told.total_bytes > MIB:
            source.abort()

    source = Source(memory, bandwidth=4e6, progress=enough)
    with source, here_both() as (receiving, _):
        with pytest.raises(MigrationAborted, match="abort"):
            source.migrate(receiving.address)
        assert source.may_run


@pytest.mark.parametrize("which", ["pause", "state", "progress", "slow", "resume"])
def test_functions_that_fail(which: str) -> None:
    memory = dirtytrack.allocate(MIB, name="m")
    calls = list[str]()

    def called(name: str) -> Callable[..., bytes]:
        def function(*_: object) -> bytes:
            calls.append(name)
            if name == which or (which == "resume" and name == "state"):
                raise ValueError("broken")
            return b""

        return function

    stop, words = threading.Event(), [called(name) for name in ("pause", "resume", "state", "slow", "progress")]
    goal = Goal(max_downtime=0.0002, on_divergence="slow") if which == "slow" else Goal()
    given = dict(zip(("pause", "resume", "state", "slow", "progress"), words, strict=True))

    def write() -> None:
        count = 0
        while not stop.is_set():
            count += 1
            memory[:] = bytes([count % 256]) * len(memory)

    writer = threading.Thread(target=write)
    rate = 10e6 if which == "slow" else 50e6  # the writer has its turn in each round, however loaded the machine is
    with Source(memory, bandwidth=rate, **given) as source, here_both() as (receiving, _):  # type: ignore[arg-type]
        if which == "slow":
            writer.start()
        try:
            with pytest.raises(MigrationFailed) as caught:
                source.migrate(receiving.address, goal)
        finally:
            stop.set()
        assert isinstance(caught.value, CallbackFailed), caught.value
        assert isinstance(caught.value.__cause__, ValueError)
        assert caught.value.running == (None if which == "resume" else "source")
        assert ("resume" in calls) == ("pause" in calls)
        assert source.may_run


def test_a_destination_that_closes_at_once_leaves_no_doubt() -> None:
    for _ in range(20):
        memory = dirtytrack.allocate(MIB, name="m")

        def receive(receiving: Destination) -> None:
            with receiving:
                receiving.receive()

        receiving = Destination()
        thread = threading.Thread(target=receive, args=(receiving,))
        thread.start()
        with Source(memory, timeout=5, doubt_timeout=0.0) as source:
            assert source.migrate(receiving.address).resolved is None
        thread.join()

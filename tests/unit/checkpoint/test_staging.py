# SPDX-License-Identifier: MIT
"""The staging buffer: what is lent of it comes back when nobody has it any more."""

from __future__ import annotations

import threading
from typing import Any

from obstore.store import MemoryStore

from dirtytrack.checkpoint.objects.sink import ObjectSink
from dirtytrack.checkpoint.staging import Staging, default_staging_nbytes
from tests.buckets import Memory

KIB, MIB = 1 << 10, 1 << 20


def test_room_comes_back_with_the_last_view() -> None:
    staging = Staging(64 * KIB)
    room = staging.take(64 * KIB, 64 * KIB)
    assert room is not None and staging.take(1, 1) is None
    lent = staging.lend(room)
    lent[:3] = b"abc"
    assert bytes(staging.view[:3]) == b"abc"
    part = memoryview(lent[1:9]).cast("B")[1:]
    del lent
    assert staging.take(1, 1) is None
    taken: list[Any] = []
    thread = threading.Thread(target=lambda: taken.append(staging.take(64 * KIB, 64 * KIB, lambda: False)))
    thread.start()
    assert bytes(part[:1]) == b"c" and not taken
    del part
    thread.join(60)
    assert taken[0].nbytes == 64 * KIB


def test_whoever_waits_can_give_up() -> None:
    staging = Staging(64 * KIB)
    assert staging.take(1, 64 * KIB) is not None
    over = threading.Event()
    thread = threading.Thread(target=lambda: staging.take(1, 1, over.is_set))
    thread.start()
    over.set()
    staging.wake()
    thread.join(60)
    assert not thread.is_alive()


def test_room_goes_round() -> None:
    staging = Staging(64 * KIB)
    rooms = [staging.take(16 * KIB, 16 * KIB) for _ in range(4)]
    assert [room and room.offset for room in rooms] == [0, 16 * KIB, 32 * KIB, 48 * KIB]
    for at in (1, 0):  # the second waits for the first
        assert staging.take(16 * KIB, 16 * KIB) is None
        found = rooms[at]
        assert found is not None
        staging.give_back(found)
    again = staging.take(32 * KIB, 64 * KIB)
    assert again is not None and (again.offset, again.nbytes) == (0, 32 * KIB)
    staging.clear()
    whole = staging.take(64 * KIB, 64 * KIB)
    assert whole is not None and whole.offset == 0


def test_a_sink_holds_what_is_lent_for_long_enough_and_copies_the_rest() -> None:
    for lent_nbytes, held in ((0, False), (9 * MIB, False), (10 * MIB, True)):
        store = MemoryStore()
        sink = ObjectSink(Memory(store), "segments/x", 5 * MIB, 2, lambda _: True)
        staging = Staging(64 * KIB)
        room = staging.take(64 * KIB, 64 * KIB)
        assert room is not None
        lent = staging.lend(room)
        lent[:] = bytes(range(256)) * 256
        sink.write(lent, lent_nbytes)
        del lent
        assert (staging.take(1, 1) is None) == held
        sink.finish()
        assert Memory(store).get("segments/x") == bytes(range(256)) * 256
        staging.clear()


def test_how_large_it_is() -> None:
    assert default_staging_nbytes(100) == 2 * MIB
    assert default_staging_nbytes(8 * MIB) == default_staging_nbytes(8 * MIB, 45 * MIB) == 16 * MIB
    assert default_staging_nbytes(1 << 30) == 128 * MIB
    assert default_staging_nbytes(1 << 40) == 256 * MIB
    assert default_staging_nbytes(1 << 40, 45 * MIB) == 301 * MIB

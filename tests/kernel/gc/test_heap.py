# SPDX-License-Identifier: MIT
"""The heap as Python uses it: values, threads, memory that comes and goes, and what is refused."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import dirtytrack
from dirtytrack import DirtyTracker
from examples.heap import Heap
from tests.asked import SOAK
from tests.kernel.gc.graphs import STORES, Graph, child

SMALL: dict[str, Any] = {"eden_bytes": 16384, "survivor_bytes": 4096, "segment_bytes": 512 << 10, "old_bytes": 8 << 20}


# ---- values ---------------------------------------------------------------------------------------------------------


def test_a_tuple_holds_what_it_was_given(heap: Heap) -> None:
    made = heap.tuple(1, -(1 << 62), (1 << 62) - 1, None, True, False, heap.string("größe"), tag=9)
    heap.minor()
    heap.full()
    assert list(made)[:6] == [1, -(1 << 62), (1 << 62) - 1, None, True, False]
    assert child(made, 6).text == "größe"
    assert (made.kind, made.tag, len(made), made[-2]) == ("tuple", 9, 7, False)
    made[0] = made
    assert made[0] == made
    assert made != heap.tuple()
    assert made != 1


def test_an_array_holds_numbers_of_64_bits(heap: Heap) -> None:
    made = heap.array(4)
    made[0], made[1], made[3] = -(1 << 63), (1 << 63) - 1, 5
    heap.full()
    assert list(made) == [-(1 << 63), (1 << 63) - 1, 0, 5]
    with made.contents() as view:
        view.cast("q")[2] = -7
    assert made[2] == -7


def test_an_array_may_hold_what_looks_like_an_address(heap: Heap) -> None:
    young = heap.tuple(1)
    array = heap.array(5000)  # at once old
    with heap.running(), array.contents() as view:
        for i in range(5000):
            view.cast("Q")[i] = heap.word(young)
    before = list(array)
    heap.minor()
    heap.minor()
    assert list(array) == before  # numbers are not redirected
    assert young[0] == 1


def test_references_follow_their_objects_into_the_old_generation(heap: Heap) -> None:
    made = heap.tuple(heap.tuple(heap.bytes(b"abc")))
    assert {each.generation for each in heap.objects()} == {"young"}
    heap.minor()
    heap.minor()
    assert {each.generation for each in heap.objects()} == {"old"}
    assert bytes(child(child(made, 0), 0)) == b"abc"


@pytest.mark.parametrize("store", STORES, ids=lambda store: store.__name__)
def test_an_old_object_that_is_made_to_point_to_a_young_one(heap: Heap, store: Callable[..., None]) -> None:
    holders = [heap.vector(600) for _ in range(40)]
    heap.full()
    heap.minor()
    heap.minor()
    for round_number in range(5):
        for i, holder in enumerate(holders):
            store(heap, holder, 7 * i, heap.tuple(round_number, i))
        heap.minor()
        for i, holder in enumerate(holders):
            assert list(child(holder, 7 * i)) == [round_number, i]
    heap.full()
    assert len(heap.objects()) == 80


def test_what_a_file_has_is_read_into_the_heap(heap: Heap, tmp_path: Path) -> None:
    content = random.Random(1).randbytes(1 << 20)
    (tmp_path / "file").write_bytes(content)
    large = heap.bytes(1 << 20)
    with (tmp_path / "file").open("rb", buffering=0) as file, large.contents() as view:
        assert file.readinto(view) == 1 << 20
    heap.full()
    assert bytes(large) == content


# ---- threads --------------------------------------------------------------------------------------------------------


def test_a_thread_that_is_busy_elsewhere_keeps_nobody_waiting(heap: Heap) -> None:
    going_on, used = threading.Event(), threading.Event()

    def use_and_wait() -> int:
        made = heap.tuple(5)
        used.set()
        assert going_on.wait(60)
        value = made[0]
        assert isinstance(value, int)
        return value

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(use_and_wait)
        assert used.wait(60)
        heap.minor()
        heap.full()
        going_on.set()
        assert answer.result() == 5


def test_nothing_moves_while_a_thread_runs(heap: Heap) -> None:
    made, collected = heap.tuple(1, 2), threading.Event()

    def collect() -> None:
        heap.minor()
        collected.set()

    thread = threading.Thread(target=collect)
    with heap.running():
        address = heap.word(made)
        thread.start()
        assert not collected.wait(0.05)
        assert heap.word(made) == address
    thread.join()
    with heap.running():
        assert heap.word(made) != address


def test_threads_that_end_leave_nothing_behind(heap: Heap) -> None:
    before = len(heap.objects())
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: list(heap.tuple(i, heap.tuple())), range(200)))
    gc.collect()
    heap.full()
    assert len(heap.objects()) == before


def mutate(graph: Graph, chance: random.Random, until: float) -> int:
    """Anything, at random, until the time is over; returns how many steps that was."""
    steps = 0
    while time.monotonic() < until:
        steps += 1
        numbers = list(graph.held)
        kind = chance.choice(("tuple", "tuple", "bytes", "array"))
        if len(numbers) < 30 or chance.random() < 0.2:
            graph.make(kind, chance.choice((0, 1, 3, 5, 40, 700, 1500)))  # type: ignore[arg-type]
        elif chance.random() < 0.3 and len(numbers) > 20:
            graph.drop(chance.choice(numbers))
        else:
            holder = chance.choice(numbers)
            slots = graph.nodes[holder].slots
            index = chance.randrange(len(slots)) if slots else 0
            if slots and slots[index] is not None and chance.random() < 0.5:
                graph.follow(holder, index)
            elif slots:
                graph.store(holder, index, chance.choice(numbers), chance.choice(STORES))
        if steps % 100 == 0:
            graph.nodes = {number: graph.nodes[number] for number in graph.reachable()}
    graph.compare_all()
    return steps


@pytest.mark.parametrize("background", [True, False], ids=["with a collector's thread", "without"])
def test_threads_that_change_graphs_while_the_heap_is_collected(background: bool) -> None:
    with Heap(verify=True, concurrent=background, **{**SMALL, "old_bytes": 64 << 20}) as heap:
        graphs = [Graph(heap, 1 + 1_000_000 * i) for i in range(3)]
        until = time.monotonic() + (30 if SOAK else 1.5)
        with ThreadPoolExecutor(3) as pool:
            running = [pool.submit(mutate, graph, random.Random(i), until) for i, graph in enumerate(graphs)]
            collections = [heap.cycle, heap.minor, heap.full, heap.cycle, heap.shrink]
            while not all(each.done() for each in running):
                for collect in collections:
                    collect()
                time.sleep(0.002)
            assert all(each.result() > 50 for each in running)
        heap.full()
        there = {each.first >> 1 if each.kind == "tuple" else each.first for each in heap.objects()}
        assert there == set().union(*(graph.reachable() for graph in graphs))
        assert heap.numbers().cycles > 3


# ---- memory that comes and goes -------------------------------------------------------------------------------------


def resident_bytes(region: dirtytrack.Region) -> int:
    found = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in (span := line.partition(" ")[0]) and ":" not in span:
            start, end = (int(number, 16) for number in span.split("-"))
            ours = start < region.end and region.start < end
        elif line.startswith("Rss:") and ours:
            found += int(line.split()[1]) << 10
    return found


def test_the_heap_grows_and_gives_memory_back() -> None:
    with Heap(verify=True, concurrent=False, **{**SMALL, "old_bytes": 32 << 20}) as heap:
        kept = [heap.tuple(i, heap.bytes(100_000)) for i in range(3)]
        heap.minor()
        heap.minor()  # they are old, and so where they stay
        for rounds in range(3):
            many = [heap.tuple(rounds, i, heap.bytes(bytes([rounds, i]) * 50_000)) for i in range(150)]
            assert heap.numbers().old_capacity_bytes > 15 << 20
            grown = sum(map(resident_bytes, heap.regions[:1]))
            assert all(bytes(child(each, 2)) == bytes([rounds, i]) * 50_000 for i, each in enumerate(many))
            del many
            heap.full()
            assert heap.shrink() > 14 << 20
            assert len(heap.regions) < 4
            assert sum(map(resident_bytes, heap.regions[:1])) <= grown
            assert [each[0] for each in kept] == [0, 1, 2]
            assert not any(bytes(child(each, 1)).strip(b"\0") for each in kept)
            heap.minor()


def test_pages_in_the_middle_are_given_back_and_used_again(heap: Heap) -> None:
    first, middle, last = heap.bytes(b"a" * 100_000), heap.bytes(b"b" * 200_000), heap.bytes(b"c" * 100_000)
    before = sum(map(resident_bytes, heap.regions))
    del middle
    heap.full()
    assert heap.shrink() >= 180_000
    assert sum(map(resident_bytes, heap.regions)) <= before - 180_000
    again = heap.tuple(heap.bytes(150_000), heap.vector(4000))
    child(again, 1)[3999] = heap.tuple(1)
    heap.minor()
    assert list(child(child(again, 1), 3999)) == [1]
    assert bytes(first) + bytes(last) == b"a" * 100_000 + b"c" * 100_000


def test_a_reservation_of_64_gib_takes_little(heap: Heap) -> None:
    with Heap(old_bytes=64 << 30, verify=True, concurrent=False) as large:
        before = page_table_bytes()
        kept = [large.tuple(i, None) for i in range(1000)]
        large.full()
        for each in kept:
            each[1] = large.tuple(7)
        large.minor()
        large.full()
        assert large.cycle()
        assert [list(child(each, 1)) for each in kept] == [[7]] * 1000
        assert page_table_bytes() - before < 4 << 20


def page_table_bytes() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmPTE"))
    return int(line.split()[1]) << 10


# ---- somebody else listens too --------------------------------------------------------------------------------------


def test_a_checkpointer_beside_the_collector_has_every_byte() -> None:
    with Heap(verify=True, **SMALL) as heap:
        for _ in range(8):
            heap.bytes(500_000)  # so that all segments are there
        (mirrors, listener) = {region: bytearray(region.nbytes) for region in heap.regions}, DirtyTracker(heap.session)
        listener.start()
        for region, mirror in mirrors.items():
            mirror[:] = region_bytes(region)
        graph, chance = Graph(heap), random.Random(3)
        for _ in range(4):
            mutate(graph, chance, time.monotonic() + 0.1)
            heap.cycle()
            listener.collect_into(mirrors)
            for region, mirror in mirrors.items():
                assert mirror == region_bytes(region)
        listener.stop()


def region_bytes(region: dirtytrack.Region) -> bytes:
    import ctypes

    return ctypes.string_at(region.address, region.nbytes)

# SPDX-License-Identifier: MIT
"""What a heap refuses, what goes wrong in it, and that nothing is lost by an interrupt wherever it comes."""

from __future__ import annotations

import linecache
import os
import queue
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import dirtytrack.gc
import examples.heap
from examples.heap import Heap, HeapBusy, HeapClosed, HeapCorrupt, HeapExhausted, Ref, WrongKind
from tests.asked import SOAK
from tests.kernel.gc.graphs import child, number_of

SMALL: dict[str, Any] = {"eden_bytes": 16384, "survivor_bytes": 4096, "segment_bytes": 512 << 10, "old_bytes": 8 << 20}
FOLDERS = tuple(str(Path(package.__file__ or "").parent) for package in (dirtytrack.gc, examples.heap))


def test_what_objects_do_not_hold(heap: Heap) -> None:
    made, array, text = heap.tuple(1), heap.array(1), heap.string("text")
    for bad in (1 << 62, -(1 << 62) - 1, 1 << 70):
        with pytest.raises(WrongKind, match=r"6[34] bits"):
            made[0] = bad
    with pytest.raises(WrongKind, match="64 bits"):
        array[0] = 1 << 63
    for value in (None, True, made):
        with pytest.raises(WrongKind):
            array[0] = value
    with pytest.raises(WrongKind):
        text[0] = 1
    with pytest.raises(WrongKind):
        made.copy_items(0, array, 0, 1)
    for index in (1, -2, 1 << 40):
        with pytest.raises(IndexError):
            made[index]
    with pytest.raises(IndexError):
        made.copy_items((1 << 64) - 1, made, 0, 2)
    with Heap(**SMALL) as other, pytest.raises(WrongKind, match="another heap"):
        made[0] = other.tuple()
    for length, tag in ((-1, 0), (1 << 50, 0), (1, 256), (1, -1)):
        with pytest.raises(ValueError, match="no object has"):
            heap.vector(length, tag=tag)


@pytest.mark.parametrize(
    "options", [{"eden_bytes": 100}, {"eden_bytes": 20_000}, {"survivor_bytes": 0}, {"promote_age": 16}]
)
def test_no_heap_is_made_so(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"multiples of 4096|0 to 15"):
        Heap(**options)


def test_a_closed_heap() -> None:
    heap = Heap(**SMALL)
    made = heap.tuple(1)
    heap.close()
    heap.close()
    for use in (heap.minor, heap.tuple, lambda: made[0], heap.numbers, heap.objects):
        with pytest.raises(HeapClosed):
            use()
    assert repr(heap) == "<Heap, closed>"


def test_a_collection_from_within_running(heap: Heap) -> None:
    with heap.running():
        for collect in (heap.minor, heap.full, heap.cycle, heap.shrink, heap.verify, heap.numbers):
            with pytest.raises(HeapBusy, match="leave it first"):
                collect()
    with pytest.raises(HeapBusy, match=r"within running\(\) only"):
        heap.word(heap.tuple())


def test_an_allocation_within_running_may_collect(heap: Heap) -> None:
    kept = heap.tuple(heap.tuple(1))
    with heap.running():
        for _ in range(5000):
            heap.tuple(2)
    assert heap.numbers().minors > 3
    assert list(child(kept, 0)) == [1]


def test_a_heap_that_is_full_says_so_and_goes_on(heap: Heap) -> None:
    kept = []
    with pytest.raises(HeapExhausted, match="all 8388608 bytes that it may have"):
        while True:
            kept.append(heap.bytes(300_000))
    assert len(kept) > 20
    kept = kept[:2]
    heap.full()
    assert all(bytes(heap.bytes(300_000)) == bytes(300_000) for _ in range(30))


def test_many_small_objects_that_fill_the_heap() -> None:
    with Heap(verify=True, **{**SMALL, "old_bytes": 1 << 20}) as heap:
        kept: Ref | None = None
        with pytest.raises(HeapExhausted, match="what a minor collection may promote"):
            while True:
                kept = heap.tuple(kept)
        length, each = 0, kept
        while each is not None:
            value = each[0]
            length, each = length + 1, value if isinstance(value, Ref) else None
        assert length > 10_000
        del kept, each, value
        heap.full()
        assert not heap.objects()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError])
def test_a_collection_that_fails_loses_nothing(
    heap: Heap, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = heap.vector(3000)
    for i in range(3000):
        holder[i] = heap.tuple(i)
    heap.minor()
    remembered = heap._generations.remembered
    for step in ("minor", "forget_own_writes"):
        for i in range(0, 3000, 10):
            holder[i] = heap.tuple(-i)

        def fails(*arguments: object) -> object:
            raise kind("here")

        with monkeypatch.context() as patch:
            patch.setattr(remembered, step, fails)
            with pytest.raises(kind):
                while True:
                    heap.tuple()
        heap.minor()
        assert [child(holder, i)[0] for i in range(3000)] == [-i if i % 10 == 0 else i for i in range(3000)]


def test_a_signal_handler_in_the_middle_of_a_collection(heap: Heap, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[BaseException] = []

    def handler(*_: object) -> None:
        for use in (heap.minor, heap.tuple):
            try:
                use()
            except HeapBusy as error:
                refused.append(error)

    remembered = heap._generations.remembered
    minor = remembered.minor

    def is_interrupted(low: int, high: int) -> object:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.001)
        return minor(low, high)

    monkeypatch.setattr(remembered, "minor", is_interrupted)
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        heap.minor()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(refused) == 2
    assert heap.tuple(1)[0] == 1


def test_a_failure_of_the_collectors_thread_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with Heap(**SMALL) as heap:
        collector: Any = heap._collector

        def fails(cycle: object) -> bool:
            raise OSError("the kernel is tired")

        monkeypatch.setattr(collector, "_cycle", fails)
        kept = None
        with pytest.raises(OSError, match="the kernel is tired"):
            while True:
                kept = heap.tuple(kept)
        monkeypatch.undo()
        heap.full()


def test_a_cycle_that_finds_no_room_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    with Heap(**{**SMALL, "old_bytes": 1 << 20}) as heap:
        kept: Ref | None = None
        with pytest.raises(HeapExhausted):
            while True:
                kept = heap.tuple(kept)
        collector: Any = heap._collector
        cycle, tried = collector._cycle, queue.SimpleQueue[BaseException | None]()

        def watched(mark: object) -> bool:
            try:
                ended: bool = cycle(mark)
            except HeapExhausted as error:
                tried.put(error)
                raise
            tried.put(None)
            return ended

        monkeypatch.setattr(collector, "_cycle", watched)
        collector._due_bytes = 0  # as it was when a cycle began before the last full collection
        collector._wanted.set()
        assert isinstance(tried.get(timeout=60), HeapExhausted)
        del kept
        heap.full()  # what was wanting for the cycle is there: nobody else need hear of it
        for _ in range(20_000):
            heap.tuple(1)


def test_a_reference_that_leads_nowhere_is_found(heap: Heap) -> None:
    holder = heap.tuple(None, 1)
    heap.full()
    with holder.contents() as view:
        view.cast("Q")[0] = heap.word(heap.tuple()) + 16
    with pytest.raises(HeapCorrupt, match="where no object is") as caught:
        heap.verify()
    assert caught.value.slot == caught.value.holder + 8
    holder[0] = None
    heap.verify()
    with heap.bytes(b"12345678").contents() as view:
        assert int.from_bytes(view, "little") > 0
    assert number_of(heap.bytes(b"\1" + bytes(7))) == 1


# ---- interrupts

CALLS: dict[str, Callable[[Heap], object]] = {
    "minor": Heap.minor,
    "full": Heap.full,
    "cycle": Heap.cycle,
    "shrink": Heap.shrink,
    "allocation": lambda heap: heap.bytes(400_000),  # for which the heap grows, or is collected
}


@pytest.mark.parametrize("call", CALLS)
def test_an_interrupt_at_any_line_loses_nothing(call: str) -> None:
    """By a tracer that raises at the n-th line of the collector and of dirtytrack.gc that is run, for every n.

    In a thread of its own: where one is raised so within a handler, CPython 3.11 takes that to go on for ever.
    """
    with ThreadPoolExecutor(1) as pool:
        pool.submit(interrupt_at_any_line, call).result()


def interrupt_at_any_line(call: str) -> None:
    with Heap(verify=True, concurrent=False, **SMALL) as heap:
        holder = heap.vector(2000)
        heap.full()
        ended, lines, kept = False, 0, list[object]()
        while not ended:
            lines += 4 if call == "cycle" and not SOAK else 1  # it has the most lines
            for i in range(0, 2000, 400):
                holder[i + lines % 400] = heap.tuple(lines, i)
            kept.append(heap.bytes(300_000))
            del kept[: -(lines % 20) - 1]
            ended = not interrupted(lines, lambda: CALLS[call](heap))
            for i in range(0, 2000, 400):
                assert list(child(holder, i + lines % 400)) == [lines, i]
            heap.minor()
            heap.verify()
        assert lines > 20
        heap.full()
        assert all(isinstance(each, Ref) and not bytes(each).strip(b"\0") for each in kept)


NO_SIGNAL_THERE = ("with ", "try:", "finally:", "self._lib.heap_resume", "self._lib.heap_leave_to")
SWALLOWING = ("__del__", "_drop", "failed")  # finalisers, and what C calls when a callback failed


def interrupted(line: int, call: Callable[[], object]) -> bool:
    """Whether that many lines were run, at which Ctrl-C came."""
    left = line

    def tracer(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        code = frame.f_code
        if not code.co_filename.startswith(FOLDERS) or code.co_name in SWALLOWING:
            return None
        line = linecache.getline(code.co_filename, frame.f_lineno).strip()
        if event == "line" and not line.startswith(NO_SIGNAL_THERE):
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return tracer

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    assert left > 0, "an interrupt was swallowed"
    return False

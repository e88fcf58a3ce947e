# SPDX-License-Identifier: MIT
"""A barrier that loses a page now and then is found out: so the other tests of the heap can fail."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import pytest

from dirtytrack import DirtySet, DirtyTracker
from examples.heap import Heap, HeapCorrupt, LispFailed, Ref
from examples.heap.lisp import Lisp
from tests.asked import SOAK
from tests.oracle import PAGE

SMALL: dict[str, Any] = {"eden_bytes": 16384, "segment_bytes": 512 << 10, "old_bytes": 8 << 20}


class Lossy(DirtyTracker):
    """Loses one page in so many, of all that it would tell."""

    one_in = 0
    lost = told = 0
    chance = random.Random(1)

    def collect(self, *arguments: Any, **options: Any) -> DirtySet:
        dirty = super().collect(*arguments, **options)
        kind = type(self)
        for start, end in dirty if self.epoch > 2 else ():  # the first collect tells what was there before
            for page in range(start, end, PAGE):
                kind.told += 1
                if kind.one_in and not kind.chance.randrange(kind.one_in):
                    kind.lost += 1
                    dirty = dirty - DirtySet.from_runs([(page, page + PAGE)])
        return dirty


def lossy(one_in: int, seed: int = 1) -> type[Lossy]:
    return type("Lossy", (Lossy,), {"one_in": one_in, "lost": 0, "told": 0, "chance": random.Random(seed)})


# Each turn reads an old pair from a vector that is old, and stores a new one there: a page that must be told before the
# next allocation.
RING = """
(define ring (make-vector 64 (cons 0 '())))
(define (turn left total)
  (if (= left 0)
      total
      (let ((before (car (vector-ref ring (remainder left 64)))))
        (vector-set! ring (remainder left 64) (cons left '()))
        (turn (- left 1) (+ total before)))))
"""


def stressed(tracker: type[DirtyTracker], *, verify: bool, turns: int) -> None:
    with Heap(stress=True, verify=verify, promote_age=0, minor_tracker=tracker, **SMALL) as heap:
        lisp = Lisp(heap)
        lisp.run(RING)
        assert lisp.run(f"(turn {turns} 0)") == sum(range(65, turns + 1))


def test_a_tracker_that_loses_nothing_passes_here() -> None:
    whole = lossy(0)
    stressed(whole, verify=True, turns=500)
    assert whole.told > 500


@pytest.mark.parametrize("seed", range(4))
def test_one_page_lost_in_a_hundred_is_found_by_looking_at_the_heap(seed: int) -> None:
    tracker = lossy(100, seed)
    with pytest.raises(HeapCorrupt, match="the collector missed that it was written"):
        stressed(tracker, verify=True, turns=1500)
    assert tracker.lost < 40, "found late"


@pytest.mark.parametrize("seed", range(2))
def test_one_page_lost_in_a_hundred_is_found_by_what_programs_answer(seed: int) -> None:
    with pytest.raises((AssertionError, LispFailed)):
        stressed(lossy(100, seed), verify=False, turns=1500)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(4))
def test_one_page_lost_in_ten_thousand_is_found(seed: int) -> None:
    tracker = lossy(10_000, seed)
    with pytest.raises(HeapCorrupt):
        for _ in range(100):
            stressed(tracker, verify=True, turns=20_000)
    assert tracker.lost < 40, "found late"


# ---- marking --------------------------------------------------------------------------------------------------------


def hide_behind_what_was_marked(heap: Heap) -> Ref:
    """Marking is under way; now the only reference to an old object moves from one that was not read yet to one that
    was. Every collector that marks beside its mutators must hear of the one store or the other."""
    front, back = heap.tuple(1, None), heap.tuple(2, heap.tuple(3, heap.string("hidden")))
    last = heap.tuple(4, back, front)
    heap.full()
    heap.full()  # all of it is old
    assert {each.generation for each in heap.objects()} == {"old"}
    return last


def move(root: Ref) -> None:
    back, front = root[1], root[2]
    assert isinstance(back, Ref)
    assert isinstance(front, Ref)
    front[1], back[1] = back[1], None


@pytest.mark.parametrize("told", [True, False], ids=["told", "lost"])
def test_what_moves_behind_a_marker_is_kept_only_if_it_is_told(told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = lossy(0)
    with Heap(verify=True, concurrent=False, marking_tracker=tracker, **SMALL) as heap:
        root = hide_behind_what_was_marked(heap)
        collector: Any = heap._collector
        beside, steps = collector._mark_beside, 0

        def marks_one_word_and_is_interrupted(cycle: object, starts: memoryview | None) -> bool:
            nonlocal steps
            steps += 1
            if steps == 1:  # the stack of the marker: root; then its children, of which the last one is read first
                with collector.alone():
                    assert not collector._lib.heap_mark_more(collector._native, 5)
                move(root)
                tracker.one_in = 0 if told else 1
            return bool(beside(cycle, starts))

        monkeypatch.setattr(collector, "_mark_beside", marks_one_word_and_is_interrupted)
        if told:
            assert heap.cycle()
            front = root[2]
            assert isinstance(front, Ref)
            hidden = front[1]
            assert isinstance(hidden, Ref)
            assert isinstance(hidden[1], Ref)
            assert hidden[1].text == "hidden"
        else:
            with pytest.raises(HeapCorrupt):
                heap.cycle()


SHUFFLE = """
(define lists (make-vector 4000 '()))
(define (fill i) (if (< i 4000) (begin (vector-set! lists i (cons i (cons i '()))) (fill (+ i 1)))))
(fill 0)
(define (swap i j)
  (let ((one (vector-ref lists i)))
    (vector-set! lists i (vector-ref lists j))
    (vector-set! lists j one)))
(define (shuffle left seed)
  (if (> left 0)
      (begin (swap (remainder (quotient seed 16) 4000) (remainder (quotient seed 65536) 4000))
             (shuffle (- left 1) (remainder (+ (* seed 1103515245) 12345) 2147483648)))))
(define (total i sum) (if (= i 4000) sum (total (+ i 1) (+ sum (car (cdr (vector-ref lists i)))))))
"""


def shuffled_beside_marking(tracker: type[DirtyTracker], seconds: float) -> int:
    """A program moves references about while the heap is marked again and again; returns how many cycles ended."""
    with Heap(verify=True, concurrent=False, marking_tracker=tracker, **SMALL) as heap:
        lisp = Lisp(heap)
        lisp.run(SHUFFLE)
        heap.full()
        heap.full()
        failed: list[BaseException] = []
        ending = threading.Event()

        def mutate() -> None:
            try:
                seed = 1
                while not ending.is_set():
                    lisp.run(f"(shuffle 20000 {seed})")
                    assert lisp.run("(total 0 0)") == sum(range(4000))
                    seed += 1
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=mutate)
        thread.start()
        try:
            until = time.monotonic() + seconds
            while time.monotonic() < until and not failed:
                heap.cycle()
        finally:
            ending.set()
            thread.join()
        if failed:
            raise failed[0]
        return heap.numbers().cycles


def test_a_program_that_shuffles_references_while_they_are_marked() -> None:
    assert shuffled_beside_marking(lossy(0), 20.0 if SOAK else 1.5) > 5


@pytest.mark.soak
def test_pages_lost_while_marking_are_found() -> None:
    with pytest.raises(HeapCorrupt):
        for seed in range(20):
            shuffled_beside_marking(lossy(3, seed), 5.0)

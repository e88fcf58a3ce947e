# SPDX-License-Identifier: MIT
"""When and in which order to collect. What is done to objects is in C; what was written is known by dirtytrack.gc."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import HeapBusy, HeapCorrupt, HeapExhausted
from .native import ffi, library

if TYPE_CHECKING:
    from .generations import Generations

__all__ = ["Collector", "Pause"]

_log = logging.getLogger("examples.heap")
_STEP_WORDS = 200_000  # that are read in one step of a concurrent marking, in about a millisecond
_GROWTH = 1.75  # the old generation is collected when it has become so many times what was alive


class Pause(NamedTuple):
    """A time for which the world was stopped."""

    what: str
    seconds: float


class Collector:
    """Of one heap.

    A minor collection stops the world, asks the remembered set for the old slots that point into the young generation,
    and evacuates from them. A full one stops the world and marks both generations. A cycle marks the old generation
    beside the mutators, and stops the world at the end for the pages that were written last.

    Args:
        native: the heap.
        generations: its memory.
        verify: read the whole heap after each collection, and raise HeapCorrupt where a reference leads nowhere.
        stopped: what is to be done first whenever the world is stopped.
    """

    def __init__(self, native: Any, generations: Generations, verify: bool, stopped: Any) -> None:
        self._lib = library()
        self._native, self._generations = native, generations
        self._verify, self._when_stopped = verify, stopped
        self._lock = threading.RLock()  # of whoever collects, or marks a step
        self._cycle_lock = threading.Lock()
        self._marking: object | None = None  # the cycle whose marks there are; a full collection takes them away
        self._least_due = self._due_bytes = generations.segment_bytes // 2
        self._background: threading.Thread | None = None
        self._wanted, self._ending = threading.Event(), False
        self._failure: BaseException | None = None
        self.minors = self.fulls = self.cycles = 0
        self.pauses: deque[Pause] = deque(maxlen=100_000)

    # ---- stopping the world

    def alone(self) -> threading.RLock:
        """What keeps others from collecting.

        Raises:
            HeapBusy: this thread itself is in a collection, interrupted by a signal handler.
        """
        if self._lock._is_owned():  # type: ignore[attr-defined]
            raise HeapBusy("a signal handler asked for a collection in the middle of one: do it when it has returned")
        return self._lock

    @contextmanager
    def _stopped(self, what: str) -> Iterator[None]:
        try:  # an interrupt may come as soon as heap_stop() returns; or after the yield, and then this is closed
            self._lib.heap_stop(self._native)
            began = time.perf_counter()
            self._when_stopped()
            yield
            self.pauses.append(Pause(what, time.perf_counter() - began))
        finally:
            self._lib.heap_resume(self._native)

    # ---- what is asked for

    def minor(self, *, unless_after: int | None = None) -> None:
        """Collect the young generation, unless somebody has done so since `minors` had that value.

        Raises:
            HeapExhausted, HeapCorrupt, HeapBusy; and what `RememberedSet.minor` raises. Nothing is lost then.
        """
        self._tell_failure()
        with self.alone():
            if unless_after is not None and self.minors != unless_after:
                return
            with self._stopped("minor"):
                self._minor()
                due = self._numbers().old_bytes >= self._due_bytes
                if due and self._background is None:
                    self._full()
        if due and self._background is not None:
            self._wanted.set()

    def full(self) -> None:
        """Free whatever cannot be reached at this moment, all of it.

        Raises:
            As `minor`.
        """
        with self.alone(), self._stopped("full"):
            self._full()
            self._minor()

    def make_room(self, nbytes: int) -> None:
        """For a large object.

        Raises:
            HeapExhausted: there is none, even after a full collection.
        """
        self._tell_failure()
        with self.alone(), self._stopped("full"):
            self._require_room(nbytes)

    def cycle(self) -> bool:
        """Mark the old generation while the mutators run, and free what is not reachable at the end. Whatever was not
        reachable when it began is freed; what became so since then may stay until the next.

        Returns:
            False where a full collection came between, which has freed more than this would have.

        Raises:
            As `minor`; nothing is freed then.
        """
        with self._cycle_lock:
            return self._cycle(object())

    def shrink(self) -> int:
        """Give memory of the old generation that holds no object back to the system; returns how many bytes."""
        with self._cycle_lock, self.alone(), self._stopped("shrink"):
            generations, before = self._generations, self._generations.nbytes
            self._lib.heap_extend(self._native, before)
            while len(generations.regions) > 1:
                if self._lib.heap_extend(self._native, generations.nbytes - generations.regions[-1].nbytes):
                    break
                generations.shrink()
            unit = max(generations.old.page_bytes, self._numbers().block_bytes)
            room = generations.nbytes // unit
            runs = ffi.new("uint64_t[]", 2 * room)
            discarded = 0
            for i in range(self._lib.heap_free_units(self._native, unit, runs, room)):
                start, end = runs[2 * i], runs[2 * i + 1]
                generations.discard(start, end)
                discarded += end - start
            self._check()
        return before - generations.nbytes + discarded

    def verify(self) -> None:
        """Look at every reference.

        Raises:
            HeapCorrupt: one leads to no object.
        """
        with self.alone(), self._stopped("verify"):
            self._check(always=True)

    def look(self, what: Any) -> Any:
        """``what(native)``, the world being stopped."""
        with self.alone(), self._stopped("look"):
            return what(self._native)

    # ---- how it is done; the world is stopped

    def _numbers(self) -> Any:
        numbers = ffi.new("heap_numbers *")
        self._lib.heap_count(self._native, numbers)
        return numbers

    def _minor(self) -> None:
        self._require_room(0)
        remembered = self._generations.remembered
        with remembered.forget_own_writes():
            slots = remembered.minor(*self._generations.nursery)
            self._lib.heap_minor(self._native, _numbers_of(slots.addresses), len(slots))
            self.minors += 1
        self._check()

    def _full(self) -> None:
        self._marking = None
        self._lib.heap_mark_begin(self._native)
        self._finish_marking()
        self.fulls += 1

    def _finish_marking(self, changed: memoryview | None = None) -> None:
        """From all roots, and from those of these objects that are marked, through both generations."""
        self._lib.heap_mark_roots(self._native, 1)  # first: it says that young objects are marked too
        if changed is not None:
            self._lib.heap_mark_again(self._native, _numbers_of(changed), len(changed))
        while not self._lib.heap_mark_more(self._native, 1 << 30):
            pass
        self._lib.heap_sweep(self._native)
        self._due_bytes = max(self._least_due, int(self._numbers().old_bytes * _GROWTH))
        self._check()

    def _require_room(self, nbytes: int) -> None:
        """Room for a large object; or, of 0 bytes, for a minor collection."""
        collected = self.fulls
        self._lib.heap_extend(self._native, self._generations.nbytes)  # an interrupt may have come before that
        while not self._lib.heap_has_room(self._native, nbytes):
            due = (
                self._numbers().old_bytes >= self._due_bytes or self._generations.nbytes == self._generations.old.nbytes
            )
            if due and self.fulls == collected:
                self._full()
            else:
                self._grow(nbytes)

    def _grow(self, nbytes: int) -> None:
        try:
            more = self._generations.grow()
        except HeapExhausted as error:
            what = f"{nbytes} bytes in one piece" if nbytes else "what a minor collection may promote"
            raise HeapExhausted(f"no room for {what}: {error}, and they are in use") from None
        if self._lib.heap_extend(self._native, more):
            raise HeapCorrupt(f"the old generation cannot have {more} bytes")

    def _check(self, *, always: bool = False) -> None:
        if not self._verify and not always:
            return
        fault = ffi.new("heap_fault *")
        if self._lib.heap_verify(self._native, fault):
            holder = f"object {fault.holder:#x}" if fault.holder else "a root"
            raise HeapCorrupt(
                f"the slot at {fault.slot:#x} of {holder} holds {fault.value:#x}, where no object is: the collector "
                "missed that it was written",
                holder=fault.holder,
                slot=fault.slot,
                value=fault.value,
            )

    # ---- marking beside the mutators

    def _cycle(self, cycle: object) -> bool:
        generations, lib, native = self._generations, self._lib, self._native
        with self.alone(), self._stopped("begin"):
            mark = generations.mark
            mark.begin()  # from here on all writes are told, and only then are the roots read
            self._marking = cycle
            lib.heap_mark_begin(native)
            lib.heap_mark_roots(native, 0)
        if not self._mark_beside(cycle, None):
            return False
        for dirty in mark.rounds():
            if not self._mark_beside(cycle, generations.starts.objects_on(dirty)):
                return False
        with self.alone(), self._stopped("finish"):
            # It writes every old slot that leads to a young object, so those are on the last dirty pages: what they
            # lead to was left out until now.
            self._minor()
            dirty = mark.finish()
            if self._marking is not cycle:
                return False
            self._finish_marking(generations.starts.objects_on(dirty))
            self.cycles += 1
        return True

    def _mark_beside(self, cycle: object, starts: memoryview | None) -> bool:
        """From these objects and all that is left to mark, in steps between which others may collect."""
        done = False
        while not done:
            with self.alone():
                if self._marking is not cycle:
                    return False
                if starts is not None:
                    self._lib.heap_mark_again(self._native, _numbers_of(starts), len(starts))
                    starts = None
                done = bool(self._lib.heap_mark_more(self._native, _STEP_WORDS))
        return True

    # ---- a thread for it

    def start_background(self) -> None:
        """From now on cycles are run by a thread of their own when they are due."""
        self._background = threading.Thread(target=self._run, name="heap collector", daemon=True)
        self._background.start()

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._ending:
                return
            try:
                if self._numbers().old_bytes >= self._due_bytes:
                    self.cycle()
            except HeapExhausted as error:
                # No failure: whoever needs the room collects in full itself, and says so where there is none then. It
                # may be there by the time that a mutator would hear of this.
                _log.debug("a concurrent collection found no room, and left it to the mutators: %s", error)
            except BaseException as error:
                _log.exception("a concurrent collection failed; the next allocation that collects says so")
                self._failure = error

    def _tell_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def end(self) -> None:
        """The thread, if there is one, ends."""
        self._ending = True
        self._wanted.set()
        if self._background is not None:
            self._background.join()


def _numbers_of(numbers: memoryview) -> Any:
    return ffi.from_buffer("uint64_t[]", numbers) if len(numbers) else ffi.NULL

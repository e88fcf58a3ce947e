# SPDX-License-Identifier: MIT
"""Heap: objects for Python programs, which hold them by references that follow them when they move."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from dirtytrack import DirtyTracker

from .collector import Collector, Pause
from .errors import HeapBusy, HeapClosed, HeapException, HeapExhausted, WrongKind
from .generations import Generations
from .native import ffi, library
from .references import Ref, Value, word_of

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from dirtytrack import Region, UffdSession

__all__ = ["Heap", "Numbers", "Object"]

TUPLE, BYTES, ARRAY = 1, 2, 3
_OK, _REFUSED, _BUSY, _WRONG_KIND, _WRONG_INDEX = range(5)
_OLD_FULL, _STRESS = 1, 2
_LEAST_EDEN = 16384


class Numbers(NamedTuple):
    """How much there is of what; bytes of objects that moved or went are counted since the heap was made."""

    young_bytes: int
    old_bytes: int
    old_capacity_bytes: int
    promoted_bytes: int
    survived_bytes: int
    freed_bytes: int
    redirected_slots: int
    minors: int
    fulls: int
    cycles: int


class Object(NamedTuple):
    """An object as `Heap.objects` finds it, reachable or not."""

    address: int
    generation: Literal["young", "old"]
    kind: Literal["tuple", "bytes", "array"]
    tag: int
    length: int
    first: int
    """Its first word, as it is; 0 where it has none."""


class Thread:
    """A thread that uses a heap: its mutator, and a handle for what it reads next."""

    def __init__(self, native: Any, gone: deque[Any]) -> None:
        self.native = library().heap_attach(native)
        if self.native == ffi.NULL:
            raise HeapExhausted("no memory for another thread's stack")
        self.spare, self._gone = -1, gone
        self.word, self.kind = ffi.new("heap_word *"), ffi.new("uint32_t *")

    def __del__(self) -> None:
        self._gone.append(self.native)  # it is detached when the world is stopped the next time


class Heap:
    """Tuples of references, bytes, and arrays of numbers, for any number of threads; collected in two generations.

    The old generation's pages are its write barrier: neither this nor the evaluator does anything at a store but store.

    Args:
        eden_bytes: where objects are born; 16 KiB at least.
        survivor_bytes: of each of the two spaces to which those that live are copied; a quarter of eden if left out.
        old_bytes: how large the old generation may become.
        segment_bytes: by how much it grows.
        promote_age: after how many minor collections an object becomes old; 0 to 15.
        huge: pages of the old generation, as `dirtytrack.allocate` takes it.
        concurrent: whether a thread marks the old generation beside the mutators when it is due; else that is done in a
            pause.
        pause_seconds: what the last pause of such a marking should stay below.
        adaptive: let old pages that are rewritten all the time go unwatched, and be read instead. What tracking costs
            is measured for it once in a process, in the middle of some collection, which takes tens of milliseconds.
        stress: a minor collection before each allocation.
        verify: read the whole heap after each collection; for tests.
        minor_tracker, marking_tracker: for tests, which pass one that misses writes.

    Thread safety: everything may be called from any thread, `close` when no other thread uses the heap any more. Signal
    handlers and finalisers do not use a heap that their thread may be in the middle of using.
    """

    def __init__(
        self,
        *,
        eden_bytes: int = 1 << 20,
        survivor_bytes: int | None = None,
        old_bytes: int = 1 << 30,
        segment_bytes: int = 4 << 20,
        promote_age: int = 1,
        huge: Literal["transparent", "2M", "1G"] | None = None,
        concurrent: bool = True,
        pause_seconds: float = 0.005,
        adaptive: bool = False,
        stress: bool = False,
        verify: bool = False,
        minor_tracker: type[DirtyTracker] = DirtyTracker,
        marking_tracker: type[DirtyTracker] = DirtyTracker,
    ) -> None:
        survivor_bytes = eden_bytes // 4 if survivor_bytes is None else survivor_bytes
        if eden_bytes < _LEAST_EDEN or eden_bytes % 4096 or survivor_bytes <= 0 or survivor_bytes % 4096:
            raise ValueError(f"eden and survivor spaces are multiples of 4096 bytes, eden of {_LEAST_EDEN} at least")
        if not 0 <= promote_age <= 15:
            raise ValueError(f"objects become old after 0 to 15 minor collections, not after {promote_age}")
        self._native: Any = ffi.NULL
        self._lib = library()
        self._free: deque[int] = deque()  # handles that hold nothing
        self._dropped: deque[int] = deque()  # and those that hold something that nobody refers to
        self._gone: deque[Any] = deque()
        self._unused = itertools.count()
        self._handle_count = self._lib.heap_handles()
        self._failures: dict[int, BaseException] = {}
        self._local = threading.local()
        young_bytes = eden_bytes + 2 * survivor_bytes
        self._generations = Generations(
            young_bytes, old_bytes, segment_bytes, huge, pause_seconds, adaptive, minor_tracker, marking_tracker
        )
        collect, failed = _callbacks(weakref.ref(self))
        self._callback = ffi.callback("int(uint32_t, uint64_t)", collect, error=_REFUSED, onerror=failed)
        self._native = self._open(eden_bytes, survivor_bytes, promote_age, stress, verify)
        self._collector = Collector(self._native, self._generations, verify, self._when_stopped)
        self._lib.heap_extend(self._native, self._generations.nbytes)
        if concurrent:
            self._collector.start_background()

    def _open(self, eden_bytes: int, survivor_bytes: int, promote_age: int, stress: bool, verify: bool) -> Any:
        generations = self._generations
        self._held = [generations.young, generations.old, generations.starts.bits, generations.starts.summary]
        young, old, bits, summary = (ffi.from_buffer(buffer, require_writable=True) for buffer in self._held)
        plan = ffi.new("heap_plan *")
        plan.young, plan.eden_bytes, plan.survivor_bytes = young, eden_bytes, survivor_bytes
        plan.old, plan.old_bytes = old, generations.old.nbytes
        plan.starts, plan.summary = ffi.cast("uint64_t *", bits), ffi.cast("uint64_t *", summary)
        plan.promote_age, plan.stress, plan.poison = promote_age, stress, verify or stress
        plan.collect = self._callback
        native = self._lib.heap_open(plan)
        if native == ffi.NULL:
            raise HeapExhausted("no address space for the heap's tables")
        self._pins = young, old, bits, summary
        return native

    # ---- what it is

    @property
    def session(self) -> UffdSession:
        """Of the old generation: others, such as a checkpointer, make trackers of their own with it."""
        return self._generations.session

    @property
    def regions(self) -> tuple[Region, ...]:
        """The old generation as it is now."""
        return self._generations.regions

    @property
    def pauses(self) -> list[Pause]:
        """For how long the world was stopped, each time, the last 100,000 times."""
        return list(self._collector.pauses)

    def numbers(self) -> Numbers:
        """What there is, and what was done."""
        collector, told = self._collector, ffi.new("heap_numbers *")
        self._look(lambda native: self._lib.heap_count(native, told))
        return Numbers(
            told.young_bytes,
            told.old_bytes,
            told.blocks * told.block_bytes,
            told.promoted_bytes,
            told.survived_bytes,
            told.freed_bytes,
            told.redirected,
            collector.minors,
            collector.fulls,
            collector.cycles,
        )

    def objects(self) -> list[Object]:
        """All objects that have not been freed."""
        found: list[Object] = self._look(self._list)
        return found

    def _list(self, native: Any) -> list[Object]:
        count = self._lib.heap_objects(native, ffi.NULL, 0)
        found = ffi.new("heap_object[]", count)
        self._lib.heap_objects(native, found, count)
        low, high = self._generations.nursery
        kinds: tuple[Literal["tuple", "bytes", "array"], ...] = ("tuple", "bytes", "array")
        return [
            Object(
                each.address,
                "young" if low <= each.address < high else "old",
                kinds[each.kind - 1],
                each.tag,
                each.length,
                each.first,
            )
            for each in found
        ]

    def __repr__(self) -> str:
        return "<Heap, closed>" if self._native == ffi.NULL else f"<Heap of {self._generations.nbytes} bytes>"

    # ---- objects

    def tuple(self, *values: Value, tag: int = 0) -> Ref:
        """A tuple of these; it can be changed, but not its length."""
        made = self.vector(len(values), tag=tag)
        for i, value in enumerate(values):
            if value is not None:
                made[i] = value
        return made

    def vector(self, length: int, *, tag: int = 0) -> Ref:
        """A tuple of so many None."""
        return self._new(TUPLE, tag, length)

    def string(self, text: str, *, tag: int = 0) -> Ref:
        """Its bytes in UTF-8."""
        return self.bytes(text.encode(), tag=tag)

    def bytes(self, content: bytes | int, *, tag: int = 0) -> Ref:
        """These bytes, or so many zeroes."""
        made = self._new(BYTES, tag, content if isinstance(content, int) else len(content))
        if not isinstance(content, int) and content:
            with made.contents() as view:
                view[:] = content
        return made

    def array(self, length: int, *, tag: int = 0) -> Ref:
        """So many numbers of 64 bits with a sign, all 0. They are no references, whatever they look like."""
        return self._new(ARRAY, tag, length)

    def _new(self, kind: int, tag: int, length: int) -> Ref:
        if not 0 <= length < 1 << 40 or not 0 <= tag <= 255:
            raise ValueError(f"no object has a length of {length} and a tag of {tag}: tags are 0 to 255")
        thread = self._thread()
        self._check(self._lib.heap_new(thread.native, kind, tag, length, thread.spare))
        return self._ref(thread)

    # ---- threads

    def _thread(self) -> Thread:
        thread: Thread | None = getattr(self._local, "thread", None)
        if self._native == ffi.NULL:
            raise HeapClosed("this heap was closed")
        if thread is None:
            thread = self._local.thread = Thread(self._native, self._gone)
            thread.spare = self._handle(thread.native)
        return thread

    @contextmanager
    def running(self) -> Iterator[None]:
        """``with heap.running(): ...``: no object moves meanwhile, unless this thread allocates, so that addresses and
        words are good; and every collection waits. They nest.

        Raises:
            HeapBusy: in the middle of a collection, from a signal handler.
        """
        thread = self._thread()
        native, before = thread.native, self._lib.heap_depth(thread.native)
        try:  # an interrupt may come as soon as heap_enter() returns
            self._check(self._lib.heap_enter(native))
            yield
        finally:
            self._lib.heap_leave_to(native, before)

    def word(self, value: Value) -> int:
        """What a slot that holds this holds: to be stored by other means. Of objects good within `running` only."""
        if not isinstance(value, Ref):
            return word_of(value)
        thread, address = self._thread(), ffi.new("uint8_t **")
        if not self._lib.heap_depth(thread.native):
            raise HeapBusy("an object's address is good within running() only")
        self._check(self._lib.heap_contents(thread.native, value.handle, address, ffi.new("uint64_t *")))
        return int(ffi.cast("uintptr_t", address[0])) - 8

    # ---- handles

    def _handle(self, native: Any) -> int:
        """One that holds nothing, for a thread's mutator."""
        try:
            return self._free.pop()
        except IndexError:
            pass
        try:
            handle = self._dropped.pop()
        except IndexError:
            pass
        else:
            self._check(self._lib.heap_forget(native, handle))
            return handle
        handle = next(self._unused)
        if handle >= self._handle_count:
            raise HeapExhausted(f"{self._handle_count} objects are referred to from Python, which are all that can be")
        return handle

    def _ref(self, thread: Thread) -> Ref:
        """To what was put into the thread's spare handle."""
        handle, thread.spare = thread.spare, self._handle(thread.native)
        return Ref(self, handle)

    def _drop(self, handle: int) -> None:
        """By a finaliser, perhaps in the middle of a collection: it is emptied when the next one begins."""
        self._dropped.append(handle)

    def _when_stopped(self) -> None:
        while self._dropped:
            handle = self._dropped.popleft()
            self._lib.heap_drop(self._native, handle)
            self._free.append(handle)
        while self._gone:
            self._lib.heap_detach(self._gone.popleft())

    # ---- collections

    def minor(self) -> None:
        """Collect the young generation.

        Raises:
            HeapExhausted: the old generation has no room for what may become old.
            HeapBusy: within `running`, or within a collection from a signal handler.
            HeapCorrupt: a reference leads nowhere; looked for only with ``verify``.
        """
        self._collections().minor()

    def full(self) -> None:
        """Free all that cannot be reached, in one pause.

        Raises:
            As `minor`.
        """
        self._collections().full()

    def cycle(self) -> bool:
        """Mark the old generation beside the mutators and free what was unreachable when this began.

        Returns:
            False where a full collection came between.

        Raises:
            As `minor`.
        """
        return self._collections().cycle()

    def shrink(self) -> int:
        """Give what holds no object back to the system, and return how many bytes those were.

        Raises:
            As `minor`.
        """
        return self._collections().shrink()

    def verify(self) -> None:
        """Look at every reference.

        Raises:
            HeapCorrupt: one leads nowhere.
        """
        self._collections().verify()

    def _collections(self) -> Collector:
        if self._lib.heap_depth(self._thread().native):
            raise HeapBusy(
                "a collection waits until no thread is within running(), where this thread is: leave it first"
            )
        return self._collector

    def _look(self, what: Callable[[Any], Any]) -> Any:
        return self._collections().look(what)

    def _collect_for(self, reason: int, nbytes: int) -> None:
        if reason == _OLD_FULL:
            self._collector.make_room(nbytes)
        else:
            self._collector.minor(unless_after=None if reason == _STRESS else self._collector.minors)

    def _check(self, outcome: int) -> None:
        if outcome == _OK:
            return
        if outcome == _REFUSED:
            raise self._failures.pop(threading.get_ident(), HeapException("a collection failed"))
        if outcome == _BUSY:
            raise HeapBusy("a signal handler used the heap in the middle of a collection by its own thread")
        if outcome == _WRONG_INDEX:
            raise IndexError("the object is not so long")
        raise WrongKind("objects have items if they are tuples or arrays, and only tuples hold references")

    # ---- the end

    def close(self) -> None:
        """Free everything. References can no longer be used."""
        if self._native == ffi.NULL:
            return
        self._collector.end()
        native, self._native = self._native, ffi.NULL
        self._lib.heap_close(native)
        del self._pins, self._held
        self._generations.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _callbacks(weak: weakref.ref[Heap]) -> tuple[Callable[[int, int], int], Callable[..., None]]:
    """What C calls when an allocation needs a collection, and what is called when that fails."""

    def collect(reason: int, nbytes: int) -> int:
        heap = weak()
        if heap is not None:
            heap._collect_for(reason, nbytes)
        return _OK if heap is not None else _REFUSED

    def failed(kind: type[BaseException], error: BaseException, trace: TracebackType) -> None:
        heap = weak()
        if heap is not None:
            heap._failures[threading.get_ident()] = error  # to be raised where the allocation returns to Python

    return collect, failed

# SPDX-License-Identifier: MIT
"""Sessions: memory that is registered, and who says what was written to it; and those that everybody shares."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import weakref
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from .errors import InvalidMemory, NotRegistered, PermissionDenied
from .kernel import core, engine
from .kernel.abi import Fd, UffdFeature
from .kernel.engine import Statistics
from .memory import pin, sessions
from .region import OTHER_MAPPINGS, REWRITTEN, Region, Run, Span, Survey, guarded, range_of, survey, unseen, warn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from typing_extensions import Self

    from .memory import AnyBuffer, Memory, Pinned

__all__ = ["CompareSession", "InFlight", "Session", "UffdSession", "default_session"]

# Imported with the module, not at first use: by then a process may have given up the right to read the library.
_log = logging.getLogger("dirtytrack")
_log.addHandler(logging.NullHandler())


class Session:
    """What `UffdSession` and `CompareSession` have in common. Not to be made itself.

    Any number of `DirtyTracker`s listen to one session, each at its own rhythm. Closed by `close()`, by leaving
    a ``with``, or with the last reference to it, which its trackers have too.

    Thread safety: everything may be called from any thread, and from signal handlers.
    """

    def __init__(self, slot: Any, backend: str, *, events: bool = False) -> None:
        self._slot = slot
        self._handle: Any = slot[0]
        self._backend = backend
        self._all: weakref.WeakValueDictionary[int, Region] = weakref.WeakValueDictionary()
        self._kept: dict[int, Region] = {}  # those that no tracker owns
        # Of stop() and remove(), to be settled once they are delivered. Weak: whoever was interrupted, and again before
        # he gave his set back, gives it back when he lets go of it.
        self._finals: deque[weakref.ref[Any]] = deque()
        self._trackers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._events = events
        self._compares = 0  # else its number among those that compare
        sessions.add(self)

    # ---- what it is

    @property
    def backend(self) -> str:
        """Who says what was written: ``kernel``, ``compare`` or ``compare-hashes``."""
        return self._backend

    @property
    def opened_by(self) -> str:
        """The door: ``userfaultfd user mode``, ``/dev/userfaultfd`` or ``userfaultfd full``;
        empty where none is needed."""
        return engine.door(self._handle)

    @property
    def regions(self) -> tuple[Region, ...]:
        """The registered regions, in the order of their registration."""
        # valuerefs(): in one step, whatever other threads register meanwhile.
        there = [region for ref in self._all.valuerefs() if (region := ref()) is not None and region.registered]
        return tuple(sorted(there, key=lambda region: region._span.id))

    @property
    def closed(self) -> bool:
        """Whether it was closed, or belongs to the parent of this process."""
        return bool(engine.state(self._handle))

    def fileno(self) -> Fd:
        """The userfaultfd, which stays the session's; -1 while closed or suspended, and where there is none."""
        return engine.fileno(self._handle)

    def statistics(self) -> Statistics:
        """What was done so far, for all trackers together.

        Raises:
            SessionClosed, UsedAfterFork.
        """
        return engine.session_statistics(self._handle)

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(self.regions)} regions, {self._how()}"
        return f"<{type(self).__name__}: {state}>"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError(f"a {type(self).__name__} cannot be pickled: it tracks this process's memory")

    def _how(self) -> str:
        return self._backend

    def _survey(self, memory: Pinned) -> Survey:
        return survey(memory, events=self._events)

    def _find(self, number: int) -> Region | None:
        return self._all.get(number)

    def _require(self, region: Region) -> None:
        if self._all.get(region._span.id) is not region:
            raise NotRegistered(
                f"region {region.name!r} is not one of this session's: register its memory here, or use its session",
                region=region,
            )

    # ---- registering

    def register(
        self,
        memory: AnyBuffer | tuple[int, int] | Run,
        *,
        name: str | None = None,
        arm: str | None = None,
        blind_spots: str | None = None,
        strict: bool = False,
    ) -> Region:
        """Register memory, so that trackers can be told of writes to it. Arms nothing yet.

        Args:
            memory: a writable, C-contiguous object with the buffer protocol, held until `unregister` so that it can be
                neither freed nor resized; or (address, nbytes), which nobody can hold. Regions may overlap.
            name: how messages, mirrors and queries call it.
            arm: ``"all"``, ``"present"`` or None: see `Region.arm`. None chooses ``present`` for private anonymous
                memory of 4 GiB and more of which less than a 64th is populated, else ``all``.
            blind_spots: ``"accepted"`` silences the warning for memory that others may write.
            strict: raise the warnings below as errors; nothing is registered then.

        Raises:
            InvalidMemory: read-only, not contiguous, empty, or a mapping that cannot be tracked; the message says it.
            RangeBusy: another userfaultfd has part of it.
            LimitReached: the process has as many mappings as it may (vm.max_map_count).
            SessionClosed, UsedAfterFork.

        Warns:
            BlindSpotWarning: it is shared or a file's memory, which others may write unseen.
            GuardPageWarning: it is such memory, and its owner puts guard pages into it.
        """
        region = self._register(memory, name, arm, blind_spots, strict, stacklevel=3)
        self._kept[region._span.id] = region
        if self.closed:  # by another thread, which may have come too early to let go of it
            self._kept.clear()
        return region

    def _register(
        self,
        memory: Any,
        name: str | None,
        arm: str | None,
        blind_spots: str | None,
        strict: bool,
        stacklevel: int,
    ) -> Region:
        if arm not in (None, "all", "present"):
            raise InvalidMemory(f"arm takes None, 'all' or 'present', not {arm!r}")
        if blind_spots not in (None, "accepted"):
            raise InvalidMemory(f"blind_spots takes None or 'accepted', not {blind_spots!r}")
        if isinstance(memory, Run):
            memory = (memory.start, memory.end - memory.start)
        pinned = pin(memory, what="memory")
        seen = self._survey(pinned)
        granule_bytes = 0  # a huge page of the pool is found by the core
        memory = pinned.memory
        if memory is not None and memory.shared and memory.address % memory.page_bytes == 0:
            granule_bytes = memory.page_bytes  # a shared transparent huge page never splits: it is dirty as a whole
        if name is None and memory is not None:
            name = memory.name
        if seen.others_write:
            if blind_spots is None:
                warn(unseen(name, seen.others_write, seen.blind_spots), strict, stacklevel + 1)
            guards = engine.guard_pages(self._handle, seen.start, seen.end)
            if guards:
                warn(guarded(name, seen.others_write, guards), strict, stacklevel + 1)
        doing = f"register {name!r}" if name else "register the memory"
        slot, about = engine.register(
            self._handle, pinned.address, pinned.nbytes, granule_bytes, arm, doing, pinned=not seen.unpinned
        )
        number = about.number
        span = Span(
            number,
            name or f"region {number}",
            pinned.address,
            pinned.nbytes,
            about.start,
            about.end,
            about.granule_bytes,
            seen.unpinned,
            pinned.shape,
            pinned.dtype,
        )
        span.compared_by = self._compares
        spots = seen.blind_spots | {OTHER_MAPPINGS} if about.unseen_aliases else seen.blind_spots
        region = Region(span, spots, slot, pinned.hold, memory)
        self._all[number] = region
        if self.closed:
            region._end("closed")
        _log.debug("registered %r, blind spots: %s", span.name, "; ".join(sorted(spots)))
        return region

    def unregister(self, region: Region) -> None:
        """Let go of a region and its buffer. Pages that another region holds stay registered.

        Raises:
            NotRegistered: it was unregistered before, or belongs to another session.
            InvalidMemory: a running tracker watches it: `tracker.remove(region)` first, which gives its last pages.
            SessionClosed, UsedAfterFork.
        """
        self._require(region)
        self._settle()
        # First: an interrupt from here on leaves nothing that only the session would hold.
        kept = self._kept.pop(region._span.id, None)
        try:
            if not engine.unregister(region._handle, region):
                raise InvalidMemory(
                    f"region {region.name!r} is watched by a running tracker: `tracker.remove(region)` first, which "
                    "gives its last pages, or `tracker.stop()`",
                    region=region,
                )
            region._end("unregistered")
        except BaseException:
            if not region.registered:  # done before, or it is done and this is an interrupt
                region._end("unregistered")
            elif kept is not None:
                self._kept[region._span.id] = kept
            raise
        _log.debug("unregistered %r", region.name)

    def _settle_later(self, cset: Any) -> None:
        """A final set is about to be delivered; its regions are let go of by the next call that cares.

        Not in the same breath: an interrupt between the letting go and the caller's having the set would lose it.
        """
        self._settle()
        self._finals.append(weakref.ref(cset))

    def _settle(self) -> None:
        for final in tuple(self._finals):
            cset = final()
            if cset is not None and cset.delivered:
                engine.settle(cset)  # first: whoever no longer finds it here relies on its being settled
            elif cset is not None and cset.block_:
                continue
            with suppress(ValueError):  # another thread was quicker
                self._finals.remove(final)

    def write_protect(self, region: Region) -> None:
        """Arm a region's pages now. What was written before goes to every tracker of those pages first.

        Raises:
            NotRegistered, SessionClosed, UsedAfterFork.
        """
        self._require(region)
        engine.write_protect(region._handle, region)

    # ---- memory that moves

    def _move_out(self, memory: Memory) -> Callable[[], None]:
        """Let go of memory that is about to be resized. What is returned takes it in again, wherever it is then: wholly
        dirty for the trackers that watched it."""
        moves = []
        for region in self.regions:
            if region._memory is memory:
                watchers = [tracker for tracker in tuple(self._trackers) if tracker._leave(region)]
                moves.append((region, watchers, region._span.id in self._kept))
                self.unregister(region)

        def move_in() -> None:
            for region, watchers, kept in moves:
                again = self._register(memory, region.name, None, "accepted", False, stacklevel=2)
                if kept:
                    self._kept[again._span.id] = again
                for tracker in tuple(self._trackers):
                    tracker._follow(region, again, watch=tracker in watchers)

        return move_in

    # ---- writes that nobody saw

    def mark_dirty(self, memory: Region | Run | AnyBuffer | tuple[int, int] | Iterable[Run]) -> None:
        """Declare a write that no page table saw: dirty for every tracker of those pages.

        Args:
            memory: a region, a buffer (it may be read-only), a `Run`, an (address, nbytes) pair, or a `DirtySet`.

        Raises:
            InvalidMemory: none of these.
            SessionClosed, UsedAfterFork.
        """
        parts: Iterable[Any] = memory if hasattr(memory, "page_span_bytes") else (memory,)  # type: ignore[assignment]
        for part in parts:
            start, end, hold = range_of(part, "range")
            engine.mark_dirty(self._handle, start, end)
            del hold

    def in_flight(self, memory: Region | Run | AnyBuffer | tuple[int, int]) -> InFlight:
        """A context manager around DMA into memory: O_DIRECT, registered io_uring buffers, RDMA, a GPU.

        While it is open the memory is dirty in every collect, and once after it.

        Args:
            memory: as for `mark_dirty`; a buffer is held meanwhile.
        """
        start, end, hold = range_of(memory, "range")
        return InFlight(self, start, end, hold)

    # ---- coming and going

    def suspend(self) -> None:
        """Let go of the userfaultfd, for tools that cannot live beside one, such as CRIU. Regions and trackers stay.

        Until `resume`, every collect reports all that it asks for. A second call does nothing.

        Raises:
            SessionClosed, UsedAfterFork.
        """
        engine.suspend(self._handle)
        _log.info("session suspended: until it resumes, all of its memory counts as written")

    def resume(self) -> None:
        """Take the userfaultfd back. All memory counts as dirty once. Does nothing when not suspended.

        Raises:
            As the session's making and `register` do; then it stays suspended.
        """
        engine.resume(self._handle)
        _log.info("session resumed")

    def close(self) -> None:
        """Unregister everything and close. Trackers then raise `SessionClosed`. A second call does nothing."""
        engine.close(self._handle)
        for ref in self._all.valuerefs():
            region = ref()
            if region is not None:
                region._end("closed")
        self._kept.clear()

    def __enter__(self) -> Self:
        engine.require(self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class UffdSession(Session):
    """A userfaultfd for asynchronous write protection, and the regions registered in it: what `track` uses.

    Args:
        events: have the kernel tell of discards (madvise), moves and unmaps too, to a thread in C. Then a page that is
            discarded and read again before the next collect is found too, in each kind of memory. Whoever discards or
            unmaps registered memory waits for that thread, some 20 µs a call. Holes that are punched through a
            descriptor are not told.

    Raises:
        PermissionDenied: no way to a userfaultfd is open; the message names the ways out.
        UnsupportedKernel: this kernel cannot track (Linux 6.7 can), or this is not Linux.
        LimitReached: no descriptor, thread or kernel memory is left.

    Thread safety: everything may be called from any thread, and from signal handlers.
    """

    def __init__(self, *, events: bool = False, _remedy: int = 0) -> None:
        core.load()
        super().__init__(engine.open_session(_remedy, events=events), "kernel", events=events)
        _log.debug("session opened by %s", self.opened_by)

    @property
    def features(self) -> UffdFeature:
        """What the kernel's userfaultfd can do, unknown bits included."""
        return engine.features(self._handle)

    def _how(self) -> str:
        return f"opened by {self.opened_by}"


_numbers = itertools.count(1)


class CompareSession(Session):
    """A session that compares, and asks nothing of the kernel: for containers without a door to userfaultfd, sandboxes
    such as gVisor, and kernels before Linux 6.7. Opt-in: nothing in this library chooses it by itself.

    Each collect reads all of the memory that it asks for, and compares it with a copy or with a hash a page, which it
    brings up to date in the same pass. The first write to a page costs nothing. What trackers promise is the same, but:

    - What is reported is the pages that *changed*: not a store of what was there, nor a change that was taken back.
    - Each write is seen, whoever made it: another process, another mapping, a file, a device. ``blind_spots`` has one
      entry: bytes that changed after a collect and changed back before the next, where the program read them in between
      by itself. What `DirtyTracker.collect_into` and the methods of a `DirtySet` copy is remembered as it was copied.
    - Memory that is mapped but cannot be read is in each set. A buffer's memory must stay readable while registered.

    Args:
        hashes: keep 128 bits a page instead of a copy: 4 MiB a GiB, and half the memory traffic. A page that changed
            goes unseen by a chance of at most 2^-64, whatever is in it. That is proven for this hash (NH, of UMAC);
            its key is random and the session's own, so that nobody can construct pages that collide.

    Raises:
        UnsupportedKernel: this is not Linux.
        MemoryError: no memory is left.

    Thread safety: everything may be called from any thread, and from signal handlers.
    """

    def __init__(self, *, hashes: bool = False) -> None:
        core.load()
        backend = "compare-hashes" if hashes else "compare"
        super().__init__(engine.open_session(0, backend=backend), backend)
        self._compares = next(_numbers)
        _log.debug("session opened that compares with %s", "hashes" if hashes else "copies")

    @property
    def kept_bytes(self) -> int:
        """How much memory the copies or hashes take, less what was never populated; 0 while suspended or closed."""
        return engine.kept_bytes(self._handle)

    def _how(self) -> str:
        return f"compared with {'hashes' if self._backend == 'compare-hashes' else 'copies'}"

    def _survey(self, memory: Pinned) -> Survey:
        """Where the mappings cannot be read, the memory is taken for such as may vanish."""
        try:
            seen = survey(memory)
        except PermissionDenied:
            page = core.PAGE_BYTES
            end = -(-(memory.address + memory.nbytes) // page) * page
            seen = Survey(frozenset(), True, "", memory.address // page * page, end)
        return seen._replace(blind_spots=frozenset({REWRITTEN}), others_write="")


class InFlight:
    """Memory that something else than the processor is writing; made by `in_flight` of a session."""

    __slots__ = ("_end", "_hold", "_session", "_start")

    def __init__(self, session: Session, start: int, end: int, hold: Any) -> None:
        self._session, self._start, self._end, self._hold = session, start, end, hold

    def __enter__(self) -> Self:
        engine.flight(self._session._handle, self._start, self._end, begin=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        engine.flight(self._session._handle, self._start, self._end, begin=False)


# ---- the sessions that everybody shares

_defaults: dict[str, weakref.ref[Session]] = {}
"""By backend."""
_locks: dict[int, Any] = {}
"""One a process: a forked child must not wait for a thread that is not there. No hook sees each fork."""


def default_session(backend: str = "kernel") -> Session:
    """The session of `track` for a backend, made at first use and freed with its last tracker.

    Raises:
        InvalidMemory: there is no backend of that name.
        As `UffdSession` and `CompareSession`.
    """
    if backend not in engine.BACKENDS:
        names = ", ".join(map(repr, engine.BACKENDS))
        raise InvalidMemory(f"backend takes one of {names}, not {backend!r}")
    core.load()
    # Reentrant: a signal handler may come here while its thread does.
    with _locks.setdefault(engine.generation(), threading.RLock()):
        session = _usable_default(backend)
        if session is None:
            made = UffdSession() if backend == "kernel" else CompareSession(hashes=backend == "compare-hashes")
            session = _usable_default(backend)  # a signal handler may have made one meanwhile
            if session is None:
                session = made
                _defaults[backend] = weakref.ref(made)
        return session


def _usable_default(backend: str) -> Session | None:
    known = _defaults.get(backend)
    session = known() if known is not None else None
    return None if session is None or session.closed else session


def _after_fork_in_child() -> None:
    _defaults.clear()
    for session in list(sessions):
        engine.state(session._handle)  # closes the inherited descriptors, without using them


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)

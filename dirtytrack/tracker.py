# SPDX-License-Identifier: MIT
"""DirtyTracker: one independent listener to the writes into a session's memory; and `track`, the short way."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from .dirtyset import DirtySet
from .errors import (
    InvalidMemory,
    MissedWrite,
    NotRegistered,
    NotStarted,
    RegionGone,
    SessionClosed,
    UsedAfterFork,
)
from .kernel import core, engine
from .kernel.engine import Statistics
from .layout import Layout, mirrors
from .region import Region
from .session import Session, default_session

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

    from typing_extensions import Self

    from .dirtyset import Mirror
    from .kernel import _taking
    from .memory import AnyBuffer
    from .region import Span

    Trackable = AnyBuffer | tuple[int, int]

__all__ = ["DirtyTracker", "track"]

_log = logging.getLogger("dirtytrack")


class DirtyTracker:
    """One listener: what was written since *its* last collect, whoever else listens.

    **What is promised.** A page whose bytes changed between two collects is in the second, by every path that its
    region's ``blind_spots`` does not name. Delivery is at least once: an exception, a MemoryError or Ctrl-C leaves the
    pages pending, and whoever could not use a set gives it back by `put_back`. A collect that runs beside writers is no
    snapshot: for one, stop the writers.

    Args:
        session: whose memory.
        regions: which regions; left out, those that the session has when `start` is called.
        audit: the share of clean pages, 0 to 1, whose hashes are kept to find a change that nobody reported.
        adaptive: let pages that are rewritten epoch after epoch go unwatched for a while, in whole blocks where they
            lie densely, if the faults cost more than what is then reported without need: see `DirtySet.assumed`.
        exact: forbid that, whatever other trackers of the same memory want.
        page_cost_seconds: what one page in a set costs you, for ``adaptive`` to weigh; left out, a copy of it. The
            dearest of all trackers of the memory counts.

    Raises:
        InvalidMemory: ``audit`` is no share, or ``page_cost_seconds`` no time.
        SessionClosed, UsedAfterFork.

    Thread safety: everything may be called from any thread and from signal handlers. Of two collects at once each page
    goes to exactly one.
    """

    def __init__(
        self,
        session: Session,
        regions: Iterable[Region] | None = None,
        *,
        audit: float = 0.0,
        adaptive: bool = True,
        exact: bool = False,
        page_cost_seconds: float | None = None,
    ) -> None:
        if not 0 <= audit <= 1:
            raise InvalidMemory(f"audit is a share of the pages, from 0 to 1, not {audit}")
        if page_cost_seconds is not None and not 0 <= page_cost_seconds <= 1e6:
            raise InvalidMemory(f"page_cost_seconds is a time in seconds, not {page_cost_seconds}")
        page_ns = 0 if page_cost_seconds is None else max(1, round(page_cost_seconds * 1e9))
        self._session = session
        self._wanted = None if regions is None else tuple(regions)
        self._owned: tuple[Region, ...] = ()
        self._regions: dict[int, Region] = {}  # by the session's number; what is watched now
        self._parts: dict[int, Layout] = {}  # each region by itself
        self._coming: list[tuple[Region, ...]] = []  # of each start or add under way
        self._lock = threading.RLock()  # of what is watched; never taken by a collect
        self._slot = engine.new_listener(session._handle, adaptive=adaptive, exact=exact, page_ns=page_ns)
        self._handle: Any = self._slot[0]
        self._collecting = engine.collecting(self._handle, DirtySet)
        self._layout = Layout(())
        _quicken()
        session._trackers.add(self)
        if audit:
            engine.set_audit(self._handle, audit)

    # ---- what it is

    @property
    def session(self) -> Session:
        """Whose memory it listens to."""
        return self._session

    @property
    def regions(self) -> tuple[Region, ...]:
        """The regions that it watches; before `start`, those that `start` will watch."""
        if self.epoch:
            self._refresh()  # an interrupt may have kept the last change from being told
            return tuple(self._regions.values())
        return self._session.regions if self._wanted is None else self._wanted

    @property
    def epoch(self) -> int:
        """The open epoch: 1 after `start`, one more after each collect; 0 while not running."""
        number = engine.epoch(self._handle)
        if not number:  # perhaps it runs on, because the final set of a stop() came back undelivered
            engine.state(self._session._handle)
            number = engine.epoch(self._handle)
        return number

    def statistics(self) -> Statistics:
        """What its collects did so far.

        Raises:
            SessionClosed, UsedAfterFork.
        """
        return engine.listener_statistics(self._handle)

    def __repr__(self) -> str:
        state = f"in epoch {self.epoch}" if self.epoch else "not running"
        return f"<DirtyTracker of {len(self.regions)} regions, {state}>"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a DirtyTracker cannot be pickled: it tracks this process's memory")

    # ---- which regions

    @property
    def _layout(self) -> Layout:
        layout: Layout = self._collecting.layout
        return layout

    @_layout.setter
    def _layout(self, now: Layout) -> None:
        self._collecting.layout = now

    def _resolve(self, region: Region | str) -> Region:
        if isinstance(region, Region):
            return region
        # By way of the layout: the same words for a name that is unknown or not the only one.
        found = self._layout.find(region).owner
        owner = found() if found is not None else None
        if owner is None:
            raise InvalidMemory(f"region {region!r} is no longer there")
        return owner

    def _part(self, region: Region) -> Layout:
        part = self._parts.get(region._span.id)
        return part if part is not None and part.spans[0] is region._span else Layout((region._span,))

    def _alone(self) -> threading.RLock:
        """What excludes other threads from changing what is watched. Not asked for in a forked child, where whoever has
        it may not be there.

        Raises:
            SessionClosed, UsedAfterFork.
        """
        engine.require(self._session._handle)
        return self._lock

    def _refresh(self) -> None:
        """Know the regions that the core watches, and those that are about to be. By the core's word, since signal
        handlers may have come between whatever was done and this; and they may come now, so it loops."""
        with suppress(SessionClosed, UsedAfterFork):
            numbers: tuple[int, ...] | None = None
            while numbers != (numbers := engine.watched(self._handle)):
                known, members = self._regions, {}
                for number in numbers:
                    region = known.get(number) or self._session._find(number)
                    if region is not None:
                        members[number] = region
                for regions in tuple(self._coming):
                    members.update((region._span.id, region) for region in regions)
                self._regions = {number: members[number] for number in known if number in members} | members
                self._publish()

    def _publish(self) -> None:
        """Make the layout that of the regions. Loops, since a signal handler may change them meanwhile."""
        with self._lock:
            while True:
                members: tuple[Span, ...] = tuple(region._span for region in tuple(self._regions.values()))
                if members == self._layout.spans:
                    return
                layout, before = Layout(members), self._layout
                self._parts = {span.id: Layout((span,)) for span in members}
                self._layout = layout
                before.successor = layout

    # ---- starting and stopping

    def start(self) -> None:
        """Arm the pages and open epoch 1 as clean. What other trackers have pending stays theirs.

        Raises:
            AlreadyStarted: it is running.
            NotRegistered: a region was unregistered.
            SessionClosed, UsedAfterFork.
        """
        while True:
            members = self._wanted
            if members is None:
                members = self._session.regions
            try:
                return self._start(members)
            except NotRegistered:
                if self._wanted is not None or all(region.registered for region in members):
                    raise
                # one that nobody named was unregistered meanwhile: those that the session has now

    def _start(self, members: tuple[Region, ...]) -> None:
        with self._alone():
            for region in members:
                self._session._require(region)
            try:
                self._coming.append(members)  # known before they are armed: a collect may begin as soon as they are
                self._refresh()
                engine.start(self._handle, [region._handle for region in members], self._session._find)
            finally:
                self._coming.remove(members)
                self._refresh()

    def stop(self) -> DirtySet:
        """Stop listening, and let go of the regions.

        Returns:
            What was written since the last collect: the final set, of the last epoch.

        Raises:
            NotStarted: it is not running.
            RegionGone: a mapping went away; nothing was handed out and it runs on: see `collect`.
            MissedWrite: the audit found an unreported change.
            SessionClosed, UsedAfterFork.
        """
        cset: Any = None
        try:
            with self._alone():
                before = self._layout
                cset = engine.stop(self._handle, self._session._find)
                dirty = DirtySet(cset, before.until(self._layout))
                self._session._settle_later(cset)
                self._refresh()
            # From here on the pages are the caller's. The last step, and in this very frame: Python looks for signals
            # whenever a call returns, and whoever is interrupted after this has lost the set.
            cset.delivered = 1
        except BaseException:
            if cset is not None:
                core.give_back(cset)
            self._refresh()
            raise
        return dirty

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        missed: MissedWrite | None = None
        while True:
            try:
                self.stop()
            except RegionGone as gone:  # nobody is left to be told, and what remains of it must not stay armed
                if gone.region is not None and gone.region._span.id in self._regions:
                    _log.warning("a tracker was left after its memory went away: %s", str(gone))
                    self.remove(gone.region)
                    continue
            except MissedWrite as found:
                if missed is None:
                    missed = found
                    continue
            except (NotStarted, SessionClosed, UsedAfterFork):
                pass
            break
        self._let_go()
        if missed is not None and error is None:
            raise missed

    def _let_go(self) -> None:
        """Unregister what `track` registered for this tracker alone."""
        owned, self._owned = self._owned, ()
        for region in owned:
            try:
                if region.registered:
                    self._session.unregister(region)
            except InvalidMemory:  # another tracker watches it: it goes with that one's last reference to it
                _log.warning("region %r stays registered: another tracker still watches it", region.name)
            except (SessionClosed, UsedAfterFork):
                return

    # ---- collecting

    def collect(
        self,
        region: Region | str | None = None,
        *,
        budget_seconds: float | None = None,
        exact: bool = False,
        mirror: Mirror | None = None,
    ) -> DirtySet:
        """Take every page written since this tracker's last collect, re-arm, and open the next epoch.

        Args:
            region: or its name: take that region's pages only; the others' stay pending.
            budget_seconds: stop scanning after about so long; the rest stays pending and ``complete`` is False.
            exact: leave out what was only assumed to be dirty and is, byte for byte, as in the mirror.
            mirror: for ``exact``: what the memory was at the last collect, as `collect_into` takes it; not written.

        Raises:
            RegionGone: a mapping went away beneath a region; told once, before anything is handed out. After
                ``remove(error.region)`` collecting goes on.
            MissedWrite: the audit found an unreported change; all pages stay pending.
            NotStarted, SessionClosed, UsedAfterFork.
            InvalidMemory: the region is not one of this tracker's; or ``exact`` without a mirror, a mirror without
                ``exact``, or a mirror that does not fit. Nothing was collected then.

        Thread safety: of two collects at once each page goes to exactly one.
        """
        if exact != (mirror is not None):
            raise InvalidMemory("exact=True compares with a mirror=, and a mirror is of use for that only")
        budget = -1.0
        if budget_seconds is not None:
            budget = float(budget_seconds)
            if not budget >= 0:
                raise InvalidMemory(f"budget_seconds is not negative: {budget_seconds}")
        while True:
            before = self._layout
            only = None if region is None else self._resolve(region)
            if mirror is not None:
                mirrors(before if only is None else self._part(only), mirror, writable=False)
            if before is self._layout:
                break
        cset = engine.collect(self._handle, only, budget, self._session._find)
        try:
            dirty = DirtySet(cset, before.until(self._layout) if only is None else self._part(only))
            if mirror is not None and cset.assumed_count:
                dirty = dirty - dirty.assumed | dirty.assumed.changed(mirror)
            cset.delivered = 1  # as in stop
        except BaseException:
            core.give_back(cset)
            raise
        return dirty

    def _explained(self, failed: _taking.Failed) -> Exception:
        """What a collect in C raises."""
        return engine.take_error(failed, self._session._find)

    def collect_into(self, mirror: Mirror, region: Region | str | None = None) -> DirtySet:
        """Collect, then copy the dirty bytes to a mirror, in one call without the GIL.

        Re-armed first, copied after: a write that lands between is in the copy, or in the next epoch, or in both. Start
        first, then make the mirror.

        Args:
            mirror: a writable buffer as long as the only region (or as ``region``); or a mapping from regions or their
                names to such, for each region that is collected.
            region: collect that one only.

        Raises:
            InvalidMemory: a mirror is missing, of another length, or overlaps tracked memory or another mirror; nothing
                was collected then.
            RegionGone: as for `collect`, or a page vanished beneath the copy; all pages stay pending.
            NotStarted, MissedWrite, NotRegistered, SessionClosed, UsedAfterFork.
        """
        while True:
            before = self._layout
            only = None if region is None else self._resolve(region)
            extents, holds = mirrors(before if only is None else self._part(only), mirror, writable=True)
            if before is self._layout:
                break
        cset = engine.collect_into(self._handle, only, extents, self._session._find)
        del holds
        try:
            dirty = DirtySet(cset, before.until(self._layout) if only is None else self._part(only))
            cset.delivered = 1  # as in stop
        except BaseException:
            core.give_back(cset)
            raise
        return dirty

    def peek(self, region: Region | str | None = None) -> DirtySet:
        """What a collect would give now; changes nothing.

        Raises:
            NotStarted, SessionClosed, UsedAfterFork.
            InvalidMemory: the region is not one of this tracker's.
        """
        before = self._layout
        only = None if region is None else self._resolve(region)
        cset = engine.peek(self._handle, only, self._session._find)
        return DirtySet(cset, before.until(self._layout) if only is None else self._part(only))

    def put_back(self, dirty: DirtySet) -> None:
        """Give pages back to this tracker alone, because they could not be used: its next collect has them again.

        Args:
            dirty: any set; pages that this tracker does not watch are passed over.

        Raises:
            NotStarted, SessionClosed, UsedAfterFork.
        """
        if not isinstance(dirty, DirtySet):
            raise TypeError(f"put_back() takes a DirtySet, not {type(dirty).__name__}")
        engine.put_back(self._handle, dirty._set)

    # ---- growing and shrinking

    def add(self, memory: Region | Trackable, *, name: str | None = None, **options: Any) -> Region:
        """Watch more memory while running. It counts as wholly dirty in the next collect: nobody knows its past.

        Args:
            memory: a region of this session; or a buffer, which is registered first (and unregistered by leaving the
                ``with`` of this tracker).
            name, options: of the registration, as for `Session.register`.

        Returns:
            The region.

        Raises:
            InvalidMemory: it is watched already, or cannot be tracked.
            NotStarted, NotRegistered, RangeBusy, LimitReached, SessionClosed, UsedAfterFork.
        """
        own = not isinstance(memory, Region)
        if isinstance(memory, Region):
            self._session._require(memory)
            region = memory
        else:
            given: dict[str, Any] = {"arm": None, "blind_spots": None, "strict": False, **options}
            region = self._session._register(memory, name, stacklevel=3, **given)
        coming = (region,)
        with self._alone():
            try:
                self._coming.append(coming)  # known before it is armed
                self._refresh()
                engine.add(self._handle, region._handle, self._session._find, region)
            finally:
                self._coming.remove(coming)
                self._refresh()
        if own:
            self._owned += (region,)
        return region

    def remove(self, region: Region | str) -> DirtySet:
        """Stop watching a region. It stays registered, so that the final set can be read: `Session.unregister` it
        to let go of its buffer, or leave that to the end of this tracker where `track` or `add` registered it.

        Returns:
            Its final set: what was written since the last collect.

        Raises:
            InvalidMemory: the region is not one of this tracker's.
            NotStarted, SessionClosed, UsedAfterFork.
        """
        cset: Any = None
        try:
            with self._alone():
                gone = self._resolve(region)
                part = self._part(gone)
                cset = engine.remove(self._handle, gone, self._session._find)
                dirty = DirtySet(cset, part)
                self._session._settle_later(cset)
                self._refresh()
            cset.delivered = 1  # as in stop
        except BaseException:
            if cset is not None:
                core.give_back(cset)
            self._refresh()
            raise
        return dirty

    def _leave(self, region: Region) -> bool:
        """Stop watching a region whose memory is about to move; its last pages are of no use then. Whether it did."""
        if not self.epoch or region._span.id not in engine.watched(self._handle):
            return False
        self.remove(region)
        return True

    def _follow(self, region: Region, again: Region, *, watch: bool) -> None:
        """Its memory has moved, or has not, and is registered as another region now."""
        self._owned = tuple(again if known is region else known for known in self._owned)
        if self._wanted is not None:
            self._wanted = tuple(again if known is region else known for known in self._wanted)
        if watch:
            self.add(again)


def track(
    *buffers: Trackable | Mapping[str, Trackable],
    name: str | None = None,
    session: Session | None = None,
    backend: str | None = None,
    adaptive: bool = True,
    exact: bool = False,
    page_cost_seconds: float | None = None,
    audit: float = 0.0,
    blind_spots: str | None = None,
    strict: bool = False,
) -> DirtyTracker:
    """Track memory, the short way: ``with track(array) as tracker: ...`` is armed on entry, and lets go at the end.

    Uses the process's default session, so that two libraries in one process that track the same or overlapping memory
    both work.

    Args:
        buffers: writable, C-contiguous objects with the buffer protocol (numpy arrays, bytearray, mmap, SharedMemory,
            `Memory`), (address, nbytes) pairs, or mappings from names to such.
        name: of the region, where there is one buffer only.
        session: another session than the default one.
        backend: who says what was written. ``"kernel"``, which is meant where nothing is said; ``"compare"`` or
            ``"compare-hashes"``, which need nothing of the kernel and read all of the memory at each collect: see
            `CompareSession`. Each has a default session of its own.
        adaptive, exact, page_cost_seconds: as `DirtyTracker` takes them.
        audit: the share of clean pages whose hashes are kept to find a change that nobody reported.
        blind_spots: ``"accepted"`` silences the warning for memory that others may write.
        strict: raise that warning as an error.

    Returns:
        A tracker that is not running yet and owns its regions: they are unregistered when its ``with`` is left, or with
        its last reference.

    Raises:
        InvalidMemory, RangeBusy, LimitReached: as `Session.register`; or there is no such backend, or it is not the
            session's.
        PermissionDenied, UnsupportedKernel: as `UffdSession`.

    Warns:
        BlindSpotWarning: shared or a file's memory, which others may write unseen.
        GuardPageWarning: such memory, into which its owner puts guard pages.

    Thread safety: may be called from any thread and from signal handlers.
    """
    named: list[tuple[str | None, Any]] = []
    for buffer in buffers:
        if isinstance(buffer, Mapping):
            named += buffer.items()
        else:
            named.append((name, buffer))
    if not named:
        raise InvalidMemory("track() takes at least one buffer")
    if name is not None and len(named) > 1:
        raise InvalidMemory("name= is for one buffer: pass a mapping from names to buffers")
    within = session if session is not None else default_session("kernel" if backend is None else backend)
    if backend not in (None, within.backend):
        raise InvalidMemory(
            f"backend={backend!r} was asked for and a session given whose backend is {within.backend!r}"
        )
    found: list[Region] = []
    for key, buffer in named:  # a plain loop: the warning's stacklevel counts frames
        found.append(within._register(buffer, key, None, blind_spots, strict, stacklevel=3))
    regions = tuple(found)
    tracker = DirtyTracker(
        within, regions, audit=audit, adaptive=adaptive, exact=exact, page_cost_seconds=page_cost_seconds
    )
    tracker._owned = regions
    return tracker


_in_python = DirtyTracker.collect


def _quicken() -> None:
    """Have C collect where nothing is asked for: see taking.c. Not before the core is loaded, which is at first use."""
    if DirtyTracker.collect is _in_python:
        words = (
            f"collect($self, region=None, *, budget_seconds=None, exact=False, mirror=None)\n--\n\n{_in_python.__doc__}"
        )
        DirtyTracker.collect = core.taking.quick_collect(DirtyTracker, _in_python, words)  # type: ignore[method-assign]

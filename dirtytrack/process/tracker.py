# SPDX-License-Identifier: MIT
"""The tracker of another process: what it wrote, its mappings, its bytes."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
import weakref
from array import array
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..dirtyset import DirtySet
from ..errors import DirtyTrackError, InvalidMemory, KernelRefused, RangeBusy, RegionGone, SessionClosed, TargetGone
from ..kernel import core, engine, sets, targets
from ..layout import Layout
from ..memory import pin
from ..region import Span
from .frozen import Frozen, frozen_of
from .mappings import EXCLUDED, TRACKED, UNTRACKED, Filter, Mapping, called, excluded, named

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from typing_extensions import Self

    from ..kernel.targets import Row
    from ..memory import AnyBuffer

__all__ = ["ProcessStatistics", "ProcessTracker"]

_log = logging.getLogger("dirtytrack.process")

_ROUNDS = 16
"""How often a collect looks at the mappings anew, where they go away while it looks."""
_BUSY = "another userfaultfd has it"


class ProcessStatistics(NamedTuple):
    """What a `ProcessTracker` did so far."""

    collects: int
    scans: int
    """PAGEMAP_SCAN calls."""
    protects: int
    """UFFDIO_WRITEPROTECT calls."""
    pages: int
    """Base pages that scans found written and armed again: each cost the target one fault."""
    refreshes: int
    """How often mappings had come, gone or changed."""
    seconds: float
    """Inside collects."""


class _Part:
    """What is registered: [start, end), part of a mapping or all of it."""

    __slots__ = ("end", "identity", "name", "number", "slot", "start")

    def __init__(self, slot: Any, number: int, start: int, end: int, identity: object, name: str) -> None:
        self.slot, self.number, self.start, self.end, self.identity, self.name = (
            slot,
            number,
            start,
            end,
            identity,
            name,
        )


def _identity(row: Row) -> tuple[object, ...]:
    """What stays the same of a mapping while it grows, shrinks or is split."""
    if row.inode:
        return row.shared, row.device, row.inode, row.offset - row.start
    return (row.shared,)


def _subtract(start: int, end: int, taken: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What is left of [start, end) without sorted, disjoint ranges."""
    for low, high in taken:
        if high <= start:
            continue
        if low >= end:
            break
        if low > start:
            yield start, low
        start = max(start, high)
    if start < end:
        yield start, end


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for start, end in ranges:
        if out and out[-1][1] == start:
            out[-1] = (out[-1][0], end)
        else:
            out.append((start, end))
    return out


def _output(out: AnyBuffer, room: int) -> Any:
    try:
        target = core.pin(out, writable=True)
        nbytes = len(target)
    except (TypeError, ValueError, BufferError):  # a pair of numbers, or what is wrong with it
        pinned = pin(out, what="output")
        target, nbytes = pinned.hold if pinned.hold is not None else core.pointer_to(pinned.address), pinned.nbytes
    if nbytes < room:
        raise InvalidMemory(f"the output has {nbytes} bytes, the set's pages have {room}")
    return target


class ProcessTracker:
    """Tells which pages another process wrote. Made by `attach`; detached by `detach`, by leaving a ``with``, or with
    the last reference to it.

    Attributes:
        pid: the process.
        attach_stall: for how long the process stood still when it was attached to, in seconds.

    Thread safety: everything may be called from any thread; calls of one tracker wait for each other.
    """

    pid: int
    attach_stall: float

    def __init__(self, pid: int, session: Any, chosen: Filter, pidfd: int, stall: float, *, memory: int = -1) -> None:
        self.pid = pid
        self.attach_stall = stall
        self._pidfd = os.dup(pidfd)
        self._memory = memory  # its /proc/PID/mem, where it came with an offer
        self._close = [weakref.finalize(self, os.close, fd) for fd in (self._pidfd, memory) if fd >= 0]
        self._session = session
        self._chosen = chosen
        self._lock = threading.RLock()
        self._parts: list[_Part] = []
        self._mappings: tuple[Mapping, ...] = ()
        self._untracked: list[tuple[int, int]] = []
        self._refreshes = 0
        self._seconds = 0.0
        self._gone_number = 0
        self._listener = engine.new_listener(session[0], adaptive=False, exact=True, page_ns=0)
        self._collecting = engine.collecting(self._listener[0], DirtySet)
        self._layout = Layout(())
        with self._told():
            self._look(first=True)

    # ---- what it is

    @property
    def mappings(self) -> tuple[Mapping, ...]:
        """All mappings of the process as of the last refresh, sorted."""
        return self._mappings

    @property
    def tracked(self) -> tuple[tuple[int, int], ...]:
        """[start, end) of what was registered as of the last refresh, sorted: every write there is in the next collect.
        Mappings that are read-only for now may be among it."""
        return tuple((part.start, part.end) for part in self._parts)

    @property
    def epoch(self) -> int:
        """The open epoch: 1 after `attach`, one more after each collect."""
        return engine.epoch(self._listener[0])

    def statistics(self) -> ProcessStatistics:
        """What it did so far.

        Raises:
            SessionClosed: it is detached.
        """
        with self._told():
            did = engine.session_statistics(self._session[0])
        return ProcessStatistics(did.collects, did.scans, did.protects, did.pages_found, self._refreshes, self._seconds)

    def __repr__(self) -> str:
        if engine.state(self._session[0]):
            return f"<ProcessTracker of {self.pid}: detached>"
        count = sum(mapping.state == TRACKED for mapping in self._mappings)
        return f"<ProcessTracker of {self.pid}: {count} mappings, epoch {self.epoch}>"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a ProcessTracker cannot be pickled: it holds descriptors")

    @property
    def _layout(self) -> Layout:
        layout: Layout = self._collecting.layout
        return layout

    @_layout.setter
    def _layout(self, now: Layout) -> None:
        self._collecting.layout = now

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Whatever fails because the target is gone is told as that."""
        try:
            yield
        except DirtyTrackError as error:
            if (meant := self._meant(error)) is error:
                raise
            raise meant from error

    def _meant(self, error: DirtyTrackError) -> DirtyTrackError:
        if isinstance(error, TargetGone):
            return self._gone(error)
        if engine.state(self._session[0]):
            if not isinstance(error, SessionClosed):
                return error
            return SessionClosed(f"the tracker of process {self.pid} is detached: attach again", pid=self.pid)
        if error.errno == errno.ESRCH or not targets.is_alive(self._pidfd):
            return self._gone(error)
        return error

    def _gone(self, error: DirtyTrackError) -> TargetGone:
        return TargetGone(
            f"process {self.pid} {_fate_of(self.pid, self._pidfd)}: what it wrote since the last collect is gone with "
            "its memory. Detach; attach again to a process that runs",
            errno=error.errno,
            pid=self.pid,
        )

    # ---- mappings

    def refresh(self) -> None:
        """Look at the mappings; `collect` does so by itself. What came or grew counts as dirty in the next collect.

        Raises:
            TargetGone: the process ended, or replaced itself by exec.
            SessionClosed: it is detached.
        """
        with self._lock, self._told():
            self._refresh()

    def _refresh(self) -> None:
        if self._untracked or targets.layout_changed(self._session[0], self.pid):
            self._look()

    def _look(self, *, first: bool = False) -> None:
        """Until the mappings are what was looked at: what was registered meanwhile may be part of a mapping by now."""
        for _ in range(_ROUNDS):
            settled = self._look_once(first=first)
            first = False
            if settled and not targets.layout_changed(self._session[0], self.pid):
                return

    def _look_once(self, *, first: bool) -> bool:
        rows = targets.layout(self._session[0], self.pid, len(self._mappings))
        self._refreshes += not first
        refused = self._chosen.look(rows)
        chosen = [row for row, why in refused if not why]
        self._drop_gone(rows)
        covered = [(part.start, part.end) for part in self._parts]
        untracked: dict[int, str] = {}
        fresh: list[_Part] = []
        settled = True
        for row in chosen:
            for start, end in _subtract(row.start, row.end, covered):
                try:
                    slot, number = targets.register(self._session[0], start, end, self.pid)
                except RangeBusy:
                    untracked[row.start] = _BUSY
                except InvalidMemory as error:
                    untracked[row.start] = f"the kernel refuses to track it ({error.errno and _named(error.errno)})"
                except KernelRefused as error:
                    if error.errno != errno.EAGAIN:
                        raise
                    settled = False
                    untracked[row.start] = "it changes all the time"
                else:
                    fresh.append(_Part(slot, number, start, end, _identity(row), row.name))
        if any(why == _BUSY for why in untracked.values()):
            fresh = self._left_to_others(fresh, chosen, untracked)
        if first:
            self._start(fresh)
        else:
            for part in fresh:
                self._add(part)
        self._parts.sort(key=lambda part: part.start)
        self._mappings = tuple(
            excluded(row, why)
            if why
            else called(row, UNTRACKED if row.start in untracked else TRACKED, untracked.get(row.start, ""))
            for row, why in refused
        )
        self._untracked = [(m.start, m.end) for m in self._mappings if m.state == UNTRACKED]
        self._layout = Layout(tuple(map(self._span, (m for m in self._mappings if m.state != EXCLUDED))))
        return settled

    def _left_to_others(self, fresh: list[_Part], chosen: list[Row], untracked: dict[int, str]) -> list[_Part]:
        """Without those that others had, who have more: they may not know yet that these were mapped anew, and no scan
        would tell them that they are ours. Registered and never scanned, they do no harm."""
        kept = []
        for part in fresh:
            if any(low < part.end and part.start < high for low, high in self._untracked):
                untracked.update((row.start, _BUSY) for row in chosen if row.start <= part.start < row.end)
            else:
                kept.append(part)
        return kept

    def _span(self, mapping: Mapping) -> Span:
        span = Span(
            0,
            named(mapping.name),
            mapping.start,
            mapping.nbytes,
            mapping.start,
            mapping.end,
            core.PAGE_BYTES,
            True,
            None,
            None,
        )
        span.pid = self.pid
        return span

    def _start(self, fresh: list[_Part]) -> None:
        while True:
            try:
                engine.start(self._listener[0], [part.slot[0] for part in fresh], self._note_gone)
            except DirtyTrackError:
                left = [part for part in fresh if part.number != self._gone_number]
                if len(left) == len(fresh) or not targets.is_alive(self._pidfd):
                    raise
                fresh = left  # it went away while it was armed
                continue
            self._parts = fresh
            return

    def _add(self, part: _Part) -> None:
        try:
            engine.add(self._listener[0], part.slot[0], self._note_gone, None)
        except DirtyTrackError:
            if not targets.is_alive(self._pidfd):
                raise
            _log.debug("process %d: [%#x, %#x) went away while it was armed", self.pid, part.start, part.end)
        else:
            self._parts.append(part)

    def _note_gone(self, number: int) -> None:
        self._gone_number = number

    def _drop_gone(self, rows: list[Row]) -> None:
        """Let go of each part that is not wholly there any more; what is left of it is registered anew.

        What was made read-only stays: the kernel joins it to its neighbours again when it is made writable, and where
        they were not joined, an mremap() of the process over both would fail because of us.
        """
        kept = []
        for part in self._parts:
            same = [(row.start, row.end) for row in rows if _identity(row) == part.identity]
            if part.number != self._gone_number and not any(_subtract(part.start, part.end, same)):
                kept.append(part)
                continue
            targets.remove(self._listener[0], part.slot[0])
            _log.debug("process %d: [%#x, %#x) is gone, or part of it", self.pid, part.start, part.end)
        self._gone_number = 0
        self._parts = kept

    # ---- collecting

    def collect(self) -> DirtySet:
        """Every page of the chosen mappings written since the last collect, or since `attach`; opens the next epoch.

        A mapping that is new, has grown or was replaced counts as wholly dirty once; an untracked one always. What is
        gone is in no set: ``mappings`` no longer has it.

        Returns:
            A set of addresses of the process. Its bytes are read by `read`, not by the set's own methods.

        Raises:
            TargetGone: the process ended, or replaced itself by exec.
            SessionClosed: it is detached.
            UsedAfterFork: this is a child of the process that attached.
        """
        taken: DirtySet | None = None
        try:  # not _told(), which takes 1 µs
            with self._lock:
                begun = time.perf_counter()
                self._refresh()
                for rest in range(_ROUNDS, -1, -1):
                    try:
                        taken = self._collecting.collect()
                        break
                    except core.taking.Failed as failed:
                        error = engine.take_error(failed, self._note_gone)
                    if not rest or not isinstance(error, RegionGone):
                        raise error
                    self._look()
                assert taken is not None
                dirty = DirtySet(self._with_untracked(taken._set), taken._layout) if self._untracked else taken
                self._seconds += time.perf_counter() - begun
                return dirty
        except BaseException as error:  # an interrupt too: nobody gets the set
            if taken is not None:
                core.give_back(taken._set)
            if isinstance(error, DirtyTrackError) and (meant := self._meant(error)) is not error:
                raise meant from error
            raise

    def _with_untracked(self, cset: Any) -> Any:
        if not self._untracked:
            return cset
        numbers = array("Q", [number for span in _joined(self._untracked) for number in span])
        whole = sets.from_runs(numbers, len(numbers) // 2)
        united = sets.combine("union", cset, whole)
        united.epoch, united.complete = cset.epoch, cset.complete
        return united

    # ---- bytes

    def read(self, dirty: DirtySet, out: AnyBuffer | None = None) -> memoryview:
        """Read the set's pages from the process, as they are now, packed in the order of their addresses.

        Args:
            dirty: pages; ``dirty.page_span_bytes`` bytes are read.
            out: a writable buffer of at least that length; left out, a new one is made.

        Returns:
            A view of the bytes.

        Raises:
            InvalidMemory: ``out`` is too small.
            RegionGone: a page is not mapped any more.
            TargetGone: the process ended, or replaced itself by exec.
            PermissionDenied: the process may no longer be read.
        """
        room = dirty.page_span_bytes
        target = sets.new_bytes(room) if out is None else _output(out, room)
        view = core.view_of(target, room) if room else memoryview(bytearray())
        with self._lock, self._told():
            engine.require(self._session[0])
            targets.read(self.pid, self._memory, dirty._set, target, room)
            if not targets.is_alive(self._pidfd):  # it may have ended, and its number be another's
                raise TargetGone("", pid=self.pid)
        return view

    @contextmanager
    def frozen(
        self, *, timeout: float = 2.0, by: Literal["ptrace", "cgroup"] = "ptrace", registers: bool = False
    ) -> Iterator[Frozen]:
        """A context manager in which every thread of the process stands still: for a consistent cut.

        ``"ptrace"``: its threads are stopped by a guardian of their own: they go on when the ``with`` ends, and by
        themselves if this process or the guardian dies. A process that was stopped before stays so.

        ``"cgroup"``: its cgroup is frozen (``cgroup.freeze`` of cgroup v2). **All other processes in it, and in cgroups
        below it, stand still too.** It needs no right to trace, and a debugger may have the process; a system call that
        waits may end with EINTR. A watcher thaws it if this process dies; if the watcher is killed as well, it stays
        frozen until somebody writes 0 to ``cgroup.freeze``. One that was frozen before stays so.

        Args:
            timeout: in seconds.
            by: how it is stopped.
            registers: tell those of its threads, as ``"ptrace"`` alone can: see `Frozen`.

        Raises:
            TargetBusy: a thread did not stop in time (it waits for a child of vfork, which only ptrace minds, or for a
                disk), or another tracker has the cgroup frozen; all go on.
            TargetGone: the process ended.
            PermissionDenied: it may not be traced; or ``cgroup.freeze`` may not be written.
            InvalidMemory: it is in the root cgroup, or in one that has this process in it too; or it is in another pid
                namespace.
            UnsupportedKernel: there is no cgroup v2.
        """
        from .attaching import require_seconds

        require_seconds(timeout)
        if by not in ("ptrace", "cgroup"):
            raise InvalidMemory(f"by takes 'ptrace' or 'cgroup', not {by!r}")
        if registers and by != "ptrace":
            raise InvalidMemory('registers=True takes by="ptrace": only who traces a thread may read its registers')
        with self._lock, self._told():
            engine.require(self._session[0])
            if not self.pid:
                raise InvalidMemory(
                    "a process in another pid namespace cannot be stopped from here: have it stop its threads itself"
                )
        with (
            self._frozen_by_cgroup(timeout) if by == "cgroup" else self._frozen_by_ptrace(timeout, registers) as frozen
        ):
            yield frozen

    @contextmanager
    def _frozen_by_ptrace(self, timeout: float, registers: bool) -> Iterator[Frozen]:
        from .attaching import refuse_answer, start_guardian

        with ExitStack() as held:
            with self._lock, self._told():
                engine.require(self._session[0])
                guardian = held.enter_context(
                    start_guardian(self.pid, self._pidfd, timeout, freeze=True, registers=registers)
                )
            answer = guardian.answer()
            frozen = frozen_of(answer)
            with self._lock, self._told():  # it may have been detached meanwhile
                engine.require(self._session[0])
                if not targets.outlives(self._pidfd, answer):  # then its number may be another's
                    raise self._gone(TargetGone(""))
            if answer.code:
                refuse_answer(answer, self.pid, "freeze", timeout)
            begun = time.perf_counter()
            try:
                yield frozen
            finally:
                guardian.close()
                told = guardian.end.stall_ns / 1e9 if guardian.end is not None else 0.0
                frozen.seconds = told or time.perf_counter() - begun

    @contextmanager
    def _frozen_by_cgroup(self, timeout: float) -> Iterator[Frozen]:
        from .freezer import frozen_group

        with ExitStack() as frozen:
            try:
                frozen.enter_context(frozen_group(self.pid, timeout))
            except DirtyTrackError:
                self._require_alive()
                raise
            self._require_alive()
            found, begun = Frozen(), time.perf_counter()
            try:
                yield found
            finally:
                frozen.close()
                found.seconds = time.perf_counter() - begun

    def _require_alive(self) -> None:
        if not targets.is_alive(self._pidfd):  # then its number may be another's
            raise self._gone(TargetGone(""))

    # ---- ending

    def detach(self) -> None:
        """Let go of the process: its memory is unregistered, its pages are no longer protected. A second call does
        nothing."""
        with self._lock:
            engine.close(self._session[0])
            for close in self._close:
                close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def _fate_of(pid: int, pidfd: int) -> str:
    """What became of a process whose memory is gone. One that ends tells so only after all of it was given back, which
    takes a while; one that replaced itself has other memory at once."""
    until = time.monotonic() + targets.ENDING_SECONDS
    while targets.is_alive(pidfd, 0.002):
        if targets.has_memory(pid) and targets.is_alive(pidfd):  # else its number may be another's
            return "replaced itself by exec"
        if time.monotonic() >= until:
            return "is ending" if pid else "replaced itself by exec, or is ending"
    return "ended"


def _named(number: int) -> str:
    return errno.errorcode.get(number, str(number))

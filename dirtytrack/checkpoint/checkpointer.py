# SPDX-License-Identifier: MIT
"""Checkpointer: saves named buffers into a store, paying for what was written since the last save."""

from __future__ import annotations

import itertools
import os
import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any, Literal

from ..errors import (
    CheckpointerClosed,
    DamagedCheckpoint,
    InvalidCheckpoint,
    InvalidMemory,
    StoreBusy,
    StoreFailed,
    UsedAfterFork,
)
from ..kernel import sets
from .buffers import Described, describe
from .coding import Decoder, Encoder
from .costs import Costs
from .crew import Worker, default_threads
from .going_on import there
from .jobs import Job, Save
from .mirroring import Mirrors
from .options import as_json, frame_nbytes, require_kinds, require_options
from .restoring import restore
from .saving import Saver
from .staging import Staging, default_staging_nbytes
from .stall import Stall
from .store import require_store, store_of
from .tending import Tending
from .watching import Watching

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from types import TracebackType

    from typing_extensions import Self

    from .buffers import Saveable
    from .chains import Retention
    from .manifests import Manifest
    from .protocols import Store, Writer
    from .restoring import State

__all__ = ["Checkpointer"]


class Checkpointer:
    """Saves buffers, again and again, into a store: what was written since the last save, and what that needs.

    `save` stops its caller for as long as it takes to ask which pages were written, to arm them again, and to copy them
    into a staging buffer; the rest goes on behind it, in a thread that is there only while there is something to do. A
    save is in the store when its manifest is, durably and after all that it needs. **No page is lost to a save that
    fails**, for whatever reason: its pages are in the next one.

    Without ``quiesce``, the copy is of one instant only if nobody else writes meanwhile.

    Args:
        store: a directory or a URL as ``s3://bucket/prefix`` (made where there is none), or a `Store`. One at a time
            may write to it.
        buffers: by name: arrays, tensors on the CPU, shared
            memory, anything with the buffer protocol, (address, nbytes). They are held until `remove` or `close`. One
            memory may have several names. Where two overlap in part, each is saved by itself: such are restored into
            new memory only, and not resumed from.
        resume: True: fill the buffers from the newest generation and go on from there, so that the next save is an
            increment; a store that has none yet is begun. A number: from that generation. Nobody else may write to the
            buffers until this returns. Of the generation all buffers must be given, and no others; more can be added.
        compression: ``"zstd"`` or None; ``level`` is zstd's.
        deltas: keep a copy of all that was saved (which takes as much memory again, and that of what was reserved and
            never written too), and store only the bytes that differ from it where that is less: for programs that write
            the same values again, or few bytes of a page.
        staging_bytes: of the staging buffer, which is there from the beginning. Left out: an eighth of the buffers, at
            least 32 MiB, at most 256 MiB, and what an object store sends at once; at most twice the buffers. More dirty
            bytes than fit are copied in waves: `save` then waits for the store, and the program stands still for so
            long.
        when_busy: what `save` does while an earlier one is under way. ``"wait"``: waits for it. ``"skip"``: nothing; it
            returns a save of kind ``"skipped"``. ``"coalesce"``: is staged behind it; one that is staged already and
            not begun is taken back, and its pages go into the new one.
        quiesce: called for a context manager in which nobody writes to the buffers: `save` copies within it.
        retain: after each save, remove the generations that this does not keep. They are all kept where it is left out.
        compact: once the increments since the newest full save take so many times as much of the store as that, the
            generation is compacted: written anew as a full one, from the store, while the program goes on. None: never;
            after a thousand segments the next save is full, since each manifest lists them all.
            Where it cannot be (encrypted without ``decrypt``), the next save is full.
        encrypt, decrypt: functions from bytes to bytes, for each frame; called from several threads. ``decrypt`` is for
            ``resume`` and for compacting.
        threads: how many compress and encrypt; half of the processors, up to four, where it is left out.
        track: options of `dirtytrack.track`, as ``{"blind_spots": "accepted"}``.

    **Full or increment.** The first save is full, and each after which nobody knows what changed. Else what is cheaper
    as measured here: see ``dirtytrack/checkpoint/costs.py``. A full save stands for itself; the increments before
    it are then needed only by their own generations.

    Raises:
        InvalidMemory: a buffer cannot be saved, or does not fit the generation to resume from; nothing was overwritten
            then.
        InvalidCheckpoint: the path is no store and holds something else; or an option makes no sense.
        DamagedCheckpoint, NoSuchGeneration: of the generation to resume from.
        StoreBusy, StoreFailed, PermissionDenied, UnsupportedKernel, RangeBusy, LimitReached.

    Thread safety: everything may be called from any thread; `save`, `add`, `remove`, `replace` and `close` follow one
    another. A signal handler that interrupts one of them may not call another.
    """

    _saver_kind: type[Saver] = Saver
    _of_ranks = False
    """Whether it saves one rank's part of what many ranks save together."""

    def __init__(
        self,
        store: Store | str | os.PathLike[str],
        buffers: Mapping[str, Saveable],
        *,
        resume: bool | int = False,
        compression: Literal["zstd"] | None = "zstd",
        level: int = 1,
        deltas: bool = False,
        staging_bytes: int | None = None,
        when_busy: Literal["wait", "skip", "coalesce"] = "wait",
        quiesce: Callable[[], AbstractContextManager[Any]] | None = None,
        retain: Retention | None = None,
        compact: float | None = 2.0,
        encrypt: Callable[[bytes], bytes] | None = None,
        decrypt: Callable[[bytes], bytes] | None = None,
        threads: int | None = None,
        track: Mapping[str, Any] | None = None,
    ) -> None:
        require_options(when_busy, quiesce, compact, threads, buffers)
        require_kinds(resume, staging_bytes, retain, encrypt, decrypt)
        described = {name: describe(name, buffer) for name, buffer in buffers.items()}
        encoder, decoder = Encoder(compression, level, encrypt), Decoder(decrypt)
        self._pid, self._lock = os.getpid(), threading.RLock()
        self._when_busy, self._quiesce, self._wanted_staging = when_busy, quiesce, staging_bytes
        self._closed, self._unsure = False, False
        self._state: State | None = None
        self._filled: tuple[str, ...] = ()
        self._taken: Save | None = None
        self._store: Store
        self._closing = _Closing()
        try:
            if isinstance(store, (str, os.PathLike)):
                self._store = self._closing.store = store_of(store, create=True)
            else:
                require_store(store)
                self._store = store
            self._writer: Writer = self._store.writer()
            self._closing.writer = self._writer
            base = self._resume(resume, described, buffers, decrypt, threads)
            self._costs, mirrors = Costs(deltas=deltas), Mirrors() if deltas else None
            self._watching = self._closing.watching = Watching(
                described, base, self._filled, dict(track or {}), stacklevel=3
            )
            self._tending = self._closing.tending = Tending(
                self._store,
                self._writer,
                encoder,
                decoder,
                retain=retain,
                compact=compact,
                encrypts=encrypt is not None,
                can_compact=encrypt is None or decrypt is not None,
            )
            staging = Staging(self._staging_nbytes())
            self._saver = self._saver_kind(
                store=self._store,
                writer=self._writer,
                staging=staging,
                encoder=encoder,
                mirrors=mirrors,
                costs=self._costs,
                frame_nbytes=frame_nbytes(staging),
                threads=default_threads() if threads is None else threads,
                base=base,
                put_back=self._watching.tracker.put_back,
                tend=self._tending,
            )
            self._tending.report = self._saver.report
            if mirrors is not None and base is not None:
                for plan in self._watching.now().plans:
                    mirrors.add(plan.entry.number, plan.address, plan.entry.nbytes, plan.granule)
                    mirrors.know(plan.entry.number, plan.address, unpinned=plan.unpinned)
            self._numbers: Iterator[int] = itertools.count(self._writer.next_generation())
        except BaseException:
            self._closing()
            raise
        self._finalizer = weakref.finalize(self, _leave, self._pid, self._saver, self._closing)

    def _resume(
        self,
        resume: bool | int,
        described: Mapping[str, Described],
        buffers: Mapping[str, Saveable],
        decrypt: Callable[[bytes], bytes] | None,
        threads: int | None,
    ) -> Manifest | None:
        if resume is False:
            return None
        if resume is True and not self._store.catalog():
            return None
        generation = None if resume is True else resume
        try:
            manifest = self._store.manifest(generation)
            there = [region.name for region in manifest.regions]
            if manifest.ranks is not None and not self._of_ranks:
                raise InvalidCheckpoint(
                    f"generation {manifest.generation} of {self._store.name} was saved by many ranks together, and "
                    "only ranks can go on from it, as many or others: see dirtytrack.checkpoint.coordinated; or "
                    "restore() it, and save to another store"
                )
        except DamagedCheckpoint:  # restoring says it too, and which older one is whole
            there = []
        lacking = [name for name in there if name not in described]
        if lacking:
            raise InvalidMemory(
                f"to go on from a generation all of its buffers must be given, and there is none for "
                f"{', '.join(map(repr, lacking[:8]))}: pass them too, or restore() what you need and begin anew"
            )
        seen: set[tuple[int, int]] = set()
        into: dict[str, Saveable] = {}
        for name, each in described.items():
            if (each.address, each.nbytes) not in seen or name not in there:  # weights that are tied are the same bytes
                seen.add((each.address, each.nbytes))
                into[name] = buffers[name]
        self._state = restore(self._store, generation=generation, into=into, decrypt=decrypt, threads=threads)
        self._filled = tuple(self._state)
        return self._state.manifest

    # ---- what it is

    @property
    def resumed(self) -> State | None:
        """What it went on from; None where it began."""
        return self._state

    @property
    def store(self) -> Store:
        """Where it saves to."""
        return self._store

    @property
    def generation(self) -> int | None:
        """The last that was committed, or resumed from."""
        base = self._saver.base
        return None if base is None else base.generation

    @property
    def buffers(self) -> tuple[str, ...]:
        """The names of what it saves."""
        return self._watching.names

    @property
    def staging_bytes(self) -> int:
        """Of the staging buffer."""
        return self._saver.staging.nbytes

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self.buffers)} buffers, generation {self.generation}"
        return f"<Checkpointer into {self._store.name}: {state}>"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a Checkpointer cannot be pickled: it saves this process's memory")

    # ---- which buffers

    def add(self, name: str, buffer: Saveable) -> None:
        """Save another buffer from now on, beginning with the next save, which has all of it.

        Raises:
            InvalidMemory: there is one of that name, or it cannot be saved.
            CheckpointerClosed, UsedAfterFork, RangeBusy, LimitReached.
        """
        with self._alone("add"):
            self._require_open()
            self._watching.add(describe(name, buffer), stacklevel=3)

    def remove(self, name: str) -> None:
        """Save a buffer no more, and let go of it. Generations that have it keep it.

        Raises:
            InvalidMemory: there is none of that name.
            CheckpointerClosed, UsedAfterFork.
        """
        with self._alone("remove"):
            self._require_open()
            self._watching.remove(name)

    def replace(self, name: str, buffer: Saveable) -> None:
        """Save another buffer under that name, longer or shorter or of another type: all of it in the next save. A
        `Memory` may also be resized; that is found.

        Raises:
            InvalidMemory: there is none of that name, or the new one cannot be saved; the old one is then still saved.
            CheckpointerClosed, UsedAfterFork, RangeBusy, LimitReached.
        """
        with self._alone("replace"):
            self._require_open()
            self._watching.replace(describe(name, buffer), stacklevel=3)

    # ---- saving

    def save(self, meta: Any = None, *, full: bool = False) -> Save:
        """Save all buffers as they are now. Returns as soon as they are copied; `Save.wait` is for who must know that
        they are durable.

        Args:
            meta: anything that JSON has a word for, nested at most 100 deep, kept with it. Or a function that returns
                it, called within ``quiesce``, before the copy: for what must be of the same instant as the buffers. Its
                time belongs to the stall; a save that is skipped does not call it.
            full: all bytes, whatever was written: a generation that needs no other one's segments.

        Raises:
            InvalidCheckpoint: JSON has no word for ``meta``; or ``quiesce`` swallowed an error.
            StoreBusy: called by ``quiesce``, ``meta``, ``encrypt``, a finaliser or a signal handler within another
                call.
            RegionGone: a buffer's memory went away: `remove` it, then save again.
            StoreFailed, or whatever an earlier save failed of: told once, before anything is collected; the next call
                saves, the pages of the failed one too.
            CheckpointerClosed, UsedAfterFork, MissedWrite.

        What raises has collected nothing for good: all pages are in the next save.
        """
        kept = meta if callable(meta) else as_json(meta)
        with self._alone("save"):
            self._require_open()
            saver, began = self._saver, time.perf_counter()
            self._recover()
            saver.raise_unreported()
            if self._when_busy == "skip" and saver.busy:
                return Save(None, "skipped", None if callable(kept) else kept)
            saver.wait(only_aborted=self._when_busy != "wait")
            saver.raise_unreported()
            if not saver.busy:
                self._make_staging()
            taken = self._taken_back()
            try:
                save = self._save(kept, full or (taken is not None and taken.wanted_full))
            except BaseException as error:
                if taken is not None:
                    taken.save._end("failed", error)
                raise
            save.waited_seconds = max(0.0, time.perf_counter() - began - save.stall_seconds)
            if taken is not None:
                taken.save.into = save
                taken.save._end("coalesced")
            return save

    def _recover(self) -> None:
        """From a save that was interrupted, and again while it cleaned up. The caller has the lock."""
        self._saver.abort_abandoned()
        if self._taken is not None and not self._taken.done:
            self._taken._end("failed", StoreFailed("the save that took over its pages was interrupted"))

    def _taken_back(self) -> Job | None:
        if self._when_busy != "coalesce":
            return None
        before, self._unsure = self._unsure, True
        taken = self._saver.take_back()
        if taken is not None:
            self._taken = taken.save
            self._watching.tracker.put_back(taken.dirty)
        self._unsure = before
        return taken

    def _save(self, meta: Any, full: bool) -> Save:
        if self._unsure:  # an interrupt came between collecting and giving back
            self._saver.forget_base()
        watched = self._watching.now()
        token, known, left = self._saver.expected()
        full = full or known is None or self._tending.full_next
        generation = next(self._numbers)
        saver, stall = self._saver, Stall(self._saver, watched)
        tracker, copied = self._watching.tracker, False
        epoch = tracker.epoch
        try:
            began = time.perf_counter()
            with self._quiesce() if self._quiesce is not None else nullcontext():
                if callable(meta):
                    meta = as_json(meta())
                epoch, self._unsure = tracker.epoch, True
                dirty = stall.dirty = tracker.collect()
                dirty_nbytes = sets.nbytes(dirty._set, watched.extents)
                wanted, holes = full, None
                full = full or self._costs.full_is_cheaper(dirty_nbytes, watched.nbytes)
                saved = watched.whole if full else watched.with_whole(dirty, known or frozenset())
                if left:
                    saved -= there(left, dirty, watched.plans)
                if not saver.mirrored:
                    saved, holes = watched.parted(saved)
                save = Save(generation, "full" if full else "increment", meta)
                save.bytes_dirty = dirty_nbytes
                job = stall.job = Job(
                    save,
                    full=full,
                    wanted_full=wanted,
                    watched=watched,
                    dirty=dirty,
                    saved=saved,
                    holes=holes,
                    left=left,
                    token=token,
                )
                stall.copy(job)
                copied = True
            if not copied:
                raise InvalidCheckpoint(
                    "quiesce= swallowed an error that ended the copy: its __exit__ returned true, which it must not"
                )
            save.stall_seconds = time.perf_counter() - began
            stall.submit(job)
        except BaseException as error:
            stall.undo(error, tracker.put_back)
            # Where an interrupt came as the set was handed over, nobody has it.
            self._unsure = stall.dirty is None and tracker.epoch not in (0, epoch)
            raise
        self._unsure = False
        if full:
            self._tending.full_next = False
        return save

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is under way.

        Returns:
            Whether that is so; False where the time, in seconds, ran out.

        Raises:
            StoreFailed, or whatever a save failed of that nobody was told of yet.
            UsedAfterFork.
        """
        self._require_own()
        if isinstance(threading.current_thread(), Worker):
            raise StoreBusy("wait() was called in a thread that works on a save, by a finaliser or encrypt")
        if not self._lock._is_owned() and self._lock.acquire(blocking=False):  # type: ignore[attr-defined]
            try:
                self._recover()
            finally:
                self._lock.release()
        done = self._saver.wait(timeout)
        self._saver.raise_unreported()
        return done

    # ---- staging

    def _staging_nbytes(self) -> int:
        wanted = self._wanted_staging
        if wanted is not None:
            return wanted
        return default_staging_nbytes(self._watching.nbytes, self._store.held_nbytes)

    def _make_staging(self) -> None:
        """Nobody has any of it now, whatever was interrupted. A larger one, where nobody said how large and the buffers
        have grown much."""
        saver = self._saver
        saver.staging.clear()
        if self._wanted_staging is None and self._staging_nbytes() > 2 * saver.staging.nbytes:
            saver.staging = Staging(self._staging_nbytes())
            saver.frame_nbytes = frame_nbytes(saver.staging)

    # ---- the end

    def close(self) -> None:
        """Wait until nothing is under way, then let go of the buffers and of the store. A second call does nothing.

        Raises:
            StoreFailed, or whatever a save failed of that nobody was told of yet; all is let go of first.
        """
        if os.getpid() != self._pid:
            return
        with self._alone("close"):
            if self._closed:
                return
            self._recover()
            self._saver.wait()
            self._closed = True
            self._finalizer.detach()
            self._closing()
            self._saver.raise_unreported()

    def __enter__(self) -> Self:
        self._require_own()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception:
            if error is None:
                raise  # else what went wrong in the block is what must be seen; the failed save was logged

    def _require_own(self) -> None:
        if os.getpid() != self._pid:
            raise UsedAfterFork(
                "this Checkpointer is the parent's: a child that was forked makes one of its own, into another store"
            )

    def _alone(self, doing: str) -> threading.RLock:
        """What keeps other calls away. Whether this thread is in one already is the lock's own knowledge: whatever we
        noted ourselves, an interrupt could keep us from taking back."""
        self._require_own()
        if self._lock._is_owned() or isinstance(threading.current_thread(), Worker):  # type: ignore[attr-defined]
            raise StoreBusy(
                f"{doing}() was called while this thread is in another call or works on a save, by a signal handler, a "
                "finaliser, quiesce or encrypt"
            )
        return self._lock

    def _require_open(self) -> None:
        if self._closed:
            raise CheckpointerClosed("this Checkpointer is closed: make another one, with resume=True to go on")


# ---- letting go


class _Closing:
    """Lets go of what a Checkpointer has; knows nothing of itself, so that it can outlive it."""

    def __init__(self) -> None:
        self.store: Store | None = None
        self.writer: Writer | None = None
        self.watching: Watching | None = None
        self.tending: Tending | None = None

    def __call__(self) -> None:
        with ExitStack() as stack:
            for each in (self.store, self.writer, self.tending, self.watching):  # the last one first
                if each is not None:
                    stack.callback(each.close)


def _leave(pid: int, saver: Saver, closing: _Closing) -> None:
    if os.getpid() == pid:  # in a child the locks may be held by threads that are not there
        saver.leave(closing)

# SPDX-License-Identifier: MIT
"""What happens behind a save: its staged bytes are shrunk, compressed, checked, written and committed."""

from __future__ import annotations

import _thread
import atexit
import logging
import os
import threading
import time
import weakref
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import DamagedCheckpoint, InvalidCheckpoint, StoreFailed
from ..kernel import core, cutting
from ..kernel.packing import all_zero, xxh64
from .bell import Bell
from .crew import Crew, Worker
from .going_on import Left, left_of
from .manifests import Manifest
from .segmenting import Framed, Parts
from .segments import Codec, FrameKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..dirtyset import DirtySet
    from .coding import Encoder
    from .costs import Costs
    from .jobs import Batch, Job, Save
    from .mirroring import Mirrors
    from .protocols import Store, Writer
    from .staging import Staging

__all__ = ["Saver"]

_log = logging.getLogger("dirtytrack")
_HOLES_NBYTES = 64 << 30  # of zeros in a frame, which takes no room but for its runs


class Saver:
    """One thread that writes saves in the order in which they were made, and is there only while there are any.

    **No page is lost to a save that fails.** Its pages, and those of each increment that was made on top of it, go back
    to the tracker first; then ``token`` moves on. An increment whose token is not the present one was made before its
    predecessor failed: it fails too.

    Args:
        put_back: gives a failed save's pages back.
        tend: called after each commit, with the manifest; returns the one to go on with.

    Thread safety: everything may be called from any thread.
    """

    def __init__(
        self,
        *,
        store: Store,
        writer: Writer,
        staging: Staging,
        encoder: Encoder,
        mirrors: Mirrors | None,
        costs: Costs,
        frame_nbytes: int,
        threads: int,
        base: Manifest | None,
        put_back: Callable[[DirtySet], object],
        tend: Callable[[Manifest], Manifest],
    ) -> None:
        self.staging = staging
        self.frame_nbytes = frame_nbytes
        self._store, self._writer, self._encoder, self._mirrors = store, writer, encoder, mirrors
        self._costs, self._threads, self._put_back, self._tend = costs, threads, put_back, tend
        self._bell = Bell()
        self._mutex = self._bell.mutex
        self._queue: deque[Job] = deque()
        self._current: Job | None = None
        self._thread: threading.Thread | None = None
        self._base = base
        self._left: tuple[Left, ...] = ()
        self._token = 0
        self._lost_at: int | None = 0 if base is None else None
        """Only a full save that was begun with this token, or a later one, is something to build on."""
        self._unreported: tuple[Save | None, BaseException] | None = None
        self._at_end: Callable[[], object] | None = None

    # ---- what is under way

    @property
    def base(self) -> Manifest | None:
        """The last generation that was committed, or resumed from."""
        return self._base

    @property
    def busy(self) -> bool:
        """Whether anything is under way."""
        return self._current is not None or bool(self._queue)

    @property
    def mirrored(self) -> bool:
        """Whether there is a copy of what was saved, which must see all of it."""
        return self._mirrors is not None

    @property
    def stores_plain(self) -> bool:
        """Whether frames are stored as they are staged."""
        return self._mirrors is None and self._encoder.is_plain

    def expected(self) -> tuple[int, frozenset[int] | None, tuple[Left, ...]]:
        """The token; the numbers of the regions that the next increment can build on, None: it must be full; and what
        saves that failed left to it."""
        with self._mutex:
            lost_at = 0 if self._lost_at is None else self._lost_at
            for job in reversed((*((self._current,) if self._current else ()), *self._queue)):
                holds = job.token == self._token or (job.full and job.token >= lost_at)
                if holds and not job.failed and job.aborted is None:
                    return self._token, job.numbers, ()  # that one names what is left
            if self._base is None or self._lost_at is not None:
                return self._token, None, self._left
            return self._token, frozenset(region.number for region in self._base.regions), self._left

    def forget_base(self) -> None:
        """Nobody knows any more what changed since the last save: the next one is full."""
        with self._mutex:
            self._token += 1
            self._lost_at = self._token
            self._left = ()  # what was written since is not known either; its segments go with the writer

    def submit(self, job: Job) -> None:
        """Put a job behind the others."""
        with self._mutex:
            job.save._told = self._told_of(job.save)
            if self._thread is None:
                self._start()
            self._queue.append(job)
            self._bell.ring()

    def _start(self) -> None:
        """By another thread: an interrupt in Thread.start() can leave a thread that never runs."""
        thread = Worker(target=lambda: self._run(thread), name="dirtytrack-save", daemon=True)
        self._thread = thread
        _savers.add(self)
        try:
            _thread.start_new_thread(_begin, (thread,))
        except BaseException:
            self._thread = None  # should it run all the same, it sees that it is not the one
            raise

    def push(self, job: Job, batch: Batch) -> bool:
        """More of a job is staged. False where it has failed: the room was given back."""
        with self._mutex:
            if not job.failed:
                job.batches.append(batch)
                self._bell.ring()
                return True
        self.staging.give_back(batch.room)
        return False

    def seal(self, job: Job) -> None:
        """All of a job is staged."""
        with self._mutex:
            job.sealed = True
            self._bell.ring()

    def abort(self, job: Job, error: BaseException) -> bool:
        """Whoever stages a job has come to grief: its pages go back, unless it is committed already. False where it
        never came here."""
        with self._mutex:
            job.aborted, job.sealed = error, True
            self._bell.ring()
            return job is self._current or job in self._queue or job.save.done

    def abort_abandoned(self) -> None:
        """The caller knows that nobody stages any more: what is not sealed was left by somebody who was interrupted,
        and again while he cleaned up."""
        with self._mutex:
            for job in (self._current, *self._queue):
                if job is not None and not job.sealed:
                    job.aborted, job.sealed = StoreFailed("its staging was interrupted"), True
            self._bell.ring()

    def take_back(self) -> Job | None:
        """The last job, where it is wholly staged and not begun; its room is free again, its pages are the caller's."""
        with self._mutex:
            if not self._queue or not self._queue[-1].sealed:
                return None
            job = self._queue.pop()
            self._bell.ring()
        self._free(job)
        return job

    def wait(self, timeout: float | None = None, *, only_aborted: bool = False) -> bool:
        """Wait until nothing is under way, or nothing that was aborted; whether that is so."""

        def over() -> bool:
            if not only_aborted:
                return not self.busy
            jobs = (self._current, *self._queue)
            return all(job is None or job.aborted is None for job in jobs)

        return self._bell.wait_for(over, timeout)

    def raise_unreported(self) -> None:
        """Raise what went wrong behind the program's back, once."""
        with self._mutex:
            found, self._unreported = self._unreported, None
        if found is not None:
            raise found[1]

    def report(self, error: BaseException, save: Save | None = None) -> None:
        """Something went wrong that the next call is to raise."""
        with self._mutex:
            self._unreported = self._unreported or (save, error)

    def _told_of(self, save: Save) -> Callable[[], object]:
        def told() -> None:
            with self._mutex:
                if self._unreported is not None and self._unreported[0] is save:
                    self._unreported = None

        return told

    def leave(self, at_end: Callable[[], object]) -> None:
        """Call this when nothing is under way any more, now or then."""
        with self._mutex:
            if self.busy:
                self._at_end = at_end
                return
        at_end()

    # ---- the thread

    def _run(self, me: threading.Thread) -> None:
        with Crew(self._threads) as crew:
            while True:
                with self._mutex:
                    at_end: Callable[[], object] | None = None
                    if self._thread is not me:
                        break
                    if not self._queue:
                        self._thread = None
                        at_end, self._at_end = self._at_end, None
                        break
                    job = self._current = self._queue.popleft()
                try:
                    self._do(job, crew)
                finally:
                    with self._mutex:
                        self._current = None
                        self._bell.ring()
                del job
        if at_end is not None:
            at_end()

    def _do(self, job: Job, crew: Crew) -> None:
        parts = Parts(self._writer, job.save.generation or 0, self.staging.nbytes)
        try:
            if not job.full and job.token != self._token:
                raise StoreFailed(
                    f"generation {job.save.generation} was not saved, because the save before it failed; the next save "
                    "has its pages"
                )
            left = self._left if job.token == self._token else ()
            if job.full and left != job.left:
                raise StoreFailed(
                    f"generation {job.save.generation} was not saved: it relied on what a save that failed had left, "
                    "and another was committed since; the next save has its pages"
                )
            manifest = self._write(job, parts, left, crew)
        except BaseException as error:
            parts.settle()
            found = self._left_by(job, parts)
            parts.abandon(() if found is None else found.segments)
            self._fail(job, error, found)
            return
        with self._mutex:
            self._base, gone, self._left = manifest, self._left, ()
            if job.full and self._lost_at is not None and job.token >= self._lost_at:
                self._lost_at = None
        if left != gone:  # a full save that was made before they were left
            _abandon(gone)
        if self._mirrors is not None:
            for number, runs in job.touched:
                self._mirrors.trust(number, runs)
        job.save.bytes_written = parts.nbytes
        job.save._end("committed")
        _log.debug("committed generation %d: %s, %d bytes", manifest.generation, manifest.kind, parts.nbytes)
        self._after(manifest)

    def _left_by(self, job: Job, parts: Parts) -> Left | None:
        """What a save that failed leaves to the next one. Never fails."""
        if self._mirrors is not None:  # which has doubts about all of it
            return None
        try:
            return left_of(job, parts.finished())
        except Exception as problem:
            _log.warning("what a failed save had in the store cannot be used, so it is sent again: %s", problem)
            return None

    def _after(self, manifest: Manifest) -> None:
        try:
            following = self._tend(manifest)
        except BaseException as error:  # the save is safe all the same
            _log.warning("after generation %d was committed: %s", manifest.generation, error)
            self.report(error)
        else:
            with self._mutex:
                self._base = following

    def _fail(self, job: Job, error: BaseException, left: Left | None = None) -> None:
        with self._mutex:
            job.failed = True
        self._free(job)
        self.staging.wake()
        if self._mirrors is not None:
            for number, runs in job.touched:
                self._mirrors.doubt(number, runs)
        lost = False
        try:
            self._put_back(job.dirty if left is None else job.dirty - left.pages)
        except BaseException as problem:
            _log.warning("the pages of a failed save cannot be given back, so the next one is full: %s", problem)
            lost = True
        gone: tuple[Left, ...] = ()
        with self._mutex:  # now that they are back
            self._token += 1
            if left is not None:
                self._left += (left,)
            if isinstance(error, (InvalidCheckpoint, DamagedCheckpoint)) and self._left:
                lost = True  # they may be why
            if lost:
                self._lost_at = self._token
                gone, self._left = self._left, ()
            if error is not job.aborted:  # else it was raised where it happened
                self._unreported = self._unreported or (job.save, error)
        _abandon(gone)
        _log.warning("generation %s was not saved: %r", job.save.generation, error)
        job.save._end("failed", error)

    def _free(self, job: Job) -> None:
        while True:
            with self._mutex:
                if not job.batches:
                    return
                batch = job.batches.popleft()
            self.staging.give_back(batch.room)

    # ---- one job

    def _batches(self, job: Job) -> Iterator[Batch]:
        while True:
            self._bell.wait_for(lambda: job.batches or job.sealed)
            with self._mutex:
                if job.aborted is not None:
                    raise job.aborted
                if not job.batches:
                    return
                batch = job.batches[0]
            yield batch
            with self._mutex:
                job.batches.popleft()  # its room goes back when nobody has a view of it any more: see `_frames`

    def _write(self, job: Job, parts: Parts, left: tuple[Left, ...], crew: Crew) -> Manifest:
        began = time.perf_counter()
        if self._mirrors is not None:
            self._mirrors.keep_only(job.numbers)
            for plan in job.plans:
                self._mirrors.add(plan.entry.number, plan.address, plan.entry.nbytes, plan.granule)
        base = self._base
        known = {} if base is None else {region.number: region for region in base.regions}
        fresh = frozenset(number for number in job.numbers if job.full or number not in known)

        def encode(part: tuple[cutting.Cut, memoryview, memoryview, int | None]) -> Framed | None:
            return self._encode(job, fresh, *part)

        waved = job.cuts is not None
        parts.saved_nbytes = job.nbytes
        for batch in self._batches(job):
            if job.cuts is None:
                job.cuts = cutting.cut(job.saved._set, job.extents, self.frame_nbytes)
            few = (len(job.cuts) if batch.last is None else batch.last) - batch.first < 3
            frames = (map if few else crew.map)(encode, self._frames(job.cuts, batch))
            for index, encoded in enumerate(frames, batch.first):
                if encoded is not None:
                    parts.add(job.plans[encoded.cut.memory].entry.number, job.cuts.spans(encoded.cut), encoded, index)
                del encoded  # the batch's room is not ours while the next is waited for
        if job.holes is not None:
            cuts = cutting.cut(job.holes._set, job.extents, _HOLES_NBYTES)
            for which in map(cuts.__getitem__, range(len(cuts))):
                parts.add(
                    job.plans[which.memory].entry.number,
                    cuts.spans(which),
                    Framed(which, FrameKind.ZEROS, b"", Codec.NONE, False, which.nbytes, 0),
                )
        written = time.perf_counter()
        entries = parts.finish()
        generation = job.save.generation or 0
        before = tuple(entry for each in left for entry in each.entries)
        since = min((entry.generation for entry in before), default=generation)
        regions = [known.get(plan.entry.number) or replace(plan.entry, since=since) for plan in job.plans]
        manifest = Manifest(
            store_id=self._store.store_id,
            generation=generation,
            revision=0,
            parent=None if base is None else base.generation,
            created=job.created,
            kind="full" if job.full else "increment",
            page_bytes=core.PAGE_BYTES,
            meta=job.save.meta,
            regions=tuple(regions),
            segments=before + entries if job.full or base is None else base.segments + before + entries,
        )
        parts.published = True
        self._writer.publish(manifest)
        end = time.perf_counter()
        self._costs.learn(
            full=job.full,
            nbytes=job.nbytes,
            seconds=end - began + (0.0 if waved else job.pack_seconds),
            fixed_seconds=end - written,
        )
        return manifest

    def _frames(
        self, cuts: cutting.Cuts, batch: Batch
    ) -> Iterator[tuple[cutting.Cut, memoryview, memoryview, int | None]]:
        """The frames of a batch: what they are, their runs, their bytes, and their checksum where it is known."""
        lent, at = self.staging.lend(batch.room), 0
        for index in range(batch.first, len(cuts) if batch.last is None else batch.last):
            which = cuts[index]
            known = None if batch.sums is None else batch.sums[index - batch.first]
            yield which, cuts.spans(which), lent[at : at + which.nbytes], known
            at += which.nbytes

    def _encode(
        self,
        job: Job,
        fresh: frozenset[int],
        which: cutting.Cut,
        runs: memoryview,
        plain: memoryview,
        known_sum: int | None,
    ) -> Framed | None:
        """A frame as it is to be stored; None where nothing changed."""
        number, kind, data = job.plans[which.memory].entry.number, FrameKind.PAGES, plain
        if self._mirrors is not None:
            job.touched.append((number, runs))
            delta = self._mirrors.shrink(number, runs, plain, whole=number in fresh)
            if delta == b"":
                return None
            if delta is not None:
                kind, data = FrameKind.DELTA, memoryview(delta)
        if kind == FrameKind.PAGES and all_zero(data):
            return Framed(which, FrameKind.ZEROS, b"", Codec.NONE, False, which.nbytes, 0)
        stored, codec, encrypted = self._encoder.encode(data)
        checksum = xxh64(stored) if known_sum is None else known_sum
        return Framed(which, kind, stored, codec, encrypted, data.nbytes, checksum)


def _abandon(left: tuple[Left, ...]) -> None:
    for each in left:
        for segment in each.segments:
            segment.abandon()


# ---- threads that begin and end

_savers: weakref.WeakSet[Saver] = weakref.WeakSet()


def _begin(thread: threading.Thread) -> None:
    try:
        thread.start()
    except RuntimeError:  # no more threads are to be had; but we are one
        thread.run()


def _finish_all() -> None:
    """The interpreter ends: what is under way is not lost."""
    for saver in tuple(_savers):
        saver.abort_abandoned()
        saver.wait()


atexit.register(_finish_all)
os.register_at_fork(after_in_child=_savers.clear)  # their threads are the parent's, and end nothing in a child

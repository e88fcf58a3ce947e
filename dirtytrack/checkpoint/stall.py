# SPDX-License-Identifier: MIT
"""What happens while the program stands still: dirty bytes are copied into the staging buffer."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ..kernel import cutting, sets
from .jobs import Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ..dirtyset import DirtySet
    from .jobs import Job
    from .saving import Saver
    from .staging import Room
    from .watching import Watched

__all__ = ["Stall"]

_WAVE_NBYTES = 8 << 20  # staged at once where not all fits: the writer begins with it while more is copied


class Stall:
    """What is taken while a save copies, and given back where that does not come to its end."""

    def __init__(self, saver: Saver, watched: Watched) -> None:
        self._saver, self._extents, self._pieces = saver, watched.extents, watched.pieces
        self._holds = watched.holds
        self.dirty: DirtySet | None = None
        self.job: Job | None = None
        self._room: Room | None = None
        self._submitted = False

    def copy(self, job: Job) -> None:
        """Copy what is to be saved into the staging buffer: at once where it fits, else in waves."""
        staging, cset = self._saver.staging, job.saved._set
        began = time.perf_counter()
        job.nbytes = sets.nbytes(cset, self._extents)
        if not job.nbytes:
            return
        self._room = staging.take(job.nbytes, job.nbytes)
        if self._room is None:
            self._copy_in_waves(job)
        else:
            sets.gather(cset, self._extents, staging.pointer(self._room), job.nbytes)
            job.batches.append(Batch(self._room, 0, None))
            job.pack_seconds = time.perf_counter() - began

    def submit(self, job: Job) -> None:
        """All is copied."""
        if self._submitted:
            self._saver.seal(job)
        else:
            job.sealed = self._submitted = True  # before it is: see `undo`
            self._saver.submit(job)
        self._holds = []

    def _copy_in_waves(self, job: Job) -> None:
        saver, staging, cset = self._saver, self._saver.staging, job.saved._set
        cuts = job.cuts = cutting.cut(cset, self._extents, saver.frame_nbytes)
        wave_nbytes = max(saver.frame_nbytes, min(_WAVE_NBYTES, staging.nbytes // 4))
        self._submitted = True
        saver.submit(job)
        at = 0
        while at < len(cuts):
            self._room = room = staging.take(cuts[at].nbytes, wave_nbytes, lambda: job.failed)
            if room is None:
                return  # it failed
            end, nbytes = at, 0
            while end < len(cuts) and nbytes + cuts[end].nbytes <= room.nbytes:
                nbytes += cuts[end].nbytes
                end += 1
            staging.shorten(room, nbytes)
            sums: Sequence[int] | None = None
            if saver.stores_plain:  # the store is waited for in any case: what can be done here, need not be behind
                frames = sets.extents([piece for at in range(at, end) for piece in self._between(cuts, at, at + 1)])
                sums = sets.gather_summed(cset, frames, staging.pointer(room), nbytes)
            else:
                wave = sets.extents(list(self._between(cuts, at, end)))
                sets.gather(cset, wave, staging.pointer(room), nbytes)
            if not saver.push(job, Batch(room, at, end, sums)):
                return
            at = end

    def _between(self, cuts: cutting.Cuts, first: int, last: int) -> Iterator[sets.Extent]:
        """The stretches of memory that these cuts reach over, one for each memory."""
        memory, begin, end = -1, 0, 0
        for index in range(first, last):
            which = cuts[index]
            low, high = cuts.bounds(which)
            if which.memory != memory:
                if memory >= 0:
                    yield self._stretch(memory, begin, end)
                memory, begin = which.memory, low
            end = high
        yield self._stretch(memory, begin, end)

    def _stretch(self, memory: int, begin: int, end: int) -> sets.Extent:
        piece = self._pieces[memory]
        return piece._replace(address=piece.address + begin, nbytes=end - begin)

    def undo(self, error: BaseException, put_back: Callable[[DirtySet], object]) -> None:
        """All pages go back, and all room."""
        saver, job = self._saver, self.job
        self._holds = []
        known = job is not None and self._submitted and saver.abort(job, error)
        if known:
            saver.wait(only_aborted=True)  # it gives its pages back itself
        if self._room is not None:
            saver.staging.give_back(self._room)
        if not known and self.dirty is not None:
            try:
                put_back(self.dirty)
            except Exception:
                saver.forget_base()

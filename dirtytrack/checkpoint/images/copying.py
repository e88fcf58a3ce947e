# SPDX-License-Identifier: MIT
"""Pages of another process, copied into the staging buffer and from there into frames."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, NamedTuple

from ...errors import PermissionDenied, TargetGone
from ...kernel import core, cutting, sets, targets
from ...kernel.packing import PageDigests
from .frames import Plain
from .space import joined, pages_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ...dirtyset import DirtySet
    from ...kernel.core import CData
    from ..staging import Staging
    from .frames import Frames
    from .space import Ranges, Space

__all__ = ["Compared", "Copying"]

_TOP = 1 << 63
_LOOK_EACH = 64
"""After so many pages that cannot be read, whether the process is still there is asked."""


class _Zeros(NamedTuple):
    """Pages that are zero."""

    space: Space
    pages: DirtySet


class _Wave(NamedTuple):
    """Frames whose bytes are staged, one behind the other."""

    space: Space
    cuts: cutting.Cuts
    first: int
    last: int
    offset: int
    compared: bool


class Compared:
    """Hashes of pages that nobody tracks: which of them are what they were when they were saved last.

    Args:
        before: what is known from the save before.
    """

    def __init__(self, digests: PageDigests, before: dict[int, bytes]) -> None:
        self._digests, self._before = digests, before
        self.now: dict[int, bytes] = {}
        """By the address of each page that was looked at: its hash."""

    def pages(self) -> DirtySet:
        """Those that had content before."""
        page = core.PAGE_BYTES
        return pages_of(joined((at, at + page) for at in self._before))

    def changed(self, start: int, runs: memoryview, data: memoryview) -> tuple[bytes, memoryview | bytes]:
        """The runs, as a segment has them, and the bytes of what is not as it was.

        Args:
            start: the address that the runs' offsets count from.
            runs: pairs of offset and length.
            data: their bytes.
        """
        page, size = core.PAGE_BYTES, PageDigests.NBYTES
        hashes = self._digests.of(data)
        kept: Ranges = []
        parts: list[memoryview] = []
        at = 0
        for offset, nbytes in zip(*[iter(runs.cast("Q"))] * 2, strict=True):
            for low in range(offset, offset + nbytes, page):
                found = hashes[at * size : (at + 1) * size]
                self.now[start + low] = found
                if self._before.get(start + low) != found:
                    if kept and kept[-1][1] == low:
                        kept[-1] = kept[-1][0], low + page
                    else:
                        kept.append((low, low + page))
                    parts.append(data[at * page : (at + 1) * page])
                at += 1
        if len(parts) == at:
            return bytes(runs), data
        packed = b"".join(number.to_bytes(8, "little") for low, high in kept for number in (low, high - low))
        return packed, b"".join(parts)


class Copying:
    """Copies pages into the staging buffer. Where it is full, what it has is written first, however long that takes.

    What is copied again counts as it was then: `end_step` comes between.

    Args:
        pid: the process.
        memory: its /proc/PID/mem.
        staging: nobody else has any of it.
        frame_nbytes: the most of a frame.
        frames: where to.
        compared: what is known of pages that nobody tracks.
        require_there: raises `TargetGone` where the process has ended or replaced itself.

    Thread safety: one thread at a time.
    """

    def __init__(
        self,
        pid: int,
        memory: int,
        staging: Staging,
        frame_nbytes: int,
        frames: Frames,
        compared: Compared,
        require_there: Callable[[], object],
    ) -> None:
        self._pid, self._memory, self._staging, self._frame_nbytes = pid, memory, staging, frame_nbytes
        self._frames, self._compared, self._require_there = frames, compared, require_there
        self._staged: list[_Wave | _Zeros | None] = []  # None: a step ends
        self.used = 0
        """Bytes that are staged."""
        self._lost: list[tuple[int, int]] = []

    @property
    def room(self) -> int:
        """How many bytes fit before anything must be written."""
        return self._staging.nbytes - self.used

    def take_unreadable(self) -> Ranges:
        """The pages that could not be read since this was last asked; their bytes are zeros."""
        lost, self._lost = self._lost, []
        return joined(lost)

    def copy(self, pages: DirtySet, space: Space, *, compared: bool = False) -> int:
        """Copy pages, all of them within the space.

        Args:
            pages: which.
            space: what is which region.
            compared: store only what is not as it was: see `Compared`.

        Returns:
            How many bytes.

        Raises:
            TargetGone, PermissionDenied.
        """
        cuts = cutting.cut(pages._set, space.extents(), self._frame_nbytes)
        first = 0
        while first < len(cuts):
            last, nbytes, room = first, 0, self.room
            while last < len(cuts) and nbytes + cuts[last].nbytes <= room:
                nbytes += cuts[last].nbytes
                last += 1
            if last == first:
                self.flush()
                continue
            low = space.start(cuts[first].memory) + cuts.bounds(cuts[first])[0]
            high = space.start(cuts[last - 1].memory) + cuts.bounds(cuts[last - 1])[1]
            self._read(sets.clip(pages._set, low, high), nbytes)
            self._staged.append(_Wave(space, cuts, first, last, self.used, compared))
            self.used += nbytes
            first = last
        return cuts.nbytes

    def add_zeros(self, pages: DirtySet, space: Space) -> None:
        """Say that these pages, all of them within the space, are zero."""
        if pages:
            self._staged.append(_Zeros(space, pages))

    def end_step(self) -> None:
        """What comes now may be told again."""
        self._staged.append(None)

    def flush(self) -> None:
        """Write all that is staged; the staging buffer is empty then."""
        for each in self._staged:
            if each is None:
                self._frames.end_step()
            elif isinstance(each, _Zeros):
                self._frames.add_zeros(each.pages, each.space)
            else:
                self._frames.add(self._plains(each))
        self._staged.clear()
        self.used = 0

    def _plains(self, wave: _Wave) -> Iterator[Plain]:
        at = wave.offset
        for index in range(wave.first, wave.last):
            which = wave.cuts[index]
            runs, data = wave.cuts.spans(which), self._staging.view[at : at + which.nbytes]
            at += which.nbytes
            number = wave.space.number(which.memory)
            if not wave.compared:
                yield Plain(number, runs, data)
                continue
            changed, packed = self._compared.changed(wave.space.start(which.memory), runs, data)
            if changed:
                yield Plain(number, changed, packed)

    # ---- reading

    def _read(self, rest: CData, nbytes: int) -> None:
        """The pages of a set, behind what is staged."""
        done, failed = 0, 0
        while done < nbytes:
            got, error, address = self._read_until(-1, rest, done, nbytes)
            done += got
            if not error:
                return
            # Memory without the right to be read has bytes all the same, and this way leads to them.
            run_end = int(sets.clip(rest, address, _TOP).runs[0].end)
            got, error, stuck = self._read_until(self._memory, sets.clip(rest, address, run_end), done, nbytes)
            done += got
            following = run_end
            if error:
                failed += 1
                if failed % _LOOK_EACH == 1:
                    self._require_there()
                view, page = self._staging.view, core.PAGE_BYTES
                view[self.used + done : self.used + done + page] = bytes(page)
                self._lost.append((stuck, stuck + page))
                done += page
                following = stuck + page
            rest = sets.clip(rest, following, _TOP)

    def _read_until(self, memory: int, pages: CData, done: int, nbytes: int) -> tuple[int, int, int]:
        where = self._staging.at(self.used + done)
        got, error, address = targets.read_until(self._pid, memory, pages, where, nbytes - done)
        if error == errno.ESRCH:
            self._require_there()
            raise TargetGone(f"process {self._pid} ended while it was read", errno=error, pid=self._pid)
        if error in (errno.EPERM, errno.EACCES):
            raise PermissionDenied(
                f"process {self._pid} may no longer be read ({os.strerror(error)}): it has changed its user, or is not "
                "dumpable any more. Run as root, or with CAP_SYS_PTRACE",
                errno=error,
                feature="ptrace",
                pid=self._pid,
            )
        return got, error, address

# SPDX-License-Identifier: MIT
"""One save of a process, from the first look at its pages to its manifest."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from .describing import Program, described
from .mapped import Kind, Plan, pieces_of
from .space import joined, pages_of, subtracted

if TYPE_CHECKING:
    from ...dirtyset import DirtySet
    from ...kernel.targets import Row
    from .copying import Compared, Copying
    from .mapped import Piece
    from .space import Ranges, Space
    from .watched import Watched

__all__ = ["Attempt"]

_MOST_ROUNDS = 8
_SHRINKS = 0.8
"""A round that leaves more than so much of what the one before it copied was the last: the program writes as fast as it
is copied."""


class Attempt:
    """A save under way.

    Args:
        watched: the process.
        space: what was saved where.
        owed: pages that are to be saved whatever the tracker says.
        copying, compared: of this save alone.
        generation: its number.
        precopy_nbytes: more than that is copied while the process runs, before it is frozen.
        timeout: in which it must stand still.
    """

    def __init__(
        self,
        watched: Watched,
        space: Space,
        owed: DirtySet,
        copying: Copying,
        compared: Compared,
        generation: int,
        *,
        precopy_nbytes: int,
        timeout: float,
    ) -> None:
        self._watched, self._copying, self._compared = watched, copying, compared
        self._generation, self._precopy_nbytes, self._timeout = generation, precopy_nbytes, timeout
        self.space = space
        self.collected = owed
        """All that was ever dirty in it: what a failure gives back."""
        self.epoch = watched.epoch
        """Of the tracker, as of what was collected."""
        self.unreadable: Ranges = []
        """What is to be tried again next time."""
        self.bytes_precopied = self.bytes_frozen = self.rounds = 0
        self.frozen_seconds = 0.0
        self.described: dict[str, Any] = {}
        self._seen: dict[Row, Piece] = {}
        self._rows: list[Row] | None = None
        self._known_plan = Plan([])

    def _collect(self) -> DirtySet:
        dirty = self._watched.collect()
        self.collected = self.collected | dirty
        self.epoch = self._watched.epoch
        return dirty

    # ---- while it runs

    def precopy(self) -> DirtySet:
        """Copy what is dirty, again and again, while that makes it less.

        Returns:
            What is still to be copied.
        """
        self._look()
        pending, last = self.collected | self._collect(), 0
        while self.rounds < _MOST_ROUNDS:
            plan = self._plan()
            tracked = plan.trackable & self._watched.tracked()
            space, fresh, _ = self.space.moved_to(tracked | self.space.live, self._generation)
            wanted = (pending | fresh) & tracked
            there = self._with_content(wanted, plan)
            nbytes = there.page_span_bytes
            if 2 * nbytes > self._copying.room and self._copying.used:  # as much again comes when it stands still
                self._copying.flush()
                pending, last = pending | self._collect(), 0  # that took a while
                continue
            if nbytes <= self._precopy_nbytes or nbytes > _SHRINKS * last > 0:
                break
            self.space, last = space, nbytes
            self.rounds += 1
            self.bytes_precopied += self._copying.copy(there, space)
            self._copying.add_zeros(wanted - there, space)
            self._copying.end_step()
            missed = pages_of(self._copying.take_unreadable())
            pending = (pending - wanted) | missed | self._collect()
        else:
            self._copying.flush()
        return pending

    # ---- while it stands still

    def freeze(self, pending: DirtySet) -> None:
        """Have it stand still, and copy what is left; then let it go on, and write that.

        Raises:
            TargetBusy, TargetGone, PermissionDenied.
        """
        watched, program, known = self._watched, Program.of(self._watched.pid), self._compared.pages()
        if self.rounds:
            self._look()
        self._plan()  # mostly it is the same a moment later
        watched.tracked()
        with watched.tracker.frozen(timeout=self._timeout, registers=True) as frozen:
            frozen_at = time.time()
            dirty = pending | self._collect()
            plan = self._plan()
            tracked = plan.trackable & watched.tracked()
            contents = watched.populated.all_of(plan.looked_at)
            saved = plan.always | pages_of(joined(each.row[:2] for each in plan.looked_at if contents[each.row.start]))
            self.space, fresh, lost = self.space.moved_to(saved, self._generation)
            wanted = (dirty | fresh | (known & tracked)) & saved
            exact = self._with_content(wanted & tracked, plan, contents)
            others = self._others(plan, contents, tracked)
            self.bytes_frozen = self._copying.copy(exact, self.space)
            self.bytes_frozen += self._copying.copy(others, self.space, compared=True)
        self.frozen_seconds = frozen.seconds
        vanished = (known - tracked) & saved
        self._copying.add_zeros((wanted | lost | vanished) - exact - others, self.space)
        self._copying.flush()
        self.unreadable = self._copying.take_unreadable()
        shown = [(piece, self._shown(piece, contents)) for piece in plan.pieces]
        self.described = described(program, frozen_at, frozen.threads, shown, self.space)

    # ---- which pages

    def _look(self) -> None:
        self._watched.marks.look()
        self._seen.clear()
        self._rows = None

    def _plan(self) -> Plan:
        """What becomes of the mappings as they are now; the one that is known, where they are as they were."""
        rows = self._watched.rows()
        if rows is self._rows:
            return self._known_plan
        if not self._watched.marks.knows(rows):
            self._look()
        new = [row for row in rows if row not in self._seen]
        self._seen.update(zip(new, pieces_of(new, self._watched.marks, self._watched.chosen), strict=True))
        self._rows, self._known_plan = rows, Plan([self._seen[row] for row in rows])
        return self._known_plan

    def _with_content(self, pages: DirtySet, plan: Plan, contents: dict[int, Ranges] | None = None) -> DirtySet:
        """Those that are not known to be zeros, or a file's."""
        found = self._watched.populated.parted(pages - plan.in_files, plan.pieces)
        if within := pages & plan.in_files:
            known = self._watched.populated.all_of(plan.files) if contents is None else contents
            found = found | (within & pages_of(joined(run for p in plan.files for run in known[p.row.start])))
        return found

    def _others(self, plan: Plan, contents: dict[int, Ranges], tracked: DirtySet) -> DirtySet:
        """The pages with content that nobody tracks."""
        found = [run for runs in contents.values() for run in runs]
        for start, end in plan.always - tracked:
            found += self._watched.populated.anonymous(int(start), int(end))
        return pages_of(joined(found)) - tracked

    def _shown(self, piece: Piece, contents: dict[int, Ranges]) -> Ranges:
        """The parts of a mapping that a reader finds in the image."""
        row = piece.row
        if piece.why is not None:
            return []
        there = [(row.start, row.end)]
        if piece.kind in (Kind.FILE, Kind.SHARED_FILE) or not contents.get(row.start, True):
            there = contents.get(row.start, [])
        return subtracted(there, self.unreadable) if self.unreadable else there

# SPDX-License-Identifier: MIT
"""A tracker that asks a second witness about each of its sets: KVM's own dirty log.

The guest runs on while both are asked, so the log is read before and behind each collect. What it has before, the guest
wrote in the very epoch that this collect closes: it must be in the set, page for page. What it has behind may be of
this epoch or of the next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import dirtytrack

if TYPE_CHECKING:
    from .kvm import Machine


_ALL = -1  # a start: from here on both count


class Disagreement(Exception):
    """KVM saw pages written that were not reported to us, or the other way round."""


class Round(NamedTuple):
    """Page numbers as bits: of one collect, and of KVM's log before and behind it."""

    before: int
    ours: int
    behind: int


class WitnessedTracker(dirtytrack.DirtyTracker):
    """A DirtyTracker of a machine's memory, which is its session's only region."""

    def __init__(self, session: dirtytrack.UffdSession, machine: Machine) -> None:
        super().__init__(session, exact=True)
        self._log = machine.dirty_log
        self.rounds: list[Round] = []

    def start(self) -> None:
        before = self._log()
        super().start()
        self.rounds.append(Round(before, _ALL, self._log()))

    def collect(self, *arguments: Any, **options: Any) -> dirtytrack.DirtySet:
        before = self._log()
        dirty = super().collect(*arguments, **options)
        (region,) = self.regions
        ours = int.from_bytes(dirty.bitmap(region), "little")
        self.rounds.append(Round(before, ours, self._log()))
        return dirty

    def check(self) -> tuple[int, int]:
        """Hold all collects so far against the log.

        Returns:
            How many collects there were, and how many pages KVM had logged for them.

        Raises:
            Disagreement: with the pages.
        """
        collects = logged = 0
        last = Round(0, 0, 0)
        for this, next_ in zip(self.rounds, [*self.rounds[1:], Round(self._log(), 0, 0)], strict=True):
            if this.ours == _ALL:
                last = this
                continue
            collects += 1
            missed = this.before & ~this.ours
            if missed:
                raise Disagreement(f"collect {collects} misses page {_first(missed)} and {missed.bit_count() - 1} more")
            # A store that is under way is known to us already, and to KVM as soon as it is done.
            extra = this.ours & ~(last.behind | this.before | this.behind | next_.before)
            if extra:
                raise Disagreement(
                    f"KVM saw no write to page {_first(extra)} and {extra.bit_count() - 1} more of collect {collects}"
                )
            logged += this.before.bit_count()
            last = this
        return collects, logged


def _first(pages: int) -> int:
    return (pages & -pages).bit_length() - 1

# SPDX-License-Identifier: MIT
"""The hand-over's states on both sides, which never both run: see docs/migration-protocol.md."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .journal import Journal

    Side = Literal["source", "destination"]

__all__ = ["DestinationHandOver", "DestinationState", "Impossible", "SourceHandOver", "SourceState"]


class SourceState(str, Enum):
    """Where the source stands."""

    RUNNING = "running"
    STOPPED = "stopped"
    COMMITTING = "committing"
    MOVED = "moved"


class DestinationState(str, Enum):
    """Where the destination stands with one attempt."""

    RECEIVING = "receiving"
    PREPARED = "prepared"
    COMMITTED = "committed"
    ABORTED = "aborted"


class Impossible(Exception):
    """A step that this state does not allow. It never leaves the package: who takes steps looks first."""


class _HandOver:
    """What both sides have in common: each step is in the journal before it is taken."""

    def __init__(self, role: str, migration: bytes, journal: Journal | None) -> None:
        self.role, self.migration, self.journal = role, migration, journal
        self.attempt = 0

    def begin_journal(self, **about: Any) -> None:
        """Who we are, for `dirtytrack migrate --resolve`, and for a destination that is started again."""
        if self.journal is not None:
            self.journal.add(role=self.role, id=self.migration.hex(), attempt=self.attempt, **about)

    def _note(self, state: Enum) -> None:
        if self.journal is not None:
            self.journal.add(state=state.value, id=self.migration.hex(), attempt=self.attempt)

    def verdict(self) -> str | None:
        """What the journal says about this attempt."""
        return None if self.journal is None else self.journal.verdict(self.migration.hex(), self.attempt)


class SourceHandOver(_HandOver):
    """The source's side: it decides."""

    def __init__(self, migration: bytes, journal: Journal | None = None) -> None:
        super().__init__("source", migration, journal)
        self.state = SourceState.RUNNING

    @property
    def may_run(self) -> bool:
        """Whether the source may run."""
        return self.state is SourceState.RUNNING

    def _step(self, to: SourceState, *allowed: SourceState, durable: bool = True) -> None:
        if self.state not in allowed:
            raise Impossible(f"the source is {self.state.value} and cannot become {to.value}")
        if durable:
            self._note(to)
        self.state = to

    def begin(self, attempt: int) -> None:
        """The next attempt."""
        if self.state is not SourceState.RUNNING:
            raise Impossible(f"the source is {self.state.value}")
        self.attempt = attempt

    def stop(self) -> None:
        """The source is about to be paused."""
        self._step(SourceState.STOPPED, SourceState.RUNNING, durable=False)

    def decide(self) -> None:
        """READY came. COMMIT may be sent once this has returned; if it raises, nothing has been decided."""
        self._step(SourceState.COMMITTING, SourceState.STOPPED)

    def committed(self) -> None:
        """The destination runs, or an arbiter says that it does."""
        self._step(SourceState.MOVED, SourceState.COMMITTING)

    def back(self) -> None:
        """The attempt failed before the decision."""
        self._step(SourceState.RUNNING, SourceState.STOPPED, SourceState.RUNNING, durable=False)

    def aborted(self) -> None:
        """The destination will never run this attempt: it said so itself, or an arbiter did."""
        self._step(SourceState.RUNNING, SourceState.COMMITTING)


class DestinationHandOver(_HandOver):
    """The destination's side: it promises, and is bound by that."""

    def __init__(self, migration: bytes, journal: Journal | None = None) -> None:
        super().__init__("destination", migration, journal)
        self.state = DestinationState.RECEIVING

    @property
    def may_run(self) -> bool:
        """Whether the destination may run."""
        return self.state is DestinationState.COMMITTED

    def _step(self, to: DestinationState, *allowed: DestinationState) -> None:
        if self.state not in allowed:
            raise Impossible(f"the destination is {self.state.value} and cannot become {to.value}")
        if self.state is not to:
            self._note(to)
        self.state = to

    def begin(self, attempt: int) -> None:
        """The source comes with its next attempt, so it did not decide for the last one."""
        if self.state is DestinationState.COMMITTED or attempt <= self.attempt:
            raise Impossible(f"the destination is {self.state.value} in attempt {self.attempt}")
        if self.state is DestinationState.PREPARED:
            self._note(DestinationState.ABORTED)
        self.attempt = attempt
        self.state = DestinationState.RECEIVING

    def prepared(self) -> None:
        """All is there. READY may be sent once this has returned."""
        self._step(DestinationState.PREPARED, DestinationState.RECEIVING)

    def commit(self, attempt: int) -> None:
        """COMMIT came. Once this has returned the destination may run, and COMMITTED be sent."""
        if attempt != self.attempt:
            raise Impossible(f"the decision is about attempt {attempt}, this is {self.attempt}")
        self._step(DestinationState.COMMITTED, DestinationState.PREPARED, DestinationState.COMMITTED)

    def abort(self) -> None:
        """The source or an arbiter said that this attempt will not be."""
        self._step(
            DestinationState.ABORTED, DestinationState.RECEIVING, DestinationState.PREPARED, DestinationState.ABORTED
        )

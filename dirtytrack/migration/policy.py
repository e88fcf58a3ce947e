# SPDX-License-Identifier: MIT
"""When to stop: what the user wants, what the rounds were like, and what to do next. No clock and no I/O."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..errors import InvalidMemory

__all__ = ["Decision", "Goal", "Policy", "RoundReport"]

_CLEARLY = 0.95  # what remains has improved if it is less than this share of the best so far
_NEAR = 1.1  # of the best: as good a moment as any
_PATIENCE = 2  # rounds without improvement until a moment near the best will do
_LAST_PATIENCE = 6  # until any moment will do
_RECENT = 3  # rounds by which speed is judged
_BULK_TELLS = 0.005  # seconds for what remains, so few that how fast it moves matters little
_SLOWER = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class Goal:
    """What the user wants of a migration.

    Args:
        max_downtime: how long neither side may run, in seconds.
        max_time: how long all of it may take, in seconds; None: as long as it helps.
        max_bytes: how much may be sent; None: as much as helps.
        on_divergence: what to do when the goal cannot be met, because memory is written faster than it is sent:
            ``"proceed"``, with the predicted downtime, at a moment when little remains; ``"slow"`` the source by its
            callback, step by step, and abort if even that does not do; ``"abort"``.

    Raises:
        InvalidMemory: a time or an amount that is none.
    """

    max_downtime: float = 0.3
    max_time: float | None = None
    max_bytes: int | None = None
    on_divergence: Literal["proceed", "slow", "abort"] = "proceed"

    def __post_init__(self) -> None:
        times = (("max_downtime", self.max_downtime), ("max_time", self.max_time), ("max_bytes", self.max_bytes))
        for name, value in times:
            if value is not None and not value > 0:
                raise InvalidMemory(f"{name} is more than 0, not {value}")
        if self.on_divergence not in ("proceed", "slow", "abort"):
            raise InvalidMemory(f"on_divergence is 'proceed', 'slow' or 'abort', not {self.on_divergence!r}")


class RoundReport(NamedTuple):
    """What one round was like, and what remains after it.

    Attributes:
        moved_bytes: of memory, that this round looked at: of all of it in round 0, of what was dirty in the others.
        sent_bytes: over the wire.
        seconds: from the collect until all of it had arrived.
        remaining_bytes: of memory, dirty now.
        elapsed_seconds, total_bytes: of the whole migration so far.
        overhead_seconds: what stopping costs beside sending what remains: round trips, state, digests.
        can_slow: whether the source can be slowed.
        changed_bytes: of what was looked at, what the destination had not as it was, so that it was sent; None: all.
        remaining_changed_bytes: the same of what remains; None: all.
    """

    round: int
    moved_bytes: int
    sent_bytes: int
    seconds: float
    remaining_bytes: int
    elapsed_seconds: float
    total_bytes: int
    overhead_seconds: float = 0.0
    can_slow: bool = False
    changed_bytes: int | None = None
    remaining_changed_bytes: int | None = None

    @property
    def changed(self) -> int:
        """What was sent, of memory."""
        return self.moved_bytes if self.changed_bytes is None else self.changed_bytes

    @property
    def remaining_changed(self) -> int:
        """What is to be sent, of memory."""
        return self.remaining_bytes if self.remaining_changed_bytes is None else self.remaining_changed_bytes


class Decision(NamedTuple):
    """What to do next, and why."""

    action: Literal["round", "stop", "slow", "abort"]
    reason: str
    """In words."""
    predicted_downtime: float
    """In seconds, were the source stopped now."""
    step: float = 0.0
    """How far to slow the source, from 0 to 1, where the action is ``slow``."""


class Policy:
    """Decides after each round. The same reports always give the same decisions.

    Args:
        goal: what the user wants.
    """

    def __init__(self, goal: Goal) -> None:
        self.goal = goal
        self._rounds: list[RoundReport] = []
        self._best = math.inf  # the least that remained since the source was last slowed
        self._stalled = 0  # rounds since that improved
        self._steps = 0

    def predict(self, report: RoundReport) -> float:
        """The downtime in seconds, were the source stopped after this round."""
        return report.overhead_seconds + self._seconds_for(report.remaining_changed, [*self._rounds, report])

    def decide(self, report: RoundReport) -> Decision:
        """What to do after this round."""
        predicted = self.predict(report)
        self._rounds.append(report)
        goal = self.goal
        met = predicted <= goal.max_downtime
        if met and (not self._only_bulk(report, predicted) or self._spent(report, predicted)):
            return Decision("stop", f"predicted {_s(predicted)} of at most {_s(goal.max_downtime)}", predicted)
        if report.remaining_bytes < self._best * _CLEARLY:
            self._best, self._stalled = report.remaining_bytes, 0
        else:
            self._stalled += 1
        spent = self._spent(report, predicted)
        if spent:
            return self._give_up(spent, predicted)
        if report.overhead_seconds > goal.max_downtime and predicted < 2 * report.overhead_seconds:
            alone = f"to stop takes {_s(report.overhead_seconds)} by itself"
            return self._give_up(alone, predicted)
        near = report.remaining_bytes <= self._best * _NEAR
        if (self._stalled >= _PATIENCE and near) or self._stalled >= _LAST_PATIENCE:
            return self._diverges(report, predicted)
        return Decision("round", f"{_b(report.remaining_bytes)} remain, {_s(predicted)} to send", predicted)

    # ---- how fast

    @staticmethod
    def _only_bulk(report: RoundReport, predicted: float) -> bool:
        """Whether more remains than the bulk tells about: what is written again moves faster than what the destination
        had to populate. A round tells, and the source runs meanwhile."""
        return not report.round and predicted - report.overhead_seconds > _BULK_TELLS

    @staticmethod
    def _seconds_for(nbytes: int, rounds: list[RoundReport]) -> float:
        """By the last rounds; by the bulk, which may be mostly zeroes, only while there is no other."""
        if not nbytes:
            return 0.0
        recent = [each for each in rounds if each.round and each.changed][-_RECENT:]
        recent = recent or [each for each in rounds if each.changed]
        moved = sum(each.changed for each in recent)
        return nbytes * sum(each.seconds for each in recent) / moved if moved else math.inf

    # ---- when enough is enough

    def _spent(self, report: RoundReport, predicted: float) -> str:
        """Which budget another round would exceed, in words."""
        goal, wire = self.goal, self._on_the_wire(report)
        if goal.max_time is not None:
            # A round takes as long as sending what remains now, and a stop comes behind it.
            needed = report.elapsed_seconds + predicted + goal.max_downtime
            if needed > goal.max_time:
                return f"another round would take it to {_s(needed)} of at most {_s(goal.max_time)}"
        if goal.max_bytes is not None and report.total_bytes + wire > goal.max_bytes:
            needed_bytes = int(report.total_bytes + wire)
            return f"what remains would take it to {_b(needed_bytes)} sent of at most {_b(goal.max_bytes)}"
        return ""

    @staticmethod
    def _on_the_wire(report: RoundReport) -> float:
        ratio = report.sent_bytes / report.changed if report.changed else 1.0
        return report.remaining_changed * ratio

    def _diverges(self, report: RoundReport, predicted: float) -> Decision:
        why = f"another round would not help: after {report.round + 1} rounds {_b(report.remaining_bytes)} remain"
        if self.goal.on_divergence != "slow":
            return self._give_up(why, predicted)
        if not report.can_slow:
            return self._give_up(f"{why}, and nobody gave a function that slows the source", predicted)
        if self._steps == len(_SLOWER):
            return self._give_up(f"{why}, though the source is slowed by {_SLOWER[-1]:.0%}", predicted)
        step = _SLOWER[self._steps]
        self._steps += 1
        self._best, self._stalled = math.inf, 0
        return Decision("slow", f"{why}: the source is slowed by {step:.0%}", predicted, step)

    def _give_up(self, why: str, predicted: float) -> Decision:
        goal = self.goal
        by = f"predicted {_s(predicted)} instead of {_s(goal.max_downtime)}, {predicted / goal.max_downtime:.1f} times"
        if goal.on_divergence == "proceed":
            return Decision("stop", f"{why}; goes ahead: {by}", predicted)
        return Decision("abort", f"{why}; {by}", predicted)


def _s(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _b(nbytes: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} GiB"

# SPDX-License-Identifier: MIT
"""What is told while memory moves, and after: progress, results, doubts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from .policy import RoundReport

    Arbiter = Callable[["Doubt"], Literal["source", "destination"] | None]
    Teller = Callable[["Progress"], object]

__all__ = ["Arrival", "Doubt", "Migrated", "Progress"]


class Progress(NamedTuple):
    """What is told while memory moves.

    Attributes:
        phase: ``connecting``, ``bulk``, ``rounds``, ``stopping``, ``in doubt``, ``moved``, ``failed``; of a destination
            ``waiting``, ``receiving``, ``prepared``, ``in doubt``, ``committed``, ``failed``.
        round: 0 is the bulk.
        remaining_bytes: of memory, to be sent in this round, or dirty at its end.
        dirty_bytes_per_second: how fast memory was written in the last round.
        bytes_per_second: how fast it moves.
        predicted_downtime: in seconds, were the source stopped now; None where nobody knows yet.
        total_bytes: over the wire so far.
        seconds: since it began.
        reason: the policy's last word, or why it failed.
    """

    phase: str
    round: int = 0
    remaining_bytes: int = 0
    dirty_bytes_per_second: float = 0.0
    bytes_per_second: float = 0.0
    predicted_downtime: float | None = None
    total_bytes: int = 0
    seconds: float = 0.0
    reason: str = ""


class Doubt(NamedTuple):
    """What an arbiter is asked about: this side does not run, and cannot know whether the other does.

    ``"destination"`` may be said only where the source is gone, or is in doubt itself and will be told the same: a
    source that is not in doubt runs. ``"source"`` may be said to the source only where the destination is gone, or has
    been told so first.

    Attributes:
        side: ``"source"`` or ``"destination"``: who asks.
        migration: its number in hexadecimal digits, the same on both sides.
        attempt: from 1.
        peer: the other side's address.
        seconds: since the answer is missing.
    """

    side: Literal["source", "destination"]
    migration: str
    attempt: int
    peer: str
    seconds: float


@dataclass(frozen=True)
class Migrated:
    """What a migration was like: the destination runs.

    Attributes:
        downtime: in seconds, from before the source was paused until the destination said that it has everything.
        predicted_downtime: what the policy had said.
        reason: why it stopped when it did, in words.
        rounds: the bulk, each round, and the last one behind the stop.
        seconds, sent_bytes: of all of it.
        stop_seconds: of the downtime, what pause and state took.
        resolved: None, or who resolved an ambiguous moment: ``"destination"`` (it could be asked) or ``"verdict"``.
    """

    downtime: float
    predicted_downtime: float
    reason: str
    rounds: tuple[RoundReport, ...]
    seconds: float
    sent_bytes: int
    resolved: str | None = None
    stop_seconds: float = 0.0


@dataclass(frozen=True)
class Arrival:
    """What came, whole: from now on this side runs.

    Attributes:
        memory: buffers by the names of the regions.
        state: the state blob, as the source's ``state`` gave it.
        prepared: what the ``prepare`` function made of both, or None.
        source: the source's address.
        received_bytes: over the wire, in the last attempt.
        seconds: from its connection to its commit.
    """

    memory: dict[str, Any]
    state: bytes
    prepared: Any
    source: str
    received_bytes: int
    seconds: float

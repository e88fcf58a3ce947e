# SPDX-License-Identifier: MIT
"""What a recording says about incremental checkpoints and live migration of what was recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..errors import InvalidRecording
from .selecting import require_epochs
from .units import show_bandwidth, show_bytes, show_seconds
from .workingset import Trace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .recording import Epoch

__all__ = ["Checkpoint", "Checkpoints", "Precopy", "Round", "checkpoints", "precopy", "simulated"]

_MOST_ROUNDS = 50
_LEAST_SHRINK = 0.98  # of a round's bytes to those of the one before: what shrinks less does not converge
_FAULTS_HURT = 0.1  # of the target's time
_SURELY_FAST = 1e15


class Checkpoint(NamedTuple):
    """Incremental checkpoints at one interval."""

    interval_seconds: float
    pages: float
    """Of each, on average: the distinct pages written in an interval."""
    nbytes: float
    seconds: float
    """That each takes to write, with the first writes that it made slower, and its collect."""
    share_of_full: float
    """Of a full copy's time."""


class Checkpoints(NamedTuple):
    """Incremental checkpoints against full copies."""

    asked: Checkpoint
    largest_pages: int
    """The most distinct pages in any interval."""
    intervals: tuple[Checkpoint, ...]
    full_nbytes: int
    full_seconds: float
    break_even_seconds: float | None
    """From this interval on a full copy costs no more; None where it costs more at every interval recorded."""
    fault_share: float
    """Of the target's time, on one processor, that first writes take at the interval."""
    beyond: bool
    """The interval is longer than the recording: its size is taken from how sizes grew."""
    verdict: str


class Round(NamedTuple):
    """One round of pre-copy."""

    nbytes: float
    seconds: float


class Precopy(NamedTuple):
    """How live migration would go: rounds that copy what was written in the round before, then a stop for the rest."""

    converges: bool
    """Whether the rest can be copied within the downtime."""
    rounds: tuple[Round, ...]
    """While the target runs; the first copies everything."""
    nbytes: float
    """All that is sent, the rest included."""
    seconds: float
    downtime_seconds: float
    """For the rest, after the last round."""
    worst_downtime_seconds: float
    """If the last round meets the busiest time in the recording."""
    least_bandwidth: float | None
    """Bytes a second with which it would converge; None where no bandwidth does it."""
    beyond: bool
    """A round is longer than the recording: what is written in it is taken from how that grew."""
    verdict: str


def _traced(epochs: Sequence[Epoch], name: str) -> Trace:
    require_epochs(epochs, name)
    trace = Trace(epochs)
    if not len(trace) or not trace.seconds:
        raise InvalidRecording(
            f"{name} has no epochs at full resolution that lasted any time: record longer, or with a larger size_budget"
        )
    return trace


def _full_pages(trace: Trace) -> int:
    """What a full copy has: no less than what was written of it."""
    return max(max((epoch.resident_pages for epoch in trace.epochs), default=0), trace.page_count)


def checkpoints(
    epochs: Sequence[Epoch],
    *,
    interval: float,
    bandwidth: float,
    first_write: float,
    name: str = "the recording",
) -> Checkpoints:
    """What incremental checkpoints every so often would cost, against full copies.

    A checkpoint costs the time to store its bytes, one fault for each page in it, and a collect as long as those in the
    recording. A full copy costs the time to store all pages.

    Args:
        epochs: of a recording; the newest at full resolution are used.
        interval: seconds.
        bandwidth: of the store, bytes a second.
        first_write: seconds that the first write to a page in an interval costs the program.
        name: of the recording, for errors.

    Raises:
        InvalidRecording: it has no epochs at full resolution.
    """
    trace = _traced(epochs, name)
    written, page = trace.working_set(), trace.epochs[0].page_bytes
    collect = sum(epoch.collect_seconds for epoch in trace.epochs) / len(trace)
    full_pages = _full_pages(trace)
    full_nbytes = full_pages * page
    full_seconds = full_nbytes / bandwidth

    def at(seconds: float) -> Checkpoint:
        pages = min(written(seconds), full_pages)
        takes = pages * (page / bandwidth + first_write) + collect
        return Checkpoint(seconds, pages, pages * page, takes, takes / full_seconds if full_seconds else 1.0)

    asked = at(interval)
    lengths = [1]
    while lengths[-1] * 2 <= len(trace):
        lengths.append(lengths[-1] * 2)
    intervals = tuple(at(length * trace.epoch_seconds) for length in lengths)
    break_even = _first(lambda count: at(count * trace.epoch_seconds).share_of_full >= 1, len(trace))
    beyond = interval > trace.seconds * 1.01
    fault_share = at(interval).pages * first_write / interval
    found = Checkpoints(
        asked=asked,
        largest_pages=trace.largest(max(1, round(interval / trace.epoch_seconds))),
        intervals=intervals,
        full_nbytes=full_nbytes,
        full_seconds=full_seconds,
        break_even_seconds=None if break_even is None else break_even * trace.epoch_seconds,
        fault_share=fault_share,
        beyond=beyond,
        verdict="",
    )
    return found._replace(verdict=_checkpoint_verdict(found))


def _first(holds: Callable[[int], bool], last: int) -> int | None:
    """The least number up to the last for which it holds, if it holds for all larger ones."""
    if not holds(last):
        return None
    low, high = 0, last  # it does not hold for low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _checkpoint_verdict(found: Checkpoints) -> str:
    asked, every = found.asked, show_seconds(found.asked.interval_seconds)
    if not found.full_nbytes or not asked.pages:
        return f"Nothing was written: a checkpoint every {every} has nothing in it."
    if asked.share_of_full >= 1:
        return (
            f"Tracking is the wrong tool for checkpoints every {every}: they have {show_bytes(asked.nbytes)} and cost "
            f"{show_seconds(asked.seconds)} each, a full copy of {show_bytes(found.full_nbytes)} costs "
            f"{show_seconds(found.full_seconds)}. Copy everything"
            + (
                f", or make checkpoints more often than every {show_seconds(found.break_even_seconds)}."
                if found.break_even_seconds and found.break_even_seconds > found.intervals[0].interval_seconds
                else "."
            )
        )
    words = (
        f"Checkpoints every {every} have {show_bytes(asked.nbytes)} on average and cost {asked.share_of_full:.1%} of a "
        "full copy."
    )
    if found.fault_share >= _FAULTS_HURT:
        words += (
            f" But the first writes take the program {found.fault_share:.0%} of its time: it writes too many pages for "
            "tracking to be cheap."
        )
    return words


def precopy(
    epochs: Sequence[Epoch],
    *,
    bandwidth: float,
    downtime: float,
    name: str = "the recording",
) -> Precopy:
    """Whether pre-copy migration converges, and what it costs.

    The first round copies every page; each further one what was written during the one before, on average over the
    recording; the target is stopped once the rest takes no longer than the downtime. A round shorter than an epoch is
    taken to write as much as one: where that decides, the downtime is told too large, never too small.

    Args:
        epochs: of a recording; the newest at full resolution are used.
        bandwidth: of the network, bytes a second.
        downtime: seconds that the target may stand still.
        name: of the recording, for errors.

    Raises:
        InvalidRecording: it has no epochs at full resolution.
    """
    trace = _traced(epochs, name)
    written, page = trace.working_set(), trace.epochs[0].page_bytes
    full_nbytes = float(_full_pages(trace) * page)

    def rest_of(seconds: float) -> float:
        return min(written(seconds) * page, full_nbytes)

    converges, rounds, rest = simulated(rest_of, full_nbytes, bandwidth, downtime)
    last_epochs = max(1, -(-rounds[-1].seconds // trace.epoch_seconds)) if rounds else 1
    worst = trace.largest(int(min(last_epochs, len(trace)))) * page / bandwidth
    found = Precopy(
        converges=converges,
        rounds=tuple(rounds),
        nbytes=sum(each.nbytes for each in rounds) + rest,
        seconds=sum(each.seconds for each in rounds) + rest / bandwidth,
        downtime_seconds=rest / bandwidth,
        worst_downtime_seconds=max(worst, rest / bandwidth) if rounds else rest / bandwidth,
        least_bandwidth=_least_bandwidth(rest_of, full_nbytes, downtime),
        beyond=any(each.seconds > trace.seconds * 1.01 for each in rounds),
        verdict="",
    )
    return found._replace(verdict=_precopy_verdict(found, bandwidth, downtime, trace, full_nbytes))


def simulated(
    rest_of: Callable[[float], float], full_nbytes: float, bandwidth: float, downtime: float
) -> tuple[bool, list[Round], float]:
    """Pre-copy, round by round.

    Args:
        rest_of: how many bytes are written, by the length of a round.
        full_nbytes, bandwidth, downtime: bytes, bytes a second, seconds.

    Returns:
        Whether it converges, the rounds, and how many bytes are left for the stop.
    """
    rest, rounds = full_nbytes, list[Round]()
    while rest / bandwidth > downtime and len(rounds) < _MOST_ROUNDS:
        seconds = rest / bandwidth
        rounds.append(Round(rest, seconds))
        before, rest = rest, rest_of(seconds)
        if rest > before * _LEAST_SHRINK and rest / bandwidth > downtime:
            return False, rounds, rest
    return rest / bandwidth <= downtime, rounds, rest


def _least_bandwidth(rest_of: Callable[[float], float], full_nbytes: float, downtime: float) -> float | None:
    low, high = 1.0, _SURELY_FAST
    if not simulated(rest_of, full_nbytes, high, downtime)[0]:
        return None
    while high / low > 1.01:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if simulated(rest_of, full_nbytes, middle, downtime)[0] else (middle, high)
    return high


def _precopy_verdict(found: Precopy, bandwidth: float, downtime: float, trace: Trace, full_nbytes: float) -> str:
    if not found.rounds:
        return f"All of it is copied in {show_seconds(found.downtime_seconds)}: stop and copy, no rounds are needed."
    if not found.converges:
        words = (
            f"Pre-copy does not converge at {show_bandwidth(bandwidth)}: what is written while it copies takes "
            f"{show_seconds(found.downtime_seconds)} to copy, more than {show_seconds(downtime)}. "
        )
        if found.rounds[-1].seconds < trace.epoch_seconds:
            words += (
                f"The last round takes {show_seconds(found.rounds[-1].seconds)}, less than an epoch: a recording with "
                "shorter epochs (record --every) may say otherwise. "
            )
        if found.least_bandwidth is None:
            return words + "Tracking is the wrong tool for this: stop, and copy everything."
        return words + f"It would from {show_bandwidth(found.least_bandwidth)} on; or stop, and copy everything."
    more = found.nbytes / full_nbytes if full_nbytes else 1.0
    words = (
        f"Pre-copy converges: {len(found.rounds)} round{'s' if len(found.rounds) > 1 else ''}, "
        f"{show_bytes(found.nbytes)} ({more:.2f} times the memory), then a stop of "
        f"{show_seconds(found.downtime_seconds)}."
    )
    if found.worst_downtime_seconds > downtime:
        words += f" In the busiest time recorded the stop is {show_seconds(found.worst_downtime_seconds)}."
    return words

# SPDX-License-Identifier: MIT
"""What saves cost here, as measured, and so whether the next one is better full or an increment."""

from __future__ import annotations

__all__ = ["Costs"]

_LEAST_NBYTES = 4 << 20  # less tells nothing about the cost of a byte
_WEIGHT = 0.3  # of the newest measurement


class Costs:
    """The rule for full or increment.

    A save takes a fixed time (files are made, made durable, committed), which is the same for both kinds, and a time
    for each byte that is copied and written. Each kind's time for a byte is measured in every save that has bytes
    enough: scattered pages are copied more slowly than all of the memory, and compress otherwise; the store's speed is
    in both.

    A save is full where all bytes at a full save's rate take no longer than the dirty ones at an increment's. Until an
    increment was measured its rate is taken for that of a full one, so that only the number of bytes decides; with
    deltas, which leave out what did not change, the first increment is always tried.

    A rate that was measured in a bad moment does not stay for ever: each full save that this rule chose moves the
    increment's rate a third of the way to that of the full ones.

    Thread safety: one thread at a time.
    """

    def __init__(self, *, deltas: bool = False) -> None:
        self._deltas = deltas
        self._fixed: float | None = None
        self._rates: dict[bool, float] = {}  # seconds a byte, by whether full

    def learn(self, *, full: bool, nbytes: int, seconds: float, fixed_seconds: float) -> None:
        """Take a measurement.

        Args:
            full: of which kind of save.
            nbytes: how many bytes of memory it copied.
            seconds: how long it took, the copying and the writing.
            fixed_seconds: how much of that does not depend on the bytes.
        """
        self._fixed = fixed_seconds if self._fixed is None else min(self._fixed, fixed_seconds)
        if nbytes >= _LEAST_NBYTES:
            rate = max(seconds - self._fixed, 1e-9) / nbytes
            before = self._rates.get(full)
            self._rates[full] = rate if before is None else before + _WEIGHT * (rate - before)

    def full_is_cheaper(self, dirty_nbytes: int, nbytes: int) -> bool:
        """Whether all bytes cost no more than the dirty ones. Asked once for each save."""
        if self._deltas and False not in self._rates:
            return False
        full = self._rates.get(True)
        increment = self._rates.get(False, full)
        if full is None or increment is None:
            return dirty_nbytes >= nbytes
        if full * nbytes > increment * dirty_nbytes:
            return False
        if False in self._rates:
            self._rates[False] += (full - increment) / 3
        return True

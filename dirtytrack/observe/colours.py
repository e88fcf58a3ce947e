# SPDX-License-Identifier: MIT
"""The colours of heat maps: by the square root of the share, so that a single dirty page of many still shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .arrays import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .heat import Shares

__all__ = ["BACKGROUND", "FOLD", "INK", "LEVELS", "NOTHING", "PALETTE", "TERMINAL", "levels"]

BACKGROUND, INK, FOLD = (16, 20, 27), (214, 220, 228), (52, 61, 74)
NOTHING = (30, 36, 46)
"""Of time in which nothing was recorded."""

_CONTROL = (  # dark blue, violet, red, orange, pale yellow: each lighter than the one before, for every kind of eye
    (33, 36, 96),
    (96, 40, 133),
    (170, 48, 112),
    (224, 90, 68),
    (247, 164, 56),
    (250, 240, 180),
)
LEVELS = 64
"""How many colours there are; level 0 is the background."""


def _palette() -> tuple[tuple[int, int, int], ...]:
    at = np.linspace(0, len(_CONTROL) - 1, LEVELS - 1)
    channels = [np.interp(at, np.arange(len(_CONTROL)), [colour[i] for colour in _CONTROL]) for i in range(3)]
    red, green, blue = (np.rint(channel).astype(int).tolist() for channel in channels)
    return (BACKGROUND, *zip(red, green, blue, strict=True))


PALETTE = _palette()
"""By level."""
TERMINAL = (0, 18, 54, 91, 126, 161, 203, 214, 229)
"""The nearest of the 256 colours that terminals have, for nine levels."""


def levels(shares: Shares, count: int = LEVELS) -> NDArray[np.int64]:
    """0 for what is clean, 1 to ``count`` - 1 for what is not, -1 where nothing was recorded (NaN)."""
    known = np.nan_to_num(shares)
    drawn = np.where(known > 0, np.minimum(count - 1, 1 + (np.sqrt(known) * (count - 1)).astype(np.int64)), 0)
    return np.where(np.isnan(shares), -1, drawn)

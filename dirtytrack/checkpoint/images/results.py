# SPDX-License-Identifier: MIT
"""What a save of a process did."""

from __future__ import annotations

from typing import Literal, NamedTuple

__all__ = ["Image"]


class Image(NamedTuple):
    """A generation that was committed; made by `ProcessCheckpointer.save`."""

    generation: int
    kind: Literal["full", "increment"]
    frozen_seconds: float
    """For how long the process stood still, from its first thread's stop until all went on."""
    seconds: float
    """From the call until it was durable."""
    bytes_frozen: int
    """Copied while it stood still."""
    bytes_precopied: int
    """Copied before that, while it ran; what it wrote again meanwhile was copied again."""
    bytes_written: int
    """To the store."""
    rounds: int
    """Of copying while it ran."""
    threads: int
    mappings: int
    nbytes: int
    """Of the mappings that are in the image."""

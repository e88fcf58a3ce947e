# SPDX-License-Identifier: MIT
"""What is known of a process while it stands still."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..kernel import targets
from ..kernel.targets import ThreadState

if TYPE_CHECKING:
    from ..kernel.targets import Answer

__all__ = ["Frozen", "ThreadState", "frozen_of"]


class Frozen:
    """A process that stands still, or stood; made by `ProcessTracker.frozen`.

    Attributes:
        threads: its threads with their registers, its first one first; empty unless they were asked for.
        seconds: for how long it stood still, from the first thread's stop until all went on; 0 until they have.
    """

    def __init__(self, threads: tuple[ThreadState, ...] = ()) -> None:
        self.threads = threads
        self.seconds = 0.0

    def __repr__(self) -> str:
        return f"<Frozen: {len(self.threads)} threads, {self.seconds * 1e3:.3f} ms>"


def frozen_of(answer: Answer) -> Frozen:
    """What a guardian's answer tells; closes the file that came with it."""
    if answer.fd < 0:
        return Frozen()
    try:
        return Frozen(targets.thread_states(answer.fd))
    finally:
        os.close(answer.fd)

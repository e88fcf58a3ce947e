# SPDX-License-Identifier: MIT
"""Other processes: which pages a running program writes, though it knows nothing of us.

with dirtytrack.process.attach(pid) as tracker:
    dirty = tracker.collect()
    data = tracker.read(dirty)
"""

from .attaching import attach
from .frozen import Frozen, ThreadState
from .mappings import Mapping
from .offering import accept, offer
from .tracker import ProcessStatistics, ProcessTracker
from .workers import Workers

__all__ = [
    "Frozen",
    "Mapping",
    "ProcessStatistics",
    "ProcessTracker",
    "ThreadState",
    "Workers",
    "accept",
    "attach",
    "offer",
]

# SPDX-License-Identifier: MIT
"""Other processes: which pages a running program writes, though it knows nothing of us.

with dirtytrack.process.attach(pid) as tracker:
    dirty = tracker.collect()
    data = tracker.read(dirty)
"""

from .attaching import attach
from .mappings import Mapping
from .offering import accept, offer
from .tracker import ProcessStatistics, ProcessTracker
from .workers import Workers

__all__ = ["Mapping", "ProcessStatistics", "ProcessTracker", "Workers", "accept", "attach", "offer"]

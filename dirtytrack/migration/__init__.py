# SPDX-License-Identifier: MIT
"""Live migration: move the memory of something that keeps running, and stop it for the last bit only.

    from dirtytrack.migration import Destination, Source

    with Destination("tcp://127.0.0.1:7070") as destination:        # in one process
        arrival = destination.receive()

    with Source({"table": table}, pause=stop, resume=go) as source:  # in the other
        source.migrate("tcp://127.0.0.1:7070")

``import dirtytrack`` does not import this.
"""

from ..kernel.moving import page_digest
from .destination import Destination
from .policy import Decision, Goal, Policy, RoundReport
from .source import Source
from .telling import Arrival, Doubt, Migrated, Progress

__all__ = [
    "Arrival",
    "Decision",
    "Destination",
    "Doubt",
    "Goal",
    "Migrated",
    "Policy",
    "Progress",
    "RoundReport",
    "Source",
    "page_digest",
]

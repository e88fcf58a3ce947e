# SPDX-License-Identifier: MIT
"""An area that a tracker watches: whatever happens to it, what is collected is held against what changed."""

from __future__ import annotations

from dirtytrack import DirtyTracker, UffdSession
from tests.kernel.kinds import Area


class Watched:
    """A running tracker on an area, with nothing pending.

    Args:
        area: what is watched.
        compare: False where a look at the memory would itself be an event: pages without content, or without access.
    """

    def __init__(self, area: Area, *, compare: bool = True, session: UffdSession | None = None) -> None:
        self.area = area
        self.session = session or UffdSession()
        self._own = session is None
        self.region = self.session.register(area.memory, blind_spots="accepted")
        self.tracker = DirtyTracker(self.session, [self.region])
        self.tracker.start()
        self._compare = compare
        self._known = area.content() if compare else []

    def collect(self) -> set[int]:
        """The dirty units of this epoch, among which each must be that differs from what it was."""
        found = self.area.of_runs(self.tracker.collect())
        if self._compare:
            now = self.area.content()
            changed = {unit for unit, (old, new) in enumerate(zip(self._known, now, strict=True)) if old != new}
            assert changed <= found, f"changed and not reported: {sorted(changed - found)}"
            self._known = now
        return found

    def peek(self) -> set[int]:
        return self.area.of_runs(self.tracker.peek())

    def close(self) -> None:
        if self._own:
            self.session.close()
        else:
            self.tracker.stop()

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

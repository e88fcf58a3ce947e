# SPDX-License-Identifier: MIT
"""An area that is watched: by the bare ioctl, or by a tracker, whose answers are held against what changed."""

from __future__ import annotations

from contextlib import ExitStack

from dirtytrack import DirtyTracker, PageCategory, Pagemap, ScanFlag, UffdSession
from tests import oracle
from tests.kernel.kinds import Area

EXACT = {"category_mask": PageCategory.WRITTEN, "return_mask": PageCategory.WRITTEN}
ARMING = ScanFlag.WP_MATCHING | ScanFlag.CHECK_WPASYNC


class Bare:
    """An area of which the oracle holds the userfaultfd; asked about by `Pagemap` and by the oracle."""

    def __init__(self, area: Area) -> None:
        self.area = area
        self._things = ExitStack()
        self.pagemap = self._things.enter_context(Pagemap())
        uffd = self._things.enter_context(oracle.userfaultfd())
        oracle.register(uffd, area.address, area.end)
        oracle.arm(uffd, area.address, area.end)

    def written(self) -> set[int]:
        """Without arming; Pagemap and the oracle agree."""
        scan = self.pagemap.scan(self.area.address, self.area.end, **EXACT)
        assert self.area.of_pages(oracle.written(self.area.address, self.area.end)) == self.area.of_runs(scan)
        assert scan.page_count % self.area.unit_pages == 0, "whole units"
        return self.area.of_runs(scan)

    def take(self, max_units: int = 0) -> set[int]:
        """And arm what was returned."""
        most = max_units * self.area.unit_pages
        scan = self.pagemap.scan(self.area.address, self.area.end, **EXACT, flags=ARMING, max_pages=most)
        return self.area.of_runs(scan)

    def close(self) -> None:
        self._things.close()

    def __enter__(self) -> Bare:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


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
        self.tracker = DirtyTracker(self.session, [self.region], exact=True)
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

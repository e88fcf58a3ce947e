# SPDX-License-Identifier: MIT
"""The mappings of a process, and which of them are tracked."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Mapping"]


@dataclass(frozen=True)
class Mapping:
    """A mapping of a process, as its tracker sees it.

    ``state`` is "tracked", "untracked" (it counts as wholly dirty) or "excluded"; ``reason`` says why it is not tracked.
    """

    start: int
    end: int
    permissions: str
    offset: int
    device: str
    inode: int
    name: str
    state: str
    reason: str

    @property
    def nbytes(self) -> int:
        """Its length."""
        return self.end - self.start

# SPDX-License-Identifier: MIT
"""Durable checkpoints of memory, for what changed: kept in a store, checked whenever they are read.

``import dirtytrack`` does not import this.
"""

from .store import DirectoryStore
from .verifying import Report, verify

__all__ = ["DirectoryStore", "Report", "verify"]

# SPDX-License-Identifier: MIT
"""Durable checkpoints of memory, for what changed: kept in a store, checked whenever they are read.

``import dirtytrack`` does not import this.
"""

from .protocols import Store
from .store import DirectoryStore
from .verifying import Report, Verified, verify

__all__ = ["DirectoryStore", "Report", "Store", "Verified", "verify"]

# SPDX-License-Identifier: MIT
"""Durable checkpoints of memory, for what changed: kept in a store, checked whenever they are read.

``import dirtytrack`` does not import this.
"""

from .chains import Pruned, Retention, compact, prune
from .checkpointer import Checkpointer
from .comparing import Comparison, RegionComparison, compare
from .formats import Written, ZarrWriter, export_dcp, export_zarr
from .jobs import Save
from .listing import Summary, generations
from .manifests import Manifest, RegionEntry, SegmentEntry
from .objects import ObjectStore
from .protocols import Store
from .ranked import Joined, JoinedRegion, Part, PartEntry
from .ranks import Communicator, Coordinated, PartOptions, coordinated, restore_share
from .restoring import State, restore
from .store import DirectoryStore
from .verifying import Report, Verified, verify

__all__ = [
    "Checkpointer",
    "Communicator",
    "Comparison",
    "Coordinated",
    "DirectoryStore",
    "Joined",
    "JoinedRegion",
    "Manifest",
    "ObjectStore",
    "Part",
    "PartEntry",
    "PartOptions",
    "Pruned",
    "RegionComparison",
    "RegionEntry",
    "Report",
    "Retention",
    "Save",
    "SegmentEntry",
    "State",
    "Store",
    "Summary",
    "Verified",
    "Written",
    "ZarrWriter",
    "compact",
    "compare",
    "coordinated",
    "export_dcp",
    "export_zarr",
    "generations",
    "prune",
    "restore",
    "restore_share",
    "verify",
]

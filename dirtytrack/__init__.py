# SPDX-License-Identifier: MIT
"""dirtytrack: which pages of memory were written since you last asked, told by the kernel.

    with dirtytrack.track(array) as tracker:
        array[5] = 1
        dirty = tracker.collect()

The import works on every platform and loads nothing heavy; what the platform lacks is said at first use.
"""

from . import errors, pagemap
from .dirtyset import DirtySet
from .errors import (
    AddressUnusable,
    AlreadyStarted,
    BlindSpotWarning,
    CallbackFailed,
    CheckpointerClosed,
    DamagedCheckpoint,
    DirtyTrackError,
    GoalMissed,
    GuardPageWarning,
    HandOverInDoubt,
    InvalidCheckpoint,
    InvalidDelta,
    InvalidMemory,
    InvalidRecording,
    JournalUnusable,
    KernelRefused,
    LayoutDiffers,
    LimitReached,
    MemoryDiffers,
    MigrationAborted,
    MigrationFailed,
    MissedWrite,
    NoSuchGeneration,
    NotRegistered,
    NotStarted,
    NotTrusted,
    PeerLost,
    PeerRefused,
    PermissionDenied,
    ProtocolViolated,
    RangeBusy,
    RankFailed,
    RankLost,
    RanksDisagree,
    RegionGone,
    SessionClosed,
    StoreBusy,
    StoreFailed,
    TargetBusy,
    TargetGone,
    UnsupportedKernel,
    UsedAfterFork,
)
from .kernel.abi import PageCategory, ScanFlag, UffdFeature
from .kernel.engine import Statistics
from .kernel.support import KernelSupport, probe
from .memory import Memory, allocate
from .pagemap import Pagemap, Scan
from .region import Region, Run
from .session import CompareSession, Session, UffdSession
from .tracker import DirtyTracker, track

__all__ = [
    "AddressUnusable",
    "AlreadyStarted",
    "BlindSpotWarning",
    "CallbackFailed",
    "CheckpointerClosed",
    "CompareSession",
    "DamagedCheckpoint",
    "DirtySet",
    "DirtyTrackError",
    "DirtyTracker",
    "GoalMissed",
    "GuardPageWarning",
    "HandOverInDoubt",
    "InvalidCheckpoint",
    "InvalidDelta",
    "InvalidMemory",
    "InvalidRecording",
    "JournalUnusable",
    "KernelRefused",
    "KernelSupport",
    "LayoutDiffers",
    "LimitReached",
    "Memory",
    "MemoryDiffers",
    "MigrationAborted",
    "MigrationFailed",
    "MissedWrite",
    "NoSuchGeneration",
    "NotRegistered",
    "NotStarted",
    "NotTrusted",
    "PageCategory",
    "Pagemap",
    "PeerLost",
    "PeerRefused",
    "PermissionDenied",
    "ProtocolViolated",
    "RangeBusy",
    "RankFailed",
    "RankLost",
    "RanksDisagree",
    "Region",
    "RegionGone",
    "Run",
    "Scan",
    "ScanFlag",
    "Session",
    "SessionClosed",
    "Statistics",
    "StoreBusy",
    "StoreFailed",
    "TargetBusy",
    "TargetGone",
    "UffdFeature",
    "UffdSession",
    "UnsupportedKernel",
    "UsedAfterFork",
    "allocate",
    "errors",
    "pagemap",
    "probe",
    "track",
]

__version__ = "0.1.0"

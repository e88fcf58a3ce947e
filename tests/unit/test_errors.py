# SPDX-License-Identifier: MIT
"""The tree of errors is what errors.py says, and each leaf is what a caller would catch."""

from __future__ import annotations

import errno
import inspect
import pickle
import re

import pytest

from dirtytrack import errors
from dirtytrack.errors import DirtyTrackError, MigrationFailed

LEAVES = [
    kind
    for name, kind in vars(errors).items()
    if inspect.isclass(kind) and issubclass(kind, DirtyTrackError) and kind not in (DirtyTrackError, MigrationFailed)
]
BUILT_IN: dict[str, type[Exception]] = {
    "AddressUnusable": OSError,
    "AlreadyStarted": RuntimeError,
    "CheckpointerClosed": RuntimeError,
    "DamagedCheckpoint": OSError,
    "InvalidCheckpoint": ValueError,
    "CallbackFailed": RuntimeError,
    "GoalMissed": RuntimeError,
    "HandOverInDoubt": RuntimeError,
    "InvalidDelta": ValueError,
    "InvalidMemory": ValueError,
    "InvalidRecording": ValueError,
    "JournalUnusable": OSError,
    "KernelRefused": OSError,
    "LayoutDiffers": ValueError,
    "LimitReached": OSError,
    "MemoryDiffers": RuntimeError,
    "MigrationAborted": RuntimeError,
    "MissedWrite": RuntimeError,
    "NoSuchGeneration": LookupError,
    "NotRegistered": ValueError,
    "NotStarted": RuntimeError,
    "NotTrusted": PermissionError,
    "PeerLost": ConnectionError,
    "PeerRefused": ConnectionError,
    "PermissionDenied": PermissionError,
    "ProtocolViolated": ValueError,
    "RangeBusy": OSError,
    "RankFailed": RuntimeError,
    "RankLost": ConnectionError,
    "RanksDisagree": ValueError,
    "RegionGone": OSError,
    "SessionClosed": RuntimeError,
    "StoreBusy": OSError,
    "StoreFailed": OSError,
    "TargetBusy": OSError,
    "TargetGone": ProcessLookupError,
    "UnsupportedKernel": NotImplementedError,
    "UsedAfterFork": RuntimeError,
}


def test_the_leaves_are_those_of_the_tree() -> None:
    assert {kind.__name__ for kind in LEAVES} == BUILT_IN.keys()
    drawn = dict(re.findall(r"[├└]── (\w+) +(\w+)", errors.__doc__ or ""))
    assert drawn == {name: kind.__name__ for name, kind in BUILT_IN.items()}


@pytest.mark.parametrize("kind", LEAVES)
def test_a_leaf_is_also_what_a_caller_would_catch(kind: type[DirtyTrackError]) -> None:
    assert issubclass(kind, BUILT_IN[kind.__name__])
    assert not kind.__name__.endswith("Error")
    assert kind.__doc__


@pytest.mark.parametrize("kind", LEAVES)
def test_message_and_fields(kind: type[DirtyTrackError]) -> None:
    error = kind("what happened; what to do", errno=errno.EBUSY, start=4096, end=8192, feature="x", pid=7)
    assert str(error) == "what happened; what to do"
    assert (error.errno, error.start, error.end, error.feature, error.pid) == (errno.EBUSY, 4096, 8192, "x", 7)
    assert error.region is None
    assert error.partial is None
    bare = kind("message")
    assert bare.errno is None


@pytest.mark.parametrize("kind", LEAVES)
def test_errors_travel_between_processes(kind: type[DirtyTrackError]) -> None:
    error = kind("message", errno=errno.EPERM, start=1, end=2)
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind
    assert (str(back), back.errno, back.start, back.end) == ("message", errno.EPERM, 1, 2)


def test_what_is_damaged_travels_too() -> None:
    error = errors.DamagedCheckpoint("message")
    assert (error.generation, error.damage, error.whole) == (None, (), None)
    error = errors.DamagedCheckpoint("message", generation=7, damage=("a segment is missing",), whole=6)
    back = pickle.loads(pickle.dumps(error))
    assert (back.generation, back.damage, back.whole) == (7, ("a segment is missing",), 6)

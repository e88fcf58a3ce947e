# SPDX-License-Identifier: MIT
"""What a Checkpointer and its saves are given: whether it makes sense."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import InvalidCheckpoint, InvalidMemory
from ..kernel import core
from .chains import Retention
from .segments import FRAME_NBYTES

if TYPE_CHECKING:
    from .staging import Staging

__all__ = ["as_json", "frame_nbytes", "require_kinds", "require_options"]

_MOST_META_DEPTH = 100


def frame_nbytes(staging: Staging) -> int:
    """Of a frame: several find room in the staging buffer."""
    return min(FRAME_NBYTES, staging.nbytes // 4 // core.PAGE_BYTES * core.PAGE_BYTES)


def require_options(when_busy: Any, quiesce: Any, compact: Any, threads: Any, buffers: Any) -> None:
    """Refuse options of a Checkpointer that make no sense.

    Raises:
        InvalidCheckpoint, InvalidMemory.
    """
    if when_busy not in ("wait", "skip", "coalesce"):
        raise InvalidCheckpoint(f'when_busy= is "wait", "skip" or "coalesce", not {when_busy!r}')
    if quiesce is not None and not callable(quiesce):
        raise InvalidCheckpoint("quiesce= is called for a context manager, as a function under @contextmanager is")
    if compact is not None and not (type(compact) in (int, float) and compact > 0):
        raise InvalidCheckpoint(f"compact= is a number above 0, or None, not {compact!r}")
    if threads is not None and (type(threads) is not int or threads < 1):
        raise InvalidCheckpoint(f"threads= is a whole number from 1 on, not {threads!r}")
    if not isinstance(buffers, Mapping) or not buffers:
        raise InvalidMemory("the buffers are a mapping from names to buffers, with one at least")


def require_kinds(resume: Any, staging_bytes: Any, retain: Any, encrypt: Any, decrypt: Any) -> None:
    """Refuse options that are of another type than they can be.

    Raises:
        InvalidCheckpoint, InvalidMemory.
    """
    if type(resume) not in (bool, int):
        raise InvalidCheckpoint(f"resume= is True, False or the number of a generation, not {resume!r}")
    if staging_bytes is not None and type(staging_bytes) is not int:
        raise InvalidMemory(f"staging_bytes= is a number of bytes, not {staging_bytes!r}")
    if retain is not None and not isinstance(retain, Retention):
        raise InvalidCheckpoint(f"retain= is a Retention, as Retention(last=10), not {retain!r}")
    for name, function in (("encrypt", encrypt), ("decrypt", decrypt)):
        if function is not None and not callable(function):
            raise InvalidCheckpoint(f"{name}= is a function from bytes to bytes, not {function!r}")


def as_json(meta: Any) -> Any:
    """What comes back of ``meta``: a copy of its own.

    Raises:
        InvalidCheckpoint: JSON has no word for it, or it is nested too deeply.
    """
    try:
        kept = json.loads(json.dumps(meta, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"meta is kept as JSON, which has no word for this: {error}") from error
    level, depth = [kept], 0
    while level := [each for each in level if isinstance(each, (dict, list))]:
        depth += 1
        if depth > _MOST_META_DEPTH:  # who restores may be deep in calls, and Python's JSON counts them
            raise InvalidCheckpoint(f"meta is nested more than {_MOST_META_DEPTH} deep: make it flatter")
        level = [each for part in level for each in (part.values() if isinstance(part, dict) else part)]
    return kept

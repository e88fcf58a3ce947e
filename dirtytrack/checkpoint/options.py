# SPDX-License-Identifier: MIT
"""What a Checkpointer and its saves are given: whether it makes sense."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import InvalidCheckpoint, InvalidMemory
from ..kernel import core
from .segments import FRAME_NBYTES

if TYPE_CHECKING:
    from .staging import Staging

__all__ = ["as_json", "frame_nbytes", "require_options"]


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


def as_json(meta: Any) -> Any:
    """What comes back of ``meta``: a copy of its own.

    Raises:
        InvalidCheckpoint: JSON has no word for it.
    """
    try:
        return json.loads(json.dumps(meta, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"meta is kept as JSON, which has no word for this: {error}") from error

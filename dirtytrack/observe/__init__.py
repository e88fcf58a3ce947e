# SPDX-License-Identifier: MIT
"""Watch what memory is written over time: record it to a file, read it back, and plan with it.

    from dirtytrack import observe

    with observe.Recorder(tracker, "run.dtr"):
        ...
    for epoch in observe.Recording.open("run.dtr"):
        print(epoch.seconds, epoch.page_count)

It takes NumPy, which the extra ``observe`` brings. ``import dirtytrack`` does not import this.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .recording import Epoch, Recording
    from .writer import RecordingWriter

__all__ = ["Epoch", "Recording", "RecordingWriter"]

_HOMES = {"Epoch": "recording", "Recording": "recording", "RecordingWriter": "writer"}


def __getattr__(name: str) -> Any:
    """Modules are loaded with the first of their names: those that tell rates (`dirtytrack scan`) need no NumPy."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

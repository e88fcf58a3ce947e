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
    from .blocks import DirtiedBuffer, dirtied
    from .heat import Column, HeatMap, Place, Stretch, heat_map
    from .live import MappingSample, Sample, Watch
    from .metrics import Metrics
    from .page import heat_page
    from .picture import heat_png
    from .plan import Checkpoint, Checkpoints, Precopy, Round, checkpoints, precopy
    from .recorder import Observed, Recorder, RecorderStatistics
    from .recording import Epoch, Recording
    from .selecting import MappingShare, by_mapping, exact_tail, only
    from .source import Source, TrackerSource, source_of
    from .text import heat_text
    from .windows import Window
    from .workingset import HotRange, HotSet, Rate, Trace, WorkingSet, rates
    from .writer import RecordingWriter

__all__ = [
    "Checkpoint",
    "Checkpoints",
    "Column",
    "DirtiedBuffer",
    "Epoch",
    "HeatMap",
    "HotRange",
    "HotSet",
    "MappingSample",
    "MappingShare",
    "Metrics",
    "Observed",
    "Place",
    "Precopy",
    "Rate",
    "Recorder",
    "RecorderStatistics",
    "Recording",
    "RecordingWriter",
    "Round",
    "Sample",
    "Source",
    "Stretch",
    "Trace",
    "TrackerSource",
    "Watch",
    "Window",
    "WorkingSet",
    "by_mapping",
    "checkpoints",
    "dirtied",
    "exact_tail",
    "heat_map",
    "heat_page",
    "heat_png",
    "heat_text",
    "only",
    "precopy",
    "rates",
    "source_of",
]

_NAMES = {
    "blocks": ("DirtiedBuffer", "dirtied"),
    "heat": ("Column", "HeatMap", "Place", "Stretch", "heat_map"),
    "page": ("heat_page",),
    "picture": ("heat_png",),
    "text": ("heat_text",),
    "live": ("MappingSample", "Sample", "Watch"),
    "metrics": ("Metrics",),
    "plan": ("Checkpoint", "Checkpoints", "Precopy", "Round", "checkpoints", "precopy"),
    "recorder": ("Observed", "Recorder", "RecorderStatistics"),
    "recording": ("Epoch", "Recording"),
    "selecting": ("MappingShare", "by_mapping", "exact_tail", "only"),
    "source": ("Source", "TrackerSource", "source_of"),
    "windows": ("Window",),
    "workingset": ("HotRange", "HotSet", "Rate", "Trace", "WorkingSet", "rates"),
    "writer": ("RecordingWriter",),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """A module is loaded with the first of its names that is used: `dirtytrack scan` and `top` need no NumPy."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

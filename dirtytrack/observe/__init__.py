# SPDX-License-Identifier: MIT
"""Watch what memory is written over time: record it to a file, read it back, and plan with it.

    from dirtytrack import observe

    with observe.Recorder(tracker, "run.dtr"):
        ...
    for epoch in observe.Recording.open("run.dtr"):
        print(epoch.seconds, epoch.page_count)

It takes NumPy, which the extra ``observe`` brings. ``import dirtytrack`` does not import this.
"""

from .recording import Epoch, Recording
from .writer import RecordingWriter

__all__ = ["Epoch", "Recording", "RecordingWriter"]

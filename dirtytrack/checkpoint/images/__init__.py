# SPDX-License-Identifier: MIT
"""Checkpoints of programs that nobody prepared: consistent, incremental images of a running process.

with ProcessCheckpointer("images/redis", pid) as ckpt:
    ckpt.save()

``import dirtytrack`` and ``import dirtytrack.checkpoint`` do not import this.
"""

from .checkpointer import ProcessCheckpointer
from .results import Image

__all__ = ["Image", "ProcessCheckpointer"]

# SPDX-License-Identifier: MIT
"""Checkpoints of programs that nobody prepared: consistent, incremental images of a running process.

with ProcessCheckpointer("images/redis", pid) as ckpt:
    ckpt.save()

A debugger opens them as core files (`write_core`), and `compare_images` tells what two of them differ in.

``import dirtytrack`` and ``import dirtytrack.checkpoint`` do not import this.
"""

from .checkpointer import ProcessCheckpointer
from .core import Core, Missing, write_core
from .differing import ImageComparison, MappedRange, MappingDifference, ObjectDifference, compare_images
from .results import Image

__all__ = [
    "Core",
    "Image",
    "ImageComparison",
    "MappedRange",
    "MappingDifference",
    "Missing",
    "ObjectDifference",
    "ProcessCheckpointer",
    "compare_images",
    "write_core",
]

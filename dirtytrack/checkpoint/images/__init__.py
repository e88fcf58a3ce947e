# SPDX-License-Identifier: MIT
"""Images of processes that know nothing of it: as core files, and what two of them differ in.

``import dirtytrack`` does not import this.
"""

from .core import Core, Missing, write_core
from .differing import ImageComparison, MappingDifference, ObjectDifference, Place, compare_images

__all__ = [
    "Core",
    "ImageComparison",
    "MappingDifference",
    "Missing",
    "ObjectDifference",
    "Place",
    "compare_images",
    "write_core",
]

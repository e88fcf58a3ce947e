# SPDX-License-Identifier: MIT
"""NumPy, or what to do where it is not installed."""

from __future__ import annotations

from ..errors import UnsupportedKernel

try:
    import numpy as np
except ImportError as error:
    raise UnsupportedKernel(
        "dirtytrack.observe needs the package numpy, which is not installed: pip install dirtytrack[observe]",
        feature="numpy",
    ) from error

__all__ = ["np"]

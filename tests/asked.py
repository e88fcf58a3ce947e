# SPDX-License-Identifier: MIT
"""What a run of the tests was asked for, by its environment."""

from __future__ import annotations

import os

IN_CI = os.environ.get("CI") == "true"
"""A skipped test is a failure."""
SOAK = os.environ.get("DIRTYTRACK_SOAK") == "1"
"""As long as it takes (make soak)."""
SANITIZED = os.environ.get("DIRTYTRACK_SANITIZE") == "1"
"""The extension is built with the sanitizers (make sanitize)."""
EMULATED = os.environ.get("DIRTYTRACK_EMULATED") == "1"
"""Each step takes some thirty times as long (make kernels)."""


def fewer(count: int) -> int:
    """So many of what can be tried any number of times; in an emulated machine an eighth."""
    return max(count // 8, 2) if EMULATED else count

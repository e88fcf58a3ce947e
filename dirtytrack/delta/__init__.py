# SPDX-License-Identifier: MIT
"""From dirty pages to changed bytes: what differs from a mirror, encoded, applied, composed.

    from dirtytrack.delta import Mirror

    mirror = Mirror(array)
    array[5] = 1
    delta = mirror.update()

A page filter comes first (which pages were written), then the silent stores are left out (written, but unchanged), and
what remains is told by granules of a few bytes. ``import dirtytrack`` does not import this.
"""

from .arrays import ArrayChanges, array_changes
from .encoded import Delta, apply, compose, diff
from .mirror import Mirror

__all__ = ["ArrayChanges", "Delta", "Mirror", "apply", "array_changes", "compose", "diff"]

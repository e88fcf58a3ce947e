# SPDX-License-Identifier: MIT
"""The recording that a command is about, and which part of it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..observe import Epoch, Recording

__all__ = ["add_file", "add_mapping", "epochs_of", "opened"]


def add_file(parser: argparse.ArgumentParser) -> None:
    """Declare the argument that names it."""
    parser.add_argument("file", metavar="FILE", help="a recording, as dirtytrack record makes it")


def add_mapping(parser: argparse.ArgumentParser) -> None:
    """Declare the option that chooses a part."""
    parser.add_argument(
        "--mapping", metavar="NAME", help="only mappings of this name, as in a shell: [heap], '*.so*', [anon]"
    )


def opened(args: argparse.Namespace) -> Recording:
    """Open it.

    Raises:
        InvalidRecording: the file is no recording, or has no epoch.
        PermissionDenied, KernelRefused: it may not, or cannot, be read.
    """
    from ..observe import Recording
    from ..observe.selecting import require_epochs

    recording = Recording.open(args.file)
    require_epochs(recording, args.file)
    return recording


def epochs_of(recording: Recording, args: argparse.Namespace) -> Sequence[Epoch]:
    """What its epochs have of the mappings that were chosen.

    Raises:
        InvalidRecording: there are none.
    """
    from ..observe import only

    epochs = recording[:]
    return epochs if args.mapping is None else only(epochs, args.mapping)

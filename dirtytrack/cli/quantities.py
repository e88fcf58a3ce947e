# SPDX-License-Identifier: MIT
"""Times, sizes and bandwidths on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

__all__ = ["address", "bandwidth", "nbytes", "seconds"]

T = TypeVar("T")


def _told(parse: Callable[[str], T], words: str) -> T:
    """What argparse tells of a plain ValueError is not what is wrong."""
    try:
        return parse(words)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def seconds(words: str) -> float:
    """A time, such as 100ms."""
    from ..observe.units import seconds_of

    return _told(seconds_of, words)


def nbytes(words: str) -> int:
    """A size, such as 64MiB."""
    from ..observe.units import bytes_of

    return _told(bytes_of, words)


def bandwidth(words: str) -> float:
    """A bandwidth, such as 10Gbit, in bytes a second."""
    from ..observe.units import bandwidth_of

    return _told(bandwidth_of, words)


def address(words: str) -> tuple[str, int]:
    """Where to listen, such as :9464."""
    from ..observe.metrics import address_of

    return _told(address_of, words)

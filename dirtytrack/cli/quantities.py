# SPDX-License-Identifier: MIT
"""Times, sizes and bandwidths on the command line."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from ..errors import DirtyTrackError

__all__ = ["address", "bandwidth", "nbytes", "seconds"]


def _parsed(where: str, parse: str, words: str) -> Any:
    """By a function of observe, which is imported when the first is needed. What is wrong is told in its words: of a
    plain ValueError argparse tells less."""
    try:
        module = importlib.import_module(f"...observe.{where}", __name__)
        return getattr(module, parse)(words)
    except (ValueError, DirtyTrackError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def seconds(words: str) -> float:
    """A time, such as 100ms."""
    return float(_parsed("units", "seconds_of", words))


def nbytes(words: str) -> int:
    """A size, such as 64MiB."""
    return int(_parsed("units", "bytes_of", words))


def bandwidth(words: str) -> float:
    """A bandwidth, such as 10Gbit, in bytes a second."""
    return float(_parsed("units", "bandwidth_of", words))


def address(words: str) -> tuple[str, int]:
    """Where to listen, such as :9464."""
    host, port = _parsed("metrics", "address_of", words)
    return str(host), int(port)

# SPDX-License-Identifier: MIT
"""Whether what was read makes sense: the one way in which each part of a manifest is looked at."""

from __future__ import annotations

import re
from typing import Any

from ..errors import InvalidCheckpoint

__all__ = ["HEX32", "HEX64", "exactly", "listed", "matches", "number", "require"]

HEX32, HEX64 = (re.compile(f"[0-9a-f]{{{n}}}") for n in (32, 64))


def require(holds: bool, problem: str) -> None:
    """Refuse what does not hold.

    Raises:
        InvalidCheckpoint: with the problem as its message.
    """
    if not holds:
        raise InvalidCheckpoint(problem)


def number(value: Any, least: int, most: int, what: str) -> int:
    """A whole number in these bounds, both included.

    Raises:
        InvalidCheckpoint.
    """
    require(type(value) is int and least <= value <= most, f"{what} is no whole number from {least} to {most}")
    return int(value)


def matches(pattern: re.Pattern[str], value: Any, what: str) -> None:
    """Refuse what is no string of that pattern.

    Raises:
        InvalidCheckpoint.
    """
    require(isinstance(value, str) and bool(pattern.fullmatch(value)), f"{what} is not {pattern.pattern}")


def exactly(value: Any, names: set[str], what: str) -> dict[str, Any]:
    """A copy of an object of JSON that has these keys, and no others.

    Raises:
        InvalidCheckpoint.
    """
    require(isinstance(value, dict), f"{what} is no object")
    for name in value.keys() ^ names:
        require(False, f"{what} {'has no' if name in names else 'has an unknown'} {name[:40]!r}")
    return dict(value)


def listed(value: Any, what: str) -> list[Any]:
    """A list of JSON.

    Raises:
        InvalidCheckpoint.
    """
    require(isinstance(value, list), f"{what} is no list")
    found: list[Any] = value
    return found

# SPDX-License-Identifier: MIT
"""Times, sizes and bandwidths as people write them: 100ms, 64MiB, 10Gbit."""

from __future__ import annotations

import re

__all__ = ["bandwidth_of", "bytes_of", "seconds_of", "show_bandwidth", "show_bytes", "show_seconds"]

_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-zµ/]*)\s*", re.IGNORECASE)
_TIMES = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_PREFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SHOWN = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_SIZES = {f"{prefix}b": times for prefix, times in _PREFIXES.items()}
_SIZES |= {f"{prefix}ib": times for prefix, times in _BINARY.items()}
_RATES = {f"{unit}/s": float(times) for unit, times in _SIZES.items()}
_RATES |= {f"{prefix}bit{per}": times / 8 for prefix, times in _PREFIXES.items() for per in ("", "/s")}
_RATES |= {f"{prefix}bps": times / 8 for prefix, times in _PREFIXES.items()}


def _parsed(words: str, units: dict[str, float], what: str, examples: str) -> float:
    found = _NUMBER.fullmatch(words)
    if found is None:
        raise ValueError(f"{words!r} is no {what}: a number and a unit, as in {examples}")
    number, unit = found.groups()
    if unit.lower() not in units:
        why = f"{unit!r} is no unit of it" if unit else "it has no unit"
        raise ValueError(f"{words!r} is no {what}: {why}; write it as in {examples}")
    return float(number) * units[unit.lower()]


def seconds_of(words: str) -> float:
    """Seconds.

    Raises:
        ValueError: it is no time, or none at all.
    """
    seconds = _parsed(words, _TIMES, "time", "100ms, 30s, 5min")
    if not seconds:
        raise ValueError(f"{words!r} is no time at all: more than none is asked for")
    return seconds


def bytes_of(words: str) -> int:
    """Bytes: MB is 10⁶, MiB is 2²⁰.

    Raises:
        ValueError: it is no size.
    """
    return round(_parsed(words, {unit: float(times) for unit, times in _SIZES.items()}, "size", "64MiB, 10MB"))


def bandwidth_of(words: str) -> float:
    """Bytes a second: Gbit is 10⁹ bits, with or without /s.

    Raises:
        ValueError: it is no bandwidth, or none at all.
    """
    rate = _parsed(words, _RATES, "bandwidth", "10Gbit, 500Mbit/s, 1.2GB/s, 800MiB/s")
    if not rate:
        raise ValueError(f"{words!r} is no bandwidth at all: more than none is asked for")
    return rate


def show_seconds(seconds: float) -> str:
    """In the unit that suits it."""
    for unit, least in (("min", 120.0), ("s", 1.0), ("ms", 1e-3)):
        if seconds >= least:
            return f"{seconds / _TIMES[unit]:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def show_bytes(nbytes: float) -> str:
    """Three digits and a unit: "4.19 MiB". Nothing is "0"."""
    if nbytes <= 0:
        return "0"
    value = float(nbytes)
    for unit in _SHOWN:
        if value < 999.5 or unit == _SHOWN[-1]:
            break
        value /= 1024
    if unit == "B":
        return f"{value:.0f} B"
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"


def show_bandwidth(rate: float) -> str:
    """Bits a second."""
    for unit in ("t", "g", "m", "k"):
        if rate * 8 >= _PREFIXES[unit]:
            return f"{rate * 8 / _PREFIXES[unit]:.3g} {unit.upper() if unit != 'k' else unit}bit/s"
    return f"{rate * 8:.3g} bit/s"

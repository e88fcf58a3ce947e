# SPDX-License-Identifier: MIT
"""What a manifest says of the process that it is the image of: whether it makes sense."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ..errors import InvalidCheckpoint

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from .manifests import RegionEntry

__all__ = ["require_program"]

_TOP = 1 << 64
_HEX = re.compile(r"(?:[0-9a-f]{2})*")
_DEVICE = re.compile(r"[0-9a-f]{2,}:[0-9a-f]{2,}")
_PERMISSIONS = re.compile(r"[r-][w-][x-][ps]")
_TEXTS = ("comm", "executable", "machine")
_REGISTERS = ("prstatus", "fpregset", "xstate")


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise InvalidCheckpoint(f"threads cannot be: {problem}")


def _is(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _is_hex(value: Any) -> bool:
    return isinstance(value, str) and _HEX.fullmatch(value) is not None


def _has(value: Any, names: Iterable[str], what: str) -> None:
    _require(isinstance(value, dict), f"{what} is no object")
    for name in names:
        _require(name in value, f"{what} has no {name!r}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def require_program(told: Any, page_bytes: int, regions: Iterable[RegionEntry]) -> None:
    """Refuse what a manifest says of a process where a reader could not rely on it; docs/checkpoint-format.md says how
    it is to be. Keys that are not known are passed over.

    Args:
        told: its field ``threads``, not null.
        page_bytes, regions: of the manifest.

    Raises:
        InvalidCheckpoint: it makes no sense; the message tells where.
    """
    _has(told, ("pid", *_TEXTS, "arguments", "page_bytes", "auxv", "frozen_at", "threads", "mappings"), "it")
    _require(_is(told["pid"], 1, 2**31 - 1), "pid is no process's number")
    for name in _TEXTS:
        _require(_is_text(told[name]), f"{name} is no string")
    arguments = told["arguments"]
    _require(isinstance(arguments, list) and all(map(_is_text, arguments)), "arguments is no list of strings")
    _require(told["page_bytes"] == page_bytes, "page_bytes is not the manifest's")
    _require(_is_hex(told["auxv"]), "auxv is not in hexadecimal digits")
    at: Any = told["frozen_at"]
    _require(type(at) in (int, float) and 0 <= at < 1e12, "frozen_at is no time")
    _require_threads(told["threads"])
    _require_mappings(told["mappings"], page_bytes, {region.number: region.nbytes for region in regions})


def _require_threads(threads: Any) -> None:
    _require(isinstance(threads, list) and bool(threads), "there are no threads")
    for thread in threads:
        _has(thread, ("tid", "name", "registers", "signal_mask"), "a thread")
        _require(_is(thread["tid"], 1, 2**31 - 1) and _is_text(thread["name"]), "a thread has no number or name")
        _require(_is_hex(thread["signal_mask"]), "a signal mask is not in hexadecimal digits")
        registers = thread["registers"]
        _has(registers, _REGISTERS[:1], "a thread's registers")
        _require(
            all(_is_hex(registers.get(name, "")) for name in _REGISTERS), "registers are not in hexadecimal digits"
        )


def _require_mappings(mappings: Any, page_bytes: int, regions: Mapping[int, int]) -> None:
    _require(isinstance(mappings, list), "mappings is no list")
    before = 0
    for each in mappings:
        _has(each, ("start", "end", "permissions", "offset", "device", "inode", "path", "saved", "why"), "a mapping")
        start, end = each["start"], each["end"]
        _require(_is(start, before, _TOP - 1) and _is(end, 0, _TOP) and start < end, "mappings overlap, or have no end")
        _require(not start % page_bytes and not end % page_bytes, "a mapping does not begin or end with a page")
        _require(_is(each["offset"], 0, _TOP) and _is(each["inode"], 0, _TOP), "a mapping's offset or inode is none")
        for name, pattern in (("permissions", _PERMISSIONS), ("device", _DEVICE)):
            value = each[name]
            _require(_is_text(value) and pattern.fullmatch(value) is not None, f"a mapping's {name} are none")
        _require(_is_text(each["path"]), "a mapping's path is no string")
        _require(each["why"] is None or _is_text(each["why"]), "a mapping's why is no string")
        _require_saved(each["saved"], end - start, regions)
        before = end


def _require_saved(saved: Any, nbytes: int, regions: Mapping[int, int]) -> None:
    if saved is None:
        return
    _require(isinstance(saved, list) and bool(saved), "a mapping's saved is no list, or empty")
    before = 0
    for part in saved:
        _require(isinstance(part, list) and len(part) == 4, "a part of a mapping is not four numbers")
        number, offset, length, within = part
        _require(all(_is(each, 0, _TOP) for each in part) and length > 0, "a part of a mapping is not four numbers")
        _require(before <= within and within + length <= nbytes, "parts of a mapping overlap, or lie outside of it")
        _require(offset + length <= regions.get(number, -1), "a part of a mapping is in no region")
        before = within + length

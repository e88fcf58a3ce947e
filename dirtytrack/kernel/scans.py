# SPDX-License-Identifier: MIT
"""PAGEMAP_SCAN on any page map's descriptor."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, NoReturn

from . import core, failures, sets

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Found", "refuse_hugetlb", "refuse_open", "scan"]


class Found(NamedTuple):
    """What a scan found, also where it failed midway: then why."""

    page_regions: memoryview
    walk_end: int
    error: Exception | None


def scan(fd: int, request: Mapping[str, int], pid: int | None) -> Found:
    """Scan, resumed until it is done.

    Args:
        fd: of /proc/PID/pagemap.
        request: the fields of dt_scan_request.
        pid: the process, where it is not this one.
    """
    ffi, lib = core.ffi, core.lib
    result = ffi.gc(ffi.new("dt_scan_result *"), lib.dt_scan_result_clear)
    code = lib.dt_pagemap_scan(fd, ffi.new("dt_scan_request *", dict(request)), result)
    error = failures.error_of(code, result.why, "scan the page map", pid=pid) if code else None
    return Found(sets.regions_view(result), result.walk_end, error)


def refuse_open(error: OSError, pid: int | None) -> NoReturn:
    """Raise what an OSError of opening /proc/PID/pagemap means."""
    why = core.new_failure()
    why.step = core.lib.DT_STEP_PAGEMAP
    raise failures.error_of(-(error.errno or 0), why, "open the page map", pid=pid) from error


def refuse_hugetlb(start: int, end: int) -> NoReturn:
    """Raise what an arming scan with a rich mask over hugetlb memory deserves."""
    why = core.new_failure()
    why.start, why.end = start, end
    failures.raise_failure(core.lib.DT_HUGETLB_MASK, why, "scan the page map")

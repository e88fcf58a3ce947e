# SPDX-License-Identifier: MIT
"""Mappings of processes: what kind of memory lies where."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, NamedTuple

from . import core

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Mapping", "first_hugetlb", "mapping_at", "mappings", "sys_is_there", "thp_bytes"]

_SHMEM = ("/memfd:", "/dev/shm/", "/dev/zero", "/SYSV")
_MEMORY_MANAGEMENT = "/sys/kernel/mm"
_THP_SIZE = f"{_MEMORY_MANAGEMENT}/transparent_hugepage/hpage_pmd_size"


class Mapping(NamedTuple):
    """A mapping of this process, [start, end)."""

    start: int
    end: int
    readable: bool
    writable: bool
    shared: bool
    inode: int
    page_bytes: int
    name: str

    @property
    def kind(self) -> str:
        """``anonymous``, ``shared`` (memory without a file system's file), ``file`` or ``hugetlb``."""
        if self.page_bytes > core.PAGE_BYTES:
            return "hugetlb"
        if self.name == "/dev/zero" and not self.shared:
            return "anonymous"
        if self.name.startswith(_SHMEM):
            return "shared" if self.shared else "file"
        if self.inode or self.name.startswith("/"):
            return "file"
        return "shared" if self.shared else "anonymous"

    def __str__(self) -> str:
        rights = "".join(c if on else "-" for c, on in (("r", self.readable), ("w", self.writable)))
        sharing = "shared" if self.shared else "private"
        return f"[{self.start:#x}, {self.end:#x}) {rights} {sharing} {self.name or '(anonymous)'}"


def mapping_at(address: int) -> Mapping | None:
    """The first mapping of this process that ends after ``address``, or None.

    Raises:
        OSError: /proc/self/maps cannot be read.
    """
    out = core.ffi.new("dt_mapping *")
    code = core.lib.dt_mapping_at(address, out)
    if code == -errno.ENOENT:
        return None
    if code:
        number = errno.ENOENT if code == -errno.ENODEV else -code  # the core keeps ENOENT for "no mapping"
        raise OSError(number, os.strerror(number), "/proc/self/maps")
    name = core.ffi.string(out.name).decode(errors="surrogateescape")
    rights = bool(out.readable), bool(out.writable), bool(out.shared)
    return Mapping(out.start, out.end, *rights, out.inode, out.page_bytes, name)


def mappings(start: int, end: int) -> Iterator[Mapping]:
    """The mappings of this process that touch [start, end), in order."""
    at = start
    while at < end:
        found = mapping_at(at)
        if found is None or found.start >= end:
            return
        yield found
        at = found.end


def first_hugetlb(process: str, start: int, end: int) -> tuple[int, int, int] | None:
    """The first hugetlb mapping that touches [start, end) of a process, as (start, end, page bytes), or None.

    Args:
        process: a name in /proc: ``self``, or a pid in decimal.
        start, end: addresses.

    Raises:
        OSError: /proc/PID/smaps cannot be read.
    """
    low = high = page_bytes = 0
    with open(f"/proc/{process}/smaps", "rb") as lines:
        for line in lines:
            word = line.split(None, 1)[0]
            if not word.endswith(b":"):
                low, high = (int(part, 16) for part in word.split(b"-"))
            elif low < end and high > start:
                if word == b"KernelPageSize:":
                    page_bytes = int(line.split()[1]) << 10
                elif word == b"VmFlags:" and b"ht" in line.split():
                    return low, high, page_bytes
    return None


def thp_bytes() -> int:
    """The size of a transparent huge page in bytes, or 0 where this kernel has none or `sys_is_there` is false."""
    try:
        with open(_THP_SIZE) as file:
            return int(file.read())
    except (OSError, ValueError):
        return 0


def sys_is_there() -> bool:
    """Whether /sys can be asked about huge pages: else it is not mounted, and what it does not name may be there."""
    return os.access(_MEMORY_MANAGEMENT, os.F_OK)

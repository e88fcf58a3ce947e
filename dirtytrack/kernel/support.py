# SPDX-License-Identifier: MIT
"""What this kernel can do, found by trying; why not; and how to mend it. Kernel versions are never compared."""

from __future__ import annotations

import errno
import os
import sys
from typing import NamedTuple

from ..errors import UnsupportedKernel
from . import core
from .abi import PageCategory, UffdFeature
from .engine import DOORS
from .failures import WAYS_TO_A_USERFAULTFD

__all__ = ["Check", "KernelSupport", "probe"]


class Check(NamedTuple):
    """One thing that tracking needs or profits from."""

    name: str
    ok: bool
    detail: str
    remedy: str
    """What mends it; empty where it is fine."""
    needed: bool = True
    """False: tracking works without it, by a detour."""


def _say(number: int) -> str:
    if not number:
        return "works"
    return f"{errno.errorcode.get(number, number)}: {os.strerror(number)}"


class KernelSupport(NamedTuple):
    """What `probe` found. Error numbers are 0 where a step worked or was not reached."""

    door: str | None
    """The first way that opened: ``userfaultfd user mode``, ``/dev/userfaultfd`` or ``userfaultfd full``; else None."""
    door_errnos: dict[str, int]
    """By way, each tried: 0 where it opened."""
    features: UffdFeature
    """As UFFDIO_API lists them, unknown bits included."""
    categories: PageCategory
    """The page categories that PAGEMAP_SCAN accepts, unknown bits included."""
    page_bytes: int
    api_errno: int
    """UFFDIO_API with WP_ASYNC and WP_UNPOPULATED."""
    pagemap_errno: int
    """Opening /proc/self/pagemap."""
    scan_errno: int
    """PAGEMAP_SCAN."""
    register_errno: int
    """UFFDIO_REGISTER of anonymous memory."""
    sees_stores: bool
    """A store to an armed page is reported, and once only."""
    sees_discards: bool
    """The exact scan reports a discarded page by itself; else an extra pass does (remedy R1)."""
    sees_untouched: bool
    """The exact scan reports never-touched memory by itself; else an extra pass does (remedy R1)."""
    maps_query: bool
    """PROCMAP_QUERY (Linux 6.11); else /proc/self/maps is read as text."""
    problem: str
    """Why the C core itself could not be loaded; else empty."""

    @property
    def tracking(self) -> bool:
        """Whether writes can be tracked at all."""
        return all(check.ok for check in self.checks() if check.needed)

    @property
    def why_not(self) -> str:
        """Why not, in one sentence; empty where tracking works."""
        for check in self.checks():
            if check.needed and not check.ok:
                return f"{check.name}: {check.detail}"
        return ""

    @property
    def remedies(self) -> tuple[str, ...]:
        """What mends it, most hopeful first; empty where tracking works."""
        for check in self.checks():
            if check.needed and not check.ok:
                return WAYS_TO_A_USERFAULTFD if check.remedy is _MANY else (check.remedy,)
        return ()

    def checks(self) -> list[Check]:
        """Each thing needed, in the order in which they depend on each other; what was not reached is left out."""
        found = [Check("C core", not self.problem, self.problem or "loaded", _CORE if self.problem else "")]
        if self.problem:
            return found
        found.append(self._check_door())
        if self.door is None:
            return found
        newer = "run Linux 6.7 or newer, built with CONFIG_USERFAULTFD and CONFIG_PTE_MARKER_UFFD_WP (x86-64 or arm64)"
        steps = [
            ("asynchronous write protection", self.api_errno, newer),
            ("/proc/self/pagemap", self.pagemap_errno, "mount /proc; the kernel needs CONFIG_PROC_PAGE_MONITOR"),
            ("PAGEMAP_SCAN", self.scan_errno, newer + "; a seccomp filter on ioctl must let it pass"),
            ("registering memory", self.register_errno, newer),
        ]
        for name, number, remedy in steps:
            found.append(Check(name, not number, _say(number), remedy if number else ""))
            if number:
                return found
        told = (
            "a store to an armed page is reported, once" if self.sees_stores else "a store to an armed page went unseen"
        )
        report = "report this kernel with the output of `dirtytrack doctor --json`"
        found.append(Check("stores", self.sees_stores, told, "" if self.sees_stores else report))
        sees = self.sees_discards and self.sees_untouched
        by = "reported by the scan itself" if sees else "found by an extra pass before each collect, slower"
        fixed = "Linux 6.12.103, 6.18.44, 7.1.8 and later report them by themselves"
        found.append(Check("discarded and untouched pages", sees, by, "" if sees else fixed, needed=False))
        by = "asked of the kernel" if self.maps_query else "read as text, slower with many mappings"
        found.append(
            Check("mappings", self.maps_query, by, "" if self.maps_query else "Linux 6.11 can be asked", needed=False)
        )
        return found

    def _check_door(self) -> Check:
        if self.door is not None:
            return Check("userfaultfd", True, f"opened as {self.door}", "")
        tried = "; ".join(f"{way}: {_say(number)}" for way, number in self.door_errnos.items())
        numbers = set(self.door_errnos.values())
        if numbers & {errno.EPERM, errno.EACCES}:
            return Check("userfaultfd", False, tried, _MANY)
        if numbers & {errno.EMFILE, errno.ENFILE}:
            return Check("userfaultfd", False, tried, "raise the limit of open files (ulimit -n) or close some")
        return Check("userfaultfd", False, tried, "run a kernel built with CONFIG_USERFAULTFD (Linux 6.7 or newer)")


_CORE = "install dirtytrack on Linux from a wheel, or from source with a C compiler and the Python headers"
_MANY = "any of: " + "; ".join(WAYS_TO_A_USERFAULTFD)


def probe() -> KernelSupport:
    """Find out what this kernel can do, by trying on memory and descriptors of its own.

    Returns:
        The report, on every platform: where nothing works it says why. Costs about a millisecond, and keeps nothing.

    Thread safety: may be called from any thread.
    """
    try:
        core.load()
    except (UnsupportedKernel, ImportError) as error:
        nothing = dict.fromkeys(DOORS[1:], errno.ENOSYS)
        none = UffdFeature(0), PageCategory(0), core.PAGE_BYTES
        return KernelSupport(None, nothing, *none, 0, 0, 0, 0, False, False, False, False, str(error))
    out = core.ffi.new("dt_support *")
    core.lib.dt_probe(out)
    return KernelSupport(
        DOORS[out.door] or None,
        {DOORS[i]: out.door_errno[i] for i in range(1, len(DOORS))},
        UffdFeature(out.features),
        PageCategory(out.categories),
        out.page_bytes,
        out.api_errno,
        out.pagemap_errno,
        out.scan_errno,
        out.register_errno,
        bool(out.sees_stores),
        bool(out.sees_discards),
        bool(out.sees_untouched),
        bool(out.maps_query),
        "",
    )


def system() -> dict[str, str]:
    """Where this runs: for reports of bugs."""
    name = os.uname() if hasattr(os, "uname") else None
    return {
        "system": name.sysname if name else sys.platform,
        "release": name.release if name else "",
        "machine": name.machine if name else "",
        "python": sys.version.split()[0],
    }

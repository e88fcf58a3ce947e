# SPDX-License-Identifier: MIT
"""Which kernels are booted, and which tests run there: decided in this one place."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["DESELECTED", "FIRST", "KNOWN", "OF_SOUND_KERNELS", "SMOKE", "SMOKE_TESTS", "WANTED", "Wanted"]


class Wanted(NamedTuple):
    """A kernel of Debian's; where the archive no longer has it, the nearest of its series is taken."""

    version: str
    """As in the package's name. ``6.1.0-*`` or ``7.3.*``: the newest of the series."""
    suite: str
    """Of Debian's archive; `-security` suites are searched beside it."""
    architecture: str = "amd64"
    why: str = ""


WANTED = (
    Wanted("6.1.0-*", "bookworm", why="Debian 12; older than asynchronous write protection"),
    Wanted("6.12.43+deb12", "bookworm-backports", why="hides freed page tables; one way to hang in the scan"),
    Wanted("6.12.*", "trixie", why="Debian 13"),
    Wanted("6.18.*", "trixie-backports", why="the newest of the series in the archive"),
    Wanted("7.1.3+deb13", "trixie-backports", why="hides freed page tables; one way to hang in the scan"),
    Wanted("7.1.*", "trixie-backports", why="the newest of the series in the archive"),
    Wanted("7.3.*", "trixie-backports", why="the newest in the archive"),
    Wanted("6.12.43+deb12", "bookworm-backports", "arm64", why="hides freed page tables, on arm64"),
    Wanted("6.12.*", "trixie", "arm64", why="Debian 13 on arm64"),
    Wanted("7.3.*", "trixie-backports", "arm64", why="the newest in the archive, on arm64"),
)

SMOKE = WANTED[1]
"""Most kernels in use need the remedies that it needs. `make kernels-smoke` boots it; CI boots none."""
SMOKE_TESTS = ("tests/kernel/conformance/test_discards.py", "tests/kernel/test_unseen.py")

FIRST = (
    "tests/kernel/conformance/test_discards.py",
    "tests/kernel/test_unseen.py",
    "tests/kernel/test_unseen_flights.py",
    "tests/kernel/test_contract.py",
    "tests/kernel/test_contract_gone.py",
    "tests/kernel/conformance/test_huge_pages.py",
    "tests/kernel/conformance/test_pressure.py",
    "tests/kernel/test_memory.py",
    "tests/kernel/test_pagemap.py",
    "tests/kernel/test_blind_spots.py",
    "tests/kernel/test_declaring.py",
    "tests/kernel/conformance/test_moves.py",
    "tests/kernel/conformance/test_base.py",
    "tests/kernel/conformance/test_transact.py",
    "tests/kernel/failures",
)
"""These first: what differs between kernels, should the time not suffice for all. Then all others."""

DESELECTED: dict[str, str] = {
    "tests/kernel/test_memory.py::test_trackers_go_on_when_memory_grows[4096-Kind.HUGE]": (
        "grows to 8 GiB: the machines have 3"
    ),
    "tests/kernel/conformance/test_pressure.py::test_swap_is_put_off_beneath_a_tracker": (
        "takes for granted which of two swap files a page goes to; a kernel may have places of the other at hand"
    ),
    "tests/kernel/test_contract_threads.py::test_dropped_in_any_order_nothing_stays": (
        "18 s each on a processor of its own: minutes under emulation, and the time-out ends it"
    ),
    "tests/kernel/checkpoint/test_ranks_mpi.py": "programs of several processes: minutes under emulation",
    "tests/kernel/test_examples.py::test_an_example_checks_itself[ranks_simulation]": "the same",
    "tests/unit/test_packaging.py": "builds wheels: needs pip's network and a whole toolchain",
    "tests/unit/test_docs.py": "tells of the sources, not of the kernel; runs make and git",
    "tests/unit/test_layers.py": "tells of the sources, not of the kernel",
    "tests/unit/test_support_matrix.py": "tells of what came of these runs",
    "tests/unit/test_abi.py": "tells of the sources and of the build, not of the kernel",
}
"""What is not run there: a file, or the beginning of a test's id; and why."""

OF_SOUND_KERNELS: dict[str, str] = {
    "tests/kernel/conformance/test_huge_pages.py::test_a_zapped_shared_huge_page_is_dirty": (
        "asks the kernel itself, without a session: a HOLEY one does not report it, which is what remedy R1 is for"
    ),
    "tests/kernel/conformance/test_registering.py::test_a_hole_in_a_range_is_passed_over": (
        "the same: memory that was never touched is not armed by its first scan"
    ),
    "tests/kernel/conformance/test_base.py::test_the_base_cases_on_a_gibibyte_page": (
        "asks the kernel itself, without a session: one that takes a page of 1 GiB for a part of one passes over it "
        "when it arms, so trackers ask without arming first"
    ),
}
"""What a HOLEY kernel fails, and should: the beginning of a test's id, and why. No tracker may be in such a test."""

KNOWN: dict[str, str] = {
    "c:test_sets: status 1: 58532 passed, 2 failed": (
        "arm64 ignores the top byte of an address, and a scan up to 1 << 63 was not refused as a whole: mended since, "
        "not run again there"
    ),
    "FAILED tests/kernel/conformance/test_kernel_writes.py::test_a_debugger_writes_to_memory_that_is_read_only": (
        "the test took for granted that /proc/self/mem overrides the rights of memory: mended since, not run again "
        "there"
    ),
    "FAILED tests/kernel/failures/test_state.py::test_ctrl_c_in_a_collect": (
        "the test was behind the code, on every kernel: mended since, not run again there"
    ),
    "FAILED tests/kernel/test_contract_shared.py::test_statistics_count_what_was_done": (
        "the test counted scans as SOUND kernels need them, and R1 takes another one: mended since, not run again there"
    ),
    "FAILED tests/kernel/test_contract_threads.py::test_dropped_in_any_order_nothing_stays": (
        "18 s on a processor of its own, and minutes under emulation: the time-out ended it; not run there any more"
    ),
    "FAILED tests/kernel/failures/test_gone.py::test_a_process_that_is_not_there": (
        "once in one run, not found out why: by all that is known of the kernel, something else still had a hold of "
        "the address space of the process when it was asked for; the test waits for that since, not run again there"
    ),
    "pytest: status 139": "the same test left the heap without the right to write it",
}
"""Problems that are known, by their beginning, and what is behind each."""

# SPDX-License-Identifier: MIT
"""Which kernels are booted, and which tests run there: decided in this one place."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ASKING", "DESELECTED", "FIRST", "KNOWN", "OF_SOUND_KERNELS", "SMOKE", "WANTED", "Wanted"]


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
"""Most kernels in use need the remedies that it needs. `make kernels-smoke`, which is in CI too, boots it for the C
tests that ask the kernel: with Python's it would take more than the minute that it may."""

ASKING = ("test_engine", "test_kinds", "test_moving", "test_scans")
"""The C tests that ask the kernel. The others compute, which takes minutes under emulation: they run on the machine
itself, and in the kernels of other architectures."""

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

_PROGRAMS = "whole programs upon the engine, in many processes or for many rounds: an hour under emulation"
_COMPARED = "compares, which asks the kernel nothing: with threads on one emulated processor half an hour"
_OURS = "fails or interrupts what is ours, the same on every kernel: some with remedies run there"
_TESTED = "tests the test, with an engine or a remedy that is broken on purpose: minutes under emulation"
_LOADED = "many threads, of which an emulated processor runs one at a time: the plain ones of them run there"
_ABSENT = "test_each_call_of_an_operation_fails_once_where_absent_pages_are_looked_for"
_WEATHERS = ("private company", "private wide", "shared company", "transparent company")
_VARIANTS = ("replaced", "suspended", "discarded", "gone")
_CHECKPOINTS = ("behind", "going_on", "killed", "left", "model", "object_stores", "ranks", "real", "zarr_writer")
_COLLECTORS = ("barriers", "c_surface", "heap", "remembered_model", "stress")
_MIGRATIONS = ("hostile", "kills", "links", "riders", "trust")

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
    "tests/kernel/test_contract_threads.py::test_of_collects_at_once_each_page_goes_to_exactly_one[compare": _COMPARED,
    "tests/kernel/test_contract_threads.py::test_listeners_and_regions_come_and_go_in_threads_while_others_write[com": (
        _COMPARED
    ),
    **dict.fromkeys(
        (
            "tests/kernel/test_injection.py::test_each_call_of_an_operation_fails_once[",
            *(f"tests/kernel/test_injection.py::{_ABSENT}[{variant}" for variant in _VARIANTS),
            "tests/kernel/test_injection.py::test_from_each_call_on_all_fail_and_then_no_more",
            "tests/kernel/test_delivery.py",
        ),
        _OURS,
    ),
    **dict.fromkeys(
        (
            "tests/kernel/test_model.py::test_a_broken_engine_is_found_out",
            "tests/kernel/test_model.py::test_a_remedy_that_is_off_is_found_out",
            "tests/kernel/test_storm.py::test_each_check_finds_each_kind_of_loss",
            "tests/kernel/test_storm.py::test_a_write_that_nobody_saw_nor_declared_is_found",
        ),
        _TESTED,
    ),
    **dict.fromkeys(
        (
            *(f"tests/kernel/test_storm.py::test_no_store_is_lost[{weather}" for weather in _WEATHERS),
            "tests/kernel/test_threads.py::test_a_fork[while_another_thread_is_anywhere",
        ),
        _LOADED,
    ),
    "tests/kernel/test_model.py::test_the_machine_and_the_model_agree_where_blocks_are_assumed": (
        "which blocks are not asked about is ours to choose, the same on every kernel"
    ),
    "tests/unit": "tells of the sources and of what is computed from a set, not of the kernel",
    "tests/kernel/test_demo.py": _PROGRAMS,
    "tests/kernel/test_examples.py": _PROGRAMS,
    **dict.fromkeys((f"tests/kernel/checkpoint/test_{name}" for name in _CHECKPOINTS), _PROGRAMS),
    **dict.fromkeys((f"tests/kernel/gc/test_{name}" for name in _COLLECTORS), _PROGRAMS),
    **dict.fromkeys((f"tests/kernel/migration/test_{name}" for name in _MIGRATIONS), _PROGRAMS),
}
"""What is not run there: a folder, a file, or the beginning of a test's id; and why."""

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

KNOWN: dict[str, str] = {}
"""Problems that are known, by their beginning, and what is behind each."""

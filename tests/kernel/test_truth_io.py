# SPDX-License-Identifier: MIT
"""The rows of `dirtytrack doctor --truth` in which the kernel or a device writes: done, compared, and told where not.

Takes 1 s of CI's 20 min.
"""

from __future__ import annotations

import json
from contextlib import ExitStack

import pytest

from dirtytrack.cli import truth
from dirtytrack.cli.truth import Row
from dirtytrack.cli.truth_events import EVENTS
from dirtytrack.kernel import trial_io
from dirtytrack.kernel.trial import KINDS, NotHere
from tests.kernel.host import HUGE_PAGE, POOLS, machine_lock
from tests.sandbox import run_in_child

pytestmark = pytest.mark.unsanitized(
    "filters, limits and time-outs of processes that the sanitizer slows and maps into"
)

ALONE, TRACKED, TOLD = truth.WAYS
SEEN = ("process_vm_writev", "read(2) that began before the arming", "read by O_DIRECT", "read by io_uring")
REGISTERED = "read by io_uring into a registered buffer"
IN_PART = "hole punched in part of a page"
KINDS_PINNED = {"anonymous", "transparent huge", "memfd shared", "hugetlb private", "hugetlb shared"}


@pytest.fixture(scope="module")
def table() -> dict[str, list[Row]]:
    """By event."""
    chosen = [event for event in EVENTS if event.name in (*SEEN, REGISTERED, IN_PART)]
    with ExitStack() as stack:
        stack.enter_context(machine_lock())
        POOLS[HUGE_PAGE].ensure(4)
        made: dict[str, list[Row]] = {event.name: [] for event in chosen}
        for row in truth.rows(chosen):
            made[row.event.name].append(row)
    return made


@pytest.mark.parametrize("name", SEEN)
def test_what_the_kernel_writes_is_seen_by_each_way(table: dict[str, list[Row]], name: str) -> None:
    assert len(table[name]) >= 2
    for row in table[name]:
        if row.kind.name == "transparent huge shared" and "not_here" in row.outcomes[ALONE]:
            continue  # that its pages are huge is arranged in test_truth
        for outcome in row.outcomes.values():
            assert (outcome["changed"], outcome["missed"]) == (1, 0), row


def test_a_pinned_buffer_is_written_unseen(table: dict[str, list[Row]]) -> None:
    """Should a kernel see it one day, `in_flight` is no longer needed for it."""
    assert {row.kind.name for row in table[REGISTERED]} == KINDS_PINNED
    for row in table[REGISTERED]:
        assert not truth.broken(row), "it is documented"
        for outcome in row.outcomes.values():
            assert (outcome["changed"], outcome["missed"], outcome["extra"]) == (1, 1, 0), row


def test_a_hole_in_part_of_a_page_is_written_unseen(table: dict[str, list[Row]]) -> None:
    """The page stays, and stays armed: a write through a descriptor, as `region.blind_spots` has it."""
    [row] = table[IN_PART]
    assert not truth.broken(row), "it is documented"
    for outcome in row.outcomes.values():
        assert (outcome["changed"], outcome["missed"]) == (1, 1), row


def reads_by_ring() -> None:
    [event] = [event for event in EVENTS if event.name == REGISTERED]
    [row] = truth.rows([event._replace(kinds=("anonymous",))], [TRACKED])
    print(json.dumps(row.outcomes[TRACKED]))
    with KINDS["anonymous"].make(8) as area, pytest.raises(NotHere, match="io_uring_setup: EPERM"):
        trial_io.read_by_ring(area)


def test_a_container_without_io_uring() -> None:
    told = json.loads(run_in_child(reads_by_ring, "seccomp-no-io-uring"))
    assert told["not_here"] == "io_uring_setup: EPERM, Operation not permitted"

# SPDX-License-Identifier: MIT
"""`dirtytrack doctor --truth` tells the truth: of this kernel, and of a tracker whose remedies are off.

The whole table is made once, with huge pages of each sort provided. Takes about 10 s of CI's 20 min.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import psutil
import pytest

from dirtytrack.cli import doctor, main, truth
from dirtytrack.cli.doctor_apart import Job, run_apart
from dirtytrack.cli.truth import Registering, Row
from dirtytrack.cli.truth_events import EVENTS, REGISTERED
from dirtytrack.kernel.trial import KINDS, knows_guard_pages
from tests.kernel.host import HUGE_PAGE, POOLS, machine_lock, setting
from tests.sandbox import run_in_child

pytestmark = pytest.mark.unsanitized(
    "filters, limits and time-outs of processes that the sanitizer slows and maps into"
)

ALONE, TRACKED, TOLD = truth.WAYS
SHARED_HUGE = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


@pytest.fixture(scope="module")
def table() -> list[Row]:
    """The table, with nothing left out for want of huge pages."""
    with ExitStack() as stack:
        stack.enter_context(machine_lock())
        POOLS[HUGE_PAGE].ensure(8)
        stack.enter_context(setting(SHARED_HUGE, "advise"))
        before = settings()
        made = list(truth.rows())
        assert settings() == before, "the doctor changes nothing"
    return made


@pytest.fixture(scope="module")
def registered() -> list[Registering]:
    with machine_lock():
        POOLS[HUGE_PAGE].ensure(4)
        return list(truth.registering())


def settings() -> dict[str, str]:
    folders = ("/proc/sys/vm", "/sys/kernel/mm/transparent_hugepage", "/sys/kernel/mm/ksm")
    paths = [path for folder in folders for path in Path(folder).glob("*") if os.access(path, os.R_OK)]
    counted = {"stat_refresh", "full_scans", "pages_scanned"}
    return {str(path): path.read_text() for path in paths if path.is_file() and path.name not in counted}


# ---- the table ------------------------------------------------------------------------------------------------------


def test_every_row_was_tried(table: list[Row]) -> None:
    """What this machine can provide is there, and only guard pages may be missing: they came with Linux 6.13."""
    assert [(row.event, row.kind) for row in table] == [(e, KINDS[name]) for e in EVENTS for name in e.kinds]
    left_out = [
        (row.event.name, row.kind.name, outcome["not_here"])
        for row in table
        for outcome in row.outcomes.values()
        if "not_here" in outcome and not (row.event.name.startswith("guard") and not knows_guard_pages())
    ]
    assert not left_out


def test_nothing_is_missed_that_no_document_names(table: list[Row]) -> None:
    missed = {(row.event.name, row.kind.name): row.outcomes for row in table if truth.broken(row)}
    assert not missed, missed


def test_what_is_called_blind_is_not_seen(table: list[Row]) -> None:
    """Should a row fail one day, that kernel sees it, and the blind spot can be taken back."""
    # Of a shared file with huge pages R2 takes more than was written: all that is not present, as soon as one page is.
    blind = [row for row in table if row.event.blind and row.kind.name != "transparent huge shared"]
    assert len(blind) == 26
    assert not [row for row in blind if not row.outcomes[TRACKED]["missed"]]


def test_stores_are_seen_by_each_way(table: list[Row]) -> None:
    stores = [row for row in table if row.event.name in ("store", "read(2) into it", "write to /proc/self/mem")]
    assert len(stores) == 27
    for row in stores:
        for outcome in row.outcomes.values():
            assert (outcome["changed"], outcome["missed"]) == (1, 0), row
            if row.kind.name != "transparent huge shared":
                assert outcome["extra"] == (511 if "hugetlb" in row.kind.name else 0), row


@pytest.mark.parametrize("kind", ["memfd shared", "file shared", "hugetlb shared"])
def test_a_remedy_is_named_where_the_scan_misses(table: list[Row], kind: str) -> None:
    [row] = [row for row in table if row.event.name == "hole punched" and row.kind.name == kind]
    assert row.outcomes[ALONE]["missed"] == row.outcomes[ALONE]["changed"] > 0
    assert row.outcomes[TRACKED]["missed"] == 0
    assert "R2" in row.outcomes[TRACKED]["by"]


def test_events_tell_of_discards(table: list[Row]) -> None:
    rows = [row for row in table if row.event.name in ("MADV_DONTNEED, then read", "MADV_REMOVE, then read")]
    assert len(rows) == 8
    for row in rows:
        assert row.outcomes[TOLD]["missed"] == 0, row
        assert "event" in row.outcomes[TOLD]["by"]


def test_moved_memory_is_told_of(table: list[Row]) -> None:
    moved = [row for row in table if row.event.name == "moved by mremap"]
    assert moved
    assert all(outcome == {"told": "RegionGone"} for row in moved for outcome in row.outcomes.values())


def test_which_memory_can_be_registered(registered: list[Registering]) -> None:
    answers = {kind.name: outcome for kind, outcome in registered}
    assert tuple(answers) == REGISTERED
    refused = {"file shared, opened read-only": "InvalidMemory, EPERM"}
    if "refused" in answers["MAP_DROPPABLE"]:  # some kernels take it
        refused["MAP_DROPPABLE"] = "InvalidMemory, EINVAL"
    assert {name: outcome["refused"] for name, outcome in answers.items() if "refused" in outcome} == refused
    assert answers["hugetlb private"]["granule_bytes"] == answers["hugetlb shared"]["granule_bytes"] == HUGE_PAGE
    assert not [outcome for outcome in answers.values() if "failed" in outcome]


def test_markdown_has_a_line_for_each_row(table: list[Row], registered: list[Registering]) -> None:
    text = truth.markdown("a kernel", registered, table)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(registered) + 2 + len(table)
    assert {line.count(" | ") for line in lines[: 2 + len(registered)]} == {1}
    assert {line.count(" | ") for line in lines[2 + len(registered) :]} == {4}
    assert "| hole punched, then read | memfd shared | **MISSED 1 of 1** | blind spot | blind spot |" in lines
    assert "| store | hugetlb private | seen 1, +511 | seen 1, +511 | seen 1, +511 |" in lines


# ---- when something is wrong ----------------------------------------------------------------------------------------

SOME = [
    event._replace(kinds=tuple(name for name in event.kinds if name in ("memfd shared", "memfd private", "anonymous")))
    for event in EVENTS
    if event.hole
]
OFF = {"R2": 4, "aliases": 8, "all of them": 14}


@pytest.mark.parametrize("off", OFF)
def test_a_remedy_that_is_off_is_found_out(
    off: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(truth.WAYS, TRACKED, {"_remedy": OFF[off]})
    assert [row for row in truth.rows(SOME, (ALONE, TRACKED)) if truth.broken(row)]
    monkeypatch.setattr(doctor, "rows", partial(truth.rows, SOME))
    assert main(["doctor", "--truth"]) == 1
    assert "A change was missed that no document names" in capsys.readouterr().out
    assert main(["doctor", "--truth", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["missed"] is True


def test_the_doctor_says_so_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(truth.WAYS, TRACKED, {"_remedy": 14})
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "  NO  hole punched (memfd shared" in out
    assert "MISSED in spite of the remedies" in out
    assert "Tracking works, but a change was missed" in out


def some_rows() -> int:
    outcomes = list(truth.rows(SOME))
    print(len(outcomes))
    return int(any(truth.broken(row) or "not_here" in row.outcomes[TRACKED] for row in outcomes))


def test_an_unprivileged_user_gets_the_same() -> None:
    assert int(run_in_child(some_rows, "nobody")) == sum(len(event.kinds) for event in SOME)
    assert int(run_in_child(some_rows, "nobody", "64-descriptors")) == sum(len(event.kinds) for event in SOME)


# ---- jobs in a process of their own ---------------------------------------------------------------------------------


def fine() -> dict[str, int]:
    return {"process": os.getpid()}


def raises() -> dict[str, int]:
    raise ValueError("no")


def hangs() -> dict[str, int]:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    while True:
        time.sleep(60)


def is_killed() -> dict[str, int]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def leaves() -> dict[str, int]:
    os._exit(3)


def children() -> set[int]:
    """This process's, those included that have ended and were not waited for."""
    return {child.pid for child in psutil.Process().children()}


def test_each_job_gets_a_process_that_works() -> None:
    before = children()
    jobs = [fine, fine, raises, fine, hangs, fine, is_killed, leaves, fine]
    first, second, *rest = run_apart([Job(job, 0.3 if job is hangs else 30) for job in jobs])
    assert first == second, "one process for as long as it lasts"
    assert first["process"] != os.getpid()
    last = [result for result in rest if "process" in result]
    assert len(last) == 3
    assert len({result["process"] for result in (first, *last)}) == 4
    assert [result["failed"] for result in rest if "failed" in result] == [
        "ValueError: no",
        "did not return within 0.3 s",
        "ended its process by SIGKILL",
        "ended its process by an exit",
    ]
    assert children() == before


def test_an_interrupted_table_leaves_no_process() -> None:
    before = children()
    results = run_apart([Job(fine), Job(hangs)])
    assert isinstance(results, Iterator)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert children() == before

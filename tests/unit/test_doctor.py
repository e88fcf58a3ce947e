# SPDX-License-Identifier: MIT
"""`dirtytrack doctor` tells what is there, what is not, and what mends it; its exit status is 0 only where it works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dirtytrack
from dirtytrack import PageCategory, UffdFeature
from dirtytrack.cli import doctor, main
from dirtytrack.cli.doctor_costs import compare_costs, costs, instead
from dirtytrack.kernel import core
from dirtytrack.kernel.trial import knows_guard_pages
from tests.sandbox import run_in_child


def says() -> int:
    return main(["doctor"])


def says_as_json() -> int:
    return main(["doctor", "--json"])


def report(*restrictions: str, status: int = 0) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(run_in_child(says_as_json, *restrictions, status=status))
    assert told["tracking"] is (status == 0)
    assert bool(told["why_not"]) is bool(told["remedies"]) is (status != 0)
    for check in told["checks"]:
        assert check["name"]
        assert check["detail"]
        assert bool(check["remedy"]) is not check["ok"]
    assert all(check["ok"] for check in told["checks"] if check["needed"]) is (status == 0)
    return told


@pytest.mark.tracking
@pytest.mark.parametrize(
    "command", [[Path(sys.executable).parent / "dirtytrack"], [sys.executable, "-m", "dirtytrack"]]
)
def test_the_command_says_that_tracking_works(command: list[str | Path]) -> None:
    if not Path(command[0]).exists():
        command = [sys.executable, "-m", "dirtytrack"]
    done = subprocess.run([*command, "doctor"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    assert done.stdout.endswith("Tracking works.\n")
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert '  ok  backend="compare", a collect of 1 GiB: ' in done.stdout
    for name in ("C core", "userfaultfd", "PAGEMAP_SCAN", "stores"):
        assert f"  ok  {name}: " in done.stdout
    headings = [line for line in done.stdout.splitlines() if line and line[0] != " "]
    assert headings[1:] == ["Permissions", "Container", "Limits", "Holes, each tried", "Costs", "Tracking works."]
    assert "  ok  MADV_DONTNEED (anonymous" in done.stdout
    assert "  --  write(2) to the file (memfd shared" in done.stdout
    assert ("  --  guard pages: " in done.stdout) is knows_guard_pages()


@pytest.mark.tracking
def test_the_report_is_what_probe_found() -> None:
    told = report()
    support = dirtytrack.probe()
    assert told["version"] == dirtytrack.__version__
    assert told["kernel"]["door"] == support.door
    assert told["kernel"]["page_bytes"] == core.PAGE_BYTES
    assert told["kernel"]["features"]["bits"] == support.features
    assert {"WP_ASYNC", "WP_UNPOPULATED"} <= set(told["kernel"]["features"]["names"])
    assert {"WRITTEN", "PRESENT", "WPALLOWED"} <= set(told["kernel"]["categories"]["names"])
    assert {"system", "release", "machine", "python"} <= told.keys()
    assert {check["name"] for check in told["permissions"]} >= {*support.door_errnos, "dumpable", "seccomp"}
    assert told["missed"] is False
    assert {hole["verdict"] for hole in told["holes"]} >= {"seen", "found", "blind"}
    assert {hole["memory"] for hole in told["holes"]} >= {
        "anonymous",
        "memfd shared",
        "file private",
        "hugetlb private",
    }
    for hole in told["holes"]:
        if "registered buffer" in hole["event"] and hole["verdict"] == "blind":
            assert "in_flight()" in hole["detail"], "a device writes until it is done"
            assert "mark_dirty()" not in hole["detail"]
    for cost in told["costs"]:
        assert bool(cost["why_not"]) is (cost["measured"] is None)
    assert [cost["name"] for cost in told["costs"] if cost["measured"] is not None][:2] == [
        "first store to an armed page",
        "idle collect, a page",
    ]


@pytest.mark.tracking
def test_an_unprivileged_user_can_track() -> None:
    assert report("nobody")["kernel"]["door"] == "userfaultfd user mode"
    assert "Tracking works." in run_in_child(says, "nobody")


@pytest.mark.tracking
@pytest.mark.parametrize("restrictions", [("no-device", "seccomp-eperm"), ("nobody", "seccomp-eperm")])
def test_forbidden_by_a_filter_and_no_device(restrictions: tuple[str, ...]) -> None:
    told = report(*restrictions, status=1)
    assert "EPERM" in told["why_not"]
    assert told["kernel"]["door"] is None
    ways = " ".join(told["remedies"])
    for word in ("--device /dev/userfaultfd", "seccomp", "chmod"):
        assert word in ways
    for no_cure in ("sysctl", "CAP_SYS_PTRACE"):
        assert no_cure not in ways, "a filter is in the way"
    text = run_in_child(says, *restrictions, status=1)
    assert "Tracking does not work." in text
    assert "NO  userfaultfd" in text
    assert text.count("  * ") == len(told["remedies"])
    assert 'track(..., backend="compare")' in told["remedies"][-1], "opt-in, and with its price"
    assert "ms a GiB, and takes 1,024 MiB for it" in told["remedies"][-1]
    assert "and 4 MiB" in told["remedies"][-1]
    assert len(told["compare_costs"]) == 4
    assert not told["costs"]


@pytest.mark.tracking
def test_forbidden_by_a_filter_but_there_is_the_device() -> None:
    try:
        with open("/dev/userfaultfd", "rb+", buffering=0):
            pass
    except OSError:
        assert report("seccomp-eperm", status=1)["kernel"]["door"] is None
        return
    told = report("seccomp-eperm")
    assert told["kernel"]["door"] == "/dev/userfaultfd"
    assert told["kernel"]["door_errnos"]["userfaultfd user mode"]


@pytest.mark.tracking
@pytest.mark.parametrize(
    ("restrictions", "check", "remedy"),
    [
        (("no-device", "seccomp-enosys"), "userfaultfd", "CONFIG_USERFAULTFD"),
        (("no-wp-async",), "asynchronous write protection", "6.7"),
        (("no-pagemap-scan",), "PAGEMAP_SCAN", "6.7"),
        (("no-proc",), "/proc/self/pagemap", "mount /proc"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_an_old_kernel_lacks(restrictions: tuple[str, ...], check: str, remedy: str) -> None:
    told = report(*restrictions, status=1)
    assert told["why_not"].startswith(f"{check}: ")
    assert remedy in " ".join(told["remedies"])
    assert told["checks"][-1]["name"] == check, "what depends on it was not reached"


def uses_every_descriptor() -> int:
    with pytest.raises(OSError, match="open files"):
        for _ in range(1 << 20):
            os.open("/dev/null", os.O_RDONLY)
    return says_as_json()


@pytest.mark.tracking
def test_no_descriptor_is_left() -> None:
    told = json.loads(run_in_child(uses_every_descriptor, "64-descriptors", status=1))
    assert "EMFILE" in told["why_not"]
    assert "ulimit -n" in " ".join(told["remedies"])


def test_nothing_is_measured_where_memory_is_short() -> None:
    found = list(costs(100 << 20))
    assert [cost.measured for cost in found] == [None] * 5
    assert {cost.why_not for cost in found} == {"MemoryError: less than 128 MiB left in the memory cgroup"}
    told = [cost._asdict() for cost in compare_costs(100 << 20)]
    assert [cost["measured"] for cost in told] == [None] * 4
    assert "backend=" in instead(told)


def test_another_platform(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(core, "_loaded", False)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert main(["doctor"]) == 1
    assert "darwin" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["tracking"] is False


def test_bits_that_this_version_does_not_know_are_told() -> None:
    support = dirtytrack.probe()
    support = support._replace(
        features=UffdFeature(support.features | 1 << 40 | UffdFeature.WP_ASYNC),
        categories=PageCategory(PageCategory.WRITTEN | 1 << 41),
    )
    told = json.loads(json.dumps(doctor.report(support)))
    assert told["kernel"]["features"]["bits"] & 1 << 40
    assert hex(1 << 40) in told["kernel"]["features"]["names"]
    assert "WP_ASYNC" in told["kernel"]["features"]["names"]
    assert told["kernel"]["categories"]["names"] == ["WRITTEN", hex(1 << 41)]

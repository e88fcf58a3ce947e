# SPDX-License-Identifier: MIT
"""The doctor names the cause, each provoked for real in a process of its own. Takes about 6 s of CI's 20 min."""

from __future__ import annotations

import json
import mmap
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dirtytrack import probe
from dirtytrack.cli import doctor_surroundings, main
from tests import oracle
from tests.kernel.host import HUGE_PAGE, POOLS, NotHere, machine_lock, setting
from tests.oracle import PAGE
from tests.sandbox import DEVICE, check, libc, run_in_child

pytestmark = pytest.mark.unsanitized(
    "filters, limits and time-outs of processes that the sanitizer slows and maps into"
)

_CLONE_NEWUSER = 0x10000000
Told = dict[str, Any]


def as_json() -> int:
    """The part that tries nothing but doors."""
    support = probe()
    print(json.dumps({"tracking": support.tracking, **doctor_surroundings.surroundings(support)}))
    return not support.tracking


def holes_as_json() -> int:
    return main(["doctor", "--json"])


def as_text() -> int:
    return main(["doctor"])


def of(told: Told, section: str, name: str) -> Told:
    [check] = [check for check in told[section] if check["name"] == name]
    assert isinstance(check, dict)
    assert check["remedy"] or check["ok"], "what is not fine can be mended"
    return check


# ---- permissions ----------------------------------------------------------------------------------------------------


def test_an_ordinary_user() -> None:
    told = json.loads(run_in_child(as_json, "nobody"))
    assert of(told, "permissions", "userfaultfd user mode")["ok"]
    device = of(told, "permissions", DEVICE)
    everybody = stat.S_IROTH | stat.S_IWOTH
    if Path(DEVICE).exists() and Path(DEVICE).stat().st_mode & everybody != everybody:
        assert device["detail"].startswith("EACCES")
        assert "chmod" in device["remedy"]
    assert of(told, "permissions", "CAP_SYS_PTRACE")["detail"].startswith(f"user {os.geteuid() or 65534}, without it")
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() == "0":
        full = of(told, "permissions", "userfaultfd full")
        assert full["detail"].startswith("EPERM")
        assert "vm.unprivileged_userfaultfd=1" in full["remedy"]
    text = run_in_child(as_text, "nobody")
    assert "what mends it: as root: chmod" not in text, "there is nothing to mend: another door is open"


def test_the_sysctl_opens_the_full_mode() -> None:
    path = Path("/proc/sys/vm/unprivileged_userfaultfd")
    try:
        with setting(path, "1"):
            told = json.loads(run_in_child(as_json, "nobody"))
    except NotHere as why:
        pytest.skip(str(why))
    assert of(told, "permissions", "userfaultfd full")["ok"]
    assert of(told, "permissions", "vm.unprivileged_userfaultfd")["detail"].startswith("1: ")


def in_a_user_namespace() -> int:
    check(libc.unshare(_CLONE_NEWUSER))
    return as_json()


def test_a_user_namespace() -> None:
    told = json.loads(run_in_child(in_a_user_namespace, "nobody"))
    assert told["tracking"]
    assert of(told, "permissions", "user namespace")["detail"].startswith("one of its own")
    assert of(told, "permissions", "userfaultfd full")["detail"].startswith("EPERM"), "its capabilities do not count"
    assert of(json.loads(run_in_child(as_json)), "permissions", "user namespace")["detail"] == "the machine's own"


def test_a_process_that_is_not_dumpable() -> None:
    told = json.loads(run_in_child(as_json, "nobody", "not-dumpable", status=1))
    dumpable = of(told, "permissions", "dumpable")
    assert not dumpable["ok"]
    assert "PR_SET_DUMPABLE" in dumpable["remedy"]
    assert "EACCES" in run_in_child(as_text, "nobody", "not-dumpable", status=1)
    if os.geteuid() == 0:  # who may look all the same
        told = json.loads(run_in_child(as_json, "not-dumpable"))
        assert of(told, "permissions", "dumpable")["detail"] == "no: only root may look at it"


def test_a_filter() -> None:
    told = json.loads(run_in_child(as_json, "no-device", "seccomp-eperm", status=1))
    assert not of(told, "permissions", "seccomp")["ok"]
    for door in ("userfaultfd user mode", "userfaultfd full"):
        assert "lets userfaultfd pass" in of(told, "permissions", door)["remedy"]
    assert of(told, "permissions", "vm.unprivileged_userfaultfd")["ok"], "it is not what is in the way"
    for cure in ("sysctl", "CAP_SYS_PTRACE"):
        assert cure not in " ".join(check["remedy"] for check in told["permissions"]), "no cure of a filter"
    text = run_in_child(as_text, "no-device", "seccomp-eperm", status=1)
    assert "--  seccomp: a filter is in force; what mends it: " in text
    assert "Holes" not in text, "nothing can be tried"


def test_without_proc_it_still_says_why() -> None:
    told = json.loads(run_in_child(as_json, "no-proc", status=1))
    assert of(told, "permissions", "user namespace")["detail"] == "not told by /proc"
    assert of(told, "limits", "vm.max_map_count")["detail"] == "not told by /proc"


def test_without_proc_it_says_nothing_that_it_cannot_know() -> None:
    told = json.loads(run_in_child(as_json, "no-proc", status=1))
    for name in ("seccomp", "vm.unprivileged_userfaultfd"):
        assert of(told, "permissions", name)["detail"] == "not told by /proc"
    user, _, rest = of(told, "permissions", "CAP_SYS_PTRACE")["detail"].partition(", ")
    assert user.startswith("user ")
    assert rest.startswith("not told by /proc whether with it")
    assert "in use" not in of(told, "limits", "open files")["detail"]
    assert of(told, "limits", "memory cgroup")["detail"] == "not told by /proc"
    assert of(told, "limits", "huge pages")["detail"].startswith("the pool is not told by /proc; ")


def test_without_sys_it_says_nothing_that_it_cannot_know() -> None:
    told = json.loads(run_in_child(holes_as_json, "no-sys"))
    assert of(told, "limits", "huge pages")["detail"].endswith("transparent ones: not told by /sys")
    untold = "how large a transparent huge page is cannot be told: /sys is not mounted here"
    reasons = {hole["detail"] for hole in told["holes"] if hole["memory"] == "transparent huge"}
    assert reasons == {untold}
    assert any(untold in cost["why_not"] for cost in told["costs"])
    assert "no transparent huge pages" not in json.dumps(told)


# ---- containers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "groups", "name"),
    [
        ({"/.dockerenv": ""}, "", "Docker"),
        ({"/run/.containerenv": ""}, "", "Podman"),
        ({"/run/systemd/container": "lxc"}, "", "lxc"),
        ({}, "0::/kubepods.slice/pod1/cri-containerd-2.scope", "kubepods"),
        ({}, "0::/init.scope", "none seen"),
    ],
)
def test_which_container(there: dict[str, str], groups: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr(doctor_surroundings, "_BY_FILE", dict(doctor_surroundings._BY_FILE))
    for path in [*doctor_surroundings._BY_FILE]:
        if path not in there:
            monkeypatch.delitem(doctor_surroundings._BY_FILE, path)
    monkeypatch.setattr(Path, "exists", lambda self: str(self) in there)
    monkeypatch.setattr(doctor_surroundings, "_text", lambda path: {**there, "/proc/1/cgroup": groups}.get(path, ""))
    support = probe()
    told = doctor_surroundings.container(support)
    assert told.ok
    assert told.detail == f"{name}; the door is {support.door}"
    closed = doctor_surroundings.container(support._replace(door=None))
    assert closed.ok is (name == "none seen")
    assert ("docs/containers.md" in closed.remedy) is not closed.ok


# ---- limits ---------------------------------------------------------------------------------------------------------


def with_few_mappings_left() -> int:
    most = int(Path("/proc/sys/vm/max_map_count").read_text())
    used = len(Path("/proc/self/maps").read_text().splitlines())
    pieces = most - used - 500
    at = oracle.map_at(0, pieces * PAGE)
    for page in range(1, pieces, 2):
        oracle.protect(at + page * PAGE, PAGE, mmap.PROT_READ)
    return as_json()


def test_few_mappings_are_left() -> None:
    limit = of(json.loads(run_in_child(with_few_mappings_left)), "limits", "vm.max_map_count")
    assert not limit["ok"]
    assert "sysctl vm.max_map_count" in limit["remedy"]
    assert of(json.loads(run_in_child(as_json)), "limits", "vm.max_map_count")["ok"]


def with_few_descriptors_left() -> int:
    for _ in range(48):
        os.open("/dev/null", os.O_RDONLY)
    return as_json()


def test_few_descriptors_are_left() -> None:
    told = json.loads(run_in_child(with_few_descriptors_left, "64-descriptors"))
    limit = of(told, "limits", "open files")
    assert limit["detail"].startswith("64, ")
    assert not limit["ok"]
    assert "ulimit" in limit["remedy"]


def in_a_small_memory_cgroup() -> int:
    group = Path(os.environ["DIRTYTRACK_TEST_CGROUP"])
    (group / "cgroup.procs").write_text(str(os.getpid()))
    return as_json()


def test_a_memory_cgroup(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_bytes = 400 << 20
    for root, name in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(root) / f"dirtytrack-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if not (group / name).exists():
                continue  # a folder like any other: no controller of memory is mounted there
            with suppress(OSError):
                (group / name).write_text(str(limit_bytes))
                monkeypatch.setenv("DIRTYTRACK_TEST_CGROUP", str(group))
                told = json.loads(run_in_child(in_a_small_memory_cgroup))
                assert limit_bytes // 2 < told["headroom_bytes"] < limit_bytes
                assert "MiB left: markers for" in of(told, "limits", "memory cgroup")["detail"]
                return
        finally:
            group.rmdir()
    pytest.skip("no memory cgroup can be made here")


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"/proc/self/cgroup": "0::/"}, None),
        ({"/proc/self/cgroup": "0::/a", "a/memory.max": "max", "a/memory.current": "5"}, None),
        ({"/proc/self/cgroup": "0::/a", "a/memory.max": "100", "a/memory.current": "30"}, 70),
        (
            {
                "/proc/self/cgroup": "0::/a/b",
                "a/memory.max": "100",
                "a/memory.current": "90",
                "a/memory.stat": "anon 1\ninactive_file 20",
                "a/b/memory.max": "50",
                "a/b/memory.current": "5",
            },
            30,
        ),
        (
            {
                "/proc/self/cgroup": "5:cpu:/a\n4:memory:/a\n0::/",
                "memory/a/memory.limit_in_bytes": str(1 << 62),
                "memory/a/memory.usage_in_bytes": "5",
                "memory/memory.limit_in_bytes": "64",
                "memory/memory.usage_in_bytes": "80",
            },
            0,
        ),
    ],
    ids=["no controller", "no limit", "a limit", "the parent's, with cache", "version 1, exhausted"],
)
def test_what_memory_cgroups_leave(files: dict[str, str], left: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_surroundings, "_text", lambda path: files.get(path.removeprefix("/sys/fs/cgroup/"), ""))
    assert doctor_surroundings.headroom_bytes() == left
    told = next(check for check in doctor_surroundings.limits() if check.name == "memory cgroup")
    assert told.ok is (left is None)
    assert told.ok or "arm='present'" in told.remedy


def test_no_huge_page_is_free_in_the_pool() -> None:
    with machine_lock():
        if int(Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").read_text()):
            POOLS[HUGE_PAGE].ensure(4)
            told = json.loads(run_in_child(holes_as_json))
            assert {hole["verdict"] for hole in told["holes"] if hole["memory"] == "hugetlb private"} <= {
                "found",
                "blind",
            }
            return
        text = run_in_child(as_text)
        assert "not tried (hugetlb private, hugetlb shared): the pool of huge pages has 0 free" in " ".join(
            text.split()
        )

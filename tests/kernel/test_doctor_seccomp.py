# SPDX-License-Identifier: MIT
"""docs/seccomp.json, compiled and applied: what the documents promise of it. Takes about 3 s of CI's 20 min."""

from __future__ import annotations

import ctypes
import errno
import json
import multiprocessing
import os
import re
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

import dirtytrack
from dirtytrack.cli import main
from tests.sandbox import DEVICE, ROOT, check, libc, run_in_child

pytestmark = pytest.mark.unsanitized(
    "filters, limits and time-outs of processes that the sanitizer slows and maps into"
)

PROFILE = ROOT / "docs" / "seccomp.json"
_LOAD, _AND, _EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_CLONE_NEWUSER, _PTRACE_TRACEME = 0x10000000, 0

# ---- a compiler of profiles -----------------------------------------------------------------------------------------


@cache
def numbers() -> dict[str, int]:
    """The system calls of this processor."""
    done = subprocess.run(
        ["gcc", "-E", "-dM", "-xc", "-"], input="#include <asm/unistd.h>\n", capture_output=True, text=True, check=True
    )
    return {name: int(value) for name, value in re.findall(r"#define __NR_(\w+) (\d+)", done.stdout)}


def compiled(profile: dict[str, Any]) -> bytes:
    """The profile as a seccomp filter. Arguments are compared in their low 32 bits: no rule of ours has more."""

    def instruction(code: int, value: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
        return struct.pack("HBBI", code, jump_true, jump_false, value)

    def answer(action: str, number: int) -> bytes:
        return instruction(_RETURN, {"SCMP_ACT_ALLOW": _ALLOW, "SCMP_ACT_ERRNO": _ERRNO | number}[action])

    refuse = answer(profile["defaultAction"], profile["defaultErrnoRet"])
    code = [instruction(_LOAD, 0)]
    for rule in profile["syscalls"]:
        verdict = answer(rule["action"], rule.get("errnoRet", profile["defaultErrnoRet"]))
        for name in rule["names"]:
            if name not in numbers():
                continue
            test = []
            for argument in rule.get("args", ()):
                masked = argument["op"] == "SCMP_CMP_MASKED_EQ"
                assert masked or argument["op"] == "SCMP_CMP_EQ"
                test = [instruction(_LOAD, 16 + 8 * argument["index"])]
                test += [instruction(_AND, argument["value"])] if masked else []
                test += [instruction(_EQUAL, argument["valueTwo" if masked else "value"], 0, 1)]
            ending = [verdict, instruction(_LOAD, 0)] if test else [verdict]
            code += [instruction(_EQUAL, numbers()[name], 0, len(test) + len(ending)), *test, *ending]
    return b"".join([*code, refuse])


def apply(profile: dict[str, Any]) -> None:
    """On this process, for ever."""
    program = compiled(profile)
    code = ctypes.create_string_buffer(program)
    header = ctypes.create_string_buffer(struct.pack("HP", len(program) // 8, ctypes.addressof(code)))
    no_new_privileges, set_seccomp, by_filter = 38, 22, 2
    check(libc.prctl(no_new_privileges, 1, 0, 0, 0))
    check(libc.prctl(set_seccomp, by_filter, ctypes.addressof(header), 0, 0))


def profile() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(PROFILE.read_text())
    return read


def without_the_rule() -> dict[str, Any]:
    """What runtimes bring along is like this: ordinary calls are allowed, this one is not."""
    changed = profile()
    changed["syscalls"] = [rule for rule in changed["syscalls"] if "userfaultfd" not in rule["names"]]
    assert len(changed["syscalls"]) == len(profile()["syscalls"]) - 1
    return changed


# ---- what it allows -------------------------------------------------------------------------------------------------


def the_doctor_under_the_profile() -> int:
    apply(profile())
    return main(["doctor", "--json"])


@pytest.mark.parametrize("restrictions", [(), ("nobody", "no-device")], ids=str)
def test_tracking_works_under_the_profile(restrictions: tuple[str, ...]) -> None:
    told = json.loads(run_in_child(the_doctor_under_the_profile, *restrictions))
    assert told["tracking"] is True
    assert told["missed"] is False
    assert told["kernel"]["door"] == "userfaultfd user mode"
    assert told["kernel"]["door_errnos"]["userfaultfd full"] == errno.EPERM, "user mode only, for root too"
    [seccomp] = [check for check in told["permissions"] if check["name"] == "seccomp"]
    assert seccomp["detail"] == "a filter is in force, and lets userfaultfd user mode pass"
    assert not [cost for cost in told["costs"] if cost["measured"] is None and "huge" not in cost["name"]]


def ordinary_programs_under_the_profile() -> None:
    apply(profile())
    assert subprocess.run([sys.executable, "-c", "print(6 * 7)"], capture_output=True, check=True).stdout == b"42\n"
    seen = list[int]()
    threads = [threading.Thread(target=seen.append, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == [0, 1, 2, 3]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(os.getpid) != os.getpid()
        pool.close()
        pool.join()
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())
        client.sendall(b"x")
        with server.accept()[0] as accepted:
            assert accepted.recv(1) == b"x"
    with dirtytrack.UffdSession(events=True) as session:  # with a thread in C
        memory = dirtytrack.allocate(1 << 20, shared=True)
        region = session.register(memory, blind_spots="accepted")
        with dirtytrack.DirtyTracker(session) as tracker:
            memory.discard(4096, 4096)
            memory[0] = 1
            assert set(tracker.collect().pages(region)) == {0, 1}


def test_ordinary_programs_run_under_the_profile() -> None:
    run_in_child(ordinary_programs_under_the_profile)


# ---- what it refuses ------------------------------------------------------------------------------------------------


def what_is_refused_under_the_profile() -> None:
    apply(profile())
    libc.ptrace.restype = libc.syscall.restype = ctypes.c_long
    calls: dict[str, Callable[[], int]] = {
        "unshare": lambda: libc.unshare(_CLONE_NEWUSER),
        "mount": lambda: libc.mount(b"none", b"/mnt", b"tmpfs", 0, None),
        "ptrace": lambda: libc.ptrace(_PTRACE_TRACEME, 0, None, None),
        "bpf": lambda: libc.syscall(numbers()["bpf"], 0, 0, 0),
        "io_uring": lambda: libc.syscall(numbers()["io_uring_setup"], 1, 0),
        "clone": lambda: libc.syscall(numbers()["clone"], _CLONE_NEWUSER, 0, 0, 0, 0),
        "userfaultfd, full": lambda: libc.syscall(numbers()["userfaultfd"], os.O_CLOEXEC),
    }
    for name, call in calls.items():
        assert call() == -1, name
        assert ctypes.get_errno() == errno.EPERM, name


def test_the_profile_refuses_what_it_says() -> None:
    run_in_child(what_is_refused_under_the_profile)


def the_doctor_without_the_rule() -> int:
    apply(without_the_rule())
    return main(["doctor", "--json"])


def test_a_profile_without_the_rule_closes_the_doors_but_the_device() -> None:
    told = json.loads(run_in_child(the_doctor_without_the_rule, "no-device", status=1))
    assert told["kernel"]["door_errnos"]["userfaultfd user mode"] == errno.EPERM
    assert told["kernel"]["door"] is None
    [seccomp] = [check for check in told["permissions"] if check["name"] == "seccomp"]
    assert not seccomp["ok"]
    assert "docs/containers.md" in seccomp["remedy"]
    if os.access(DEVICE, os.R_OK | os.W_OK):
        assert json.loads(run_in_child(the_doctor_without_the_rule))["kernel"]["door"] == DEVICE


def test_the_documents_show_the_rule_that_is_in_the_profile() -> None:
    text = (ROOT / "docs" / "containers.md").read_text()
    [shown] = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL)]
    assert shown in profile()["syscalls"]
    names = [name for rule in profile()["syscalls"] for name in rule["names"]]
    assert len(set(names)) == len(names) - 1, "personality alone has two rules"

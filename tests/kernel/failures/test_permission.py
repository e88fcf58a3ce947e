# SPDX-License-Identifier: MIT
"""What a seccomp filter, a container, a missing /proc or another user forbids. Takes 3 s of CI's 20 min.

Each test runs in a process that takes the permission from itself.
"""

from __future__ import annotations

import errno
import os

import pytest

import dirtytrack
from dirtytrack import Pagemap, UffdSession
from tests.kernel.failures.world import World, assert_finds_a_write, map_raw, write
from tests.oracle import PAGE
from tests.sandbox import RESTRICTIONS, check, libc, run_in_child

MNT_DETACH = 2


def opens() -> None:
    with UffdSession() as session:
        print(session.opened_by)
    assert_finds_a_write()


def test_a_seccomp_filter_forbids_the_call_and_there_is_a_device() -> None:
    if not os.access("/dev/userfaultfd", os.R_OK | os.W_OK):
        # Nothing to open: the same filter as a container's, with the device door simulated to fail as it does here.
        assert "userfaultfd" in run_in_child(is_denied, "seccomp-eperm")
        return
    assert run_in_child(opens, "seccomp-eperm") == "/dev/userfaultfd\n"
    assert run_in_child(opens, "seccomp-enosys") == "/dev/userfaultfd\n"


def is_denied() -> None:
    for call in (UffdSession, lambda: dirtytrack.track(bytearray(PAGE))):
        with pytest.raises(dirtytrack.PermissionDenied) as caught:
            call()
        assert caught.value.errno == errno.EPERM
        assert caught.value.feature == "userfaultfd"
        print(caught.value)
    assert not dirtytrack.probe().tracking


def test_a_seccomp_filter_forbids_the_call_and_there_is_no_device() -> None:
    told = run_in_child(is_denied, "no-device", "seccomp-eperm")
    assert "/dev/userfaultfd" in told
    assert "seccomp" in told
    run_in_child(is_denied, "nobody", "seccomp-eperm")


def test_an_unprivileged_user_needs_no_permission() -> None:
    assert run_in_child(opens, "nobody") == "userfaultfd user mode\n"


def may_not_read_its_pagemap() -> None:
    for call in (UffdSession, Pagemap):
        with pytest.raises(dirtytrack.PermissionDenied) as caught:
            call()
        assert caught.value.errno == errno.EACCES
        print(caught.value)
    assert not dirtytrack.probe().tracking


def test_a_process_that_is_not_dumpable() -> None:
    assert "not dumpable" in run_in_child(may_not_read_its_pagemap, "nobody", "not-dumpable")


def reads_the_pagemap_of_init() -> None:
    with pytest.raises(dirtytrack.PermissionDenied) as caught:
        Pagemap(1)
    assert caught.value.errno == errno.EACCES
    assert caught.value.pid == 1
    assert_finds_a_write()


def test_a_process_of_another_user() -> None:
    run_in_child(reads_the_pagemap_of_init, "nobody")


def cannot_look_at_mappings() -> None:
    tracked = World()
    RESTRICTIONS["no-proc"]()
    with pytest.raises(dirtytrack.PermissionDenied) as caught:
        tracked.session.register(bytearray(PAGE))
    assert caught.value.errno == errno.ENOENT
    print(caught.value)
    map_raw(1, at=tracked.region.start + 2 * PAGE)
    write(tracked.memory, 9)
    with pytest.raises(dirtytrack.PermissionDenied) as caught:  # a mapping was replaced, and nobody can look
        tracked.tracker.collect()
    assert caught.value.errno == errno.ENOENT
    check(libc.umount2(b"/proc", MNT_DETACH))
    assert {2, 9} <= set(tracked.tracker.collect().pages(tracked.region))
    assert_finds_a_write(tracked.tracker)


def test_proc_went_away() -> None:
    assert "/proc" in run_in_child(cannot_look_at_mappings)

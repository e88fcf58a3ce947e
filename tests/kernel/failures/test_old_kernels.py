# SPDX-License-Identifier: MIT
"""Kernels, platforms, builds and interpreters that cannot do it. Takes 2 s of CI's 20 min.

An old kernel's answers are simulated at the border to the kernel: by a seccomp filter, in a process of its own, or by
the core's failures on purpose.
"""

from __future__ import annotations

import errno
import inspect
import sys

import pytest

import dirtytrack
from dirtytrack import DirtyTracker, Pagemap, UffdSession
from dirtytrack.kernel import core
from tests.kernel.failures.world import World, assert_finds_a_write, write
from tests.oracle import PAGE
from tests.sandbox import failing, run_in_child


def is_unsupported() -> None:
    with pytest.raises(dirtytrack.UnsupportedKernel) as caught:
        UffdSession()
    support = dirtytrack.probe()
    assert not support.tracking
    assert support.why_not
    assert support.remedies
    print(caught.value.feature, caught.value.errno, caught.value, sep="\n")


def lacking(*restrictions: str) -> tuple[str, int, str]:
    """What a session says is missing: the feature, the errno and the message."""
    feature, number, message = run_in_child(is_unsupported, *restrictions).splitlines()
    return feature, int(number), message


def test_a_kernel_without_userfaultfd() -> None:
    feature, number, message = lacking("no-device", "seccomp-enosys")
    assert (feature, number) == ("userfaultfd", errno.ENOSYS)
    assert "CONFIG_USERFAULTFD" in message


def test_a_kernel_without_asynchronous_write_protection() -> None:
    feature, number, message = lacking("no-wp-async")
    assert (feature, number) == ("UFFD_FEATURE_WP_ASYNC", errno.EINVAL)
    assert "6.7" in message


def test_a_kernel_without_pagemap_scan() -> None:
    feature, number, message = lacking("no-pagemap-scan")
    assert (feature, number) == ("PAGEMAP_SCAN", errno.ENOTTY)
    assert "6.7" in message


def test_proc_is_not_mounted() -> None:
    feature, number, message = lacking("no-proc")
    assert (feature, number) == ("/proc/PID/pagemap", errno.ENOENT)
    assert "the container a /proc" in message


def test_an_answer_of_the_kernel_that_nobody_knows(world: World) -> None:
    write(world.memory, 3)
    with failing("SCAN", number=errno.EIO), pytest.raises(dirtytrack.KernelRefused, match="EIO") as caught:
        world.tracker.collect()
    assert caught.value.errno == errno.EIO
    fresh = world.session.register(bytearray(PAGE))
    for site, call in (
        ("REGISTER", lambda: world.session.register(bytearray(PAGE))),
        ("PROTECT", DirtyTracker(world.session, [fresh]).start),
    ):
        with failing(site, number=errno.EIO), pytest.raises(dirtytrack.KernelRefused, match="EIO"):
            call()
    assert list(world.tracker.collect().pages(world.region)) == [3]


def test_another_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "_loaded", False)
    monkeypatch.setattr(sys, "platform", "darwin")
    for call in (UffdSession, Pagemap, lambda: dirtytrack.allocate(PAGE), lambda: dirtytrack.track(bytearray(PAGE))):
        with pytest.raises(dirtytrack.UnsupportedKernel, match="darwin"):
            call()
    assert not dirtytrack.probe().tracking


def test_the_extension_module_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "_loaded", False)
    monkeypatch.delattr(sys.modules["dirtytrack.kernel"], "_core", raising=False)
    monkeypatch.setitem(sys.modules, "dirtytrack.kernel._core", None)
    with pytest.raises(dirtytrack.UnsupportedKernel, match="_core"):
        UffdSession()
    assert "_core" in dirtytrack.probe().why_not


def refuses_to_load() -> None:
    import unittest

    import dirtytrack

    raises = unittest.TestCase().assertRaisesRegex  # pytest does not load there
    raises(ImportError, "sub-interpreter", dirtytrack.allocate, 1)


def in_a_subinterpreter() -> None:
    script = f"{inspect.getsource(refuses_to_load)}\nrefuses_to_load()\n"
    try:
        import _interpreters  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        import _xxsubinterpreters as _interpreters  # type: ignore[import-not-found,no-redef,unused-ignore]
    number = _interpreters.create()
    failure = _interpreters.run_string(number, f"import sys\nsys.path[:] = {sys.path!r}\n{script}")
    assert not failure, failure
    assert_finds_a_write()


def test_a_sub_interpreter() -> None:
    run_in_child(in_a_subinterpreter)

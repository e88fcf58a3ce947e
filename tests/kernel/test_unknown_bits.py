# SPDX-License-Identifier: MIT
"""Bits of features and categories that this version does not know survive on their way. Takes under 1 s of 20 min."""

from __future__ import annotations

import errno
from typing import Any

import pytest

import dirtytrack
from dirtytrack import PageCategory, Pagemap, Scan, UffdFeature, UffdSession
from dirtytrack.kernel import core
from tests.oracle import PAGE

UNKNOWN = 1 << 40


class Kernel:
    """The core of a kernel that knows more than this library."""

    def __init__(self, lib: Any) -> None:
        self._lib = lib

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lib, name)

    def dt_probe(self, out: Any) -> None:
        self._lib.dt_probe(out)
        out.features |= UNKNOWN
        out.categories |= UNKNOWN

    def dt_session_features(self, session: Any) -> int:
        return int(self._lib.dt_session_features(session)) | UNKNOWN


def test_unknown_bits_survive(monkeypatch: pytest.MonkeyPatch) -> None:
    session = UffdSession()
    monkeypatch.setattr(core, "lib", Kernel(core.lib))
    support = dirtytrack.probe()
    assert support.features & UNKNOWN
    assert support.categories & UNKNOWN
    assert support.features & UffdFeature.WP_ASYNC
    assert isinstance(support.features, UffdFeature)
    assert session.features & UNKNOWN
    assert repr(session.features)
    session.close()


def test_unknown_categories_of_a_scan_survive() -> None:
    numbers = memoryview(bytearray(24)).cast("Q", (1, 3))
    numbers[0, 1], numbers[0, 2] = PAGE, UNKNOWN | PageCategory.WRITTEN
    [part] = Scan(numbers, PAGE)
    assert part.categories == UNKNOWN | PageCategory.WRITTEN
    assert isinstance(part.categories, PageCategory)
    assert PageCategory.WRITTEN in part.categories
    assert int(part.categories) & ~PageCategory.WRITTEN.value == UNKNOWN


def test_unknown_bits_are_asked_of_the_kernel() -> None:
    with Pagemap() as pagemap, pytest.raises(dirtytrack.InvalidMemory) as caught:
        pagemap.scan(0, PAGE, return_mask=PageCategory(UNKNOWN))
    assert caught.value.errno == errno.EINVAL, "not dropped on the way"

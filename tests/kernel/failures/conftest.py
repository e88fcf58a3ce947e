# SPDX-License-Identifier: MIT
"""Around each test of a failure there is a session at work, and after it that session must still work."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernel.failures.world import World


@pytest.fixture(autouse=True)
def world() -> Iterator[World]:
    made = World()
    yield made
    made.assert_usable()
    made.session.close()

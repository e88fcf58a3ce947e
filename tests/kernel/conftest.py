# SPDX-License-Identifier: MIT
"""Memory of each kind for the tests that are run on every kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.host import POOLS, NotHere
from tests.kernel.kinds import Area, Kind
from tests.kernel.watched import Bare, Watched


@pytest.fixture(scope="session", autouse=True)
def _huge_pages_are_put_back() -> Iterator[None]:
    yield
    for pool in POOLS.values():
        pool.put_back()


@pytest.fixture
def area(kind: Kind, tmp_path: Path) -> Iterator[Area]:
    """Memory of the test's kind, 8 units at least."""
    mapping = kind.map(8, tmp_path)
    try:
        made = mapping.__enter__()
    except NotHere as why:
        pytest.skip(str(why))
    try:
        yield made
    finally:
        mapping.__exit__(None, None, None)


@pytest.fixture
def bare(area: Area) -> Iterator[Bare]:
    """The same, registered and armed by the oracle."""
    with Bare(area) as made:
        yield made


@pytest.fixture
def watched(area: Area) -> Iterator[Watched]:
    """The same, with content, registered and armed, by a tracker that has nothing pending."""
    area.fill(3)
    with Watched(area) as made:
        yield made

# SPDX-License-Identifier: MIT
"""A session, and memory of each kind for the tests that are run on every kind."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from dirtytrack import UffdSession
from dirtytrack.kernel import core
from tests.kernel.backends import BACKENDS
from tests.kernel.host import POOLS, NotHere
from tests.kernel.kinds import Area, Kind
from tests.kernel.watched import Bare, Watched

USUAL = {"fault": 1000, "arm": 50, "call": 600, "look": 3, "copy": 300, "copy_apart": 450, "compare": 400}  # ns


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None]:
    yield from _skip_what_is_not_here()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None]:
    yield from _skip_what_is_not_here()


def _skip_what_is_not_here() -> Generator[None]:
    try:
        yield
    except NotHere as why:
        pytest.skip(str(why))


@pytest.fixture(scope="session", autouse=True)
def _huge_pages_are_put_back() -> Iterator[None]:
    yield
    for pool in POOLS.values():
        pool.put_back()


@pytest.fixture
def session() -> Iterator[UffdSession]:
    with UffdSession() as made:
        yield made


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Who says what was written: a test with it is run for each. All but the first need no kernel that tracks."""
    return str(request.param)


@pytest.fixture
def usual_costs() -> Iterator[None]:
    """What tracking costs is as on most machines, not as measured here: for tests of what is decided by it."""
    core.load()
    costs = core.ffi.new("dt_costs *", USUAL)
    core.lib.dt_costs_exchange(costs)
    yield
    core.lib.dt_costs_exchange(costs)


@pytest.fixture
def area(kind: Kind, tmp_path: Path) -> Iterator[Area]:
    """Memory of the test's kind, 8 units at least."""
    with kind.map(8, tmp_path) as made:
        yield made


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

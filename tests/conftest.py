# SPDX-License-Identifier: MIT
"""Which tests run here, and why not: decided in this one place, and printed in the header of every run."""

from __future__ import annotations

import gc
import os
import platform
import signal
from collections.abc import Generator, Iterator
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import pytest
from hypothesis import HealthCheck, settings

from dirtytrack.kernel.support import probe
from tests.asked import IN_CI, SANITIZED, SOAK
from tests.unit.browsing import BROWSERS

TESTS = Path(__file__).parent
NEED_TRACKING = (TESTS / "kernel", TESTS / "programs")
TORCH = find_spec("torch") is not None
BROWSER = any(map(which, BROWSERS))
RADOSGW = os.environ.get("DIRTYTRACK_S3") == "radosgw"
GDB = which("gdb") is not None

# In CI a skip is a failure, so that a green run means that everything ran. Not so for these: the beginning of a test's
# id, and why it may be skipped.
MAY_BE_SKIPPED: dict[str, str] = {
    "tests/kernel/conformance/test_base.py::test_the_base_cases_on_a_gibibyte_page": "no gibibyte may be in one piece",
    "tests/programs/test_freezer.py::": "a container may have no cgroup of version 2, or none that it may write to",
    "tests/kernel/failures/test_processes.py::test_freezing_": "the same",
}

# What a shell runs in the background ignores Ctrl-C, and so would all that is started here.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile(
    "dirtytrack", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True, derandomize=IN_CI
)
settings.load_profile("dirtytrack")


def pytest_report_header(config: pytest.Config) -> list[str]:
    del config
    support = probe()
    tracking = "works" if support.tracking else f"does not work, so its tests are skipped: {support.why_not}"
    lines = [f"kernel: {platform.system()} {os.uname().release} {platform.machine()}; tracking {tracking}"]
    if not TORCH:
        lines.append("PyTorch is not installed: docs/cookbook/torch.md and its tests are NOT run; make test-torch does")
    if not BROWSER:
        lines.append("No browser is here: the page of a heat map is NOT opened; make test-browser does")
    if not GDB:
        lines.append("No gdb is here: core files of images are NOT opened; make programs installs it")
    if IN_CI:
        lines.append("CI=true: a skipped test is a failure, except " + (", ".join(MAY_BE_SKIPPED) or "none"))
    return lines


def backend_of(item: pytest.Item) -> str:
    """Who says what was written in this test: what is called so among its parameters, or what one of them has of it."""
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    told = [getattr(value, "backend", None) for value in parameters.values()]
    return str(parameters.get("backend") or next(filter(None, told), "kernel"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    support = probe()
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        if backend_of(item) == "kernel" and any(folder in item.path.parents for folder in NEED_TRACKING):
            item.add_marker("tracking")
        if item.get_closest_marker("tracking") and not support.tracking:
            item.add_marker(pytest.mark.skip(reason=support.why_not))
        runs = SOAK or not item.get_closest_marker("soak")
        runs = runs and (TORCH or not item.get_closest_marker("torch"))
        runs = runs and not item.get_closest_marker("moto" if RADOSGW else "radosgw")
        runs = runs and (BROWSER or not item.get_closest_marker("browser"))
        runs = runs and not (SANITIZED and item.get_closest_marker("unsanitized"))
        (kept if runs else dropped).append(item)
    items[:] = kept
    if dropped:
        config.hook.pytest_deselected(items=dropped)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What was collected stays: many tests call the garbage collector, which else looks through all of it each time."""
    del session
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The address of a server that speaks S3: moto's; or Ceph's, with DIRTYTRACK_S3=radosgw (make radosgw)."""
    from tests import buckets, radosgw

    with radosgw.served() if RADOSGW else buckets.served() as address:
        yield address


def _fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    expected_failure = hasattr(report, "wasxfail")
    if IN_CI and report.skipped and not expected_failure and not report.nodeid.startswith(tuple(MAY_BE_SKIPPED)):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"CI=true and this was skipped. {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _fail_if_skipped(report)
    return report

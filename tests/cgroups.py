# SPDX-License-Identifier: MIT
"""Cgroups of version 2 for tests to freeze; where none may be made, the test is skipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NO_CGROUP = "nobody may make a cgroup of version 2 here"


def mount_point() -> Path:
    """Of cgroup v2."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if line.split(" - ")[1].split()[0] == "cgroup2":
            return Path(line.split()[4])
    pytest.skip(f"{NO_CGROUP}: it is not mounted")


@contextmanager
def made(name: str, above: Path | None = None) -> Iterator[Path]:
    """A cgroup; whoever is in it must have ended by the end."""
    folder = (above or mount_point()) / name
    try:
        folder.mkdir()
        (folder / "cgroup.freeze").write_text("0")
    except OSError as error:
        pytest.skip(f"{NO_CGROUP}: {error}")
    try:
        yield folder
    finally:
        (folder / "cgroup.freeze").write_text("0")
        folder.rmdir()


def is_frozen(group: Path) -> bool:
    """Whether all in it stand still."""
    return "frozen 1" in (group / "cgroup.events").read_text().splitlines()

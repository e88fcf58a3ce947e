# SPDX-License-Identifier: MIT
"""Where the stores of these tests are: in memory, where there is such a place, since they are made by the hundred.

What every kind of store must do is tested in a directory, in an object store in memory, and at a server.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.buckets import Place


@pytest.fixture(scope="session")
def azure() -> Iterator[str]:
    """The address of an emulator of Azure Blob Storage."""
    from tests.azurite import served

    with served() as address:
        yield address


@pytest.fixture
def where() -> Iterator[Path]:
    """An empty directory, as quick as one can be."""
    memory = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="dirtytrack-", dir=memory if memory.is_dir() else None))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def google() -> Iterator[str]:
    """The address of a server that speaks as Google Cloud Storage is documented to."""
    from tests.gcs import served

    with served() as address:
        yield address


KINDS = ["directory", "memory", "s3", "google"] + (["azure"] if "DIRTYTRACK_AZURITE" in os.environ else [])


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, where: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Where stores of each kind are, with nothing there yet; the environment has what it takes to open them."""
    found = Place(request.param, where, lambda: request.getfixturevalue(request.param))
    if found.kind in ("s3", "azure", "google"):
        for name, value in found.environment().items():
            monkeypatch.setenv(name, value)
    return found

# SPDX-License-Identifier: MIT
"""Processes that end with their test, and the log of who runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.migration import parties
from tests.kernel.migration.parties import MIB, Log, Party


class Cast:
    """Makes the parties of one test."""

    def __init__(self, log: Path) -> None:
        self.log = Log(log)
        self._all: list[Party] = []

    def source(self, *nbytes: int, **options: Any) -> Party:
        made = self._add(parties.source, nbytes=list(nbytes or (8 * MIB,)), **options)
        made.hear("ready")
        return made

    def destination(self, **options: Any) -> tuple[Party, str]:
        made = self._add(parties.destination, **options)
        address, _ = made.hear("listens")
        return made, address

    def _add(self, role: Callable[..., None], **options: Any) -> Party:
        made = Party(role, self.log.path, **options)
        self._all.append(made)
        return made

    def end(self) -> None:
        for each in self._all:
            each.end()
        self._all.clear()


@pytest.fixture
def cast(tmp_path: Path) -> Iterator[Cast]:
    made = Cast(tmp_path / "log")
    yield made
    made.end()

# SPDX-License-Identifier: MIT
"""A heap to try; where the extension is built with sanitizers, so are the C files of examples/heap."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from examples.heap import Heap
from tests.asked import SANITIZED

if SANITIZED:
    flags = "-O1 -fsanitize=address,undefined -fno-sanitize-recover=all"
    os.environ.setdefault("EXAMPLES_HEAP_CFLAGS", flags)


@pytest.fixture
def heap() -> Iterator[Heap]:
    """A small one, which is read as a whole after each collection."""
    with Heap(eden_bytes=16384, survivor_bytes=4096, segment_bytes=512 << 10, old_bytes=8 << 20, verify=True) as made:
        yield made

# SPDX-License-Identifier: MIT
"""A zarr array that follows a tracked one: the chunks with dirty rows written, against all of it written anew."""

from __future__ import annotations

from array import array as array_of_64_bits
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from dirtytrack.checkpoint import ZarrWriter

from .bare import Bare
from .checkpoint import FEW_ROUNDS, directory, weighed
from .harness import MIB, Arena, Row, Settings, arena, scattered, show_bytes

ROW_NBYTES, CHUNK_NBYTES = 16 << 10, 1 << 20
TOGETHER = (0.001, 0.01, 0.1, 0.5, 1.0)
SCATTERED = (0.0001, 0.001, 0.01)


def zarr_rows(settings: Settings, bare: Bare) -> Iterator[Row]:
    """Rows of a zarr array on the disk of the temporary directory (TMPDIR): dirty chunks, against the whole array."""
    few = replace(settings, least_rounds=min(settings.least_rounds, FEW_ROUNDS), most_rounds=FEW_ROUNDS)
    for nbytes in settings.sizes(128 * MIB):
        with arena(bare, nbytes) as space, directory() as where:
            yield from following(few, bare, space, where)


def following(settings: Settings, bare: Bare, space: Arena, where: Path) -> Iterator[Row]:
    zarr: Any = import_module("zarr")
    nbytes, (tracker,) = space.memory.nbytes, space.trackers
    shape, chunks = (nbytes // ROW_NBYTES, ROW_NBYTES // 8), (CHUNK_NBYTES // ROW_NBYTES, ROW_NBYTES // 8)
    array = np.frombuffer(space.memory, np.float64).reshape(shape)
    array[:] = np.random.default_rng(1).integers(0, 1000, shape)  # compresses somewhat
    target, other = (
        zarr.create_array(where / name, shape=shape, dtype="f8", chunks=chunks) for name in ("ours", "bare")
    )
    writer = ZarrWriter(target, array)
    tracker.collect()
    writer.write_all()
    for how, shares in (("together", TOGETHER), ("scattered", SCATTERED)):
        for share in shares:
            pages = scattered(space.page_count, share)
            if how == "together":
                pages = array_of_64_bits("Q", range(len(pages)))

            def prepare(pages: Any = pages) -> None:
                tracker.collect()
                bare.write(space.region.start, pages)

            def ours() -> None:
                writer.write(tracker.collect())

            def whole() -> None:
                other[...] = array

            found = weighed(settings, prepare, ours, whole)
            prepare()
            ours()
            assert (target[...] == array).all(), "it follows"
            yield found.row(f"{show_bytes(nbytes)}, {share:.4g} dirty, {how}", None)

# SPDX-License-Identifier: MIT
"""Restoring a checkpoint, against reading the bytes of its segments and nothing else."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import dirtytrack
from dirtytrack.checkpoint import DirectoryStore, compact, restore
from dirtytrack.checkpoint.coding import Encoder
from dirtytrack.checkpoint.manifests import Manifest, RegionEntry

from .bare import PAGE, Bare
from .harness import MIB, Pair, Row, Settings, rounds, scattered, show_bytes

NBYTES = 512 * MIB
LEAST_SPEED = 0.8
INCREMENTS, SHARE = 8, 0.01


def saved(path: Path, memory: Any, increments: int, compression: Any = None) -> list[Path]:
    """A full generation and increments of scattered pages, in frames of a mebibyte; its segments."""
    encoder, view = Encoder(compression), memoryview(memory)
    region = RegionEntry(0, "memory", len(view))
    with DirectoryStore(path, create=True) as store, store.writer() as writer:
        entries: tuple[Any, ...] = ()
        for generation in range(1, increments + 2):
            segment = writer.create_segment(generation)
            if generation == 1:
                frames = [array("Q", (at, min(MIB, len(view) - at))) for at in range(0, len(view), MIB)]
            else:
                pages = scattered(len(view) // PAGE, SHARE, seed=generation)
                frames = [
                    array("Q", [number for page in pages[at : at + 256] for number in (page * PAGE, PAGE)])
                    for at in range(0, len(pages), 256)
                ]
            for runs in frames:
                packed = b"".join(view[at : at + n] for at, n in zip(runs[::2], runs[1::2], strict=True))
                made = encoder.encode(packed)
                segment.add(0, runs, made.stored, codec=made.codec, plain_nbytes=len(packed))
            entries = (*entries, segment.finish())
            writer.publish(
                Manifest(
                    store.store_id,
                    generation,
                    0,
                    generation - 1 or None,
                    time.time(),
                    "increment" if generation > 1 else "full",
                    PAGE,
                    None,
                    (region,),
                    entries,
                )
            )
    return [path / "segments" / entry.name for entry in entries]


def read(files: Sequence[Path], into: memoryview) -> None:
    """A bare loop over the files' bytes, a mebibyte at a time."""
    for path in files:
        file = os.open(path, os.O_RDONLY)
        try:
            at = 0
            while done := os.preadv(file, [into[at % len(into) :][:MIB]], at):
                at += done
        finally:
            os.close(file)


def forget(files: Sequence[Path]) -> None:
    """Have the page cache know nothing of them."""
    for path in files:
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def in_turn(
    settings: Settings, prepare: Callable[[], object], ours: Callable[[], object], bare: Callable[[], object]
) -> Pair:
    """As `paired`, on all processors: restoring is work for several."""
    pair, sides = Pair([], []), [ours, bare]
    for side in sides:
        side()
    gc.collect()
    for _ in rounds(settings):
        for side in sides:
            prepare()
            begin = time.perf_counter_ns()
            side()
            (pair.ours if side is ours else pair.bare).append(time.perf_counter_ns() - begin)
        sides.reverse()
    return pair


def checkpoint_restore(settings: Settings, bare: Bare) -> Iterator[Row]:
    """Restoring, against a bare read of the same files from the same page cache or disk."""
    del bare
    nbytes = 4 * MIB if settings.tiny else NBYTES
    few = settings if settings.tiny else Settings(settings.seconds, 5, 50)
    memory, into = (dirtytrack.allocate(nbytes, huge="transparent") for _ in range(2))
    noise = os.urandom(MIB)
    for at in range(0, nbytes, MIB):
        memory[at : at + MIB] = noise[at // MIB % 251 :] + noise[: at // MIB % 251]
    view, size = memoryview(into), show_bytes(nbytes)
    folder = Path(tempfile.mkdtemp(prefix="dirtytrack-benchmark-"))
    try:
        store = folder / "store"
        files = saved(store, memory, INCREMENTS)

        def ours(generation: int) -> Callable[[], object]:
            return lambda: restore(store, generation=generation, into={"memory": into})

        def same() -> None:
            read(files, view)

        def full() -> None:
            read(files[:1], view)

        pair = in_turn(few, lambda: None, ours(1), full)
        yield pair.speed_row(f"restore {size}, full, page cache", LEAST_SPEED)
        pair = in_turn(few, lambda: None, ours(INCREMENTS + 1), same)
        yield pair.speed_row(f"restore {size}, {INCREMENTS} increments, page cache", LEAST_SPEED)
        for generation in (1, INCREMENTS + 1):  # the memory was the same each time: increments of what did not change
            ours(generation)()
            assert bytes(into) == bytes(memory), "it is not what was saved"
        pair = in_turn(few, lambda: forget(files), ours(INCREMENTS + 1), same)
        yield pair.speed_row(f"restore {size}, {INCREMENTS} increments, disk", LEAST_SPEED)
        pair = in_turn(few, lambda: None, lambda: restore(store), lambda: read(files, fresh(nbytes)))
        yield pair.speed_row(f"restore {size}, {INCREMENTS} increments, new memory", LEAST_SPEED)
        begin = time.perf_counter_ns()
        compact(store)
        took = time.perf_counter_ns() - begin
        yield Pair([took], [int(median(pair.bare))]).told_row(f"compact {size}, {INCREMENTS} increments")
    finally:
        shutil.rmtree(folder)


def fresh(nbytes: int) -> memoryview:
    """New memory, as a program gets it that asks for nothing special."""
    return memoryview(dirtytrack.allocate(nbytes))

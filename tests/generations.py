# SPDX-License-Identifier: MIT
"""Stores of checkpoints made by hand, frame by frame, without a `Checkpointer`: with what each generation is to be."""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from dirtytrack.checkpoint.coding import Encoder
from dirtytrack.checkpoint.manifests import Manifest, RegionEntry, SegmentEntry
from dirtytrack.checkpoint.segments import FrameKind, SegmentWriter
from dirtytrack.delta import diff
from dirtytrack.kernel.packing import all_zero

__all__ = ["PAGE", "History", "Keyed"]

PAGE = 4096
Runs = Sequence[tuple[int, int]]


class Keyed:
    """A cipher that is good for tests: it hides nothing, and notices another key as little as a stream cipher does."""

    def __init__(self, key: int) -> None:
        self._table = bytes(byte ^ key for byte in range(256))

    def __call__(self, data: bytes) -> bytes:
        return data.translate(self._table)


class History:
    """A store, and what each generation in it is.

    Args:
        store: where to.
        seed: of what is written.
        deltas: a share of the frames are deltas, where there is something to be one of.
        encrypt, compression: as `Encoder` has them.
        frame_bytes: the most in one frame.
    """

    def __init__(
        self,
        store: Any,
        seed: int = 1,
        *,
        deltas: bool = True,
        compression: Any = None,
        encrypt: Callable[[bytes], bytes] | None = None,
        frame_bytes: int = 8 * PAGE,
    ) -> None:
        self.store, self.random = store, random.Random(seed)
        self.deltas, self.frame_bytes = deltas, frame_bytes
        self.encoder = Encoder(compression, 1, encrypt)
        self.memory: dict[str, bytearray] = {}
        self.regions: dict[str, RegionEntry] = {}
        self.dirty: dict[str, set[int]] = {}
        self.truth: dict[int, dict[str, bytes]] = {}
        self.manifests: dict[int, Manifest] = {}
        self._numbers = 0

    # ---- the program

    def add(self, name: str, nbytes: int, dtype: str | None = None, shape: tuple[int, ...] | None = None) -> None:
        """A new buffer of that name, a quarter of it zeros; in place of the one that has it."""
        data = bytearray(self.random.randbytes(nbytes))
        data[nbytes // 2 : nbytes // 2 + nbytes // 4] = bytes(nbytes // 4)
        old = self.regions.get(name)
        number = old.number if old is not None else self._numbers
        self._numbers += old is None
        self.memory[name] = data
        self.regions[name] = RegionEntry(number, name, nbytes, dtype, shape, 0)  # since: when it is saved
        self.dirty[name] = set(range(-(-nbytes // PAGE)))

    def remove(self, name: str) -> None:
        del self.memory[name], self.regions[name], self.dirty[name]

    def write(self, count: int = 20) -> None:
        """Change some bytes in each buffer; some pages become zero, some are written without a change."""
        for name, data in self.memory.items():
            for _ in range(min(count, -(-len(data) // PAGE))):
                page = self.random.randrange(-(-len(data) // PAGE))
                start, end = page * PAGE, min(page * PAGE + PAGE, len(data))
                what = self.random.random()
                if what < 0.6:
                    at = self.random.randrange(start, end)
                    some = self.random.randbytes(min(end - at, self.random.choice((1, 8, 100))))
                    data[at : at + len(some)] = some
                elif what < 0.8:
                    data[start:end] = self.random.randbytes(end - start)
                elif what < 0.95:
                    data[start:end] = bytes(end - start)
                self.dirty[name].add(page)

    # ---- the saves

    def save(self, meta: Any = None, *, full: bool = False, parent: int | None = None) -> int:
        """Save what is dirty, on the generation before (or the ``parent``, whose contents are to be in memory)."""
        with self.store.writer() as writer:
            generation: int = writer.next_generation()
            before = parent if parent is not None else max(self.truth, default=None)
            base = None if before is None or full else self.manifests[before]
            segment = writer.create_segment(generation)
            for name, data in self.memory.items():
                region = self.regions[name]
                if not region.since or full or base is None:
                    region = self.regions[name] = replace(region, since=generation)
                old = None if region.since == generation else self.truth[before or 0][name]
                self._frames(segment, region, data, old, self._runs(name, len(data), old is None))
                self.dirty[name].clear()
            entries: tuple[SegmentEntry, ...] = (*(base.segments if base else ()), segment.finish())
            manifest = Manifest(
                store_id=self.store.store_id,
                generation=generation,
                revision=0,
                parent=before,
                created=time.time(),
                kind="increment" if base else "full",
                page_bytes=PAGE,
                meta=meta,
                regions=tuple(sorted(self.regions.values(), key=lambda each: each.number)),
                segments=entries,
            )
            writer.publish(manifest)
        self.manifests[generation] = manifest
        self.truth[generation] = {name: bytes(data) for name, data in self.memory.items()}
        return generation

    def _runs(self, name: str, nbytes: int, everything: bool) -> list[tuple[int, int]]:
        pages = range(-(-nbytes // PAGE)) if everything else sorted(self.dirty[name])
        runs: list[tuple[int, int]] = []
        for page in pages:
            start, end = page * PAGE, min(page * PAGE + PAGE, nbytes)
            if runs and sum(runs[-1]) == start and end - runs[-1][0] <= self.frame_bytes:
                runs[-1] = runs[-1][0], end - runs[-1][0]
            else:
                runs.append((start, end - start))
        return runs

    def _frames(
        self, segment: SegmentWriter, region: RegionEntry, data: bytearray, old: bytes | None, runs: Runs
    ) -> None:
        frames: list[list[tuple[int, int]]] = []
        for run in runs:
            if frames and sum(n for _, n in frames[-1]) + run[1] <= self.frame_bytes:
                frames[-1].append(run)
            else:
                frames.append([run])
        self.random.shuffle(frames)  # the order within a segment says nothing
        for frame in frames:
            packed = b"".join(bytes(data[at : at + n]) for at, n in frame)
            spans = array("Q", [number for run in frame for number in run])
            if all_zero(packed):
                segment.add(region.number, spans, kind=FrameKind.ZEROS)
                continue
            kind = FrameKind.PAGES
            if old is not None and self.deltas and self.random.random() < 0.5:
                before = b"".join(old[at : at + n] for at, n in frame)
                packed, kind = bytes(diff(packed, bytearray(before))), FrameKind.DELTA
            made = self.encoder.encode(packed)
            segment.add(
                region.number,
                spans,
                made.stored,
                kind=kind,
                codec=made.codec,
                encrypted=made.encrypted,
                plain_nbytes=len(packed),
            )

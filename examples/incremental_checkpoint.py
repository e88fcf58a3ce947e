# SPDX-License-Identifier: MIT
"""A forest fire on a grid, checkpointed step by step into one file: only the pages on fire are written.

Run it as ``python examples/incremental_checkpoint.py``. It burns, "crashes" in the middle of an append, restores the
file and compares: the exit status is 0 only if every byte came back.
"""

from __future__ import annotations

import itertools
import random
import struct
import sys
import tempfile
import zlib
from pathlib import Path
from typing import BinaryIO

import dirtytrack

SIDE = 4096  # cells, one byte each
TREE, FIRE, ASH = 1, 2, 3
STEPS = 40
HEADER = struct.Struct("<8sQQQI")  # magic, epoch, ranges, bytes, checksum of ranges and bytes
MAGIC = b"epoch\0\0\0"
RANGE = struct.Struct("<QQ")  # byte offsets into the grid: start, end


class Fire:
    """The simulation. It knows nothing of checkpoints: it stores into `grid` and that is all."""

    def __init__(self, grid: dirtytrack.Memory) -> None:
        self.cells = memoryview(grid)
        self.cells[:] = bytes([TREE]) * len(self.cells)
        self.random = random.Random(1)
        self.burning = [SIDE // 2 * SIDE + SIDE // 2]

    def step(self) -> None:
        caught = []
        for cell in self.burning:
            self.cells[cell] = ASH
            for near in (cell - 1, cell + 1, cell - SIDE, cell + SIDE):
                if 0 <= near < len(self.cells) and self.cells[near] == TREE and self.random.random() < 0.7:
                    self.cells[near] = FIRE
                    caught.append(near)
        self.burning = caught


def append(file: BinaryIO, epoch: int, ranges: bytes, data: bytes | bytearray | memoryview) -> None:
    checksum = zlib.crc32(data, zlib.crc32(ranges))
    file.write(HEADER.pack(MAGIC, epoch, len(ranges) // RANGE.size, len(data), checksum))
    file.write(ranges)
    file.write(data)
    file.flush()


def save(file: BinaryIO, tracker: dirtytrack.DirtyTracker) -> dirtytrack.DirtySet:
    """Appends what changed since the last save. If that fails, the pages go back and the next save has them."""
    dirty = tracker.collect()
    try:
        append(file, dirty.epoch, dirty.offsets("grid").tobytes(), dirty.gather())
    except BaseException:
        tracker.put_back(dirty)
        raise
    return dirty


def restore(file: BinaryIO, grid: bytearray) -> int:
    """Applies every whole record in order; a torn one ends the file. Returns how many records there were."""
    for records in itertools.count():
        header = file.read(HEADER.size)
        if len(header) < HEADER.size:
            return records
        magic, _epoch, count, nbytes, checksum = HEADER.unpack(header)
        ranges, data = file.read(count * RANGE.size), file.read(nbytes)
        if magic != MAGIC or zlib.crc32(data, zlib.crc32(ranges)) != checksum:
            return records
        position = 0
        for start, end in RANGE.iter_unpack(ranges):
            grid[start:end] = data[position : position + end - start]
            position += end - start
    raise AssertionError("unreachable")


def main() -> int:
    grid = dirtytrack.allocate(SIDE * SIDE, name="grid")
    fire = Fire(grid)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "fire.checkpoint"
        with path.open("wb") as file, dirtytrack.track({"grid": grid}) as tracker:
            append(file, 0, RANGE.pack(0, len(grid)), memoryview(grid))  # tracking runs already: nothing slips between
            base, appended = file.tell(), 0
            for _ in range(STEPS):
                fire.step()
                dirty = save(file, tracker)
                appended += dirty.nbytes
            expected = bytes(grid)
            fire.step()
            save(file, tracker)
            file.truncate(file.tell() - 100)  # the crash, in the middle of the last append

        restored = bytearray(len(grid))
        with path.open("rb") as file:
            records = restore(file, restored)
    whole = STEPS * len(expected)
    print(f"base {base:,} bytes, then {STEPS} epochs of {appended // STEPS:,} bytes on average")
    print(f"full copies would have been {whole:,} bytes, {whole / max(appended, 1):.0f} times as much")
    ok = records == STEPS + 1 and restored == expected and 0 < appended < whole
    print(f"restored {records} records: {'identical' if ok else 'DIFFERENT'}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())

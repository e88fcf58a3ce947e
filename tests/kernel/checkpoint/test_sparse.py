# SPDX-License-Identifier: MIT
"""Large reservations that are mostly empty: neither memory nor disk is taken for what was never written."""

from __future__ import annotations

import mmap
import random
from pathlib import Path

import pytest

from dirtytrack.checkpoint import Checkpointer, compact, restore, verify
from tests.saving import PAGE

GIB = 1 << 30
MIB = 1 << 20
NORESERVE = 0x4000


def reserved(nbytes: int) -> mmap.mmap:
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def stored_bytes(where: Path) -> int:
    return sum(path.stat().st_size for path in where.rglob("*") if path.is_file())


def test_a_reservation_takes_what_was_written_to_it(where: Path) -> None:
    memory, before = reserved(64 * GIB), resident_bytes()
    apart = len(memory) // 64
    for page in range(64):
        memory[page * apart : page * apart + 8] = b"%08d" % page
    with Checkpointer(where, {"memory": memory}, staging_bytes=4 * MIB) as ckpt:
        first = ckpt.save()
        assert first.wait(60) and first.kind == "full"
        for page in range(64):
            memory[page * apart + PAGE] = 1 + page
        second = ckpt.save()
        assert second.wait(60) and second.kind == "increment"
        assert second.bytes_dirty <= 64 * PAGE  # what was not there was not read, which would have made it be there
    assert resident_bytes() - before < 64 * MIB
    assert stored_bytes(where) < MIB

    def require_whole() -> None:
        # Where huge pages are given for a write, that is one each for 64 pages of the copy.
        found = restore(where)["memory"]
        assert len(found) == len(memory)
        for page in range(64):
            at = page * apart
            assert bytes(found[at : at + 2 * PAGE]) == memory[at : at + 2 * PAGE]
            assert not any(found[at + apart - PAGE : at + apart])
        assert resident_bytes() - before < 512 * MIB

    require_whole()
    again = reserved(len(memory))
    again[9] = 9
    with Checkpointer(where, {"memory": again}, resume=True, staging_bytes=4 * MIB) as ckpt:
        assert again[:16] == memory[:16]
        assert resident_bytes() - before < 64 * MIB
        again[5] = 5
        assert ckpt.save().wait(60)
    memory[5] = 5
    assert compact(where, memory_bytes=64 * MIB).kind == "compacted"
    assert stored_bytes(where) < MIB
    assert verify(where, all=True).ok
    require_whole()


@pytest.mark.parametrize("deltas", [False, True])
def test_holes_that_are_made_and_filled(where: Path, deltas: bool) -> None:
    """Beside a copy of the stretch that is used."""
    draw = random.Random(7)
    memory, used = reserved(4 * GIB if not deltas else 64 * MIB), 24 * MIB
    base = len(memory) // 2 + 5 * PAGE
    view = memoryview(memory)[base : base + used]
    digests = []
    with Checkpointer(where, {"memory": memory}, deltas=deltas, staging_bytes=4 * MIB) as ckpt:
        for _ in range(12):
            for _ in range(draw.randrange(4)):
                at, nbytes = draw.randrange(used // PAGE) * PAGE, draw.choice((PAGE, 64 * PAGE, 3 * MIB, 9 * MIB))
                nbytes = min(nbytes, used - at)
                match draw.randrange(3):
                    case 0:
                        memory.madvise(mmap.MADV_DONTNEED, base + at, nbytes)
                    case 1:
                        view[at : at + nbytes] = draw.randbytes(16) * (nbytes // 16)
                    case _:
                        bytes(view[at : at + nbytes])  # only read
            save = ckpt.save(full=draw.random() < 0.2)
            assert save.wait(60)
            digests.append((save.generation, bytes(view)))
    restored = reserved(len(memory))
    for generation, data in digests:
        restore(where, generation=generation, into={"memory": restored})
        assert restored[base : base + used] == data
    view.release()

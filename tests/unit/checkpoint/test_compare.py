# SPDX-License-Identifier: MIT
"""What two generations differ in, against a comparison of every byte; and which generations there are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from dirtytrack.checkpoint import DirectoryStore, compact, compare, generations
from dirtytrack.checkpoint.comparing import RegionComparison
from dirtytrack.errors import DamagedCheckpoint, InvalidCheckpoint, NoSuchGeneration
from tests.generations import PAGE, History, Keyed
from tests.storing import READS, Hooked


def history(where: Path, **options: object) -> History:
    made = History(DirectoryStore(where / "store", create=True), 8, **options)  # type: ignore[arg-type]
    made.add("x", 60 * PAGE + 3)
    made.add("y", 9 * PAGE)
    made.add("gone", 100)
    for step in range(6):
        made.save({"step": step})
        made.write(5)
        if step == 1:
            made.add("y", 12 * PAGE + 1)
        if step == 2:
            made.remove("gone")
            made.add("new", 2 * PAGE)
        if step == 3:
            made.add("y", 7 * PAGE)
    return made


def expected(older: Mapping[str, bytes], newer: Mapping[str, bytes]) -> dict[str, tuple[str, int, list[int]]]:
    """By name: what became of it, how many bytes differ, and which blocks of 4096 bytes have one that does."""
    found: dict[str, tuple[str, int, list[int]]] = {}
    for name in older.keys() | newer.keys():
        if name not in older or name not in newer:
            data = older.get(name) or newer[name]
            blocks = list(range(-(-len(data) // 4096)))
            found[name] = ("added" if name in newer else "removed", len(data), blocks)
            continue
        most = max(len(older[name]), len(newer[name]))
        one, other = (np.frombuffer(data.ljust(most, b"\0"), np.uint8) for data in (older[name], newer[name]))
        differs = one != other
        differs[min(len(older[name]), len(newer[name])) :] = True
        where = np.flatnonzero(differs)
        found[name] = ("changed" if len(where) else "same", len(where), sorted(set((where // 4096).tolist())))
    return found


def blocks_of(region: RegionComparison) -> list[int]:
    """Of its runs, which are in order, apart, and within it."""
    blocks: list[int] = []
    for offset, nbytes in region.runs:
        assert offset % 4096 == 0 and nbytes > 0
        assert not blocks or offset // 4096 > blocks[-1] + 1
        blocks += range(offset // 4096, -(-(offset + nbytes) // 4096))
    return blocks


@pytest.mark.parametrize("stored", ["plain", "encrypted"])
def test_each_pair_of_generations_against_a_comparison_of_bytes(where: Path, stored: str) -> None:
    key = Keyed(9) if stored == "encrypted" else None
    made = history(where, encrypt=key, compression="zstd")
    for compacted in (False, True):
        if compacted:
            compact(made.store, 4, encrypt=key, decrypt=key)
        for older in made.truth:
            for newer in made.truth:
                found = compare(made.store, older, newer, memory_bytes=8 << 20, decrypt=key)
                truth = expected(made.truth[older], made.truth[newer])
                assert {each.name: (each.what, each.changed_nbytes, blocks_of(each)) for each in found.regions} == truth
                assert found.changed_nbytes == sum(nbytes for _, nbytes, _ in truth.values())


def test_what_is_in_common_is_not_read(where: Path) -> None:
    made = history(where, deltas=False)
    read = 0

    class Counting(Hooked):
        def operate(self, name, call, *args, **options):  # type: ignore[no-untyped-def]
            nonlocal read
            result = call(*args, **options)
            read += result if name in READS else 0
            return result

    big = History(DirectoryStore(where / "big", create=True), deltas=False)
    big.add("x", 40 << 20)
    big.save()
    big.memory["x"][5] ^= 1
    big.dirty["x"].add(0)
    big.save()
    with DirectoryStore(where / "big", files=Counting()) as store:
        (region,) = compare(store, 1, 2, memory_bytes=8 << 20).regions
    assert (region.changed_nbytes, region.runs) == (1, ((0, 4096),))
    assert read < 5 << 20
    assert made.truth


def test_progress_and_what_is_refused(where: Path) -> None:
    made = history(where)
    seen: list[tuple[int, int]] = []
    compare(where / "store", 2, 5, progress=lambda done, total: seen.append((done, total)))
    total = sum(map(len, made.truth[5].values()))
    assert seen[-1] == (total, total) and seen == sorted(seen)
    with pytest.raises(NoSuchGeneration):
        compare(made.store, 2, 50)
    with pytest.raises(InvalidCheckpoint, match="memory_bytes="):
        compare(made.store, 2, 5, memory_bytes=5)
    (where / "store" / "segments" / made.manifests[5].segments[-1].name).unlink()
    with pytest.raises(DamagedCheckpoint) as caught:
        compare(made.store, 2, 5)
    assert caught.value.generation == 5


def test_generations_are_listed_with_what_can_be_seen_of_them(where: Path) -> None:
    made = history(where)
    compact(made.store, 5)
    found = generations(where / "store")
    assert [each.generation for each in found] == [1, 2, 3, 4, 5, 6]
    assert [each.kind for each in found] == ["full", *["increment"] * 3, "compacted", "increment"]
    assert [each.parent for each in found] == [None, 1, 2, 3, 4, 5]
    assert [each.meta for each in found] == [{"step": step} for step in range(6)]
    for each in found:
        manifest = made.store.manifest(each.generation)
        assert each.nbytes == sum(map(len, made.truth[each.generation].values()))
        assert each.segment_count == len(manifest.segments) and each.stored_nbytes == manifest.stored_nbytes
        paths = (where / "store" / "segments").glob(f"{each.generation:016d}-*")
        names = {entry.name for entry in manifest.segments}
        assert each.written_nbytes == sum(path.stat().st_size for path in paths if path.name in names)
        assert each.created == manifest.created and not each.damage
    damaged = where / "store" / "segments" / made.manifests[3].segments[-1].name
    damaged.write_bytes(b"short")
    (where / "store" / "manifests" / made.manifests[2].name).write_bytes(b"nothing")
    found = generations(made.store)
    assert [bool(each.damage) for each in found] == [False, True, True, True, False, True]
    assert found[1].kind is None and found[2].kind == "increment"
    with DirectoryStore(where / "empty", create=True) as store:
        assert generations(store) == ()

# SPDX-License-Identifier: MIT
"""Whatever bit of a store is another than what was written, `verify` says so; so of bytes that are missing or more."""

from __future__ import annotations

import errno
import os
import random
import shutil
from itertools import starmap
from pathlib import Path
from typing import NamedTuple

import pytest

from dirtytrack.checkpoint import DirectoryStore, verify
from dirtytrack.checkpoint.coding import Decoder, Encoder
from dirtytrack.checkpoint.manifests import SegmentEntry, manifest_of_name
from dirtytrack.checkpoint.protocols import Kept
from dirtytrack.checkpoint.verifying import segment_damage
from dirtytrack.errors import DamagedCheckpoint, InvalidCheckpoint, NoSuchGeneration
from tests.storing import PAGE, READS, Failing, kept, read_back, save, store_at

FLIPS = 10_000
RANDOM = random.Random(31)
NOISE = RANDOM.randbytes(2 * PAGE)
CONTENTS = [
    {"a": bytes([i]) * PAGE + NOISE + bytes(3 * PAGE), "text": b"To be, or not to be. " * (400 + i), "b": b"\x05" * 99}
    for i in range(4)
]


def shifted(data: bytes) -> bytes:
    """A cipher that nobody should use: each byte and 1."""
    return bytes((byte + 1) & 255 for byte in data)


def shifted_back(data: bytes) -> bytes:
    return bytes((byte - 1) & 255 for byte in data)


def make(path: Path) -> None:
    """Three generations, one encrypted, the newest compacted with its older revision still there."""
    with store_at(path) as store, store.writer() as writer:
        first = save(writer, store, CONTENTS[0], encoder=Encoder("zstd"), meta={"step": 1})
        second = save(writer, store, CONTENTS[1], CONTENTS[0], first, encoder=Encoder("zstd", 3, shifted))
        third = save(writer, store, CONTENTS[2], CONTENTS[1], second)
        save(writer, store, CONTENTS[2], None, third, revision=1, generation=3)


class Part(NamedTuple):
    path: Path
    entries: tuple[SegmentEntry, ...]
    """What manifests say of it, where it is a segment."""


def parts_of(path: Path) -> list[Part]:
    with DirectoryStore(path) as store:
        named = {entry for each in store.catalog() for entry in store.manifest(*each).segments}
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.stat().st_size]
    return [Part(file, tuple(entry for entry in named if entry.name == file.name)) for file in files]


def is_found(path: Path, part: Part, store: DirectoryStore) -> bool:
    """Whether verify() of all would find it: only that part of it runs which reads this file."""
    if part.path.parent.name == "segments":
        return all(any(segment_damage(store, entry, lambda _: None)) for entry in part.entries)
    if part.path.parent.name == "manifests":
        which = manifest_of_name(part.path.name)
        assert which is not None
        with pytest.raises(DamagedCheckpoint):
            store.manifest(*which)
        return True
    with DirectoryStore(path) as again:
        return bool(again.damage())


def flip(path: Path, at: int, bit: int) -> None:
    file = os.open(path, os.O_RDWR)
    try:
        os.pwrite(file, bytes([os.pread(file, 1, at)[0] ^ 1 << bit]), at)
    finally:
        os.close(file)


def test_ten_thousand_bits(where: Path) -> None:
    path = where / "store"
    make(path)
    assert verify(path, all=True).ok
    parts = parts_of(path)
    assert len(parts) == 1 + 4 + 4
    sizes = [part.path.stat().st_size for part in parts]
    missed = []
    with DirectoryStore(path) as store:
        for i in range(FLIPS):
            part = RANDOM.choices(parts, sizes)[0] if i % 4 else RANDOM.choice(parts)  # small files often enough
            at, bit = RANDOM.randrange(part.path.stat().st_size), RANDOM.randrange(8)
            flip(part.path, at, bit)
            if not is_found(path, part, store) or (i % 100 == 0 and verify(path, all=True).ok):
                missed.append((part.path.name, at, bit))
            flip(part.path, at, bit)
    assert not missed
    assert verify(path, all=True).ok


def test_each_bit_of_a_marker_and_of_a_manifest(where: Path) -> None:
    path = where / "store"
    make(path)
    with DirectoryStore(path) as store:
        for part in parts_of(path):
            if part.path.parent.name != "segments" and not part.path.name.startswith("0000000000000003"):
                for at in range(part.path.stat().st_size):
                    flip(part.path, at, at % 8)
                    assert is_found(path, part, store), at
                    flip(part.path, at, at % 8)


def test_files_cut_short_longer_missing_or_exchanged(where: Path) -> None:
    make(where / "whole")
    names = [part.path.relative_to(where / "whole") for part in parts_of(where / "whole")]
    path = where / "store"
    for name in names:
        data = (where / "whole" / name).read_bytes()
        others = [data[:-1], data[: len(data) // 2], b"", data + b"\0", data + data]
        others += [(where / "whole" / other).read_bytes() for other in names if other != name]
        for other in [*others, None]:
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(where / "whole", path)
            (path / name).unlink()
            if other is not None:
                (path / name).write_bytes(other)
            report = verify(path, all=True)
            if other is None and name.parent.name == "manifests":
                assert report.ok  # nobody knows that it was there; another revision or what it named tells
                continue
            assert not report.ok, (name, other)


def test_what_is_damaged_and_what_is_whole(where: Path) -> None:
    make(where / "store")
    segments = sorted((where / "store" / "segments").iterdir())
    newest = DirectoryStore(where / "store").manifest(3, 0).segments[-1].name
    flip(where / "store" / "segments" / newest, 5000, 0)
    report = verify(where / "store", all=True)
    assert [(each.generation, each.revision) for each in report.checked if each.damage] == [(3, 0)]
    assert newest in report.checked[2].damage[0]
    assert report.whole == 3
    assert not verify(where / "store").ok
    for segment in segments:
        if segment.name.startswith("0000000000000003"):
            flip(segment, 100, 3)
    report = verify(where / "store", all=True)
    assert report.whole == 2
    assert not report.ok and not report.damage and not report.strangers
    assert verify(where / "store", 2).ok
    with pytest.raises(NoSuchGeneration, match="it has 1, 2, 3"):
        verify(where / "store", 4)


def test_progress_ends_at_the_total(where: Path) -> None:
    make(where / "store")
    seen: list[tuple[int, int]] = []
    report = verify(where / "store", all=True, progress=lambda done, total: seen.append((done, total)))
    total = sum(path.stat().st_size for path in (where / "store" / "segments").iterdir())
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)
    assert report.read_nbytes == total


def test_a_damaged_revision_leaves_the_one_before(where: Path) -> None:
    make(where / "store")
    flip(where / "store" / "manifests" / "0000000000000003.1.manifest", 50, 1)
    with DirectoryStore(where / "store") as store:
        assert store.manifest().revision == 0
        assert read_back(store, decoder=Decoder(shifted_back)) == CONTENTS[2]
        flip(where / "store" / "manifests" / "0000000000000003.0.manifest", 50, 1)
        with pytest.raises(DamagedCheckpoint) as raised:
            store.manifest()
        assert raised.value.generation == 3
        assert store.manifest(2).generation == 2


def test_nothing_that_a_damaged_manifest_may_name_is_removed(where: Path) -> None:
    make(where / "store")
    before = sorted((where / "store" / "segments").iterdir())
    for manifest in (where / "store" / "manifests").glob("*3.*"):
        flip(manifest, 50, 1)
    with DirectoryStore(where / "store") as store, store.writer() as writer:
        assert writer.clean() == ()
        assert writer.remove([Kept(1, 0)])
        assert writer.next_generation() == 4
    assert sorted((where / "store" / "segments").iterdir()) == before
    for manifest in (where / "store" / "manifests").glob("*3.*"):
        flip(manifest, 50, 1)
    with DirectoryStore(where / "store") as store:
        assert read_back(store) == CONTENTS[2]


@pytest.mark.parametrize("how", ["damaged", "missing"])
def test_a_damaged_marker_takes_no_checkpoint_with_it_and_is_written_anew(where: Path, how: str) -> None:
    make(where / "store")
    marker = where / "store" / "dirtytrack-store"
    whole = marker.read_bytes()
    if how == "damaged":
        flip(marker, 30, 2)
    else:
        marker.unlink()
    with DirectoryStore(where / "store") as store:
        assert read_back(store) == CONTENTS[2]
        report = verify(store, all=True)
        assert len(report.damage) == 1 and not report.ok and report.whole == 3
        with store.writer():
            pass
        assert verify(store, all=True).ok
    assert marker.read_bytes() == whole
    with DirectoryStore(where / "store", create=True) as store:
        assert verify(store, all=True).ok


def test_a_damaged_marker_of_a_store_without_checkpoints(where: Path) -> None:
    store_at(where / "store").close()
    flip(where / "store" / "dirtytrack-store", 30, 2)
    with pytest.raises(DamagedCheckpoint, match="no checkpoint is there"):
        DirectoryStore(where / "store", create=True)


def test_a_disk_that_cannot_read_some_bytes(where: Path) -> None:
    """EIO while reading is damage of what is read, not the end of looking."""
    make(where / "store")
    files = Failing(only=READS)
    with DirectoryStore(where / "store", files=files) as store:
        assert verify(store, all=True).ok
        count = files.count
    damaged = 0
    for nth in range(1, count + 1):
        files = Failing(nth, errno.EIO, only=READS)
        with DirectoryStore(where / "store", files=files) as store:
            report = verify(store, all=True)
            damaged += not report.ok
        assert not files.descriptors
    assert damaged == count - 4 > 20  # at last the manifests are read again, to tell what belongs to none


def test_bytes_that_no_frame_tells_are_found(where: Path) -> None:
    """A manifest may be all that it should be, and yet name too little."""
    with store_at(where / "store") as store, store.writer() as writer:
        first = save(writer, store, CONTENTS[0])
        second = save(writer, store, CONTENTS[1], CONTENTS[0], first)
        writer.publish(second.__class__(**{**second.__dict__, "revision": 1, "segments": second.segments[1:]}))
        report = verify(store)
        assert [bool(each.damage) for each in report.checked] == [False, True]
        assert "has no bytes at" in report.checked[1].damage[0]
        assert kept(second) in starmap(Kept, [(each.generation, each.revision) for each in report.checked])


@pytest.mark.parametrize("error", [InvalidCheckpoint, DamagedCheckpoint])
def test_another_key_gives_no_wrong_bytes(where: Path, error: type[Exception]) -> None:
    make(where / "store")
    with DirectoryStore(where / "store") as store:
        assert read_back(store, 2, Decoder(shifted_back)) == CONTENTS[1]
        if error is InvalidCheckpoint:
            with pytest.raises(InvalidCheckpoint, match="another key"):
                read_back(store, 2, Decoder(shifted))
            with pytest.raises(InvalidCheckpoint, match="is encrypted"):
                read_back(store, 2)
            with pytest.raises(InvalidCheckpoint, match="returns bytes"):
                read_back(store, 2, Decoder(lambda _: None))  # type: ignore[arg-type, return-value]
            return
        (segment,) = (where / "store" / "segments").glob("0000000000000002*")
        flip(segment, 4100, 0)
        with pytest.raises(DamagedCheckpoint, match="is damaged between 4096 and"):
            read_back(store, 2, Decoder(shifted_back))

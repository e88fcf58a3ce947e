# SPDX-License-Identifier: MIT
"""Stores that somebody made up, checksums and all: a named error, no crash, no way out of the store, bounded memory."""

from __future__ import annotations

import json
import os
import random
import struct
import tracemalloc
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from dirtytrack.checkpoint import DirectoryStore, verify
from dirtytrack.checkpoint.coding import Encoder
from dirtytrack.checkpoint.manifests import MOST_MANIFEST_NBYTES, Manifest, segment_name
from dirtytrack.checkpoint.segments import Codec, FrameKind
from dirtytrack.errors import DamagedCheckpoint, DirtyTrackError, InvalidCheckpoint, InvalidDelta, StoreFailed
from dirtytrack.kernel.packing import xxh64
from tests.storing import PAGE, Failing, read_back, save, store_at

CONTENTS = {"a": b"\x01" * 2 * PAGE + bytes(PAGE), "b": b"words " * 1000}
CHANGED = {"a": b"\x02" * 2 * PAGE + bytes(PAGE), "b": b"words " * 1000}


def make(path: Path) -> Manifest:
    with store_at(path) as store, store.writer() as writer:
        first = save(writer, store, CONTENTS, encoder=Encoder("zstd"), meta={"step": [1, 2.5, None, "x"]})
        return save(writer, store, CHANGED, CONTENTS, first, encoder=Encoder("zstd"))


def sealed(body: bytes, *, version: int = 1, zero: int = 0, nbytes: int | None = None) -> bytes:
    """A manifest's file with that body, whose checksum is right."""
    data = struct.pack("<8sIIQ", b"DTMANIFS", version, zero, len(body) if nbytes is None else nbytes) + body
    return data + sha256(data).digest()


def members_of(manifest: Manifest) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(manifest.encode()[24:-32])
    return found


def forge(path: Path, manifest: Manifest, members: Any) -> None:
    """Put another body into the manifest's file."""
    body = members if isinstance(members, bytes) else json.dumps(members).encode()
    (path / "manifests" / manifest.name).write_bytes(sealed(body))


def forge_segment(path: Path, manifest: Manifest, change: Callable[[bytearray, bytearray], None]) -> None:
    """Let frames (from byte 4096 on) and index of the newest segment be changed, and all checksums be right again."""
    members = members_of(manifest)
    entry = members["segments"][-1]
    file = path / "segments" / entry["name"]
    data = file.read_bytes()
    frames, index = bytearray(data[4096 : entry["index_offset"]]), bytearray(data[entry["index_offset"] :])
    change(frames, index)
    file.write_bytes(data[:4096] + frames + index)
    entry |= {
        "nbytes": 4096 + len(frames) + len(index),
        "index_offset": 4096 + len(frames),
        "index_nbytes": len(index),
        "index_sha256": sha256(index).hexdigest(),
    }
    forge(path, manifest, members)


@contextmanager
def at_most(mebibytes: float) -> Iterator[None]:
    """What Python and zstd's output take meanwhile."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < mebibytes * (1 << 20)
    finally:
        tracemalloc.stop()


def look(path: Path, files: Failing | None = None) -> None:
    """Everything that reads: nothing but named errors may come of it, and no descriptor stays open."""
    files = files or Failing()
    with DirectoryStore(path, files=files) as store:
        report = verify(store, all=True)
        assert isinstance(report.ok, bool)
        try:
            if store.manifest().nbytes < 1 << 26:  # the plain restore of tests takes all memory at once
                read_back(store)
        except DirtyTrackError:
            pass
        try:
            with store.writer() as writer:
                writer.next_generation()
        except InvalidCheckpoint:
            pass
    assert not files.descriptors


# ---- manifests

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, 2, 4095, 4096, 2**31, 2**32 - 1, 2**32, 2**56, 2**56 + 1, 2**63, 2**64, 10**16, -1]),
    st.floats(),
    st.text(max_size=40),
    st.sampled_from(["../../../etc/passwd", "/etc/passwd", "", "a\0b", "0000000000000001-0123456789abcdef.segment"]),
    st.lists(st.integers(-2, 5000), max_size=4),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


@st.composite
def forgeries(draw: st.DrawFn, members: dict[str, Any]) -> Any:
    """The members of a manifest, changed in a few places."""
    changed = json.loads(json.dumps(members))
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from([place for place in places(changed) if place]))
        holder = changed
        for key in way:
            holder = holder[key]
        what = draw(st.sampled_from(["put", "put", "put", "remove", "again"]))
        if what == "put":
            holder[last] = draw(JUNK)
        elif what == "remove":
            del holder[last]
        elif isinstance(holder, list):
            holder.append(holder[last])
        else:
            holder[draw(st.text(max_size=5))] = holder[last]
        if not [place for place in places(changed) if place]:
            break
    return changed


def test_forged_manifests(where: Path) -> None:
    manifest = make(where / "store")

    @given(forgeries(members_of(manifest)))
    @settings(max_examples=300)
    def attempt(members: Any) -> None:
        data = sealed(json.dumps(members).encode())
        try:
            decoded = Manifest.decode(data)
        except InvalidCheckpoint:
            pass
        else:
            assert decoded == Manifest.decode(decoded.encode()) or "NaN" in json.dumps(members)
        forge(where / "store", manifest, members)
        look(where / "store")

    attempt()


@given(st.binary(max_size=300), st.booleans())
def test_manifests_of_any_bytes(data: bytes, sealing: bool) -> None:
    with pytest.raises((InvalidCheckpoint, DamagedCheckpoint)):
        Manifest.decode(sealed(data) if sealing else data)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 1_000_000,
        b'{"a":' * 100_000,
        b"[]",
        b"1",
        b"9" * 100_000,
        b'{"a":1,"a":2}',
        b"\xff\xfe",
        b'{"created":NaN}',
        b"{" + b" " * 1_000_000 + b"}",
    ],
    ids=range(9),
)
def test_bodies_that_are_no_manifest(where: Path, body: bytes) -> None:
    manifest = make(where / "store")
    with at_most(40), pytest.raises(InvalidCheckpoint):
        Manifest.decode(sealed(body))
    forge(where / "store", manifest, body)
    look(where / "store")


def test_manifests_in_numbers() -> None:
    with pytest.raises(InvalidCheckpoint, match="version 2"):
        Manifest.decode(sealed(b"{}", version=2))
    with pytest.raises(DamagedCheckpoint):
        Manifest.decode(sealed(b"{}", zero=1))
    with pytest.raises(DamagedCheckpoint):
        Manifest.decode(sealed(b"{}", nbytes=3))
    with pytest.raises(InvalidCheckpoint, match="the most"):
        Manifest.decode(bytes(MOST_MANIFEST_NBYTES + 1))


def test_a_manifest_longer_than_any_is_not_read_whole(where: Path) -> None:
    manifest = make(where / "store")
    os.truncate(where / "store" / "manifests" / manifest.name, 1 << 40)
    peak = at_most(2 * MOST_MANIFEST_NBYTES / (1 << 20) + 1)
    with DirectoryStore(where / "store") as store, peak, pytest.raises(InvalidCheckpoint, match="the most"):
        store.manifest()


MAPPING: dict[str, Any] = {
    "start": 4096,
    "end": 8192,
    "permissions": "rw-p",
    "offset": 0,
    "device": "00:00",
    "inode": 0,
    "path": "",
    "saved": None,
    "why": "empty",
}
THREAD: dict[str, Any] = {"tid": 1, "name": "", "registers": {"prstatus": "00"}, "signal_mask": "00" * 8}
IMAGE: dict[str, Any] = {
    "pid": 1,
    "comm": "",
    "executable": "",
    "arguments": [],
    "machine": "x86_64",
    "page_bytes": 4096,
    "auxv": "",
    "frozen_at": 0,
    "threads": [THREAD],
    "mappings": [MAPPING],
}


def test_the_least_that_a_manifest_may_say_of_a_process(where: Path) -> None:
    manifest = make(where / "store")
    forge(where / "store", manifest, {**members_of(manifest), "threads": IMAGE})
    with DirectoryStore(where / "store") as store:
        assert store.manifest().threads == IMAGE


@pytest.mark.parametrize(
    ("member", "value", "problem"),
    [
        ("generation", 3, "says that it is generation 3"),
        ("generation", True, "no whole number"),
        ("revision", 1, "revision 1"),
        ("store_id", "0" * 32, "another store"),
        ("store_id", "x" * 32, "store_id"),
        ("parent", 2, "parent"),
        ("created", 1e300, "created"),
        ("kind", "diff", "kind"),
        ("page_bytes", 4095, "power of two"),
        ("ranks", [1], "ranks"),
        ("threads", {}, "has no 'pid'"),
        ("threads", [], "is no object"),
        ("threads", IMAGE | {"pid": 0}, "process's number"),
        ("threads", IMAGE | {"arguments": "ls"}, "list of strings"),
        ("threads", IMAGE | {"page_bytes": 512}, "page_bytes"),
        ("threads", IMAGE | {"auxv": "0"}, "auxv"),
        ("threads", IMAGE | {"frozen_at": True}, "frozen_at"),
        ("threads", IMAGE | {"threads": []}, "no threads"),
        ("threads", IMAGE | {"threads": [THREAD | {"registers": {}}]}, "has no 'prstatus'"),
        ("threads", IMAGE | {"threads": [THREAD | {"registers": {"prstatus": "0g"}}]}, "hexadecimal"),
        ("threads", IMAGE | {"threads": [THREAD | {"tid": "1"}]}, "no number or name"),
        ("threads", IMAGE | {"mappings": [MAPPING, MAPPING]}, "overlap"),
        ("threads", IMAGE | {"mappings": [MAPPING | {"end": 4097}]}, "with a page"),
        ("threads", IMAGE | {"mappings": [MAPPING | {"permissions": "rwx"}]}, "permissions"),
        ("threads", IMAGE | {"mappings": [MAPPING | {"saved": []}]}, "empty"),
        ("threads", IMAGE | {"mappings": [MAPPING | {"saved": [[0, 0, 1]]}]}, "four numbers"),
        ("threads", IMAGE | {"mappings": [MAPPING | {"saved": [[77, 0, 1, 0]]}]}, "in no region"),
        ("threads", IMAGE | {"mappings": [MAPPING | {"saved": [[0, 1 << 40, 1, 0]]}]}, "in no region"),
        ("threads", IMAGE | {"mappings": [MAPPING | {"saved": [[0, 0, 1, 4096]]}]}, "outside"),
        ("colour", "red", "unknown 'colour'"),
        ("regions", {}, "no list"),
        ("segments", [1], "no object"),
    ],
)
def test_what_a_manifest_may_not_say(where: Path, member: str, value: Any, problem: str) -> None:
    manifest = make(where / "store")
    forge(where / "store", manifest, {**members_of(manifest), member: value})
    with DirectoryStore(where / "store") as store, pytest.raises(InvalidCheckpoint, match=problem):
        store.manifest()
    look(where / "store")


@pytest.mark.parametrize(
    ("list_name", "member", "value"),
    [
        ("regions", "number", 0),
        ("regions", "name", "a"),
        ("regions", "nbytes", 0),
        ("regions", "nbytes", 2**56),
        ("regions", "shape", [7]),
        ("regions", "shape", [0]),
        ("regions", "shape", [1] * 65),
        ("regions", "dtype", 7),
        ("regions", "since", 3),
        ("segments", "name", "../manifests/0000000000000001.0.manifest"),
        ("segments", "name", "/etc/passwd"),
        ("segments", "name", "0000000000000001-0123456789ABCDEF.segment"),
        ("segments", "generation", 1),
        ("segments", "generation", 3),
        ("segments", "nbytes", 2**57),
        ("segments", "index_offset", 0),
        ("segments", "index_nbytes", 2**40),
        ("segments", "index_sha256", "0" * 63),
    ],
)
def test_what_an_entry_may_not_say(where: Path, list_name: str, member: str, value: Any) -> None:
    manifest = make(where / "store")
    members = members_of(manifest)
    members[list_name][-1][member] = value
    forge(where / "store", manifest, members)
    with DirectoryStore(where / "store") as store, pytest.raises(InvalidCheckpoint, match="cannot be"):
        store.manifest()
    look(where / "store")


def test_no_way_out_of_the_store(where: Path) -> None:
    """Neither by names nor by links: a segment, a manifest, a folder or a lock that is a link is not followed."""
    manifest = make(where / "store")
    secret = where / "secret"
    name = manifest.segments[-1].name
    for path in (where / "store" / "segments" / name, where / "store" / "manifests" / manifest.name):
        path.rename(secret)
        path.symlink_to(secret)
        with DirectoryStore(where / "store") as store, pytest.raises(DamagedCheckpoint, match="never symbolic links"):
            read_back(store)
        path.unlink()
        secret.rename(path)
    lock = where / "store" / "writer.lock"
    lock.unlink()
    lock.symlink_to(secret)
    with DirectoryStore(where / "store") as store, pytest.raises(StoreFailed, match="never symbolic links"):
        store.writer()
    assert not secret.exists()
    (where / "store" / "segments").rename(where / "elsewhere")
    (where / "store" / "segments").symlink_to(where / "elsewhere")
    with pytest.raises(InvalidCheckpoint, match="no store"):
        DirectoryStore(where / "store")
    with store_at(where / "other") as store:
        for bad in ("../secret", "/etc/passwd", "", ".", "..", "a", name + "x", name.upper(), name + "\n"):
            with pytest.raises(InvalidCheckpoint, match="no name of a segment"):
                store.open_segment(bad)


def test_what_is_no_file(where: Path) -> None:
    """Pipes, which would never end, and folders."""
    manifest = make(where / "store")
    store_path = where / "store"
    for path in (store_path / "segments" / manifest.segments[-1].name, store_path / "manifests" / manifest.name):
        for put in (os.mkfifo, os.mkdir):
            saved = where / "saved"
            path.rename(saved)
            put(path)
            with DirectoryStore(where / "store") as store, pytest.raises((StoreFailed, DamagedCheckpoint)):
                read_back(store)
            (path.rmdir if path.is_dir() else path.unlink)()
            saved.rename(path)
    look(where / "store")


def test_names_that_are_none_are_left_alone(where: Path) -> None:
    make(where / "store")
    strangers = [
        "manifests/0000000000000009.manifest",
        "manifests/9.0.manifest",
        "manifests/0000000000000000.0.manifest",
        "manifests/٠٠٠٠٠٠٠٠٠٠٠٠٠٠٠٩.0.manifest",
        "manifests/notes.tmp",
        "mine",
        "mine.tmp",
        "segments/mine",
        "segments/x.0123456789abcdef.tmp",
    ]
    for name in strangers:
        (where / "store" / name).write_bytes(b"x")
    (where / "store" / "writer.lock").write_bytes(b"x")
    raw = os.fsencode(where / "store" / "manifests") + b"/\xff\xfe"
    with open(raw, "wb"):
        pass
    with DirectoryStore(where / "store") as store, store.writer() as writer:
        assert [each.generation for each in store.catalog()] == [1, 2]
        assert writer.next_generation() == 3
        assert set(store.strangers()) == {*strangers, "writer.lock", "manifests/\udcff\udcfe"}
        assert verify(store, all=True).ok


# ---- indexes


def test_forged_indexes(where: Path) -> None:
    manifest = make(where / "store")
    segment = where / "store" / "segments" / manifest.segments[-1].name
    whole = segment.read_bytes()

    @given(st.data())
    @settings(max_examples=200)
    def attempt(data: st.DataObject) -> None:
        segment.write_bytes(whole)
        forge_segment(where / "store", manifest, lambda _, index: change(data, index))
        look(where / "store")

    def change(data: st.DataObject, index: bytearray) -> None:
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(index) // 4 - 1)) * 4
            number = data.draw(st.sampled_from([0, 1, 2, 255, 256, 4096, 2**31, 2**32 - 1]) | st.integers(0, 2**32 - 1))
            how = data.draw(st.sampled_from(["number", "number", "number", "cut", "again"]))
            if how == "number":
                index[at : at + 4] = number.to_bytes(4, "little")
            elif how == "cut" and at:
                del index[at:]
            else:
                index += index[at:]

    attempt()


def test_an_index_larger_than_any_is_not_read(where: Path) -> None:
    manifest = make(where / "store")
    members = members_of(manifest)
    entry = members["segments"][-1]
    entry |= {"nbytes": 1 << 41, "index_nbytes": (1 << 41) - entry["index_offset"]}
    forge(where / "store", manifest, members)
    os.truncate(where / "store" / "segments" / entry["name"], 1 << 41)
    with DirectoryStore(where / "store") as store, at_most(1), pytest.raises(InvalidCheckpoint, match="are the most"):
        read_back(store)


# ---- frames


def one_frame(path: Path, stored: bytes, *, plain_nbytes: int, kind: FrameKind = FrameKind.PAGES) -> None:
    """A store of one page, whose frame is compressed, as it says."""
    with store_at(path) as store, store.writer() as writer:
        segment = writer.create_segment(1)
        segment.add(0, array("Q", [0, PAGE]), bytes(PAGE))
        segment.add(0, array("Q", [0, plain_nbytes]), stored, codec=Codec.ZSTD, plain_nbytes=plain_nbytes, kind=kind)
        entry = segment.finish()
        members = dict(members_of(make(path.parent / "model")), store_id=store.store_id, generation=1, parent=None)
        members["regions"] = [dict(members["regions"][0], nbytes=max(plain_nbytes, PAGE), shape=None)]
        members["segments"] = [vars(entry)]
        writer.publish(Manifest.decode(sealed(json.dumps(members).encode())))


def test_a_frame_that_says_less_than_comes_out_of_it(where: Path) -> None:
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(1 << 28))
    unsaid = zstandard.ZstdCompressor(level=1, write_content_size=False).compress(bytes(1 << 26))
    short = zstandard.ZstdCompressor(level=1).compress(bytes(PAGE - 1))
    twice = 2 * zstandard.ZstdCompressor(level=1).compress(bytes(PAGE))
    for i, stored in enumerate([bomb, unsaid, short, twice, b"", b"\x28\xb5\x2f\xfd", bomb[:-3], os.urandom(99)]):
        one_frame(where / str(i) / "store", stored, plain_nbytes=PAGE)
        assert verify(where / str(i) / "store").ok  # the bytes are those that were written
        refused = pytest.raises(DamagedCheckpoint, match="cannot be what was written")
        with DirectoryStore(where / str(i) / "store") as store, at_most(2), refused:
            read_back(store)


def test_forged_frames(where: Path) -> None:
    """Any change of compressed bytes, their checksum made right: refused, or bytes of the right length."""
    seeded = random.Random(5)
    packed = zstandard.ZstdCompressor(level=3).compress((b"words " * 700)[:PAGE])
    manifest = make(where / "store")
    for _ in range(150):
        stored = bytearray(packed)
        for _ in range(seeded.randrange(1, 4)):
            stored[seeded.randrange(len(stored))] ^= 1 << seeded.randrange(8)

        def change(frames: bytearray, index: bytearray, stored: bytearray = stored) -> None:
            head = struct.pack("<IBBBBIIQQQQ", 0, 0, 1, 0, 0, 1, 0, 4096, len(stored), PAGE, xxh64(stored))
            frames[:] = stored
            index[:] = struct.pack("<Q", 1) + head + struct.pack("<QQ", 0, PAGE)

        forge_segment(where / "store", manifest, change)
        look(where / "store")


def test_a_delta_that_is_none(where: Path) -> None:
    stored = zstandard.ZstdCompressor().compress(b"no delta" * 9)
    one_frame(where / "store", stored, plain_nbytes=72, kind=FrameKind.DELTA)
    with DirectoryStore(where / "store") as store, pytest.raises(InvalidDelta):
        read_back(store)


def test_a_segment_of_another_name_or_version(where: Path) -> None:
    manifest = make(where / "store")
    entry = manifest.segments[-1]
    file = where / "store" / "segments" / entry.name
    data = bytearray(file.read_bytes())
    members = members_of(manifest)
    other = segment_name(2, b"\1" * 8)
    file.rename(file.with_name(other))
    members["segments"][-1]["name"] = other
    forge(where / "store", manifest, members)
    with DirectoryStore(where / "store") as store, pytest.raises(DamagedCheckpoint, match="another segment"):
        read_back(store)
    data[8] = 2
    data[48:56] = xxh64(data[:48]).to_bytes(8, "little")
    file.write_bytes(data)
    forge(where / "store", manifest, members_of(manifest))
    with DirectoryStore(where / "store") as store, pytest.raises(InvalidCheckpoint, match="of version 2"):
        read_back(store)


@pytest.mark.parametrize("put", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_manifest_at_all_is_damage_and_an_older_one_whole(where: Path, put: Callable[[Path], None]) -> None:
    from dirtytrack.checkpoint import restore

    newest = make(where / "store")
    put(where / "store" / "manifests" / f"{newest.generation + 1:016}.0.manifest")
    with pytest.raises(DamagedCheckpoint) as caught:
        restore(where / "store")
    assert caught.value.whole == newest.generation
    assert restore(where / "store", fallback=True).generation == newest.generation
    assert verify(where / "store", all=True).whole == newest.generation

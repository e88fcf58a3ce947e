# SPDX-License-Identifier: MIT
"""Stores and manifests as they are to be used: what goes in comes out, one writes, nothing is left behind."""

from __future__ import annotations

import errno
import gc
import os
import signal
import stat
import subprocess
import sys
import threading
from array import array
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dirtytrack.checkpoint import Checkpointer, DirectoryStore, compact, generations, prune, restore, verify
from dirtytrack.checkpoint.files import Files
from dirtytrack.checkpoint.manifests import Manifest, RegionEntry, SegmentEntry, manifest_name, segment_name
from dirtytrack.errors import (
    CheckpointerClosed,
    InvalidCheckpoint,
    NoSuchGeneration,
    StoreBusy,
)
from dirtytrack.kernel.packing import xxh64
from tests.storing import PAGE, Failing, kept, read_back, save, store_at

CONTENTS = [{"a": bytes([i]) * 3 * PAGE, "ü": b"\x07" * 50, "c/../c": bytes(PAGE)} for i in range(1, 9)]


# ---- round trips


NAMES = st.text(max_size=20)
NUMBERS = st.integers(1, 2**40)
META = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    generation = draw(st.integers(1, 10**16 - 1))
    regions = list[RegionEntry]()
    for name in sorted(draw(st.sets(NAMES, max_size=4))):
        shape = draw(st.none() | st.lists(st.integers(1, 50), max_size=4).map(tuple))
        elements = 1
        for length in shape or ():
            elements *= length
        number = (regions[-1].number if regions else -1) + draw(st.integers(1, 9))
        nbytes = elements * draw(st.integers(1, 10**6))
        since = draw(st.integers(1, generation))
        regions.append(RegionEntry(number, name, nbytes, draw(st.none() | NAMES), shape, since))
    segments = list[SegmentEntry]()
    for number in sorted(draw(st.lists(st.integers(1, generation), max_size=4))):
        name = segment_name(number, draw(st.binary(min_size=8, max_size=8)))
        offset, length = 4096 + draw(NUMBERS), draw(NUMBERS)
        if name not in {segment.name for segment in segments}:
            digest = draw(st.binary(min_size=32, max_size=32)).hex()
            segments.append(SegmentEntry(name, number, offset + length, offset, length, digest))
    return Manifest(
        store_id=draw(st.binary(min_size=16, max_size=16)).hex(),
        generation=generation,
        revision=draw(st.integers(0, 10**9 - 1)),
        parent=draw(st.none() | st.integers(1, generation - 1)) if generation > 1 else None,
        created=draw(st.floats(0, 1e11)),
        kind=draw(st.sampled_from(["full", "increment", "compacted"])),
        page_bytes=1 << draw(st.integers(9, 30)),
        meta=draw(META),
        regions=tuple(regions),
        segments=tuple(segments),
    )


@given(manifests())
def test_a_manifest_comes_back(manifest: Manifest) -> None:
    data = manifest.encode()
    assert Manifest.decode(data) == manifest
    assert Manifest.decode(data).encode() == data
    assert manifest.name == manifest_name(manifest.generation, manifest.revision)
    assert manifest.stored_nbytes >= len(manifest.segments)


# ---- who writes


def test_a_forked_child_has_neither_the_lock_nor_the_segments(where: Path) -> None:
    with store_at(where / "store") as store:
        writer = store.writer()
        segment = writer.create_segment(1)
        pid = os.fork()
        if not pid:
            try:
                writer.close()
                segment.abandon()
                try:
                    segment.add(0, array("Q", [0, 1]), b"x")
                except CheckpointerClosed:
                    os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert len(store.segments()) == 1
        with pytest.raises(StoreBusy):
            store.writer()
        waiting, ending = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(ending)
            os.read(waiting, 1)  # until the parent lets go
            os._exit(0)
        os.close(waiting)
        writer.close()
        with store.writer():
            pass
        os.close(ending)
        os.waitpid(pid, 0)


PARENT = """
import os, sys, time
from dirtytrack.checkpoint import DirectoryStore
store = DirectoryStore(sys.argv[1])
writer = store.writer()
with store.reading():
    child = os.fork()
    if not child:
        time.sleep(60)
    print(child, flush=True)
    time.sleep(60)
"""


def test_a_childs_life_does_not_keep_its_dead_parents_locks(where: Path) -> None:
    with store_at(where / "store") as store:
        with store.writer() as writer:
            first = save(writer, store, CONTENTS[0])
        parent = subprocess.Popen([sys.executable, "-c", PARENT, str(where / "store")], stdout=subprocess.PIPE)
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        try:
            with pytest.raises(StoreBusy):
                store.writer()
            parent.kill()
            parent.wait()
            with store.writer() as writer:
                assert writer.remove([kept(first)])
        finally:
            os.kill(child, signal.SIGKILL)
            parent.kill()
            parent.wait()
            parent.stdout.close()


def test_readers_put_removal_off(where: Path) -> None:
    with store_at(where / "store") as store, DirectoryStore(where / "store") as other, store.writer() as writer:
        first = save(writer, store, CONTENTS[0])
        save(writer, store, CONTENTS[1])
        with other.reading(), other.reading():
            assert not writer.remove([kept(first)])
            assert read_back(other, 1) == CONTENTS[0]
            save(writer, store, CONTENTS[2])  # but saving goes on
        assert writer.remove([kept(first)])
        assert writer.remove([kept(first)])  # it is gone already
        assert [each.generation for each in store.catalog()] == [2, 3]
        with pytest.raises(NoSuchGeneration):
            other.manifest(1)
        assert not store.strangers() and len(store.segments()) == 2


def test_a_manifest_that_somebody_else_removed_takes_no_segment_with_it(where: Path) -> None:
    with store_at(where / "store") as store:
        with store.writer() as writer:
            first = save(writer, store, CONTENTS[0])
            second = save(writer, store, CONTENTS[1])
            manifest = where / "store" / "manifests" / first.name
            manifest.rename(where / "saved")
            assert writer.clean() == ()
            assert writer.remove([kept(second)])
            (where / "saved").rename(manifest)
            assert read_back(store) == CONTENTS[0]
        with store.writer() as writer:
            assert len(store.segments()) == 1


def test_a_child_does_not_keep_its_parents_lock_on_reading(where: Path) -> None:
    with store_at(where / "store") as store, store.writer() as writer:
        first = save(writer, store, CONTENTS[0])
        waiting, ending = os.pipe()
        with store.reading():
            pid = os.fork()
            if not pid:
                os.close(ending)
                os.read(waiting, 1)  # until the parent lets go
                os._exit(0)
        os.close(waiting)
        assert writer.remove([kept(first)])
        os.close(ending)
        os.waitpid(pid, 0)


def test_a_reader_waits_for_who_removes(where: Path) -> None:
    with store_at(where / "store") as store, store.writer() as writer:
        save(writer, store, CONTENTS[0])
        files = Files()
        lock = files.open_lock(store.directory(), "readers.lock")
        assert files.lock(lock, exclusive=True, wait=False)
        found: list[dict[str, bytes]] = []
        thread = threading.Thread(target=lambda: found.append(read_back(store)))
        thread.start()
        thread.join(0.1)
        assert not found
        files.close(lock)
        thread.join(30)
        assert found == [CONTENTS[0]]


def test_threads_list_at_once(where: Path) -> None:
    """Two lists of one descriptor would share the place where they are."""
    (where / "many").mkdir()
    for i in range(200):
        (where / "many" / str(i)).touch()
    files = Files()
    directory = files.open_directory(str(where / "many"))
    lengths: list[int] = []
    threads = [
        threading.Thread(target=lambda: lengths.extend(len(files.names(directory)) for _ in range(100)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files.close(directory)
    assert lengths == [200] * 400


# ---- what is made, and what is refused


def test_only_the_owner_may_read(where: Path) -> None:
    before = os.umask(0)
    try:
        with store_at(where / "new" / "store") as store, store.writer() as writer:
            save(writer, store, CONTENTS[0])
    finally:
        os.umask(before)
    for path in (where / "new", *(where / "new").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_what_is_no_store(where: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match="there is none") as raised:
        DirectoryStore(where / "none")
    assert raised.value.errno == errno.ENOENT
    (where / "file").write_bytes(b"x")
    for create in (False, True):
        with pytest.raises(InvalidCheckpoint):
            DirectoryStore(where / "file", create=create)
        with pytest.raises(InvalidCheckpoint):
            DirectoryStore(where / "file" / "below", create=create)
    (where / "full").mkdir()
    (where / "full" / "thesis.tex").write_bytes(b"x")
    for create in (False, True):
        with pytest.raises(InvalidCheckpoint, match="holds something else"):
            DirectoryStore(where / "full", create=create)
    assert [path.name for path in (where / "full").iterdir()] == ["thesis.tex"]
    (where / "empty").mkdir()
    with pytest.raises(InvalidCheckpoint):
        DirectoryStore(where / "empty")
    assert not [*(where / "empty").iterdir()]
    with (
        DirectoryStore(where / "empty", create=True) as store,
        pytest.raises(NoSuchGeneration, match="no checkpoint yet"),
    ):
        store.manifest()
    with pytest.raises(NoSuchGeneration, match="no checkpoint yet"):
        verify(where / "empty")
    assert verify(where / "empty", all=True).ok


def test_a_store_of_another_version(where: Path) -> None:
    store_at(where / "store").close()
    text = b"dirtytrack-store 2 " + b"ab" * 16 + b" "
    (where / "store" / "dirtytrack-store").write_bytes(text + b"%016x\n" % xxh64(text))
    for create in (False, True):
        with pytest.raises(InvalidCheckpoint, match="version 2"):
            DirectoryStore(where / "store", create=create)


def test_what_an_interrupted_beginning_left_is_no_hindrance(where: Path) -> None:
    (where / "store" / "segments").mkdir(parents=True)
    (where / "store" / "writer.lock").touch()
    (where / "store" / "dirtytrack-store.0123456789abcdef.tmp").write_bytes(b"half")
    with pytest.raises(InvalidCheckpoint, match="no store"):
        DirectoryStore(where / "store")
    with store_at(where / "store") as store, store.writer() as writer:
        save(writer, store, CONTENTS[0])
        assert not store.strangers()


def test_what_is_forgotten_is_let_go_of(where: Path) -> None:
    files = Failing()
    writer = store_at(where / "store", files).writer()
    writer.create_segment(1)
    assert files.descriptors
    del writer
    gc.collect()
    assert not files.descriptors
    with DirectoryStore(where / "store") as store, store.writer():
        assert not store.segments()


def test_a_store_that_moves(where: Path) -> None:
    """It is held by its descriptor: a new name changes nothing."""
    with store_at(where / "store") as store, store.writer() as writer:
        save(writer, store, CONTENTS[0])
        (where / "store").rename(where / "moved")
        save(writer, store, CONTENTS[1])
    with DirectoryStore(where / "moved") as store:
        assert read_back(store, 1) == CONTENTS[0]
        assert read_back(store, 2) == CONTENTS[1]


def test_what_is_no_store_nor_retention(tmp_path: Path) -> None:
    DirectoryStore(tmp_path / "store", create=True).close()
    nothing: Any = None
    for call in (restore, generations, verify, compact):
        with pytest.raises(InvalidCheckpoint, match="a store is a path, a URL or a Store, not None"):
            call(nothing)
    with pytest.raises(InvalidCheckpoint, match="a store is a path"):
        Checkpointer(nothing, {"a": bytearray(1)})
    three: Any = 3
    with pytest.raises(InvalidCheckpoint, match=r"as Retention\(last=10\), not 3"):
        prune(tmp_path / "store", three)

# SPDX-License-Identifier: MIT
"""Any operation on files fails, anywhere: a named error, nothing lost, nothing left open, and the next run works."""

from __future__ import annotations

import errno
import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dirtytrack.checkpoint import DirectoryStore, verify
from dirtytrack.errors import (
    DamagedCheckpoint,
    DirtyTrackError,
    InvalidCheckpoint,
    PermissionDenied,
    StoreBusy,
    StoreFailed,
)
from tests.storing import OPENING, PAGE, Failing, Hooked, kept, read_back, save, store_at

STEPS = [{"a": bytes([i]) * 2 * PAGE + b"\x07" * PAGE, "b": bytes([200 + i]) * 700} for i in range(5)]
ANSWERS: dict[int, type[DirtyTrackError]] = {
    errno.ENOSPC: StoreFailed,
    errno.EIO: StoreFailed,
    errno.EROFS: StoreFailed,
    errno.EMFILE: StoreFailed,
    errno.EACCES: PermissionDenied,
}


def first_two(path: Path) -> None:
    with store_at(path) as store, store.writer() as writer:
        first = save(writer, store, STEPS[0])
        save(writer, store, STEPS[1], STEPS[0], first)


def more(path: Path, files: Hooked, done: list[int]) -> None:
    """On a store of two generations: a third, compacted, older ones removed, and a fourth. Notes what is committed."""
    with store_at(path, files) as store, store.writer() as writer:
        second = store.manifest()
        third = save(writer, store, STEPS[2], STEPS[1], second)
        done.append(3)
        compacted = save(writer, store, STEPS[2], None, third, revision=1, generation=3)
        writer.remove([kept(second), kept(third)])
        save(writer, store, STEPS[3], STEPS[2], compacted)
        done.append(4)
    assert verify(store.path, all=True).ok


def operations_of(path: Path) -> int:
    files = Failing()
    more(path, files, [])
    assert files.count > 80
    return files.count


def assert_nothing_lost(path: Path, committed: list[int]) -> None:
    with DirectoryStore(path) as store:
        report = verify(store, all=True)
        assert report.ok, report
        there = {each.generation for each in store.catalog()}
        assert {1, *committed} <= there
        for generation in there:
            assert read_back(store, generation) == STEPS[generation - 1]


@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for ever"])
@pytest.mark.parametrize("error", ANSWERS, ids=errno.errorcode.get)
def test_an_operation_fails(where: Path, error: int, for_ever: bool) -> None:
    first_two(where / "two")
    shutil.copytree(where / "two", where / "whole")
    for nth in range(1, 1 + operations_of(where / "whole")):
        path, committed = where / str(nth), list[int]()
        shutil.copytree(where / "two", path)
        files = Failing(nth, error, for_ever=for_ever)
        try:
            more(path, files, committed)
        except DirtyTrackError as raised:
            expected = ANSWERS[error]
            assert isinstance(raised, (expected, DamagedCheckpoint)), files.failed
            assert raised.errno == error or isinstance(raised.__cause__, OSError)
            assert str(path) in str(raised) or isinstance(raised, DamagedCheckpoint)
        else:
            # Temporaries and descriptors are let go of without asking whether that worked; nothing else is.
            assert files.failed[0] in ("unlink", "open_lock", "preadv", "open", "nbytes"), files.failed
        assert not files.descriptors, files.failed
        assert_nothing_lost(path, committed)
        with store_at(path) as store, store.writer() as writer:
            save(writer, store, STEPS[4])
            assert not store.strangers()
            assert read_back(store) == STEPS[4]
        shutil.rmtree(path)


class Interrupted(Hooked):
    """Ctrl-C behind the ``nth`` operation; before it where that opens something, which nobody would have then."""

    def __init__(self, nth: int) -> None:
        super().__init__()
        self.left = nth

    def operate(self, name: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        self.left -= name not in ("close", "unlock")
        now = not self.left and name not in ("close", "unlock")
        if now and name in OPENING:
            raise KeyboardInterrupt
        try:
            return call(*args, **options)
        finally:
            if now:
                raise KeyboardInterrupt


def test_ctrl_c_behind_each_operation(where: Path) -> None:
    first_two(where / "two")
    nth, interrupted = 0, True
    while interrupted:
        nth += 1
        path, committed = where / str(nth), list[int]()
        shutil.copytree(where / "two", path)
        files = Interrupted(nth)
        interrupted = False
        try:
            more(path, files, committed)
        except KeyboardInterrupt:
            interrupted = True
        gc.collect()
        assert not files.descriptors
        assert_nothing_lost(path, committed)
        with store_at(path) as store, store.writer() as writer:
            save(writer, store, STEPS[4])
            assert not store.strangers()
        shutil.rmtree(path)
    assert nth > 80


def test_a_store_cannot_be_made(where: Path) -> None:
    files = Failing()
    store_at(where / "counted" / "store", files).close()
    for nth in range(1, 1 + files.count):
        for error in (errno.ENOSPC, errno.EIO):
            path = where / f"{nth}.{error}" / "store"
            files = Failing(nth, error)
            with pytest.raises(StoreFailed) as raised:
                store_at(path, files).close()
            assert raised.value.errno == error
            assert not files.descriptors
            first_two(path)
            assert verify(path, all=True).ok


def test_short_writes_are_gone_on_with(where: Path) -> None:
    first_two(where / "store")
    more(where / "store", Failing(short=True), [])
    assert_nothing_lost(where / "store", [3, 4])


def test_the_disk_is_full_until_it_is_not(where: Path) -> None:
    """One writer goes on: a save fails, the next is whole, and what the first left is gone."""
    files = Failing()
    with store_at(where / "store", files) as store, store.writer() as writer:
        first = save(writer, store, STEPS[0])
        for nth in range(1, 20):
            files.count, files.nth, files.error = 0, nth, errno.ENOSPC
            files.only = ("pwrite", "sync", "sync_directory", "create", "link")
            try:
                newer = save(writer, store, STEPS[1], STEPS[0], first)
            except StoreFailed as error:
                assert error.errno == errno.ENOSPC
                assert [each.generation for each in store.catalog()] == [1]
            else:
                break
        assert nth > 8
        files.nth = 0
        writer.clean()
        assert not store.strangers()
        assert newer.generation > 1
        assert read_back(store) == STEPS[1]
        assert read_back(store, 1) == STEPS[0]


def test_the_directory_goes_away_beneath_it(where: Path) -> None:
    files = Failing()
    with store_at(where / "store", files) as store, store.writer() as writer:
        first = save(writer, store, STEPS[0])
        segment = writer.create_segment(2)
        shutil.rmtree(where / "store")
        with pytest.raises(StoreFailed) as raised:
            save(writer, store, STEPS[1], STEPS[0], first)
        assert raised.value.errno == errno.ENOENT
        assert "went away" in str(raised.value)
        segment.abandon()
        with pytest.raises(DamagedCheckpoint, match="missing"):
            store.open_segment(first.segments[0].name)
    assert not files.descriptors
    with pytest.raises(InvalidCheckpoint, match="there is none"):
        DirectoryStore(where / "store")
    first_two(where / "store")


def test_a_file_system_without_links(where: Path) -> None:
    for error in (errno.EPERM, errno.EOPNOTSUPP):
        files = Failing(1, error, for_ever=True, only=("link",))
        path = where / str(error)
        with store_at(path, files) as store, store.writer() as writer:
            first = save(writer, store, STEPS[0])
            assert read_back(store) == STEPS[0]
            with pytest.raises(InvalidCheckpoint, match="nothing is overwritten"):
                writer.publish(first)
            assert not store.strangers()


def test_a_failing_disk_does_not_take_what_is_there_already(where: Path) -> None:
    files = Failing()
    with store_at(where / "store", files) as store, store.writer() as writer:
        first = save(writer, store, STEPS[0])
        for name in ("link", "rename", "sync_directory", "sync", "pwrite", "create"):
            files.count, files.nth, files.only = 0, 1, (name,)
            with pytest.raises(InvalidCheckpoint, match="nothing is overwritten"):
                writer.publish(first)
        assert read_back(store) == STEPS[0]


def test_somebody_writes_without_the_lock(where: Path) -> None:
    class Intruded(Hooked):
        def operate(self, name: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
            if name == "link":
                (where / "store" / "manifests" / args[2]).write_bytes(b"theirs")
            return call(*args, **options)

    with store_at(where / "store", Intruded()) as store, store.writer() as writer:
        with pytest.raises(StoreBusy, match="without its lock"):
            save(writer, store, STEPS[0])
        (manifest,) = (where / "store" / "manifests").iterdir()
        assert manifest.read_bytes() == b"theirs"


def test_locks_cannot_be_had(where: Path) -> None:
    first_two(where / "store")
    files = Failing(1, errno.ENOLCK, for_ever=True, only=("lock",))
    with store_at(where / "store", files) as store:
        with pytest.raises(StoreFailed, match="has locks"):
            store.writer()
        with pytest.raises(StoreFailed, match="has locks"), store.reading():
            pass
    assert not files.descriptors


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES])
def test_a_read_only_store_can_be_read(where: Path, error: int) -> None:
    first_two(where / "store")
    changing = ("create", "open_lock", "pwrite", "link", "rename", "unlink", "sync", "sync_directory", "make_directory")
    files = Failing(1, error, for_ever=True, only=changing)
    for locks in (True, False):
        with DirectoryStore(where / "store", files=files) as store:
            assert verify(store, all=True).ok
            assert read_back(store) == STEPS[1]
            with pytest.raises((StoreFailed, PermissionDenied)) as raised:
                store.writer()
            assert raised.value.errno == error
            assert not isinstance(raised.value, StoreBusy)
        if locks:
            (where / "store" / "readers.lock").unlink()
    assert not files.descriptors

# SPDX-License-Identifier: MIT
"""Writing to a directory of checkpoints: whatever is interrupted when leaves each generation whole, or not there.

What must be durable before what is in docs/checkpoint-format.md; tests replay each legal loss of what was not.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from ..errors import (
    CheckpointerClosed,
    DamagedCheckpoint,
    DirtyTrackError,
    InvalidCheckpoint,
    NoSuchGeneration,
    StoreBusy,
    StoreFailed,
)
from .base import MANIFESTS, MARKER, RANKS, SEGMENTS, marker_of
from .files import Directory, File, failure
from .manifests import MOST_GENERATION, MOST_SEGMENT_NBYTES, manifest_name, segment_name, segment_of_name
from .protocols import Kept
from .segments import SegmentWriter
from .store import READERS, WRITER

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

    from typing_extensions import Self

    from .files import Files
    from .manifests import Manifest
    from .store import DirectoryStore

__all__ = ["DirectoryWriter", "make_marker", "make_store"]

_TEMPORARY = re.compile(rf"({MARKER}|[0-9]{{16}}\.[0-9]+\.manifest)\.[0-9a-f]{{16}}\.tmp")
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_BEGIN_NBYTES = 8 << 20
_open_writers: WeakSet[DirectoryWriter] = WeakSet()


def _write_all(files: Files, file: File, data: Any, offset: int) -> None:
    rest = memoryview(data).cast("B")
    while rest:
        done = files.pwrite(file, rest, offset)
        if not done:
            raise OSError(errno.EIO, "nothing was written")
        offset, rest = offset + done, rest[done:]


def _write_temporary(files: Files, directory: Directory, name: str, data: bytes) -> str:
    """Write a file that is durable but for its name, which is returned; where that fails, it is gone."""
    temporary = f"{name}.{os.urandom(8).hex()}.tmp"
    file = files.create(directory, temporary)
    try:
        try:
            _write_all(files, file, data, 0)
            files.sync(file)
        finally:
            files.close(file)
    except BaseException:
        with suppress(OSError):
            files.unlink(directory, temporary)
        raise
    return temporary


# ---- making a store


def make_store(path: Path, files: Files) -> None:
    """Make the directories and locks of a store where there is none; its marker is still to come.

    Raises:
        InvalidCheckpoint: the directory holds something else.
        PermissionDenied, StoreFailed: it cannot be made.
    """
    try:
        _make_directories(path, files)
        root = files.open_directory(str(path))
        try:
            names = set(files.names(root))
            if MARKER in names:
                return
            foreign = {name for name in names if not _TEMPORARY.fullmatch(name)} - {
                WRITER,
                READERS,
                SEGMENTS,
                MANIFESTS,
                RANKS,
            }
            if foreign:
                raise InvalidCheckpoint(
                    f"{path} is no store of checkpoints: it holds something else ({min(foreign)!r}). Save to a "
                    "directory that is empty or not there yet"
                )
            for name in (SEGMENTS, MANIFESTS):
                with suppress(FileExistsError):
                    files.make_directory(name, root)
            for name in (WRITER, READERS):
                files.close(files.open_lock(root, name))
            files.sync_directory(root)
        finally:
            files.close(root)
    except NotADirectoryError as error:
        raise InvalidCheckpoint(
            f"{path} is no directory: save to one, or to where nothing is", errno=error.errno
        ) from error
    except OSError as error:
        if isinstance(error, DirtyTrackError):
            raise
        raise failure(error, f"make the store {path}") from error


def _make_directories(path: Path, files: Files) -> None:
    try:
        files.make_directory(str(path))
    except FileExistsError:
        return
    except FileNotFoundError:
        if path.parent == path:
            raise
        _make_directories(path.parent, files)
        with suppress(FileExistsError):
            files.make_directory(str(path))
    parent = files.open_directory(str(path.parent))
    try:
        files.sync_directory(parent)
    finally:
        files.close(parent)


def make_marker(store: DirectoryStore, store_id: str | None = None) -> None:
    """Say that the directory is a store, as soon as all else is there; or say it anew where the marker is damaged."""
    lock = None if store_id else _lock(store)
    root = store.directory()
    try:
        if store_id is None and (MARKER in store.listed(root) or store.catalog()):
            return  # somebody else was quicker; or it was lost, and who opens the store finds that
        temporary = _write_temporary(store.files, root, MARKER, marker_of(store_id or os.urandom(16).hex()))
        store.files.rename(root, temporary, MARKER)
        store.files.sync_directory(root)
    except OSError as error:
        if isinstance(error, DirtyTrackError):
            raise
        raise failure(error, f"write {store.path / MARKER}") from error
    finally:
        if lock is not None:
            store.files.release(lock)


def _lock(store: DirectoryStore) -> File:
    files = store.files
    try:
        file = files.open_lock(store.directory(), WRITER)
    except OSError as error:
        raise failure(error, f"write to the store {store.name}") from error
    try:
        if files.lock(file, exclusive=True, wait=False):
            return file
        pid = files.holder(file)
    except OSError as error:
        files.close(file)
        raise failure(error, f"lock {store.path / WRITER}") from error
    except BaseException:
        files.close(file)
        raise
    files.close(file)
    who = "this process" if pid == os.getpid() else "another process" if pid is None else f"process {pid}"
    raise StoreBusy(
        f"{who} writes to the store {store.name}: one at a time may save, compact or prune. Close the other, or wait",
        errno=errno.EAGAIN,
        pid=pid,
    )


# ---- writing to it


class DirectoryWriter:
    """The right to write to a directory of checkpoints: see `Writer`. It goes with the process, however that ends.

    Args:
        store: which. Keep it open.

    Raises:
        StoreBusy: somebody else has the right.
        PermissionDenied, StoreFailed: it cannot be written to.
    """

    def __init__(self, store: DirectoryStore) -> None:
        self._store, self._files = store, store.files
        self._mutex = threading.RLock()
        self._pending: dict[str, _FileSink] = {}
        self._uncertain = set[str]()  # a manifest that names them may come to light after a crash
        self._named: dict[Kept, frozenset[str]] = {}
        self._lock = File(-1)
        self._lock = _lock(store)
        _open_writers.add(self)
        try:
            if store.damage():
                make_marker(store, store.store_id)
                store.repaired()
            self.clean()
        except BaseException:
            self.close()
            raise

    # ---- segments

    def create_segment(self, generation: int) -> SegmentWriter:
        """Begin a segment: see `Writer.create_segment`."""
        self._require_open()
        if not 1 <= generation <= MOST_GENERATION:
            raise InvalidCheckpoint(f"a generation is a number from 1 to {MOST_GENERATION}, not {generation}")
        sink = _FileSink(self, segment_name(generation, os.urandom(8)))
        self._pending[sink.name] = sink  # before it is there: else `clean`, in another thread, takes it for a leftover
        try:
            sink.open(self._store.directory(SEGMENTS))
            return SegmentWriter(sink, self._store.store_id)
        except BaseException:
            sink.abandon()
            raise

    def next_generation(self) -> int:
        """A number that nothing here has: see `Writer.next_generation`."""
        self._require_open()
        found = [kept.generation for kept in self._store.catalog()]
        found += [which[0] for which in map(segment_of_name, self._store.segments()) if which]
        following = max(found, default=0) + 1
        if following > MOST_GENERATION:
            raise InvalidCheckpoint(f"the store {self._store.name} has had all generations: begin another")
        return following

    def _drop(self, name: str) -> None:
        """Remove a segment that no manifest names."""
        with self._mutex:
            ours = self._pending.pop(name, None) is not None  # not published
            if ours and name not in self._uncertain:
                with suppress(OSError, CheckpointerClosed):
                    self._files.unlink(self._store.directory(SEGMENTS), name)

    # ---- manifests

    def publish(self, manifest: Manifest) -> None:
        """Commit: see `Writer.publish`."""
        if manifest.store_id != self._store.store_id:
            raise InvalidCheckpoint(f"this manifest is of another store than {self._store.name}")
        data = manifest.encode()
        names = {segment.name for segment in manifest.segments}
        with self._mutex:
            self._require_open()
            self._require_there(names)
            self._require_new(manifest)
            try:
                # Their bytes are durable; now that their names are, a manifest may name them.
                self._files.sync_directory(self._store.directory(SEGMENTS))
                temporary = _write_temporary(self._files, self._store.directory(MANIFESTS), manifest.name, data)
            except OSError as error:
                raise failure(error, self._doing(manifest)) from error
            self._appear(temporary, manifest, names)
            for name in names:
                self._pending.pop(name, None)
            self._named[Kept(manifest.generation, manifest.revision)] = frozenset(names)
            with suppress(OSError):  # else the next writer's
                self._files.unlink(self._store.directory(MANIFESTS), temporary)
            if self._uncertain:  # the directory is durable again, without what failed
                with suppress(OSError):
                    self._clean()

    def _doing(self, manifest: Manifest) -> str:
        return f"commit {self._store.path / MANIFESTS / manifest.name}"

    def _require_there(self, names: set[str]) -> None:
        missing = names - set(self._store.segments())
        unfinished = {name for name in names if name in self._pending and not self._pending[name].finished}
        if missing or unfinished:
            name = min(missing or unfinished)
            raise InvalidCheckpoint(f"a manifest names segments that are finished and there, which {name} is not")

    def _require_new(self, manifest: Manifest) -> None:
        if Kept(manifest.generation, manifest.revision) in self._store.catalog():
            raise InvalidCheckpoint(
                f"generation {manifest.generation} has a revision {manifest.revision} already, and nothing is "
                "overwritten: take the next one"
            )

    def _appear(self, temporary: str, manifest: Manifest, names: set[str]) -> None:
        directory, name = self._store.directory(MANIFESTS), manifest.name
        # From here on it may be there, whatever is raised, and may come back after a crash though we remove it: keep
        # what it names.
        self._uncertain |= names
        appeared = False
        try:
            try:
                self._files.link(directory, temporary, name)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                self._files.rename(directory, temporary, name)  # nobody else may have made it: we have the lock
            appeared = True
            self._files.sync_directory(directory)
        except FileExistsError as error:  # it was not there a moment ago
            with suppress(OSError):
                self._files.unlink(directory, temporary)
            self._uncertain -= names
            raise StoreBusy(
                f"somebody writes to the store {self._store.name} without its lock: {name} appeared meanwhile. Does "
                "its file system have locks that other machines see?",
                errno=error.errno,
            ) from error
        except OSError as error:
            for each in (name, temporary):  # ours to remove: it was not there before
                with suppress(OSError):
                    self._files.unlink(directory, each)
            if not appeared and error.errno in (errno.ENOSPC, errno.EDQUOT):  # a full disk had no room for its name
                self._uncertain -= names
            raise failure(error, self._doing(manifest)) from error
        self._uncertain -= names

    # ---- removing

    def remove(self, manifests: Sequence[Kept]) -> bool:
        """Remove manifests, and then what no other one names: see `Writer.remove`."""
        with self._mutex:
            self._require_open()
            files, root = self._files, self._store.directory()
            try:
                readers = files.open_lock(root, READERS)
                try:
                    if not files.lock(readers, exclusive=True, wait=False):
                        return False
                    for kept in manifests:
                        with suppress(FileNotFoundError):
                            files.unlink(self._store.directory(MANIFESTS), manifest_name(*kept))
                        self._named.pop(Kept(*kept), None)
                    cleaned = self.clean()
                    if manifests and not any(name.startswith(SEGMENTS) for name in cleaned):
                        # Else that has done it. What ranks have of a generation may go once it is gone for good.
                        files.sync_directory(self._store.directory(MANIFESTS))
                finally:
                    files.release(readers)
            except OSError as error:
                if isinstance(error, DirtyTrackError):
                    raise
                raise failure(error, f"remove generations from the store {self._store.name}") from error
            return True

    def clean(self) -> tuple[str, ...]:
        """Remove leftovers: see `Writer.clean`."""
        with self._mutex:
            self._require_open()
            try:
                return tuple(self._clean())
            except OSError as error:
                if isinstance(error, DirtyTrackError):
                    raise
                raise failure(error, f"remove leftovers from the store {self._store.name}") from error

    def _clean(self) -> list[str]:
        store, files, removed = self._store, self._files, list[str]()
        for part in ("", MANIFESTS):
            for name in store.listed(store.directory(part)):
                if _TEMPORARY.fullmatch(name):
                    files.unlink(store.directory(part), name)
                    removed.append(f"{part}/{name}" if part else name)
        unnamed = [name for name in store.segments() if name not in self._pending]
        if not unnamed or (named := self._named_segments()) is None:
            return removed
        unnamed = [name for name in unnamed if name not in named]
        if unnamed:
            # A manifest that named them was removed, or never came to be: that must be durable before they go.
            files.sync_directory(store.directory(MANIFESTS))
            self._uncertain.clear()
        for name in unnamed:
            files.unlink(store.directory(SEGMENTS), name)
            removed.append(f"{SEGMENTS}/{name}")
        return removed

    def _named_segments(self) -> set[str] | None:
        """The segments that manifests name; None where one of them cannot be read: who knows what it names."""
        found = dict[Kept, frozenset[str]]()
        catalog = self._store.catalog()
        if not self._named.keys() <= set(catalog):
            return None  # one that we know of is gone, and we did not remove it: touch nothing
        for kept in catalog:
            names = self._named.get(kept)
            if names is None:
                try:
                    names = frozenset(segment.name for segment in self._store.read(kept).segments)
                except (DamagedCheckpoint, InvalidCheckpoint, NoSuchGeneration, StoreFailed):
                    return None
            found[kept] = names
        self._named = found
        return set().union(*found.values())

    # ---- the end

    def _require_open(self) -> None:
        if self._lock < 0:
            raise CheckpointerClosed(f"this writer of the store {self._store.name} is closed: take another")

    def close(self) -> None:
        """Give the right back: see `Writer.close`. Closing again does nothing."""
        with self._mutex:
            for sink in tuple(self._pending.values()):
                sink.abandon()
            if self._lock >= 0:
                lock, self._lock = self._lock, File(-1)
                self._files.release(lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()

    def _forked(self) -> None:
        """In the child: neither the lock, which is closed by now, nor the segments are its own."""
        self._mutex, self._lock = threading.RLock(), File(-1)
        for sink in self._pending.values():
            sink.close()
        self._pending.clear()


class _FileSink:
    """A segment's file, to be written."""

    whole_nbytes = 0

    def __init__(self, writer: DirectoryWriter, name: str) -> None:
        self._writer, self._files, self._file = writer, writer._files, File(-1)
        self._where = writer._store.path / SEGMENTS / name
        self.name, self.nbytes, self.finished = name, 0, False
        self._begun = 0

    @property
    def most_nbytes(self) -> int:
        return MOST_SEGMENT_NBYTES

    def open(self, directory: Directory) -> None:
        try:
            self._file = self._files.create(directory, self.name)
        except OSError as error:
            raise failure(error, f"make the segment {self._where}") from error

    def write(self, data: Any, lent_nbytes: int = 0) -> None:
        if self._file < 0:
            raise CheckpointerClosed(f"the segment {self._where} is closed")
        try:
            _write_all(self._files, self._file, data, self.nbytes)
        except OSError as error:
            raise failure(error, f"write the segment {self._where}") from error
        self.nbytes += memoryview(data).nbytes
        if self.nbytes - self._begun >= _BEGIN_NBYTES:  # or the disk would do nothing until the end, and then all of it
            with suppress(OSError):
                self._files.begin_writing(self._file, self._begun, self.nbytes - self._begun)
            self._begun = self.nbytes

    def finish(self) -> None:
        if self._file < 0:
            raise CheckpointerClosed(f"the segment {self._where} is closed")
        try:
            self._files.sync(self._file)
        except OSError as error:
            raise failure(error, f"make the segment {self._where} durable") from error
        self.close()
        self.finished = True

    def abandon(self) -> None:
        self.close()
        self._writer._drop(self.name)

    def close(self) -> None:
        if self._file >= 0:
            file, self._file = self._file, File(-1)
            with suppress(OSError):
                self._files.close(file)


def _after_fork() -> None:
    for writer in tuple(_open_writers):
        writer._forked()


os.register_at_fork(after_in_child=_after_fork)

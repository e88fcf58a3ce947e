# SPDX-License-Identifier: MIT
"""Checkpoints in a directory; see docs/checkpoint-format.md. What a store must be able to do is in protocols.py."""

from __future__ import annotations

import errno
import os
import re
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from ..errors import CheckpointerClosed, DamagedCheckpoint, InvalidCheckpoint, NoSuchGeneration
from ..kernel.packing import Xxh64
from .base import MANIFESTS, MARKER, MARKER_NBYTES, RANKS, SEGMENTS, BaseStore, rank_folder, rank_of_folder
from .files import Directory, File, Files, failure
from .manifests import MOST_MANIFEST_NBYTES, manifest_name, manifest_of_name, segment_of_name
from .protocols import Kept

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from types import TracebackType

    from typing_extensions import Self

    from .protocols import Source, Store, Writer

__all__ = ["READERS", "WRITER", "DirectoryStore", "open_store", "require_store", "store_of"]

WRITER, READERS = "writer.lock", "readers.lock"
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)
_MANGLED = re.compile(r"(s3a?|gs|az|azure|abfss?|adl|file):/[^/]")


@contextmanager
def open_store(where: Store | str | os.PathLike[str], *, create: bool = False) -> Iterator[Store]:
    """A store as it is, or the one at that path or URL, which is closed again.

    Args:
        where: the store, its directory, or its URL.
        create: make it where there is none.

    Raises:
        InvalidCheckpoint: it is neither, or there is none.
    """
    if isinstance(where, (str, os.PathLike)):
        with closing(store_of(where, create=create)) as store:
            yield store
    else:
        require_store(where)
        yield where


def store_of(where: str | os.PathLike[str], *, create: bool = False) -> Store:
    """The store in a directory, or at a URL as ``s3://bucket/prefix``; who asks closes it.

    Raises:
        InvalidCheckpoint: there is none, or no such kind of store.
    """
    url = _URL.fullmatch(where) if isinstance(where, str) else None
    if url is None:
        if not isinstance(where, str) and _MANGLED.match(os.fsdecode(where)):
            raise InvalidCheckpoint(f"{str(where)!r} was a URL before a Path took a slash of it: pass it as a string")
        return DirectoryStore(where, create=create)
    if url[1].lower() == "file":
        host, slash, path = url[2].partition("/")
        if host not in ("", "localhost") or not slash:
            raise InvalidCheckpoint(f"{where} is no URL of a directory here: that begins with file:///")
        return DirectoryStore(unquote(slash + path), create=create)
    from .objects import ObjectStore

    return ObjectStore(str(where), create=create)


def require_store(where: Any) -> None:
    """Refuse what is no store.

    Raises:
        InvalidCheckpoint.
    """
    if not callable(getattr(where, "writer", None)):
        raise InvalidCheckpoint(f"a store is a path, a URL or a Store, not {where!r}")


# ---- a directory


class DirectoryStore(BaseStore):
    """Checkpoints in a directory of a local file system. Others than its owner may not read it.

    Args:
        path: of the directory.
        create: make it, its parents too, where it is not there or is empty. Only its marker says that a directory is
            a store: one that holds something else is refused.
        files: how files are used; for tests.

    Raises:
        InvalidCheckpoint: no such directory; it is no store; or one of another version.
        DamagedCheckpoint: its marker is damaged.
        StoreBusy: ``create``, and somebody else is making it.
        PermissionDenied, StoreFailed: it cannot be opened or made.

    Thread safety: everything may be called from any thread. A child that was forked has a store of its own.
    """

    def __init__(self, path: str | os.PathLike[str], *, create: bool = False, files: Files | None = None) -> None:
        self.path = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links
        self.files = Files() if files is None else files
        self._root, self._segments, self._manifests = (Directory(-1) for _ in range(3))
        try:
            if create:
                self._make_directory()
            self._open()
            if create and MARKER not in self.listed(self._root):
                self._make_marker()
            self.store_id = self._read_marker()
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        """Its path."""
        return str(self.path)

    # ---- making and opening

    def _make_directory(self) -> None:
        from .writing import make_store

        make_store(self.path, self.files)

    def _make_marker(self) -> None:
        from .writing import make_marker

        make_marker(self)

    def _open(self) -> None:
        try:
            self._root = self.files.open_directory(str(self.path))
            self._segments = self.files.open_directory(SEGMENTS, self._root)
            self._manifests = self.files.open_directory(MANIFESTS, self._root)
        except (FileNotFoundError, NotADirectoryError) as error:
            what = "there is none" if self._root < 0 else "that directory holds something else"
            raise InvalidCheckpoint(
                f"{self.name} is no store of checkpoints: {what}. Saving to it makes one, if it is empty or not there",
                errno=error.errno,
            ) from error
        except OSError as error:
            raise failure(error, f"open the store {self.name}") from error

    def _read_marker(self) -> str:
        """The store's id. A marker that is damaged or gone does not take its checkpoints with it: each has the id."""
        where = self.path / MARKER
        try:
            data = self._read(self._root, MARKER, MARKER_NBYTES)
        except FileNotFoundError:
            return self.id_of_manifests(
                f"{where} is missing",
                InvalidCheckpoint(f"{self.name} is no store of checkpoints: it has no file {MARKER}"),
            )
        except OSError as error:
            if error.errno != errno.EIO:
                raise failure(error, f"read {where}") from error
            return self.id_of_manifests(f"{where} cannot be read", failure(error, f"read {where}"))
        return self.id_of_marker(data, str(where))

    def close(self) -> None:
        """Let go of its directories. Closing again does nothing."""
        for directory in (self._root, self._segments, self._manifests):
            if directory >= 0:
                with suppress(OSError):
                    self.files.close(directory)
        self._root, self._segments, self._manifests = (Directory(-1) for _ in range(3))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()

    def __repr__(self) -> str:
        return f"<DirectoryStore {self.name}>"

    def __reduce__(self) -> Any:
        raise TypeError("a DirectoryStore cannot be pickled: pass its path")

    def directory(self, which: str = "") -> Directory:
        """The open directory of the store, or a part of it: ``"segments"`` or ``"manifests"``."""
        found = {"": self._root, SEGMENTS: self._segments, MANIFESTS: self._manifests}[which]
        if found < 0:
            raise CheckpointerClosed(f"the store {self.name} is closed: open it again")
        return found

    # ---- reading

    def listed(self, directory: Directory) -> list[str]:
        """The names in a directory of the store, sorted."""
        try:
            return sorted(self.files.names(directory))
        except OSError as error:
            raise failure(error, f"list the store {self.name}") from error

    def _read(self, directory: Directory, name: str, most: int) -> bytes:
        """A whole file, or its first ``most`` + 1 bytes."""
        file = self.files.open(directory, name)
        try:
            data = bytearray(min(self.files.nbytes(file), most + 1))
            done, view = 0, memoryview(data)
            while done < len(data):
                some = self.files.preadv(file, [view[done:]], done)
                if not some:
                    break
                done += some
            return bytes(view[:done])
        finally:
            self.files.close(file)

    def catalog(self) -> tuple[Kept, ...]:
        """The manifests that are there, oldest first."""
        found = map(manifest_of_name, self.listed(self.directory(MANIFESTS)))
        return tuple(sorted(Kept(*each) for each in found if each))

    def segments(self) -> tuple[str, ...]:
        """The names of the segments that are there, named by a manifest or not, oldest first."""
        return tuple(name for name in self.listed(self.directory(SEGMENTS)) if segment_of_name(name))

    def read_manifest(self, kept: Kept) -> bytes:
        """The bytes of a manifest; one that is longer than any comes cut short.

        Raises:
            NoSuchGeneration: it is not there.
        """
        where = f"{MANIFESTS}/{manifest_name(*kept)}"
        try:
            return self._read(self.directory(MANIFESTS), manifest_name(*kept), MOST_MANIFEST_NBYTES)
        except FileNotFoundError as error:
            raise NoSuchGeneration(f"{self.name} has no {where}", errno=error.errno) from error
        except OSError as error:
            raise self.unreadable(error, self.path / where) from error

    @staticmethod
    def unreadable(error: OSError, where: Path) -> Exception:
        """A disk that cannot give bytes back has lost them: that is damage, and another generation may be whole."""
        if error.errno not in (errno.EIO, errno.ELOOP, errno.EISDIR):  # or somebody put another thing there
            return failure(error, f"read {where}")
        damage = f"{where} cannot be read: {error.strerror}"
        if error.errno == errno.ELOOP:
            damage += " (a store's own files are never symbolic links)"
        return DamagedCheckpoint(damage, damage=(damage,), errno=error.errno)

    def open_segment(self, name: str) -> Source:
        """Open a segment that a manifest names: see `Store.open_segment`."""
        if segment_of_name(name) is None:
            raise InvalidCheckpoint(f"{name!r} is no name of a segment")
        where = self.path / SEGMENTS / name
        try:
            file = self.files.open(self.directory(SEGMENTS), name)
        except FileNotFoundError as error:
            damage = f"the segment {where} is missing"
            raise DamagedCheckpoint(damage, damage=(damage,), errno=error.errno) from error
        except OSError as error:
            raise self.unreadable(error, where) from error
        try:
            return _OpenSegment(self.files, file, where)
        except OSError as error:
            self.files.close(file)
            raise failure(error, f"read {where}") from error

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While in here nothing is removed. Where nothing can be locked, nobody can remove: it is read-only."""
        file = self._readers()
        if file is None:
            yield
            return
        owner = os.getpid()  # a child that is forked in here has no lock
        try:
            try:
                self.files.lock(file, exclusive=False, wait=True)
            except OSError as error:
                raise failure(error, f"lock {self.path / READERS}") from error
            yield
        finally:
            if os.getpid() == owner:
                self.files.release(file)

    def _readers(self) -> File | None:
        root = self.directory()
        try:
            try:
                return self.files.open_lock(root, READERS)
            except OSError as error:
                if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                    raise
                return self.files.open(root, READERS)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise failure(error, f"open {self.path / READERS}") from error

    def strangers(self) -> tuple[str, ...]:
        """What is in the store and belongs to no generation; paths within the store, sorted."""
        own = {MARKER, WRITER, READERS, SEGMENTS, MANIFESTS, RANKS}
        found = [name for name in self.listed(self.directory()) if name not in own]
        found += [name for name in (WRITER, READERS) if self._holds_bytes(name)]
        found += [
            f"{MANIFESTS}/{name}" for name in self.listed(self.directory(MANIFESTS)) if not manifest_of_name(name)
        ]
        named = set[str]()
        for kept in self.catalog():
            with suppress(DamagedCheckpoint, InvalidCheckpoint, NoSuchGeneration):
                named.update(segment.name for segment in self.read(kept).segments)
        found += [f"{SEGMENTS}/{name}" for name in self.listed(self.directory(SEGMENTS)) if name not in named]
        return tuple(sorted(found))

    def _holds_bytes(self, name: str) -> bool:
        try:
            return bool(self._read(self.directory(), name, 0))
        except FileNotFoundError:
            return False
        except OSError as error:
            raise failure(error, f"read {self.path / name}") from error

    def writer(self) -> Writer:
        """Become the one who writes: see `Store.writer`."""
        from .writing import DirectoryWriter

        return DirectoryWriter(self)

    # ---- ranks

    def part(self, rank: int, *, create: bool = False) -> DirectoryStore:
        """The store of a rank's parts: see `Store.part`."""
        return DirectoryStore(self.path / RANKS / rank_folder(rank), create=create, files=self.files)

    def parts(self) -> tuple[int, ...]:
        """The ranks whose parts have a store here, in order."""
        try:
            within = self.files.open_directory(RANKS, self.directory())
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise failure(error, f"open {self.path / RANKS}") from error
        try:
            found = map(rank_of_folder, self.listed(within))
            return tuple(rank for rank in found if rank is not None)
        finally:
            self.files.close(within)


class _OpenSegment:
    """A segment's file, to be read."""

    def __init__(self, files: Files, file: File, where: Path) -> None:
        self._files, self._file, self._where = files, file, where
        self.name = where.name
        self.nbytes = files.nbytes(file)

    def will_read(self, spans: Iterable[tuple[int, int]]) -> None:
        """The kernel reads ahead."""

    def read_into(self, buffers: Sequence[Any], offset: int) -> None:
        left = [view for view in (memoryview(buffer).cast("B") for buffer in buffers) if view.nbytes]
        while left:
            try:
                done = self._files.preadv(self._file, left[:1024], offset)  # IOV_MAX
            except OSError as error:
                raise DirectoryStore.unreadable(error, self._where) from error
            if not done:
                raise self._ended(offset)
            offset += done
            while left and done >= left[0].nbytes:
                done -= left.pop(0).nbytes
            if done:
                left[0] = left[0][done:]

    def read_summed(self, room: Any, offset: int) -> int:
        checksum, view = Xxh64(), memoryview(room).cast("B")
        try:
            done = self._files.read_adding(self._file, view, offset, checksum)
        except OSError as error:
            raise DirectoryStore.unreadable(error, self._where) from error
        if done < view.nbytes:
            raise self._ended(offset + done)
        return checksum.end(view[done - done % 32 :])

    def _ended(self, offset: int) -> DamagedCheckpoint:
        damage = f"the segment {self._where} ends at {offset}, before what is in it does"
        return DamagedCheckpoint(damage, damage=(damage,))

    def close(self) -> None:
        if self._file >= 0:
            file, self._file = self._file, File(-1)
            with suppress(OSError):
                self._files.close(file)

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()

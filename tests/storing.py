# SPDX-License-Identifier: MIT
"""Stores of checkpoints under test: files that fail, die or are recorded; crashes replayed; a model of what is saved.

`Failing`, `Dying` and `Recording` are `Files` for a `DirectoryStore`. `crashes` gives every state of the disk that a
file system may leave behind after a power loss at any moment of what was recorded.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import signal
import threading
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partialmethod
from pathlib import Path
from typing import Any, NamedTuple

from dirtytrack.checkpoint.coding import Decoder, Encoder
from dirtytrack.checkpoint.files import Directory, File, Files
from dirtytrack.checkpoint.manifests import Manifest, RegionEntry, SegmentEntry
from dirtytrack.checkpoint.protocols import Kept, Store, Writer
from dirtytrack.checkpoint.segments import FrameKind, SegmentReader
from dirtytrack.checkpoint.store import DirectoryStore
from dirtytrack.delta import Delta, apply

__all__ = [
    "OPENING",
    "PAGE",
    "READS",
    "Contents",
    "Dying",
    "Failing",
    "Hooked",
    "Moment",
    "Recording",
    "crashes",
    "frames_and_bytes",
    "kept",
    "read_back",
    "save",
    "store_at",
]

PAGE = 4096
OPENING = ("open_directory", "create", "open", "open_lock")
READS = ("preadv", "read_adding")
READING = (*READS, "names", "open", "nbytes", "holder", "begin_writing")  # what changes nothing
OPERATIONS = tuple(
    name for name, value in vars(Files).items() if callable(value) and name[0] != "_" and name != "release"
)


# ---- files that do as they are told


class Hooked(Files):
    """Each operation goes through `operate`, which a subclass overrides; knows which descriptors are open."""

    def __init__(self) -> None:
        self.descriptors = set[int]()
        self._mutex = threading.Lock()

    def operate(self, name: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return call(*args, **options)

    def _operation(self, name: str, *args: Any, **options: Any) -> Any:
        result = self.operate(name, getattr(super(), name), *args, **options)
        with self._mutex:
            if name in OPENING:
                self.descriptors.add(result)
            elif name == "close":
                self.descriptors.discard(args[0])
        return result


for operation in OPERATIONS:
    setattr(Hooked, operation, partialmethod(Hooked._operation, operation))


class Failing(Hooked):
    """The ``nth`` operation from now on (from 1) fails, or also all that follow; or writes are short.

    Args:
        nth: which; 0 for none.
        error: the number that it fails with.
        for_ever: all that follow fail too, but for `close`, which no disk refuses.
        only: operations that count; all but `close` and `unlock` where it is left out.
        short: each write writes half of what it is given, one byte at least.
    """

    def __init__(
        self,
        nth: int = 0,
        error: int = errno.EIO,
        *,
        for_ever: bool = False,
        only: tuple[str, ...] = (),
        short: bool = False,
    ) -> None:
        super().__init__()
        self.nth, self.error, self.for_ever, self.only, self.short = nth, error, for_ever, only, short
        self.count = 0
        self.failed: list[str] = []

    def operate(self, name: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        counts = name in self.only if self.only else name not in ("close", "unlock", "holder")
        self.count += counts
        if counts and self.nth and (self.count == self.nth or (self.for_ever and self.count > self.nth)):
            self.failed.append(name)
            raise OSError(self.error, os.strerror(self.error))
        if name == "pwrite" and self.short:
            file, data, offset = args
            return call(file, memoryview(data)[: max(len(data) // 2, 1)], offset)
        return call(*args, **options)


class Dying(Hooked):
    """The process is killed before its ``nth`` operation that changes anything."""

    def __init__(self, nth: int) -> None:
        super().__init__()
        self.left = nth

    def operate(self, name: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if name not in READING:
            self.left -= 1
            if not self.left:
                os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **options)


# ---- what a power loss may leave


@dataclass
class _Inode:
    """A file (bytes that are durable, writes that are not) or a directory (entries, and what each may also be)."""

    durable: bytes = b""
    writes: list[tuple[int, bytes]] = field(default_factory=list)
    entries: dict[str, _Inode] | None = None
    changed: dict[str, list[_Inode | None]] = field(default_factory=dict)  # since the last sync, in order
    now: dict[str, _Inode] = field(default_factory=dict)

    def put(self, name: str, inode: _Inode | None) -> None:
        assert self.entries is not None
        self.changed.setdefault(name, [self.entries.get(name)]).append(inode)
        if inode is None:
            del self.now[name]
        else:
            self.now[name] = inode

    def content(self, kept: Sequence[bool] | None = None, part: int = 1) -> bytes:
        """With those unsynced writes that are kept, all or a part of each; a gap before one is zeros."""
        data = bytearray(self.durable)
        for i, (offset, written) in enumerate(self.writes):
            some = written[: len(written) // part]
            if some and (kept is None or kept[i]):
                data.extend(bytes(max(offset + len(some) - len(data), 0)))
                data[offset : offset + len(some)] = some
        return bytes(data)

    def contents(self) -> list[bytes]:
        """What it may hold: nothing of what is not synced, all, half, all but one write, zeros of its whole length."""
        found, count = [self.durable], len(self.writes)
        if count:
            end = max(offset + len(data) for offset, data in self.writes)
            found += [self.content(), self.content(part=2), self.durable.ljust(end, b"\0")]
            found += [self.content([i < half for i in range(count)]) for half in range(1, count)]
            found += [self.content([i != hole for i in range(count)]) for hole in range(count)]
        return list(dict.fromkeys(found))


class Moment(NamedTuple):
    """A moment at which power was lost."""

    after: int
    """How many operations were done before."""
    notes: tuple[Any, ...]
    """What the test had noted by then."""
    tree: dict[str, bytes | None]
    """What is found then: paths below the root, None for directories."""


class Recording(Hooked):
    """Keeps what a disk would know: what was synced, and what was not yet.

    Args:
        root: the directory whose contents are recorded, there before the store.
    """

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root
        self._tree = _Inode(entries={})
        self._open = dict[int, _Inode]()
        self._notes: list[Any] = []
        self._states: list[tuple[int, tuple[Any, ...], dict[str, bytes | None]]] = []
        self._seen = set[tuple[frozenset[tuple[str, bytes | None]], int]]()
        self.order: list[str] = []
        """Operations that change or sync anything, in words."""
        self.random = random.Random(7)

    def note(self, what: Any) -> None:
        """Remember something that holds from now on, as "this was reported committed"."""
        self._notes.append(what)
        self._take()

    def operate(self, name: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        result = call(*args, **options)
        if name == "open_directory":
            self._open[result] = self._directory(*args)
        elif name in ("create", "open", "open_lock"):
            directory, entry = self._open[args[0]], args[1]
            if entry not in directory.now:
                self._did(name, entry)
                directory.put(entry, _Inode())
            self._open[result] = directory.now[entry]
        elif name == "close":
            self._open.pop(args[0])
        elif name not in (*READING, "lock", "unlock"):
            self._did(name, *args)
            getattr(self, f"_{name}")(*args, result)
        else:
            return result
        self._take()
        return result

    def _did(self, name: str, *args: Any) -> None:
        names = {id(inode): path for path, inode in self._walk(self._tree, "", now=True)}
        known = [names.get(id(self._open.get(each)), "?") if type(each) is int else each for each in args]
        self.order.append(" ".join([name, *[each for each in known if isinstance(each, str)]]))

    def _directory(self, path: str, within: Directory | None = None) -> _Inode:
        if within is not None:
            return self._open[within].now[path]
        inode = self._tree
        for part in Path(path).relative_to(self.root).parts:
            inode = inode.now[part]
        return inode

    def _make_directory(self, path: str, *rest: Any) -> None:
        within = rest[0] if len(rest) > 1 else None
        parent = self._open[within] if within is not None else self._directory(str(Path(path).parent))
        parent.put(Path(path).name, _Inode(entries={}))

    def _pwrite(self, file: File, data: Any, offset: int, done: int) -> None:
        self._open[file].writes.append((offset, bytes(memoryview(data).cast("B")[:done])))

    def _sync(self, file: File, _: None) -> None:
        inode = self._open[file]
        inode.durable, inode.writes = inode.content(), []

    def _sync_directory(self, directory: Directory, _: None) -> None:
        inode = self._open[directory]
        inode.entries, inode.changed = dict(inode.now), {}

    def _link(self, directory: Directory, old: str, new: str, _: None) -> None:
        self._open[directory].put(new, self._open[directory].now[old])

    def _rename(self, directory: Directory, old: str, new: str, _: None) -> None:
        inode = self._open[directory].now[old]
        self._open[directory].put(new, inode)
        self._open[directory].put(old, None)

    def _unlink(self, directory: Directory, name: str, _: None) -> None:
        self._open[directory].put(name, None)

    # ---- every state that may be found

    def _walk(self, inode: _Inode, path: str, *, now: bool) -> Iterator[tuple[str, _Inode]]:
        for name, entry in (inode.now if now else inode.entries or {}).items():
            yield path + name, entry
            if entry.entries is not None:
                yield from self._walk(entry, f"{path}{name}/", now=now)

    def _take(self) -> None:
        for tree in self._trees(self._tree, ""):
            key = (frozenset(tree.items()), len(self._notes))
            if key not in self._seen:
                self._seen.add(key)
                self._states.append((len(self.order), tuple(self._notes), tree))

    def _trees(self, inode: _Inode, path: str, most: int = 400) -> list[dict[str, bytes | None]]:
        """All that may be found below a directory; a sample where that is more than ``most``, with both extremes."""
        assert inode.entries is not None
        parts: list[list[dict[str, bytes | None]]] = []
        for name in {**inode.entries, **inode.now, **inode.changed}:
            may: list[_Inode | None] = inode.changed.get(name) or [inode.entries.get(name)]
            found: list[dict[str, bytes | None]] = []
            for entry in may:
                if entry is None:
                    found.append({})
                elif entry.entries is not None:
                    found += [{path + name: None, **below} for below in self._trees(entry, f"{path}{name}/", most)]
                else:
                    found += [{path + name: content} for content in entry.contents()]
            parts.append([each for i, each in enumerate(found) if each not in found[:i]])
        count = 1
        for part in parts:
            count *= len(part)
        if count <= most:
            chosen: Iterator[tuple[dict[str, bytes | None], ...]] = itertools.product(*parts)
        else:
            drawn = [tuple(self.random.choice(part) for part in parts) for _ in range(most - 2)]
            chosen = iter([tuple(part[0] for part in parts), tuple(part[-1] for part in parts), *drawn])
        return [{name: content for part in parts for name, content in part.items()} for parts in chosen]

    def moments(self) -> Iterator[Moment]:
        """Each state that a power loss at any moment may leave, once."""
        for state in self._states:
            yield Moment(*state)


def crashes(recording: Recording, where: Path, since: int = 0) -> Iterator[tuple[Moment, Path]]:
    """Each state of the disk after a power loss, from an operation on, laid out in a directory instead of the root."""
    for moment in recording.moments():
        if moment.after < since:
            continue
        shutil.rmtree(where, ignore_errors=True)
        where.mkdir(mode=0o700)
        for path, content in sorted(moment.tree.items()):
            if content is None:
                (where / path).mkdir(mode=0o700)
            else:
                (where / path).write_bytes(content)
        yield moment, where


# ---- a small model of what is saved

Contents = Mapping[str, bytes]


def _runs(pages: list[int], nbytes: int) -> array[int]:
    found = array("Q")
    for page in pages:
        start, end = page * PAGE, min((page + 1) * PAGE, nbytes)
        if found and found[-2] + found[-1] == start:
            found[-1] += end - start
        else:
            found.extend((start, end - start))
    return found


def save(
    writer: Writer,
    store: Store,
    contents: Contents,
    before: Contents | None = None,
    parent: Manifest | None = None,
    *,
    revision: int = 0,
    generation: int | None = None,
    encoder: Encoder | None = None,
    meta: Any = None,
    frame_pages: int = 3,
    threads: Any = None,
) -> Manifest:
    """Save contents, whole or what differs from ``before``, in frames of a few pages.

    With a revision, the generation is written anew in one segment, as compacting does. With ``threads`` it is the image
    of a process.
    """
    number = generation or writer.next_generation()
    encoder = encoder or Encoder(None)
    entries: tuple[SegmentEntry, ...] = ()
    segment = writer.create_segment(number)
    old = parent if before is not None else None
    known = {region.name: region for region in old.regions} if old else {}
    regions, free = [], itertools.count(max((region.number for region in known.values()), default=-1) + 1)
    try:
        for name, data in contents.items():
            same = name in known and known[name].nbytes == len(data) and before is not None
            region = known[name] if same else RegionEntry(next(free), name, len(data), "|u1", (len(data),), number)
            regions.append(region)
            last = (before or {}).get(name, b"") if same else None
            dirty = [
                at
                for at in range(-(-len(data) // PAGE))
                if last is None or data[at * PAGE : (at + 1) * PAGE] != last[at * PAGE : (at + 1) * PAGE]
            ]
            for first in range(0, len(dirty), frame_pages):
                pages = dirty[first : first + frame_pages]
                packed = b"".join(data[page * PAGE : (page + 1) * PAGE] for page in pages)
                runs = _runs(pages, len(data))
                if not any(packed):
                    segment.add(region.number, runs, kind=FrameKind.ZEROS)
                    continue
                stored, codec, encrypted = encoder.encode(packed)
                segment.add(region.number, runs, stored, codec=codec, encrypted=encrypted, plain_nbytes=len(packed))
        entries = (*(old.segments if old else ()), segment.finish())
        manifest = Manifest(
            store_id=store.store_id,
            generation=number,
            revision=revision,
            parent=parent.parent if revision and parent else parent.generation if parent else None,
            created=1.0,
            kind="compacted" if revision else "increment" if old else "full",
            page_bytes=PAGE,
            meta=meta,
            regions=tuple(sorted(regions, key=lambda region: region.number)),
            segments=entries,
            threads=threads,
        )
        writer.publish(manifest)
    except BaseException:
        segment.abandon()
        raise
    return manifest


def frames_and_bytes(
    store: Store, manifest: Manifest, decoder: Decoder | None = None
) -> Iterator[tuple[int, memoryview, FrameKind, Any]]:
    """Region number, runs, kind and plain bytes of each frame that counts, oldest first."""
    decoder = decoder or Decoder()
    for entry in manifest.segments:
        nbytes = {region.number: region.nbytes for region in manifest.regions if region.since <= entry.generation}
        with SegmentReader(store.open_segment(entry.name), entry, store.store_id) as reader:
            for frame in reader.frames(nbytes):
                if frame.region in nbytes:
                    zeros = frame.kind == FrameKind.ZEROS
                    plain = b"" if zeros else decoder.decode(frame, reader.read(frame))
                    yield frame.region, frame.runs, frame.kind, plain


def read_back(store: Store, generation: int | None = None, decoder: Decoder | None = None) -> dict[str, bytes]:
    """The plainest restore: one frame after the other."""
    with store.reading():
        manifest = store.manifest(generation)
        found = {region.number: bytearray(region.nbytes) for region in manifest.regions}
        for number, runs, kind, plain in frames_and_bytes(store, manifest, decoder):
            places: list[list[int]] = runs.tolist()  # type: ignore[assignment]
            if kind == FrameKind.DELTA:
                packed = bytearray().join(found[number][at : at + nbytes] for at, nbytes in places)
                apply(Delta.from_bytes(plain), packed)
                plain = bytes(packed)
            done = 0
            for at, nbytes in places:
                zeros = kind == FrameKind.ZEROS
                found[number][at : at + nbytes] = bytes(nbytes) if zeros else bytes(plain[done : done + nbytes])
                done += nbytes
    return {region.name: bytes(found[region.number]) for region in manifest.regions}


def kept(manifest: Manifest) -> Kept:
    return Kept(manifest.generation, manifest.revision)


def store_at(path: Path, files: Files | None = None) -> DirectoryStore:
    """The store in a directory, made where there is none."""
    return DirectoryStore(path, create=True, files=files)

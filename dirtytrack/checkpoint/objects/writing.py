# SPDX-License-Identifier: MIT
"""Writing checkpoints to an object store: whatever is interrupted when leaves each generation whole, or not there."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from typing import TYPE_CHECKING
from weakref import WeakSet

from ...errors import (
    CheckpointerClosed,
    DamagedCheckpoint,
    DirtyTrackError,
    InvalidCheckpoint,
    NoSuchGeneration,
    StoreBusy,
    StoreFailed,
)
from ..base import MANIFESTS, SEGMENTS
from ..manifests import MOST_GENERATION, Manifest, manifest_name, manifest_of_name, segment_name, segment_of_name
from ..protocols import Kept
from ..segments import SegmentWriter
from .bucket import Absent, Present, put_once
from .lease import Lease
from .sink import ObjectSink
from .store import REMOVED, make_marker

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import TracebackType

    from typing_extensions import Self

    from .bucket import Found
    from .store import ObjectStore

__all__ = ["ObjectWriter"]

_open_writers: WeakSet[ObjectWriter] = WeakSet()


class ObjectWriter:
    """The right to write to an object store: see `Writer`. It goes with the process, at once for who opens the store
    on the same machine, else when its lease ends.

    Args:
        store: which. Keep it open.

    Raises:
        StoreBusy: somebody else has the right.
        PermissionDenied, StoreFailed: it cannot be written to, or does not honour conditional puts.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store, self._bucket = store, store.bucket
        self._mutex = threading.RLock()
        self._pending: dict[str, ObjectSink] = {}
        self._uncertain = set[str]()  # a manifest that names them may appear yet
        self._named: dict[Kept, frozenset[str]] = {}
        self._there = set[str]()  # segments that are known to be there
        self._closed = False
        self._lease = Lease(self._bucket, store.lease_seconds)
        _open_writers.add(self)
        try:
            if store.damage():
                make_marker(self._bucket, store.store_id, again=True)
                store.repaired()
            self._clean()
        except BaseException:
            self.close()
            raise

    # ---- segments

    def create_segment(self, generation: int) -> SegmentWriter:
        """Begin a segment: see `Writer.create_segment`."""
        self._require_open()
        if not 1 <= generation <= MOST_GENERATION:
            raise InvalidCheckpoint(f"a generation is a number from 1 to {MOST_GENERATION}, not {generation}")
        key = f"{SEGMENTS}/{segment_name(generation, os.urandom(8))}"
        sink = ObjectSink(self._bucket, key, self._store.part_bytes, self._store.parts_in_flight, self._drop)
        self._pending[sink.name] = sink
        return SegmentWriter(sink, self._store.store_id)

    def next_generation(self) -> int:
        """A number that nothing here has: see `Writer.next_generation`."""
        self._require_open()
        found = [kept.generation for kept in self._store.catalog()]
        found += [which[0] for which in map(segment_of_name, self._store.segments()) if which]
        found += [which[0] for which in map(manifest_of_name, self._store.names(REMOVED)) if which]
        following = max(found, default=0) + 1
        if following > MOST_GENERATION:
            raise InvalidCheckpoint(f"the store {self._store.name} has had all generations: begin another")
        return following

    def _drop(self, name: str) -> bool:
        """A segment was abandoned; whether no manifest names it, nor may."""
        with self._mutex:
            return self._pending.pop(name, None) is not None and name not in self._uncertain

    # ---- manifests

    def publish(self, manifest: Manifest) -> None:
        """Commit: see `Writer.publish`. Somebody else who became the writer meanwhile is found out, and then it is not
        there.

        Raises:
            StoreBusy: somebody else writes.
        """
        if manifest.store_id != self._store.store_id:
            raise InvalidCheckpoint(f"this manifest is of another store than {self._store.name}")
        data, kept = manifest.encode(), Kept(manifest.generation, manifest.revision)
        names = {segment.name for segment in manifest.segments}
        with self._mutex:
            self._require_open()
            self._lease.require()
            self._require_there(names)
            if kept in self._named:
                raise InvalidCheckpoint(
                    f"generation {manifest.generation} has a revision {manifest.revision} already, and nothing is "
                    "overwritten: take the next one"
                )
            before = set(self._uncertain)
            self._uncertain |= names  # from here on it may be there, or come to be, whatever is raised
            try:
                self._appear(manifest, data)
            except DirtyTrackError as error:
                if not isinstance(error, StoreFailed):
                    self._uncertain = before  # it was refused
                raise
            self._require_still_ours(kept)
            self._uncertain = before - names
            for name in names:
                self._pending.pop(name, None)
            self._there |= names
            self._named[kept] = frozenset(names)

    def _appear(self, manifest: Manifest, data: bytes) -> None:
        try:
            put_once(self._bucket, f"{MANIFESTS}/{manifest.name}", data)
        except Present as error:
            raise StoreBusy(
                f"somebody else saved generation {manifest.generation} to {self._store.name}, and nothing is "
                "overwritten: one at a time may write to a store"
            ) from error

    def _require_still_ours(self, kept: Kept) -> None:
        """What was published before the next term began, who began that has seen. Else it must not be there."""
        try:
            self._lease.require()
        except StoreBusy:
            with suppress(DirtyTrackError):
                self._bucket.delete([f"{MANIFESTS}/{manifest_name(*kept)}"])
            raise

    def _require_there(self, names: set[str]) -> None:
        unfinished = {name for name in names if name in self._pending and not self._pending[name].finished}
        missing = {name for name in names if name not in self._pending} - self._there
        if missing:
            self._there = set(self._store.segments())
            missing -= self._there
        if missing or unfinished:
            name = min(missing or unfinished)
            raise InvalidCheckpoint(f"a manifest names segments that are finished and there, which {name} is not")

    # ---- removing

    def remove(self, manifests: Sequence[Kept]) -> bool:
        """Remove manifests, and what no other one names once nobody can be reading it any more: see `Writer.remove`."""
        with self._mutex:
            self._require_open()
            self._lease.require()
            for kept in manifests:
                name = manifest_name(*kept)
                try:
                    # From now on its readers have their time.
                    self._bucket.put(f"{REMOVED}/{name}", self._bucket.get(f"{MANIFESTS}/{name}"))
                    self._bucket.delete([f"{MANIFESTS}/{name}"])
                except Absent:
                    pass
                self._named.pop(Kept(*kept), None)
            self._clean()
            return True

    def clean(self) -> tuple[str, ...]:
        """Remove leftovers that are older than the grace: see `Writer.clean`."""
        with self._mutex:
            self._require_open()
            return tuple(self._clean())

    def _clean(self) -> list[str]:
        """What is listed first was there before: a manifest that names a segment of this list is in the next."""
        bucket = self._bucket
        segments = [each for each in bucket.list(SEGMENTS) if segment_of_name(_name(each.key))]
        self._there = {_name(each.key) for each in segments}
        removed = bucket.list(REMOVED)
        if (named := self._named_segments()) is None:
            return []
        young = [each.key for each in removed if not self._is_over(each)]
        if (held := self._named_by(young)) is None:
            return []
        gone = [
            each.key
            for each in segments
            if (name := _name(each.key)) not in named
            and name not in held
            and name not in self._pending
            and name not in self._uncertain
            and self._is_over(each)
        ]
        if gone:
            self._lease.require()
            bucket.delete(gone)
            self._there -= {_name(key) for key in gone}
        old = [each.key for each in removed if each.key not in young]
        if old:
            bucket.delete(old)
        return gone

    def _is_over(self, each: Found) -> bool:
        """Whether the grace of what was put then is over, by the store's clock."""
        grace = self._store.grace_seconds
        return not grace or self._lease.now() - each.modified > grace

    def _named_segments(self) -> set[str] | None:
        """The segments that manifests name; None where one of them cannot be read: who knows what it names."""
        catalog = self._store.catalog()
        if not self._named.keys() <= set(catalog):
            return None  # one that we know of is gone, and we did not remove it: touch nothing
        unknown = [kept for kept in catalog if kept not in self._named]
        try:
            for manifest in self._store.read_many(unknown):
                self._named[Kept(manifest.generation, manifest.revision)] = frozenset(
                    segment.name for segment in manifest.segments
                )
        except (DamagedCheckpoint, InvalidCheckpoint, NoSuchGeneration, StoreFailed):
            return None
        return set().union(*self._named.values())

    def _named_by(self, removed: Iterable[str]) -> set[str] | None:
        """The segments that removed manifests name. One that is no manifest was none when it was removed."""
        found = set[str]()
        for key in removed:
            try:
                found.update(segment.name for segment in Manifest.decode(self._bucket.get(key)).segments)
            except (Absent, DamagedCheckpoint, InvalidCheckpoint):
                continue
            except StoreFailed:
                return None
        return found

    # ---- the end

    def _require_open(self) -> None:
        if self._closed:
            raise CheckpointerClosed(f"this writer of the store {self._store.name} is closed: take another")

    def close(self) -> None:
        """Give the right back: see `Writer.close`. Closing again does nothing."""
        with self._mutex:
            if self._closed:
                return
            for sink in tuple(self._pending.values()):
                sink.abandon()
            self._closed = True
            self._lease.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(Exception):
            self._lease.drop()  # a finaliser asks nothing of a network

    def _forked(self) -> None:
        """In the child: neither the lease nor the segments are its own."""
        self._mutex, self._closed = threading.RLock(), True
        for sink in self._pending.values():
            sink.forget()
        self._pending.clear()


def _name(key: str) -> str:
    return key.rpartition("/")[2]


def _after_fork() -> None:
    for writer in tuple(_open_writers):
        writer._forked()


os.register_at_fork(after_in_child=_after_fork)

# SPDX-License-Identifier: MIT
"""Checkpoints in an object store: the same objects as a directory has files; see docs/object-stores.md."""

from __future__ import annotations

import os
from collections import OrderedDict
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from ...errors import CheckpointerClosed, DamagedCheckpoint, InvalidCheckpoint, NoSuchGeneration, StoreFailed
from ..base import MANIFESTS, MARKER, RANKS, SEGMENTS, BaseStore, marker_of, rank_folder, rank_of_folder
from ..crew import Crew
from ..manifests import Manifest, manifest_name, manifest_of_name, segment_of_name
from ..protocols import Kept
from .bucket import Absent, Present, Within, bucket_at, put_once
from .lease import WRITERS, term_of_key
from .source import FIRST_NBYTES, ObjectSource

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    from typing_extensions import Self

    from ..protocols import Source
    from .bucket import Bucket
    from .writing import ObjectWriter

__all__ = ["REMOVED", "ObjectStore", "make_marker"]

REMOVED = "removed"
_THREADS = 8
_MOST_KNOWN = 10_000
_LEAST_PART, _MOST_PART = 5 << 20, 1 << 30


def make_marker(bucket: Bucket, store_id: str, *, again: bool = False) -> None:
    """Say that there is a store; one that is there already counts."""
    if again:
        bucket.put(MARKER, marker_of(store_id))
        return
    with suppress(Present):
        put_once(bucket, MARKER, marker_of(store_id))


class ObjectStore(BaseStore):
    """Checkpoints in an object store: Amazon S3 and what speaks like it, Google Cloud Storage, Azure Blob Storage.

    Credentials, endpoint and region come from the environment, by the conventions of the package obstore
    (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, ``GOOGLE_APPLICATION_CREDENTIALS``, …), or from ``options``.

    Args:
        where: a URL as ``s3://bucket/prefix``, ``gs://…`` or ``az://…``; or a store of obstore's.
        create: make it, where there is nothing yet. Buckets are not made.
        part_bytes: segments are sent in parts of so many bytes.
        parts_in_flight: how many parts are sent at once, from the staging buffer where that has four parts at least.
        lease_seconds: how long after its last sign of life others wait for a writer on another machine.
        grace_seconds: how long segments are kept after the last generation that named them was removed, or without
            one: a restore that takes longer may find some gone. By the store's clock.
        options: for ``obstore.store.from_url``: ``region``, ``endpoint``, ``client_options``, ``retry_config``,
            ``credential_provider``, …

    Raises:
        InvalidCheckpoint: there is none, the bucket is missing, something else is there, or an option is none.
        DamagedCheckpoint: its marker is damaged.
        PermissionDenied: credentials are missing, wrong, expired, or do not allow it.
        StoreFailed: it cannot be reached, or clock or region are wrong.
        UnsupportedKernel: the package obstore is not installed.

    Thread safety: everything may be called from any thread. A child that was forked cannot use it.
    """

    def __init__(
        self,
        where: Any,
        *,
        create: bool = False,
        part_bytes: int = 5 << 20,
        parts_in_flight: int = 8,
        lease_seconds: float = 60.0,
        grace_seconds: float = 3600.0,
        **options: Any,
    ) -> None:
        for name, value, least, most in (
            ("part_bytes", part_bytes, _LEAST_PART, _MOST_PART),
            ("parts_in_flight", parts_in_flight, 1, 1000),
            ("lease_seconds", lease_seconds, 1, 1e9),
            ("grace_seconds", grace_seconds, 0, 1e12),
        ):
            if type(value) is not int and not (type(value) is float and name.endswith("seconds")):
                raise InvalidCheckpoint(f"{name}= is a number, not {value!r}")
            if not least <= value <= most:
                raise InvalidCheckpoint(f"{name}= is from {least} to {most}, not {value!r}")
        self.part_bytes, self.parts_in_flight = part_bytes, parts_in_flight
        self.held_nbytes = (parts_in_flight + 1) * part_bytes
        self.lease_seconds, self.grace_seconds = lease_seconds, grace_seconds
        self._closed = False
        self._sizes: OrderedDict[str, int] = OrderedDict()  # of segments, which never change
        self._read: OrderedDict[str, Kept] = OrderedDict()  # by segment: a manifest that names it
        self.bucket = bucket_at(where, options)
        self.store_id = self._id(create)

    @property
    def name(self) -> str:
        """Its URL."""
        return self.bucket.name

    def _id(self, create: bool) -> str:
        where = self.bucket.where(MARKER)
        try:
            return self.id_of_marker(self.bucket.get(MARKER), where)
        except Absent:
            pass
        nothing = InvalidCheckpoint(f"{self.name} is no store of checkpoints: it has no object {MARKER}")
        if self.catalog():
            return self.id_of_manifests(f"{where} is missing", nothing)
        if not create:
            raise InvalidCheckpoint(f"{nothing}. Saving to it makes one, if nothing is there yet")
        other = [each.key for each in self.bucket.list() if each.key.partition("/")[0] not in (WRITERS, MARKER, RANKS)]
        if other:
            raise InvalidCheckpoint(
                f"{self.name} is no store of checkpoints: it holds something else ({other[0]!r}). Save below a prefix "
                "where nothing is"
            )
        make_marker(self.bucket, os.urandom(16).hex())
        try:
            return self.id_of_marker(self.bucket.get(MARKER), where)
        except Absent:
            raise InvalidCheckpoint(f"{where} was removed as it was made: somebody else is at work there") from None

    def close(self) -> None:
        """Let go of it. Closing again does nothing."""
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<ObjectStore {self.name}>"

    def __reduce__(self) -> Any:
        raise TypeError("an ObjectStore cannot be pickled: pass its URL")

    def _require_open(self) -> None:
        if self._closed:
            raise CheckpointerClosed(f"the store {self.name} is closed: open it again")

    # ---- reading

    def names(self, folder: str) -> list[str]:
        """Of the objects in a folder, sorted."""
        self._require_open()
        return [each.key.removeprefix(f"{folder}/") for each in self.bucket.list(folder)]

    def catalog(self) -> tuple[Kept, ...]:
        """The manifests that are there, oldest first."""
        return tuple(sorted(Kept(*each) for each in map(manifest_of_name, self.names(MANIFESTS)) if each))

    def segments(self) -> tuple[str, ...]:
        """The names of the segments that are there, named by a manifest or not, oldest first."""
        return tuple(name for name in self.names(SEGMENTS) if segment_of_name(name))

    def read_manifest(self, kept: Kept) -> bytes:
        """The bytes of a manifest.

        Raises:
            NoSuchGeneration: it is not there.
        """
        self._require_open()
        key = f"{MANIFESTS}/{manifest_name(*kept)}"
        try:
            return self.bucket.get(key)
        except Absent as error:
            raise NoSuchGeneration(f"{self.name} has no {key}") from error

    def read(self, kept: Kept) -> Manifest:
        """Read one manifest; raises as `manifest`."""
        manifest = super().read(kept)
        for segment in manifest.segments:
            self._read[segment.name] = kept
            self._read.move_to_end(segment.name)
        while len(self._read) > _MOST_KNOWN:
            self._read.popitem(last=False)
        return manifest

    def read_many(self, catalog: Sequence[Kept]) -> Iterator[Manifest]:
        """Read manifests, some at a time."""
        with Crew(min(_THREADS, max(len(catalog), 1))) as crew:
            yield from crew.map(super().read, catalog)

    def open_segment(self, name: str) -> Source:
        """Open a segment that a manifest names: see `Store.open_segment`.

        Raises:
            NoSuchGeneration: the generation that names it was removed meanwhile.
        """
        self._require_open()
        if segment_of_name(name) is None:
            raise InvalidCheckpoint(f"{name!r} is no name of a segment")
        key = f"{SEGMENTS}/{name}"

        def missing() -> Exception:
            return self._missing(name)

        known = self._sizes.get(name)
        if known is not None:
            return ObjectSource(self.bucket, key, known, memoryview(b""), missing)
        try:
            first, nbytes = self._first(key)
        except Absent as error:
            raise missing() from error
        self._sizes[name] = nbytes
        while len(self._sizes) > _MOST_KNOWN:
            self._sizes.popitem(last=False)
        return ObjectSource(self.bucket, key, nbytes, first, missing)

    def _first(self, key: str) -> tuple[memoryview, int]:
        try:
            return self.bucket.get_first(key, FIRST_NBYTES)
        except StoreFailed:  # a range of nothing cannot be asked for
            if self.bucket.nbytes(key):
                raise
            return memoryview(b""), 0

    def _missing(self, name: str) -> Exception:
        kept = self._read.get(name)
        if kept is not None and kept not in self.catalog():
            return NoSuchGeneration(
                f"generation {kept.generation} of {self.name} was removed while it was read, and its grace is over: "
                "read a newer one, or give the writer a longer grace_seconds"
            )
        damage = f"the segment {self.bucket.where(f'{SEGMENTS}/{name}')} is missing"
        return DamagedCheckpoint(damage, damage=(damage,))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Nothing to do: what is removed can be read until its grace is over."""
        self._require_open()
        self._sizes.clear()  # what somebody took away meanwhile is to be missed
        yield

    def strangers(self) -> tuple[str, ...]:
        """What is in the store and belongs to no generation; sorted. Segments whose grace is not over do belong."""
        self._require_open()
        keys = [each.key for each in self.bucket.list()]
        named = set[str]()
        for key in keys:
            folder, _, name = key.partition("/")
            if folder in (MANIFESTS, REMOVED) and (kept := manifest_of_name(name)):
                with suppress(Absent, DamagedCheckpoint, InvalidCheckpoint, NoSuchGeneration):
                    data = self.bucket.get(key)
                    named.update(segment.name for segment in Manifest.decode(data, f"{key}, {kept}").segments)
        return tuple(sorted(key for key in keys if not self._is_ours(key, named)))

    @staticmethod
    def _is_ours(key: str, named: set[str]) -> bool:
        folder, _, name = key.partition("/")
        if folder == SEGMENTS:
            return name in named
        if folder in (MANIFESTS, REMOVED):
            return manifest_of_name(name) is not None
        if folder == RANKS:
            return rank_of_folder(name.partition("/")[0]) is not None  # a store of its own
        return key == MARKER or term_of_key(key) is not None

    def writer(self) -> ObjectWriter:
        """Become the one who writes: see `Store.writer`."""
        self._require_open()
        from .writing import ObjectWriter

        return ObjectWriter(self)

    # ---- ranks

    def part(self, rank: int, *, create: bool = False) -> ObjectStore:
        """The store of a rank's parts: see `Store.part`."""
        self._require_open()
        return ObjectStore(
            Within(self.bucket, f"{RANKS}/{rank_folder(rank)}"),
            create=create,
            part_bytes=self.part_bytes,
            parts_in_flight=self.parts_in_flight,
            lease_seconds=self.lease_seconds,
            grace_seconds=self.grace_seconds,
        )

    def parts(self) -> tuple[int, ...]:
        """The ranks whose parts have a store here, in order."""
        self._require_open()
        found = map(rank_of_folder, self.bucket.folders(RANKS))
        return tuple(sorted(rank for rank in found if rank is not None))

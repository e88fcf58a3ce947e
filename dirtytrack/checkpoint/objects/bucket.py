# SPDX-License-Identifier: MIT
"""Every request to an object store, one method each: the one seam where tests fail, count and delay them."""

from __future__ import annotations

import errno
import os
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import InvalidCheckpoint, StoreFailed, UnsupportedKernel, UsedAfterFork
from .refusals import brief, refusal, says_bucket_missing, was_cut

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Absent", "Bucket", "Found", "Present", "Within", "bucket_at", "put_once"]

_SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl")
_ATTEMPTS, _PAUSE_SECONDS = 4, 0.05


class Absent(Exception):
    """There is no such object. Does not leave this package."""


class Present(Exception):
    """There is such an object already, or a conflicting request is under way. Does not leave this package."""


class Found(NamedTuple):
    """An object in a listing."""

    key: str
    nbytes: int
    modified: float
    """When it was put, by the store's clock, in seconds since 1970."""


def _obstore() -> Any:
    try:
        import obstore
    except ImportError as error:
        raise UnsupportedKernel(
            "checkpoints in object stores need the package obstore, which is not installed: "
            "pip install dirtytrack[objects]",
            feature="obstore",
        ) from error
    return obstore


def bucket_at(where: Any, options: dict[str, Any]) -> Bucket:
    """The bucket, and the prefix in it, at a URL; or a store of obstore's as it is.

    Args:
        where: the URL, or the store; or a bucket as it is, for tests.
        options: for the library.

    Raises:
        InvalidCheckpoint: no such kind of store, or an option that it does not have.
        UnsupportedKernel: the package obstore is not installed.
    """
    if isinstance(where, Bucket):
        return where
    obstore = _obstore()
    if not isinstance(where, str):
        if type(where).__module__.partition(".")[0] != "obstore":
            raise InvalidCheckpoint(f"an object store is a URL or a store of the package obstore, not {where!r}")
        if options:
            raise InvalidCheckpoint(f"options are for a URL: {where!r} was made with its own")
        return Bucket(obstore, where, _name_of(where))
    scheme = where.partition(":")[0].lower()
    if "://" not in where or scheme not in _SCHEMES:
        raise InvalidCheckpoint(
            f"{where!r} is no URL of an object store: that begins with one of {', '.join(_SCHEMES)} and ://"
        )
    try:
        store = obstore.store.from_url(where, **options)  # no client_options of ours: they would hide the environment's
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # the library panics over some options
        raise InvalidCheckpoint(f"{where} cannot be opened so: {brief(str(error))}") from error
    return Bucket(obstore, store, where.rstrip("/"))


def _name_of(store: Any) -> str:
    config = getattr(store, "config", None) or {}
    prefix = getattr(store, "prefix", None)
    bucket = config.get("bucket") or config.get("container_name") or type(store).__name__
    return f"{bucket}/{prefix}" if prefix else str(bucket)


class Bucket:
    """The objects of a store. Keys are within its prefix.

    Args:
        obstore: the package.
        store: one of its stores.
        name: for messages.

    Each method raises PermissionDenied, StoreFailed or InvalidCheckpoint (there is no such bucket); beside those what
    its own lines say.

    Thread safety: everything may be called from any thread. The library's threads are not there in a forked child.
    """

    def __init__(self, obstore: Any, store: Any, name: str) -> None:
        self._obstore, self._store, self.name = obstore, store, name
        self._pid = os.getpid()

    def where(self, key: str) -> str:
        """For messages."""
        return f"{self.name}/{key}"

    def _ask(self, doing: str, run: Callable[..., Any], *args: Any, again: bool = True, **options: Any) -> Any:
        """Make a request. The library tries again what it knows that it may; where an answer was cut it does not, and
        we do, but for what is not the same when it is done twice (``again``)."""
        if os.getpid() != self._pid:
            raise UsedAfterFork(
                f"the store {self.name} was opened before a fork, and is the parent's. A child cannot use the library: "
                "use subprocess, or multiprocessing's spawn"
            )
        exceptions = self._obstore.exceptions
        for attempt in range(_ATTEMPTS):
            try:
                return run(*args, **options)
            except FileNotFoundError as error:
                if says_bucket_missing(error):
                    raise refusal(error, doing) from error
                raise Absent from error
            except exceptions.AlreadyExistsError as error:
                raise Present from error
            except (exceptions.BaseError, OSError, ValueError, NotImplementedError) as error:
                if again and attempt + 1 < _ATTEMPTS and was_cut(error):
                    time.sleep(_PAUSE_SECONDS * 2**attempt)
                    continue
                raise refusal(error, doing) from error
        raise AssertionError("the last attempt returns or raises")

    # ---- reading

    def get(self, key: str) -> bytes:
        """All of an object.

        Raises:
            Absent.
        """

        def run() -> bytes:
            return bytes(self._obstore.get(self._store, key).bytes())

        return self._ask(f"read {self.where(key)}", run)  # type: ignore[no-any-return]

    def get_first(self, key: str, nbytes: int) -> tuple[memoryview, int]:
        """The first bytes of an object, and how many it has; in one request.

        Raises:
            Absent.
        """

        def run() -> tuple[memoryview, int]:
            answer = self._obstore.get(self._store, key, options={"range": (0, nbytes)})
            return memoryview(answer.bytes()), int(answer.meta["size"])

        return self._ask(f"read {self.where(key)}", run)  # type: ignore[no-any-return]

    def get_range(self, key: str, offset: int, nbytes: int) -> memoryview:
        """Some bytes of an object; fewer where it ends before.

        Raises:
            Absent.
        """

        def run() -> memoryview:
            return memoryview(self._obstore.get_range(self._store, key, start=offset, length=nbytes))

        return self._ask(f"read {self.where(key)}", run)  # type: ignore[no-any-return]

    def nbytes(self, key: str) -> int:
        """Of an object.

        Raises:
            Absent.
        """
        return int(self._ask(f"look at {self.where(key)}", self._obstore.head, self._store, key)["size"])

    def list(self, prefix: str = "") -> list[Found]:
        """The objects below a folder, sorted."""

        def run() -> Any:
            return self._obstore.list(self._store, prefix or None, chunk_size=1000).collect()

        found = self._ask(f"list {self.where(prefix)}", run)
        return sorted(Found(str(each["path"]), int(each["size"]), each["last_modified"].timestamp()) for each in found)

    def folders(self, prefix: str) -> tuple[str, ...]:
        """The names of the folders in a folder, sorted."""

        def run() -> Any:
            return self._obstore.list_with_delimiter(self._store, prefix)["common_prefixes"]

        found = self._ask(f"list {self.where(prefix)}", run)
        return tuple(sorted(str(each).rstrip("/").rpartition("/")[2] for each in found))

    # ---- writing

    def put(self, key: str, data: Any) -> None:
        """Put an object, over the one that is there. A list is of its pieces, one behind the other."""
        self._ask(f"write {self.where(key)}", self._obstore.put, self._store, key, data, use_multipart=False)

    def create(self, key: str, data: bytes) -> None:
        """Put an object, unless there is one: a conditional put.

        Raises:
            Present.
        """
        self._ask(f"write {self.where(key)}", self._obstore.put, self._store, key, data, mode="create", again=False)

    def upload(self, key: str, part_nbytes: int, in_flight: int) -> Upload:
        """Begin to put an object in parts."""

        def run() -> Any:
            return self._obstore.open_writer(self._store, key, buffer_size=part_nbytes, max_concurrency=in_flight)

        return Upload(self, key, self._ask(f"write {self.where(key)}", run))

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects; those that are not there are none the less gone."""
        for at in range(0, len(keys), 1000):
            some = keys[at : at + 1000]
            try:
                self._ask(f"remove {self.where(some[0])}", self._obstore.delete, self._store, list(some))
            except Absent:  # some kinds say so, and stop
                for key in some:
                    try:
                        self._ask(f"remove {self.where(key)}", self._obstore.delete, self._store, key)
                    except Absent:
                        pass


class Within(Bucket):
    """A folder of a bucket, as a bucket of its own.

    Args:
        outer: the bucket.
        folder: within it.
    """

    def __init__(self, outer: Bucket, folder: str) -> None:
        self._outer, self._folder = outer, folder
        self.name = outer.where(folder)

    def _key(self, key: str) -> str:
        return f"{self._folder}/{key}" if key else self._folder

    def get(self, key: str) -> bytes:
        """See `Bucket.get`."""
        return self._outer.get(self._key(key))

    def get_first(self, key: str, nbytes: int) -> tuple[memoryview, int]:
        """See `Bucket.get_first`."""
        return self._outer.get_first(self._key(key), nbytes)

    def get_range(self, key: str, offset: int, nbytes: int) -> memoryview:
        """See `Bucket.get_range`."""
        return self._outer.get_range(self._key(key), offset, nbytes)

    def nbytes(self, key: str) -> int:
        """See `Bucket.nbytes`."""
        return self._outer.nbytes(self._key(key))

    def list(self, prefix: str = "") -> list[Found]:
        """See `Bucket.list`."""
        within = f"{self._folder}/"
        return [each._replace(key=each.key.removeprefix(within)) for each in self._outer.list(self._key(prefix))]

    def folders(self, prefix: str) -> tuple[str, ...]:
        """See `Bucket.folders`."""
        return self._outer.folders(self._key(prefix))

    def put(self, key: str, data: Any) -> None:
        """See `Bucket.put`."""
        self._outer.put(self._key(key), data)

    def create(self, key: str, data: bytes) -> None:
        """See `Bucket.create`."""
        self._outer.create(self._key(key), data)

    def upload(self, key: str, part_nbytes: int, in_flight: int) -> Upload:
        """See `Bucket.upload`."""
        return self._outer.upload(self._key(key), part_nbytes, in_flight)

    def delete(self, keys: Sequence[str]) -> None:
        """See `Bucket.delete`."""
        self._outer.delete([self._key(key) for key in keys])


def put_once(bucket: Bucket, key: str, data: bytes) -> None:
    """Put an object that nobody else puts with these bytes, where there is none. A lost answer is made up for by
    looking: what is there with our bytes is ours, whatever the store or the library said.

    Raises:
        Present: somebody else's is there.
        StoreFailed: nobody knows whether it is there, or will be.
        PermissionDenied, InvalidCheckpoint: it was refused.
    """
    problem: StoreFailed | None = None
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE_SECONDS * 2**attempt)
        try:
            bucket.create(key, data)
            return
        except Present:
            pass
        except StoreFailed as error:
            problem = error
        try:
            found = bucket.get(key)
        except Absent:
            continue  # ours did not come through; or a conflicting request was under way (409), and did not either
        except StoreFailed as error:
            problem = problem or error
            continue
        if found == data:
            return
        raise Present
    raise problem or StoreFailed(
        f"cannot write {bucket.where(key)}: the store says that it is there, and that it is not", errno=errno.EREMOTEIO
    )


class Upload:
    """An object that is put in parts, in parallel; it is there when it is closed, whole, or never."""

    def __init__(self, bucket: Bucket, key: str, writer: Any) -> None:
        self._bucket, self._key, self._writer = bucket, key, writer

    def write(self, piece: memoryview) -> None:
        """Hand over more of it, which must not change before the library has let go of the view. Waits while as many
        parts as may be are under way."""
        self._ask(self._writer.write, piece)

    def close(self) -> None:
        """Wait for the parts, and have the object appear."""
        self._ask(self._writer.close)

    def abort(self) -> None:
        """Have the store forget the parts."""
        self._ask(self._writer.__exit__, StoreFailed, None, None)

    def _ask(self, run: Callable[..., Any], *args: Any) -> None:
        doing = f"write {self._bucket.where(self._key)}"
        try:
            self._bucket._ask(doing, run, *args, again=False)
        except Absent as error:  # the store has forgotten the upload
            raise StoreFailed(f"cannot {doing}: the store knows nothing of the parts any more") from error
        except Present as error:
            raise StoreFailed(f"cannot {doing}: a conflicting request is under way") from error

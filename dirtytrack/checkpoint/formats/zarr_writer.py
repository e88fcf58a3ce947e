# SPDX-License-Identifier: MIT
"""A zarr array that is kept like an array in memory, by writing the chunks that have dirty bytes, and only those."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from ...dirtyset import DirtySet
from ...errors import InvalidMemory, StoreBusy, StoreFailed
from ...kernel import core, sets
from ..crew import Crew

if TYPE_CHECKING:
    from .chunking import Box

__all__ = ["Written", "ZarrWriter"]

_AT_ONCE = 10  # as many chunks as zarr itself has on the way


class Written(NamedTuple):
    """What `ZarrWriter.write` wrote."""

    written: int
    """How many objects of the store: chunks, or shards where the array has them."""
    of: int
    """How many the array has."""
    nbytes: int
    """Of the array, that is in what was written: whole chunks, before they are compressed."""


class ZarrWriter:
    """Keeps a zarr array like an array in memory: `write` turns what a `DirtyTracker` collected into the chunks that
    have dirty bytes, and has zarr write those.

    An object of the store is written whole. That is a chunk; of a sharded array it is a shard, of which zarr keeps the
    chunks that lie outside of the box around the dirty ones as they are. Chunks that run along the memory (whole inner
    axes, as `export_zarr` chooses them) are the fewest to write; ones that split the inner axes are right too: a dirty
    page then is in each chunk that has any byte of it.

    Nobody else may write to the zarr array. What the array has in the beginning is written by `write_all`, unless it is
    known to be in the zarr array already.

    Args:
        zarr_array: a ``zarr.Array``, open for writing; of any store, codecs and format that zarr-python 3 has.
        array: one of NumPy in C order, of that shape and type, all of which is tracked. It is held.
        threads: how many chunks are written at once.

    Raises:
        InvalidMemory: they do not fit each other, or the array is not contiguous, or cannot be written to.

    Thread safety: everything may be called from any thread; writes follow one another. A signal handler that interrupts
    one may not begin another.
    """

    def __init__(self, zarr_array: Any, array: Any, *, threads: int = _AT_ONCE) -> None:
        numpy = sys.modules.get("numpy")
        if numpy is None or not isinstance(array, numpy.ndarray):
            raise InvalidMemory(
                f"the array is one of NumPy, not {type(array).__name__}: np.frombuffer(memory, dtype), tensor.numpy()"
            )
        if not all(hasattr(zarr_array, name) for name in ("chunks", "shards", "read_only", "with_config")):
            raise InvalidMemory(f"zarr_array is a zarr.Array of zarr-python 3, not {type(zarr_array).__name__}")
        if not array.flags.c_contiguous:
            raise InvalidMemory("the array is not contiguous: pass the one that it is a view of")
        if zarr_array.read_only:
            raise InvalidMemory(f'the zarr array {zarr_array.store_path} is read-only: open it with mode="r+"')
        if type(threads) is not int or threads < 1:
            raise InvalidMemory(f"threads= is a whole number from 1 on, not {threads!r}")
        if zarr_array.dtype.newbyteorder("=") != array.dtype.newbyteorder("="):
            raise InvalidMemory(f"the array is of type {array.dtype}, the zarr array of {zarr_array.dtype}")
        core.load()
        self._zarr, self._array, self._threads = zarr_array, array, threads
        self._address, self._shape = array.__array_interface__["data"][0], array.shape
        self._chunks, self._shards = tuple(zarr_array.chunks), zarr_array.shards and tuple(zarr_array.shards)
        self._stored, self._fill = _exactly(zarr_array, array)
        self._lock = threading.RLock()
        self._require_same()

    def _require_same(self) -> None:
        """Neither has been resized."""
        shape = self._array.shape
        if tuple(self._zarr.shape) != shape:
            raise InvalidMemory(
                f"the array has the shape {shape}, the zarr array {tuple(self._zarr.shape)}: resize the other one too, "
                "then make a new ZarrWriter and write_all()"
            )
        if shape != self._shape or self._array.__array_interface__["data"][0] != self._address:
            raise InvalidMemory("the array was resized or moved: track it anew, make a new ZarrWriter and write_all()")

    def touched(self, dirty: DirtySet) -> Any:
        """Which chunks have dirty bytes: a grid of truth values, an array of NumPy.

        Args:
            dirty: a set that knows this array's memory, beside other memory or not.

        Raises:
            InvalidMemory: part of the array is in no region of this set, or it was resized.
        """
        import numpy as np

        from .chunking import touched

        if not isinstance(dirty, DirtySet):
            raise InvalidMemory(f"write() takes what collect() returned, not {type(dirty).__name__}")
        self._require_same()
        nbytes = self._array.nbytes
        if nbytes:
            dirty._layout.require(self._address, self._address + nbytes, "this array")
        runs = np.asarray(sets.offsets(dirty._set, self._address, nbytes)).astype(np.int64).reshape(-1, 2)
        return touched(runs, self._shape, self._chunks, self._array.itemsize)

    def write(self, dirty: DirtySet) -> Written:
        """Write the chunks that have dirty bytes, as they are in memory now.

        The array is read until this returns, chunk by chunk: each is copied, then encoded. Bytes that are written
        meanwhile may or may not be in it: they are dirty again, and in the next set. For a copy of one instant, nobody
        writes until this returns.

        Args:
            dirty: see `touched`.

        Raises:
            StoreFailed: zarr could not write a chunk. Others may be written, those that had been begun are. Put the set
                back (`DirtyTracker.put_back`), and all are in the next one.
            InvalidMemory: part of the array is in no region of this set, or one of both was resized; nothing was
                written.
            StoreBusy: called by a signal handler within another call.
        """
        from .chunking import boxes

        with self._alone():
            return self._put([*boxes(self.touched(dirty), self._shape, self._chunks, self._shards)])

    def write_all(self) -> Written:
        """Write all chunks: for the beginning, after the tracker was started. Raises as `write` does."""
        import numpy as np

        from .chunking import boxes, grid_of

        with self._alone():
            self._require_same()
            every = np.ones(grid_of(self._shape, self._chunks), np.bool_)
            return self._put([*boxes(every, self._shape, self._chunks, self._shards)])

    def _alone(self) -> threading.RLock:
        if self._lock._is_owned():  # type: ignore[attr-defined]
            raise StoreBusy("a ZarrWriter was called while this thread is in another call of it, by a signal handler")
        return self._lock

    def _put(self, parts: list[Box]) -> Written:
        from .chunking import grid_of

        number = 1
        for count in grid_of(self._shape, self._shards or self._chunks):
            number *= count
        done = 0
        try:
            with Crew(min(self._threads, len(parts) or 1)) as crew:
                nbytes = 0
                for part in crew.map(self._put_one, parts):
                    done, nbytes = done + 1, nbytes + part
        except Exception as error:
            raise StoreFailed(
                f"zarr could not write to {self._zarr.store_path}: {error}. Of {len(parts)} chunks at least {done} "
                "were written: put the dirty set back, and all of them are in the next one",
                errno=getattr(error, "errno", None),
            ) from error
        return Written(done, number, nbytes)

    def _put_one(self, part: Box) -> int:
        data = part.of(self._array).copy()  # what a codec works on must not change beneath it, whoever writes meanwhile
        alike = self._stored is None or data.tobytes() == self._fill * data.size
        (self._zarr if alike else self._stored)[part.slices] = data
        return int(data.nbytes)


def _exactly(zarr_array: Any, array: Any) -> tuple[Any, bytes]:
    """Where zarr would take other bytes for its fill value's, and leave the chunk out: the array with which it leaves
    none out, and those bytes. It takes any NaN for another, and among complex numbers -0 for 0."""
    import numpy as np

    if zarr_array.fill_value is None or zarr_array.config.write_empty_chunks:
        return None, b""
    fill = np.asarray(zarr_array.fill_value).astype(array.dtype)
    if array.dtype.kind == "c" or (array.dtype.kind == "f" and bool(fill != 0)):
        return zarr_array.with_config({"write_empty_chunks": True}), fill.tobytes()
    return None, b""

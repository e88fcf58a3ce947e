# SPDX-License-Identifier: MIT
"""A generation as a group of zarr arrays."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ...errors import DirtyTrackError, InvalidCheckpoint, StoreFailed, UnsupportedKernel
from ...kernel.packing import all_zero
from ..buffers import numpy_dtype
from ..crew import Crew
from ..reading import reading_threads, target_of
from .exporting import (
    Reading,
    appearing,
    failed,
    generation_of,
    imported,
    of_a_whole_revision,
    require_options,
    require_representable,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from ..joining import AnyGeneration
    from ..manifests import Manifest, RegionEntry
    from ..protocols import Store
    from .chunking import Box, Slab

__all__ = ["export_zarr", "node_name", "zarr_package"]

_KINDS = {"b": (1,), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "f": (2, 4, 8), "c": (8, 16), "M": (8,), "m": (8,)}
"""The kinds of NumPy's types that zarr has in a specification, and their sizes."""
_AT_ONCE = 10  # as many chunks as zarr itself has on the way


def export_zarr(
    store: Store | str | os.PathLike[str],
    target: Any,
    generation: int | None = None,
    *,
    names: Collection[str] | None = None,
    as_bytes: bool = False,
    chunk_bytes: int | None = None,
    chunks: Mapping[str, Sequence[int]] | None = None,
    shards: Mapping[str, Sequence[int]] | None = None,
    compressors: Any = "auto",
    decrypt: Callable[[bytes], bytes] | None = None,
    memory_bytes: int = 128 << 20,
    threads: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Manifest:
    """Write a generation as a zarr group (format 3), one array for each buffer.

    Arrays have the buffers' types and shapes; buffers of which those are not known are bytes. The group's attributes
    have ``meta``, and under ``dirtytrack`` which generation it is and the arrays' names by buffer: they come last, so
    that a group without them is not whole. Chunks of nothing but zeros are left out, as zarr does.

    Every byte that is read is checked. It goes piece by piece, in bounded memory, and works where the kernel cannot
    track.

    Args:
        store: of checkpoints, or its path.
        target: the path of a folder, which is not there yet or empty, and appears when all is in it and durable. Or a
            store of the package zarr, which must be empty: what was written to it is removed where anything fails, but
            a process that is killed leaves a group without those attributes.
        generation: which; the newest where it is left out.
        names: of the buffers to export; all where left out.
        as_bytes: write buffers of types that zarr does not have (with fields, bfloat16, text, …) as bytes.
        chunk_bytes: of a chunk, at most. Left out: a 1024th of the buffer, from 1 to 64 MiB, and a quarter of
            ``memory_bytes``. Each chunk is one piece of the memory.
        chunks: shapes of chunks by buffer, instead.
        shards: shapes of shards by buffer, each a multiple of the chunks'; none where left out.
        compressors: as ``zarr.create_array`` takes them.
        decrypt, threads: as with `restore`.
        memory_bytes: how much memory it takes, about; at least 8 MiB.
        progress: called with the bytes of buffers that are done and those that there are; what it raises ends it.

    Returns:
        The generation's manifest.

    Raises:
        NoSuchGeneration, DamagedCheckpoint: it is not there, or not as it was written.
        InvalidCheckpoint: the target holds something; a buffer's type is none of zarr's; no such buffer; chunks that
            make no sense, or of which one does not fit into ``memory_bytes``; it is encrypted.
        UnsupportedKernel: zarr is not installed, or is older than 3.1.
        PermissionDenied, StoreFailed: something cannot be read or written.

    Thread safety: may be called from any thread, beside a `Checkpointer` too.
    """
    require_options(names, memory_bytes, threads)
    if chunk_bytes is not None and (type(chunk_bytes) is not int or chunk_bytes < 1):
        raise InvalidCheckpoint(f"chunk_bytes= is a number of bytes from 1 on, not {chunk_bytes!r}")
    zarr = zarr_package()

    def export(opened: Store, manifest: Manifest) -> None:
        with closing(generation_of(opened, manifest, names, decrypt)) as found:
            layouts = _layouts(found, as_bytes, chunk_bytes, chunks or {}, shards or {}, memory_bytes)
            with _group(zarr, target) as group, Crew(reading_threads() if threads is None else threads) as crew:
                reading = Reading(found, crew, memory_bytes // 4, progress)
                for layout in layouts:
                    array = layout.created(zarr, group, compressors)
                    _write(array, layout, reading, memory_bytes // 4)
                group.update_attributes(_attributes(found, layouts))

    return of_a_whole_revision(store, generation, export)


def zarr_package() -> Any:
    """The package zarr.

    Raises:
        UnsupportedKernel: it is not there, or too old.
    """
    zarr = imported("zarr", "zarr")
    version = tuple(int(part) for part in zarr.__version__.split(".")[:2] if part.isdecimal())
    if version < (3, 1):
        raise UnsupportedKernel(
            f"the package zarr is of version {zarr.__version__}, and 3.1 or newer is needed (which needs Python 3.11): "
            'pip install "dirtytrack[zarr]"',
            feature="zarr",
        )
    return zarr


@contextmanager
def _group(zarr: Any, target: Any) -> Iterator[Any]:
    """A group at the root of what is to be, of which nothing is left where anything fails."""
    if isinstance(target, (str, os.PathLike)):
        with appearing(target) as folder:
            yield zarr.create_group(zarr.storage.LocalStore(folder), zarr_format=3)
    else:
        with _emptied(zarr, target):
            yield zarr.create_group(target, zarr_format=3)


@contextmanager
def _emptied(zarr: Any, store: Any) -> Iterator[None]:
    """A store of zarr's, which is empty, and is again where anything fails."""
    if not isinstance(store, zarr.abc.store.Store):
        raise InvalidCheckpoint(f"a target is a path or a store of the package zarr, not {store!r}")
    sync = imported("zarr.core.sync", "zarr").sync  # what zarr's own calls wait by
    if store.read_only:
        raise InvalidCheckpoint(f"{store} is read-only: open it for writing")
    if not store.supports_deletes:
        raise InvalidCheckpoint(f"nothing can be removed from {store}, which a failed export must be: export to a path")
    try:
        if not sync(store.is_empty("")):
            raise InvalidCheckpoint(f"{store} holds something already, and nothing is overwritten: pass an empty store")
        try:
            yield
        except BaseException:
            with suppress(Exception):
                sync(store.clear())  # it was empty: all of it is ours
            raise
    except DirtyTrackError:
        raise
    except OSError as error:
        raise failed(error, str(store)) from error


# ---- how each buffer is laid out


class _Layout:
    """A buffer as an array of zarr's."""

    def __init__(self, region: RegionEntry, dtype: Any, shape: tuple[int, ...]) -> None:
        self.region, self.dtype, self.shape = region, dtype, shape
        self.node = node_name(region)
        self.chunks: tuple[int, ...] = ()
        self.shards: tuple[int, ...] | None = None

    @property
    def written(self) -> tuple[int, ...]:
        """The shape of what is written at once: a chunk, or a shard."""
        return self.shards or self.chunks

    @property
    def written_nbytes(self) -> int:
        """Of it."""
        return math.prod(self.written) * int(self.dtype.itemsize)

    def created(self, zarr: Any, group: Any, compressors: Any) -> Any:
        """The array, without any chunk yet."""
        import numpy as np

        serializer: Any = "auto"
        if self.dtype.itemsize > 1:  # bytes are as they are in the buffer
            serializer = zarr.codecs.BytesCodec(endian="big" if self.dtype.str[0] == ">" else "little")
        return group.create_array(
            self.node,
            shape=self.shape,
            dtype=self.dtype,
            chunks=self.chunks,
            shards=self.shards,
            compressors=compressors,
            serializer=serializer,
            fill_value=np.zeros((), self.dtype)[()],
            attributes={"dirtytrack": self.told()},
            config={"write_empty_chunks": True},  # which are empty is known here, by their bytes
        )

    def told(self) -> dict[str, Any]:
        """What the attributes say of it."""
        region = self.region
        return {"name": region.name, "dtype": region.dtype, "shape": None if region.shape is None else [*region.shape]}


def _has(dtype: Any) -> bool:
    """Whether a specification of zarr's has a type of NumPy, which is NumPy's own."""
    return dtype.isbuiltin != 2 and dtype.itemsize in _KINDS.get(dtype.kind, ())


def _layouts(
    found: AnyGeneration,
    as_bytes: bool,
    chunk_bytes: int | None,
    chunks: Mapping[str, Sequence[int]],
    shards: Mapping[str, Sequence[int]],
    memory_bytes: int,
) -> list[_Layout]:
    """How all buffers are laid out.

    Raises:
        InvalidCheckpoint: one cannot be.
    """
    import numpy as np

    from .chunking import MOST_CHUNK_NBYTES, chosen, slabs

    most_nbytes = min(MOST_CHUNK_NBYTES, memory_bytes // 4)
    layouts: list[_Layout] = []
    unknown: list[RegionEntry] = []
    for region in found.regions:
        dtype = None if region.dtype is None else numpy_dtype(region.dtype)
        if dtype is not None and _has(dtype) and region.nbytes % dtype.itemsize == 0:
            whole = (region.nbytes // dtype.itemsize,)
            fits = region.shape is not None and math.prod(region.shape) == whole[0]
            layouts.append(_Layout(region, dtype, region.shape if fits and region.shape is not None else whole))
            continue
        if region.dtype is not None:
            unknown.append(region)
        layouts.append(_Layout(region, np.dtype(np.uint8), (region.nbytes,)))
    if not as_bytes:
        require_representable(unknown, "zarr")
    by_name = {layout.region.name: layout for layout in layouts}
    for what, given in (("chunks", chunks), ("shards", shards)):
        for name, shape in given.items():
            if name not in by_name:
                raise InvalidCheckpoint(f"{what}= has a shape for {name!r}, which is no buffer that is exported")
            _require_shape(what, name, shape, by_name[name].shape)
    for layout in layouts:
        name = layout.region.name
        itemsize = int(layout.dtype.itemsize)
        layout.chunks = (
            tuple(chunks[name])
            if name in chunks
            else chosen(layout.shape, itemsize, chunk_bytes, most_nbytes=most_nbytes)
        )
        layout.shards = tuple(shards[name]) if name in shards else None
        if layout.shards is not None and any(
            shard % chunk for shard, chunk in zip(layout.shards, layout.chunks, strict=True)
        ):
            raise InvalidCheckpoint(
                f"a shard of {name!r} holds whole chunks: {layout.shards} is no multiple of {layout.chunks}"
            )
        slab = next(slabs(layout.shape, layout.written, itemsize))
        needed = 4 * max(slab.nbytes, layout.written_nbytes)
        if needed > memory_bytes:
            raise InvalidCheckpoint(
                f"chunks of the shape {layout.written} of {name!r} are written from {slab.nbytes} bytes of it at once: "
                f"pass memory_bytes={needed} at least, or chunks that are shorter along the first axis"
            )
    return layouts


def _require_shape(what: str, name: str, shape: Any, of: tuple[int, ...]) -> None:
    try:
        whole = len(shape) == len(of) and all(type(length) is int and length > 0 for length in shape)
    except TypeError:
        whole = False
    if not whole:
        raise InvalidCheckpoint(
            f"{what}= of {name!r} is {len(of)} numbers from 1 on, as its shape {of} is, not {shape!r}"
        )


def node_name(region: RegionEntry) -> str:
    """What a buffer's array is called in its group: its name, with ``%XX`` for what zarr or a file system has a meaning
    for, or no room."""
    stem = quote(region.name, safe=" []()+,=@", errors="surrogatepass")
    if stem.startswith((".", "__", "zarr.json")):
        stem = f"%{ord(stem[0]):02X}{stem[1:]}"
    return f"{stem[:180]}%-{region.number}" if len(stem) > 200 else stem


# ---- writing


def _write(array: Any, layout: _Layout, reading: Reading, memory_bytes: int) -> None:
    """All chunks of a buffer but those that are nothing but zeros."""
    import numpy as np

    from .chunking import slabs

    region = layout.region
    room = target_of(bytearray(min(region.nbytes, memory_bytes)))
    assert room.view is not None, "it is a bytearray"

    def put(job: tuple[int, Box, Box]) -> None:
        offset, slab, box = job
        data = np.ndarray(slab.shape, layout.dtype, buffer=room.view, offset=offset)
        part = box.of(data, slab.begin)
        if not all_zero(np.ascontiguousarray(part).reshape(-1).view(np.uint8)):
            _set(array, box, part)

    # Each chunk that is on its way takes as much again, about twice: as it is encoded, and compressed.
    with Crew(max(1, min(_AT_ONCE, memory_bytes // (2 * layout.written_nbytes)))) as writers:
        for some in _batches(slabs(layout.shape, layout.written, layout.dtype.itemsize), room.nbytes):
            low, nbytes = some[0].low, sum(slab.nbytes for slab in some)
            if reading.read(region, low, room.first(nbytes)):
                jobs = ((slab.low - low, slab.box, box) for slab in some for box in slab.boxes(layout.written))
                for _ in writers.map(put, jobs):
                    pass
            reading.count(nbytes)


def _batches(pieces: Iterator[Slab], most_nbytes: int) -> Iterator[list[Slab]]:
    """Slabs that follow one another, as many as there is room for."""
    some: list[Slab] = []
    nbytes = 0
    for slab in pieces:
        if some and nbytes + slab.nbytes > most_nbytes:
            yield some
            some, nbytes = [], 0
        some.append(slab)
        nbytes += slab.nbytes
    yield some


def _set(array: Any, box: Box, data: Any) -> None:
    try:
        array[box.slices] = data
    except OSError:
        raise
    except Exception as error:  # of a store that is not of files, or of a codec
        raise StoreFailed(f"zarr could not write {box.slices} of {array.store_path}: {error}") from error


def _attributes(found: AnyGeneration, layouts: list[_Layout]) -> dict[str, Any]:
    manifest = found.manifest
    told = {
        "generation": manifest.generation,
        "parent": manifest.parent,
        "created": manifest.created,
        "store": manifest.store_id,
        "arrays": {layout.region.name: layout.node for layout in layouts},
    }
    return {"meta": manifest.meta, "dirtytrack": told}

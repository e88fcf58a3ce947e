# SPDX-License-Identifier: MIT
"""A generation as a checkpoint of ``torch.distributed.checkpoint``."""

from __future__ import annotations

import io
import math
import warnings
from contextlib import closing
from typing import TYPE_CHECKING, Any

from ...errors import InvalidCheckpoint, StoreFailed
from ..buffers import torch_dtype
from ..crew import Crew
from ..reading import reading_threads, target_of
from .exporting import (
    Reading,
    appearing,
    generation_of,
    imported,
    of_a_whole_revision,
    require_options,
    require_representable,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Collection, Iterator
    from pathlib import Path

    from ..joining import AnyGeneration
    from ..manifests import Manifest, RegionEntry
    from ..protocols import Store

__all__ = ["export_dcp"]

_MOST_CHUNK_NBYTES = 64 << 20
_TOLD = "dirtytrack"


def export_dcp(
    store: Store | str | os.PathLike[str],
    target: str | os.PathLike[str],
    generation: int | None = None,
    *,
    names: Collection[str] | None = None,
    as_bytes: bool = False,
    decrypt: Callable[[bytes], bytes] | None = None,
    memory_bytes: int = 128 << 20,
    threads: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Manifest:
    """Write a generation for ``torch.distributed.checkpoint.load``: a tensor for each buffer, under its name.

    Tensors have the buffers' types and shapes; buffers of which those are not known are bytes (``torch.uint8``). Beside
    them, under ``dirtytrack``, is a dict: ``meta``, which generation it is, and the buffers' own types and shapes.
    Large tensors are cut into several chunks, as those are that several ranks saved; who loads does not notice.

    Every byte that is read is checked. It goes piece by piece, in bounded memory, and works where the kernel cannot
    track.

    Args:
        store: of checkpoints, or its path.
        target: the path of a folder, which is not there yet or empty, and appears when all is in it and durable.
        generation: which; the newest where it is left out.
        names: of the buffers to export; all where left out.
        as_bytes: write buffers of types that PyTorch does not have (with fields, text, dates, of the other byte order)
            as bytes.
        decrypt, threads: as with `restore`.
        memory_bytes: how much memory it takes, about, beside PyTorch itself; at least 8 MiB.
        progress: called with the bytes of buffers that are done and those that there are; what it raises ends it.

    Returns:
        The generation's manifest.

    Raises:
        NoSuchGeneration, DamagedCheckpoint: it is not there, or not as it was written.
        InvalidCheckpoint: the target holds something; a buffer's type is none of PyTorch's; no such buffer, or one that
            is called ``dirtytrack``; it is encrypted.
        UnsupportedKernel: PyTorch is not installed.
        PermissionDenied, StoreFailed: something cannot be read or written.

    Thread safety: may be called from any thread, beside a `Checkpointer` too.
    """
    require_options(names, memory_bytes, threads)
    torch = imported("torch", "torch")
    saving = imported("torch.distributed.checkpoint", "torch")

    def export(opened: Store, manifest: Manifest) -> None:
        with closing(generation_of(opened, manifest, names, decrypt)) as found:
            tensors = _tensors(torch, found, as_bytes)
            with appearing(target) as folder, Crew(reading_threads() if threads is None else threads) as crew:
                reading = Reading(found, crew, memory_bytes // 4, progress)
                planner = _planner(torch, tensors, _told(found), reading, min(_MOST_CHUNK_NBYTES, memory_bytes // 4))
                _save(saving, folder, planner)

    return of_a_whole_revision(store, generation, export)


def _save(saving: Any, folder: Path, planner: Any) -> None:
    writer = saving.FileSystemWriter(folder, thread_count=1, sync_files=False)  # all is made durable at the end
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process only
        try:
            saving.save({}, storage_writer=writer, planner=planner, no_dist=True)
        except BaseException as error:  # DCP wraps whatever it is, an interrupt too
            if planner.problem is not None:
                raise planner.problem from None
            cause = _cause(error, folder)
            if cause is error:
                raise
            raise cause from error


def _cause(error: BaseException, folder: Path) -> BaseException:
    """What went wrong when DCP wrote, out of what it makes of that."""
    failures = getattr(error, "failures", {})  # by rank, with their tracebacks
    causes = [each[0] for each in failures.values()] or [error]
    for each in causes:
        if isinstance(each, OSError) or not isinstance(each, Exception):
            return each
    return StoreFailed(f"torch.distributed.checkpoint could not write to {folder}: {causes[0]}")


class _Tensor:
    """A buffer as a tensor."""

    def __init__(self, region: RegionEntry, dtype: Any, shape: tuple[int, ...]) -> None:
        self.region, self.dtype, self.shape = region, dtype, shape

    def pieces(self, most_nbytes: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int, int]]:
        """Parts that each are one piece of the memory: where they begin, their shapes, offset in bytes, length."""
        from .chunking import chosen, slabs

        itemsize = int(self.dtype.itemsize)
        if not self.shape:
            yield (), (), 0, itemsize
            return
        for slab in slabs(self.shape, chosen(self.shape, itemsize, most_nbytes), itemsize):
            yield slab.box.begin, slab.box.shape, slab.low, slab.nbytes


def _tensors(torch: Any, found: AnyGeneration, as_bytes: bool) -> dict[str, _Tensor]:
    tensors: dict[str, _Tensor] = {}
    unknown: list[RegionEntry] = []
    for region in found.regions:
        if region.name == _TOLD:
            raise InvalidCheckpoint(
                f"a buffer is called {_TOLD!r}, which is where the export tells about itself: pass names= without it"
            )
        dtype = None if region.dtype is None else torch_dtype(torch, region.dtype)
        if dtype is not None and region.nbytes % dtype.itemsize == 0:
            whole = (region.nbytes // dtype.itemsize,)
            fits = region.shape is not None and math.prod(region.shape) == whole[0]
            tensors[region.name] = _Tensor(region, dtype, region.shape if fits and region.shape is not None else whole)
            continue
        if region.dtype is not None:
            unknown.append(region)
        tensors[region.name] = _Tensor(region, torch.uint8, (region.nbytes,))
    if not as_bytes:
        require_representable(unknown, "PyTorch")
    return tensors


def _told(found: AnyGeneration) -> dict[str, Any]:
    manifest = found.manifest
    return {
        "meta": manifest.meta,
        "generation": manifest.generation,
        "parent": manifest.parent,
        "created": manifest.created,
        "store": manifest.store_id,
        "buffers": {
            region.name: {"dtype": region.dtype, "shape": None if region.shape is None else [*region.shape]}
            for region in found.regions
        },
    }


def _planner(torch: Any, tensors: dict[str, _Tensor], told: dict[str, Any], reading: Reading, most_nbytes: int) -> Any:
    """What tells DCP which tensors there are, and gives it their bytes when it writes them."""
    planning = imported("torch.distributed.checkpoint.planner", "torch")
    metadata = imported("torch.distributed.checkpoint.metadata", "torch")
    default = imported("torch.distributed.checkpoint.default_planner", "torch")
    offsets = dict[tuple[str, tuple[int, ...]], int]()

    class Planner(default.DefaultSavePlanner):  # type: ignore[misc,name-defined]
        problem: BaseException | None = None
        """What went wrong in here."""

        def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
            self.is_coordinator = is_coordinator
            self.state_dict: dict[str, Any] = {}
            self.mappings = {name: (name,) for name in (*tensors, _TOLD)}

        def create_local_plan(self) -> Any:
            items = [planning.WriteItem(metadata.MetadataIndex(_TOLD), planning.WriteItemType.BYTE_IO)]
            for name, tensor in tensors.items():
                properties = metadata.TensorProperties(dtype=tensor.dtype)
                for begin, shape, low, _ in tensor.pieces(most_nbytes):
                    offsets[name, begin] = low
                    chunk = metadata.ChunkStorageMetadata(torch.Size(begin), torch.Size(shape))
                    data = planning.TensorWriteData(chunk, properties, torch.Size(tensor.shape))
                    index = metadata.MetadataIndex(name, torch.Size(begin))
                    items.append(planning.WriteItem(index, planning.WriteItemType.SHARD, tensor_data=data))
            self.plan = planning.SavePlan(items, planner_data=self.mappings)
            return self.plan

        def resolve_data(self, write_item: Any) -> Any:
            try:
                return self.resolved(write_item)
            except BaseException as error:
                self.problem = error
                raise

        @staticmethod
        def resolved(write_item: Any) -> Any:
            name = write_item.index.fqn
            if name == _TOLD:
                data = io.BytesIO()
                torch.save(told, data)
                return data
            tensor, sizes = tensors[name], write_item.tensor_data.chunk.sizes
            room = bytearray(math.prod(sizes) * tensor.dtype.itemsize)
            low = offsets[name, tuple(write_item.index.offset)]
            reading.read(tensor.region, low, target_of(room, fresh=True))
            reading.count(len(room))
            return torch.frombuffer(room, dtype=tensor.dtype).reshape(sizes)

    return Planner()

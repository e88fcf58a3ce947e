# SPDX-License-Identifier: MIT
"""`dirtytrack ckpt restore`: the buffers of a generation as files, which any program can read."""

from __future__ import annotations

import io
import json
import math
import mmap
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ..checkpoint import restore as restored
from ..checkpoint.buffers import array_of
from ..checkpoint.store import open_store
from ..errors import DamagedCheckpoint, DirtyTrackError, InvalidCheckpoint, KernelRefused, PermissionDenied
from ..observe.units import show_bytes
from .ckpt_told import progress

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from ..checkpoint import Store
    from ..checkpoint.manifests import Manifest, RegionEntry

__all__ = ["restore"]

_AT_ONCE = 200  # each is a mapped file, whose descriptor stays open
_TOLD = "checkpoint.json"


def restore(args: argparse.Namespace) -> int:
    """Write the buffers of a generation into a folder, which is there when all of them are.

    Raises:
        InvalidCheckpoint: the folder holds something, or the generation has no such buffer.
        PermissionDenied, KernelRefused: a file cannot be written.
        DamagedCheckpoint, NoSuchGeneration, StoreFailed: as `dirtytrack.checkpoint.restore`.
    """
    folder = Path(args.output)
    beside = folder.parent / f".{folder.name}.{os.getpid()}.new"
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InvalidCheckpoint(f"{folder} is not empty: restore to a folder that is, or that is not there yet")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open_store(args.store) as store, store.reading():
            try:
                told = _written(store, args.generation, args, beside)
            except DamagedCheckpoint as error:
                if not args.fallback or error.whole is None:
                    raise
                print(f"dirtytrack: {error}", file=sys.stderr)
                told = _written(store, error.whole, args, beside)
        beside.rename(folder)
    except OSError as error:
        if isinstance(error, DirtyTrackError):
            raise
        kind = PermissionDenied if isinstance(error, PermissionError) else KernelRefused
        raise kind(f"{error.filename or folder} cannot be written: {error.strerror}", errno=error.errno) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    if args.json:
        print(json.dumps(told, indent=2))
    else:
        nbytes = sum(each["nbytes"] for each in told["buffers"])
        print(f"generation {told['generation']}: {len(told['buffers'])} buffers, {show_bytes(nbytes)}, in {folder}")
    return 0


def _written(store: Store, generation: int | None, args: argparse.Namespace, beside: Path) -> dict[str, Any]:
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(mode=0o700)
    try:
        manifest = store.manifest(generation)
    except DamagedCheckpoint:
        restored(store, generation=generation)  # which says what else is whole
        raise
    regions = _chosen(manifest, args.name)
    files = [_file(region) for region in regions]
    done, total = 0, sum(region.nbytes for region in regions)
    with progress("restoring") as tell:
        for first in range(0, len(regions), _AT_ONCE):
            some = regions[first : first + _AT_ONCE]
            share = sum(region.nbytes for region in some)

            def told(stored: int, of: int, done: int = done, share: int = share) -> None:
                if tell is not None:
                    tell(done + int(share * stored / max(of, 1)), total)

            mapped = [
                (_mapped(beside / name, header, region.nbytes), len(header), region)
                for region, (name, header) in zip(some, files[first:], strict=False)
            ]
            into = {region.name: memoryview(file)[skip : skip + region.nbytes] for file, skip, region in mapped}
            restored(store, generation=manifest.generation, into=into, decrypt=args.decrypt, progress=told)
            for file, _, _ in mapped:
                file.flush()
            done += share
    document = {
        "generation": manifest.generation,
        "parent": manifest.parent,
        "created": manifest.created,
        "meta": manifest.meta,
        "buffers": [
            {
                "name": region.name,
                "file": name,
                "nbytes": region.nbytes,
                "dtype": region.dtype,
                "shape": region.shape,
            }
            for region, (name, _) in zip(regions, files, strict=True)
        ],
    }
    (beside / _TOLD).touch(mode=0o600)
    (beside / _TOLD).write_text(json.dumps(document, indent=2), encoding="utf-8")
    return document


def _chosen(manifest: Manifest, names: Sequence[str] | None) -> list[RegionEntry]:
    known = {region.name: region for region in manifest.regions}
    for name in names or ():
        if name not in known:
            there = ", ".join(map(repr, known))
            raise InvalidCheckpoint(f"generation {manifest.generation} has no buffer {name!r}; it has {there}")
    return [region for region in manifest.regions if names is None or region.name in names]


def _mapped(path: Path, header: bytes, nbytes: int) -> mmap.mmap:
    """A new file with that header, and so many bytes behind it, for which there is room on the disk."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.pwrite(file, header, 0)
        os.posix_fallocate(file, 0, len(header) + nbytes)  # a full disk is an error now, and no signal later
        return mmap.mmap(file, len(header) + nbytes)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(file)


def _file(region: RegionEntry) -> tuple[str, bytes]:
    """The name of its file, and what that begins with."""
    header = _header(region)
    stem = quote(region.name, safe=" ", errors="surrogatepass")  # no slash, nothing that is not printable
    if len(stem) > 200:
        stem = f"{stem[:180]}-{region.number}"
    return stem + (".npy" if header else ".bin"), header


def _header(region: RegionEntry) -> bytes:
    """Of a file of NumPy; none where NumPy does not know the type, or is not there."""
    if region.dtype is None or region.shape is None:
        return b""
    try:
        from numpy.lib import format as npy
    except ImportError:
        return b""
    itemsize = region.nbytes // math.prod(region.shape)
    probe: Any = array_of(bytearray(itemsize), region.dtype, (1,))
    with suppress(TypeError):  # a type that only PyTorch has
        probe = probe.numpy() if hasattr(probe, "numpy") else probe
        dtype = probe.dtype
        if dtype.itemsize == itemsize and not (dtype.kind == "V" and dtype.fields is None):
            head = io.BytesIO()
            described = {
                "descr": npy.dtype_to_descr(dtype),
                "fortran_order": False,
                "shape": region.shape,
            }
            npy.write_array_header_2_0(head, described)
            return head.getvalue()
    return b""

# SPDX-License-Identifier: MIT
"""`dirtytrack ckpt export`: a generation in a format of other programs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from ..checkpoint import export_dcp, export_zarr
from ..observe.units import show_bytes
from .ckpt_told import progress

if TYPE_CHECKING:
    import argparse

__all__ = ["export"]


def export(args: argparse.Namespace) -> int:
    """Write a generation to a path."""
    if args.chunk is not None and args.to != "zarr":
        args.refuse("--chunk is for --to zarr")
    with progress("exporting") as tell:
        if args.to == "zarr":
            manifest = export_zarr(
                args.store,
                args.path,
                args.generation,
                names=args.name,
                as_bytes=args.as_bytes,
                chunk_bytes=args.chunk,
                decrypt=args.decrypt,
                memory_bytes=args.memory,
                progress=tell,
            )
        else:
            manifest = export_dcp(
                args.store,
                args.path,
                args.generation,
                names=args.name,
                as_bytes=args.as_bytes,
                decrypt=args.decrypt,
                memory_bytes=args.memory,
                progress=tell,
            )
    regions = [region for region in manifest.regions if args.name is None or region.name in args.name]
    nbytes = sum(region.nbytes for region in regions)
    if args.json:
        told = {
            "generation": manifest.generation,
            "format": args.to,
            "path": args.path,
            "nbytes": nbytes,
            "buffers": [region.name for region in regions],
        }
        print(json.dumps(told, indent=2))
    else:
        what = f"{len(regions)} buffers, {show_bytes(nbytes)}"
        print(f"generation {manifest.generation}: {what}, in {args.path} ({args.to})")
    return 0

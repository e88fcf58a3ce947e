# SPDX-License-Identifier: MIT
"""Checkpoints in other formats: a generation as zarr or for PyTorch; a zarr array kept up to date by dirty chunks."""

from .to_dcp import export_dcp
from .to_zarr import export_zarr
from .zarr_writer import Written, ZarrWriter

__all__ = ["Written", "ZarrWriter", "export_dcp", "export_zarr"]

# SPDX-License-Identifier: MIT
"""Checkpoints in object stores, through the package obstore; the protocol is in docs/object-stores.md."""

from .store import ObjectStore

__all__ = ["ObjectStore"]

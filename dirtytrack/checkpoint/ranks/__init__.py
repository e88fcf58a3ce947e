# SPDX-License-Identifier: MIT
"""Checkpoints of many ranks together, on MPI or on PyTorch's process groups."""

from .communicators import Communicator
from .coordinating import Coordinated, PartOptions, coordinated
from .sharing import restore_share

__all__ = ["Communicator", "Coordinated", "PartOptions", "coordinated", "restore_share"]

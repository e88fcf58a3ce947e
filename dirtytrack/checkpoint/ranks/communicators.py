# SPDX-License-Identifier: MIT
"""How ranks talk to one another: what is needed of it, on MPI and on PyTorch's process groups.

What is said is little, a few hundred bytes a rank and save, and never the bytes of a buffer.
"""

from __future__ import annotations

import sys
import time
from array import array
from contextlib import suppress
from datetime import timedelta
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from ...errors import InvalidCheckpoint, UnsupportedKernel

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Communicator", "MpiCommunicator", "TorchCommunicator", "all_gathered", "communicator_of"]

_FIRST_LOOK_SECONDS, _LAST_LOOK_SECONDS = 20e-6, 2e-3
_LENGTH_NBYTES = 8
_PATIENCE = timedelta(days=1)  # a rank may come to a save long after the others; one that is gone is noticed sooner


class Communicator(Protocol):
    """What ranks talk by. All of them call the same methods in the same order, from one thread at a time.

    Whoever implements it raises whatever he likes when ranks are lost: nothing is asked of it after that.
    """

    @property
    def rank(self) -> int:
        """Which this one is, from 0 on."""

    @property
    def size(self) -> int:
        """How many there are."""

    @property
    def background(self) -> bool:
        """Whether a thread may talk by this while the program talks by whatever else it has. Where that is not so,
        `Coordinated.save` returns only when all ranks have saved, and the program must not talk meanwhile."""

    def gather(self, data: bytes) -> list[bytes] | None:
        """What each rank gave, by rank, at rank 0; None elsewhere."""

    def broadcast(self, data: bytes) -> bytes:
        """What rank 0 gave, at each."""

    def close(self) -> None:
        """Let go of it; all ranks do."""


def all_gathered(comm: Communicator, data: bytes) -> list[bytes]:
    """What each rank gave, by rank, at each."""
    found = comm.gather(data)
    joined = b"" if found is None else b"".join(len(each).to_bytes(_LENGTH_NBYTES, "little") + each for each in found)
    rest, parts = memoryview(comm.broadcast(joined)), list[bytes]()
    while rest:
        end = _LENGTH_NBYTES + int.from_bytes(rest[:_LENGTH_NBYTES], "little")
        parts.append(bytes(rest[_LENGTH_NBYTES:end]))
        rest = rest[end:]
    return parts


def communicator_of(comm: Any) -> Communicator:
    """What ranks talk by, of whatever kind: a duplicate that nobody else uses, where it is MPI's or PyTorch's. All
    ranks call this.

    Args:
        comm: an intracommunicator of mpi4py, a process group of ``torch.distributed``, or a `Communicator`, which is
            used as it is.

    Raises:
        InvalidCheckpoint: it is none of these.
        UnsupportedKernel: MPI was initialised so that threads may not use it.
    """
    if _is_of(comm, "mpi4py.MPI", "Comm"):
        return MpiCommunicator(comm)
    if _is_of(comm, "torch.distributed", "ProcessGroup"):
        return TorchCommunicator(comm)
    if all(callable(getattr(comm, name, None)) for name in ("gather", "broadcast", "close")) and all(
        type(getattr(comm, name, None)) is int for name in ("rank", "size")
    ):
        found: Communicator = comm
        if not 0 <= found.rank < found.size:
            raise InvalidCheckpoint(f"a communicator of {found.size} ranks cannot be rank {found.rank}")
        return found
    raise InvalidCheckpoint(
        f"ranks talk by a communicator of mpi4py, as MPI.COMM_WORLD, by a process group of torch.distributed, as "
        f"torch.distributed.group.WORLD, or by an object with the methods of Communicator; not by {comm!r:.200}"
    )


def _is_of(comm: Any, module: str, name: str) -> bool:
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(comm, kind)


# ---- MPI


class MpiCommunicator:
    """A duplicate of a communicator of mpi4py, so that what is said here meets nothing that the program says.

    Waiting is by looking now and then, not by MPI's own: that takes a processor from the program for as long as the
    slowest rank needs.

    Args:
        comm: an intracommunicator. All its ranks make this together.

    Raises:
        InvalidCheckpoint: it is an intercommunicator, or none at all.
        UnsupportedKernel: MPI is not initialised, or was with a level of threads below MPI_THREAD_SERIALIZED.

    Thread safety: one thread at a time.
    """

    def __init__(self, comm: Any) -> None:
        mpi: Any = import_module("mpi4py.MPI")
        if not mpi.Is_initialized() or mpi.Is_finalized():
            raise UnsupportedKernel("MPI is not initialised, or is finalised already", feature="mpi")
        if comm == mpi.COMM_NULL or not isinstance(comm, mpi.Intracomm):
            raise InvalidCheckpoint(
                "ranks talk by an intracommunicator, as MPI.COMM_WORLD: an intercommunicator has two groups, of which "
                "each is to save for itself, and COMM_NULL has none"
            )
        level = mpi.Query_thread()
        if level < mpi.THREAD_SERIALIZED:
            name = {mpi.THREAD_SINGLE: "MPI_THREAD_SINGLE", mpi.THREAD_FUNNELED: "MPI_THREAD_FUNNELED"}.get(
                level, level
            )
            raise UnsupportedKernel(
                f"MPI was initialised with {name}, and a save ends in a thread of its own: initialise it with "
                "MPI_THREAD_MULTIPLE, as mpi4py does by itself, or at least with MPI_THREAD_SERIALIZED",
                feature="MPI_THREAD_SERIALIZED",
            )
        self.background: bool = level == mpi.THREAD_MULTIPLE
        self._mpi, self._comm = mpi, comm.Dup()
        self.rank: int = self._comm.Get_rank()
        self.size: int = self._comm.Get_size()
        self._left: list[Any] = []  # of waits that were interrupted: MPI may still write to these

    def gather(self, data: bytes) -> list[bytes] | None:
        """See `Communicator.gather`."""
        lengths = array("q", bytes(8 * self.size)) if not self.rank else None
        mine = array("q", [len(data)])
        self._wait(self._comm.Igather, [mine, self._mpi.INT64_T], lengths and [lengths, self._mpi.INT64_T])
        if lengths is None:
            self._wait(self._comm.Igatherv, [data, self._mpi.BYTE], None)
            return None
        room, counts = bytearray(sum(lengths)), list(lengths)
        self._wait(self._comm.Igatherv, [data, self._mpi.BYTE], [room, counts, self._mpi.BYTE])
        found, at = list[bytes](), 0
        for count in counts:
            found.append(bytes(room[at : at + count]))
            at += count
        return found

    def broadcast(self, data: bytes) -> bytes:
        """See `Communicator.broadcast`."""
        length = array("q", [len(data)])
        self._wait(self._comm.Ibcast, [length, self._mpi.INT64_T])
        room = bytearray(data) if not self.rank else bytearray(length[0])
        if room:
            self._wait(self._comm.Ibcast, [room, self._mpi.BYTE])
        return bytes(room)

    def _wait(self, begin: Callable[..., Any], *buffers: Any) -> None:
        self._left.append(buffers)
        request, pause = begin(*buffers), _FIRST_LOOK_SECONDS
        while not request.Test():
            time.sleep(pause)
            pause = min(1.5 * pause, _LAST_LOOK_SECONDS)
        self._left.pop()

    def close(self) -> None:
        """See `Communicator.close`."""
        if not self._left and not self._mpi.Is_finalized():
            with suppress(self._mpi.Exception):
                self._comm.Free()


# ---- PyTorch


class TorchCommunicator:
    """A group of its own, on gloo, with the members of a process group of ``torch.distributed``.

    Args:
        group: a process group, whatever its backend. All its members make this together.

    Raises:
        InvalidCheckpoint: this process is no member.

    Thread safety: one thread at a time.
    """

    background = True

    def __init__(self, group: Any) -> None:
        self._torch: Any = import_module("torch")
        self._dist: Any = import_module("torch.distributed")
        members: Sequence[int] = self._dist.get_process_group_ranks(group)
        if self._dist.get_rank() not in members:
            raise InvalidCheckpoint("this process is no member of that process group: its members save together")
        self._group = self._dist.new_group(
            list(members), backend="gloo", timeout=_PATIENCE, use_local_synchronization=True
        )
        self._first = members[0]
        self.rank: int = list(members).index(self._dist.get_rank())
        self.size = len(members)

    def gather(self, data: bytes) -> list[bytes] | None:
        """See `Communicator.gather`."""
        torch, dist = self._torch, self._dist
        mine = torch.tensor([len(data)], dtype=torch.int64)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, mine, group=self._group)
        counts = [int(each[0]) for each in lengths]
        longest = max(*counts, 1)
        padded = torch.frombuffer(bytearray(data.ljust(longest, b"\0")), dtype=torch.uint8)
        rooms = [torch.zeros(longest, dtype=torch.uint8) for _ in counts] if not self.rank else None
        dist.gather(padded, rooms, dst=self._first, group=self._group)
        if rooms is None:
            return None
        return [bytes(room[:count].numpy()) for room, count in zip(rooms, counts, strict=True)]

    def broadcast(self, data: bytes) -> bytes:
        """See `Communicator.broadcast`."""
        torch, dist = self._torch, self._dist
        length = torch.tensor([len(data)], dtype=torch.int64)
        dist.broadcast(length, src=self._first, group=self._group)
        if not int(length[0]):
            return b""
        room = torch.frombuffer(bytearray(data if not self.rank else bytes(int(length[0]))), dtype=torch.uint8)
        dist.broadcast(room, src=self._first, group=self._group)
        return bytes(room.numpy())

    def close(self) -> None:
        """See `Communicator.close`."""
        with suppress(RuntimeError, ValueError, AssertionError):  # the program may have ended all groups already
            self._dist.destroy_process_group(self._group)

# SPDX-License-Identifier: MIT
"""Images of processes, as manifests tell of them: threads, mappings, and where the bytes of these are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import InvalidCheckpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..manifests import Manifest

__all__ = ["ImageMapping", "ImageThread", "Piece", "ProcessImage", "image_of", "is_image"]

_REGISTERS = ("prstatus", "fpregset", "xstate")


class Piece(NamedTuple):
    """Bytes of a mapping, [start, end), which a region has from ``offset`` on."""

    start: int
    end: int
    region: int
    offset: int


@dataclass(frozen=True)
class ImageThread:
    """A thread of the process, while all stood still.

    Attributes:
        tid, name: as the kernel calls it.
        prstatus, fpregset, xstate: its registers, as ptrace gives them; the latter two may be None.
        signal_mask: the signals that it blocks, signal n as bit n - 1.
    """

    tid: int
    name: str
    prstatus: bytes
    fpregset: bytes | None
    xstate: bytes | None
    signal_mask: int


@dataclass(frozen=True)
class ImageMapping:
    """A mapping of the process, [start, end), as /proc/PID/maps has it.

    Attributes:
        pieces: where the bytes are that were saved, by address.
        why: why others have none: None or ``"empty"`` where they are zero, since they were never there; ``"file"``
            where they are those of the file; else they are not known.
    """

    start: int
    end: int
    permissions: str
    offset: int
    device: str
    inode: int
    path: str
    pieces: tuple[Piece, ...]
    why: str | None

    @property
    def is_file(self) -> bool:
        """Whether it maps a file, which has a path."""
        return self.path.startswith("/")

    @property
    def shared(self) -> bool:
        """Whether others may write to it."""
        return self.permissions[3] == "s"

    @property
    def label(self) -> str:
        """What to call it."""
        return self.path or "[anon]"


@dataclass(frozen=True)
class ProcessImage:
    """A process at one moment.

    Attributes:
        generation: whose image it is.
        threads: the main thread first.
        mappings: by address.
        frozen_at: when, in seconds since 1970.
        auxv: as /proc/PID/auxv has it.
    """

    generation: int
    pid: int
    comm: str
    executable: str
    arguments: tuple[str, ...]
    machine: str
    page_bytes: int
    auxv: bytes
    frozen_at: float
    threads: tuple[ImageThread, ...]
    mappings: tuple[ImageMapping, ...]


def is_image(manifest: Manifest) -> bool:
    """Whether a generation is an image of a process, and no checkpoint of buffers."""
    return manifest.threads is not None


def image_of(manifest: Manifest) -> ProcessImage:
    """What a manifest tells of a process.

    Raises:
        InvalidCheckpoint: it is no image, or what it tells makes no sense.
    """
    which = f"generation {manifest.generation}"
    if not is_image(manifest):
        raise InvalidCheckpoint(
            f"{which} is no image of a process, but a checkpoint of buffers: dirtytrack ckpt restore writes those "
            "into files"
        )
    told = manifest.threads
    assert told is not None
    threads = tuple(map(_thread, told["threads"]))
    mappings = tuple(map(_mapping, told["mappings"]))
    if problem := _problem(threads, mappings, manifest.page_bytes):
        raise InvalidCheckpoint(f"the image in {which} cannot be: {problem}")
    return ProcessImage(
        generation=manifest.generation,
        pid=told["pid"],
        comm=told["comm"],
        executable=told["executable"],
        arguments=tuple(told["arguments"]),
        machine=told["machine"],
        page_bytes=manifest.page_bytes,
        auxv=bytes.fromhex(told["auxv"]),
        frozen_at=told["frozen_at"],
        threads=threads,
        mappings=mappings,
    )


def _thread(told: dict[str, Any]) -> ImageThread:
    registers = {name: bytes.fromhex(digits) for name, digits in told["registers"].items() if name in _REGISTERS}
    return ImageThread(
        tid=told["tid"],
        name=told["name"],
        prstatus=registers["prstatus"],
        fpregset=registers.get("fpregset"),
        xstate=registers.get("xstate"),
        signal_mask=int.from_bytes(bytes.fromhex(told["signal_mask"])[:8], "little"),
    )


def _mapping(told: dict[str, Any]) -> ImageMapping:
    start = told["start"]
    return ImageMapping(
        start=start,
        end=told["end"],
        permissions=told["permissions"],
        offset=told["offset"],
        device=told["device"],
        inode=told["inode"],
        path=told["path"],
        pieces=tuple(
            Piece(start + within, start + within + nbytes, region, offset)
            for region, offset, nbytes, within in told["saved"] or ()
        ),
        why=told["why"],
    )


def _problem(threads: Sequence[ImageThread], mappings: Sequence[ImageMapping], page_bytes: int) -> str | None:
    """What makes no sense beside what a manifest refuses by itself."""
    if len({thread.tid for thread in threads}) != len(threads):
        return "a thread is there twice"
    for mapping in mappings:
        if mapping.offset % page_bytes or any(
            piece.start % page_bytes or piece.end % page_bytes for piece in mapping.pieces
        ):
            return f"a part of the mapping at {mapping.start:#x} does not consist of pages"
        if "\0" in mapping.path:
            return f"the mapping at {mapping.start:#x} has a path that no file has"
    return None

# SPDX-License-Identifier: MIT
"""Images of processes, as manifests tell of them: threads, mappings, and where the bytes of these are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import InvalidCheckpoint

if TYPE_CHECKING:
    from ..manifests import Manifest

__all__ = ["ImageMapping", "ImageThread", "Piece", "ProcessImage", "image_of", "is_image"]

_MOST_ADDRESS = 1 << 64
_PERMISSIONS = re.compile("[r-][w-][x-][ps]")


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
    """What a manifest tells of a process; all of it is checked.

    Raises:
        InvalidCheckpoint: it is no image, or what it tells makes no sense.
    """
    which = f"generation {manifest.generation}"
    if not is_image(manifest):
        raise InvalidCheckpoint(
            f"{which} is no image of a process, but a checkpoint of buffers: dirtytrack ckpt restore writes those "
            "into files"
        )
    try:
        return _image(manifest)
    except InvalidCheckpoint as error:
        raise InvalidCheckpoint(f"the image in {which} cannot be: {error}") from error


# ---- what makes sense


def _get(members: Any, name: str, kind: type | tuple[type, ...], what: str) -> Any:
    if not isinstance(members, dict) or name not in members:
        raise InvalidCheckpoint(f"{what} has no {name!r}")
    value = members[name]
    if not isinstance(value, kind) or (isinstance(value, bool)):
        raise InvalidCheckpoint(f"{name!r} of {what} is no {_WORDS[kind]}")
    return value


_WORDS: dict[Any, str] = {
    str: "string",
    list: "list",
    dict: "object",
    int: "whole number",
    (int, float): "number",
    (list, type(None)): "list or null",
    (str, type(None)): "string or null",
}


def _number(members: Any, name: str, least: int, most: int, what: str) -> int:
    value: int = _get(members, name, int, what)
    if not least <= value <= most:
        raise InvalidCheckpoint(f"{name!r} of {what} is not from {least} to {most}")
    return value


def _hex(members: Any, name: str, what: str) -> bytes:
    try:
        return bytes.fromhex(_get(members, name, str, what))
    except ValueError as error:
        raise InvalidCheckpoint(f"{name!r} of {what} is not in hexadecimal digits") from error


def _image(manifest: Manifest) -> ProcessImage:
    members, it = manifest.threads, "it"
    threads = tuple(_thread(each) for each in _get(members, "threads", list, it))
    if not threads or len({thread.tid for thread in threads}) != len(threads):
        raise InvalidCheckpoint("it has no thread, or one twice")
    nbytes = {region.number: region.nbytes for region in manifest.regions}
    mappings: list[ImageMapping] = []
    for each in _get(members, "mappings", list, it):
        mappings.append(_mapping(each, nbytes, manifest.page_bytes))
        if len(mappings) > 1 and mappings[-1].start < mappings[-2].end:
            raise InvalidCheckpoint("its mappings are not in order, or overlap")
    arguments = _get(members, "arguments", list, it)
    if not all(isinstance(word, str) for word in arguments):
        raise InvalidCheckpoint("'arguments' of it are no strings")
    return ProcessImage(
        generation=manifest.generation,
        pid=_number(members, "pid", 1, 2**31 - 1, it),
        comm=_get(members, "comm", str, it),
        executable=_get(members, "executable", str, it),
        arguments=tuple(arguments),
        machine=_get(members, "machine", str, it),
        page_bytes=_number(members, "page_bytes", manifest.page_bytes, manifest.page_bytes, it),
        auxv=_hex(members, "auxv", it),
        frozen_at=float(_get(members, "frozen_at", (int, float), it)),
        threads=threads,
        mappings=tuple(mappings),
    )


def _thread(members: Any) -> ImageThread:
    tid = _number(members, "tid", 1, 2**31 - 1, "a thread")
    what = f"thread {tid}"
    registers = _get(members, "registers", dict, what)

    def optional(name: str) -> bytes | None:
        return None if registers.get(name) is None else _hex(registers, name, what)

    return ImageThread(
        tid=tid,
        name=_get(members, "name", str, what),
        prstatus=_hex(registers, "prstatus", what),
        fpregset=optional("fpregset"),
        xstate=optional("xstate"),
        signal_mask=int.from_bytes(_hex(members, "signal_mask", what)[:8], "little"),
    )


def _mapping(members: Any, region_nbytes: dict[int, int], page: int) -> ImageMapping:
    start = _number(members, "start", 0, _MOST_ADDRESS - page, "a mapping")
    what = f"the mapping at {start:#x}"
    end = _number(members, "end", start + 1, _MOST_ADDRESS, what)
    if start % page or end % page:
        raise InvalidCheckpoint(f"{what} does not consist of pages")
    permissions = _get(members, "permissions", str, what)
    if not _PERMISSIONS.fullmatch(permissions):
        raise InvalidCheckpoint(f"'permissions' of {what} are none")
    path = _get(members, "path", str, what)
    if "\0" in path:
        raise InvalidCheckpoint(f"'path' of {what} is none")
    return ImageMapping(
        start=start,
        end=end,
        permissions=permissions,
        offset=_number(members, "offset", 0, _MOST_ADDRESS - 1, what),
        device=_get(members, "device", str, what),
        inode=_number(members, "inode", 0, _MOST_ADDRESS - 1, what),
        path=path,
        pieces=_pieces(_get(members, "saved", (list, type(None)), what) or [], start, end, region_nbytes, what, page),
        why=_get(members, "why", (str, type(None)), what),
    )


def _pieces(
    saved: list[Any], start: int, end: int, region_nbytes: dict[int, int], what: str, page: int
) -> tuple[Piece, ...]:
    found: list[Piece] = []
    for each in saved:
        if not (isinstance(each, list) and len(each) == 4 and all(type(number) is int for number in each)):
            raise InvalidCheckpoint(f"'saved' of {what} has what are no four numbers")
        region, offset, nbytes, at = each
        if region not in region_nbytes or not 0 <= offset <= region_nbytes[region] - nbytes:
            raise InvalidCheckpoint(f"'saved' of {what} has what no region has")
        if not (0 <= at <= end - start - nbytes and nbytes > 0) or at % page or nbytes % page:
            raise InvalidCheckpoint(f"'saved' of {what} has what is not in it")
        found.append(Piece(start + at, start + at + nbytes, region, offset))
    found.sort()
    if any(piece.start < before.end for piece, before in zip(found[1:], found, strict=False)):
        raise InvalidCheckpoint(f"'saved' of {what} has bytes twice")
    return tuple(found)

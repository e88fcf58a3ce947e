# SPDX-License-Identifier: MIT
"""What a manifest says of a process in its field `threads`: docs/checkpoint-format.md."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import TargetGone
from ...kernel import core
from .mapped import Kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ...process import ThreadState
    from .mapped import Piece
    from .space import Ranges, Space

__all__ = ["Program", "described"]


class Program(NamedTuple):
    """What /proc says of a process beside its memory."""

    pid: int
    comm: str
    executable: str
    arguments: list[str]
    auxv: str

    @staticmethod
    def of(pid: int) -> Program:
        """Of a process that is there.

        Raises:
            TargetGone: it has ended.
        """
        folder = Path(f"/proc/{pid}")
        try:
            comm = (folder / "comm").read_bytes()
            arguments = (folder / "cmdline").read_bytes()
            auxv = (folder / "auxv").read_bytes()
        except (FileNotFoundError, ProcessLookupError) as error:
            raise TargetGone(f"process {pid} ended", errno=error.errno, pid=pid) from error
        try:
            executable = str((folder / "exe").readlink())
        except OSError:  # one that has ended, which the next look says; or it is hidden from us
            executable = ""
        words = arguments.removesuffix(b"\0").split(b"\0") if arguments else []
        return Program(pid, _text(comm.removesuffix(b"\n")), executable, list(map(_text, words)), auxv.hex())


def _text(data: bytes) -> str:
    return data.decode(errors="backslashreplace")


def described(
    program: Program,
    frozen_at: float,
    threads: Sequence[ThreadState],
    pieces: Iterable[tuple[Piece, Ranges]],
    space: Space,
) -> dict[str, Any]:
    """The field.

    Args:
        program: which process.
        frozen_at: when it stood still, in seconds since 1970.
        threads: its threads then.
        pieces: its mappings, and which pages of each are saved.
        space: where those are.
    """
    return {
        **program._asdict(),
        "machine": platform.machine(),
        "page_bytes": core.PAGE_BYTES,
        "frozen_at": frozen_at,
        "threads": [_thread(each) for each in threads],
        "mappings": [_mapping(piece, saved, space) for piece, saved in pieces],
    }


def _thread(state: ThreadState) -> dict[str, Any]:
    sets = {"prstatus": state.prstatus, "fpregset": state.fpregset, "xstate": state.xstate}
    return {
        "tid": state.tid,
        "name": state.name.encode(errors="surrogateescape").decode(errors="backslashreplace"),
        "registers": {name: data.hex() for name, data in sets.items() if data},
        "signal_mask": state.signal_mask.to_bytes(8, "little").hex(),
    }


def _mapping(piece: Piece, saved: Ranges, space: Space) -> dict[str, Any]:
    mapping = piece.mapping
    parts = [
        [number, offset, nbytes, start - mapping.start + before]
        for start, end in saved
        for number, offset, nbytes, before in _parts(space, start, end)
    ]
    return {
        "start": mapping.start,
        "end": mapping.end,
        "permissions": mapping.permissions,
        "offset": mapping.offset,
        "device": mapping.device,
        "inode": mapping.inode,
        "path": mapping.name.encode(errors="surrogateescape").decode(errors="backslashreplace"),
        "saved": parts or None,
        "why": _why(piece, saved),
    }


def _parts(space: Space, start: int, end: int) -> Iterable[tuple[int, int, int, int]]:
    at = 0
    for number, offset, nbytes in space.parts(start, end):
        yield number, offset, nbytes, at
        at += nbytes


def _why(piece: Piece, saved: Ranges) -> str | None:
    """Why it has no bytes, or why parts of it have none."""
    if piece.why is not None:
        return piece.why
    if sum(end - start for start, end in saved) == piece.row.end - piece.row.start:
        return None
    if piece.kind in (Kind.FILE, Kind.SHARED_FILE):
        return "file"
    return "unreadable" if saved else "empty"

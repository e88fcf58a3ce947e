# SPDX-License-Identifier: MIT
"""Images of processes for tests: of processes that never were, and of real ones, taken by ptrace alone.

Neither shares code with what saves them: it is what they are compared with.
"""

from __future__ import annotations

import ctypes
import os
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from dirtytrack.checkpoint.coding import Encoder
from dirtytrack.checkpoint.manifests import Manifest
from dirtytrack.checkpoint.store import DirectoryStore
from tests.storing import save

__all__ = ["PAGE", "Area", "History", "Stopped", "capture", "stopped", "thread"]

PAGE = 4096


# ---- processes that never were


@dataclass
class Area:
    """A mapping. Bytes are given in whole pages, by the page where they begin; what is between was not saved."""

    start: int
    pages: int
    data: dict[int, bytes] = field(default_factory=dict)
    permissions: str = "rw-p"
    path: str = ""
    offset: int = 0
    device: str = "00:00"
    inode: int = 0
    why: str | None = None

    @property
    def end(self) -> int:
        return self.start + self.pages * PAGE

    def copy(self) -> Area:
        return replace(self, data=dict(self.data))


def thread(tid: int, *, rip: int = 0x1000, mask: int = 0) -> dict[str, Any]:
    """One whose registers tell its number: register n of user_regs_struct is 1000 * tid + n, but for rip."""
    words = [1000 * tid + n for n in range(27)]
    words[16] = rip
    xstate = bytearray(832)
    xstate[464:472] = struct.pack("<Q", 7)  # what the processor has of it: x87, SSE, AVX
    return {
        "tid": tid,
        "name": f"thread {tid}",
        "registers": {
            "prstatus": struct.pack("<27Q", *words).hex(),
            "fpregset": bytes(512).hex(),
            "xstate": xstate.hex(),
        },
        "signal_mask": mask.to_bytes(8, "little").hex(),
    }


class History:
    """A store of images, and what each of them is."""

    def __init__(self, path: Path, *, encoder: Encoder | None = None) -> None:
        self.store = DirectoryStore(path, create=True)
        self.encoder = encoder
        self.areas: dict[int, list[Area]] = {}
        self._last: Manifest | None = None
        self._before: dict[str, bytes] | None = None

    def save(
        self, areas: Sequence[Area], threads: Sequence[Any] | None = None, frame_pages: int = 32, **changed: Any
    ) -> Manifest:
        """The next generation: an increment on the one before, where there is one."""
        contents: dict[str, bytes] = {}
        for area in areas:
            for page, data in area.data.items():
                assert len(data) % PAGE == 0
                contents[f"{area.start + page * PAGE:x}"] = data
        document = self._document(areas, threads or [thread(100)], contents) | changed
        with self.store.writer() as writer:
            manifest = save(
                writer, self.store, contents or {"none": bytes(PAGE)}, self._before, self._last,
                encoder=self.encoder, threads=document, frame_pages=frame_pages,
            )  # fmt: skip
        self._last, self._before = manifest, contents
        self.areas[manifest.generation] = [area.copy() for area in areas]
        return manifest

    def _document(self, areas: Sequence[Area], threads: Sequence[Any], contents: Mapping[str, bytes]) -> dict[str, Any]:
        numbers = self._numbers(contents)
        return {
            "pid": 100,
            "comm": "never",
            "executable": "/nowhere/never",
            "arguments": ["never", "was"],
            "machine": "x86_64",
            "page_bytes": PAGE,
            "auxv": struct.pack("<4Q", 9, 0x1000, 0, 0).hex(),
            "frozen_at": time.time(),
            "threads": list(threads),
            "mappings": [
                {
                    "start": area.start,
                    "end": area.end,
                    "permissions": area.permissions,
                    "offset": area.offset,
                    "device": area.device,
                    "inode": area.inode,
                    "path": area.path,
                    "saved": [
                        [numbers[f"{area.start + page * PAGE:x}"], 0, len(data), page * PAGE]
                        for page, data in area.data.items()
                    ]
                    or None,
                    "why": area.why,
                }
                for area in areas
            ],
        }

    def _numbers(self, contents: Mapping[str, bytes]) -> dict[str, int]:
        """What `save` will give to the regions."""
        known = {} if self._last is None else {region.name: region for region in self._last.regions}
        free = max((region.number for region in known.values()), default=-1) + 1
        numbers: dict[str, int] = {}
        for name, data in contents.items():
            if name in known and known[name].nbytes == len(data) and self._before is not None:
                numbers[name] = known[name].number
            else:
                numbers[name], free = free, free + 1
        return numbers


# ---- real ones

_GETREGSET, _GETSIGMASK, _SEIZE, _INTERRUPT, _DETACH = 0x4204, 0x420A, 0x4206, 0x4207, 17
_SETS = {"prstatus": 1, "fpregset": 2, "xstate": 0x202}
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("nbytes", ctypes.c_size_t))


class Stopped(NamedTuple):
    """A process that stands still; its threads, the main one first."""

    pid: int
    tids: tuple[int, ...]

    def registers(self, tid: int, name: str) -> bytes:
        room = ctypes.create_string_buffer(1 << 14)
        vector = _Vector(ctypes.addressof(room), len(room))
        _ptrace(_GETREGSET, tid, _SETS[name], ctypes.addressof(vector))
        return room.raw[: vector.nbytes]

    def signal_mask(self, tid: int) -> int:
        room = ctypes.create_string_buffer(8)
        _ptrace(_GETSIGMASK, tid, 8, ctypes.addressof(room))
        return int.from_bytes(room.raw, "little")


def _ptrace(request: int, tid: int, address: int = 0, data: int = 0) -> None:
    if _libc.ptrace(request, tid, address, data) < 0:
        raise OSError(ctypes.get_errno(), "ptrace")


@contextmanager
def stopped(pid: int) -> Iterator[Stopped]:
    """All threads of a process stand still."""
    tids = sorted((int(path.name) for path in Path(f"/proc/{pid}/task").iterdir()), key=lambda tid: (tid != pid, tid))
    for tid in tids:
        _ptrace(_SEIZE, tid)
        _ptrace(_INTERRUPT, tid)
        os.waitpid(tid, 0x40000000)  # __WALL
    try:
        yield Stopped(pid, tuple(tids))
    finally:
        for tid in tids:
            _ptrace(_DETACH, tid)


def _rows(pid: int) -> Iterator[Area]:
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        where, permissions, offset, device, inode, *path = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in where.split("-"))
        name = path[0] if path else ""
        yield Area(start, (end - start) // PAGE, {}, permissions, name, int(offset, 16), device, int(inode))


def capture(history: History, pid: int) -> Manifest:
    """An image of a process: all that can be read but the pages that private mappings of files did not change."""
    areas: list[Area] = []
    with (
        stopped(pid) as still,
        open(f"/proc/{pid}/mem", "rb", buffering=0) as memory,
        open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap,
    ):
        frozen_at = time.time()
        for area in _rows(pid):
            if area.start >= 1 << 47:
                continue
            areas.append(area)
            entries = struct.unpack(
                f"<{area.pages}Q", os.pread(pagemap.fileno(), 8 * area.pages, area.start // PAGE * 8)
            )
            own = [bool(entry >> 62) and not entry >> 61 & 1 for entry in entries]
            if area.path.startswith("/") and area.permissions[3] == "p":
                area.why = "file"
            else:
                own = [True] * area.pages
            if not area.permissions.startswith("r") and not any(own):
                continue
            _save_runs(area, own, memory.fileno())
        threads = [
            {
                "tid": tid,
                "name": Path(f"/proc/{pid}/task/{tid}/comm").read_text().rstrip("\n"),
                "registers": {name: still.registers(tid, name).hex() for name in _SETS},
                "signal_mask": still.signal_mask(tid).to_bytes(8, "little").hex(),
            }
            for tid in still.tids
        ]
        return history.save(
            areas,
            threads,
            pid=pid,
            comm=Path(f"/proc/{pid}/comm").read_text().rstrip("\n"),
            executable=str(Path(f"/proc/{pid}/exe").readlink()),
            arguments=Path(f"/proc/{pid}/cmdline").read_bytes().decode().rstrip("\0").split("\0"),
            auxv=Path(f"/proc/{pid}/auxv").read_bytes().hex(),
            frozen_at=frozen_at,
        )


def _save_runs(area: Area, own: Sequence[bool], memory: int) -> None:
    page = 0
    while page < area.pages:
        first = page
        while page < area.pages and own[page] == own[first]:
            page += 1
        if own[first]:
            try:
                area.data[first] = os.pread(memory, (page - first) * PAGE, area.start + first * PAGE)
            except OSError:
                area.why = "unreadable"

# SPDX-License-Identifier: MIT
"""Images of processes that never were, in stores, with what each of them is."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dirtytrack.checkpoint.coding import Encoder
from dirtytrack.checkpoint.manifests import Manifest
from dirtytrack.checkpoint.store import DirectoryStore
from tests.storing import save

__all__ = ["PAGE", "Area", "History", "scattered", "thread"]

PAGE = 4096


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

    @staticmethod
    def of_file(path: Path, start: int, pages: int, data: Mapping[int, bytes] = {}, **options: Any) -> Area:
        """A mapping of a file that is there, and was not written for a long time."""
        os.utime(path, (1, 1))
        about = path.stat()
        device = f"{os.major(about.st_dev):02x}:{os.minor(about.st_dev):02x}"
        options = {"path": str(path), "device": device, "inode": about.st_ino, "why": "file", **options}
        return Area(start, pages, dict(data), **options)


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
        document = self.document(areas, threads or [thread(100)], contents) | changed
        with self.store.writer() as writer:
            manifest = save(
                writer, self.store, contents or {"none": bytes(PAGE)}, self._before, self._last,
                encoder=self.encoder, threads=document, frame_pages=frame_pages,
            )  # fmt: skip
        self._last, self._before = manifest, contents
        self.areas[manifest.generation] = [area.copy() for area in areas]
        return manifest

    def document(self, areas: Sequence[Area], threads: Sequence[Any], contents: Mapping[str, bytes]) -> dict[str, Any]:
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


def scattered(history: History, path: Path, start: int, count: int) -> None:
    """An image of one mapping of a file, of which every second page was changed: the i-th has the number i % 100."""
    path.write_bytes(bytes(PAGE))
    area = Area.of_file(path, start, 2 * count)
    hundred = b"".join(i.to_bytes(PAGE, "little") for i in range(100))
    (mapping,) = history.document([area], [thread(100)], {})["mappings"]
    mapping["saved"] = [[0, i % 100 * PAGE, PAGE, 2 * i * PAGE] for i in range(count)]
    history.save([replace(area, pages=100, data={0: hundred})], mappings=[mapping])

# SPDX-License-Identifier: MIT
"""What an image of a process says, and what is true of the process: read by other means than ours."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from dirtytrack import PageCategory, Pagemap
from dirtytrack.checkpoint import DirectoryStore, restore

PAGE = os.sysconf("SC_PAGE_SIZE")


class Mapped(NamedTuple):
    """A line of /proc/PID/maps."""

    start: int
    end: int
    permissions: str
    offset: int
    device: str
    inode: int
    path: str


class Imaged:
    """A generation, as its manifest and its regions have it."""

    def __init__(self, store: Path, generation: int | None = None) -> None:
        with DirectoryStore(store) as opened:
            self.manifest = opened.manifest(generation)
        state = restore(store, generation=generation)
        names = {region.number: region.name for region in self.manifest.regions}
        self._bytes = {number: memoryview(state[name]).cast("B") for number, name in names.items()}
        assert self.manifest.threads is not None
        self.program: dict[str, Any] = self.manifest.threads
        self.mappings: list[dict[str, Any]] = self.program["mappings"]

    def mapping_at(self, address: int) -> dict[str, Any]:
        return next(each for each in self.mappings if each["start"] <= address < each["end"])

    def parts(self, mapping: dict[str, Any]) -> Iterator[tuple[int, memoryview]]:
        """(address, bytes) of what is saved of a mapping."""
        for number, offset, nbytes, within in mapping["saved"] or ():
            yield mapping["start"] + within, self._bytes[number][offset : offset + nbytes]

    def read(self, address: int, nbytes: int) -> bytes:
        out = b""
        while len(out) < nbytes:
            at = address + len(out)
            mapping = self.mapping_at(at)
            part = next(((start, data) for start, data in self.parts(mapping) if start <= at < start + len(data)), None)
            if part is None:
                raise LookupError(f"{at:#x} is not in the image: {mapping}")
            out += part[1][at - part[0] :][: nbytes - len(out)]
        return out

    def word(self, address: int) -> int:
        return int.from_bytes(self.read(address, 8), "little")


def mapped(pid: int) -> list[Mapped]:
    out = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        where, permissions, offset, device, inode, *rest = line.split(None, 5)
        start, end = (int(part, 16) for part in where.split("-"))
        if start < 1 << 63:
            out.append(Mapped(start, end, permissions, int(offset, 16), device, int(inode), rest[0] if rest else ""))
    return out


def waits_for_a_line(pid: int) -> None:
    """Return when its first thread is in read(0, ...): one that has answered is still on its way there."""
    while Path(f"/proc/{pid}/syscall").read_text().split()[:2] != ["0", "0x0"]:
        time.sleep(0.0005)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """By SIGSTOP, as a shell does it."""
    os.kill(pid, signal.SIGSTOP)
    for task in Path(f"/proc/{pid}/task").iterdir():
        while (task / "stat").read_text().rsplit(")", 1)[1].split()[0] not in "tT":
            time.sleep(0.001)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def is_true(image: Imaged, pid: int) -> int:
    """Compare an image with the process, which does nothing meanwhile, byte by byte; how many bytes were the same.

    What is not saved of a mapping must be as the reason says: the bytes of its file, or nobody's.
    """
    compared = 0
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    try:
        with stopped(pid), Pagemap(pid) as pagemap:
            now = mapped(pid)
            told = [(each["start"], each["end"], each["permissions"], each["offset"]) for each in image.mappings]
            assert told == [each[:4] for each in now]
            for mapping, each in zip(image.mappings, now, strict=True):
                assert (mapping["device"], mapping["inode"], mapping["path"]) == each[4:]
                covered = 0
                for start, data in image.parts(mapping):
                    for at in range(0, len(data), 1 << 20):
                        part = data[at : at + (1 << 20)]
                        assert os.pread(memory, len(part), start + at) == part, f"{start + at:#x} of {mapping}"
                        compared += len(part)
                    covered += len(data)
                if covered < each.end - each.start:
                    _is_excused(image, mapping, each, memory, pagemap)
    finally:
        os.close(memory)
    return compared


def _is_excused(image: Imaged, mapping: dict[str, Any], each: Mapped, memory: int, pagemap: Pagemap) -> None:
    why = mapping["why"]
    if why in ("excluded", "dont dump"):
        assert mapping["saved"] is None
    elif why == "empty":
        present = PageCategory.PRESENT
        assert not pagemap.scan(each.start, each.end, category_mask=present, return_mask=present)
    elif why == "unreadable":
        assert each.path.startswith("[vvar")
    else:
        assert why == "file", mapping
        there = {start + at for start, data in image.parts(mapping) for at in range(0, len(data), PAGE)}
        with open(each.path, "rb") as file:
            for at in range(each.start, each.end, PAGE):
                file.seek(each.offset + at - each.start)
                page = file.read(PAGE)
                if at not in there and page:
                    assert os.pread(memory, len(page), at) == page, f"{at:#x} of {mapping} is not its file's"


class Witness:
    """Looks at a process in the moment before it goes on, by means of its own, whatever it does otherwise.

    Args:
        tracker: of the `ProcessCheckpointer` that is looked at.
    """

    def __init__(self, tracker: Any) -> None:
        self._tracker, self._freeze = tracker, tracker.frozen
        self.pages: dict[int, bytes] = {}
        self.mapped: list[Mapped] = []
        tracker.frozen = self._frozen

    @contextmanager
    def _frozen(self, **options: Any) -> Iterator[Any]:
        with self._freeze(**options) as frozen:
            yield frozen
            self._look()

    def _look(self) -> None:
        pid = self._tracker.pid
        self.mapped, self.pages = mapped(pid), {}
        present = PageCategory.PRESENT | PageCategory.SWAPPED
        memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
        with Pagemap(pid) as pagemap:
            for each in self.mapped:
                found = pagemap.scan(each.start, each.end, category_anyof_mask=present, return_mask=present)
                ranges = [part[:2] for part in found if part.categories & PageCategory.PRESENT]
                for start, end in [each[:2]] if each.path == "[vdso]" else ranges:
                    for at in range(start, end, PAGE):
                        try:
                            self.pages[at] = os.pread(memory, PAGE, at)
                        except OSError:  # [vvar]
                            break
        os.close(memory)

    def agrees_with(self, image: Imaged) -> int:
        """Compare; how many pages were compared."""
        told = [(each["start"], each["end"], each["permissions"], each["offset"]) for each in image.mappings]
        assert told == [each[:4] for each in self.mapped]
        zeros, compared = bytes(PAGE), 0
        for mapping in image.mappings:
            covered = set()
            for start, data in image.parts(mapping):
                for at in range(0, len(data), PAGE):
                    assert data[at : at + PAGE] == self.pages.get(start + at, zeros), f"{start + at:#x} of {mapping}"
                    covered.add(start + at)
            compared += len(covered)
            if mapping["why"] is None:
                assert len(covered) == (mapping["end"] - mapping["start"]) // PAGE
        return compared

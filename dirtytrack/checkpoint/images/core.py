# SPDX-License-Identifier: MIT
"""A generation that is an image of a process, as an ELF core file: what gdb opens as if the process had dumped it."""

from __future__ import annotations

import errno
import os
from bisect import bisect_right
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ...errors import DirtyTrackError, InvalidCheckpoint, KernelRefused, PermissionDenied, UnsupportedKernel
from ...kernel.packing import all_zero
from ..coding import Decoder
from ..crew import Crew
from ..reading import Generation, letting_go, reading_threads
from ..store import open_store
from . import elf
from .image import image_of
from .memory import HOLE_NBYTES, ImageMemory, require_options

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ..protocols import Store
    from .image import ProcessImage
    from .memory import Span

__all__ = ["Core", "Missing", "write_core"]

_PAGE = elf.PAGE_BYTES
_THERE = "{} is there already, and nothing is overwritten: write it elsewhere"
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_ADVICE = {
    errno.ENOSPC: "free some space, or write it elsewhere",
    errno.EDQUOT: "free some of the quota, or write it elsewhere",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or write it to another file system",
    errno.EROFS: "write it elsewhere",
}


class Missing(NamedTuple):
    """Memory whose bytes are not known: of which mappings, how much, and why."""

    name: str
    nbytes: int
    why: str


class Core(NamedTuple):
    """A core file that was written.

    Attributes:
        path: of the file.
        generation: what it has.
        executable: the program that ran: what gdb wants to be given beside it.
        nbytes: of the file, by its end.
        written_nbytes: of it that are no holes: memory, headers and notes.
        thread_count, mapping_count, load_count: of threads, of mappings, and of segments of memory in the file.
        missing: memory whose bytes are not known, by name of its mappings: a debugger cannot read it.
    """

    path: str
    generation: int
    executable: str
    nbytes: int
    written_nbytes: int
    thread_count: int
    mapping_count: int
    load_count: int
    missing: tuple[Missing, ...]


def write_core(
    store: Store | str | os.PathLike[str],
    path: str | os.PathLike[str],
    generation: int | None = None,
    *,
    decrypt: Callable[[bytes], bytes] | None = None,
    memory_bytes: int = 128 << 20,
    threads: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Core:
    """Write the image of a process as an ELF core file.

    It has the threads with their registers, the auxiliary vector, which file was mapped where, and the memory. Bytes
    that were left to a mapped file are not in it: a debugger reads the file. Zeros are holes of the file. It is there
    when it is whole, and readable for its owner alone.

    Args:
        store: it, or its path.
        path: of the file, which is not there yet.
        generation: which; the newest where it is left out.
        decrypt, threads: as with `restore`.
        memory_bytes: how much memory it takes, about, beside what the generation's index does; at least 8 MiB.
        progress: called with the bytes that are done and those that there are; what it raises ends it.

    Raises:
        InvalidCheckpoint: the generation is no image of a process, or one that cannot be; there is such a file.
        UnsupportedKernel: it is of another machine than x86-64.
        PermissionDenied, KernelRefused: the file cannot be written; nothing of it is left.
        NoSuchGeneration, DamagedCheckpoint, StoreFailed: as `restore` raises them.

    Thread safety: may be called from any thread, beside whoever saves to the store.
    """
    require_options(memory_bytes, threads)
    decoder, target = Decoder(decrypt), Path(path)
    with letting_go(), open_store(store) as opened, opened.reading():
        manifest = opened.manifest(generation)
        image = image_of(manifest)
        _require_machine(image)
        with Crew(reading_threads() if threads is None else threads) as crew, _appearing(target) as file:
            memory = ImageMemory(image, Generation(opened, manifest, decoder=decoder), crew, memory_bytes)
            return _Writing(image, memory, file, progress).write(target)


def _require_machine(image: ProcessImage) -> None:
    if image.machine != elf.MACHINE or image.page_bytes != elf.PAGE_BYTES:
        raise UnsupportedKernel(
            f"generation {image.generation} is the image of a process on {image.machine}, with pages of "
            f"{image.page_bytes} bytes: core files are written of {elf.MACHINE} alone",
            feature=f"core files of {image.machine}",
        )
    for thread in image.threads:
        if len(thread.prstatus) == elf.COMPAT_NBYTES:
            raise UnsupportedKernel(
                f"generation {image.generation} is the image of a program of 32 bits: core files are written of those "
                "of 64 bits alone",
                feature="core files of programs of 32 bits",
            )
        for name, (least, most) in elf.REGISTERS_NBYTES.items():
            registers = getattr(thread, name)
            if registers is not None and not least <= len(registers) <= most:
                raise InvalidCheckpoint(
                    f"the image in generation {image.generation} cannot be: {name} of thread {thread.tid} has "
                    f"{len(registers)} bytes"
                )


@contextmanager
def _appearing(path: Path) -> Iterator[int]:
    """A new file, which gets its name when it is whole, and is gone where it does not become so."""
    beside = path.parent / f".{path.name}.{os.getpid()}.new"
    try:
        if os.path.lexists(path):
            raise InvalidCheckpoint(_THERE.format(path))
        with suppress(FileNotFoundError):
            beside.unlink()  # of another process, whose number this one has
        file = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            yield file
        finally:
            os.close(file)
        _give_name(beside, path)
    except FileExistsError as error:
        raise InvalidCheckpoint(_THERE.format(path), errno=error.errno) from error
    except OSError as error:
        if isinstance(error, DirtyTrackError):
            raise
        kind = PermissionDenied if isinstance(error, PermissionError) else KernelRefused
        advice = _ADVICE.get(error.errno or 0)
        raise kind(
            f"{path} cannot be written: {error.strerror or error}{'. What helps: ' + advice if advice else ''}",
            errno=error.errno,
        ) from error
    finally:
        with suppress(OSError):
            beside.unlink()


def _give_name(beside: Path, path: Path) -> None:
    try:
        path.hardlink_to(beside)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        beside.rename(path)


# ---- writing


class _Writing:
    def __init__(
        self, image: ProcessImage, memory: ImageMemory, file: int, progress: Callable[[int, int], object] | None
    ) -> None:
        self._image, self._memory, self._file, self._progress = image, memory, file, progress
        self._written = 0

    def write(self, path: Path) -> Core:
        """All of it."""
        loads, missing = _loads(self._memory)
        notes = elf.notes(self._image)
        placed = list[tuple[elf.Load, int]]()
        end = elf.header_nbytes(len(loads)) + len(notes)
        for load, _ in loads:
            end = _up(end)
            placed.append((load, end))
            end += load.filled
        self._put(elf.header(placed, len(notes)) + notes, 0)
        self._put_memory(placed, [span for _, spans in loads for span in spans])
        os.ftruncate(self._file, end)  # zeros at its end are a hole too
        return Core(
            path=str(path),
            generation=self._image.generation,
            executable=self._image.executable,
            nbytes=end,
            written_nbytes=self._written,
            thread_count=len(self._image.threads),
            mapping_count=len(self._image.mappings),
            load_count=len(loads),
            missing=missing,
        )

    def _put_memory(self, placed: Sequence[tuple[elf.Load, int]], spans: Sequence[Span]) -> None:
        starts = [load.start for load, _ in placed]
        done, total = 0, sum(span.end - span.start for span in spans)
        for span, data in self._memory.read(spans):
            load, offset = placed[bisect_right(starts, span.start) - 1]
            self._put_but_zeros(data, offset + span.start - load.start)
            done += len(data)
            if self._progress is not None:
                self._progress(done, total)

    def _put_but_zeros(self, data: memoryview, at: int) -> None:
        start = end = 0
        for page in range(0, len(data), _PAGE):
            if not all_zero(data[page : page + _PAGE]):
                if page != end:
                    self._put(data[start:end], at + start)
                    start = page
                end = page + _PAGE
        self._put(data[start:end], at + start)

    def _put(self, data: bytes | memoryview, at: int) -> None:
        rest = memoryview(data)
        self._written += len(rest)
        while rest:
            done = os.pwrite(self._file, rest, at)
            if not done:
                raise OSError(errno.EIO, "nothing was written")
            rest, at = rest[done:], at + done


# ---- what goes where


def _loads(memory: ImageMemory) -> tuple[list[tuple[elf.Load, list[Span]]], tuple[Missing, ...]]:
    """The segments, each with the spans whose bytes are in the file; and what is missing."""
    loads: list[tuple[elf.Load, list[Span]]] = []
    missing: dict[tuple[str, str], int] = {}
    before: Span | None = None  # the last one, where what follows may be joined to it
    for span in memory.spans:
        mapping, nbytes = span.mapping, span.end - span.start
        if span.source == "unknown" or (span.source == "file" and not memory.is_still(mapping)):
            gone = "it is the file's, which is not there any more, or was written since"
            why = gone if span.source == "file" else mapping.why or "it was not saved"
            missing[mapping.label, why] = missing.get((mapping.label, why), 0) + nbytes
            before = None
            continue
        begins = _begins_elf(memory, span)
        if before is not None and not begins and _joins(before, span, loads[-1][0]):
            load, kept = loads[-1]
            filled = span.end - load.start if span.source == "bytes" else load.filled
            loads[-1] = load._replace(end=span.end, filled=filled), kept
        else:
            filled = nbytes if span.source == "bytes" else _PAGE if begins else 0
            loads.append((elf.Load(span.start, span.end, filled, elf.flags_of(mapping.permissions)), []))
        if span.source == "bytes" or begins:
            loads[-1][1].append(span if span.source == "bytes" else span.part(span.start, span.start + _PAGE))
        before = span
    return loads, tuple(Missing(name, nbytes, why) for (name, why), nbytes in missing.items())


def _begins_elf(memory: ImageMemory, span: Span) -> bool:
    """Whether a span that is left to the file begins with an ELF header: a core has that page, since the build ID in it
    says which file it was."""
    if span.source != "file" or span.offset:
        return False
    return (memory.bytes_at(span.start, _PAGE) or b"").startswith(b"\x7fELF")


def _joins(before: Span, span: Span, load: elf.Load) -> bool:
    """Whether a span goes into the segment of the one before it: it is of the same mapping; and there are no zeros in
    between for which the file would be longer."""
    if before.mapping is not span.mapping or "file" in (before.source, span.source):
        return before.mapping is span.mapping and before.source == span.source
    if span.source == "zeros":
        return True
    return before.source == "bytes" or (load.filled > 0 and load.end - load.start - load.filled < HOLE_NBYTES)


def _up(offset: int) -> int:
    return -(-offset // _PAGE) * _PAGE

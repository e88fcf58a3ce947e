# SPDX-License-Identifier: MIT
"""ELF core files of x86-64, as Linux writes them (elf(5), core(5), fs/binfmt_elf.c): headers and notes, as bytes."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .image import ImageMapping, ImageThread, ProcessImage

__all__ = [
    "COMPAT_NBYTES",
    "MACHINE",
    "PAGE_BYTES",
    "REGISTERS_NBYTES",
    "Load",
    "flags_of",
    "header",
    "header_nbytes",
    "notes",
]

MACHINE = "x86_64"
PAGE_BYTES = 4096
REGISTERS_NBYTES = {"prstatus": (216, 216), "fpregset": (512, 512), "xstate": (576, 1 << 20)}
"""Of each set of registers, the least and the most."""
COMPAT_NBYTES = 68
"""Of the general registers of a program of 32 bits."""

_ET_CORE, _EM_X86_64, _PT_LOAD, _PT_NOTE, _PN_XNUM = 4, 62, 1, 4, 0xFFFF
_FILE_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_SECTION_HEADER = struct.Struct("<IIQQQQIIQQ")
_NOTE = struct.Struct("<III")
_NT_PRSTATUS, _NT_FPREGSET, _NT_PRPSINFO, _NT_AUXV = 1, 2, 3, 6
_NT_X86_XSTATE, _NT_FILE, _NT_SIGINFO = 0x202, 0x46494C45, 0x53494749
_PRSTATUS = struct.Struct("<3ih2xQQ4i8q216si4x")  # struct elf_prstatus
_PRPSINFO = struct.Struct("<4b4xQII4i16s80s")  # struct elf_prpsinfo
_SIGINFO_NBYTES = 128
_XCR0, _XSTATE_BV = 464, 512  # in an area of XSAVE: what the processor has enabled, and what is not as it is at first
_AMX, _PKRU = 3 << 17, 1 << 9
_WITH_AVX_NBYTES = 832  # of an area up to there all processors have the same
_PLACES = {5: (1088, 64), 6: (1152, 512), 7: (1664, 1024), 9: (2688, 8)}
"""Of the parts of such an area, by their bit: where Intel's processors have the masks and the rest of the vectors of
AVX-512, and the protection keys; and how many bytes."""
_PLACES_ELSEWHERE = {840: {9: 832}, 2432: {5: 832, 6: 896, 7: 1408}, 2440: {5: 832, 6: 896, 7: 1408, 9: 2432}}
"""By the length of the area, where others, which lack what lies between, have them."""


class Load(NamedTuple):
    """A segment of memory: [start, end), of which the first ``filled`` bytes are in the file, the rest is not."""

    start: int
    end: int
    filled: int
    flags: int


def flags_of(permissions: str) -> int:
    """Those of a segment, from what /proc/PID/maps says."""
    return 4 * (permissions[0] == "r") | 2 * (permissions[1] == "w") | (permissions[2] == "x")


# ---- headers


def header_nbytes(load_count: int) -> int:
    """What `header` will take."""
    extended = _SECTION_HEADER.size if load_count + 1 >= _PN_XNUM else 0
    return _FILE_HEADER.size + (load_count + 1) * _PROGRAM_HEADER.size + extended


def header(loads: Sequence[tuple[Load, int]], note_nbytes: int) -> bytes:
    """What a core begins with; the notes follow it.

    Args:
        loads: each with the offset of its bytes in the file.
        note_nbytes: of the notes.
    """
    count = len(loads) + 1
    many = count >= _PN_XNUM  # then the number stands in a section header, of which there is no other
    at = header_nbytes(len(loads))
    parts = [
        _FILE_HEADER.pack(
            b"\x7fELF\2\1\1".ljust(16, b"\0"),
            _ET_CORE,
            _EM_X86_64,
            1,
            0,
            _FILE_HEADER.size,
            at - _SECTION_HEADER.size if many else 0,
            0,
            _FILE_HEADER.size,
            _PROGRAM_HEADER.size,
            _PN_XNUM if many else count,
            _SECTION_HEADER.size if many else 0,
            1 if many else 0,
            0,
        ),
        _PROGRAM_HEADER.pack(_PT_NOTE, 0, at, 0, 0, note_nbytes, 0, 4),
    ]
    parts += [
        _PROGRAM_HEADER.pack(
            _PT_LOAD, load.flags, offset, load.start, 0, load.filled, load.end - load.start, PAGE_BYTES
        )
        for load, offset in loads
    ]
    if many:
        parts.append(_SECTION_HEADER.pack(0, 0, 0, 0, 0, 1, 0, count, 0, 0))
    return b"".join(parts)


# ---- notes


def notes(image: ProcessImage) -> bytes:
    """All that is known of the process but its memory."""
    first, *others = image.threads
    parts = [
        _note(_NT_PRSTATUS, _prstatus(image, first)),
        _note(_NT_PRPSINFO, _prpsinfo(image)),
        _note(_NT_SIGINFO, bytes(_SIGINFO_NBYTES)),  # no signal ended it
        _note(_NT_AUXV, image.auxv),
        _note(_NT_FILE, _files(image.mappings)),
        *_registers(first),
    ]
    for thread in others:
        parts += [_note(_NT_PRSTATUS, _prstatus(image, thread)), *_registers(thread)]
    return b"".join(parts)


def _note(kind: int, description: bytes, name: bytes = b"CORE") -> bytes:
    padded = (name + b"\0").ljust(-(-(len(name) + 1) // 4) * 4, b"\0")
    body = description.ljust(-(-len(description) // 4) * 4, b"\0")
    return _NOTE.pack(len(name) + 1, len(description), kind) + padded + body


def _registers(thread: ImageThread) -> list[bytes]:
    found = [] if thread.fpregset is None else [_note(_NT_FPREGSET, thread.fpregset)]
    if thread.xstate is not None:
        found.append(_note(_NT_X86_XSTATE, _xstate(thread.xstate), b"LINUX"))
    return found


def _xstate(area: bytes) -> bytes:
    """As gdb knows it: by its length. Without the tiles of AMX, where a thread does not use them, and with all parts
    where Intel's processors have them: else gdb warns, and shows wrong vector registers or none, by its version."""
    enabled, used = (int.from_bytes(area[at : at + 8], "little") for at in (_XCR0, _XSTATE_BV))
    if enabled & _AMX and not used & _AMX:
        enabled &= ~_AMX
        area = area[: 2696 if enabled & _PKRU else 2688]
    made = bytearray(area)
    elsewhere = _PLACES_ELSEWHERE.get(len(area), {})
    if elsewhere and all(enabled >> bit & 1 for bit in elsewhere):
        del made[_WITH_AVX_NBYTES:]
        for bit, at in elsewhere.items():
            to, nbytes = _PLACES[bit]
            made += bytes(to - len(made)) + area[at : at + nbytes]
    made[_XCR0 : _XCR0 + 8] = enabled.to_bytes(8, "little")
    return bytes(made)


def _prstatus(image: ProcessImage, thread: ImageThread) -> bytes:
    no_times = [0] * 8
    has_floats = thread.fpregset is not None
    return _PRSTATUS.pack(
        0, 0, 0, 0, 0, thread.signal_mask, thread.tid, 0, image.pid, 0, *no_times, thread.prstatus, has_floats
    )


def _prpsinfo(image: ProcessImage) -> bytes:
    words = " ".join(image.arguments).encode(errors="replace").replace(b"\0", b" ")
    name = image.comm.encode(errors="replace")
    return _PRPSINFO.pack(0, ord("R"), 0, 0, 0, 0, 0, image.pid, 0, image.pid, 0, name[:15], words[:79])


def _files(mappings: Sequence[ImageMapping]) -> bytes:
    """Which file is mapped where: `struct` of numbers, then the paths."""
    files = [mapping for mapping in mappings if mapping.is_file]
    numbers = [len(files), PAGE_BYTES]
    for mapping in files:
        numbers += [mapping.start, mapping.end, mapping.offset // PAGE_BYTES]
    paths = b"".join(mapping.path.encode(errors="replace") + b"\0" for mapping in files)
    return struct.pack(f"<{len(numbers)}Q", *numbers) + paths

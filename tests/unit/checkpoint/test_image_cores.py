# SPDX-License-Identifier: MIT
"""Core files of images, read back by pyelftools: headers, notes and memory are what the image has, or it is refused."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from elftools.elf.elffile import ELFFile

from dirtytrack.checkpoint import DirectoryStore, compact
from dirtytrack.checkpoint.coding import Encoder
from dirtytrack.checkpoint.images import write_core
from dirtytrack.cli import main
from dirtytrack.errors import (
    DamagedCheckpoint,
    InvalidCheckpoint,
    KernelRefused,
    NoSuchGeneration,
    PermissionDenied,
    UnsupportedKernel,
)
from tests.generations import Keyed
from tests.imaged import PAGE, Area, History, scattered, thread
from tests.storing import save

BASE = 0x5555_0000_0000
_LOAD = struct.Struct("<IIQQQQQQ")


def pages(count: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(count * PAGE)


def mapped_file(where: Path, start: int, count: int, **options: Any) -> Area:
    """A mapping of a file that is there."""
    (where / "mapped").write_bytes(pages(40, 77))
    return Area.of_file(where / "mapped", start, count, **options)


def loads(path: Path) -> Iterator[tuple[int, int, int, int, int]]:
    """Of each segment of memory: address, bytes in memory, offset, bytes in the file, flags."""
    with path.open("rb") as file:
        for segment in ELFFile(file).iter_segments("PT_LOAD"):
            head = segment.header
            yield head.p_vaddr, head.p_memsz, head.p_offset, head.p_filesz, head.p_flags


def memory(path: Path) -> dict[int, bytes]:
    """By address, the pages that a core has: bytes, zeros, or a file's, which look like zeros."""
    data, found = path.read_bytes(), dict[int, bytes]()
    last = 0
    for address, nbytes, offset, filled, _ in loads(path):
        assert address >= last and nbytes > 0 and filled <= nbytes and not filled % PAGE
        assert not filled or not offset % PAGE
        assert offset + filled <= len(data)
        last = address + nbytes
        for at in range(0, nbytes, PAGE):
            found[address + at] = data[offset + at : offset + at + PAGE] if at < filled else bytes(PAGE)
    return found


def expected(areas: list[Area]) -> dict[int, bytes]:
    """The same, from the areas."""
    found: dict[int, bytes] = {}
    for area in areas:
        if area.why in (None, "file"):
            found |= {area.start + page * PAGE: bytes(PAGE) for page in range(area.pages)}
        for page, data in area.data.items():
            at = area.start + page * PAGE
            found |= {at + i: data[i : i + PAGE] for i in range(0, len(data), PAGE)}
    return found


def layouts(where: Path) -> list[Area]:
    return [
        mapped_file(where, BASE, 9, permissions="r-xp", offset=2 * PAGE),
        Area(BASE + 9 * PAGE, 3, {0: pages(3, 2)}, path="[heap]"),
        mapped_file(where, BASE + 12 * PAGE, 20, data={3: pages(2, 3), 9: pages(1, 4)}),
        Area(BASE + 100 * PAGE, 1000, {5: bytes(PAGE), 6: pages(1, 5), 500: pages(30, 6)}),  # the rest: never there
        Area(BASE + 1100 * PAGE, 50, {10: pages(4, 7)}, why="dont dump"),
        Area(BASE + 1150 * PAGE, 50, why="excluded"),
        Area(BASE + 2000 * PAGE, 1 << 28, {1 << 20: pages(1, 8)}, permissions="---p"),  # a tebibyte
        Area(0x7FFF_0000_0000, 33, {0: pages(33, 9)}, path="[stack]"),
    ]


@pytest.mark.parametrize("stored", ["plain", "compressed", "encrypted"])
def test_each_generation_has_its_memory(where: Path, stored: str) -> None:
    key = Keyed(9) if stored == "encrypted" else None
    history = History(where / "store", encoder=Encoder(None if stored == "plain" else "zstd", 1, key))
    areas = layouts(where)
    areas = [area for area in areas if area.pages < 1 << 20]  # what `memory` can hold
    draw = random.Random(5)
    for _ in range(4):
        history.save(areas)
        for area in draw.sample([area for area in areas if area.data], 3):
            page = draw.choice(list(area.data))
            fresh = bytes(PAGE) if draw.random() < 0.3 else pages(1, draw.randrange(1000))
            area.data[page] = fresh + area.data[page][PAGE:]
        areas[1] = replace(areas[1], data={0: pages(3, draw.randrange(100))})
    compact(history.store, 2, encrypt=key, decrypt=key)
    for generation, truth in history.areas.items():
        path = where / f"core.{generation}"
        made = write_core(history.store, path, generation, decrypt=key, memory_bytes=8 << 20)
        assert memory(path) == expected(truth), generation
        assert (made.generation, made.nbytes) == (generation, path.stat().st_size)
        assert made.mapping_count == len(truth) and made.load_count == len(list(loads(path)))
        assert {each.why for each in made.missing} == {"dont dump", "excluded"}
        assert sum(each.nbytes for each in made.missing) == (46 + 50) * PAGE
        assert path.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in where.iterdir()) == ["core.1", "core.2", "core.3", "core.4", "mapped", "store"]


def test_what_is_large_and_empty_takes_no_room(where: Path) -> None:
    history = History(where / "store")
    areas = layouts(where)
    areas[3].data[600] = bytes(300 * PAGE)
    history.save(areas)
    made = write_core(history.store, where / "core")
    about = (where / "core").stat()
    assert about.st_size == made.nbytes < 4 << 20
    kept = sum(len(data) - data.count(bytes(PAGE)) * PAGE for area in areas for data in area.data.values() if any(data))
    assert made.written_nbytes < kept + 16384
    assert about.st_blocks * 512 <= made.written_nbytes + 16 * PAGE
    (large,) = [each for each in loads(where / "core") if each[0] == BASE + 2000 * PAGE + (1 << 32)]
    assert large[1] == ((1 << 28) - (1 << 20)) * PAGE and large[3] == PAGE
    flags = {address: flags for address, *_, flags in loads(where / "core")}
    assert flags[BASE] == 5 and flags[0x7FFF_0000_0000] == 6 and flags[large[0]] == 0


@pytest.mark.parametrize(
    ("nbytes", "enabled", "parts"),
    [
        (832, 0x7, {}),
        (840, 0x207, {9: 832}),
        (2432, 0xE7, {5: 832, 6: 896, 7: 1408}),
        (2440, 0x2E7, {5: 832, 6: 896, 7: 1408, 9: 2432}),
        (2688, 0xE7, {5: 1088, 6: 1152, 7: 1664}),
        (2696, 0x2E7, {5: 1088, 6: 1152, 7: 1664, 9: 2688}),
        (11008, 0x602E7, {5: 1088, 6: 1152, 7: 1664, 9: 2688}),
    ],
    ids=["AVX", "AVX, keys, AMD", "AVX-512, AMD", "AVX-512, keys, AMD", "AVX-512", "AVX-512, keys", "AMX unused"],
)
def test_vector_registers_stand_where_gdb_looks(nbytes: int, enabled: int, parts: dict[int, int], where: Path) -> None:
    """gdb 13 knows one place of each; later ones go by the length, and know that of Intel's processors."""
    area = bytearray(random.Random(nbytes).randbytes(832)).ljust(nbytes, b"\0")
    area[464:472], area[512:520] = struct.pack("<Q", enabled), struct.pack("<Q", enabled & 0x2E7)
    known = {5: (1088, 64), 6: (1152, 512), 7: (1664, 1024), 9: (2688, 8)}
    for bit, at in parts.items():
        area[at : at + known[bit][1]] = bytes([bit]) * known[bit][1]
    one = thread(100)
    one["registers"]["xstate"] = area.hex()
    history = History(where / "store")
    history.save(layouts(where), [one])
    write_core(history.store, where / "core")
    with (where / "core").open("rb") as file:
        segment: Any
        (segment,) = ELFFile(file).iter_segments("PT_NOTE")
        told = next(note.n_descdata for note in segment.iter_notes() if note.n_type == 0x202)
    assert told[:464] + told[472:832] == area[:464] + area[472:832]
    assert int.from_bytes(told[464:472], "little") == enabled & 0x2E7
    assert len(told) == (sum(known[max(parts)]) if parts else 832)
    for bit in parts:
        to, size = known[bit]
        assert told[to : to + size] == bytes([bit]) * size


def test_the_notes(where: Path) -> None:
    history = History(where / "store")
    threads = [thread(100, mask=1 << 9), thread(107), thread(103)]
    del threads[2]["registers"]["xstate"]
    areas = layouts(where)
    areas[0].path += " (deleted)"
    history.save(areas, threads, comm="sixteen letters!", arguments=["a", "b c", "x" * 100])
    made = write_core(history.store, where / "core")
    assert made.thread_count == 3
    assert [each.why[:17] for each in made.missing if each.name.endswith("(deleted)")] == ["it is the file's,"]
    with (where / "core").open("rb") as file:
        core = ELFFile(file)
        assert core.header.e_type == "ET_CORE" and core.header.e_machine == "EM_X86_64"
        segment: Any
        (segment,) = core.iter_segments("PT_NOTE")
        notes = list(segment.iter_notes())
    kinds = [note.n_type for note in notes]
    per_thread = ["NT_PRSTATUS", "NT_FPREGSET", 0x202]
    assert kinds[:7] == ["NT_PRSTATUS", "NT_PRPSINFO", "NT_SIGINFO", "NT_AUXV", "NT_FILE", "NT_FPREGSET", 0x202]
    assert kinds[7:] == [*per_thread, *per_thread[:2]]
    statuses = [note.n_descdata for note in notes if note.n_type == "NT_PRSTATUS"]
    for told, status in zip(threads, statuses, strict=True):
        assert len(status) == 336
        assert struct.unpack_from("<I", status, 32)[0] == told["tid"]
        assert status[112 : 112 + 216].hex() == told["registers"]["prstatus"]
        assert struct.unpack_from("<Q", status, 24)[0] == int.from_bytes(bytes.fromhex(told["signal_mask"]), "little")
    info = next(note.n_desc for note in notes if note.n_type == "NT_PRPSINFO")
    assert info.pr_pid == 100 and info.pr_fname == b"sixteen letters\0" and info.pr_psargs[:6] == b"a b c "
    files = next(note.n_desc for note in notes if note.n_type == "NT_FILE")
    listed = [(each.vm_start, each.vm_end, each.page_offset) for each in files.Elf_Nt_File_Entry]
    mapped = [area for area in areas if area.path.startswith("/")]
    assert listed == [(area.start, area.end, area.offset // PAGE) for area in mapped]
    assert files.filename == [area.path.encode() for area in mapped]
    assert next(note.n_descdata for note in notes if note.n_type == "NT_AUXV") == struct.pack("<4Q", 9, 0x1000, 0, 0)


def test_more_segments_than_the_header_can_count(where: Path) -> None:
    count = 33_000
    history = History(where / "store")
    scattered(history, where / "file", BASE, count)
    made = write_core(history.store, where / "core")
    assert made.load_count == 2 * count
    data = (where / "core").read_bytes()
    (shoff,) = struct.unpack_from("<Q", data, 40)
    assert struct.unpack_from("<3H", data, 56) == (0xFFFF, 64, 1)
    assert struct.unpack_from("<IIQQQQIIQQ", data, shoff)[7] == 2 * count + 1
    found = list(_LOAD.iter_unpack(data[64 : 64 + 56 * (2 * count + 1)]))[1:]
    assert [(each[3], each[6]) for each in found] == [(BASE + i * PAGE, PAGE) for i in range(2 * count)]
    for i, each in enumerate(found):
        assert data[each[2] : each[2] + each[5]] == (b"" if i % 2 else (i // 2 % 100).to_bytes(PAGE, "little"))


def test_it_takes_no_more_memory_than_it_may(where: Path) -> None:
    history = History(where / "store")
    history.save([Area(BASE, 20_000, {0: pages(200) * 100})], frame_pages=256)  # 78 MiB
    code = """
import resource, sys
from dirtytrack.checkpoint.images import write_core
write_core(sys.argv[1], sys.argv[2] + ".first", 1, memory_bytes=8 << 20, threads=2)
import os; before = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
print(before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, where / "store", where / "core"], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 90 << 10
    assert memory(where / "core.first") == expected(history.areas[1])


# ---- what is refused


def refused(where: Path, error: type[BaseException], match: str, *words: Any, **options: Any) -> None:
    """Nothing is left of it."""
    before = sorted(where.iterdir())
    with pytest.raises(error, match=match):
        write_core(where / "store", *(words or (where / "core",)), **options)
    assert sorted(where.iterdir()) == before


def test_what_no_core_is_made_of(where: Path) -> None:
    with DirectoryStore(where / "store", create=True) as store, store.writer() as writer:
        save(writer, store, {"x": pages(2)})
    refused(where, InvalidCheckpoint, "is no image of a process, but a checkpoint of buffers")
    history = History(where / "images")
    history.save(layouts(where))
    (where / "store").rename(where / "plain")
    (where / "images").rename(where / "store")
    refused(where, NoSuchGeneration, "has no generation 7", where / "core", 7)
    refused(where, InvalidCheckpoint, "memory_bytes=", memory_bytes=1)
    refused(where, InvalidCheckpoint, "threads=", threads=0)
    refused(where, KernelRefused, "No such file", where / "nowhere" / "core")
    (where / "there").write_bytes(b"mine")
    refused(where, InvalidCheckpoint, "there already, and nothing is overwritten", where / "there")
    (where / "link").symlink_to("nowhere")
    refused(where, InvalidCheckpoint, "there already, and nothing is overwritten", where / "link")
    segment = next((where / "store" / "segments").iterdir())
    data = bytearray(segment.read_bytes())
    data[5000] ^= 1
    segment.write_bytes(data)
    refused(where, DamagedCheckpoint, "is damaged between")


def test_a_machine_that_has_other_cores(where: Path) -> None:
    history = History(where / "store")
    history.save(layouts(where), machine="aarch64")
    refused(where, UnsupportedKernel, "image of a process on aarch64")
    small = thread(100)
    small["registers"] = {"prstatus": bytes(68).hex()}
    history.save(layouts(where), [small])
    refused(where, UnsupportedKernel, "a program of 32 bits")


@pytest.mark.parametrize(
    ("error", "number", "match"),
    [
        (KernelRefused, errno.ENOSPC, "No space left.*free some space"),
        (KernelRefused, errno.EIO, "Input/output"),
        (PermissionDenied, errno.EACCES, "Permission"),
    ],
)
@pytest.mark.parametrize("nth", [1, 3])
def test_a_disk_that_fails(
    where: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception], number: int, match: str, nth: int
) -> None:
    history = History(where / "store")
    history.save(layouts(where))
    left, pwrite = nth, os.pwrite

    def failing(*args: Any) -> int:
        nonlocal left
        left -= 1
        if not left:
            raise OSError(number, os.strerror(number))
        return pwrite(*args)

    monkeypatch.setattr(os, "pwrite", failing)
    refused(where, error, match)


def test_a_file_that_may_not_be_so_long(where: Path) -> None:
    history = History(where / "store")
    history.save([Area(BASE, 100, {0: pages(100)})])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50 * PAGE, before[1]))
    try:
        refused(where, KernelRefused, "File too large.*ulimit -f")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_appears_meanwhile_is_not_overwritten(where: Path) -> None:
    history = History(where / "store")
    history.save(layouts(where))
    with pytest.raises(InvalidCheckpoint, match="there already"):
        write_core(where / "store", where / "core", progress=lambda *_: (where / "core").write_bytes(b"mine"))
    assert (where / "core").read_bytes() == b"mine"
    assert sorted(path.name for path in where.iterdir()) == ["core", "mapped", "store"]


def test_a_file_system_without_links(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = History(where / "store")
    history.save(layouts(where))

    def none(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", none)
    write_core(where / "store", where / "core")
    assert sorted(path.name for path in where.iterdir()) == ["core", "mapped", "store"]


def test_who_is_killed_leaves_no_core(where: Path) -> None:
    history = History(where / "store")
    history.save(layouts(where))
    code = """
import os, signal, sys
from dirtytrack.checkpoint.images import write_core
write_core(sys.argv[1], sys.argv[2], progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL))
"""
    done = subprocess.run([sys.executable, "-c", code, where / "store", where / "core"], check=False)
    assert done.returncode == -signal.SIGKILL and not (where / "core").exists()
    write_core(where / "store", where / "core")
    assert (where / "core").stat().st_size > 0


def test_whoever_interrupts_it_leaves_nothing(where: Path) -> None:
    history = History(where / "store")
    history.save(layouts(where))

    def stop(done: int, total: int) -> None:
        assert 0 < done <= total
        raise KeyboardInterrupt("stop")

    refused(where, KeyboardInterrupt, "stop", progress=stop)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("threads.0.registers.prstatus", "00"),
        ("threads.0.registers.fpregset", "00" * 513),
        ("threads.1.tid", 100),
        ("mappings.0.offset", 1),
        ("mappings.0.path", "/a\0b"),
        ("mappings.1.saved", [[1, 0, PAGE, 1]]),
        ("mappings.1.saved", [[1, 0, 5, 0]]),
    ],
)
def test_an_image_that_cannot_be(where: Path, path: str, value: Any) -> None:
    history = History(where / "store")
    areas = [Area(BASE, 2, {0: pages(2)}), Area(BASE + 4 * PAGE, 3, {0: pages(3, 2)})]
    manifest = history.save(areas, [thread(100), thread(101)])
    document: Any = json.loads(json.dumps(manifest.threads))
    *steps, last = (int(step) if step.isdigit() else step for step in path.split("."))
    place = document
    for step in steps:
        place = place[step]
    place[last] = value
    with history.store.writer() as writer:
        writer.publish(replace(manifest, revision=1, threads=document))
    refused(where, InvalidCheckpoint, "the image in generation 1 cannot be")


# ---- the command


def test_the_command(where: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    history = History(where / "store")
    for _ in range(2):
        history.save(layouts(where))
    monkeypatch.chdir(where)
    assert main(["ckpt", "core", "store"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("generation 2: 1 thread, 8 mappings, ") and told[0].endswith(" in core.2")
    assert told[1] == "not in it: 184 KiB of [anon]: dont dump"
    assert told[-1] == "open it with: gdb /nowhere/never core.2"
    assert main(["ckpt", "core", "store"]) == 1
    assert "core.2 is there already" in capsys.readouterr().err
    assert main(["ckpt", "core", "store", "--generation", "1", "-o", "first", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["generation"] == 1 and found["command"] == ["gdb", "/nowhere/never", "first"]
    assert found["nbytes"] == (where / "first").stat().st_size
    assert {each["why"] for each in found["missing"]} == {"dont dump", "excluded"}

# SPDX-License-Identifier: MIT
"""Images of real programs as core files: what gdb reads in them is what the programs were, generation by generation."""

from __future__ import annotations

import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dirtytrack.checkpoint import DirectoryStore
from dirtytrack.checkpoint.images import MappingDifference, ProcessCheckpointer, compare_images, write_core
from dirtytrack.checkpoint.manifests import Manifest
from tests.imaged import History, scattered
from tests.programs.debugging import gdb, needs_gdb, notes_of, numbers_of, pages_of, threads_of
from tests.programs.imaged import waits_for_a_line
from tests.programs.targets import built, running

PAGE = 4096
COUNTS = (0, 1, 5, 6)
GENERAL = ("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi")
REGISTERS = (*GENERAL, "rip", "rsp", "fs_base", "eflags")
pytestmark = needs_gdb


class Counted(NamedTuple):
    """Cores of a program that counted, and what the generations' manifests say."""

    program: Path
    store: Path
    cores: dict[int, Path]
    manifests: dict[int, Manifest]


def process_of(manifest: Manifest) -> dict[str, Any]:
    """What a manifest says of a process."""
    assert manifest.threads is not None
    return manifest.threads


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Counted:
    where = tmp_path_factory.mktemp("cores")
    cores, manifests, done = dict[int, Path](), dict[int, Manifest](), 0
    with running("counted") as program, ProcessCheckpointer(where / "store", program.pid) as ckpt:
        for count in COUNTS:
            while done < count:
                assert program.ask() == "well"
                done += 1
            waits_for_a_line(program.pid)
            generation = ckpt.save().generation
            cores[count] = Path(write_core(ckpt.store, where / f"core.{generation}", generation).path)
            manifests[count] = ckpt.store.manifest(generation)
    return Counted(built("counted"), where / "store", cores, manifests)


@pytest.mark.parametrize("count", COUNTS)
def test_each_generation_has_the_values_of_its_moment(counted: Counted, count: int) -> None:
    values = gdb(
        counted.program,
        counted.cores[count],
        "output counted",
        f"output squares[{count}]",
        f"output squares[{count + 1}]",
        "output point",
        "output (char *)on_heap",
        f"output mapped[512 * ({count} % 8)]",
        "output motto",
        "output counted == 1000 + (long)squares[1] * point.x",
    )
    assert values[0] == str(1000 + count)
    assert values[1] == str(count * count)
    assert values[2] == "0"
    assert values[3] == (f"{{x = {count}, y = -7}}" if count else "{x = 7, y = -7}")
    assert values[4].endswith(f'"on the heap: {count}"')
    assert values[5] == str(count)
    assert values[6] == '"never written"'
    assert values[7] == "1"


def test_all_threads_have_their_frames_and_locals(counted: Counted) -> None:
    document, core = process_of(counted.manifests[5]), counted.cores[5]
    frames = threads_of(counted.program, core)
    assert sorted(frames) == sorted(each["tid"] for each in document["threads"])
    main, *others = (frames[each["tid"]] for each in document["threads"])
    assert main[-1] == "main" and "fgets" in "".join(main)
    for number, names in enumerate(others, 1):
        assert names.count("rests") == number + 1
        assert "thread" in names and "read" in "".join(names[: names.index("rests")])
    numbers = numbers_of(counted.program, core)
    commands = [
        (f"thread {numbers[each['tid']]}", "frame function rests", "output seen") for each in document["threads"][1:]
    ]
    assert gdb(counted.program, core, *chain(*commands))[2::3] == ["100", "200", "300"]


def test_registers_are_those_of_the_threads(counted: Counted) -> None:
    document, core = process_of(counted.manifests[1]), counted.cores[1]
    numbers = numbers_of(counted.program, core)
    asked = [f"output/x ${name}" for name in REGISTERS] + ["output/x $xmm3.uint128", "output/x $mxcsr"]
    commands = chain(*((f"thread {numbers[each['tid']]}", *asked) for each in document["threads"]))
    values = iter(gdb(counted.program, core, *commands))
    for each in document["threads"]:
        words = struct.unpack("<27Q", bytes.fromhex(each["registers"]["prstatus"]))
        xstate = bytes.fromhex(each["registers"]["xstate"])
        assert "Switching to thread" in next(values)
        told = [int(next(values), 16) for _ in asked]
        assert told[:-2] == [*words[:15], words[16], words[19], words[21], words[18]]
        assert told[-2:] == [int.from_bytes(xstate[start:end], "little") for start, end in ((208, 224), (24, 28))]


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the program fills the registers of x86-64")
def test_vector_registers_are_those_of_the_threads(tmp_path: Path) -> None:
    with running("registers", 3) as program, ProcessCheckpointer(tmp_path / "store", program.pid) as ckpt:
        ckpt.save()
        document = process_of(ckpt.store.manifest())
        write_core(ckpt.store, tmp_path / "core")
    has_avx_512 = "avx512f" in Path("/proc/cpuinfo").read_text().split()
    asked = ["xmm1.v2_int64[0]", "xmm9.v2_int64[0]", *(["zmm17.v8_int64[7]", "k1"] if has_avx_512 else [])]
    numbers = numbers_of(built("registers"), tmp_path / "core")
    for number, each in enumerate(document["threads"][1:], 1):
        commands = [f"thread {numbers[each['tid']]}", *(f"output/x ${name}" for name in asked)]
        told = [int(value, 16) for value in gdb(built("registers"), tmp_path / "core", *commands)[1:]]
        assert told == [0x1000 * number + value for value in (1, 4, 6, 6)[: len(asked)]]


def test_mappings_are_listed(counted: Counted) -> None:
    document = process_of(counted.manifests[0])
    commands = "info proc mappings", "info auxv", "info files"
    mappings, auxv, files = gdb(counted.program, counted.cores[0], *commands)
    listed = re.findall(r"^ +0x([0-9a-f]+) +0x([0-9a-f]+) +\S+ +0x([0-9a-f]+) +(\S+)$", mappings, re.MULTILINE)
    wanted = [each for each in document["mappings"] if each["path"].startswith("/")]
    assert [(int(start, 16), int(end, 16), int(offset, 16), path) for start, end, offset, path in listed] == [
        (each["start"], each["end"], each["offset"], each["path"]) for each in wanted
    ]
    assert {str(counted.program), "libc.so.6"} <= {listed[0][3], *(path.rpartition("/")[2] for *_, path in listed)}
    assert re.search(r"AT_SYSINFO_EHDR", auxv) and re.search(r"AT_PAGESZ .*4096", auxv)
    for each in document["mappings"]:
        if each["why"] is None:
            assert re.search(rf"0x0*{each['start']:x} - ", files), hex(each["start"])


def test_the_bytes_are_those_of_gcore(tmp_path: Path) -> None:
    with running("counted") as program:
        for _ in range(9):
            assert program.ask() == "well"
        os.kill(program.pid, signal.SIGSTOP)  # else the kernel writes to it who runs it where (rseq)
        with ProcessCheckpointer(tmp_path / "store", program.pid) as ckpt:
            ckpt.save()
        subprocess.run(
            ["gcore", "-a", "-o", tmp_path / "gcore", str(program.pid)],
            check=True, capture_output=True, timeout=60, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        os.kill(program.pid, signal.SIGCONT)
        gcore = tmp_path / f"gcore.{program.pid}"
    write_core(tmp_path / "store", tmp_path / "core")
    assert notes_of(tmp_path / "core") == notes_of(gcore)
    ours, theirs = dict(pages_of(tmp_path / "core")), dict(pages_of(gcore))
    with DirectoryStore(tmp_path / "store") as store:
        document = process_of(store.manifest())
    compared = 0
    for mapping in document["mappings"]:
        file = None
        if mapping["path"].startswith("/"):
            file = Path(mapping["path"]).read_bytes()
        if mapping["path"] == "[vvar]":
            continue  # the kernel's clock, which went on
        for at in range(mapping["start"], mapping["end"], PAGE):
            their = theirs.get(at)
            if their is None:
                continue
            assert at in ours, f"{at:x} of {mapping['path']}"
            our = ours[at]
            if our is None and file is not None:
                offset = mapping["offset"] + at - mapping["start"]
                our = file[offset : offset + PAGE].ljust(PAGE, b"\0")
            assert (our or bytes(PAGE)) == their, f"{at:x} of {mapping['path']}"
            compared += 1
    assert compared > 100


def test_what_is_not_in_the_image_cannot_be_read(tmp_path: Path) -> None:
    with running("pages") as program:
        kept, hidden, left_out = (int(program.ask("map 4"), 16) for _ in range(3))
        for each in (kept, hidden, left_out):
            program.ask(f"write {each:x} 2")
        program.ask(f"hide {hidden:x} 4 1")
        exclude = (left_out, left_out + 4 * PAGE)
        with ProcessCheckpointer(tmp_path / "store", program.pid, exclude=exclude) as ckpt:
            ckpt.save()
    made = write_core(tmp_path / "store", tmp_path / "core")
    why = {each.why: each.nbytes for each in made.missing}
    assert why["dont dump"] >= 4 * PAGE and why["excluded"] >= 4 * PAGE
    words = ["gdb", "-nx", "-batch", "-core", str(made.path)]
    for each in (kept, hidden, left_out):
        words += ["-ex", f"output/d *(char *){each + 2 * PAGE:#x}"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.splitlines()[-1].endswith("2")
    for each in (hidden, left_out):
        assert f"Cannot access memory at address {each + 2 * PAGE:#x}" in done.stderr


def test_what_differs_by_name(counted: Counted) -> None:
    found = compare_images(counted.store, counted.manifests[1].generation, counted.manifests[5].generation)
    objects = {each.name: each for each in found.objects if each.module == str(counted.program)}
    assert objects.keys() == {"counted", "squares", "point"}
    (address,) = gdb(counted.program, counted.cores[5], "output/x &counted")
    assert objects["counted"].address == int(re.findall(r"0x[0-9a-f]+", address)[-1], 16)
    assert objects["counted"].older == (1001).to_bytes(8, "little").hex()
    assert objects["counted"].newer == (1005).to_bytes(8, "little").hex()
    assert objects["point"].nbytes == 8 and objects["point"].changed_nbytes == 1
    changed = {row.name for row in found.mappings if row.changed_nbytes}
    assert {str(counted.program), "[heap]"} <= changed
    assert not [row for row in found.mappings if row.what in ("appeared", "vanished", "moved")]


def test_what_becomes_of_mappings(tmp_path: Path) -> None:
    with running("pages") as program, ProcessCheckpointer(tmp_path / "store", program.pid) as ckpt:
        moving = int(program.ask("map 40"), 16)
        for page in range(40):
            for _ in range(page + 1):
                program.ask(f"write {moving:x} {page}")
        going, staying = int(program.ask("map 9"), 16), int(program.ask("map 5"), 16)
        for page in range(9):
            program.ask(f"write {going:x} {page}")
        ckpt.save()
        moved = int(program.ask(f"move {moving:x} 40"), 16)
        program.ask(f"write {moved:x} 33")
        program.ask(f"write {staying:x} 2")
        program.ask(f"unmap {going:x} 9")
        come = int(program.ask("map 300"), 16)
        ckpt.save()
    found = compare_images(tmp_path / "store", 1, 2).mappings

    def at(address: int, side: str) -> MappingDifference:
        places = ((row, getattr(row, side)) for row in found)
        return next(row for row, place in places if place and place.start <= address < place.end)

    assert at(moved, "newer").what == "moved" and at(moving, "older") is at(moved, "newer")
    assert at(moved, "newer").runs == ((moved + 33 * PAGE, PAGE),) and at(moved, "newer").changed_nbytes == 1
    assert at(going, "older").what in ("vanished", "shrunk") and at(come, "newer").what in ("appeared", "grown")
    row = at(staying, "newer")
    assert row.what == "changed" and (staying + 2 * PAGE, PAGE) in row.runs


def test_gdb_opens_more_segments_than_the_header_can_count(tmp_path: Path) -> None:
    history, base, count = History(tmp_path / "store"), 0x5555_0000_0000, 33_000
    scattered(history, tmp_path / "file", base, count)
    write_core(history.store, tmp_path / "core")
    last = base + 2 * (count - 1) * PAGE
    words = ["gdb", "-nx", "-batch", "-core", str(tmp_path / "core")]
    for value in (f"*(long *){last:#x}", f"*(long *){last - 2 * PAGE:#x}", "$r15"):
        words += ["-ex", f"output {value}", "-ex", "echo \\n"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.splitlines()[-3:] == ["99", "98", "100000"], done.stdout + done.stderr


# ---- redis


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    socket = tmp_path / "redis.sock"
    server = subprocess.Popen(
        ["redis-server", "--port", "0", "--unixsocket", socket, "--save", "", "--io-threads", "2"],
        stdout=subprocess.PIPE,
        cwd=tmp_path,
    )
    assert server.stdout is not None
    for line in server.stdout:
        if b"Ready to accept" in line or b"ready to accept" in line:
            break
    yield server
    server.terminate()
    server.communicate(timeout=20)


def test_redis(redis: subprocess.Popen[bytes], tmp_path: Path) -> None:
    store, kept = tmp_path / "store", b"a value that nobody forgets"
    with ProcessCheckpointer(store, redis.pid) as ckpt:
        ckpt.save()
        for words in (["SET", "where", kept.decode()], ["INCRBY", "number", "41"]):
            subprocess.run(["redis-cli", "-s", tmp_path / "redis.sock", *words], check=True, capture_output=True)
        ckpt.save()
        document = process_of(ckpt.store.manifest())
    cores = [Path(write_core(store, tmp_path / f"core.{n}", n).path) for n in (1, 2)]
    executable = document["executable"]
    threads = threads_of(executable, cores[1])
    assert sorted(threads) == sorted(each["tid"] for each in document["threads"])
    assert len(threads) >= 4
    main = threads[redis.pid]
    assert "aeMain" in main and main[-1] in ("main", "_start"), main
    assert all("start_thread" in frames for tid, frames in threads.items() if tid != redis.pid)
    found = [[at + data.index(kept) for at, data in pages_of(core) if data and kept in data] for core in cores]
    assert not found[0] and found[1]
    assert kept.decode() in gdb(executable, cores[1], f"output (char *){found[1][0]:#x}")[0]
    names = {each.name for each in compare_images(store, 1, 2).objects if each.module == executable}
    assert "server" in names, names  # redis exports its symbols


# ---- Python


PROGRAM = """
import sys, threading

def outer(secret):
    return inner(secret * 2, "thirty")

def inner(number, word):
    beside = [number, word]
    print("up", flush=True)
    for line in sys.stdin:
        number += 1
        print("well", flush=True)
    return beside

outer(21)
"""


def commands_for_gdb(executable: Path) -> Path | None:
    """CPython's commands for gdb, where pyenv and Debian put them."""
    script = executable.with_name(f"{executable.name}-gdb.py")
    return next(filter(Path.exists, (script, Path(f"/usr/share/gdb/auto-load{script}"))), None)


def test_python(tmp_path: Path) -> None:
    executable = Path(sys.executable).resolve()
    script = commands_for_gdb(executable)
    if script is None:
        pytest.skip("CPython's commands for gdb, of this version, are not here: on Debian, python3-dbg has them")
    (tmp_path / "program.py").write_text(PROGRAM)
    with (
        running(sys.executable, "-u", tmp_path / "program.py") as program,
        ProcessCheckpointer(tmp_path / "store", program.pid) as ckpt,
    ):
        waits_for_a_line(program.pid)
        ckpt.save()
        assert program.ask() == "well"
        waits_for_a_line(program.pid)
        ckpt.save()
    for generation, number in ((1, 42), (2, 43)):
        path = tmp_path / f"core.{generation}"
        write_core(tmp_path / "store", path, generation)
        frames, variables = gdb(executable, path, f"source {script}", "py-bt", "py-locals")[1:]
        called = re.findall(r'File "(.+)", line \d+, in (\S+)', frames)
        assert called == [(f"{tmp_path}/program.py", name) for name in ("inner", "outer", "<module>")]
        assert "secret = 21" in variables
        assert f"number = {number}" in variables and "word = 'thirty'" in variables
        assert "beside = [42, 'thirty']" in variables

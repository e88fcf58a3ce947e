# SPDX-License-Identifier: MIT
"""Recordings against the obvious model: a list of sets of page numbers. Needs nothing of the kernel."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
import zlib
from array import array
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dirtytrack.errors import InvalidRecording, PermissionDenied, SessionClosed
from dirtytrack.observe import Recording, RecordingWriter
from dirtytrack.observe.records import HEADER_BYTES, Header, record
from dirtytrack.observe.varints import Reader, decoded, encoded, number
from dirtytrack.process.mappings import Mapping
from tests.recorded import mapping, pages_of, runs_of
from tests.strategies import page_sets

PAGES = 300
WORD = st.integers(0, 2**64 - 1)


class Written1(NamedTuple):
    pages: frozenset[int]
    mappings: tuple[Mapping, ...]
    seconds: float
    resident_pages: int


@st.composite
def tables(draw: st.DrawFn) -> tuple[Mapping, ...]:
    cuts = sorted(draw(st.sets(st.integers(0, PAGES), max_size=8)))
    names = st.sampled_from(("", "[heap]", "[stack]", "/usr/lib/libc.so.6", "naïve \udcff", "x" * 300))
    states = st.sampled_from((("tracked", ""), ("untracked", "another userfaultfd has it"), ("excluded", "a file")))
    return tuple(
        mapping(first, last, draw(names), *draw(states)) for first, last in pairwise(cuts) if draw(st.booleans())
    )


def histories(most: int = 8) -> st.SearchStrategy[list[Written1]]:
    epoch = st.builds(Written1, page_sets(PAGES), tables(), st.sampled_from((0.0, 0.1, 3.25)), st.integers(0, 10**6))
    return st.lists(epoch, max_size=most)


def write(path: Path, history: list[Written1], **options: int | bool | None) -> None:
    with RecordingWriter(path, pid=7, command="a command", **options) as writer:  # type: ignore[arg-type]
        at = 100.0
        for i, each in enumerate(history):
            writer.write(
                runs_of(each.pages),
                each.mappings,
                number=i + 1,
                begun=at,
                ended=at + each.seconds,
                resident_pages=each.resident_pages,
            )
            at += each.seconds


# ---- numbers


@given(st.lists(st.one_of(WORD, st.integers(0, 300)), max_size=40))
def test_numbers_come_back(values: list[int]) -> None:
    column = np.array(values, np.uint64)
    data = encoded(column)
    assert data == b"".join(map(number, values))
    assert decoded(data, len(values)).tolist() == values
    reader = Reader(data)
    assert [reader.number() for _ in values] == values
    reader.finish()


@pytest.mark.parametrize(
    ("data", "count"),
    [(b"\x80", 1), (b"\x01", 0), (b"", 1), (b"\x01\x02", 1), (b"\x80" * 10 + b"\x01", 1), (b"\xff" * 9 + b"\x02", 1)],
)
def test_what_are_no_such_numbers(data: bytes, count: int) -> None:
    with pytest.raises(ValueError, match=r"numbers|bits"):
        decoded(data, count)


# ---- round trips


@given(histories())
@settings(max_examples=60)
def test_a_recording_comes_back(tmp_path_factory: pytest.TempPathFactory, history: list[Written1]) -> None:
    path = tmp_path_factory.mktemp("recording") / "r"
    write(path, history)
    recording = Recording.open(path)
    assert len(recording) == len(history)
    at = recording[0].begun if history else 0.0
    for i, (epoch, each) in enumerate(zip(recording, history, strict=True)):
        assert (epoch.number, epoch.epochs, epoch.coarse, epoch.exact) == (i + 1, 1, 1, True)
        assert pages_of(epoch.runs) == each.pages
        assert epoch.runs.shape == (len(runs_of(each.pages)), 2)
        assert (epoch.runs.format, epoch.runs.readonly) == ("Q", True)
        assert epoch.page_count == len(each.pages) == sum(epoch.run_pages.tolist())
        assert epoch.mappings == each.mappings
        assert epoch.resident_pages == each.resident_pages
        assert epoch.begun == pytest.approx(at)
        assert epoch.seconds == pytest.approx(each.seconds)
        at = epoch.ended
    (session,) = recording.sessions
    assert (session.pid, session.command) == (7, "a command")
    assert [end.reason for end in recording.ends] == ["stopped"]
    assert recording.torn_nbytes == 0
    assert recording.mappings == (history[-1].mappings if history else ())


@given(histories(4), histories(4), st.integers(0, 40))
@settings(max_examples=30)
def test_a_recording_is_appended_to(
    tmp_path_factory: pytest.TempPathFactory, first: list[Written1], second: list[Written1], torn: int
) -> None:
    path = tmp_path_factory.mktemp("recording") / "r"
    write(path, first)
    with path.open("ab") as file:
        file.write(record(3, b"x" * 40)[:torn])
    write(path, second, append=True)
    recording = Recording.open(path)
    assert [pages_of(epoch.runs) for epoch in recording] == [each.pages for each in [*first, *second]]
    assert [epoch.mappings for epoch in recording] == [each.mappings for each in [*first, *second]]
    assert [epoch.number for epoch in recording] == list(range(1, len(first) + len(second) + 1))
    assert all(before.ended <= after.begun for before, after in pairwise(recording))
    assert (len(recording.sessions), len(recording.ends), recording.torn_nbytes) == (2, 2, 0)
    assert recording.ended is recording.ends[1]


def test_what_is_being_written_is_read_and_a_rewriting_is_not_noticed(tmp_path: Path) -> None:
    path, beginning = tmp_path / "r", []
    with RecordingWriter(path, size_budget=16 << 10) as writer:
        reader = None
        random = np.random.default_rng(2)
        for i in range(60):
            pages = set(random.integers(0, 4000, 700).tolist())
            writer.write(runs_of(pages), (), number=i + 1, begun=float(i), ended=i + 1.0)
            assert sum(epoch.epochs for epoch in Recording.open(path)) == i + 1
            assert pages_of(Recording.open(path)[-1].runs) == pages
            if i == 2:
                reader = path.open("rb")
                beginning = list(Recording.open(path))
        assert reader is not None
        with reader:
            old = Recording(reader.read())
    assert [epoch.runs for epoch in old[:3]] == [epoch.runs for epoch in beginning]
    assert not Recording.open(path)[0].exact
    assert [each.name for each in tmp_path.iterdir()] == ["r"]


# ---- what is no recording


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("recording") / "r"
    table = (mapping(0, 60, "[heap]"), mapping(60, 300, "y" * 100, "untracked", "why"))
    write(path, [Written1(frozenset(range(0, 2 * i, 2)), table[: 1 + i % 2], 0.1, i) for i in range(0, 120, 30)])
    return path.read_bytes()


def test_cut_short_at_every_byte(whole: bytes) -> None:
    epochs = list(Recording(whole))
    counts = set()
    for length in range(len(whole)):
        part = whole[:length]
        if length < HEADER_BYTES:
            with pytest.raises(InvalidRecording, match="cut short" if length else "empty"):
                Recording(part)
            continue
        recording = Recording(part)
        assert [epoch.runs for epoch in recording] == [epoch.runs for epoch in epochs[: len(recording)]]
        assert recording.torn_nbytes < 400
        counts.add(len(recording))
        assert not recording.ends
        assert recording.ended is None
    assert counts == set(range(len(epochs) + 1))


def test_a_bit_that_flipped_is_found_at_every_byte(whole: bytes) -> None:
    epochs = [epoch.runs for epoch in Recording(whole)]
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 0x10
        try:
            recording = Recording(bytes(damaged))
        except InvalidRecording:
            continue
        found = [epoch.runs for epoch in recording]
        assert recording.torn_nbytes  # it is told that something is missing
        assert found == epochs[: len(found)]


def reject(tmp_path: Path, data: bytes, why: str) -> None:
    path = tmp_path / "bad"
    path.write_bytes(data)
    with pytest.raises(InvalidRecording, match=why):
        for epoch in Recording.open(path):
            assert epoch.page_count >= 0
    with pytest.raises(InvalidRecording, match=why):
        RecordingWriter(path, append=True).close()
    assert path.read_bytes() == data


def test_an_empty_file(tmp_path: Path) -> None:
    reject(tmp_path, b"", "is empty")


def test_another_kind_of_file(tmp_path: Path, whole: bytes) -> None:
    reject(tmp_path, b"\x7fELF" + bytes(100), "is no recording")


def test_another_version(tmp_path: Path, whole: bytes) -> None:
    reject(tmp_path, whole[:3] + b"\x02" + whole[4:], "of version 2, this library reads version 1")


def test_damage_that_is_not_at_the_end(tmp_path: Path, whole: bytes) -> None:
    reject(tmp_path, whole[:30] + b"\xff" + whole[31:], "damaged at byte 24")


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidRecording, match="No such file") as caught:
        Recording.open(tmp_path / "none")
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(InvalidRecording, match="cannot be read"):
        Recording.open(tmp_path)
    with pytest.raises(InvalidRecording, match="cannot be read"):
        Recording.open("a\0b")


BODIES = {
    "no runs where some were announced": (number(0) * 7 + number(5) + b"\x00", "runs do not fit"),
    "numbers over": (number(0) * 7 + number(1) + b"\x00\x01\x01\x01", "numbers were announced"),
    "outside of all addresses": (number(0) * 7 + number(1) + b"\x00" + number(1 << 60) + b"\x00", "address space"),
    "runs that touch": (number(0) * 7 + number(2) + b"\x00" + b"\x05\x00\x00\x00", "in the one form"),
    "more pages than a cell has": (number(0) * 6 + number(1) + number(1) + b"\x00\x05\x00\x02", "in the one form"),
    "cells that are too large": (number(0) * 6 + number(41) + number(0) + b"\x00", "cells of"),
    "another packing": (number(0) * 8 + b"\x02", "packing method 2"),
    "no zlib": (number(0) * 8 + b"\x01\x05abc", "damaged"),
    "a bomb": (number(0) * 8 + b"\x01\x05" + zlib.compress(bytes(100_000)), "does not unpack to 5 bytes"),
    "nothing at all": (b"", "ends too early"),
}


@pytest.mark.parametrize("name", BODIES)
def test_an_epoch_that_cannot_be(name: str) -> None:
    body, why = BODIES[name]
    recording = Recording(bytes(Header(12, 0.0)) + record(3, body))
    with pytest.raises(InvalidRecording, match=why):
        recording[0]


@pytest.mark.parametrize(
    ("kind", "body", "why"),
    [
        (2, b"\x00" + number(1) + number(0), "mapping 0 of 0 cannot have gone"),
        (2, b"\x00" + number(0) + number(1) + number(0) * 4 + number(3) + number(0) * 4, "state 3"),
        (2, b"\x00" + number(0) + number(9), "ends too early"),
        (2, b"\x00" + number(0) + number(0) + b"x", "are over"),
        (1, b"\x00", "ends too early"),
        (4, b"\x00\x00\x05abc", "ends too early"),
    ],
)
def test_other_records_that_cannot_be(kind: int, body: bytes, why: str) -> None:
    with pytest.raises(InvalidRecording, match=why):
        Recording(bytes(Header(12, 0.0)) + record(kind, body))


def test_a_header_that_cannot_be() -> None:
    head = struct.pack("<3sBB7xd", b"DTR", 1, 60, 0.0)
    with pytest.raises(InvalidRecording, match="header"):
        Recording(head + struct.pack("<I", zlib.crc32(head)))


def test_pages_of_another_size(tmp_path: Path) -> None:
    path = tmp_path / "r"
    path.write_bytes(bytes(Header(16, 0.0)))
    assert Recording.open(path).page_bytes == 65536
    with pytest.raises(InvalidRecording, match="pages of 65536 bytes"):
        RecordingWriter(path, append=True)


# ---- where it cannot be written


def test_two_writers(tmp_path: Path) -> None:
    path = tmp_path / "r"
    with RecordingWriter(path) as first:
        for append in (True, False):
            with pytest.raises(InvalidRecording, match="by another recorder"):
                RecordingWriter(path, append=append)
        first.write(runs_of({1}), (), number=1, begun=0.0, ended=1.0)
    assert len(Recording.open(path)) == 1
    with pytest.raises(SessionClosed):
        first.write(runs_of({1}), (), number=2, begun=1.0, ended=2.0)
    RecordingWriter(path).close()
    assert len(Recording.open(path)) == 0


@pytest.mark.parametrize(
    ("runs", "times", "why"),
    [
        (runs_of({1}), {"begun": float("nan")}, "begun is a time"),
        (runs_of({1}), {"ended": float("inf")}, "ended is a time"),
        (runs_of({1}), {"collect_seconds": -1.0}, "collect_seconds is a time"),
        (memoryview(array("Q", [4096, 4100])), {}, "whole pages"),
        (memoryview(array("Q", [8192, 4096])), {}, "sorted"),
        (memoryview(array("Q", [4096, 8192, 8192, 12288])), {}, "disjoint"),
        (memoryview(array("Q", [4096])), {}, "pairs"),
        (memoryview(array("d", [4096.0, 8192.0])), {}, "pairs"),
    ],
)
def test_an_epoch_that_is_none(tmp_path: Path, runs: memoryview, times: dict[str, float], why: str) -> None:
    with RecordingWriter(tmp_path / "r") as writer:
        with pytest.raises(InvalidRecording, match=why):
            begun, ended = times.get("begun", 0.0), times.get("ended", 1.0)
            writer.write(
                runs, (), number=1, begun=begun, ended=ended, collect_seconds=times.get("collect_seconds", 0.0)
            )
        writer.write(runs_of({1}), (), number=1, begun=0.0, ended=1.0)
    assert [epoch.number for epoch in Recording.open(tmp_path / "r")] == [1]


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in ("/dev/null", fifo, tmp_path):
        with pytest.raises(InvalidRecording, match="no regular file"):
            RecordingWriter(path)
    assert Path("/dev/null").is_char_device()


def test_no_such_folder_and_too_small_a_budget(tmp_path: Path) -> None:
    with pytest.raises(InvalidRecording, match="No such file"):
        RecordingWriter(tmp_path / "none" / "r")
    with pytest.raises(InvalidRecording, match="takes 16384 at least"):
        RecordingWriter(tmp_path / "r", size_budget=1000)
    assert not list(tmp_path.iterdir())


FULL = """
import os, resource, signal, sys
sys.path.insert(0, sys.argv[2])
from tests.recorded import runs_of
from dirtytrack.errors import LimitReached
from dirtytrack.observe import Recording, RecordingWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
writer = RecordingWriter(sys.argv[1])
written = 0
try:
    while True:
        writer.write(runs_of(set(range(0, 600, 2 + written % 3))), (), number=written + 1, begun=0.0, ended=1.0)
        written += 1
except LimitReached as error:
    assert "Make room" in str(error)
assert written
assert len(Recording.open(sys.argv[1])) == written
assert not Recording.open(sys.argv[1]).torn_nbytes
"""


def test_a_full_disk_leaves_what_was_written(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, tmp_path / "r", Path(__file__).parents[2]],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


UNPRIVILEGED = """
import os, sys
from dirtytrack.errors import PermissionDenied
from dirtytrack.observe import Recording, RecordingWriter
if os.getuid() == 0:
    os.setresuid(65534, 65534, 65534)
for call in (Recording.open, RecordingWriter):
    try:
        call(sys.argv[1])
    except PermissionDenied as error:
        print(error)
"""


def test_no_permission(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o755)
    write(folder / "r", [])
    (folder / "r").chmod(0)
    folder.chmod(0o500)
    for above in [tmp_path, *tmp_path.parents]:
        if above.owner() == Path.home().owner() and not above.stat().st_mode & 0o001 and above != Path("/"):
            above.chmod(above.stat().st_mode | 0o011)
    done = subprocess.run(
        [sys.executable, "-c", UNPRIVILEGED, folder / "r"], capture_output=True, text=True, check=False
    )
    folder.chmod(0o700)
    assert done.stdout.count("Permission denied") == 2, done.stdout + done.stderr
    assert issubclass(PermissionDenied, PermissionError)

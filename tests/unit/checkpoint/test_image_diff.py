# SPDX-License-Identifier: MIT
"""What two images differ in, against a comparison of every page; and which objects those bytes are of."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dirtytrack.checkpoint import DirectoryStore
from dirtytrack.checkpoint.images import ImageComparison, MappedRange, MappingDifference, compare_images
from dirtytrack.cli import main
from dirtytrack.errors import InvalidCheckpoint, NoSuchGeneration
from tests.imaged import PAGE, Area, History, thread
from tests.storing import save

BASE = 0x5555_0000_0000
SOURCE = """
int counter = 5; double table[600]; static short pair[2] = {1, 2}; char text[40] = "abc"; long alias;
extern long other __attribute__((alias("alias")));
int main(void) { return counter + (int)table[0] + pair[0] + text[0]; }
"""


def pages(count: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(count * PAGE)


def known(area: Area, page: int) -> bytes | str | None:
    """A page's bytes, ``"file"``, or None where nobody knows."""
    for first, data in area.data.items():
        if first <= page < first + len(data) // PAGE:
            return data[(page - first) * PAGE : (page - first + 1) * PAGE]
    if area.why == "file":
        return "file"
    return bytes(PAGE) if area.why is None else None


def part_of(areas: Sequence[Area], place: MappedRange) -> Area:
    """The part of a mapping that is there."""
    area = next(area for area in areas if area.start <= place.start < area.end)
    first, count = (place.start - area.start) // PAGE, (place.end - place.start) // PAGE
    kept = ((page, known(area, page)) for page in range(first, first + count))
    data = {page - first: each for page, each in kept if isinstance(each, bytes)}
    part = replace(area, start=place.start, pages=count, data=data, offset=area.offset + first * PAGE)
    part.why = part.why or "all of it is here"
    return part


def truth(older: Sequence[Area], newer: Sequence[Area], file: bytes = b"") -> dict[str, Any]:
    """By brute force: the addresses of pages that differ, how many bytes, and how many are not known."""
    changed, nbytes, unknown = set[int](), 0, 0
    for one in older:
        for other in newer:
            for address in range(max(one.start, other.start), min(one.end, other.end), PAGE):
                same_file = (one.path, one.offset - one.start) == (other.path, other.offset - other.start)
                if (one.path.startswith("/") or other.path.startswith("/")) and not same_file:
                    continue
                both = [known(area, (address - area.start) // PAGE) for area in (one, other)]
                if both[0] == both[1] == "file":
                    continue
                at = one.offset + address - one.start
                before, after = (file[at : at + PAGE] if each == "file" else each for each in both)
                if not before or not after:
                    unknown += PAGE
                    continue
                differing = sum(a != b for a, b in zip(before, after, strict=True))
                nbytes += differing
                if differing:
                    changed.add(address)
    return {"changed": changed, "nbytes": nbytes, "unknown": unknown}


def told(found: ImageComparison) -> dict[str, Any]:
    rows = found.mappings
    for row in rows:
        assert row.changed_pages == sum(n for _, n in row.runs) // PAGE
        ends = [start + n for start, n in row.runs]
        assert all(end < start for end, (start, _) in zip(ends, row.runs[1:], strict=False))
    return {
        "changed": {at for row in rows for start, n in row.runs for at in range(start, start + n, PAGE)},
        "nbytes": found.changed_nbytes,
        "unknown": sum(row.unknown_nbytes for row in rows),
    }


def the(found: ImageComparison, what: str) -> list[MappingDifference]:
    return [row for row in found.mappings if row.what == what]


@pytest.mark.parametrize("seed", range(6))
def test_each_pair_of_generations_against_every_page(where: Path, seed: int) -> None:
    draw = random.Random(seed)
    path = where / "file"
    path.write_bytes(pages(40, 99))

    def layout(last: Sequence[Area]) -> list[Area]:
        areas, at = list[Area](), BASE
        for number in range(12):
            at += draw.choice((0, 0, 1, 3)) * PAGE
            kept = [area for area in last if area.start == at]
            if kept and draw.random() < 0.7:
                area = kept[0].copy()
                if draw.random() < 0.3 and not area.path:
                    area.pages += 1 + draw.randrange(5)
            else:
                area = Area(at, draw.randrange(1, 30), why=draw.choice((None, None, None, "excluded")))
                if draw.random() < 0.3:
                    area = Area.of_file(path, at, area.pages, offset=(at - BASE) % (10 * PAGE))
                if draw.random() < 0.7:
                    first = draw.randrange(area.pages)
                    area.data[first] = pages(draw.randrange(1, area.pages - first + 1), number)
            for first, data in area.data.items():
                fresh = bytearray(data)
                for _ in range(draw.randrange(4)):
                    fresh[draw.randrange(len(fresh))] ^= draw.randrange(2)
                if draw.random() < 0.2:
                    fresh[:PAGE] = bytes(PAGE)
                area.data[first] = bytes(fresh)
            areas.append(area)
            at = area.end
        return areas

    history, areas = History(where / "store"), list[Area]()
    for _ in range(4):
        areas = layout(areas)
        history.save(areas)
    for older, before in history.areas.items():
        for newer, after in history.areas.items():
            found = compare_images(history.store, older, newer, objects=False, memory_bytes=8 << 20)
            for row in the(found, "moved"):
                assert row.older and row.newer
                parts = [part_of(areas_of, place) for areas_of, place in ((before, row.older), (after, row.newer))]
                parts[0].start = parts[1].start
                assert told(found._replace(mappings=(row,))) == truth(parts[:1], parts[1:], path.read_bytes())
            at_home = found._replace(mappings=tuple(row for row in found.mappings if row.what != "moved"))
            assert told(at_home) == truth(before, after, path.read_bytes()), (older, newer)
            assert older != newer or {row.what for row in found.mappings} == {"same"}
            for side, areas_of in (("older", before), ("newer", after)):  # each page is told of once
                places = sorted((p.start, p.end) for row in found.mappings if (p := getattr(row, side)))
                wanted = [(area.start, area.end) for area in areas_of]
                assert sum(end - start for start, end in places) == sum(end - start for start, end in wanted)
                assert all(one[1] <= other[0] for one, other in pairwise(places))


def test_what_becomes_of_mappings(where: Path) -> None:
    history = History(where / "store")
    moving = {0: bytes(PAGE) + pages(7, 5)}
    older = [
        Area(BASE, 4, {0: pages(4, 1)}),
        Area(BASE + 10 * PAGE, 4, {0: pages(4, 2)}, path="[heap]"),
        Area(BASE + 30 * PAGE, 8, {0: pages(8, 3)}),
        Area(BASE + 50 * PAGE, 8, moving),
        Area(BASE + 70 * PAGE, 2, {0: pages(2, 4)}),
        Area(BASE + 80 * PAGE, 3, {0: pages(3, 6)}, path="/gone/file", inode=5, why="file"),
    ]
    newer = [
        Area(BASE, 4, {0: pages(4, 1)}, permissions="r--p"),
        Area(BASE + 10 * PAGE, 6, {0: pages(6, 2)}, path="[heap]"),
        Area(BASE + 30 * PAGE, 3, {0: pages(3, 3)}),
        Area(BASE + 75 * PAGE, 2),
        Area(BASE + 90 * PAGE, 3, {0: pages(3, 6)}, path="/gone/file", inode=5, why="file"),
        Area(BASE + 150 * PAGE, 9, {0: moving[0][: 7 * PAGE] + pages(2, 8)}),
    ]
    history.save(older, [thread(100), thread(101)])
    history.save(newer, [thread(100), thread(102), thread(103)])
    found = compare_images(history.store, 1, 2)
    rows = [
        (row.what, row.older and row.older.start - BASE, row.newer and row.newer.start - BASE) for row in found.mappings
    ]
    assert [(what, *(at if at is None else at // PAGE for at in places)) for what, *places in rows] == [
        ("changed", 0, 0),
        ("same", 10, 10),
        ("grown", None, 14),
        ("same", 30, 30),
        ("shrunk", 33, None),
        ("vanished", 70, None),
        ("appeared", None, 75),
        ("moved", 80, 90),
        ("moved", 50, 150),
        ("grown", None, 158),
    ]
    (first,) = the(found, "changed")
    assert first.changed_nbytes == 0 and first.older and first.newer
    assert (first.older.permissions, first.newer.permissions) == ("rw-p", "r--p")
    assert the(found, "moved")[1].runs == ((BASE + 157 * PAGE, PAGE),)
    assert found.threads_begun == (102, 103) and found.threads_ended == (101,)
    assert found.changed_pages == 1


def test_what_is_now_where_something_moved_away(where: Path) -> None:
    history = History(where / "store")
    history.save([Area(BASE, 8, {0: pages(8)})])
    file = Area(BASE, 8, path="/gone/file", inode=5, why="file")
    history.save([file, Area(BASE + 50 * PAGE, 8, {0: pages(8)})])
    rows = compare_images(history.store, 1, 2).mappings
    assert [(row.what, row.newer and row.newer.start - BASE) for row in rows] == [
        ("appeared", 0),
        ("moved", 50 * PAGE),
    ]


def test_what_a_file_has_is_compared_as_long_as_it_is_that_file(where: Path) -> None:
    path = where / "file"
    path.write_bytes(pages(4, 1))
    area = Area.of_file(path, BASE, 4)
    history = History(where / "store")
    history.save([area])
    own = bytearray(pages(4, 1)[PAGE : 2 * PAGE])
    own[7] ^= 1
    area.data[1] = bytes(own)
    history.save([area])
    (row,) = compare_images(history.store, 1, 2, objects=False).mappings
    assert (row.what, row.changed_nbytes, row.runs, row.unknown_nbytes) == ("changed", 1, ((BASE + PAGE, PAGE),), 0)
    path.write_bytes(pages(4, 1))  # who knows what it was before
    os.utime(path, (1e11, 1e11))
    (row,) = compare_images(history.store, 1, 2, objects=False).mappings
    assert (row.what, row.changed_nbytes, row.unknown_nbytes) == ("same", 0, 4 * PAGE)
    area.permissions = "rw-s"
    history.save([area])
    (row,) = compare_images(history.store, 3, 3, objects=False).mappings
    assert row.unknown_nbytes == 3 * PAGE


def test_what_is_in_common_is_not_read(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = History(where / "store")
    data = bytearray(pages(9000))
    for _ in range(2):
        history.save([Area(BASE, 9000, {0: bytes(data)})])
        data[5000 * PAGE] ^= 1
    read = 0
    preadv = os.preadv

    def counting(*args: Any) -> int:
        nonlocal read
        read += (done := preadv(*args))
        return done

    monkeypatch.setattr(os, "preadv", counting)
    (row,) = compare_images(history.store, 1, 2, objects=False).mappings
    assert row.runs == ((BASE + 5000 * PAGE, PAGE),) and row.changed_nbytes == 1
    assert read < 4 << 20


def test_images_of_two_processes_are_told(where: Path) -> None:
    history = History(where / "store")
    for pid in (100, 100, 101):
        history.save([Area(BASE, 1, {0: pages(1)})], pid=pid)
    assert not compare_images(history.store, 1, 2).notes
    (note,) = compare_images(history.store, 2, 3).notes
    assert note == "these are images of two processes, 100 (/nowhere/never) and 101 (/nowhere/never)"


def test_what_is_not_compared(where: Path) -> None:
    history = History(where / "store")
    history.save([Area(BASE, 1, {0: pages(1)})])
    with history.store.writer() as writer:
        save(writer, history.store, {"x": pages(1)})
    with pytest.raises(NoSuchGeneration):
        compare_images(history.store, 1, 9)
    with pytest.raises(InvalidCheckpoint, match="no image of a process"):
        compare_images(history.store, 1, 2)
    with pytest.raises(InvalidCheckpoint, match="threads="):
        compare_images(history.store, 1, 1, threads=0)
    with pytest.raises(InvalidCheckpoint, match="memory_bytes="):
        compare_images(history.store, 1, 1, memory_bytes=5)


# ---- objects


def compiled(where: Path, *options: str) -> tuple[Path, dict[str, tuple[int, int]], list[tuple[int, int, int, str]]]:
    """A program, its objects by name, and its segments: offset, address, bytes in memory, permissions."""
    path = where / "program"
    (where / "program.c").write_text(SOURCE)
    subprocess.run(["cc", "-O1", *options, where / "program.c", "-o", path], check=True)
    os.utime(path, (1, 1))
    listed = subprocess.run(["readelf", "-sW", path], check=True, capture_output=True, text=True).stdout
    objects = {
        words[7]: (int(words[1], 16), int(words[2]))
        for words in map(str.split, listed.splitlines())
        if len(words) == 8 and words[3] == "OBJECT"
    }
    listed = subprocess.run(["readelf", "-lW", path], check=True, capture_output=True, text=True).stdout
    segments = [
        (int(words[1], 16), int(words[2], 16), int(words[5], 16), "".join(words[6:-1]).lower().replace("e", "x"))
        for words in map(str.split, listed.splitlines())
        if words and words[0] == "LOAD"
    ]
    return path, objects, segments


def loaded(
    path: Path, segments: Sequence[tuple[int, int, int, str]], bias: int, changed: Mapping[int, bytes]
) -> list[Area]:
    """As the kernel maps it, the last segment written to: which has .data and .bss."""
    file = path.read_bytes()
    areas = []
    for offset, address, nbytes, flags in segments:
        start, end = address // PAGE * PAGE, -(-(address + nbytes) // PAGE) * PAGE
        permissions = "".join(each if each in flags else "-" for each in "rwx") + "p"
        area = Area.of_file(path, start + bias, (end - start) // PAGE, permissions=permissions)
        area.offset = offset // PAGE * PAGE
        if "w" in flags:
            data = bytearray(file[area.offset : area.offset + end - start].ljust(end - start, b"\0"))
            for at, value in changed.items():
                data[at - start : at - start + len(value)] = value
            area.data[0] = bytes(data)
        areas.append(area)
    return areas


@pytest.mark.parametrize("options", [("-pie", "-fPIE"), ("-no-pie",)])
def test_objects_by_name(where: Path, options: tuple[str, ...]) -> None:
    path, objects, segments = compiled(where, *options)
    bias = 0 if "-no-pie" in options else BASE
    history = History(where / "store")
    counter, table, text = (objects[name][0] for name in ("counter", "table", "text"))
    changes: dict[int, bytes] = {counter: b"\5\0\0\0"}
    history.save(loaded(path, segments, bias, changes))
    changes |= {counter: b"\7\1\0\0", table + 8 * 500: b"12345678", text: b"x", objects["alias"][0]: b"\1"}
    history.save(loaded(path, segments, bias, changes))
    found = compare_images(history.store, 1, 2)
    rows = {each.name: each for each in found.objects}
    assert rows.keys() - {"other"} == {"counter", "table", "text", "alias"} - ({"alias"} if "other" in rows else set())
    assert [each.address for each in found.objects] == sorted(each.address for each in found.objects)
    for name, each in rows.items():
        assert (each.address - bias, each.nbytes, each.module) == (*objects[name], str(path))
    assert (rows["counter"].changed_nbytes, rows["counter"].older, rows["counter"].newer) == (2, "05000000", "07010000")
    assert (rows["table"].changed_nbytes, rows["table"].older) == (8, None)
    assert not found.notes
    assert not compare_images(history.store, 1, 2, objects=False).objects

    os.utime(path, (1e11, 1e11))  # who knows what was written
    found = compare_images(history.store, 1, 2)
    assert not found.objects and "was written since" in found.notes[0]
    path.unlink()
    found = compare_images(history.store, 1, 2)
    assert not found.objects and "not there any more" in found.notes[0] and found.changed_pages


def test_a_file_of_another_build(where: Path) -> None:
    path, objects, segments = compiled(where, "-Wl,--build-id=0x" + "11" * 20)
    history = History(where / "store")
    first = loaded(path, segments, BASE, {objects["counter"][0]: b"\6"})
    first[0].data[0] = path.read_bytes()[:PAGE]
    history.save(first)
    second = [area.copy() for area in loaded(path, segments, BASE, {objects["counter"][0]: b"\7"})]
    second[0].data[0] = first[0].data[0].replace(b"\x11" * 20, b"\x22" * 20)
    history.save(second)
    found = compare_images(history.store, 1, 2)
    assert not found.objects and "its build ID differs" in found.notes[0]
    assert [each.name for each in compare_images(history.store, 2, 1).objects] == ["counter"]


def test_without_pyelftools_the_mappings_are_compared_all_the_same(
    where: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, objects, segments = compiled(where)
    history = History(where / "store")
    for value in (b"\6", b"\7"):
        history.save(loaded(path, segments, BASE, {objects["counter"][0]: value}))
    monkeypatch.setitem(sys.modules, "elftools.elf", None)
    found = compare_images(history.store, 1, 2)
    assert found.changed_nbytes == 1 and not found.objects
    assert "dirtytrack[symbols]" in found.notes[0]


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"\x7fELF\2\1\1" + bytes(9) + b"\xff" * 200, os.urandom(5000)])
def test_a_file_that_is_no_elf(where: Path, content: bytes) -> None:
    path = where / "program"
    path.write_bytes(content)
    history = History(where / "store")
    for seed in range(2):
        history.save([Area.of_file(path, BASE, 1, {0: pages(1, seed)}, permissions="rwxp")])
    found = compare_images(history.store, 1, 2)
    assert not found.objects and "cannot be read as ELF" in found.notes[0]


# ---- the command


def test_the_command(where: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path, objects, segments = compiled(where)
    history = History(where / "store")
    counter = objects["counter"][0]
    for value in (5, 300):
        areas = loaded(path, segments, BASE, {counter: value.to_bytes(4, "little")})
        history.save([*areas, Area(0x7FFF_0000_0000, value // 100 + 1, {0: pages(1)}, path="[stack]")])
    monkeypatch.chdir(where)
    assert main(["ckpt", "diff", "store", "1", "2"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^{path} +changed +0x5\w+-0x5\w+ +\S+ KiB +1 +2$", out, re.MULTILINE), out
    assert re.search(r"^\[stack\] +grown +0x7\w+-0x7\w+ +12\.0 KiB$", out, re.MULTILINE), out
    assert re.search(r"^counter +program +0x5\w+ +4 B +2 +5 +300$", out, re.MULTILINE), out
    assert main(["ckpt", "diff", "store", "1", "2", "--json", "--runs"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["changed_pages"] == 1 and found["objects"][0]["name"] == "counter"
    (changed,) = [each for each in found["mappings"] if each["what"] == "changed"]
    assert changed["runs"] == [[(BASE + counter) // PAGE * PAGE, PAGE]]
    with DirectoryStore(where / "plain", create=True) as store, store.writer() as writer:
        save(writer, store, {"x": pages(1)})
        save(writer, store, {"x": pages(1, 2)})
    assert main(["ckpt", "diff", "plain", "1", "2"]) == 0
    assert capsys.readouterr().out.startswith("BUFFER")

# SPDX-License-Identifier: MIT
"""Images of running processes: each generation is what the process was, byte by byte."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from dirtytrack import PageCategory, Pagemap
from dirtytrack.checkpoint import Retention, compact, generations, verify
from dirtytrack.checkpoint.images import ProcessCheckpointer
from dirtytrack.errors import CheckpointerClosed, InvalidCheckpoint, InvalidMemory, StoreBusy, TargetGone
from tests.kernel import pressure
from tests.programs.imaged import PAGE, Imaged, is_true, waits_for_a_line
from tests.programs.targets import is_unharmed, running
from tests.programs.test_attach import Memory

WALK = ("map", "map", "write", "write", "unmap", "grow", "move", "again", "discard", "part")


class Settled(Memory):
    """As `Memory`; when it has answered, it does nothing more."""

    def do(self, *words: object) -> int:
        at = super().do(*words)
        waits_for_a_line(self.pid)
        return at

    def ask(self, line: str) -> int:
        at = int(self.program.ask(line), 16)
        waits_for_a_line(self.pid)
        return at


@pytest.fixture
def memory() -> Iterator[Settled]:
    with running("pages") as program:
        memory = Settled(program)
        os.sched_setaffinity(program.pid, {0})  # the kernel notes in its memory which processor it is on: rseq
        memory.ask("nothing")
        yield memory


def test_each_generation_is_what_the_process_was(memory: Settled, tmp_path: Path) -> None:
    store = tmp_path / "store"
    at = memory.do("map", 300)
    with ProcessCheckpointer(store, memory.pid) as ckpt:
        first = ckpt.save({"step": 1})
        assert first.kind == "full"
        assert 0 < first.frozen_seconds < 5
        assert is_true(Imaged(store), memory.pid) > 300 * PAGE
        for page in (0, 7, 299):
            memory.do("write", at, page)
        second = ckpt.save()
        assert second.kind == "increment"
        assert second.bytes_written < first.bytes_written
        assert second.bytes_frozen < 100 * PAGE + first.bytes_frozen - 300 * PAGE
        assert is_true(Imaged(store), memory.pid)
        assert Imaged(store).read(at + 7 * PAGE, 1) == b"\2"
    before = Imaged(store, first.generation)
    assert before.read(at + 7 * PAGE, 1) == b"\1"
    assert before.manifest.meta == {"step": 1}
    assert [each.kind for each in generations(store)] == ["full", "increment"]
    assert verify(store, all=True).ok


def test_mappings_that_come_go_grow_shrink_and_move(memory: Settled, tmp_path: Path) -> None:
    store = tmp_path / "store"
    places = [memory.do("map", 50) for _ in range(4)]
    with ProcessCheckpointer(store, memory.pid) as ckpt:

        def saved() -> None:
            image = ckpt.save()
            assert is_true(Imaged(store), memory.pid)
            kinds.append(image.kind)

        kinds: list[str] = []
        saved()
        memory.do("unmap", places[0], 50)
        saved()
        places[0] = memory.do("map", 20)
        saved()
        places[1] = memory.do("grow", places[1], 50, 90)
        memory.do("write", places[1], 89)
        saved()
        places[1] = memory.do("grow", places[1], 90, 30)
        saved()
        places[2] = memory.do("move", places[2], 50)
        saved()
        memory.do("again", places[3], 50)
        memory.do("write", places[3], 3)
        saved()
        memory.do("discard", places[2], 5)
        saved()
        memory.do("unmap", places[3] + 10 * PAGE, 5)
        saved()
        for pages in (40, 100, -60, 30):
            assert memory.ask(f"brk {pages}")
            saved()
        saved()
        assert kinds == ["full"] + ["increment"] * (len(kinds) - 1)
        count = ckpt.generation
    assert count is not None
    for generation in range(1, count + 1):
        Imaged(store, generation)
    is_last = Imaged(store)
    compact(store)
    assert Imaged(store).manifest.kind == "compacted"
    for mapping, same in zip(is_last.mappings, Imaged(store).mappings, strict=True):
        for (start, data), (where, other) in zip(is_last.parts(mapping), Imaged(store).parts(same), strict=True):
            assert (start, data) == (where, other)


def test_memory_that_is_not_tracked(memory: Settled, tmp_path: Path) -> None:
    """Files, shared memory, what another userfaultfd has, and what may not even be read."""
    store, path = tmp_path / "store", tmp_path / "file"
    path.write_bytes(bytes(40 * PAGE))
    shared = memory.do("share", 64)
    file = memory.ask(f"file {path} 40")
    busy, hidden, locked = (memory.do("map", 16) for _ in range(3))
    assert memory.do("busy", busy, 16)
    with ProcessCheckpointer(store, memory.pid) as ckpt:
        for step in range(3):
            for place in (shared, file, busy, locked):
                memory.do("write", place, step)
            memory.ask(f"rights {locked:x} 16 0")
            memory.ask(f"hide {hidden:x} 16 {int(step == 1)}")
            image = ckpt.save()
            assert image.kind == ("increment" if step else "full")
            assert is_true(Imaged(store), memory.pid)
            found = Imaged(store)
            for place in (shared, file, busy, locked):
                assert found.read(place + step * PAGE, 1) == b"\2"
            assert found.mapping_at(hidden)["why"] == ("dont dump" if step == 1 else None)
            memory.ask(f"rights {locked:x} 16 3")
        memory.do("punch", shared, 2)
        memory.do("discard", file, 1)
        ckpt.save()
        assert is_true(Imaged(store), memory.pid)
        assert ckpt.save().bytes_written < 200 * PAGE


def test_what_was_never_populated_stays_so(memory: Settled, tmp_path: Path) -> None:
    at = memory.ask(f"reserve {1 << 18}")
    memory.do("write", at, 1000)

    def populated() -> int:
        lines = Path(f"/proc/{memory.pid}/status").read_text().splitlines()
        return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("VmRSS", "VmPTE")))

    with ProcessCheckpointer(tmp_path / "store", memory.pid) as ckpt:
        before = populated()
        assert ckpt.save().bytes_written < 64 << 20
        assert populated() - before < 1 << 20
        memory.do("write", at, 200_000)
        ckpt.save()
        assert populated() - before < 1 << 20
    image = Imaged(tmp_path / "store")
    assert image.read(at + 1000 * PAGE, 1) == image.read(at + 200_000 * PAGE, 1) == b"\1"
    assert image.read(at, PAGE) == bytes(PAGE)


@pytest.mark.parametrize("staging", [64 << 10, None], ids=["small", "usual"])
def test_every_image_is_of_one_instant(tmp_path: Path, staging: int | None) -> None:
    threads, pairs = 3, 64
    store = tmp_path / "store"
    with running("consistent", threads) as program:
        first, second, tallies, told = (int(word, 16) for word in program.answer().split())
        known = set[int]()
        with ProcessCheckpointer(store, program.pid, staging_bytes=staging, precopy_bytes=256 << 10) as ckpt:
            for _ in range(6):
                image = ckpt.save()
                found = Imaged(store, image.generation)
                places = range(0, threads * pairs * PAGE, PAGE)
                values = [(found.word(first + at), found.word(second + at)) for at in places]
                assert all(a in (b, b + 1) for a, b in values)
                for thread in range(threads):
                    done, total = struct.unpack("<2Q", found.read(tallies + thread * PAGE, 16))
                    mine = [b for _, b in values[thread * pairs : (thread + 1) * pairs]]
                    assert sum(mine) in (done, done + 1)
                    assert done in (total, total + 1)
                at, pages, value = struct.unpack("<3Q", found.read(told, 24))
                if at:
                    assert found.read(at, pages * PAGE) == struct.pack("<Q", value) * (pages * PAGE // 8)
                    known.add(value)
                assert len(found.program["threads"]) == threads + 2
            assert known
        is_unharmed(program)
    assert verify(store, all=True).ok


def test_an_increment_of_many_pages_is_copied_before(memory: Settled, tmp_path: Path) -> None:
    at = memory.do("map", 4000)
    with ProcessCheckpointer(tmp_path / "store", memory.pid, precopy_bytes=1 << 20) as ckpt:
        first = ckpt.save()
        assert first.rounds
        assert first.bytes_precopied >= 4000 * PAGE
        assert first.bytes_frozen < 8 << 20
        assert is_true(Imaged(tmp_path / "store"), memory.pid)
        for page in range(1000):
            memory.do("write", at, page)
        second = ckpt.save()
        assert second.bytes_precopied >= 1000 * PAGE
        assert is_true(Imaged(tmp_path / "store"), memory.pid)
        ckpt.save(full=True)
        assert is_true(Imaged(tmp_path / "store"), memory.pid)


def test_a_random_walk(memory: Settled, tmp_path: Path) -> None:
    chance = random.Random(7)
    places: dict[int, int] = {}
    store = tmp_path / "store"
    with ProcessCheckpointer(store, memory.pid, precopy_bytes=64 << 10, compact=0.5) as ckpt:
        for _ in range(12):
            for _ in range(chance.randrange(1, 12)):
                what = chance.choice(
                    ["map", "map", "write", "write", "unmap", "grow", "move", "again", "discard", "part"]
                )
                if what == "map" or not places:
                    pages = chance.randrange(1, 120)
                    places[memory.do("map", pages)] = pages
                    continue
                at = chance.choice(list(places))
                pages = places.pop(at)
                if what == "unmap":
                    memory.do("unmap", at, pages)
                elif what == "part" and pages > 2:
                    memory.do("unmap", at + PAGE * (pages // 2), pages - pages // 2)
                    places[at] = pages // 2
                elif what == "grow":
                    more = chance.randrange(1, 150)
                    places[memory.do("grow", at, pages, more)] = more
                elif what in ("move", "again"):
                    places[memory.do(what, at, pages)] = pages
                else:
                    if what != "part":
                        memory.do(what, at, chance.randrange(pages))
                    places[at] = pages
            ckpt.save(full=chance.random() < 0.1)
            assert is_true(Imaged(store), memory.pid)
    assert verify(store, all=True).ok


def test_it_begins_anew_with_a_full_one(memory: Settled, tmp_path: Path) -> None:
    store = tmp_path / "store"
    for count in (1, 2):
        with ProcessCheckpointer(store, memory.pid, retain=Retention(last=3)) as ckpt:
            assert "generation None" in repr(ckpt)
            assert ckpt.save().kind == "full"
            assert ckpt.save().kind == "increment"
            assert ckpt.generation == 2 * count
            with pytest.raises(StoreBusy):
                ProcessCheckpointer(store, memory.pid)
    assert [each.generation for each in generations(store)] == [2, 3, 4]
    with pytest.raises(CheckpointerClosed):
        ckpt.save()
    assert memory.do("map", 1)


def test_what_is_in_swap(memory: Settled, tmp_path: Path) -> None:
    """There a page that was armed and never populated looks like one that is out."""

    def field(name: str) -> int:
        lines = Path(f"/proc/{memory.pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))

    store = tmp_path / "store"
    at, wide = memory.do("map", 400), memory.ask("reserve 4000")
    memory.do("write", wide, 70)
    with pressure.swap(tmp_path) as path, ProcessCheckpointer(store, memory.pid, precopy_bytes=64 * PAGE) as ckpt:
        for step in range(3):
            memory.do("write", at, step)
            memory.ask(f"out {at:x} 400")
            memory.ask(f"out {wide:x} 4000")
            assert field("Swap") > 300 * PAGE
            ckpt.save()
            assert field("Rss") + field("Swap") < 5000 * PAGE
            with Pagemap(memory.pid) as pagemap:
                present = PageCategory.PRESENT
                found = pagemap.scan(wide, wide + 4000 * PAGE, category_mask=present, return_mask=present)
                assert step or found.page_count <= 16  # `is_true` reads all of it
            assert is_true(Imaged(store), memory.pid)
            assert Imaged(store).read(wide + 70 * PAGE, 1) == b"\1"
        pressure.swap_off(path)


def test_what_is_excluded(memory: Settled, tmp_path: Path) -> None:
    at, other = memory.do("map", 10), memory.do("share", 10)
    with ProcessCheckpointer(tmp_path / "store", memory.pid, exclude=["[heap]", (at, at + PAGE), "/dev/zero*"]) as ckpt:
        ckpt.save()
    image = Imaged(tmp_path / "store")
    assert image.mapping_at(at)["why"] == image.mapping_at(other)["why"] == "excluded"
    heap = next(each for each in image.mappings if each["path"] == "[heap]")
    assert heap["saved"] is None
    assert is_true(image, memory.pid)
    with pytest.raises(InvalidMemory):
        ProcessCheckpointer(tmp_path / "other", memory.pid, precopy_bytes=-1)
    with pytest.raises(InvalidMemory):
        ProcessCheckpointer(tmp_path / "other", memory.pid, staging_bytes=5)
    with pytest.raises(InvalidCheckpoint):
        ProcessCheckpointer(tmp_path / "other", memory.pid, compact=0)


def test_the_process_ends_or_replaces_itself(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with running("pages") as program, ProcessCheckpointer(store, program.pid) as ckpt:
        ckpt.save()
        program.process.stdin.write("exec\n")  # type: ignore[union-attr]
        program.process.stdin.flush()  # type: ignore[union-attr]
        assert program.answer() == "up"
        with pytest.raises(TargetGone, match="exec"):
            ckpt.save()
    with running("pages") as program:
        ckpt = ProcessCheckpointer(store, program.pid)
        ckpt.save()
    with pytest.raises(TargetGone, match="ended"):
        ckpt.save()
    ckpt.close()
    assert [each.generation for each in generations(store)] == [1, 2]
    report = verify(store, all=True)
    assert report.ok
    assert not report.strangers

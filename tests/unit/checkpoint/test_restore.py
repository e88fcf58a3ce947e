# SPDX-License-Identifier: MIT
"""Restoring: every generation is what it was, in every way it can be stored; what cannot be is refused, untouched."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dirtytrack
from dirtytrack.checkpoint import DirectoryStore, Retention, State, compact, generations, prune, restore
from dirtytrack.checkpoint.segments import FrameKind
from dirtytrack.errors import (
    DamagedCheckpoint,
    InvalidCheckpoint,
    InvalidMemory,
    NoSuchGeneration,
    PermissionDenied,
    StoreFailed,
)
from tests.generations import PAGE, History, Keyed
from tests.sandbox import run_in_child
from tests.storing import READS, Failing, Hooked, read_back

STORED: dict[str, dict[str, Any]] = {
    "plain": {},
    "without deltas": {"deltas": False},
    "zstd": {"compression": "zstd"},
    "encrypted": {"encrypt": Keyed(0x5A)},
    "zstd, encrypted": {"compression": "zstd", "encrypt": Keyed(0x5A)},
    "frames of one page": {"frame_bytes": PAGE},
}


def history(where: Path, seed: int = 1, **options: Any) -> History:
    """Eight generations, with buffers added, removed and replaced, one of them full."""
    made = History(DirectoryStore(where / "store", create=True), seed, **options)
    made.add("x", 40 * PAGE, "<f8", (40, 512))
    made.add("odd", 123_457)
    made.add("small", 10)
    made.save({"step": 0})
    for step in range(1, 8):
        made.write()
        if step == 3:
            made.add("odd", 5_000)
        if step == 4:
            made.remove("small")
            made.add("new", 17 * PAGE + 1)
        made.save({"step": step}, full=step == 6)
    return made


def buffers_for(contents: dict[str, bytes], fill: int = 0xEE) -> dict[str, bytearray]:
    return {name: bytearray([fill]) * len(data) for name, data in contents.items()}


def bytes_of(state: State) -> dict[str, bytes]:
    return {name: bytes(memoryview(state[name])) for name in state}


# ---- what comes back


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("stored", STORED)
def test_each_generation_is_what_it_was(where: Path, stored: str, threads: int) -> None:
    options = STORED[stored]
    made = history(where, **options)
    decrypt = options.get("encrypt")
    for generation, contents in made.truth.items():
        state = restore(made.store, generation=generation, threads=threads, decrypt=decrypt)
        assert bytes_of(state) == contents
        assert (state.generation, state.meta) == (generation, {"step": generation - 1})
        assert state.parent == (generation - 1 or None)
        into = buffers_for(contents)
        assert (
            restore(where / "store", generation=generation, into=into, threads=threads, decrypt=decrypt)["odd"]
            is (into["odd"])
        )
        assert into == contents


def test_restore_agrees_with_the_plainest_one(where: Path) -> None:
    for seed in range(2, 6):
        made = history(where / str(seed), seed, compression="zstd" if seed % 2 else None)
        for generation, contents in made.truth.items():
            assert bytes_of(restore(made.store, generation=generation)) == read_back(made.store, generation) == contents


def test_the_newest_comes_where_nothing_is_said_with_what_is_known_of_it(where: Path) -> None:
    made = history(where)
    state = restore(str(where / "store"))
    assert state.generation == 8 and state.meta == {"step": 7} and state.parent == 7 and not state.passed_over
    assert list(state) == ["x", "odd", "new"] == [region.name for region in state.regions] and len(state) == 3
    array = state["x"]
    assert array.dtype == np.float64 and array.shape == (40, 512) and array.flags.writeable
    assert array.tobytes() == made.truth[8]["x"]
    assert state.created == made.manifests[8].created
    assert "generation 8" in repr(state) and "nothing" not in state


def test_siblings_continue_one_base(where: Path) -> None:
    made = history(where)
    for parent in (2, 5, 2):
        made.memory = {name: bytearray(data) for name, data in made.truth[parent].items()}
        made.regions = {region.name: region for region in made.manifests[parent].regions}
        made.dirty = {name: set() for name in made.memory}
        made.write()
        number = made.save(parent=parent)
        assert made.manifests[number].parent == parent
    for generation, contents in made.truth.items():
        assert bytes_of(restore(made.store, generation=generation)) == contents


def test_only_the_buffers_that_are_given_are_restored(where: Path) -> None:
    made = history(where)
    into = np.zeros((40, 512))
    state = restore(made.store, into={"x": into})
    assert list(state) == ["x"] and state["x"] is into and into.tobytes() == made.truth[8]["x"]


def test_every_kind_of_buffer_can_be_given(where: Path) -> None:
    made = history(where)
    contents = made.truth[8]["x"]
    memory = dirtytrack.allocate(len(contents))
    raw = np.zeros(len(contents), np.uint8)
    buffer: Any
    plain: Any
    for buffer, plain in (
        (memory, memory),
        (memoryview(bytearray(len(contents))), None),
        ((raw.ctypes.data, raw.nbytes), raw),
    ):
        restore(made.store, into={"x": buffer}, threads=2)
        assert bytes(memoryview(buffer if plain is None else plain)) == contents


def test_zeros_are_restored_over_what_was_there(where: Path) -> None:
    made = History(DirectoryStore(where / "store", create=True))
    made.add("z", 64 * PAGE)
    made.memory["z"][:] = bytes(64 * PAGE)
    made.save()
    into = buffers_for(made.truth[1])
    restore(made.store, into=into)
    assert into == made.truth[1]


def test_it_works_where_the_kernel_cannot_track(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history(where)
    monkeypatch.setenv("DIRTYTRACK_TEST_STORE", str(where / "store"))
    run_in_child(restore_without_tracking, "no-pagemap-scan")


def restore_without_tracking() -> None:
    store = os.environ["DIRTYTRACK_TEST_STORE"]
    assert not dirtytrack.probe().tracking
    assert restore(store).generation == compact(store).generation == 8
    assert bytes_of(restore(store)) == bytes_of(restore(store, threads=1))


def test_progress_is_told_and_can_end_it(where: Path) -> None:
    made = history(where)
    seen: list[tuple[int, int]] = []
    restore(made.store, threads=2, progress=lambda done, total: seen.append((done, total)))
    assert seen and seen[-1][0] == seen[-1][1] > 0 and seen == sorted(seen)

    def enough(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for threads in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            restore(made.store, threads=threads, progress=enough)


def test_a_chain_is_longer_than_files_may_be_open(where: Path) -> None:
    made = History(DirectoryStore(where / "store", create=True))
    made.add("x", 8 * PAGE)
    for _ in range(50):
        made.write(1)
        made.save()
    script = (
        "import resource, sys; from dirtytrack.checkpoint import restore, compact\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))\n"
        "assert restore(sys.argv[1]).generation == 50; compact(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", script, where / "store"], check=True)
    assert bytes_of(restore(made.store)) == made.truth[50]


@pytest.mark.unsanitized("it keeps what was freed")
def test_it_takes_no_more_memory_than_the_buffers_and_the_frames_in_flight(where: Path) -> None:
    made = History(DirectoryStore(where / "store", create=True), compression="zstd", frame_bytes=1 << 20)
    made.add("x", 24 << 20)
    made.save()
    for _ in range(3):
        made.write(500)
        made.save()
    script = """
import resource, sys
from dirtytrack.checkpoint import restore
into = bytearray(b"x") * (24 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
restore(sys.argv[1], into={"x": into}, threads=2)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script, where / "store"], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 16 << 10, "KiB more than before, with the modules that were loaded"


# ---- what is refused, before anything is overwritten


def refused(where: Path, kind: type[Exception], match: str, into: Any = None, **options: Any) -> Exception:
    """The error; what was given is as it was."""
    before = {name: bytes(buffer) for name, buffer in (into or {}).items() if not isinstance(buffer, tuple)}
    with pytest.raises(kind, match=match) as caught:
        restore(where / "store", into=into, **options)
    assert before == {name: bytes(buffer) for name, buffer in (into or {}).items() if not isinstance(buffer, tuple)}
    return caught.value


def test_what_does_not_fit_is_refused(where: Path) -> None:
    made = history(where)
    good = buffers_for(made.truth[8])
    refused(where, InvalidMemory, "'x' has 10 bytes, in the checkpoint 163840", {**good, "x": bytearray(10)})
    refused(where, InvalidMemory, "of type .?<f4", {**good, "x": np.zeros((40, 1024), np.float32)})
    refused(where, InvalidMemory, "the shape", {**good, "x": np.zeros((512, 40))})
    refused(where, InvalidMemory, "no buffer 'y'", {**good, "y": bytearray(10)})
    refused(where, InvalidMemory, "read-only", {**good, "x": bytes(40 * PAGE)})
    refused(where, InvalidMemory, "not C-contiguous", {**good, "x": np.zeros((512, 40)).T})
    refused(where, InvalidMemory, "a mapping from names", {})
    both = bytearray(40 * PAGE)
    refused(where, InvalidMemory, "same memory", {"x": both, "new": memoryview(both)[: 17 * PAGE + 1]})
    refused(where, InvalidCheckpoint, "threads=", good, threads=0)


def test_an_error_does_not_pin_the_buffers(where: Path) -> None:
    made = history(where)
    buffer = bytearray(10)
    kept = [refused(where, InvalidMemory, "has 10 bytes", {"x": buffer})]
    buffer.extend(b"1234567890")
    buffer = bytearray(40 * PAGE)
    newest_segment(made, 7).write_bytes(newest_segment(made, 7).read_bytes()[:-10])
    damage(newest_segment(made, 8), 5000)
    for generation in (7, 8):
        with pytest.raises(DamagedCheckpoint) as caught:
            restore(where / "store", into={"x": buffer}, generation=generation)
        kept.append(caught.value)
        buffer.append(1)
        buffer.pop()


def test_what_is_not_there_is_refused(where: Path) -> None:
    made = history(where)
    good = buffers_for(made.truth[8])
    refused(where, NoSuchGeneration, "no generation 99; it has 1, 2", good, generation=99)
    refused(where, NoSuchGeneration, "no generation 0", good, generation=0)
    DirectoryStore(where / "empty" / "store", create=True).close()
    refused(where / "empty", NoSuchGeneration, "no checkpoint yet")
    refused(where / "nowhere", InvalidCheckpoint, "no store of checkpoints")
    (where / "else").mkdir()
    (where / "else" / "store").mkdir()
    (where / "else" / "store" / "file").write_text("mine")
    refused(where / "else", InvalidCheckpoint, "holds something else")


def test_a_newer_format_is_refused(where: Path) -> None:
    made = history(where)
    good = buffers_for(made.truth[8])
    path = where / "store" / "manifests" / made.manifests[8].name
    data = bytearray(path.read_bytes()[:-32])
    data[8] = 2
    from hashlib import sha256

    path.chmod(0o600)
    path.write_bytes(data + sha256(data).digest())
    refused(where, InvalidCheckpoint, "version 2.*update", good)
    assert generations(made.store)[-1].damage


def test_who_may_not_read_it_is_told(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history(where)
    where.chmod(0o755)
    monkeypatch.setenv("DIRTYTRACK_TEST_STORE", str(where / "store"))
    run_in_child(restore_without_permission, "nobody")


def restore_without_permission() -> None:
    into = {"x": bytearray(40 * PAGE)}
    with pytest.raises(PermissionDenied, match="belongs to who made it"):
        restore(os.environ["DIRTYTRACK_TEST_STORE"], into=into)
    assert not any(into["x"])


@pytest.mark.parametrize("stored", ["encrypted", "zstd, encrypted"])
def test_another_key_is_refused(where: Path, stored: str) -> None:
    made = history(where, **STORED[stored])
    refused(where, InvalidCheckpoint, "is encrypted: pass decrypt=", buffers_for(made.truth[8]))
    for key in range(256):
        if key != 0x5A:
            with pytest.raises(InvalidCheckpoint, match="another key"):
                restore(made.store, decrypt=Keyed(key))
    with pytest.raises(InvalidCheckpoint, match="returns bytes"):
        restore(made.store, decrypt=print)  # type: ignore[arg-type]

    def notices(data: bytes) -> bytes:
        raise ArithmeticError("the tag does not match")

    with pytest.raises(InvalidCheckpoint, match=r"refuses a frame \(ArithmeticError: the tag .* another key"):
        restore(made.store, decrypt=notices)


# ---- what is damaged


def damage(path: Path, at: int = -1) -> None:
    """Change a byte of a file."""
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def newest_segment(made: History, generation: int) -> Path:
    path: Path = made.store.path
    return path / "segments" / made.manifests[generation].segments[-1].name


def test_a_damaged_newest_is_refused_and_the_older_whole_one_named(where: Path) -> None:
    made = history(where)
    damage(newest_segment(made, 8), 4096 + 7)
    good = buffers_for(made.truth[8])
    with pytest.raises(DamagedCheckpoint, match="Generation 7 is whole: pass generation=7, or fallback=True") as caught:
        restore(made.store, into=good)
    error = caught.value
    assert (error.generation, error.whole) == (8, 7) and newest_segment(made, 8).name in error.damage[0]
    assert "may have been overwritten in part" in str(error)
    state = restore(made.store, fallback=True)
    assert state.generation == 7 and bytes_of(state) == made.truth[7]
    assert [(each.generation, each.damage) for each in state.passed_over] == [(8, error.damage)]
    state = restore(made.store, into=good, fallback=True)
    assert state.generation == 7 and good == made.truth[7]


def test_damage_that_the_index_tells_leaves_the_buffers_alone(where: Path) -> None:
    made = history(where)
    damage(newest_segment(made, 8))  # in its index
    newest_segment(made, 7).unlink()
    error = refused(where, DamagedCheckpoint, "Generation 6 is whole", buffers_for(made.truth[8]))
    assert isinstance(error, DamagedCheckpoint)
    assert error.whole == 6 and len(error.damage) == 2  # all that is wrong
    assert "overwritten" not in str(error) and "missing" in str(error)
    assert restore(made.store, fallback=True).generation == 6
    assert restore(made.store, generation=3).generation == 3
    damage(made.store.path / "manifests" / made.manifests[6].name, 100)
    error = refused(where, DamagedCheckpoint, "manifest.*Generation 5 is whole", generation=6)
    assert isinstance(error, DamagedCheckpoint) and error.whole == 5
    assert restore(made.store, fallback=True).generation == 5


def test_where_nothing_is_whole_it_is_said(where: Path) -> None:
    made = history(where)
    for number in (1, 7):  # 7 is full; all below need 1
        damage(newest_segment(made, number), 5000)
    with pytest.raises(DamagedCheckpoint, match="No older generation is whole") as caught:
        restore(made.store)
    assert caught.value.whole is None
    with pytest.raises(DamagedCheckpoint, match="No older generation is whole"):
        restore(made.store, fallback=True)


def test_what_the_disk_cannot_read_is_damage(where: Path) -> None:
    made = history(where)
    with DirectoryStore(where / "store", files=Failing(1, only=READS)) as probe:
        assert probe.store_id == made.store.store_id  # the marker cannot be read: its manifests tell
    files = Failing(0)
    with DirectoryStore(where / "store", files=files) as store:
        files.count, files.only = 0, READS
        restore(store, threads=1)
        reads = files.count
        for nth in range(1, reads + 1):
            files.count, files.nth, files.for_ever = 0, nth, True
            with pytest.raises((DamagedCheckpoint, StoreFailed), match="Input/output error"):
                restore(store, threads=1)


def test_a_frame_that_only_an_older_buffer_has_need_not_be_whole(where: Path) -> None:
    """`odd` was replaced in generation 4: what came before is not read."""
    made = history(where)
    (path,) = where.glob(f"store/segments/{made.manifests[1].segments[0].name}")
    from dirtytrack.checkpoint.segments import SegmentReader

    entry = made.manifests[1].segments[0]
    with SegmentReader(made.store.open_segment(entry.name), entry, made.store.store_id) as reader:
        odd = next(frame for frame in reader.frames() if frame.region == 1 and frame.kind == FrameKind.PAGES)
    damage(path, odd.offset)
    assert bytes_of(restore(made.store, generation=5)) == made.truth[5]
    with pytest.raises(DamagedCheckpoint):
        restore(made.store, generation=3)


def test_a_reader_keeps_what_it_reads(where: Path) -> None:
    made = history(where)
    pruned: list[Any] = []

    def while_reading(done: int, total: int) -> None:
        if not pruned:
            pruned.append(prune(where / "store", Retention(last=1)))

    assert bytes_of(restore(made.store, generation=2, progress=while_reading)) == made.truth[2]
    assert pruned[0].put_off == (1, 2, 3, 4, 5, 6, 7) and not pruned[0].removed
    assert prune(made.store, Retention(last=1)).removed == pruned[0].put_off


# ---- 2,000 flipped bits


class Watching(Hooked):
    """Which bytes of which segments and manifests were read."""

    def __init__(self) -> None:
        super().__init__()
        self.opened, self.read = dict[int, str](), dict[str, list[tuple[int, int]]]()

    def operate(self, name: str, call: Any, *args: Any, **options: Any) -> Any:
        result = call(*args, **options)
        if name == "open":
            self.opened[result] = args[1]
        elif name in READS:
            self.read.setdefault(self.opened[args[0]], []).append((args[2], result))
        return result


def test_each_flipped_bit_that_is_read_is_found_and_wrong_bytes_never_come_back(where: Path) -> None:
    made = History(DirectoryStore(where / "store", create=True), 5, compression="zstd", frame_bytes=3 * PAGE)
    made.add("x", 12 * PAGE)
    made.add("y", 3_001)
    for _ in range(4):
        made.save("meta")
        made.write(3)
    made.add("y", 2_000)
    made.save("meta")
    compact(made.store, 3)
    files = {path.name: path for path in (where / "store").rglob("*") if path.is_file()}
    rng = random.Random(11)
    for generation in made.truth:
        with DirectoryStore(where / "store", files=(watching := Watching())) as store:
            restore(store, generation=generation, threads=1)
        read = [(name, *span) for name, spans in watching.read.items() for span in spans if "." in name]
        weights = [length for _, _, length in read]
        into = buffers_for(made.truth[generation])
        for _ in range(2_100 // len(made.truth)):
            ((name, start, length),) = rng.choices(read, weights)
            at, bit = rng.randrange(start, start + length), 1 << rng.randrange(8)
            with files[name].open("r+b") as file:
                flip(file, at, bit)
                try:
                    with pytest.raises((DamagedCheckpoint, InvalidCheckpoint)):
                        restore(made.store, generation=generation, into=into, threads=1)
                        pytest.fail(f"bit {bit:#x} of {name} at {at} was not seen")
                finally:
                    flip(file, at, bit)
        assert bytes_of(restore(made.store, generation=generation)) == made.truth[generation]


def flip(file: Any, at: int, bit: int) -> None:
    file.seek(at)
    byte = file.read(1)[0]
    file.seek(at)
    file.write(bytes([byte ^ bit]))
    file.flush()

# SPDX-License-Identifier: MIT
"""Compaction and retention: nothing that is kept changes, whatever interrupts it and wherever."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dirtytrack.checkpoint import DirectoryStore, Retention, compact, generations, prune, restore, verify
from dirtytrack.checkpoint.chains import compacted
from dirtytrack.checkpoint.coding import Decoder, Encoder
from dirtytrack.checkpoint.segments import FrameKind
from dirtytrack.errors import DamagedCheckpoint, InvalidCheckpoint, NoSuchGeneration, StoreBusy, StoreFailed
from tests.asked import SOAK
from tests.generations import PAGE, History, Keyed
from tests.storing import Dying, Failing, frames_and_bytes, kept, read_back, save

ROOT = Path(__file__).parents[3]
STORED: dict[str, dict[str, Any]] = {
    "plain": {},
    "zstd": {"compression": "zstd"},
    "zstd, encrypted": {"compression": "zstd", "encrypt": Keyed(0x5A)},
}


def history(where: Path, count: int = 6, seed: int = 3, pages: int = 70, **options: Any) -> History:
    made = History(DirectoryStore(where / "store", create=True), seed, **options)
    made.add("x", pages * PAGE + 5)
    made.add("y", 9 * PAGE)
    for step in range(count):
        made.save({"step": step})
        made.write(6)
        if step == count // 2:
            made.add("y", 4 * PAGE)
    return made


def require(made: History, where: Path, but: set[int] | frozenset[int] = frozenset(), **options: Any) -> None:
    """Every generation is there and what it was, but for those that may be gone; and nothing is damaged."""
    with DirectoryStore(where / "store") as store:
        there = {each.generation for each in store.catalog()}
        assert made.truth.keys() - but <= there
        for generation in there:
            state = restore(store, generation=generation, **options)
            assert {name: bytes(memoryview(state[name])) for name in state} == made.truth[generation]
        assert verify(store, all=True).ok


# ---- compaction


@pytest.mark.parametrize("stored", STORED)
def test_a_compacted_generation_is_the_same_in_one_segment(where: Path, stored: str) -> None:
    options = STORED[stored]
    made = history(where, **options)
    keys = {"decrypt": options["encrypt"]} if "encrypt" in options else {}
    made.add("sparse", (3 << 20) + 7)
    made.memory["sparse"][10 : 3 << 20] = bytes((3 << 20) - 10)
    made.save()
    for generation in (4, 7, 1):
        before = made.manifests[generation]
        after = compact(where / "store", generation, memory_bytes=8 << 20, encrypt=options.get("encrypt"), **keys)
        if generation == 1:
            assert after == before  # it was full
            continue
        assert (after.kind, after.revision, len(after.segments)) == ("compacted", 1, 1)
        assert after.segments[0].generation == generation
        assert (after.regions, after.meta, after.parent, after.created) == (
            (before.regions, before.meta, before.parent, before.created)
        )
        frames = list(frames_and_bytes(made.store, after, Decoder(options.get("encrypt"))))
        kinds: list[Any] = [(kind, runs.tolist()) for number, runs, kind, _ in frames if number == 2]
        assert generation != 7 or kinds == [
            (FrameKind.PAGES, [[0, 1 << 20]]),
            (FrameKind.ZEROS, [[1 << 20, 2 << 20]]),  # one for all that follow one another
            (FrameKind.PAGES, [[3 << 20, 7]]),
        ]
        require(made, where, **keys)
        assert compact(made.store, generation, encrypt=options.get("encrypt"), **keys) == after  # nothing to do
    assert [each.revision for each in generations(made.store)] == [0, 0, 0, 1, 0, 0, 1]
    assert not made.store.strangers()
    assert prune(made.store, Retention(last=1)).removed == (1, 2, 3, 4, 5, 6)
    assert len(made.store.segments()) == 1
    require(made, where, {1, 2, 3, 4, 5, 6}, **keys)


def test_what_is_written_is_compressed_as_what_is_there_or_as_was_said(where: Path) -> None:
    for stored, asked, compressed in (
        (None, "same", False),
        ("zstd", "same", True),
        (None, "zstd", True),
        ("zstd", None, False),
    ):
        made = History(DirectoryStore(where / f"{stored}-{asked}" / "store", create=True), compression=stored)
        made.add("x", 64 * PAGE)
        made.memory["x"][:] = b"dirty" * 52428 + b"page"
        made.save()
        made.write()
        made.save()
        nbytes = compact(made.store, compression=asked).stored_nbytes  # type: ignore[arg-type]
        assert (nbytes < 40 * PAGE) == compressed
        require(made, where / f"{stored}-{asked}")


def test_what_is_encrypted_is_never_written_as_anything_else(where: Path) -> None:
    made = history(where, encrypt=Keyed(1))
    before = sorted(path.name for path in (where / "store").rglob("*"))
    keys: list[dict[str, Any]] = [{}, {"decrypt": Keyed(1)}, {"encrypt": Keyed(1)}]
    for options in (*keys, {"encrypt": Keyed(1), "decrypt": Keyed(2)}):
        with pytest.raises(InvalidCheckpoint, match=r"encrypt|another key"):
            compact(made.store, **options)
    with pytest.raises(InvalidCheckpoint, match="compression="):
        compact(made.store, compression="lz4")  # type: ignore[arg-type]
    with pytest.raises(InvalidCheckpoint, match="memory_bytes="):
        compact(made.store, memory_bytes=1000)
    assert before == sorted(path.name for path in (where / "store").rglob("*"))
    compact(made.store, encrypt=Keyed(2), decrypt=Keyed(1))  # another key from now on
    assert restore(made.store, decrypt=Keyed(2)).generation == 6
    assert restore(made.store, generation=5, decrypt=Keyed(1)).generation == 5


def test_what_is_damaged_is_not_compacted(where: Path) -> None:
    made = history(where)
    path = where / "store" / "segments" / made.manifests[2].segments[-1].name
    data = bytearray(path.read_bytes())
    data[4096] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedCheckpoint):
        compact(made.store, 3)
    with pytest.raises(NoSuchGeneration):
        compact(made.store, 30)
    assert [each.revision for each in generations(made.store)] == [0] * 6 and not made.store.strangers()


@pytest.mark.unsanitized("it keeps what was freed")
def test_a_scattered_chain_is_compacted_in_little_memory(where: Path) -> None:
    """Eight windows, frames of pages that lie in all of them: and never more memory than was said."""
    script = f"""
import hashlib, sys
sys.path.insert(0, {str(ROOT)!r})
from dirtytrack.checkpoint import DirectoryStore
from tests.generations import PAGE, History
made = History(DirectoryStore(sys.argv[1], create=True), 4, frame_bytes=256 * PAGE, deltas=False)
made.add("x", 48 << 20)
made.save()
for step in range(4):
    for page in range(step, (48 << 20) // PAGE, 40):
        made.memory["x"][page * PAGE] ^= 1
        made.dirty["x"].add(page)
    made.save()
print(hashlib.sha256(made.truth[5]["x"]).hexdigest())
"""
    made = subprocess.run([sys.executable, "-c", script, where / "store"], check=True, capture_output=True, text=True)
    script = """
import resource, sys
from dirtytrack.checkpoint import DirectoryStore, compact
with DirectoryStore(sys.argv[1]) as store:
    compact(store, 2, memory_bytes=8 << 20, threads=2)  # all is loaded
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    compact(store, memory_bytes=8 << 20, threads=2)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script, where / "store"], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 8 << 10, "KiB more than for the first"
    state = restore(where / "store")
    assert hashlib.sha256(state["x"]).hexdigest() == made.stdout.strip()
    assert state.manifest.kind == "compacted"


def test_a_chain_goes_on_on_a_compacted_base(where: Path) -> None:
    """As a `Checkpointer` does it: it is compacted beside it, then its segments take the place of the older ones."""
    made = history(where, 4)
    with made.store.writer() as writer:
        base = compacted(made.store, writer, 3, Encoder(None), Decoder())
    entries = base.segments + tuple(each for each in made.manifests[4].segments if each.generation > 3)
    made.manifests[4] = replace(made.manifests[4], segments=entries)
    made.save()
    require(made, where)
    assert prune(made.store, Retention(last=1)).removed == (1, 2, 3, 4)
    assert len(made.store.segments()) == 3
    require(made, where, {1, 2, 3, 4})


def test_somebody_reads_while_it_is_compacted(where: Path) -> None:
    made = history(where)
    states = []

    def meanwhile(done: int, total: int) -> None:
        states.append(restore(where / "store").generation)

    with made.store.reading():
        after = compact(where / "store", progress=meanwhile)
        assert [each.revision for each in made.store.catalog() if each.generation == 6] == [0, 1]  # put off
    assert states
    assert restore(made.store).manifest == after
    assert not prune(made.store, Retention(last=6)).removed
    assert [each.revision for each in made.store.catalog() if each.generation == 6] == [1]
    require(made, where)


def test_a_damaged_compaction_does_not_take_the_generation_with_it(where: Path) -> None:
    made = history(where)
    with made.store.reading():
        after = compact(where / "store")
    path = where / "store" / "segments" / after.segments[0].name
    path.write_bytes(path.read_bytes()[:5000])
    state = restore(made.store)
    assert state.manifest.revision == 0 and bytes(state["x"]) == made.truth[6]["x"]
    prune(made.store, Retention(last=6))
    assert restore(made.store).manifest.revision == 0


def test_two_may_not_write_at_once(where: Path) -> None:
    made = history(where)
    with made.store.writer():
        for call in (lambda: compact(where / "store"), lambda: prune(where / "store", Retention(last=1))):
            with pytest.raises(StoreBusy):
                call()
        assert prune(where / "store", Retention(last=1), dry_run=True).removed == (1, 2, 3, 4, 5)
    require(made, where)


def test_progress_can_end_it(where: Path) -> None:
    made = history(where)
    seen: list[tuple[int, int]] = []

    def tell(done: int, total: int) -> None:
        seen.append((done, total))
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compact(made.store, progress=tell)
    assert seen[-1] == (made.manifests[6].nbytes,) * 2
    assert not made.store.strangers()
    require(made, where)


# ---- retention


def created(generation: int) -> float:
    return 100.0 * generation


@pytest.mark.parametrize(
    ("retention", "kept_ones"),
    [
        (Retention(last=3), {18, 19, 20}),
        (Retention(every=5), {5, 10, 15, 20}),
        (Retention(every=7), {7, 14, 20}),
        (Retention(age_seconds=250), {18, 19, 20}),
        (Retention(age_seconds=0), {20}),
        (Retention(last=2, every=10, age_seconds=300), {10, 17, 18, 19, 20}),
        (Retention(last=100), set(range(1, 21))),
    ],
)
def test_what_any_of_it_keeps_is_kept(retention: Retention, kept_ones: set[int]) -> None:
    assert retention.kept(range(1, 21), created, 2000.0) == kept_ones


@pytest.mark.parametrize(
    "numbers", [{}, {"last": 0}, {"every": 0}, {"last": True}, {"age_seconds": -1}, {"age_seconds": float("nan")}]
)
def test_a_retention_that_makes_no_sense_is_refused(numbers: dict[str, Any]) -> None:
    with pytest.raises(InvalidCheckpoint):
        Retention(**numbers)


def test_pruning_keeps_what_is_kept_as_it_was(where: Path) -> None:
    made = history(where, 9)
    assert prune(made.store, Retention(last=2, every=3), dry_run=True).removed == (1, 2, 4, 5, 7)
    assert len(made.store.catalog()) == 9
    found = prune(where / "store", Retention(last=2, every=3))
    assert (found.removed, found.kept, found.put_off) == ((1, 2, 4, 5, 7), (3, 6, 8, 9), ())
    require(made, where, {1, 2, 4, 5, 7})
    assert prune(made.store, Retention(last=2, every=3)).removed == ()
    made.save()
    assert made.manifests[10].parent == 9
    require(made, where, {1, 2, 4, 5, 7})


def test_pruning_by_age_goes_by_the_clock(where: Path) -> None:
    made = history(where, 3)
    now = made.manifests[3].created
    assert prune(made.store, Retention(age_seconds=3600), now=now + 10).removed == ()
    path = where / "store" / "manifests" / made.manifests[1].name
    path.write_bytes(path.read_bytes()[:-5])  # at least as old as the one after it
    assert prune(made.store, Retention(age_seconds=3600), now=now + 10).removed == ()
    assert prune(made.store, Retention(age_seconds=3600), now=now + 3700).removed == (1, 2)
    require(made, where, {1, 2})


def test_the_newest_that_can_be_restored_is_kept(where: Path) -> None:
    made = history(where)
    for number in (6, 5):
        (where / "store" / "segments" / made.manifests[number].segments[-1].name).unlink()
    found = prune(made.store, Retention(last=1))
    assert found.kept == (4, 6) and found.removed == (1, 2, 3, 5)
    state = restore(made.store, fallback=True)
    assert state.generation == 4 and bytes(state["x"]) == made.truth[4]["x"]


def test_a_manifest_that_cannot_be_read_keeps_all_segments_and_prune_says_so(where: Path) -> None:
    made = history(where, 4)
    made.save(full=True)
    made.write()
    made.save()
    names = made.store.segments()
    path = where / "store" / "manifests" / made.manifests[5].name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    retention = Retention(last=2)
    for dry_run in (True, False):
        found = prune(made.store, retention, dry_run=dry_run)
        assert found.removed == (1, 2, 3, 4) and found.kept == (5, 6)
        (why,) = found.unreadable
        assert made.manifests[5].name in why
    assert made.store.segments() == names  # its generations are gone, and took no room with them
    path.write_bytes(whole)
    assert prune(made.store, retention).unreadable == ()
    assert len(made.store.segments()) == 2
    path.write_bytes(whole[:-1])
    assert prune(made.store, Retention(last=1)).unreadable == ()  # it is removed itself


def test_siblings_are_pruned_apart(where: Path) -> None:
    made = history(where, 3)
    made.memory = {name: bytearray(data) for name, data in made.truth[2].items()}
    made.regions = {region.name: region for region in made.manifests[2].regions}
    made.dirty = {name: set() for name in made.memory}
    made.write()
    assert made.save(parent=2) == 4
    assert prune(made.store, Retention(last=1)).removed == (1, 2, 3)
    require(made, where, {1, 2, 3})
    names = {entry.name for entry in made.manifests[4].segments}
    assert set(made.store.segments()) == names  # generation 3's own is gone, the base is not


# ---- killed, or failing, at any moment


def in_child(work: Callable[[], object]) -> int:
    """The signal that ended it, or 0."""
    pid = os.fork()
    if not pid:
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or not os.WEXITSTATUS(status)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def again(where: Path) -> None:
    """The store, as it was at first."""
    shutil.rmtree(where / "store", ignore_errors=True)
    shutil.copytree(where / "pristine", where / "store")


WORK: dict[str, tuple[Callable[[DirectoryStore], object], frozenset[int]]] = {
    "compact": (lambda store: compact(store, threads=1), frozenset()),
    "prune": (lambda store: prune(store, Retention(last=1, every=2)), frozenset({1, 3})),
}


@pytest.mark.parametrize("what", WORK)
def test_it_is_killed_before_each_file_operation(where: Path, what: str) -> None:
    work, may_go = WORK[what]
    made = history(where, 4, pages=15)
    (where / "store").rename(where / "pristine")
    for nth in range(1, 200):
        again(where)

        def run(nth: int = nth) -> None:
            work(DirectoryStore(where / "store", files=Dying(nth)))

        ended = in_child(run)
        require(made, where, may_go)
        with DirectoryStore(where / "store") as store:
            work(store)  # the next one does it, and leaves nothing
            assert not store.strangers()
            assert what == "compact" or {each.generation for each in store.catalog()} == {2, 4}
        require(made, where, may_go)
        if not ended:
            assert nth > 8
            return
        assert ended == signal.SIGKILL
    pytest.fail("it does not end")


@pytest.mark.parametrize("what", WORK)
def test_any_file_operation_fails(where: Path, what: str) -> None:
    work, may_go = WORK[what]
    made = history(where, 4, pages=15)
    (where / "store").rename(where / "pristine")
    failed = 0
    for nth in range(1, 400):
        again(where)
        files = Failing(nth)
        try:
            with DirectoryStore(where / "store", files=files) as store:
                work(store)
        except (StoreFailed, DamagedCheckpoint, InvalidCheckpoint):
            failed += 1
        require(made, where, may_go)
        if not files.failed:
            break
        assert len(files.descriptors) == 0
    assert failed > 20


@pytest.mark.parametrize("what", WORK)
def test_it_is_killed_at_random_moments(where: Path, what: str) -> None:
    """12 times here, 300 times in a soak."""
    made = history(where, 4)
    (where / "store").rename(where / "pristine")
    work, may_go = WORK[what]
    rng = random.Random(9)
    longest = 0.02
    times = 300 if SOAK else 12
    for _ in range(times):
        again(where)
        pid = os.fork()
        if not pid:
            work(DirectoryStore(where / "store"))
            os._exit(0)
        begun = time.perf_counter()
        time.sleep(rng.uniform(0, longest))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        longest = max(longest, time.perf_counter() - begun)
        require(made, where, may_go)


def test_a_store_of_another_hand_is_compacted_and_read_back(where: Path) -> None:
    """Written and read by the plainest code there is."""
    with DirectoryStore(where / "store", create=True) as store:
        first = {"a": os.urandom(40_000), "b": bytes(8192)}
        second = {"a": first["a"][:12_288] + os.urandom(27_712), "b": bytes(8192)}
        with store.writer() as writer:
            base = save(writer, store, first)
            save(writer, store, second, first, base)
        after = compact(store)
        assert read_back(store) == second and kept(after) == (2, 1)
        assert {name: bytes(data) for name, data in restore(store).items()} == second

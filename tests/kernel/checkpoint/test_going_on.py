# SPDX-License-Identifier: MIT
"""Going on from a generation: the increment after a restore is an increment. Chains that are compacted and pruned."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dirtytrack import allocate
from dirtytrack.checkpoint import Checkpointer, DirectoryStore, Retention, restore, tending, verify
from dirtytrack.errors import DamagedCheckpoint, InvalidCheckpoint, InvalidMemory, NoSuchGeneration, StoreFailed
from tests.generations import Keyed
from tests.saving import PAGE, Program, paged, require_equal
from tests.storing import Failing


def filled(where: Path, saves: int = 3, **options: Any) -> Program:
    with Program(where, {"grid": paged(50, 1), "table": paged(7, 2)}, **options) as program:
        for _ in range(saves):
            program.save()
            program.scribble()
    return program


@pytest.mark.parametrize("options", [{}, {"deltas": True}, {"encrypt": Keyed(5), "decrypt": Keyed(5)}], ids=str)
def test_the_increment_after_a_restore_is_an_increment(where: Path, options: dict[str, Any]) -> None:
    before = filled(where, **options)
    buffers = {"grid": paged(50), "table": paged(7)}
    with Program(where, buffers, resume=True, **options) as program:
        assert program.copy() == before.truth[3]
        state = program.ckpt.resumed
        assert state is not None
        assert (state.generation, state.meta) == (3, {"number": 2})
        assert state["grid"] is buffers["grid"]
        buffers["grid"][5 * PAGE] ^= 1
        save = program.save()
        assert (save.generation, save.kind, save.bytes_dirty) == (4, "increment", PAGE)
        assert restore(where, decrypt=options.get("decrypt")).parent == 3
        program.check()
    program.truth = before.truth
    program.check()


def test_siblings_of_one_generation(where: Path) -> None:
    before = filled(where)
    for number in (4, 5):
        with Program(where, {"grid": paged(50), "table": paged(7)}, resume=2) as program:
            assert program.copy() == before.truth[2]
            program.buffers["table"][number] ^= 1
            save = program.save()
            assert (save.generation, save.kind) == (number, "increment")
            assert restore(where).parent == 2
            program.check()
    before.check()


def test_an_empty_store_is_begun(where: Path) -> None:
    with Program(where, {"grid": paged(5, 1)}, resume=True) as program:
        assert program.ckpt.resumed is None
        assert program.ckpt.generation is None
        assert program.save().kind == "full"
        program.check()


def test_without_resume_a_store_goes_on_with_a_full_save(where: Path) -> None:
    before = filled(where)
    with Program(where, {"other": paged(5, 1)}) as program:
        save = program.save()
        assert (save.generation, save.kind) == (4, "full")
        assert restore(where).parent is None
        program.check()
    before.check()


def test_tied_weights_are_resumed(where: Path) -> None:
    data = paged(9, 1)
    with Checkpointer(where, {"in": data, "out": data}) as ckpt:
        ckpt.save().wait()
    kept = bytes(data)
    data[:] = 0
    with Checkpointer(where, {"in": data, "out": data}, resume=True) as ckpt:
        assert bytes(data) == kept
        data[0] ^= 1
        assert ckpt.save().wait()
        require_equal(where, {"in": bytes(data), "out": bytes(data)})


def test_buffers_that_became_one_are_saved_as_they_are(where: Path) -> None:
    with Checkpointer(where, {"in": paged(9, 1), "out": paged(9, 2)}) as ckpt:
        ckpt.save().wait()
    data = bytearray(9 * PAGE)
    with Checkpointer(where, {"in": data, "out": data}, resume=True) as ckpt:
        assert bytes(data) == bytes(paged(9, 1))
        assert ckpt.save().wait()
        require_equal(where, {"in": bytes(data), "out": bytes(data)})


def test_buffers_that_do_not_fit_are_left_as_they_are(where: Path) -> None:
    filled(where)
    grid, table = paged(50), paged(7)
    for wrong, says in (
        ({"grid": grid}, "'table'"),
        ({"grid": grid, "table": paged(8)}, "28672"),
        ({"grid": grid, "table": table.view("<f4")}, "<f4"),
        ({"grid": grid, "table": table, "more": paged(1)}, "'more'"),
    ):
        with pytest.raises(InvalidMemory, match=says):
            Checkpointer(where, wrong, resume=True)
        assert not grid.any()
    with pytest.raises(NoSuchGeneration, match="17"):
        Checkpointer(where, {"grid": grid, "table": table}, resume=17)
    with Checkpointer(where, {"grid": grid, "table": table}, resume=True):
        pass


def test_a_damaged_generation_is_not_resumed(where: Path) -> None:
    filled(where)
    manifest = max((where / "manifests").iterdir())
    data = bytearray(manifest.read_bytes())
    data[50] ^= 1
    manifest.write_bytes(data)
    buffers = {"grid": paged(50), "table": paged(7)}
    with pytest.raises(DamagedCheckpoint) as caught:
        Checkpointer(where, buffers, resume=True)
    assert caught.value.whole == 2
    with Checkpointer(where, buffers, resume=2) as ckpt:
        save = ckpt.save()
        assert save.wait()
        assert save.generation == 4


def test_it_is_tried_again_after_a_store_that_fails(where: Path) -> None:
    filled(where)
    buffers = {"grid": paged(50), "table": paged(7)}
    failing, worked, nth = 0, False, 0
    while not worked:
        nth += 1
        files = Failing(nth, errno.EIO)
        try:
            Checkpointer(DirectoryStore(where, files=files), buffers, resume=True, threads=1).close()
            worked = not files.failed
        except (StoreFailed, DamagedCheckpoint):
            failing += 1
    assert failing > 10
    with Checkpointer(where, buffers, resume=True) as ckpt:
        assert ckpt.resumed is not None


# ---- chains


def wait_for_compaction(ckpt: Checkpointer) -> None:
    ckpt._saver.wait()
    thread = ckpt._tending._thread
    if thread is not None:
        thread.join()


@pytest.mark.parametrize("options", [{}, {"deltas": True}, {"encrypt": Keyed(5), "decrypt": Keyed(5)}], ids=str)
def test_a_long_chain_is_compacted_while_saves_go_on(
    where: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(tending, "_SPARE_NBYTES", 0)
    kinds, chains = set(), []
    with Program(
        where, {"grid": paged(50, 1), "table": paged(7, 2)}, compact=1.0, compression=None, **options
    ) as program:
        store = DirectoryStore(where)
        for number in range(36):
            program.scribble(0.1)
            save = program.save()
            assert save.kind == ("increment" if number else "full")
            if number % 3 == 0:
                wait_for_compaction(program.ckpt)
            program.ckpt._saver.wait()
            manifest = store.manifest()
            chains.append(len(manifest.segments))
            kinds |= {store.manifest(kept.generation, kept.revision).kind for kept in store.catalog()}
        program.check()
        assert kinds == {"full", "increment", "compacted"}
        assert max(chains) < 40
        assert verify(where, all=True).ok
    program.check()
    with Program(where, {"grid": paged(50), "table": paged(7)}, resume=True, **options) as again:
        again.scribble()
        again.save()
        again.check()


def test_retention(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tending, "_SPARE_NBYTES", 0)
    with Program(
        where, {"grid": paged(50, 1)}, retain=Retention(last=3, every=10), compact=1.0, compression=None
    ) as program:
        for _ in range(35):
            program.scribble(0.1)
            program.save()
        wait_for_compaction(program.ckpt)
        program.save()
        program.ckpt.wait()
        program.save()
        program.ckpt.wait()
        kept = {each.generation for each in DirectoryStore(where).catalog()}
        assert {10, 20, 30, 35, 36, 37} <= kept
        assert len(kept) <= 7  # what is compacted is held
        for generation in kept:
            program.check(generation)
    named = {
        entry.name
        for each in DirectoryStore(where).catalog()
        for entry in DirectoryStore(where).manifest(*each).segments
    }
    assert set(DirectoryStore(where).segments()) == named


def test_what_is_compacted_is_not_pruned_before_a_generation_has_it(
    where: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tending, "_SPARE_NBYTES", 0)
    options: dict[str, Any] = {"retain": Retention(last=1), "compact": 0.5, "compression": None}
    with Program(where, {"grid": paged(50, 1)}, **options) as program:
        for number in range(60):
            program.scribble(0.1)
            save = program.save()
            if number % 2:
                wait_for_compaction(program.ckpt)
        program.check(save.generation or 0)


def test_what_cannot_be_compacted_is_saved_anew(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tending, "_SPARE_NBYTES", 0)
    with Program(where, {"grid": paged(50, 1)}, compact=1.0, compression=None, encrypt=Keyed(5)) as program:
        program.decrypt = Keyed(5)
        kinds = []
        for _ in range(30):
            program.scribble(0.1)
            kinds.append(program.save().kind)
        assert 2 <= kinds.count("full") < 8
        program.check()


def test_a_chain_does_not_grow_for_ever(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tending, "_MOST_SEGMENTS", 5)
    with Program(where, {"data": paged(30, 1)}, compact=None) as program:
        kinds = []
        for step in range(14):
            program.buffers["data"][step * PAGE] ^= 0x55
            kinds.append(program.save().kind)
        assert [step for step, kind in enumerate(kinds) if kind == "full"] == [0, 6, 12]
        program.check()


def test_a_compaction_that_fails_is_told_and_harms_nothing(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tending, "_SPARE_NBYTES", 0)

    def decrypt(data: bytes) -> bytes:
        raise OverflowError("no key at hand")

    options: dict[str, Any] = {"compact": 1.0, "compression": None, "encrypt": Keyed(5), "decrypt": decrypt}
    program = Program(where, {"grid": paged(50, 1)}, **options)
    program.decrypt = Keyed(5)
    told = 0
    for _ in range(30):
        program.scribble(0.1)
        try:
            program.save()
        except InvalidCheckpoint as error:
            assert isinstance(error.__cause__, OverflowError)
            told += 1
        wait_for_compaction(program.ckpt)
    assert told
    try:
        program.close()
    except InvalidCheckpoint:
        pass
    program.check()


def test_close_does_not_wait_for_a_compaction(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tending, "_SPARE_NBYTES", 0)

    def slow(data: bytes) -> bytes:
        time.sleep(0.5)
        return Keyed(5)(data)

    grid = np.tile(paged(256, 1), 12)
    program = Program(where, {"grid": grid}, compact=0.01, compression=None, encrypt=Keyed(5), decrypt=slow)
    program.decrypt = Keyed(5)
    program.save()
    for _ in range(4):
        grid[::100000] ^= 1
        program.save()
    began = time.monotonic()
    program.close()
    assert time.monotonic() - began < 4.5
    assert not verify(where, all=True).strangers
    program.check()


def test_what_another_process_writes_is_seen_by_comparing(where: Path) -> None:
    """As docs/checkpoint.md says of shared memory."""
    memory = allocate(9 * PAGE, shared=True)
    with Checkpointer(where, {"memory": memory}, track={"backend": "compare-hashes"}) as ckpt:
        ckpt.save().wait()
        pid = os.fork()
        if not pid:
            memory[5 * PAGE] = 77
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert ckpt.save().wait()
        require_equal(where, {"memory": bytes(memory)})

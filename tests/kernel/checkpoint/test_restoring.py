# SPDX-License-Identifier: MIT
"""Restoring, compacting, pruning and comparing what a `Checkpointer` saved: beside it, after it, into tracked pages."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dirtytrack
from dirtytrack.checkpoint import Retention, compact, compare, generations, prune, restore, verify
from dirtytrack.errors import InvalidMemory, NoSuchGeneration
from tests.generations import Keyed
from tests.saving import PAGE, Program, bytes_of, paged, require_equal

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"compression": None},
    "zstd": {},
    "deltas, encrypted": {"deltas": True, "encrypt": Keyed(3), "decrypt": Keyed(3)},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_what_was_saved_is_restored_compacted_pruned_and_gone_on_with(where: Path, options: str) -> None:
    keys = {name: value for name, value in OPTIONS[options].items() if name in ("encrypt", "decrypt")}
    decrypt = keys.get("decrypt")
    buffers = {"big": paged(300, seed=1), "odd": np.zeros(12_345, np.float32), "zero": paged(40)}
    with Program(where, buffers, compact=None, **OPTIONS[options]) as program:
        for _ in range(7):
            program.save()
            program.scribble(0.02)
        with pytest.raises(dirtytrack.errors.StoreBusy):
            compact(where, **keys)
    truth = program.truth
    program.check()
    for older, newer in ((1, 7), (3, 4), (6, 2)):
        found = compare(where, older, newer, decrypt=decrypt, memory_bytes=8 << 20)
        for region in found.regions:
            one, other = (np.frombuffer(truth[each][region.name], np.uint8) for each in (older, newer))
            assert region.changed_nbytes == np.count_nonzero(one != other)
            differs = {int(at) // 4096 for at in np.flatnonzero(one != other)}
            assert differs == {(offset + at) // 4096 for offset, nbytes in region.runs for at in range(0, nbytes, 4096)}
    for generation in (4, 7):
        assert compact(where, generation, memory_bytes=8 << 20, **keys).kind == "compacted"
    program.check()
    assert prune(where, Retention(last=2, every=4)).removed == (1, 2, 3, 5)
    program.check(4, 6, 7)
    for buffer in buffers.values():
        bytes_of(buffer)[:] = 7
    with Program(where, buffers, resume=True, compact=None, **OPTIONS[options]) as again:
        assert again.copy() == truth[7]
        again.scribble(0.01)
        assert again.save().kind == "increment"
        again.check()
    assert [each.generation for each in generations(where)] == [4, 6, 7, 8]
    assert verify(where, all=True).ok


@pytest.mark.parametrize("kind", ["private", "shared", "transparent"])
def test_restoring_into_tracked_memory_is_seen_as_writing(where: Path, kind: str) -> None:
    huge: Any = "transparent" if kind == "transparent" else None
    memory = dirtytrack.allocate(600 * PAGE, shared=kind == "shared", huge=huge)
    array = np.frombuffer(memory, np.uint8)
    array[:] = np.frombuffer(random.Random(1).randbytes(array.nbytes), np.uint8)
    for compression in (None, "zstd"):  # straight into the pages, by the kernel; and copied there
        folder = where / str(compression)
        with Program(folder, {"x": array}, compression=compression, track={"blind_spots": "accepted"}) as program:
            program.save()
        with dirtytrack.track(memory, blind_spots="accepted") as tracker:
            array[5] ^= 1
            tracker.collect()
            restore(folder, into={"x": array})
            assert array.tobytes() == program.truth[1]["x"]
            assert tracker.collect().nbytes == array.nbytes


def test_who_restores_beside_a_program_that_saves_gets_what_was_saved(where: Path) -> None:
    """While generations come, are compacted and go."""
    stop, restored, problems = threading.Event(), set[int](), list[BaseException]()
    buffers = {"a": paged(200, seed=2), "b": paged(64, seed=3)}
    with Program(where, buffers, compact=0.2, retain=Retention(last=3)) as program:
        program.save()

        def reading() -> None:
            draw = random.Random(threading.get_ident())
            while not stop.is_set():
                try:
                    newest = generations(where)[-1].generation
                    state = restore(where, generation=max(1, newest - draw.randrange(3)), threads=2)
                except NoSuchGeneration:
                    continue
                except BaseException as error:
                    problems.append(error)
                    return
                number = state.meta["number"]
                if {name: bytes(bytes_of(state[name])) for name in state} != program.truth[number + 1]:
                    problems.append(AssertionError(f"generation {state.generation}"))
                    return
                restored.add(state.generation)

        readers = [threading.Thread(target=reading) for _ in range(2)]
        for reader in readers:
            reader.start()
        for _ in range(40):
            program.scribble(0.2)
            program.save()
        stop.set()
        for reader in readers:
            reader.join()
        assert not problems
        assert len(restored) > 1
        program.save()  # removal that was put off is made up for
    kept = [each.generation for each in generations(where)]
    assert kept[-3:] == [40, 41, 42] and len(kept) <= 4  # one more that was being compacted
    for generation in kept:
        require_equal(where, program.truth[generation], generation)


def test_what_changed_its_shape_is_refused_by_the_generations_before(where: Path) -> None:
    with Program(where, {"x": paged(10, seed=1)}) as program:
        program.save()
        program.buffers["x"] = np.arange(5000.0).reshape(50, 100)
        program.ckpt.replace("x", program.buffers["x"])
        program.save()
    into = np.zeros((50, 100))
    assert restore(where, into={"x": into})["x"] is into and into[49, 99] == 4999
    with pytest.raises(InvalidMemory, match="'x' has 40000 bytes, in the checkpoint 40960"):
        restore(where, into={"x": into}, generation=1)
    assert into[49, 99] == 4999
    array = restore(where)["x"]
    assert array.shape == (50, 100) and array.dtype == np.float64

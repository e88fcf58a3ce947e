# SPDX-License-Identifier: MIT
"""What is kept with a save: given, or asked for while nobody writes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dirtytrack.checkpoint import Checkpointer, restore
from dirtytrack.errors import InvalidCheckpoint, StoreBusy
from tests.saving import PAGE, Program, paged


def test_a_function_is_asked_while_nobody_writes(where: Path) -> None:
    data, paused, over, step = paged(40, 1), threading.Lock(), threading.Event(), [0]

    def work() -> None:
        while not over.is_set():
            with paused:
                step[0] += 1
                data[: 40 * PAGE : PAGE] = step[0] % 251

    @contextmanager
    def quiesce() -> Iterator[None]:
        with paused:
            yield

    worker = threading.Thread(target=work)
    with Checkpointer(where, {"data": data}, quiesce=quiesce, compression=None) as ckpt:
        worker.start()
        try:
            saves = [ckpt.save(lambda: {"step": step[0]}) for _ in range(12)]
        finally:
            over.set()
            worker.join()
    for save in saves:
        state = restore(where, generation=save.generation)
        assert state.meta == save.meta and (state["data"][::PAGE] == state.meta["step"] % 251).all()


def test_a_function_that_fails_loses_nothing_and_the_next_save_is_an_increment(where: Path) -> None:
    with Program(where, {"data": paged(40, 1)}) as program:
        program.save()
        for wrong, kind in ((lambda: 1 // 0, ZeroDivisionError), (object, InvalidCheckpoint)):
            program.buffers["data"][3 * PAGE] ^= 0x55
            with pytest.raises(kind):
                program.ckpt.save(wrong)
            save = program.save()
            assert (save.kind, save.bytes_dirty) == ("increment", PAGE)
        program.check()


def test_a_quiesce_that_fails_makes_no_full_save(where: Path) -> None:
    failing = [False]

    @contextmanager
    def quiesce() -> Iterator[None]:
        if failing[0]:
            raise RuntimeError("the others do not stop")
        yield

    with Program(where, {"data": paged(40, 1)}, quiesce=quiesce) as program:
        program.save()
        program.buffers["data"][3 * PAGE] ^= 0x55
        failing[0] = True
        with pytest.raises(RuntimeError, match="do not stop"):
            program.ckpt.save()
        failing[0] = False
        save = program.save()
        assert (save.kind, save.bytes_dirty) == ("increment", PAGE)
        program.check()


def test_a_function_may_not_save_and_its_time_is_the_stalls(where: Path) -> None:
    def meta() -> Any:
        with pytest.raises(StoreBusy, match="this thread"):
            ckpt.save()
        threading.Event().wait(0.05)
        return [1]

    with Checkpointer(where, {"data": bytearray(9)}) as ckpt:
        save = ckpt.save(meta)
        assert save.wait(20) and save.stall_seconds >= 0.05 and save.meta == [1]
    assert restore(where).meta == [1]


def test_a_save_that_is_skipped_does_not_ask(where: Path) -> None:
    go_on = threading.Event()

    def encrypt(data: bytes) -> bytes:
        assert go_on.wait(20)
        return data

    with Checkpointer(where, {"data": paged(4, 1)}, when_busy="skip", encrypt=encrypt) as ckpt:
        first = ckpt.save()
        skipped = ckpt.save(lambda: 1 // 0)
        assert (skipped.kind, skipped.meta) == ("skipped", None)
        go_on.set()
        assert first.wait(20)

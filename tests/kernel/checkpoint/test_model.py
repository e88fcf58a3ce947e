# SPDX-License-Identifier: MIT
"""A program that does anything, in any order, against a model: what each generation is, as full copies in a dict."""

from __future__ import annotations

import errno
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dirtytrack import Memory, allocate
from dirtytrack.checkpoint import Checkpointer, DirectoryStore, Retention, compact, prune, tending, verify
from dirtytrack.errors import DirtyTrackError
from tests.generations import Keyed
from tests.saving import PAGE, bytes_of, require_equal, scribble
from tests.storing import Failing

SHM = Path("/dev/shm")
NAMES = st.sampled_from(["a", "b", "c"])
PAGES = st.integers(1, 12)


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp(prefix="dirtytrack-", dir=SHM if SHM.is_dir() else None))
        self.files = Failing()
        self.truth: dict[int, dict[str, bytes]] = {}
        self.ckpt: Checkpointer | None = None
        self.spare, tending._SPARE_NBYTES = tending._SPARE_NBYTES, 8 << 10

    def teardown(self) -> None:
        self.files.nth = 0
        if self.ckpt is not None:
            try:
                self.ckpt.close()
            except DirtyTrackError:
                pass
        if self.truth:
            assert verify(self.store, all=True).ok
        tending._SPARE_NBYTES = self.spare
        shutil.rmtree(self.path, ignore_errors=True)

    @initialize(
        pages=PAGES,
        seed=st.integers(0, 1 << 30),
        deltas=st.booleans(),
        waves=st.booleans(),
        compression=st.sampled_from([None, "zstd"]),
        key=st.sampled_from([None, 7]),
        compacts=st.sampled_from([None, 1.0]),
    )
    def begin(self, pages: int, seed: int, key: int | None, waves: bool, compacts: Any, **options: Any) -> None:
        self.draw = random.Random(seed)
        self.decrypt = None if key is None else Keyed(key)
        self.options: dict[str, Any] = {
            "compact": compacts,
            "encrypt": self.decrypt,
            "decrypt": self.decrypt,
            **options,
        }
        if waves:
            self.options["staging_bytes"] = 1 << 16
        self.store = DirectoryStore(self.path / "store", create=True, files=self.files)
        self.buffers: dict[str, Memory] = {"a": self.new(pages)}
        self.ckpt = Checkpointer(self.store, self.buffers, **self.options)

    def new(self, pages: int) -> Memory:
        memory = allocate(pages * PAGE)
        scribble(memory, self.draw, 0.5)
        return memory

    def copy(self) -> dict[str, bytes]:
        return {name: bytes(bytes_of(buffer)) for name, buffer in self.buffers.items()}

    def kept(self) -> set[int]:
        return {each.generation for each in self.store.catalog()}

    # ---- the program

    @rule(name=NAMES, share=st.sampled_from([0.05, 0.3, 1.0]))
    def write(self, name: str, share: float) -> None:
        if name in self.buffers:
            scribble(self.buffers[name], self.draw, share)

    @precondition(lambda self: self.ckpt is not None)
    @rule(name=NAMES, pages=PAGES)
    def add_or_replace(self, name: str, pages: int) -> None:
        assert self.ckpt is not None
        new = self.new(pages)
        (self.ckpt.replace if name in self.buffers else self.ckpt.add)(name, new)
        self.buffers[name] = new

    @precondition(lambda self: self.ckpt is not None and len(self.buffers) > 1)
    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        assert self.ckpt is not None
        if name in self.buffers:
            self.ckpt.remove(name)
            del self.buffers[name]

    @rule(name=NAMES, pages=PAGES)
    def resize(self, name: str, pages: int) -> None:
        if name in self.buffers:
            self.buffers[name].resize(pages * PAGE)

    # ---- saving

    @precondition(lambda self: self.ckpt is not None)
    @rule(full=st.sampled_from([False, False, False, True]))
    def save(self, full: bool) -> None:
        assert self.ckpt is not None
        now = self.copy()
        save = self.ckpt.save(full=full)
        assert save.wait(20)
        self.truth[save.generation or 0] = now
        require_equal(self.store, now, save.generation, self.decrypt)

    @precondition(lambda self: self.ckpt is not None)
    @rule(nth=st.integers(1, 25), error=st.sampled_from([errno.ENOSPC, errno.EIO]), for_ever=st.booleans())
    def save_that_fails(self, nth: int, error: int, for_ever: bool) -> None:
        assert self.ckpt is not None
        self.ckpt.wait()
        tending_thread = self.ckpt._tending._thread
        if tending_thread is not None:
            tending_thread.join()
        now = self.copy()
        files = self.files
        files.count, files.nth, files.error, files.for_ever = 0, nth, error, for_ever
        try:
            save = self.ckpt.save()
            try:
                save.wait(20)
            except DirtyTrackError:
                pass
            try:
                self.ckpt.wait()
            except DirtyTrackError:  # what is done after a commit
                pass
            if (thread := self.ckpt._tending._thread) is not None:
                thread.join()
        finally:
            files.nth = 0
        # One that failed when it had appeared, and could not be taken away again, may be there: then it is whole.
        assert save.state == "failed" or save.generation in self.kept()
        if save.generation in self.kept():
            self.truth[save.generation or 0] = now
        try:
            self.ckpt.wait()
        except DirtyTrackError:
            pass

    # ---- the store

    @precondition(lambda self: self.truth)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        generation = data.draw(st.sampled_from(sorted(self.truth)))
        require_equal(self.store, self.truth[generation], generation, self.decrypt)

    @precondition(lambda self: self.ckpt is not None)
    @rule()
    def close(self) -> None:
        assert self.ckpt is not None
        self.ckpt.close()
        self.ckpt = None

    @precondition(lambda self: self.ckpt is None and self.truth)
    @rule(data=st.data())
    def compact(self, data: st.DataObject) -> None:
        compact(
            self.store,
            data.draw(st.sampled_from(sorted(self.truth))),
            encrypt=self.decrypt,
            decrypt=self.decrypt,
            threads=1,
        )

    @precondition(lambda self: self.ckpt is None and self.truth)
    @rule(last=st.integers(1, 4))
    def prune(self, last: int) -> None:
        prune(self.store, Retention(last=last))
        kept = self.kept()
        assert set(sorted(self.truth)[-last:]) <= kept
        self.truth = {generation: data for generation, data in self.truth.items() if generation in kept}

    @precondition(lambda self: self.ckpt is None)
    @rule(data=st.data(), resume=st.booleans())
    def open(self, data: st.DataObject, resume: bool) -> None:
        generation: Any = False
        if resume and self.truth:
            generation = data.draw(st.sampled_from([True, *sorted(self.truth)]))
            state = self.truth[max(self.truth) if generation is True else generation]
            self.buffers = {name: allocate(len(content)) for name, content in state.items()}
        self.ckpt = Checkpointer(self.store, self.buffers, resume=generation, **self.options)
        if generation is not False:
            assert self.copy() == state

    @invariant()
    def what_was_committed_is_there(self) -> None:
        assert set(self.truth) <= (self.kept() if self.truth else set())


class TestModel(Machine.TestCase):  # type: ignore[misc,valid-type]
    settings = settings(max_examples=30, stateful_step_count=25)


@pytest.mark.soak
class TestModelLong(Machine.TestCase):  # type: ignore[misc,valid-type]
    settings = settings(max_examples=1000, stateful_step_count=60)

# SPDX-License-Identifier: MIT
"""A power loss at any moment: what a file system may lose of what was not synced is lost, what was committed is there.

The model of a file system (`tests.storing.Recording`) may lose any write and any entry of a directory that was not
synced, each by itself, and may keep any of them early: a rename before the bytes of what was renamed.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dirtytrack.checkpoint import DirectoryStore, verify
from dirtytrack.errors import DamagedCheckpoint, DirtyTrackError, InvalidCheckpoint, StoreFailed
from tests.storing import PAGE, Dying, Hooked, Moment, Recording, crashes, kept, read_back, save, store_at

STEPS = [{"a": bytes([i]) * 2 * PAGE + b"\x07" * PAGE * 3, "b": bytes([200 + i]) * 700} for i in range(5)]


def history(root: Path, files: Hooked, note: Callable[[tuple[str, int]], object]) -> None:
    """Three generations, the last compacted, the others removed, and another one; noted as it is reported."""
    with store_at(root / "runs" / "store", files) as store:
        with store.writer() as writer:
            first = save(writer, store, STEPS[0], meta=0)
            note(("committed", 1))
            second = save(writer, store, STEPS[1], STEPS[0], first, meta=1)
            note(("committed", 2))
        with store.writer() as writer:
            third = save(writer, store, STEPS[2], STEPS[1], second, meta=2)
            note(("committed", 3))
            compacted = save(writer, store, STEPS[2], None, third, revision=1, generation=3, meta=2)
            for each in (1, 2):
                note(("removed", each))
            assert writer.remove([kept(first), kept(second), kept(third)])
            save(writer, store, STEPS[3], STEPS[2], compacted, meta=3)
            note(("committed", 4))


def problem_of(moment: Moment, root: Path, *, next_run: bool = True) -> str | None:
    """What is wrong with what a power loss left."""
    committed = {number for what, number in moment.notes if what == "committed"}
    committed -= {number for what, number in moment.notes if what == "removed"}
    try:
        store = DirectoryStore(root / "runs" / "store")
    except InvalidCheckpoint:
        if committed:
            return "the store is gone"
    except DamagedCheckpoint as error:
        return str(error)
    else:
        with store:
            there = {each.generation for each in store.catalog()}
            report = verify(store, all=True)
            if not committed <= there or not report.ok:
                return f"{committed - there} are gone, or torn: {report}"
            if wrong := [each for each in there if read_back(store, each) != STEPS[store.manifest(each).meta]]:
                return f"{wrong} are not what was saved"
    if not next_run:
        return None
    try:
        return problem_of_the_next_run(root, max(committed, default=0))
    except DirtyTrackError as error:
        return f"the next run: {error}"


def problem_of_the_next_run(root: Path, committed: int) -> str | None:
    with store_at(root / "runs" / "store") as store, store.writer() as writer:
        newest = save(writer, store, STEPS[4])
        if newest.generation <= committed or read_back(store) != STEPS[4]:
            return "the next run saves something else"
        return f"leftovers: {store.strangers()}" if store.strangers() else None


def test_each_legal_loss_leaves_what_was_committed_and_nothing_torn(where: Path) -> None:
    (where / "disk").mkdir()
    files = Recording(where / "disk")
    history(where / "disk", files, files.note)
    seen = 0
    for moment, root in crashes(files, where / "after"):
        seen += 1
        assert problem_of(moment, root) is None, moment
    assert seen > 300
    assert not files.descriptors


class Stumbling(Recording):
    """An operation that makes something durable, visible or gone fails, once."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.left = self.at = 0
        self.failed = ""

    def operate(self, name: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        self.left -= name in ("sync", "sync_directory", "link", "unlink")
        if not self.left and not self.failed and name in ("sync", "sync_directory", "link", "unlink"):
            self.failed, self.at = name, len(self.order)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().operate(name, call, *args, **options)


@pytest.mark.parametrize("cleans", [False, True])
def test_a_failure_and_then_a_power_loss(where: Path, cleans: bool) -> None:
    """What a failed commit left half done, and was taken back, may come to light again: it is not torn either."""
    nth = 0
    while True:
        nth += 1
        disk = where / f"disk{nth}"
        disk.mkdir()
        files = Stumbling(disk)
        with store_at(disk / "runs" / "store", files) as store, store.writer() as writer:
            newest, last = save(writer, store, STEPS[0], meta=0), 0
            files.note(("committed", 1))
            files.left = nth
            for step in (1, 2):
                try:
                    newest, last = save(writer, store, STEPS[step], STEPS[last], newest, meta=step), step
                    files.note(("committed", newest.generation))
                except StoreFailed:
                    if cleans:
                        writer.clean()
        if not files.failed:
            break
        for moment, root in crashes(files, where / "after", files.at):
            assert problem_of(moment, root, next_run=False) is None, (files.failed, moment.notes)
    assert nth > 8


def tell(pipe: int, what: tuple[str, int]) -> None:
    os.write(pipe, f"{what[0]} {what[1]}\n".encode())


def test_killed_before_each_operation(where: Path) -> None:
    """By a signal that nobody can catch; what the process was told of is there, and the next one cleans up."""
    nth, status = 0, -signal.SIGKILL
    while status == -signal.SIGKILL:
        nth += 1
        root = where / str(nth)
        root.mkdir()
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                history(root, Dying(nth), partial(tell, writing))
                os._exit(0)
            finally:
                os._exit(1)
        os.close(writing)
        with os.fdopen(reading) as told:
            notes = tuple((what, int(number)) for what, number in (line.split() for line in told))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert problem_of(Moment(nth, notes, {}), root) is None
        shutil.rmtree(root)
    assert status == 0
    assert nth > 80


class Forgetful(Recording):
    """One sync, of those that there are, does nothing."""

    def __init__(self, root: Path, forgets: int) -> None:
        super().__init__(root)
        self.left = forgets
        self.forgotten = 0

    def operate(self, name: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if name.startswith("sync"):
            self.left -= 1
            if not self.left:
                self._did(name, *args)
                self.forgotten = len(self.order)
                return call(*args, **options)
        return super().operate(name, call, *args, **options)


def test_no_sync_could_be_left_out(where: Path) -> None:
    """Which is also the proof that the test above would see it."""
    (where / "count").mkdir()
    counted = Recording(where / "count")
    history(where / "count", counted, counted.note)
    needless = []
    for forgets in range(1, 1 + sum(each.startswith("sync") for each in counted.order)):
        disk = where / f"disk{forgets}"
        disk.mkdir()
        files = Forgetful(disk, forgets)
        history(disk, files, files.note)
        if not any(problem_of(*crash) for crash in crashes(files, where / "after", files.forgotten)):
            needless.append(files.order[files.forgotten - 1])
    assert not needless

# SPDX-License-Identifier: MIT
"""What goes on behind a save: backpressure, quiesce, failures of the store, interrupts, forks, and the end."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dirtytrack
from dirtytrack import track
from dirtytrack.checkpoint import Checkpointer, DirectoryStore, Save, restore, verify
from dirtytrack.errors import (
    CheckpointerClosed,
    DirtyTrackError,
    InvalidCheckpoint,
    InvalidMemory,
    StoreBusy,
    StoreFailed,
    UsedAfterFork,
)
from tests.saving import PAGE, Program, paged, require_equal
from tests.storing import Failing, Hooked

PACKAGE = str(Path(dirtytrack.__file__).parent)
FINALIZERS = ("_let_go", "__del__")


class Gated(Hooked):
    """Files that are not synced while the gate is shut."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.waiting = threading.Event(), threading.Event()
        self.gate.set()

    def operate(self, name: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if name == "sync" and not self.gate.is_set():
            self.waiting.set()
            assert self.gate.wait(20)
        return call(*args, **options)

    @contextmanager
    def shut(self) -> Iterator[None]:
        self.waiting.clear()
        self.gate.clear()
        try:
            yield
        finally:
            self.gate.set()


def gated(where: Path, pages: int = 30, **options: Any) -> tuple[Gated, Program]:
    files = Gated()
    program = Program(DirectoryStore(where, create=True, files=files), {"data": paged(pages, 1)}, **options)
    program.save()
    return files, program


# ---- while an earlier one is under way


def test_wait_waits_until_the_earlier_is_committed(where: Path) -> None:
    files, program = gated(where)
    with program, files.shut():
        program.buffers["data"][0] ^= 0x55
        first = program.save(wait=False)
        threading.Timer(0.5, files.gate.set).start()
        second = program.save(wait=False)
        assert first.state == "committed"
        assert second.waited_seconds > 0.4 > second.stall_seconds
        assert second.wait(20)
        program.check()


def test_skip_collects_nothing(where: Path) -> None:
    files, program = gated(where, when_busy="skip")
    with program:
        with files.shut():
            program.buffers["data"][0] ^= 0x55
            first = program.save(wait=False)
            program.buffers["data"][5 * PAGE] ^= 0x55
            skipped = program.save(wait=False)
            assert (skipped.kind, skipped.state, skipped.generation, skipped.done) == ("skipped", "skipped", None, True)
            assert not skipped.wait()
        assert first.wait(20)
        assert program.save().bytes_dirty == PAGE
        program.check()


def test_coalesce_takes_the_queued_one_back(where: Path) -> None:
    files, program = gated(where, when_busy="coalesce")
    with program:
        saves = []
        with files.shut():
            for page in range(5):
                program.buffers["data"][page * PAGE] ^= 0x55
                saves.append(program.save(wait=False))
                assert files.waiting.wait(20)  # the first one is begun
        assert saves[-1].wait(20)
        assert [save.state for save in saves] == ["committed", "coalesced", "coalesced", "coalesced", "committed"]
        assert [save.into for save in saves[1:4]] == saves[2:]
        assert saves[1].wait(20)
        assert saves[-1].bytes_dirty == 4 * PAGE
        del program.truth[2 + 1], program.truth[2 + 2], program.truth[2 + 3]
        program.check()


def test_thousands_are_coalesced(where: Path) -> None:
    files, program = gated(where, when_busy="coalesce")
    with program, files.shut():
        program.buffers["data"][0] ^= 1
        program.ckpt.save()
        assert files.waiting.wait(20)
        saves = [program.ckpt.save() for _ in range(2 * sys.getrecursionlimit())]
        files.gate.set()
        assert saves[0].wait(20)
        assert {save.state for save in saves[:-1]} == {"coalesced"}
    assert len(list((where / "segments").iterdir())) == 2


def test_coalesced_saves_that_were_to_be_full_are(where: Path) -> None:
    files, program = gated(where, when_busy="coalesce")
    with program:
        with files.shut():
            program.save(wait=False)
            assert files.waiting.wait(20)
            taken, last = program.save(wait=False, full=True), program.save(wait=False)
        assert last.wait(20)
        assert (taken.kind, taken.state, last.kind) == ("full", "coalesced", "full")
        program.check(1, last.generation or 0)


@pytest.mark.parametrize("when_busy", ["wait", "coalesce"])
def test_waves_wait_for_the_store(where: Path, when_busy: Any) -> None:
    """More dirty bytes than the staging buffer has, while it is not empty."""
    files, program = gated(where, 200, staging_bytes=1 << 16, when_busy=when_busy, compression=None)
    with program:
        for _ in range(3):
            with files.shut():
                program.buffers["data"][:: 3 * PAGE] ^= 0x55
                first = program.save(wait=False)
                program.buffers["data"][:: 4 * PAGE] ^= 0x55
                threading.Timer(0.05, files.gate.set).start()
                second = program.save(wait=False)
            assert first.wait(20)
            assert second.wait(20)
        program.check()


def test_quiesce_is_around_the_copy(where: Path) -> None:
    data = paged(300, 3)
    paused, stop, writers = threading.Lock(), threading.Event(), []

    def write(page: int) -> None:  # keeps all of its pages the same
        for value in itertools.cycle(range(251)):
            if stop.is_set():
                return
            with paused:
                data[page :: 30 * PAGE] = value

    @contextmanager
    def quiesce() -> Iterator[None]:
        with paused:
            yield

    writers = [threading.Thread(target=write, args=(each * PAGE,)) for each in range(4)]
    with Checkpointer(where, {"data": data}, quiesce=quiesce, compression=None, staging_bytes=1 << 17) as ckpt:
        for writer in writers:
            writer.start()
        try:
            for _ in range(12):
                assert ckpt.save().wait(20)
        finally:
            stop.set()
            for writer in writers:
                writer.join()
    for generation in range(1, 13):
        back = restore(where, generation=generation)["data"]
        for each in range(4):
            assert len(set(back[each * PAGE :: 30 * PAGE])) == 1, "of one instant"


def test_a_quiesce_that_fails_loses_nothing(where: Path) -> None:
    broken: list[str] = []

    @contextmanager
    def quiesce() -> Iterator[None]:
        if "enter" in broken:
            raise RuntimeError("the others do not stop")
        yield
        if "exit" in broken:
            raise RuntimeError("the others do not go on")

    with Program(where, {"data": paged(20, 1)}, quiesce=quiesce) as program:
        program.save()
        for how in ("enter", "exit"):
            program.buffers["data"][3 * PAGE] ^= 0x55
            broken.append(how)
            with pytest.raises(RuntimeError, match="the others"):
                program.ckpt.save()
            broken.clear()
            assert program.save().bytes_dirty == PAGE
        program.check()


def test_saves_from_several_threads(where: Path) -> None:
    data = paged(64, 1)
    with Checkpointer(where, {"data": data}) as ckpt:
        saves: list[Any] = []

        def go(page: int) -> None:
            for _ in range(5):
                data[page * PAGE] ^= 0x55
                saves.append(ckpt.save())

        threads = [threading.Thread(target=go, args=(page,)) for page in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ckpt.wait()
        assert sorted(save.generation for save in saves) == list(range(1, 21))
        require_equal(where, {"data": bytes(data)})


def test_a_quiesce_that_swallows_errors_loses_nothing(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Swallowing:
        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> bool:
            return True

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    data = paged(9, 1)
    with Program(where, {"data": data}, quiesce=Swallowing) as program:
        program.save()
        data[0] ^= 0x55
        with monkeypatch.context() as patched:
            patched.setattr("dirtytrack.kernel.sets.gather", interrupted)
            with pytest.raises(InvalidCheckpoint, match="__exit__"):
                program.ckpt.save()
        assert program.ckpt.generation == 1
        program.save()
        program.check()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("doing", ["save", "wait", "close", "wait_for_it"])
def test_who_works_on_a_save_may_not_wait_for_it(where: Path, threads: int, doing: str) -> None:
    """A finaliser may run in any thread, at any time; here it is ``encrypt`` that runs where the collector could."""
    told: list[BaseException] = []

    known = threading.Lock()

    def encrypt(data: bytes) -> bytes:
        if not told:
            try:
                with known:
                    pass
                saves[-1].wait() if doing == "wait_for_it" else getattr(ckpt, doing)()
            except StoreBusy as error:
                told.append(error)
        return data

    saves: list[Save] = []
    with Checkpointer(where, {"data": paged(900, 1)}, encrypt=encrypt, compression=None, threads=threads) as ckpt:
        with known:
            saves.append(ckpt.save())
        assert saves[0].wait(20)
    assert told


def test_quiesce_may_not_save(where: Path) -> None:
    @contextmanager
    def quiesce() -> Iterator[None]:
        with pytest.raises(StoreBusy, match="this thread"):
            ckpt.save()
        yield

    with Checkpointer(where, {"data": bytearray(9)}, quiesce=quiesce) as ckpt:
        assert ckpt.save().wait()


# ---- a store that fails


def operations_of(where: Path, **options: Any) -> int:
    files = Failing()
    with Program(DirectoryStore(where, create=True, files=files), {"data": paged(40, 2)}, **options) as program:
        program.save()
        before = files.count
        program.buffers["data"][:: 7 * PAGE] ^= 0x55
        program.save()
        return files.count - before


@pytest.mark.parametrize(("error", "deltas"), [(errno.ENOSPC, False), (errno.EIO, True), (errno.EROFS, False)])
def test_each_operation_of_a_save_fails(where: Path, error: int, deltas: bool) -> None:
    """Its pages are in the next one, however it failed; and every generation that is there is right."""
    count = operations_of(where, deltas=deltas)
    assert count >= 10
    files = Failing()
    store = DirectoryStore(where.parent / "failing", create=True, files=files)
    program = Program(store, {"data": paged(40, 2)}, deltas=deltas)
    data, failed = program.buffers["data"], 0
    program.save()
    for nth in range(1, count + 1):
        for for_ever in (False, True):
            data[(nth % 40) * PAGE] ^= 0x55
            data[((nth * 7) % 40) * PAGE + 5] = nth
            files.count, files.nth, files.error, files.for_ever = 0, nth, error, for_ever
            files.failed.clear()
            save = program.ckpt.save()
            program.truth[save.generation or 0] = program.copy()
            try:
                save.wait(20)
            except DirtyTrackError as problem:
                failed += 1
                assert getattr(problem, "errno", None) == error
                assert save.state == "failed"
            else:  # an operation whose failure harms nobody
                assert save.state == "committed"
            files.nth = 0
            if nth % 3 == 0:
                data[(nth % 40) * PAGE + 9] ^= 0x55
            with_rest = program.ckpt.save()
            program.truth[with_rest.generation or 0] = program.copy()
            assert with_rest.wait(20)
            if save.state == "failed":
                program.truth.pop(save.generation or 0)
            program.check(with_rest.generation or 0)
    assert failed > count
    program.check()
    assert verify(store, all=True).ok
    program.close()


@pytest.mark.parametrize("operation", ["link", "sync_directory"])
def test_failed_saves_do_not_fill_the_disk(where: Path, operation: str) -> None:
    class Full(Hooked):
        full = False

        def operate(self, name: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
            if self.full and name == operation:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*args, **options)

    files = Full()
    with Program(DirectoryStore(where, create=True, files=files), {"data": paged(9, 1)}) as program:
        program.save()
        files.full = True
        for _ in range(5):
            with pytest.raises(StoreFailed):
                program.ckpt.save(full=True).wait()
        assert len(list((where / "segments").iterdir())) == 1
        files.full = False
        program.save()
        program.check()
        assert len(list((where / "segments").iterdir())) <= 2


def test_a_commit_that_may_have_happened_is_cleaned_up_after_the_next(where: Path) -> None:
    class Unsure(Hooked):
        unsure, linked = False, False

        def operate(self, name: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
            if self.unsure and self.linked and name == "sync_directory":
                self.linked = False
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            self.linked |= name == "link"
            return call(*args, **options)

    files = Unsure()
    with Program(DirectoryStore(where, create=True, files=files), {"data": paged(9, 1)}) as program:
        program.save()
        files.unsure, files.linked = True, False
        for _ in range(5):
            with pytest.raises(StoreFailed):
                program.ckpt.save(full=True).wait()
        files.unsure = False
        assert len(list((where / "segments").iterdir())) == 6  # who knows what the disk has
        program.ckpt.save(full=True).wait()
        assert len(list((where / "segments").iterdir())) == 2


def test_a_failed_full_save_is_followed_by_a_full_one(where: Path) -> None:
    files = Failing()
    with Program(DirectoryStore(where, create=True, files=files), {"data": paged(9, 1)}) as program:
        files.nth, files.only, files.count = 1, ("pwrite",), 0
        save = program.ckpt.save()
        with pytest.raises(StoreFailed):
            save.wait()
        assert program.save().kind == "full"
        files.count = 0
        wanted = program.ckpt.save(full=True)
        with pytest.raises(StoreFailed):
            wanted.wait()
        assert program.save().kind == "increment"  # on the one before
        program.check()


def test_what_was_made_on_a_failed_save_fails_too(where: Path) -> None:
    class Both(Failing, Gated):
        def __init__(self) -> None:
            Failing.__init__(self)
            self.gate, self.waiting = threading.Event(), threading.Event()
            self.gate.set()

        def operate(self, name: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
            return Failing.operate(
                self, name, lambda *a, **o: Gated.operate(self, name, call, *a, **o), *args, **options
            )

    files = Both()
    store = DirectoryStore(where, create=True, files=files)
    with Program(store, {"data": paged(30, 1)}, when_busy="coalesce") as program:
        program.save()
        for full in (False, True):
            with files.shut():
                program.buffers["data"][3 * PAGE] ^= 0x55
                first = program.save(wait=False)
                assert files.waiting.wait(20)
                files.count, files.nth, files.only = 0, 1, ("sync_directory",)
                program.buffers["data"][4 * PAGE] ^= 0x55
                second = program.save(wait=False, full=full)
            with pytest.raises(StoreFailed):
                first.wait(20)
            if full:  # stands for itself
                assert second.wait(20)
            else:
                with pytest.raises(StoreFailed, match="the save before it failed"):
                    second.wait(20)
                del program.truth[second.generation or 0]
            del program.truth[first.generation or 0]
            assert program.ckpt.wait()  # those who waited were told
            assert program.save().bytes_dirty >= (PAGE if full else 2 * PAGE)
        program.check()


def test_an_error_is_told_once(where: Path) -> None:
    files = Failing()
    store = DirectoryStore(where, create=True, files=files)
    program = Program(store, {"data": paged(9, 1)})
    ckpt = program.ckpt

    def fail() -> Any:
        files.nth, files.only, files.count = 1, ("pwrite",), 0
        save = ckpt.save()
        while not save.done:
            time.sleep(0.001)
        return save

    save = fail()  # by the next save, which collects nothing
    assert isinstance(save.error, StoreFailed)
    with pytest.raises(StoreFailed):
        ckpt.save()
    assert program.save().kind == "full"
    save = fail()  # by Save.wait, as often as one asks
    for _ in range(2):
        with pytest.raises(StoreFailed):
            save.wait()
    program.save()
    fail()  # by wait
    with pytest.raises(StoreFailed):
        ckpt.wait()
    assert ckpt.wait()
    fail()  # by close, which lets go of all
    with pytest.raises(StoreFailed):
        ckpt.close()
    ckpt.close()
    with Checkpointer(store, program.buffers) as other:
        assert other.save().wait()


def test_an_error_in_the_block_is_not_hidden_by_one_of_the_store(where: Path) -> None:
    files = Failing(1, only=("pwrite",))
    files.nth = 0
    store = DirectoryStore(where, create=True, files=files)
    with pytest.raises(ZeroDivisionError), Checkpointer(store, {"data": bytearray(9)}) as ckpt:
        files.nth, files.count = 1, 0
        ckpt.save()
        raise ZeroDivisionError


def test_encrypt_that_fails(where: Path) -> None:
    broken: list[int] = []

    def encrypt(data: bytes) -> bytes:
        if broken:
            raise OverflowError("no more nonces")
        return data

    with Program(where, {"data": paged(9, 1)}, encrypt=encrypt, decrypt=lambda data: data) as program:
        program.save()
        program.buffers["data"][0] ^= 0x55
        broken.append(1)
        save = program.ckpt.save()
        with pytest.raises(OverflowError):
            save.wait()
        broken.clear()
        assert program.save().bytes_dirty == PAGE
        program.check()


def test_a_store_whose_directory_is_removed(where: Path) -> None:
    import shutil

    with Program(where, {"data": paged(9, 1)}) as program:
        program.save()
        shutil.rmtree(where)
        save = program.ckpt.save(full=True)
        with pytest.raises(StoreFailed, match="went away"):
            save.wait()


# ---- interrupts


class Interrupt(BaseException):
    pass


# An interrupt that meets a finaliser is ignored by Python, which says so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("staging_bytes", [None, 1 << 16])
@pytest.mark.parametrize("when_busy", ["wait", "coalesce"])
def test_an_interrupt_anywhere_in_a_save_loses_nothing(where: Path, staging_bytes: int | None, when_busy: Any) -> None:
    armed, interrupts, step = False, 0, 0

    def interrupt(number: int, frame: Any) -> None:
        nonlocal interrupts
        # In the library, and what it calls; what is raised in a finaliser is nobody's.
        if (
            armed
            and frame.f_code.co_filename.startswith((PACKAGE, threading.__file__))
            and frame.f_code.co_name not in FINALIZERS
        ):
            interrupts += 1
            raise Interrupt

    data = paged(60, 1)
    options: dict[str, Any] = {"staging_bytes": staging_bytes, "when_busy": when_busy, "compression": None}
    with Program(where, {"data": data}, **options) as program:
        program.save()
        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.00037)
        try:
            end = time.monotonic() + 1
            while time.monotonic() < end or (interrupts <= 50 and time.monotonic() < end + 20):
                step += 1
                data[step % 60 * PAGE] ^= step % 255 + 1
                data[step * 11 % 60 * PAGE + 1] ^= 0x55
                try:
                    armed = True
                    save = program.ckpt.save()
                    armed = False
                    if step % 3 == 0:
                        armed = True
                        save.wait()
                        armed = False
                except Interrupt:
                    armed = False
                if step % 8 == 0:
                    data[step * 3 % 60 * PAGE + 2] ^= 0x55
                    last = program.save()
                    program.check(last.generation or 0)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        last = program.save()
        program.check(last.generation or 0)
    assert interrupts > 50


def test_ctrl_c(where: Path) -> None:
    """From a real signal, at any time, in a loop that saves."""
    program = textwrap.dedent(
        """
        import signal, sys, time, os, threading
        import numpy as np
        from dirtytrack.checkpoint import Checkpointer, restore
        data = np.zeros(400 * 4096, np.uint8)
        caught = 0

        def strike():
            for _ in range(150):
                time.sleep(0.004)
                os.kill(os.getpid(), signal.SIGINT)

        deadline = time.monotonic() + 2
        with Checkpointer(sys.argv[1], {"data": data}, compression=None, staging_bytes=1 << 18) as ckpt:
            step = 0
            threading.Thread(target=strike, daemon=True).start()
            while caught < 60 and time.monotonic() < deadline + 20:
                try:
                    step += 1
                    data[step % 400 * 4096] ^= 0x55
                    data[step * 7 % 400 * 4096] ^= 0x55
                    ckpt.save()
                except KeyboardInterrupt:
                    caught += 1
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            ckpt.save().wait()
        assert (restore(sys.argv[1])["data"] == data).all()
        print("caught", caught)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(where)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) >= 30


# ---- forks, and the end


def test_a_forked_child_may_not_use_it(where: Path) -> None:
    data = paged(9, 1)
    with Checkpointer(where, {"data": data}) as ckpt:
        save = ckpt.save()
        pid = os.fork()
        if not pid:
            code = 1
            try:
                for call in (ckpt.save, ckpt.wait, lambda: ckpt.remove("data"), ckpt.__enter__):
                    try:
                        call()
                    except UsedAfterFork:
                        continue
                    os._exit(2)
                ckpt.close()
                del ckpt
                gc.collect()
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        assert save.wait(20)
        data[0] ^= 0x55
        assert ckpt.save().wait(20)  # the child took nothing with it
        require_equal(where, {"data": bytes(data)})


def test_a_child_that_is_forked_within_a_save_can_end(where: Path) -> None:
    files, program = gated(where)
    with program, files.shut():
        program.buffers["data"][0] ^= 1
        save = program.ckpt.save()
        assert files.waiting.wait(20)
        pid = os.fork()
        if not pid:
            from dirtytrack.checkpoint.saving import _finish_all

            with pytest.raises(UsedAfterFork):
                save.wait()
            _finish_all()  # as at the end of the interpreter
            os._exit(7)
        for _ in range(500):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                break
            time.sleep(0.01)
        else:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            pytest.fail("the child waits for a thread that it does not have")
        assert os.waitstatus_to_exitcode(status) == 7
        files.gate.set()
        assert save.wait(20)


def test_a_child_does_not_keep_the_store(where: Path) -> None:
    ckpt = Checkpointer(where, {"data": bytearray(9)})
    ckpt.save()
    pid = os.fork()
    if not pid:
        time.sleep(20)
        os._exit(0)
    try:
        ckpt.close()
        with Checkpointer(where, {"data": bytearray(9)}, resume=True) as other:
            assert other.resumed is not None
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_after_close(where: Path) -> None:
    ckpt = Checkpointer(where, {"data": bytearray(9)})
    save = ckpt.save()
    ckpt.close()
    assert save.state == "committed"
    for call in (ckpt.save, lambda: ckpt.add("x", bytearray(1)), lambda: ckpt.remove("data")):
        with pytest.raises(CheckpointerClosed, match="resume=True"):
            call()
    assert "closed" in repr(ckpt)
    assert ckpt.generation == 1


def test_one_that_was_forgotten_lets_go(where: Path) -> None:
    files, data = Gated(), paged(9, 1)
    store = DirectoryStore(where, create=True, files=files)
    ckpt = Checkpointer(store, {"data": data})
    with files.shut():
        save = ckpt.save()
        with pytest.raises(StoreBusy):
            Checkpointer(where, {"data": data})
        del ckpt
        gc.collect()
    assert save.wait(20)
    for _ in range(200):
        try:
            Checkpointer(where, {"data": data}, resume=True).close()
            break
        except StoreBusy:
            time.sleep(0.01)
    else:
        pytest.fail("the store is still taken")


def test_saves_under_way_are_finished_at_exit(where: Path) -> None:
    """By a program that neither waits nor closes."""
    program = textwrap.dedent(
        """
        import sys, random
        import numpy as np
        from dirtytrack.checkpoint import Checkpointer
        data = np.frombuffer(random.Random(1).randbytes(8 << 20), np.uint8).copy()
        ckpt = Checkpointer(sys.argv[1], {"data": data}, threads=2, staging_bytes=16 << 20)
        ckpt.save("the last")
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(where)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert restore(where).meta == "the last"


def test_two_checkpointers_of_one_memory(where: Path) -> None:
    data = paged(50, 1)
    with (
        Program(where, {"data": data}) as one,
        Program(where.parent / "other", {"data": data}, compression=None) as two,
    ):
        for step in range(12):
            data[step * PAGE] ^= 0x55
            one.save()
            if step % 3 == 0:
                two.save()
        with track(data) as tracker:
            data[0] ^= 0x55
            assert tracker.collect().page_count == 1
        one.save()
        two.save()
        one.check()
        two.check()


def test_two_writers_of_one_store(where: Path) -> None:
    with Checkpointer(where, {"data": bytearray(9)}) as ckpt:
        with pytest.raises(StoreBusy) as caught:
            Checkpointer(where, {"data": bytearray(9)})
        assert caught.value.pid == os.getpid()
        assert ckpt.save().wait()


def test_it_cannot_be_pickled(where: Path) -> None:
    import pickle

    with Checkpointer(where, {"data": bytearray(9)}) as ckpt, pytest.raises(TypeError, match="pickled"):
        pickle.dumps(ckpt)


def test_memory_that_goes_away(where: Path) -> None:
    import mmap

    from dirtytrack.errors import RegionGone

    memory = mmap.mmap(-1, 9 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = np.frombuffer(memory, np.uint8).__array_interface__["data"][0]
    with Program(where, {"data": paged(9, 1)}) as program:
        program.ckpt.add("gone", (address, 9 * PAGE))
        program.ckpt.save().wait()
        memory.close()
        program.buffers["data"][0] ^= 0x55
        with pytest.raises(RegionGone):
            program.ckpt.save()
        program.ckpt.remove("gone")
        assert program.save().bytes_dirty >= PAGE
        program.check()
        with pytest.raises(InvalidMemory):
            program.ckpt.remove("gone")

# SPDX-License-Identifier: MIT
"""A save of a process that fails, wherever that is: its pages are in the next one, and the process goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dirtytrack import process
from dirtytrack.checkpoint import verify
from dirtytrack.checkpoint.images import ProcessCheckpointer
from dirtytrack.errors import PermissionDenied, StoreFailed, TargetBusy
from tests.programs.imaged import PAGE, Imaged, is_true
from tests.programs.targets import built, protected, running, tracers
from tests.programs.test_images import Settled
from tests.sandbox import run_in_child


@pytest.fixture
def memory() -> Iterator[Settled]:
    with running("pages") as program:
        memory = Settled(program)
        os.sched_setaffinity(program.pid, {0})
        memory.ask("nothing")
        yield memory


def failing(instance: Any, name: str, error: BaseException, after: int = 0) -> Callable[[], None]:
    """Have a method fail, after so many calls; what undoes that."""
    real, calls = getattr(instance, name), iter(range(1 << 30))

    def fail(*arguments: Any, **options: Any) -> Any:
        if next(calls) >= after:
            raise error
        return real(*arguments, **options)

    setattr(instance, name, fail)
    return lambda: setattr(instance, name, real)


def test_what_fails_is_in_the_next_one(memory: Settled, tmp_path: Path) -> None:
    store = tmp_path / "store"
    at = memory.do("map", 200)
    full = StoreFailed("the disk is full, says the test")
    with ProcessCheckpointer(store, memory.pid, precopy_bytes=16 * PAGE) as ckpt:
        breaks: list[Callable[[int], Callable[[], None]]] = [
            lambda _: failing(ckpt._writer, "publish", full),
            lambda _: failing(ckpt._writer, "create_segment", full),
            # Of an increment all that was written is copied before; then there is nothing for a second segment.
            lambda attempt: failing(ckpt._writer, "create_segment", full, after=1 - attempt),
            lambda _: failing(ckpt._watched.tracker, "frozen", full),
            lambda _: failing(ckpt._watched.populated, "all_of", full),  # while it stands still
        ]
        for attempt in range(2):  # of a full one, and of an increment
            for page, broken in enumerate(breaks):
                for some in range(30):
                    memory.do("write", at, 30 * page + some)
                mend = broken(attempt)
                with pytest.raises(StoreFailed, match="says the test"):
                    ckpt.save()
                mend()
                memory.do("write", at, 199)
                if attempt:
                    assert ckpt.save().kind == "increment"
                    assert is_true(Imaged(store), memory.pid)
            image = ckpt.save()
            assert image.kind == ("increment" if attempt else "full")
            assert is_true(Imaged(store), memory.pid)
            assert Imaged(store).read(at, 1) == bytes([2 + attempt])
    assert tracers(memory.pid) == {"0"}
    report = verify(store, all=True)
    assert report.ok
    assert not report.strangers


def test_a_debugger_has_it(memory: Settled, tmp_path: Path) -> None:
    at = memory.do("map", 20)
    with ProcessCheckpointer(tmp_path / "store", memory.pid, timeout=0.1) as ckpt:
        ckpt.save()
        memory.do("write", at, 3)
        with process.attach(memory.pid, include="[stack]") as other, other.frozen(), pytest.raises(TargetBusy):
            ckpt.save()
        assert ckpt.save().kind == "increment"
        assert Imaged(tmp_path / "store").read(at + 3 * PAGE, 1) == b"\2"
        assert is_true(Imaged(tmp_path / "store"), memory.pid)


@pytest.mark.parametrize("moments", [12, pytest.param(300, marks=pytest.mark.soak)])
def test_ctrl_c_at_any_moment(moments: int, memory: Settled, tmp_path: Path) -> None:
    chance, store = random.Random(3), tmp_path / "store"
    at = memory.do("map", 400)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    interrupted = 0
    try:
        with ProcessCheckpointer(store, memory.pid, precopy_bytes=32 * PAGE) as ckpt:
            ckpt.save()
            for _ in range(moments):
                for _ in range(40):
                    memory.do("write", at, chance.randrange(400))
                signal.setitimer(signal.ITIMER_REAL, 0.001 + chance.random() * 0.1)
                try:
                    with suppress(KeyboardInterrupt):
                        ckpt.save()
                        interrupted -= 1
                    interrupted += 1
                finally:
                    with suppress(KeyboardInterrupt):
                        signal.setitimer(signal.ITIMER_REAL, 0)
                ckpt.save()
                assert is_true(Imaged(store), memory.pid)
            assert interrupted
    finally:
        signal.signal(signal.SIGALRM, before)
    assert tracers(memory.pid) == {"0"}
    assert protected(memory.pid) == 0
    report = verify(store, all=True)
    assert report.ok
    assert not report.strangers


def save_as_nobody() -> None:
    """Of a process of one's own; without a privilege, and with the page map's entries hidden."""
    told = []
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            ["build/programs/pages"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        ) as program,
    ):
        assert program.stdin is not None
        assert program.stdout is not None

        def ask(line: str) -> int:
            program.stdin.write(line + "\n")  # type: ignore[union-attr]
            return int(program.stdout.readline(), 16)  # type: ignore[union-attr]

        assert program.stdout.readline() == "up\n"
        at, shared, wide = ask("map 100"), ask("share 20"), ask("reserve 2000")
        with ProcessCheckpointer(Path(folder, "store"), program.pid) as ckpt:
            for step in range(3):
                for place in (at, shared, wide):
                    ask(f"write {place:x} {step}")
                ckpt.save()
                image = Imaged(Path(folder, "store"))
                told.append([image.read(place + step * PAGE, 1)[0] for place in (at, shared, wide)])
                told[-1].append(int(any(image.read(wide + 10 * PAGE, 1000 * PAGE))))
        program.stdin.close()
    try:
        ProcessCheckpointer(Path("/tmp") / f"never-{os.getpid()}", os.getppid())
    except PermissionDenied as error:
        told.append([error.errno or 0])
    print(json.dumps(told))


def test_an_ordinary_user(tmp_path: Path) -> None:
    del tmp_path
    built("pages")
    if os.geteuid() != 0:
        pytest.skip("this is one already")
    *told, refused = json.loads(run_in_child(save_as_nobody, "nobody"))
    assert told == [[2, 2, 1, 0]] * 3
    assert refused[0] in (1, 13)
    assert not list(Path("/tmp").glob("never-*"))

# SPDX-License-Identifier: MIT
"""A source and a destination in processes of their own, and a log of which of them runs.

The source's program writes sequence numbers all over its memory. Whoever runs says so in one log, with the monotonic
clock, which all processes share: `never_both` reads it. What the source's ``state`` gives is the hash of its memory
while it is paused, so that a destination knows by itself whether all is right, also when the source was killed.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import dirtytrack
from dirtytrack.errors import HandOverInDoubt, MigrationFailed
from dirtytrack.migration import Arrival, Destination, Doubt, Goal, Source, transport
from dirtytrack.migration.transport import Link
from dirtytrack.migration.wire import Kind

MIB = 1 << 20
PAGE = 4096
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.kernel.migration.parties"])


# ---- who runs


class Log:
    """Lines of (time, who, "runs" or "stands"), appended at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def say(self, who: str, what: str) -> None:
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        os.write(fd, f"{time.monotonic_ns()} {who} {what}\n".encode())
        os.close(fd)

    def lines(self) -> list[tuple[int, str, str]]:
        rows = [line.split() for line in self.path.read_text().splitlines()]
        return sorted((int(at), who, what) for at, who, what in rows)

    def never_both(self) -> str | None:
        """Fails where both ran at any moment; who runs at the end."""
        running = set[str]()
        for _, who, what in self.lines():
            (running.add if what == "runs" else running.discard)(who)
            assert len(running) <= 1, f"both run: {self.lines()}"
        return next(iter(running), None)


class Program:
    """What is moved: a thread that writes sequence numbers, most of them into a hot part."""

    def __init__(
        self, memory: list[Any], log: Log, who: str, *, hot: float = 0.05, pause_seconds: float = 0.0005
    ) -> None:
        self._views = [memoryview(each).cast("B") for each in memory]
        self._log, self._who, self._hot = log, who, hot
        self._go, self._idle, self._end = threading.Event(), threading.Event(), False
        self._idle.set()
        self._chance = random.Random(1)
        self.stores = 0
        self.slowed = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._end:
            if not self._go.is_set():
                self._idle.set()
                self._go.wait()
                continue
            for _ in range(40):
                self.stores += 1
                view = self._chance.choice(self._views)
                pages = len(view) // PAGE
                span = pages if self.stores % 50 == 0 else max(1, int(pages * self._hot))
                at = self._chance.randrange(span) * PAGE + self._chance.randrange(PAGE // 8) * 8
                view[at : at + 8] = self.stores.to_bytes(8, "little")
            time.sleep(0.0005 + 0.05 * self.slowed)

    def resume(self) -> None:
        self._log.say(self._who, "runs")
        self._idle.clear()
        self._go.set()

    def pause(self) -> None:
        self._go.clear()
        assert self._idle.wait(10)
        self._log.say(self._who, "stands")

    def slow(self, step: float) -> None:
        self.slowed = step

    def end(self) -> None:
        self._end = True
        self._go.set()
        self._thread.join(10)
        for view in self._views:
            view.release()


def digest(memory: list[Any]) -> bytes:
    found = hashlib.blake2b()
    for each in memory:
        found.update(memoryview(each).cast("B"))
    return found.hexdigest().encode()


# ---- dying at a step


class Death:
    """Kill this process before or after it sends the nth frame of a kind."""

    def __init__(self, kind: Kind, *, after: bool, nth: int = 1) -> None:
        self.kind, self.after, self.nth = kind, after, nth

    def __repr__(self) -> str:
        return f"{'after' if self.after else 'before'} {self.kind.name}"

    def arm(self) -> None:
        send, send_pages, left = Link.send, Link.send_pages, [self.nth]

        def dying(link: Link, kind: Kind, body: Any = b"", **more: Any) -> None:
            left[0] -= kind is self.kind
            mine = kind is self.kind and not left[0]
            if mine and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            send(link, kind, body, **more)
            if mine:
                os.kill(os.getpid(), signal.SIGKILL)

        def dying_of_pages(link: Link, *about: Any, **more: Any) -> int:
            left[0] -= self.kind is Kind.PAGES
            mine = self.kind is Kind.PAGES and not left[0]
            if mine and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            pages = send_pages(link, *about, **more)
            if mine:
                os.kill(os.getpid(), signal.SIGKILL)
            return pages

        Link.send = dying  # type: ignore[method-assign,assignment]
        Link.send_pages = dying_of_pages  # type: ignore[method-assign,assignment]


# ---- the processes


class Party:
    """A process that says what happens to it by a pipe."""

    def __init__(self, role: Callable[..., None], *arguments: Any, **options: Any) -> None:
        self.pipe, theirs = _context.Pipe()
        self.process = _context.Process(target=_guarded, args=(role, theirs, arguments, options), daemon=True)
        self.process.start()
        theirs.close()

    def hear(self, *words: str, timeout: float = 30) -> Any:
        """What it says next, which is one of these words; the rest of that message."""
        assert self.pipe.poll(timeout), f"nothing said in time, waiting for {words}"
        said = self.pipe.recv()
        assert said[0] in words, f"{said} instead of {words}"
        return said if len(words) > 1 else said[1:]

    def tell(self, *words: Any) -> None:
        self.pipe.send(words)

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10)

    def end(self) -> None:
        with suppress(OSError):
            self.pipe.close()
        self.process.join(0.3)
        if self.process.is_alive():
            self.kill()
        self.process.close()


def _guarded(role: Callable[..., None], pipe: Connection, arguments: Any, options: Any) -> None:
    try:
        role(pipe, *arguments, **options)
    except (EOFError, BrokenPipeError):
        pass
    except BaseException as error:
        with suppress(OSError):
            pipe.send(("broken", repr(error)))
        raise


def _timed(doubt: str | None) -> Callable[[Doubt], Any] | None:
    return None if doubt is None else lambda _: doubt


def source(
    pipe: Connection,
    log: Path,
    *,
    nbytes: list[int],
    goal: Goal | None = None,
    shared: bool = False,
    fill: float = 0.5,
    death: Death | None = None,
    verdict: str | None = None,
    **options: Any,
) -> None:
    """Runs its program, migrates when it is told to, and says how it went."""
    memory: list[Any] = [dirtytrack.allocate(n, name=f"m{i}", shared=shared) for i, n in enumerate(nbytes)]
    chance = random.Random(7)
    for each in memory:
        view = memoryview(each)
        for at in range(0, int(len(view) * fill), PAGE):
            view[at : at + 16] = chance.randbytes(16)
        view.release()
    diary = Log(log)
    program = Program(memory, diary, "source", hot=options.pop("hot", 0.05))
    program.resume()
    migrating = Source(
        {f"m{i}": each for i, each in enumerate(memory)},
        pause=program.pause,
        resume=program.resume,
        state=lambda: digest(memory),
        slow=program.slow,
        arbiter=_timed(verdict),
        **{"timeout": 5.0, "stop_timeout": 5.0, "doubt_timeout": 1.0, **options},
    )
    if death is not None:
        death.arm()
    pipe.send(("ready", os.getpid()))
    while True:
        order, *arguments = pipe.recv()
        if order == "migrate":
            try:
                moved = migrating.migrate(arguments[0], goal)
                pipe.send(("moved", moved, digest(memory), program.stores))
            except HandOverInDoubt as error:
                pipe.send(("doubt", str(error), migrating.may_run))
            except MigrationFailed as error:
                assert migrating.may_run, error
                pipe.send(("failed", type(error).__name__, str(error)))
            except Exception as error:
                pipe.send(("broken", repr(error)))
        elif order == "resolve":
            migrating.resolve(arguments[0])
            pipe.send(("resolved",))
        elif order == "settle":
            try:
                pipe.send(("moved", migrating.settle(arguments[0]), digest(memory), program.stores))
            except HandOverInDoubt as error:
                pipe.send(("doubt", str(error), migrating.may_run))
            except MigrationFailed as error:
                pipe.send(("failed", type(error).__name__, str(error)))
        elif order == "alive?":
            before = program.stores
            time.sleep(0.05)
            pipe.send(("alive", program.stores > before and migrating.may_run))


def destination(
    pipe: Connection,
    log: Path,
    *,
    listen: str = "tcp://127.0.0.1:0",
    death: Death | None = None,
    verdict: str | None = None,
    attempts: int = 1,
    restrictions: tuple[str, ...] = (),
    **options: Any,
) -> None:
    """Receives, says whether all is right, and runs the program."""
    from tests.sandbox import RESTRICTIONS

    for restriction in restrictions:
        RESTRICTIONS[restriction]()
    diary = Log(log)
    if death is not None:
        death.arm()
    options = {"timeout": 5.0, "doubt_timeout": 1.0, **options}
    with Destination(listen, arbiter=_timed(verdict), **options) as receiving:
        pipe.send(("listens", receiving.address, os.getpid()))
        for left in reversed(range(attempts)):
            try:
                _run(pipe, receiving.receive(), diary)
                break
            except HandOverInDoubt as error:
                assert not receiving.may_run
                pipe.send(("doubt", str(error)))
                order, *arguments = pipe.recv()
                if order == "resolve":
                    arrival = receiving.resolve(arguments[0])
                    if arrival is not None:
                        _run(pipe, arrival, diary)
                    else:
                        pipe.send(("resolved",))
                    break
            except MigrationFailed as error:
                assert not receiving.may_run
                pipe.send(("failed", type(error).__name__, str(error)))
                if not left:
                    break
        pipe.recv()


def _run(pipe: Connection, arrival: Arrival, diary: Log) -> None:
    memory = [arrival.memory[name] for name in sorted(arrival.memory)]
    diary.say("destination", "runs")
    found = digest(memory)
    pipe.send(("runs", found == arrival.state, found, arrival.received_bytes))


__all__ = ["Death", "Log", "Party", "destination", "digest", "source", "transport"]

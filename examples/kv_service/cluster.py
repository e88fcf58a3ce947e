# SPDX-License-Identifier: MIT
"""Processes of the service on this machine, and clients that keep them busy."""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import tempfile
import time
from contextlib import suppress
from multiprocessing.context import ForkServerProcess

from .client import Client, ServiceGone
from .history import Operation
from .process import run
from .registry import Registry

CLIENTS = 6


# Processes that begin with everything imported: they are there in milliseconds.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([f"{__package__}.process"])


class Cluster:
    """Some processes, and the directory that they have in common, which ends with them.

    Args:
        mib: of the table.
    """

    def __init__(self, mib: int) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self.registry, self._mib = Registry(self._directory.name), mib
        self._processes: dict[str, ForkServerProcess] = {}
        self._theirs, self._ours = _context.Pipe(duplex=False)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *error: object) -> None:
        for name in self._processes:
            self.kill(name)
        self._theirs.close()
        self._ours.close()
        self._directory.cleanup()

    def start(self, *names: str) -> None:
        """A process that serves, and others to which the service can move; or others, if there are some already."""
        for name in names:
            role = "receive" if self._processes else "serve"
            about = role, name, str(self.registry.directory), self._mib, self._theirs
            self._processes[name] = made = _context.Process(target=run, args=about)
            made.start()
        for name in names:
            while not self.registry.alive(name):
                if not self._processes[name].is_alive():
                    raise RuntimeError(f"process {name} ended with status {self._processes[name].exitcode}")
                time.sleep(0.002)

    def kill(self, name: str) -> float:
        """SIGKILL. Returns when (time.monotonic)."""
        at, process = time.monotonic(), self._processes[name]
        process.kill()
        process.join()
        return at


class Load:
    """Clients that do something all the time, and what they see."""

    def __init__(self, registry: Registry, *, seed: int = 0, patience: float = 10.0) -> None:
        self.history: list[Operation] = []
        self.clients = [
            Client(registry, f"client-{number}", self.history, patience=patience) for number in range(CLIENTS)
        ]
        self.counted = 0
        self._random = random.Random(seed)
        self._stop = asyncio.Event()
        self._tasks = [asyncio.create_task(self._run(each)) for each in self.clients]

    async def _run(self, client: Client) -> None:
        """Few keys, so that clients are in one another's way; counters, so that nothing done twice is overlooked."""
        values, chance = 0, self._random
        with client, suppress(ServiceGone):
            while not self._stop.is_set():
                key, counter = f"key-{chance.randrange(12)}", f"counter-{chance.randrange(4)}"
                what = chance.random()
                values += 1
                value = f"{client.name} {values}"
                if what < 0.4:
                    await client.add(counter, 1)
                    self.counted += 1
                elif what < 0.6:
                    await client.set(key, value)
                elif what < 0.8:
                    await client.cas(key, await client.get(key), value)
                else:
                    await client.get(key)

    def look(self) -> None:
        """Raise what a client failed of, if one did."""
        for task in self._tasks:
            if task.done():
                task.result()

    async def end(self, *, answered: bool = True) -> None:
        """Stop when all commands have their answer, or at once."""
        self._stop.set()
        for task in self._tasks:
            if not answered:
                task.cancel()
        for result in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result

    async def __aenter__(self) -> Load:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *error: object) -> None:
        await self.end(answered=kind is None)

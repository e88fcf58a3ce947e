# SPDX-License-Identifier: MIT
"""The service: answers clients, moves to another process when it is told to, and answers there.

A line from a client is JSON, ``[client, number, command, ...]``; so is the answer: ``["ok", result]``,
``["refused", why]``, or ``["moved", address]`` when the service is there now. While the service moves, requests wait: a
client sees one longer answer, and then has to connect elsewhere.
"""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import suppress
from typing import Any

from dirtytrack.errors import DirtyTrackError, MigrationFailed
from dirtytrack.migration import Arrival, Destination, Goal, Progress, Source

from .registry import Registry
from .store import Refused, Store

_LONGEST = 4096  # bytes of a line


class Server:
    """One process that serves, or waits to.

    Args:
        registry: of this process.

    Thread safety: `pause` and `resume` from any thread; the rest in the event loop's.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._store: Store | None = None
        self._gate = threading.Lock()  # a command is done wholly before a pause or behind it
        self._serving = False
        self._successor: str | None = None
        self._changed = asyncio.Event()
        self._moving = asyncio.Lock()
        self._address = ""
        self._loop = asyncio.get_running_loop()

    async def listen(self) -> None:
        """Take connections, whose requests wait until this process serves."""
        self._listening = await asyncio.start_server(self._client, "127.0.0.1", 0, limit=_LONGEST)
        host, port = self._listening.sockets[0].getsockname()
        self._address = f"{host}:{port}"

    async def begin(self, store: Store) -> None:
        """Serve what is in that."""
        self._registry.register(clients=self._address)
        self._serve(store)

    async def take_over(self) -> None:
        """Serve what another process serves now, when it moves here."""
        with self._destination() as destination:
            arrival = await asyncio.to_thread(self._receive, destination)
            self._serve(arrival.prepared)

    def _serve(self, store: Store) -> None:
        self._store = store
        self._registry.claim()
        self.resume()

    # ---- what a migration asks for

    def pause(self) -> None:
        """From when this returns no command is done."""
        with self._gate:
            stood, self._serving = not self._serving, False
        if not stood:
            self._registry.say("stands")

    def resume(self) -> None:
        """Do commands, those first that wait."""
        if not self._serving:
            self._registry.say("runs")
        with self._gate:
            self._serving = True
        self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # ---- clients

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.CancelledError):
            while line := await reader.readline():
                try:
                    answer = await self._answer(*json.loads(line))
                except (Refused, TypeError, ValueError) as error:
                    answer = ["refused", str(error)]
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        writer.close()

    async def _answer(self, client: str, number: int, command: str, *arguments: Any) -> list[Any]:
        if command == "migrate":
            return await self._migrate(*arguments)
        while True:
            changed = self._changed
            with self._gate:
                if self._serving and self._store is not None:
                    return ["ok", self._store.do(client, number, command, *arguments)]
            if self._successor is not None:
                return ["moved", self._successor]
            await changed.wait()

    # ---- moving

    async def _migrate(self, name: str, options: dict[str, Any]) -> list[Any]:
        """Move to the process of that name. Options: bandwidth, max_downtime."""
        async with self._moving:
            if self._successor is not None:
                return ["moved", self._successor]
            if not self._serving:
                raise Refused("it is not here")
            try:
                to, successor = (self._registry.address(name, what) for what in ("migration", "clients"))
            except KeyError as error:
                raise Refused(str(error)) from None
            try:
                told = await asyncio.to_thread(self._move, name, to, options)
            except DirtyTrackError as error:
                if not self._serving:
                    raise
                raise Refused(f"it runs on here: {error}") from error
            self._successor = successor
            self._wake()
            return ["ok", told]

    def _move(self, name: str, to: str, options: dict[str, Any]) -> dict[str, float]:
        assert self._store is not None, "it serves"
        source = Source(
            self._store.memory,
            pause=self.pause,
            resume=self.resume,
            bandwidth=options.get("bandwidth"),
            timeout=5.0,
            doubt_timeout=None,
            arbiter=lambda _: self._registry.verdict(name),
            progress=self._tell,
        )
        with source:
            moved = source.migrate(to, Goal(max_downtime=options.get("max_downtime", 0.05)))
        return {"downtime": moved.downtime, "predicted": moved.predicted_downtime, "rounds": len(moved.rounds)}

    def _destination(self) -> Destination:
        came_from = ""

        def prepare(arrival: Arrival) -> Store:
            """Made ready before the source decides, and not served."""
            nonlocal came_from
            came_from = self._registry.owner() or ""
            return Store(arrival.memory)

        return Destination(
            prepare=prepare,
            timeout=5.0,
            doubt_timeout=None,
            arbiter=lambda _: self._registry.verdict(came_from),
            progress=self._tell,
        )

    def _receive(self, destination: Destination) -> Arrival:
        self._registry.register(migration=destination.address, clients=self._address)
        while True:
            try:
                return destination.receive()
            except MigrationFailed as error:
                self._registry.say(f"waits on: {error}")

    def _tell(self, progress: Progress) -> None:
        if progress.phase in ("bulk", "stopped", "prepared", "in doubt", "moved", "committed"):
            self._registry.say(f"is {progress.phase} {progress.round}")

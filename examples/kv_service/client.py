# SPDX-License-Identifier: MIT
"""A client, which finds the service wherever it is, and sends a command until it has its answer."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

from .history import Operation
from .store import Refused, Value

if TYPE_CHECKING:
    from .registry import Registry


class ServiceGone(Exception):
    """Nobody answered for too long."""


class Client:
    """One that has one command under way at a time.

    Args:
        registry: where to look for the service, first and when a connection breaks.
        name: of this client, and of no other.
        history: where to keep what it saw.
        patience: how long a command may take, in seconds, with all that is tried meanwhile.

    Thread safety: none; for one task.
    """

    def __init__(
        self, registry: Registry, name: str, history: list[Operation] | None = None, *, patience: float = 10.0
    ) -> None:
        self._registry, self.name, self._patience = registry, name, patience
        self._history = [] if history is None else history
        self._writes = 0
        self._address = ""
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.moves = 0
        """How often it was told that the service has moved."""
        self.longest = 0.0
        """The longest that it waited for an answer, in seconds."""

    async def get(self, key: str) -> Value:
        return await self._recorded("get", key)

    async def set(self, key: str, value: Value) -> None:
        await self._recorded("set", key, value)

    async def add(self, key: str, amount: int) -> Value:
        return await self._recorded("add", key, amount)

    async def cas(self, key: str, expected: Value, value: Value) -> bool:
        """Write it if there is what was expected; whether there was."""
        return bool(await self._recorded("cas", key, expected, value))

    async def migrate(self, name: str, **options: float) -> dict[str, float]:
        """Have the service move to the process of that name, and wait until it has.

        Raises:
            Refused: it runs on where it was.
            ConnectionError: who was asked is gone, and who serves now is in the registry.
        """
        told: Any = await self._ask(0, "migrate", name, options, again=False)
        return dict(told)

    async def _recorded(self, command: str, key: str, *arguments: Value) -> Value:
        number = self._writes + (command != "get")
        seen = Operation(self.name, command, key, arguments, time.monotonic())
        self._history.append(seen)
        try:
            seen.result = await asyncio.wait_for(self._ask(number, command, key, *arguments), self._patience)
        except asyncio.TimeoutError:
            raise ServiceGone(f"{self.name} has had no answer for {self._patience:g} s") from None
        except Refused:
            self._history.remove(seen)  # it was not done
            raise
        seen.answered = time.monotonic()
        self._writes = number
        self.longest = max(self.longest, seen.answered - seen.requested)
        return seen.result

    async def _ask(self, number: int, command: str, *arguments: Any, again: bool = True) -> Value:
        line = json.dumps([self.name, number, command, *arguments]).encode() + b"\n"
        while True:
            try:
                reader, writer = await self._connected()
                writer.write(line)
                answer = await reader.readline()
                if not answer:
                    raise ConnectionError("the other side has closed")
            except OSError:
                self.close()
                if not again:
                    raise
                # Who is there now? The same number again: it is not done twice.
                await asyncio.sleep(0.005)
                continue
            kind, result = json.loads(answer)
            if kind == "ok":
                return result  # type: ignore[no-any-return]
            if kind == "refused":
                raise Refused(result)
            self.close()
            self._address = result
            self.moves += 1

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is None:
            if not self._address:
                try:
                    self._address = self._registry.address(self._registry.owner() or "", "clients")
                except KeyError:
                    raise ConnectionError("nobody serves yet") from None
            host, _, port = self._address.rpartition(":")
            self._streams = await asyncio.open_connection(host, int(port))
        return self._streams

    def close(self) -> None:
        streams, self._streams, self._address = self._streams, None, ""
        if streams is not None:
            streams[1].close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

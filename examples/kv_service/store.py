# SPDX-License-Identifier: MIT
"""What the service does with its memory: commands on a table, each of a client's done once however often it is sent."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import dirtytrack

from .table import Table, TableFull

if TYPE_CHECKING:
    from collections.abc import Mapping

Value = str | int | None

TABLE, SESSIONS = "table", "sessions"


class Refused(Exception):
    """A command that cannot be done, as its client is told."""


class Store:
    """Two tables in memory: the clients' keys, and the last answer to each client.

    The answers are memory like the keys and move with them. So a client that lost its connection asks again, wherever
    the service is now, and its write is neither lost nor done twice.

    Args:
        memory: by the names "table" and "sessions"; all zero, or another store's.

    Thread safety: none.
    """

    def __init__(self, memory: Mapping[str, dirtytrack.Memory]) -> None:
        self.memory = {name: memory[name] for name in (TABLE, SESSIONS)}
        self.table, self.sessions = (Table(each) for each in self.memory.values())

    @staticmethod
    def allocate(nbytes: int) -> Store:
        """An empty one, with so many bytes for its keys."""
        sizes = {TABLE: nbytes, SESSIONS: 1 << 20}
        return Store({name: dirtytrack.allocate(size, name=name) for name, size in sizes.items()})

    def do(self, client: str, number: int, command: str, *arguments: Any) -> Value:
        """Do a command, or say again what came of it.

        Args:
            client: who wants it.
            number: of this client's writes, from 1. The last one's may be sent again. Reads have none.

        Raises:
            Refused: the command, or its number, is none. It was not done, and its number is still free.
        """
        try:
            if command == "get":
                return self.get(*arguments)
            session = client.encode()
            if (last := self.sessions.get(session)) is None:
                self.sessions.put(session, b"[0, null]")  # from here on it has room
                before, answer = 0, None
            else:
                before, answer = json.loads(last.value)
            if number == before:
                return answer
            if number != before + 1:
                raise Refused(f"write {number} of {client} does not follow {before}")
            answer = self._write(command, *arguments)
            self.sessions.put(session, json.dumps([number, answer]).encode())
        except (TypeError, ValueError, AttributeError, TableFull) as error:
            raise Refused(str(error)) from error
        return answer

    def _write(self, command: str, key: str, *arguments: Value) -> int:
        found = self.get(key)
        if command == "set":
            (value,) = arguments
            return self._put(key, value)
        if command == "add":
            (amount,) = arguments
            if not isinstance(found, int | None) or not isinstance(amount, int):
                raise Refused(f"{key} is {found!r}: no number")
            self._put(key, (found or 0) + amount)
            return (found or 0) + amount
        if command == "cas":
            expected, value = arguments
            return found == expected and self._put(key, value) > 0
        raise Refused(f"{command!r} is no command: get, set, add, cas are")

    def get(self, key: str) -> Value:
        entry = self.table.get(key.encode())
        return None if entry is None else json.loads(entry.value)

    def _put(self, key: str, value: Value) -> int:
        return self.table.put(key.encode(), json.dumps(value).encode())

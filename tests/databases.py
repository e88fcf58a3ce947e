# SPDX-License-Identifier: MIT
"""Databases of sqlite's whose pages lie in memory of ours (`sqlite3_deserialize`), which the sqlite3 module cannot."""

from __future__ import annotations

import ctypes
import sqlite3
from pathlib import Path
from typing import Any

__all__ = ["Sqlite"]

_PAGE_COUNT = slice(28, 32)  # in the header of a database
_ROW = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(ctypes.c_char_p), ctypes.c_void_p)


class Sqlite:
    """A database in a buffer, which is not to move: begun where the buffer is empty, else the one that is there."""

    def __init__(self, memory: Any) -> None:
        connection = sqlite3.connect(":memory:")
        self._library = ctypes.CDLL(self._path())
        for name in ("sqlite3_deserialize", "sqlite3_exec", "sqlite3_open"):
            getattr(self._library, name).restype = ctypes.c_int
        self._database = ctypes.c_void_p()
        self._check(self._library.sqlite3_open(b":memory:", ctypes.byref(self._database)))
        view = memoryview(memory).cast("B")
        there = int.from_bytes(view[_PAGE_COUNT], "big") * 4096
        size = ctypes.c_longlong
        into = ctypes.c_char.from_buffer(view)
        flags = 0  # not resizeable, not read-only, not to be freed
        self._check(
            self._library.sqlite3_deserialize(
                self._database, b"main", ctypes.byref(into), size(there), size(view.nbytes), flags
            )
        )
        connection.close()

    @staticmethod
    def _path() -> str:
        """The library that Python's own module has loaded."""
        paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "sqlite3" in line}
        return next(path for path in sorted(paths, reverse=True) if ".so" in path)

    @staticmethod
    def _check(code: int) -> None:
        assert code == 0, f"sqlite answered {code}"

    def run(self, sql: str) -> list[tuple[str, ...]]:
        """The rows of it, as text. Without the global lock, as any call of ctypes."""
        rows: list[tuple[str, ...]] = []

        def row(_: Any, count: int, values: Any, names: Any) -> int:
            rows.append(tuple((values[at] or b"").decode() for at in range(count)))
            return 0

        self._check(self._library.sqlite3_exec(self._database, sql.encode(), _ROW(row), None, None))
        return rows

    def close(self) -> None:
        self._check(self._library.sqlite3_close(self._database))

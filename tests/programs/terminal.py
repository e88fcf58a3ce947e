# SPDX-License-Identifier: MIT
"""A program in a real terminal: a pseudo-terminal, and pyte, which knows what a terminal would show."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Sequence
from types import TracebackType

import pyte

WAIT_SECONDS = 60  # of a machine that does much else; nothing takes so long that is right


class Terminal:
    """Runs a program in a terminal of that size, until the end of the ``with``."""

    def __init__(self, command: Sequence[str], *, columns: int = 120, lines: int = 24, **environment: str) -> None:
        self._screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self._screen)
        self._ours, theirs = pty.openpty()
        self.resize(columns, lines)
        unwanted = {"NO_COLOR", "COLUMNS", "LINES", "FORCE_COLOR"}
        inherited = {name: value for name, value in os.environ.items() if name not in unwanted}
        self.before = termios.tcgetattr(theirs)
        self._theirs = theirs
        self.raw = b""
        self.program = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env={**inherited, "TERM": "xterm-256color", "PYTHONUTF8": "1", **environment},
        )

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.program.kill()
        self.program.wait()
        os.close(self._ours)
        os.close(self._theirs)

    def resize(self, columns: int, lines: int) -> None:
        """Give it another size, as dragging a window's corner does."""
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self._screen.resize(lines, columns)

    def press(self, keys: str) -> None:
        """Type."""
        os.write(self._ours, keys.encode())

    def lines(self) -> list[str]:
        """What is on the screen."""
        return [line.rstrip() for line in self._screen.display]

    def colours(self) -> set[str]:
        """Of what is on the screen, as pyte calls them."""
        return {cell.fg for row in self._screen.buffer.values() for cell in row.values() if cell.data != " "}

    def _read(self, seconds: float) -> bool:
        ready, _, _ = select.select([self._ours], [], [], seconds)
        if ready:
            data = os.read(self._ours, 1 << 16)
            self.raw += data
            self._stream.feed(data)
        return bool(ready)

    def settled(self) -> list[str]:
        """What is on the screen once nothing more comes for a while."""
        while self._read(0.25):
            pass
        return self.lines()

    def until(self, seen: Callable[[list[str]], object], what: str, *, seconds: float = WAIT_SECONDS) -> list[str]:
        """Wait until the screen is so; fails with what it is, where it never is."""
        end = time.monotonic() + seconds
        while not seen(self.lines()):
            if time.monotonic() > end or self.program.poll() is not None:
                self._read(0)
                raise AssertionError(f"never seen: {what}. The screen:\n" + "\n".join(self.lines()))
            self._read(0.05)
        return self.lines()

    def ended(self) -> int:
        """Wait for the program's end and return its exit status."""
        end = time.monotonic() + WAIT_SECONDS
        while self.program.poll() is None:
            assert time.monotonic() < end, "it does not end:\n" + "\n".join(self.lines())
            self._read(0.05)
        self._read(0)
        return self.program.returncode

    def settings(self) -> list[object]:
        """Of the terminal, as termios has them."""
        return list(termios.tcgetattr(self._theirs))

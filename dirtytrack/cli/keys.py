# SPDX-License-Identifier: MIT
"""Keys of a terminal, one by one, without waiting for the end of a line."""

from __future__ import annotations

import os
import re
import select
import sys
import termios
import tty
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Keys", "names"]

_SEQUENCES = {
    b"\x1b[A": "up",
    b"\x1b[B": "down",
    b"\x1b[C": "right",
    b"\x1b[D": "left",
    b"\x1b[5~": "page up",
    b"\x1b[6~": "page down",
    b"\x1b[H": "home",
    b"\x1b[F": "end",
    b"\x1b[1~": "home",
    b"\x1b[4~": "end",
    b"\x1b[Z": "back tab",
}
_NAMES = {
    b"\r": "enter",
    b"\n": "enter",
    b"\t": "tab",
    b"\x1b": "escape",
    b"\x7f": "backspace",
    b"\x08": "backspace",
    b"\x03": "interrupt",
    b" ": "space",
}
_UNFINISHED = re.compile(rb"\x1b(\[[0-9;]*|O)?$")
_REST_SECONDS = 0.05  # how long the rest of a key's bytes may take; Escape alone waits for it in vain


def names(data: bytes) -> Iterator[str]:
    """What these bytes of a terminal say: names of keys, or the character itself. What is not known is passed over."""
    at = 0
    while at < len(data):
        if data[at : at + 2] == b"\x1bO":  # what some terminals send for an arrow in place of ESC [
            data = data[:at] + b"\x1b[" + data[at + 2 :]
        if data[at : at + 2] == b"\x1b[":
            end = at + 2
            while end < len(data) and not 0x40 <= data[end] <= 0x7E:
                end += 1
            name = _SEQUENCES.get(data[at : end + 1])
            if name:
                yield name
            at = end + 1
            continue
        one = data[at : at + 1]
        at += 1
        if one in _NAMES:
            yield _NAMES[one]
        elif one.isascii() and one >= b" ":
            yield one.decode("ascii")


class Keys:
    """Standard input's terminal without echo and without lines, while in the ``with``; as it was, afterwards."""

    def __init__(self, fd: int | None = None) -> None:
        self._fd = sys.stdin.fileno() if fd is None else fd
        self._before: Any = None

    def __enter__(self) -> Self:
        self._before = termios.tcgetattr(self._fd)
        tty.setcbreak(self._fd)
        settings = termios.tcgetattr(self._fd)
        settings[6][termios.VSUSP] = b"\0"  # Ctrl-Z would leave the screen as it is to the shell
        termios.tcsetattr(self._fd, termios.TCSANOW, settings)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)

    def pressed(self, seconds: float) -> list[str] | None:
        """The keys that were pressed, waiting at most so long for the first; None where the terminal has gone."""
        ready, _, _ = select.select([self._fd], [], [], max(0.0, seconds))
        if not ready:
            return []
        try:
            data = os.read(self._fd, 1024)
            while data and _UNFINISHED.search(data) and select.select([self._fd], [], [], _REST_SECONDS)[0]:
                rest = os.read(self._fd, 1024)
                if not rest:
                    break
                data += rest
        except OSError:
            return None
        return list(names(data)) if data else None

# SPDX-License-Identifier: MIT
"""A foreign program that writes a known set of pages, over and over: what others say of it can be checked.

It prints the address of its memory, then obeys lines of standard input: ``write FIRST LAST`` sets which pages each step
writes, ``fork`` makes a child that goes on by itself, and the end of the input ends it.
"""

from __future__ import annotations

import mmap
import os
import select
import subprocess
import sys
from types import TracebackType

PAGE = mmap.PAGESIZE
PAGES = 4096
STEP_SECONDS = 0.005
_MAP_NORESERVE = 0x4000  # keeps the kernel from joining it with a neighbour


class Steady:
    """The program, as a test runs it: ``pid``, and the ``address`` of its memory."""

    def __init__(self) -> None:
        self.program = subprocess.Popen(
            [sys.executable, "-I", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self.program.pid
        assert self.program.stdout is not None
        self.address = int(self.program.stdout.readline())

    def __enter__(self) -> Steady:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.program.kill()
        self.program.communicate()

    def told(self, line: str) -> str:
        """Tell it, and return what it says once it has done so."""
        assert self.program.stdin is not None
        assert self.program.stdout is not None
        self.program.stdin.write(line + "\n")
        self.program.stdin.flush()
        return self.program.stdout.readline().strip()

    def writes(self, first: int, last: int) -> None:
        """Which pages each step writes from now on; they have been written once when this returns."""
        assert self.told(f"write {first} {last}") == "written"

    def forks(self) -> int:
        """The number of a child that does the same, until its parent ends."""
        return int(self.told("fork"))

    def ends(self) -> None:
        """End it."""
        self.program.kill()
        self.program.wait()


def _run() -> None:
    import ctypes

    memory = mmap.mmap(-1, PAGES * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
    first, last, value, parent, waits = 0, 0, 0, os.getppid(), True
    while os.getppid() == parent:
        value = (value + 1) % 256
        for page in range(first, last):
            memory[page * PAGE] = value
        if not waits:
            select.select([], [], [], STEP_SECONDS)
            continue
        ready, _, _ = select.select([sys.stdin], [], [], STEP_SECONDS)
        if not ready:
            continue
        words = sys.stdin.readline().split()
        if not words:
            return
        if words[0] == "write":
            first, last = int(words[1]), int(words[2])
            for page in range(first, last):
                memory[page * PAGE] = value
            print("written", flush=True)
        elif words[0] == "fork":
            me = os.getpid()
            child = os.fork()
            if child:
                print(child, flush=True)
            else:
                parent, waits = me, False


if __name__ == "__main__":
    _run()

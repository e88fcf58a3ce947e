# SPDX-License-Identifier: MIT
"""A process that has no memory of its own yet: until a child of vfork replaces itself by exec it has its parent's."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from dirtytrack import Pagemap
from dirtytrack.errors import TargetBusy, TargetGone
from dirtytrack.process import attach
from tests.oracle import PAGE
from tests.programs.targets import Program, python, running

SPAWNS = """
import os, sys
print("up")
input()
cat = os.posix_spawn("/bin/cat", ["cat"], {}, file_actions=[(os.POSIX_SPAWN_OPEN, 0, %r, os.O_RDONLY, 0)])
print("spawned")
os.waitpid(cat, 0)
"""


class Early:
    """A child of vfork that waits before its exec, for somebody to write to what it is to read."""

    def __init__(self, parent: Program, fifo: Path) -> None:
        self.parent, self._fifo = parent, fifo
        assert parent.process.stdin is not None
        parent.process.stdin.write("\n")
        parent.process.stdin.flush()
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        until = time.monotonic() + 30
        while not children.read_text():
            assert time.monotonic() < until
            time.sleep(0.001)
        self.pid = int(children.read_text())

    def go_on(self) -> int:
        """Let it become the program; a descriptor of its standard input."""
        into = os.open(self._fifo, os.O_WRONLY)
        assert self.parent.answer() == "spawned"
        return into


@pytest.fixture
def early(tmp_path: Path) -> Iterator[Early]:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with running(*python(SPAWNS % str(fifo))) as parent:
        yield Early(parent, fifo)
        with suppress(OSError):  # ENXIO: nobody waits for it any more
            os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))


def test_a_page_map_is_of_the_program_and_not_of_its_parent(early: Early) -> None:
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(Pagemap, early.pid)
        time.sleep(0.1)
        assert not opening.done(), "it has its parent's memory"
        into = early.go_on()
        with opening.result(timeout=30) as pagemap:
            pagemap.scan(0, PAGE)
            os.close(into)
            assert early.parent.process.wait(timeout=30) == 0
            with pytest.raises(TargetGone, match="ended"):
                pagemap.scan(0, PAGE)


def test_what_the_program_writes_is_tracked(early: Early) -> None:
    with ThreadPoolExecutor(1) as pool:
        attaching = pool.submit(attach, early.pid, timeout=30.0)
        time.sleep(0.1)
        assert not attaching.done(), "it has its parent's memory"
        into = early.go_on()
        with attaching.result(timeout=30) as tracker:
            tracker.collect()
            before = tracker.statistics().refreshes
            os.write(into, b"\1" * (64 << 10))
            written = 0
            until = time.monotonic() + 30
            while not written and time.monotonic() < until:
                written = tracker.collect().page_count
            assert written, f"its buffers, after {tracker.statistics().refreshes - before} looks at its mappings"
        os.close(into)


def test_one_that_stays_so_is_refused(early: Early) -> None:
    with pytest.raises(TargetBusy, match=f"memory of its parent, process {early.parent.pid}") as caught:
        attach(early.pid, timeout=0.05)
    assert caught.value.pid == early.pid
    begun = time.monotonic()
    with pytest.raises(TargetBusy, match="vfork"):
        Pagemap(early.pid)
    assert time.monotonic() - begun < 30
    with Pagemap(early.parent.pid) as pagemap:
        pagemap.scan(0, PAGE)
    os.close(early.go_on())

# SPDX-License-Identifier: MIT
"""An ordinary user, without a privilege and without /dev/userfaultfd, gets exactly the pages that were written."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import _cffi_backend

import dirtytrack
from tests.sandbox import NOBODY, run_in_child

PACKAGE = Path(dirtytrack.__file__).parent


def example() -> None:
    assert os.geteuid() != 0
    with open("/proc/self/status") as status:
        assert "CapEff:\t0000000000000000\n" in status.readlines()

    memory = dirtytrack.allocate(1 << 30, name="table")
    with dirtytrack.track(memory) as tracker:
        assert tracker.session.opened_by == "userfaultfd user mode"
        memory[5 * 4096] = 1
        dirty = tracker.collect()
        assert dirty.page_count == 1 and dirty.nbytes == 4096
        for run in dirty:
            assert run == (memory.address + 5 * 4096, memory.address + 6 * 4096)
        assert not tracker.collect()

    # Pages of its own: on the heap, a neighbour's write makes the first or the last page dirty.
    array = memoryview(dirtytrack.allocate(100_000)).cast("B")
    with dirtytrack.UffdSession() as session:
        region = session.register(array, name="weights")
        listener = dirtytrack.DirtyTracker(session)
        listener.start()
        mirror = bytearray(array)
        array[50_000] = 7
        with open("/dev/zero", "rb", buffering=0) as zeroes:  # the kernel writes, on this user's behalf
            zeroes.readinto(memoryview(array)[90_000:90_001])
        dirty = listener.collect_into(mirror)
        assert list(dirty.pages(region)) == [(region.address + at - region.start) // 4096 for at in (50_000, 90_000)]
        assert mirror == array
        listener.stop()
    print("exactly", os.geteuid())


def interpreter_of_everybody(environment: dict[str, str], folder: Path) -> str | None:
    """This interpreter, where an ordinary user can run it: not beneath /root, say."""
    python = os.path.realpath(sys.executable)
    try:
        done = subprocess.run(
            [python, "-c", "import json, _cffi_backend, dirtytrack; dirtytrack.probe()"],
            env=environment,
            cwd=folder,
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            capture_output=True,
            check=False,
        )
    except PermissionError:
        return None
    return python if done.returncode == 0 else None


def test_the_example_as_an_ordinary_user(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        assert run_in_child(example) == f"exactly {os.geteuid()}\n"
        return
    # Readable to everybody, wherever the environment that the tests run in is.
    folder = tmp_path / "readable"
    shutil.copytree(PACKAGE, folder / "dirtytrack", ignore=shutil.ignore_patterns("__pycache__", "csrc"))
    shutil.copy(_cffi_backend.__file__, folder)
    source = f"import os\nimport dirtytrack\n\n\n{inspect.getsource(example)}\n\nexample()\n"
    (folder / "example.py").write_text(source)
    for path in (folder, *folder.parents):
        if path.owner() == Path("/").owner() and path != Path("/tmp"):
            path.chmod(path.stat().st_mode | 0o055)
        if path == tmp_path.parents[1]:
            break
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    python = interpreter_of_everybody(environment, folder)
    if python is None:  # then a process that has loaded everything becomes that user
        assert run_in_child(example, "nobody") == f"exactly {NOBODY}\n"
        return
    done = subprocess.run(
        [python, "-W", "error", folder / "example.py"],
        env=environment,
        cwd=folder,
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"exactly {NOBODY}\n"


def test_a_process_that_gives_its_privileges_away() -> None:
    assert run_in_child(example, "nobody").startswith("exactly ")

# SPDX-License-Identifier: MIT
"""The command `dirtytrack ckpt`, as a shell runs it: each subcommand, for people and for machines."""

from __future__ import annotations

import errno
import io
import json
import operator
import os
import pty
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dirtytrack.checkpoint import DirectoryStore, verify
from dirtytrack.cli import main
from tests.generations import PAGE, History, Keyed

CIPHER = """
def turned(data):
    return bytes(byte ^ 0x33 for byte in data)

number = 7
"""


@pytest.fixture
def made(where: Path) -> History:
    history = History(DirectoryStore(where / "store", create=True), 6)
    history.add("grid", 30 * PAGE, "<f8", (30, 512))
    history.add("../table", 10_001)
    for step in range(5):
        history.save({"step": step})
        history.write(4)
    return history


def shell(where: Path, *words: str | Path) -> str:
    """What it prints, as a process of its own."""
    command = [sys.executable, "-m", "dirtytrack", "ckpt", *map(str, words)]
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    return done.stdout


def ckpt(where: Path, *words: str | Path, status: int = 0, stderr: str = "") -> str:
    """What it prints, in this process and in that folder, which takes a tenth of the time."""
    out, errors, before = io.StringIO(), io.StringIO(), Path.cwd()
    os.chdir(where)
    try:
        with redirect_stdout(out), redirect_stderr(errors):
            returned = main(["ckpt", *map(str, words)])
    except SystemExit as ended:
        returned = int(ended.code or 0)
    finally:
        os.chdir(before)
    assert returned == status, out.getvalue() + errors.getvalue()
    assert re.search(stderr, errors.getvalue()) if stderr else not errors.getvalue(), errors.getvalue()
    return out.getvalue()


def as_json(where: Path, *words: str | Path, **options: Any) -> Any:
    return json.loads(ckpt(where, *words, "--json", **options))


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("words", "line", "member"),
    [
        (["ls", "store"], "GENERATION  KIND", lambda found: len(found) == 5),
        (["show", "store", "2"], "generation 2 of store", lambda found: found["generation"] == 2),
        (["verify", "store", "--all"], "generation 1: whole", lambda found: found["ok"]),
        (["restore", "store", "-o", "{}"], "generation 5: 2 buffers", lambda found: found["generation"] == 5),
        (["export", "store", "--to", "zarr", "{}"], "generation 5: 2 buffers", lambda found: found["format"] == "zarr"),
        (["diff", "store", "1", "2"], "BUFFER", lambda found: found["changed_nbytes"] > 0),
        (["compact", "store"], "generation 5: revision 1", lambda found: found["kind"] == "compacted"),
        (["prune", "store", "--last", "2"], "3 removed: 1 2 3", lambda found: found["kept"] == [4, 5]),
    ],
)
def test_each_as_a_shell_runs_it(where: Path, made: History, words: list[str], line: str, member: Any) -> None:
    assert shell(where, *(word.format("text") for word in words)).startswith(line)
    assert member(json.loads(shell(where, *(word.format("json") for word in words), "--json")))
    assert verify(made.store, all=True).ok


def test_ls(where: Path, made: History) -> None:
    lines = ckpt(where, "ls", "store").splitlines()
    assert lines[0].split()[:4] == ["GENERATION", "KIND", "PARENT", "CREATED"] and len(lines) == 6
    assert re.fullmatch(r" +3  increment +2  .*  130 KiB .* in 3  \{\"step\": 2\}", lines[3]), lines[3]
    listed = as_json(where, "ls", "store")
    assert [each["generation"] for each in listed] == [1, 2, 3, 4, 5] and listed[4]["meta"] == {"step": 4}
    (where / "store" / "manifests" / made.manifests[2].name).write_bytes(b"nothing")
    assert "damaged" in ckpt(where, "ls", "store", stderr="generation 2: .*is not what was written").splitlines()[2]
    with DirectoryStore(where / "empty", create=True):
        assert "no checkpoint yet" in ckpt(where, "ls", "empty")


def test_show(where: Path, made: History) -> None:
    told = ckpt(where, "show", "store", "4")
    assert "generation 4 of store: increment, revision 0, continues generation 3" in told
    assert re.search(r"grid +120 KiB  <f8 +30 x 512", told) and made.manifests[4].segments[2].name in told
    document = as_json(where, "show", "store")
    assert document["generation"] == 5 and document["regions"][0]["shape"] == [30, 512]
    ckpt(where, "show", "store", "9", status=1, stderr="has no generation 9; it has 1, 2, 3, 4, 5")


def test_verify(where: Path, made: History) -> None:
    assert "generation 5: whole" in ckpt(where, "verify", "store")
    assert ckpt(where, "verify", "store", "--all").count(": whole") == 5
    damage(where / "store" / "segments" / made.manifests[4].segments[-1].name, 4100)
    told = ckpt(where, "verify", "store", "--all", status=1)
    assert told.count(": whole") == 3 and "is damaged between 4096" in told
    assert "the newest whole generation of these is 3" in told
    document = as_json(where, "verify", "store", "--all", status=1)
    assert (document["ok"], document["whole"], len(document["checked"])) == (False, 3, 5)
    assert as_json(where, "verify", "store", "3")["ok"]


def test_restore(where: Path, made: History) -> None:
    assert "generation 3: 2 buffers, 130 KiB, in out" in ckpt(where, "restore", "store", "3", "-o", "out")
    grid = np.load(where / "out" / "grid.npy")
    assert grid.shape == (30, 512) and grid.dtype == np.float64 and grid.tobytes() == made.truth[3]["grid"]
    assert (where / "out" / "..%2Ftable.bin").read_bytes() == made.truth[3]["../table"]
    assert sorted(path.name for path in (where / "out").iterdir()) == ["..%2Ftable.bin", "checkpoint.json", "grid.npy"]
    told = json.loads((where / "out" / "checkpoint.json").read_text())
    assert told["meta"] == {"step": 2} and told["buffers"][1]["file"] == "..%2Ftable.bin"
    assert all(path.stat().st_mode & 0o077 == 0 for path in (where / "out").iterdir())
    document = as_json(where, "restore", "store", "--name", "grid", "-o", "deep/er/out")
    assert document["generation"] == 5 and [each["file"] for each in document["buffers"]] == ["grid.npy"]
    assert np.load(where / "deep" / "er" / "out" / "grid.npy").tobytes() == made.truth[5]["grid"]
    (where / "void").mkdir()
    ckpt(where, "restore", "store", "-o", "void")
    ckpt(where, "restore", "store", "-o", "out", status=1, stderr="out is not empty")
    ckpt(where, "restore", "store", "--name", "x", "-o", "new", status=1, stderr="no buffer 'x'; it has 'grid'")
    ckpt(where, "restore", "store", "-o", "/proc/new", status=1, stderr="/proc/.*new.* cannot be written")
    assert sorted(path.name for path in where.iterdir()) == ["deep", "out", "store", "void"]


def test_restore_of_a_damaged_generation(where: Path, made: History) -> None:
    damage(where / "store" / "segments" / made.manifests[5].segments[-1].name, 4100)
    ckpt(where, "restore", "store", "-o", "out", status=1, stderr="generation 5 .*is damaged.*Generation 4 is whole")
    assert not (where / "out").exists()
    told = ckpt(where, "restore", "store", "--fallback", "-o", "out", stderr="generation 5 .*is damaged")
    assert "generation 4: 2 buffers" in told
    assert np.load(where / "out" / "grid.npy").tobytes() == made.truth[4]["grid"]
    (where / "store" / "manifests" / made.manifests[4].name).write_bytes(b"nothing")
    ckpt(where, "restore", "store", "4", "--fallback", "-o", "two", stderr="generation 4 .*is damaged")
    assert np.load(where / "two" / "grid.npy").tobytes() == made.truth[3]["grid"]


def test_restore_onto_a_full_disk(where: Path, made: History) -> None:
    """An error, no signal, and nothing left behind."""
    script = (
        "import resource, sys; from dirtytrack.cli import main\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "ckpt", "restore", "store", "-o", "out"],
        cwd=where,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and os.strerror(errno.EFBIG) in done.stderr, done.stderr
    assert [path.name for path in where.iterdir()] == ["store"]


def test_diff(where: Path, made: History) -> None:
    grid = sum(map(operator.ne, made.truth[2]["grid"], made.truth[4]["grid"]))
    lines = ckpt(where, "diff", "store", "2", "4").splitlines()
    assert re.fullmatch(rf"grid +changed +120 KiB +{grid:,} +\d+", lines[1]), lines[1]
    document = as_json(where, "diff", "store", "2", "4")
    assert document["regions"][0]["changed_nbytes"] == grid and document["regions"][0]["runs"] > 0
    runs = as_json(where, "diff", "store", "2", "4", "--runs")["regions"][0]["runs"]
    told = ckpt(where, "diff", "store", "2", "4", "--runs")
    assert all(f"grid {offset:#x} {nbytes}\n" in told for offset, nbytes in runs)
    assert as_json(where, "diff", "store", "4", "4")["changed_nbytes"] == 0
    ckpt(where, "diff", "store", "2", "nine", status=2, stderr="'nine' is not a number from 1 on")


def test_compact(where: Path, made: History) -> None:
    assert "generation 5: revision 1, 130 KiB in" in ckpt(where, "compact", "store", "--memory", "16MiB")
    document = as_json(where, "compact", "store", "3", "--compression", "zstd")
    assert (document["kind"], document["generation"], document["revision"]) == ("compacted", 3, 1)
    assert verify(made.store, all=True).ok
    ckpt(where, "compact", "store", "--memory", "1MiB", status=1, stderr="memory_bytes=")
    with made.store.writer():
        ckpt(where, "compact", "store", "4", status=1, stderr="this process writes to the store")


def test_prune(where: Path, made: History) -> None:
    assert ckpt(where, "prune", "store", "--last", "2", "--dry-run") == "3 to be removed: 1 2 3\n2 kept: 4 5\n"
    assert len(made.store.catalog()) == 5
    assert as_json(where, "prune", "store", "--age", "7d") == {
        "removed": [],
        "kept": [1, 2, 3, 4, 5],
        "put_off": [],
        "unreadable": [],
        "dry_run": False,
    }
    with made.store.reading():
        told = as_json(where, "prune", "store", "--every", "2", status=1, stderr="2 are put off, since somebody reads")
        assert told["put_off"] == [1, 3]
    assert ckpt(where, "prune", "store", "--every", "2") == "2 removed: 1 3\n3 kept: 2 4 5\n"
    ckpt(where, "prune", "store", status=2, stderr="one of --last, --every and --age")


def test_prune_says_that_nothing_becomes_smaller(where: Path, made: History) -> None:
    (where / "store" / "manifests" / made.manifests[4].name).write_bytes(b"nothing")
    says = r"0000000000000004\.0\.manifest.* is not what was written.*none is removed, and the store does not become"
    assert ckpt(where, "prune", "store", "--last", "2", stderr=says).startswith("3 removed: 1 2 3\n2 kept: 4 5\n")
    assert len(as_json(where, "prune", "store", "--last", "2", stderr=says)["unreadable"]) == 1


def test_export(where: Path, made: History, monkeypatch: pytest.MonkeyPatch) -> None:
    zarr = pytest.importorskip("zarr", minversion="3.1", reason="zarr 3 needs Python 3.11")
    told = ckpt(where, "export", "store", "--to", "zarr", "out", "--generation", "3")
    assert told == "generation 3: 2 buffers, 130 KiB, in out (zarr)\n"
    group = zarr.open_group(where / "out", mode="r")
    assert group.attrs["meta"] == {"step": 2} and group["grid"][...].tobytes() == made.truth[3]["grid"]
    document = as_json(where, "export", "store", "two", "--to", "zarr", "--name", "grid", "--chunk", "8KiB")
    assert document == {"generation": 5, "format": "zarr", "path": "two", "nbytes": 30 * PAGE, "buffers": ["grid"]}
    assert zarr.open_group(where / "two", mode="r")["grid"].chunks == (2, 512)
    ckpt(
        where, "export", "store", "--to", "zarr", "out", status=1, stderr="is there already, and nothing is overwritten"
    )
    ckpt(where, "export", "store", "--to", "zarr", "new", "--generation", "9", status=1, stderr="no generation 9")
    ckpt(where, "export", "store", "new", status=2, stderr="--to")
    ckpt(where, "export", "store", "new", "--to", "dcp", "--chunk", "1MiB", status=2, stderr="--chunk is for --to zarr")
    monkeypatch.setitem(sys.modules, "torch", None)
    ckpt(
        where,
        "export",
        "store",
        "new",
        "--to",
        "dcp",
        status=1,
        stderr=r'needs the package torch.*pip install "dirtytrack\[torch\]"',
    )
    assert not (where / "new").exists()


@pytest.mark.torch
def test_export_for_pytorch(where: Path, made: History) -> None:
    assert ckpt(where, "export", "store", "--to", "dcp", "out") == "generation 5: 2 buffers, 130 KiB, in out (dcp)\n"
    assert (where / "out" / ".metadata").exists()


def test_what_is_encrypted_takes_a_function(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (where / "cipher.py").write_text(CIPHER)
    made = History(DirectoryStore(where / "store", create=True), encrypt=Keyed(0x33))
    made.add("x", 20 * PAGE)
    for _ in range(3):
        made.save()
        made.write()
    ckpt(where, "restore", "store", "-o", "out", status=1, stderr="is encrypted")
    ckpt(where, "restore", "store", "-o", "out", "--decrypt", "cipher:turned")
    assert (where / "out" / "x.bin").read_bytes() == made.truth[3]["x"]
    ckpt(where, "compact", "store", "--decrypt", "cipher:turned", status=1, stderr="is not written as anything else")
    ckpt(where, "compact", "store", "--decrypt", "cipher:turned", "--encrypt", "cipher:turned")
    assert as_json(where, "diff", "store", "2", "3", "--decrypt", "cipher:turned")["changed_nbytes"] > 0
    ckpt(where, "diff", "store", "2", "3", "--decrypt", "cipher:nothing", status=2, stderr="no MODULE:NAME")
    ckpt(where, "diff", "store", "2", "3", "--decrypt", "cipher:number", status=2, stderr="is no function")
    assert "whole" in ckpt(where, "verify", "store")  # takes no key


def test_what_is_no_store_is_said(where: Path) -> None:
    for words in (["ls"], ["show"], ["verify"], ["diff", "1", "2"], ["compact"], ["prune", "--last", "1"]):
        ckpt(
            where, words[0], "nowhere", *words[1:], status=1, stderr="dirtytrack: .*nowhere is no store of checkpoints"
        )
    ckpt(where, "restore", "nowhere", "-o", "out", status=1, stderr="is no store of checkpoints")
    ckpt(where, "nothing", "store", status=2, stderr="invalid choice: 'nothing'")
    assert not (where / "nowhere").exists()


def test_long_work_shows_how_far_it_is_on_a_terminal(where: Path, made: History) -> None:
    for words in (
        ["verify", "store"],
        ["restore", "store", "-o", "out"],
        ["compact", "store"],
        ["diff", "store", "2", "5"],
    ):
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "dirtytrack", "ckpt", *words]
        with subprocess.Popen(
            command, cwd=where, stdout=subprocess.PIPE, stderr=theirs, env={**os.environ, "TERM": "xterm"}, text=True
        ) as process:
            os.close(theirs)
            shown = b""
            try:
                while some := os.read(ours, 4096):
                    shown += some
            except OSError:  # the other side is closed
                pass
            os.close(ours)
            assert process.stdout is not None
            told = process.stdout.read()
        assert process.returncode == 0 and told and b"100%" not in told.encode()
        assert re.search(rb"verifying|restoring|compacting|comparing", shown), shown
    assert len(made.truth) == 5

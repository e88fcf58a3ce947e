# SPDX-License-Identifier: MIT
"""`dirtytrack migrate` and `dirtytrack receive`, as one types them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dirtytrack.cli import main
from dirtytrack.migration.journal import Journal, read

ROOT = Path(__file__).parents[3]
PROGRAM = "tests.kernel.migration.moved_program"


def dirtytrack(*words: str) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "dirtytrack", *words]


@pytest.fixture
def receiving(tmp_path: Path) -> subprocess.Popen[str]:
    journal = ["--journal", str(tmp_path / "there.journal")]
    return subprocess.Popen(
        dirtytrack("receive", f"{PROGRAM}:prepare", "--attempts", "1", *journal),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def migrate(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = dirtytrack("migrate", *words, "--journal", str(tmp_path / "here.journal"))
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)


def test_a_program_moves_by_commands(receiving: subprocess.Popen[str], tmp_path: Path) -> None:
    assert receiving.stdout is not None
    address = receiving.stdout.readline().split()[-1]
    done = migrate(
        tmp_path, f"{PROGRAM}:source", "--max-downtime", "100ms", "--delta", address
    )  # options may stand anywhere
    out, err = receiving.communicate(timeout=30)
    assert done.returncode == 0, done.stderr
    assert "downtime" in done.stdout
    assert "rounds, round 0" in done.stderr
    assert "\nstopping" in done.stderr
    assert receiving.returncode == 0, err
    assert "runs here" in out
    assert "right" in out
    states = [
        [each["state"] for each in read(tmp_path / name) if "state" in each]
        for name in ("here.journal", "there.journal")
    ]
    assert states == [["committing", "moved"], ["prepared", "committed"]]


def test_what_cannot_be_moved_runs_on(tmp_path: Path) -> None:
    done = migrate(tmp_path, f"{PROGRAM}:source", f"unix://{tmp_path}/nobody", "--attempts", "2")
    assert done.returncode == 1
    assert done.stderr.count("start the destination first") >= 2
    assert "it runs on here" in done.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["migrate", "nowhere:source", "tcp://127.0.0.1:1"], "cannot be imported"),
        (["migrate", f"{PROGRAM}:none", "tcp://127.0.0.1:1"], "names no function"),
        (["migrate", "nonsense", "tcp://127.0.0.1:1"], "a target is module:function"),
        (["migrate", f"{PROGRAM}:nothing", "tcp://127.0.0.1:1"], "returned no Source, but a str"),
        (["receive", f"{PROGRAM}:prepare", "--listen", "tcp://0.0.0.0:0"], "could put memory into this process"),
        (["receive", f"{PROGRAM}:prepare", "--token-file", "/nowhere"], "cannot be read"),
        (["receive", f"{PROGRAM}:prepare", "--tls-cert", "x"], "TLS takes all of"),
        (["migrate", "--resolve", "/nowhere/journal"], "cannot be read"),
    ],
    ids=range(8),
)
def test_mistakes_are_told(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1
    assert says in capsys.readouterr().err


def test_a_hand_over_in_doubt_is_shown_and_resolved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "journal"
    with Journal(path) as journal:
        journal.add(role="source", id="ab" * 16, attempt=2, address="tcp://127.0.0.1:1", secret="")
        assert main(["migrate", "--resolve", str(path)]) == 0
        assert "not in doubt" in capsys.readouterr().out
        assert main(["migrate", "--resolve", str(path), "--runs", "source"]) == 1
        assert "a verdict would change nothing" in capsys.readouterr().err
        journal.add(state="committing", id="ab" * 16, attempt=2)
        assert main(["migrate", "--resolve", str(path)]) == 3
        assert "in doubt: decide by" in capsys.readouterr().out
        assert main(["migrate", "--resolve", str(path), "--runs", "destination"]) == 0
        assert journal.verdict("ab" * 16, 2) == "destination"
        assert main(["migrate", "--resolve", str(path)]) == 0
        assert "the destination runs" in capsys.readouterr().out

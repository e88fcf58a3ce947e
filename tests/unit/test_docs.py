# SPDX-License-Identifier: MIT
"""README and docs say what is so: Python blocks are run, commands are run or known, links and pictures are there.

`python` blocks of one file run one after the other in one process, with the file's own line numbers in a traceback.
In `console` blocks the lines that begin with ``$ `` are commands, in `sh` blocks all lines are.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import dirtytrack
from dirtytrack import checkpoint, delta, gc, migration, observe, process, region

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
DOCUMENTS += sorted((ROOT / "docs").rglob("*.md"))
# Commands that are run as they stand; the rest must at least be known.
RUN = (
    re.compile(r"dirtytrack (doctor|--version|--help)\b"),
    re.compile(r"python3? examples/\w+\.py$"),
    re.compile(r"python3? -m examples\.[\w.]+$"),
    re.compile(r"make$"),
    re.compile(r"python3? -m dirtytrack\.gc( --\w+)+$"),
    re.compile(r"python3? -m examples\.heap "),
)
NOT_RUN = re.compile(r"(sudo )?(apt-get|pip|git|sysctl|cd|docker|podman|chmod|setfacl|systemctl|ulimit) ")
NOT_HERE = 77  # the status of an example that says what this machine lacks
LANGUAGES = {"python", "console", "sh", "c", "toml", "json", "ini", "text", ""}
LANGUAGES |= {"{toctree}", "{eval-rst}", "{include}"}  # directives of Sphinx


class Block(NamedTuple):
    language: str
    line: int
    """Number of its first line of content, from 1."""
    text: str


def blocks(path: Path) -> Iterator[Block]:
    language, first, lines = None, 0, list[str]()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.lstrip().startswith("```"):
            lines.append(line)
        elif language is None:
            language, first, lines = line.strip().removeprefix("```"), number + 1, []
        else:
            yield Block(language, first, "\n".join(lines) + "\n")
            language = None
    assert language is None, f"{path.name}: a code block is not closed"


def commands(block: Block) -> Iterator[str]:
    for line in block.text.replace("\\\n", " ").splitlines():
        if block.language == "sh" and line.strip() and not line.startswith("#"):
            yield line.partition(" #")[0].strip()
        elif block.language == "console" and line.startswith(("$ ", "# ")):
            yield line[2:].partition(" #")[0].strip()


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def environment() -> dict[str, str]:
    """The commands of this interpreter's environment come first, as after activating it."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def make_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z][a-z-]*):", text, re.MULTILINE))


WITH_PYTHON = [
    pytest.param(path, id=name_of(path), marks=[pytest.mark.torch] if path.name == "torch.md" else [])
    for path in DOCUMENTS
    if any(block.language == "python" for block in blocks(path))
]
FIRST_IN: dict[str, str] = {}  # a command that stands in several documents is run once
for document in DOCUMENTS:
    for each in blocks(document):
        for command in commands(each):
            FIRST_IN.setdefault(command, name_of(document))
COMMANDS = [pytest.param(command, id=f"{where}: {command}") for command, where in FIRST_IN.items()]


@pytest.mark.tracking
@pytest.mark.parametrize("path", WITH_PYTHON)
def test_python_blocks_run(path: Path, tmp_path: Path) -> None:
    script = list[str]()
    for block in blocks(path):
        if block.language == "python":
            script += [""] * (block.line - 1 - len(script)) + block.text.splitlines()
    source = tmp_path / path.name
    source.write_text("\n".join(script) + "\n", encoding="utf-8")
    checkout = {"PYTHONPATH": str(ROOT)} if any("from examples." in line for line in script) else {}
    command = [sys.executable, "-W", "error", str(source)]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **checkout}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run_or_are_known(command: str) -> None:
    if any(pattern.match(command) for pattern in RUN):
        words = shlex.split(command)
        done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
        if done.returncode == NOT_HERE:
            pytest.skip(done.stderr)
        assert done.returncode == 0, done.stdout + done.stderr
    elif command.startswith("make "):
        targets = {word for word in shlex.split(command)[1:] if "=" not in word}
        assert targets <= make_targets()
    elif command.startswith("dirtytrack "):
        help_of = [*shlex.split(command)[:2], "--help"]
        done = subprocess.run(help_of, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        assert NOT_RUN.match(command), f"neither run nor known: {command}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_blocks_name_their_language(path: Path) -> None:
    assert not {block.language.partition(" ")[0] for block in blocks(path)} - LANGUAGES


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    inside = [target for target in targets if not target.startswith(("http://", "https://"))]
    assert not [target for target in inside if not (path.parent / target).exists()]


def test_readme_opens_with_the_two_commands() -> None:
    first = next(block for block in blocks(ROOT / "README.md"))
    assert [*commands(first)] == ["make demo", "make test"]


def test_the_api_pages_have_every_public_name() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    shown = re.findall(r"^\.\. auto(?:class|data|exception|function|module):: (\S+)$", text, re.MULTILINE)
    assert len(shown) == len(set(shown))
    names = {name.removeprefix("dirtytrack.") for name in shown}
    assert names >= set(dirtytrack.__all__)
    assert names >= {f"pagemap.{name}" for name in dirtytrack.pagemap.__all__} - {"pagemap.Pagemap", "pagemap.Scan"}
    assert names >= set(dirtytrack.errors.__all__)
    assert names >= {f"delta.{name}" for name in delta.__all__}
    assert names >= {f"process.{name}" for name in process.__all__}
    assert names >= {f"observe.{name}" for name in observe.__all__}
    assert names >= {f"checkpoint.{name}" for name in checkpoint.__all__}
    assert names >= {f"gc.{name}" for name in gc.__all__}
    assert names >= {f"migration.{name}" for name in migration.__all__}


def test_every_blind_spot_is_explained() -> None:
    rows = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8").splitlines()
    explained = {row.split("|")[1].strip() for row in rows if row.startswith("| ")}
    spots = {value for name, value in vars(region).items() if name.isupper() and isinstance(value, str)}
    assert "DMA in flight" in spots
    assert spots <= explained


def test_the_tests_that_are_named_exist() -> None:
    sources = [path for suffix in ("*.py", "*.c") for path in (ROOT / "tests").rglob(suffix)]
    code = "".join(path.read_text(encoding="utf-8") for path in sources)
    defined = set(re.findall(r"\b(test_\w+)\(", code)) | {path.stem for path in sources}
    for path in DOCUMENTS:
        named = set(re.findall(r"\btest_\w+", path.read_text(encoding="utf-8")))
        assert not named - defined, name_of(path)


def test_the_picture_is_what_its_script_draws() -> None:
    draw = runpy.run_path(str(ROOT / "docs" / "draw_epoch.py"))["draw"]
    assert (ROOT / "docs" / "epoch.svg").read_text(encoding="utf-8") == draw()

# SPDX-License-Identifier: MIT
"""What users install: the sdist builds by itself, the wheel is whole, and other platforms can import it."""

from __future__ import annotations

import mmap
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import dirtytrack

ROOT = Path(__file__).parents[2]
SHIPPED = {".py", ".pyi", ".c", ".h", ".md", ".svg", ".png", ".html", ".typed"}
STABLE_ABI = not sysconfig.get_config_var("Py_GIL_DISABLED") and not hasattr(sys, "gettotalrefcount")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has an extension")


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, made from a copy of the tree: building leaves files behind."""
    top = tmp_path_factory.mktemp("sdist")
    leave = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "_core.c", "__pycache__", "*.py[cod]")
    shutil.copytree(ROOT, top / "tree", ignore=leave)
    shutil.copytree(ROOT / ".ci", top / "tree" / ".ci")
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-W", "ignore", "-c", build, top, cwd=top / "tree")
    (archive,) = top.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist alone, in the clean environment that pip makes for it."""
    top = tmp_path_factory.mktemp("wheel")
    quickly = os.environ | {"CFLAGS": "-O0 -g0"}  # what is looked at is what is in it
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", top, sdist, cwd=top, env=quickly)
    (archive,) = top.glob("*.whl")
    return archive


def test_sdist_carries_headers_tests_and_docs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"Makefile", "LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "setup.py", ".ci/run"}
    for folder in ("dirtytrack", "tests", "docs", "examples", "benchmarks"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in SHIPPED and path.name != "_core.c":
                wanted.add(str(path.relative_to(ROOT)))
    assert not wanted - inside
    assert not [name for name in inside if name.endswith((".so", ".pyc", ".o"))]


@on_linux
def test_wheel_has_the_whole_package_and_the_core_for_runtimes_in_c(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if name.startswith("dirtytrack/")}
        licences = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    package = ROOT / "dirtytrack"
    wanted = {str(path.relative_to(ROOT)) for path in package.rglob("*.py")}
    wanted |= {"dirtytrack/py.typed", "dirtytrack/kernel/_core.pyi", "dirtytrack/kernel/_taking.pyi"}
    wanted |= {"dirtytrack/observe/page.html"}
    wanted |= {str(path.relative_to(ROOT)) for path in (package / "kernel" / "csrc").iterdir()}
    extensions = {name for name in inside if name.endswith(".so")}
    assert inside - extensions == wanted
    assert len(extensions) == 1
    assert licences
    if STABLE_ABI:
        assert "-cp310-abi3-linux_" in wheel.name
        assert extensions == {"dirtytrack/kernel/_core.abi3.so"}


@on_linux
def test_wheel_works_where_it_is_unpacked(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import dirtytrack
assert dirtytrack.__file__.startswith(sys.argv[1])
print(dirtytrack.probe().page_bytes)
"""
    out = run(sys.executable, "-I", "-W", "error", "-c", code, tmp_path / "site", cwd=tmp_path)
    assert out == f"{mmap.PAGESIZE}\n"


@on_linux
def test_a_runtime_in_c_is_compiled_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """Without the extension: whoever wants the core needs no Python beside it."""
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site, [name for name in archive.namelist() if not name.endswith(".so")])
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(site)!r}); runpy.run_module('dirtytrack.gc', run_name='__main__')"
    )

    def told(*options: str) -> list[str]:
        return run(sys.executable, "-I", "-W", "error", "-c", code, *options, cwd=tmp_path).split()

    csrc = site / "dirtytrack" / "kernel" / "csrc"
    assert told("--sources") == sorted(str(csrc / path.name) for path in (ROOT / csrc.relative_to(site)).glob("*.c"))
    compiler = os.environ.get("CC", "cc").split()
    run(*compiler, *told("--cflags"), "-c", ROOT / "examples" / "barrier.c", csrc / "words.c", cwd=tmp_path)


@on_linux
@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_without_the_extension_import_works_and_first_use_tells(platform: str, wheel: Path, tmp_path: Path) -> None:
    """What a platform other than Linux gets, by the same package less the extension; and a broken install."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path, [name for name in archive.namelist() if not name.endswith(".so")])
    code = """
import sys
sys.path.insert(0, sys.argv[1])
sys.platform = sys.argv[2]
import dirtytrack
assert dirtytrack.__file__.startswith(sys.argv[1])
support = dirtytrack.probe()
assert not support.tracking and support.why_not, support
for use in (lambda: dirtytrack.track(bytearray(8192)).__enter__(), dirtytrack.UffdSession):
    try:
        use()
    except dirtytrack.UnsupportedKernel as error:
        assert str(error)
    else:
        raise SystemExit("nothing was said")
print("told")
"""
    assert run(sys.executable, "-I", "-W", "error", "-c", code, tmp_path, platform, cwd=tmp_path) == "told\n"


@pytest.mark.parametrize(("platform", "modules"), [("linux", 1), ("darwin", 0), ("win32", 0)])
def test_only_linux_builds_an_extension(platform: str, modules: int, monkeypatch: pytest.MonkeyPatch) -> None:
    setuptools = pytest.importorskip("setuptools")
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.setattr(sys, "platform", platform)
    exec(compile((ROOT / "setup.py").read_text(), "setup.py", "exec"), {"__name__": "__main__"})
    assert len(given["cffi_modules"]) == modules
    assert bool(given["options"]) == (bool(modules) and STABLE_ABI)


def test_versions_agree() -> None:
    version = metadata.version("dirtytrack")
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert f'\nversion = "{version}"\n' in (ROOT / "pyproject.toml").read_text()
    assert getattr(dirtytrack, "__version__", version) == version
    newest = re.search(r"^## \[?(\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    assert newest[1] == version


def test_the_makefile_builds_with_what_the_build_system_requires() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    required = re.search(r"^requires = (\[.*?\])", text, re.MULTILINE)
    group = re.search(r"^build = (\[.*?\])", text, re.MULTILINE)
    assert required
    assert group
    assert required[1] == group[1]


def test_type_marker_is_installed() -> None:
    assert dirtytrack.__file__
    assert (Path(dirtytrack.__file__).parent / "py.typed").exists()

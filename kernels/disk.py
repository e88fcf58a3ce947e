# SPDX-License-Identifier: MIT
"""The disk of an emulated machine: the C tests, busybox and, where it can run, this machine's own Python.

Python, its packages, this tree, a C compiler and the libraries of all these stand at the paths that they have here, so
that nothing has to be rewritten: the disk is a small part of this machine's own.
"""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from .plan import DESELECTED, FIRST

__all__ = ["make"]

ROOT = Path(__file__).parents[1]
_TREE = (
    "dirtytrack",
    "tests",
    "examples",
    "benchmarks",
    "docs",
    "pyproject.toml",
    "setup.py",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
)
_NOT_OF_PYTHON = ("test", "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3", "site-packages", "dist-packages")
_NOT_OF_PACKAGES = ("mypy*", "ruff*", "pip", "pip-*", "setuptools", "*_stubs", "*-stubs", "librt*", "sphinx*", "torch*")
_OF_COMPILER = ("cc1", "as", "ld", "collect2")
_LINKED = (
    *("crt1.o", "Scrt1.o", "crti.o", "crtn.o", "crtbegin.o", "crtbeginS.o", "crtend.o", "crtendS.o"),
    *("libgcc.a", "libgcc_s.so", "libgcc_s.so.1", "libc.so", "libc.so.6", "libc_nonshared.a", "libpthread.a"),
    *("ld-linux-x86-64.so.2", "liblto_plugin.so"),
)
_FREE_BYTES = 700 << 20
"""Beside what is on the disk: for swap files and the files that tests map."""


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class _Root:
    """The folder that becomes the disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        for name in ("proc", "sys", "dev", "tmp", "run", "var/tmp", "root", "etc", "c-tests", "modules"):
            (folder / name).mkdir(parents=True)
        for link in (Path("/bin"), Path("/sbin"), Path("/lib"), Path("/lib64")):
            if link.is_symlink():
                (folder / str(link.readlink()).lstrip("/")).mkdir(parents=True, exist_ok=True)
                (folder / link.name).symlink_to(link.readlink())
            else:
                (folder / link.name).mkdir()
        (folder / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/tmp:/bin/sh\n")
        (folder / "etc" / "group").write_text("root:x:0:\nnogroup:x:65534:\n")
        for name in ("tmp", "var/tmp"):
            (folder / name).chmod(0o1777)

    def there(self, path: Path) -> Path:
        """Where a path of this machine is on the disk; its folder is made."""
        inside = self.folder / str(path.parent.resolve() / path.name).lstrip("/")
        inside.parent.mkdir(parents=True, exist_ok=True)
        return inside

    def file(self, path: Path) -> None:
        """A file, under its name and that which its links lead to."""
        if path.is_symlink():
            inside = self.there(path)
            if not inside.is_symlink():
                inside.symlink_to(path.readlink())
            self.file(path.parent / path.readlink())
        else:
            shutil.copy2(path, self.there(path))

    def tree(self, path: Path, *without: str) -> None:
        """A folder, without these names."""
        ignored = shutil.ignore_patterns(*without)
        shutil.copytree(path, self.there(path), symlinks=True, ignore=ignored, dirs_exist_ok=True)

    def libraries(self) -> None:
        """What the programs and libraries that are there load."""
        programs = [path for path in self.folder.rglob("*") if path.is_file() and _is_elf(path)]
        here = [Path("/") / path.relative_to(self.folder) for path in programs]
        found = subprocess.run(["ldd", *filter(Path.exists, here)], capture_output=True, text=True, check=False).stdout
        for name in sorted(set(re.findall(r"(/\S+) \(0x", found))):
            if not self.there(Path(name)).exists():
                self.file(Path(name))


def _is_elf(path: Path) -> bool:
    if path.is_symlink() or not (path.stat().st_mode & stat.S_IXUSR or ".so" in path.name):
        return False
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def _python(root: _Root) -> None:
    """Python, its standard library and .venv."""
    root.file(Path(sys.executable))
    for name in ("stdlib", "platstdlib"):
        root.tree(Path(sysconfig.get_path(name)), *_NOT_OF_PYTHON, "config-*")
    if Path(sys.prefix).resolve() != Path(sys.base_prefix).resolve():
        root.file(Path(sys.prefix) / "pyvenv.cfg")
    root.tree(Path(sysconfig.get_path("purelib")), *_NOT_OF_PACKAGES)
    console_script = Path(sys.prefix) / "bin" / "dirtytrack"
    if console_script.exists():
        root.file(console_script)


def _headers() -> Iterator[Path]:
    """Those that the C files which tests compile include."""
    sources = [str(path) for path in sorted((ROOT / "tests" / "kernel").rglob("*.c"))]
    for word in _output("gcc", "-M", "-O2", "-D_GNU_SOURCE", *sources).replace("\\\n", " ").split():
        if word.startswith("/") and word.endswith(".h"):
            yield Path(word)


def _compiler(root: _Root) -> None:
    """What compiles and links one C file."""
    for name in ("gcc", "cc"):
        found = shutil.which(name)
        if found:
            root.file(Path(found))
    for name in _OF_COMPILER:
        path = shutil.which(_output("gcc", f"-print-prog-name={name}").strip())
        if path:
            root.file(Path(path))
    for name in _LINKED:
        path = _output("gcc", f"-print-file-name={name}").strip()
        if path.startswith("/"):
            root.file(Path(path))
    for header in _headers():
        root.file(header)


def _in_order() -> list[str]:
    """The files of tests for a machine, those first that differ between kernels."""
    found = [str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "kernel").rglob("test_*.py")]
    return [*FIRST, *sorted(name for name in found if not name.startswith((*FIRST, *DESELECTED)))]


def _compiled(root: _Root) -> None:
    """Bytecode of what tests start in processes of their own, each of which would compile it anew."""
    there = [str(root.there(ROOT / name)) for name in _TREE if (ROOT / name).is_dir()]
    subprocess.run([sys.executable, "-m", "compileall", "-q", "-s", str(root.folder), *there], check=True)


def _choice(*words: str) -> str:
    """A file of arguments for pytest."""
    return "".join(f"{word}\n" for word in words)


def make(
    image: Path, c_tests: Iterable[Path], busybox: Path, modules: Path | None, given: Sequence[str] | None
) -> None:
    """Make a disk.

    Args:
        image: the file.
        c_tests: static programs.
        busybox: a static one, of the machine's architecture.
        modules: a folder of kernel modules by release, if any.
        given: Python and the tests too, for this machine's own architecture; these arguments of pytest are the choice
            ``given``. None: none of that.
    """
    root = _Root(image.with_suffix(".root"))
    shutil.copy2(busybox, root.folder / "bin" / "busybox")
    for applet in _output("busybox", "--list").split():
        link = root.folder / "bin" / applet
        if not link.exists():
            link.symlink_to("/bin/busybox")
    shutil.copy2(ROOT / "kernels" / "guest-init", root.folder / "init")
    for test in c_tests:
        shutil.copy2(test, root.folder / "c-tests")
    if modules is not None and modules.exists():
        shutil.copytree(modules, root.folder / "modules", dirs_exist_ok=True)
    if given is not None:
        _python(root)
        _compiler(root)
        for name in _TREE:
            path = ROOT / name
            root.tree(path, "__pycache__") if path.is_dir() else root.file(path)
        _compiled(root)
        root.libraries()
        (root.folder / "python").write_text(f"{sys.executable} {ROOT}\n")
        deselected = [word for start in DESELECTED for word in ("--deselect", start)]
        (root.folder / "chosen-all").write_text(_choice(*deselected, *_in_order()))
        (root.folder / "chosen-given").write_text(_choice(*given))
    used = sum(path.lstat().st_blocks * 512 for path in root.folder.rglob("*"))
    part = image.with_suffix(".part")  # a machine may still run from the one before
    with part.open("wb") as file:
        file.truncate((used * 5 // 4 + _FREE_BYTES) & -4096)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-E", "root_owner=0:0", "-d", root.folder, part], check=True)
    part.rename(image)
    shutil.rmtree(root.folder)

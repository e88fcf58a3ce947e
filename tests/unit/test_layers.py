# SPDX-License-Identifier: MIT
"""The house keeps its order: who may import whom, who may touch C, and that header and stub tell the same."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dirtytrack"
SOURCES = sorted(PACKAGE.rglob("*.py"))
LAYERS = (
    {"errors"},
    {"kernel"},
    {"memory"},
    {"region"},
    {"layout"},
    {"pagemap", "dirtyset"},
    {"session"},
    {"tracker"},
    {"delta"},
    {"process"},
    {"observe", "checkpoint", "migration", "gc"},
    {"cli"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
CONSUMERS = {name for name, rank in RANK.items() if rank > RANK["tracker"]}
APART = {
    "checkpoint": {"process", "observe", "migration", "gc"},
    "migration": {"delta", "process", "observe", "checkpoint", "gc"},
    "gc": {"process", "observe", "checkpoint", "migration"},
}
"""What a consumer knows nothing of, though it is above it."""
IMAGES = PACKAGE / "checkpoint" / "images"
"""Checkpoints of other processes: nothing of `checkpoint` but this knows of `process`, nor imports it."""
CODE = {".py", ".pyi", ".c", ".h", ".sh", ".toml"}
CODE_BY_NAME = {"Makefile", "run", "MANIFEST.in", ".gitignore"}
NOT_OURS = {".git", ".venv", "build", "dist", "node_modules"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield other
                yield from runtime_nodes(other)
            continue
        yield node
        yield from runtime_nodes(node)


def imported_modules(path: Path) -> set[str]:
    """Full names of what a module imports when it runs, `from x import y` counted as both x and x.y."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set[str]()
    for node in runtime_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.add(module)
            found.update(f"{module}.{alias.name}" for alias in node.names)
    return found


def imported_layers(path: Path) -> set[str]:
    parts = (module.split(".") for module in imported_modules(path))
    return {part[1] for part in parts if part[0] == "dirtytrack" and len(part) > 1 and part[1] in RANK}


def test_each_module_has_a_layer() -> None:
    assert {layer_of(path) for path in SOURCES} - RANK.keys() == {"__init__"} | (
        {"__main__"} if (PACKAGE / "__main__.py").exists() else set()
    )


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_downwards_only(path: Path) -> None:
    layer = layer_of(path)
    if layer == "__main__":
        return
    highest = RANK["tracker"] + 1 if layer == "__init__" else RANK[layer]
    upwards = {name for name in imported_layers(path) if RANK[name] >= highest and name != layer}
    assert not upwards
    apart = APART.get(layer, set())
    if IMAGES in path.parents:
        apart = apart - {"process"}
    assert not imported_layers(path) & apart
    if layer == "checkpoint" and IMAGES not in path.parents:
        assert not {name for name in imported_modules(path) if name.startswith("dirtytrack.checkpoint.images")}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_only_kernel_touches_c(path: Path) -> None:
    if layer_of(path) == "kernel":
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not used & {"ffi", "lib", "_core"}
    modules = imported_modules(path)
    assert not {name for name in modules if name.split(".")[0] in {"cffi", "_cffi_backend", "ctypes"}}
    assert not {name for name in modules if "_core" in name.split(".")}


def in_order(names: list[str]) -> list[str]:
    """CONSTANTS, then Classes, then functions, as ruff's RUF022 has it."""
    return sorted(set(names), key=lambda name: (not name.isupper(), not name[0].isupper(), name))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_exports_are_sorted_and_exist(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
            assert names == in_order(names)
            return
    public = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert path.name in {"__main__.py", "_build.py"} or not [name for name in public if name[0] != "_"]


def files() -> Iterator[Path]:
    pending = [ROOT]
    while pending:
        for path in sorted(pending.pop().iterdir()):
            if path.name in NOT_OURS or (path.name.startswith(".") and path.name not in {".ci", ".gitignore"}):
                continue
            if path.is_dir():
                pending.append(path)
            elif path.suffix in CODE or path.name in CODE_BY_NAME:
                yield path


def test_every_file_names_its_licence() -> None:
    generated = PACKAGE / "kernel" / "_core.c"
    without = []
    for path in files():
        head = "\n".join(path.read_text(encoding="utf-8").splitlines()[:2])
        if path != generated and "SPDX-License-Identifier: MIT" not in head:
            without.append(name_of(path))
    assert not without


def declared_functions() -> set[str]:
    text = "".join((PACKAGE / "kernel" / "csrc" / name).read_text() for name in ("dirtytrack.h", "baseline.h"))
    text = re.sub(r"/\*.*?\*/|//[^\n]*|^#[^\n]*", " ", text, flags=re.DOTALL | re.MULTILINE)
    return set(re.findall(r"\b(dt_\w+)\s*\([^;{}]*\)\s*;", text))


def test_the_stub_has_what_the_headers_declare() -> None:
    stub = ast.parse((PACKAGE / "kernel" / "_core.pyi").read_text())
    stubbed = {
        node.name for node in ast.walk(stub) if isinstance(node, ast.FunctionDef) and node.name.startswith("dt_")
    }
    assert stubbed == declared_functions()


def test_the_extension_has_what_the_headers_declare() -> None:
    core = pytest.importorskip("dirtytrack.kernel._core", reason="no extension on this platform")
    built = {name for name in dir(core.lib) if name.startswith("dt_")}
    assert built == declared_functions()


def test_import_brings_no_consumer_and_no_numpy() -> None:
    code = "import sys, dirtytrack; print('\\n'.join(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    loaded = set(out.split())
    assert "dirtytrack" in loaded
    assert "numpy" not in loaded
    assert not {f"dirtytrack.{name}" for name in CONSUMERS} & loaded


def test_the_front_door_opens_on_every_name() -> None:
    import dirtytrack

    assert dirtytrack.__all__ == in_order(dirtytrack.__all__)
    assert not [name for name in dirtytrack.__all__ if not hasattr(dirtytrack, name)]

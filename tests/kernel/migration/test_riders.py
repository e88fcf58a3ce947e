# SPDX-License-Identifier: MIT
"""What examples/kvm_guest and examples/kv_service are made of."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"
SOURCES = [path for name in ("kvm_guest", "kv_service") for path in sorted((EXAMPLES / name).glob("*.py"))]
PUBLIC = {"dirtytrack", "dirtytrack.errors", "dirtytrack.migration", "dirtytrack.checkpoint"}


def ours(tree: ast.AST) -> Iterator[str]:
    """The modules of dirtytrack that are imported, and those of the tests, of which there are to be none."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] in ("dirtytrack", "tests"))
        elif isinstance(node, ast.ImportFrom) and not node.level:
            module = node.module or ""
            if module.split(".")[0] in ("dirtytrack", "tests"):
                yield module


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_it_is_short_and_stands_on_the_public_api(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) < 500
    tree = ast.parse(source)
    assert set(ours(tree)) <= PUBLIC
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            assert isinstance(node.value, ast.Name), node.attr
            assert node.value.id in ("self", "cls", "os"), node.attr  # os._exit


def test_both_are_there() -> None:
    assert {path.parent.name for path in SOURCES} == {"kvm_guest", "kv_service"}

# SPDX-License-Identifier: MIT
"""docs/failures.md and the tests here agree: a row for each test and a test for each row, with the same errors.

A test is read, not run: with the functions of its module that it names, what it passes to `pytest.raises` and
`pytest.warns` is what the row says is raised, the numbers that it compares with are the row's, and it looks at the
fields that the row names.
"""

from __future__ import annotations

import ast
import builtins
import errno
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from dirtytrack import errors

HERE = Path(__file__).parent
TABLE = HERE.parents[2] / "docs" / "failures.md"
RAISES = {"pytest.raises", "pytest.warns", "raises"}
COLUMNS = ["Call", "Cause", "Raises", "What to do", "Afterwards", "Test"]


class Provoked:
    """What a test provokes, as its source says."""

    def __init__(self, functions: dict[str, ast.FunctionDef], name: str) -> None:
        self.errors, self.numbers, self.fields = set[str](), set[str](), set[str]()
        seen, left = set[str](), [name]
        while left:
            name = left.pop()
            seen.add(name)
            for node in ast.walk(functions[name]):
                if isinstance(node, ast.Attribute):
                    self.fields.add(node.attr)
                elif isinstance(node, ast.Name) and node.id in functions.keys() - seen:
                    left.append(node.id)
                elif isinstance(node, ast.Compare):
                    self.numbers |= {part for part in words(node) if part in errno.errorcode.values()}
                elif isinstance(node, ast.Call) and ast.unparse(node.func) in RAISES:
                    self.errors |= {part for part in words(node.args[0]) if is_error(part)}


def words(node: ast.AST) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            yield part.id
        elif isinstance(part, ast.Attribute):
            yield part.attr


def is_error(name: str) -> bool:
    kind = getattr(errors, name, None) or getattr(builtins, name, None)
    return isinstance(kind, type) and issubclass(kind, BaseException)


def provoked(paths: Iterable[Path]) -> dict[str, Provoked]:
    found: dict[str, Provoked] = {}
    for path in paths:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        for name in functions:
            if name.startswith("test_") and path.name != Path(__file__).name:
                assert name not in found, "two tests of one name"
                found[name] = Provoked(functions, name)
    return found


def rows() -> list[list[str]]:
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row != COLUMNS]


def named_in(row: list[str]) -> list[str]:
    return re.findall(r"`(\w+)`", row[5])


PROVOKED = provoked(HERE.glob("test_*.py"))
OF_CONSUMERS = {
    name
    for path in HERE.parents[1].rglob("test_*.py")
    if path.parent != HERE
    for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
}
"""These stand beside the other tests of what they are about, and are looked for by name only."""


def test_each_failure_has_its_row_and_each_row_its_test() -> None:
    assert {len(row) for row in rows()} == {len(COLUMNS)}
    assert all(all(row) for row in rows())
    named = [name for row in rows() for name in named_in(row)]
    assert sorted(PROVOKED) == sorted(name for name in named if name in PROVOKED)
    assert set(named) <= PROVOKED.keys() | OF_CONSUMERS


def test_each_error_of_the_library_has_a_row() -> None:
    named = {name for row in rows() for name in re.findall(r"`(\w+)`", row[2])}
    assert set(errors.__all__) - {"DirtyTrackError", "MigrationFailed"} <= named


@pytest.mark.parametrize(
    "row", [row for row in rows() if named_in(row)[0] in PROVOKED], ids=lambda row: row[5].strip("`")
)
def test_a_row_says_what_its_test_provokes(row: list[str]) -> None:
    named = set(re.findall(r"`(\w+)`", row[2]))
    test = PROVOKED[row[5].strip("`")]
    fields = named & vars(errors.DirtyTrackError).keys()
    assert fields <= test.fields
    assert {name for name in named if name.isupper()} == test.numbers
    assert {name for name in named - fields if not name.isupper()} == test.errors

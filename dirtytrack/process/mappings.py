# SPDX-License-Identifier: MIT
"""Mappings of another process, and which of them are tracked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from ..errors import InvalidMemory
from ..region import Run

if TYPE_CHECKING:
    from ..kernel.targets import Row

__all__ = [
    "EXCLUDED",
    "TRACKED",
    "UNTRACKED",
    "Filter",
    "Mapping",
    "Pattern",
    "called",
    "excluded",
    "is_anonymous",
    "named",
]

Pattern = str | Run | tuple[int, int]
"""A name, in which ``*`` and ``?`` are as in a shell, or (start, end) addresses."""

TRACKED, UNTRACKED, EXCLUDED = "tracked", "untracked", "excluded"

_KERNELS_OWN = ("[vvar", "[vdso", "[vsyscall", "[uprobes")
_NO_FILE = ("/anon_hugepage", "/dev/zero")


def named(name: str) -> str:
    """What a mapping of this name is called: memory without one is [anon]."""
    return name or "[anon]"


@dataclass(frozen=True)
class Mapping:
    """A mapping of another process, [start, end), and whether its writes are tracked.

    Attributes:
        start, end: addresses, half-open.
        permissions: as in /proc/PID/maps: ``rw-p``.
        offset, device, inode: of its file; 0, ``00:00``, 0 where it has none.
        name: a path, ``[heap]``, ``[stack]``, ``[anon:NAME]``, or empty.
        state: ``tracked``; ``untracked``: it was chosen and cannot be, so it counts as wholly dirty in each collect;
            or ``excluded``: not chosen, and in no set.
        reason: why it is untracked or excluded; empty where it is tracked.
    """

    start: int
    end: int
    permissions: str
    offset: int
    device: str
    inode: int
    name: str
    state: str
    reason: str

    @property
    def nbytes(self) -> int:
        """Its length."""
        return self.end - self.start

    def __str__(self) -> str:
        return f"[{self.start:#x}, {self.end:#x}) {self.permissions} {self.name or '(anonymous)'}"


def called(row: Row, state: str, reason: str = "") -> Mapping:
    """A mapping of the kernel's words, and what we make of it."""
    rights = zip((row.readable, row.writable, row.executable), "rwx", strict=True)
    permissions = "".join(letter if on else "-" for on, letter in rights) + ("s" if row.shared else "p")
    device = f"{row.device[0]:02x}:{row.device[1]:02x}"
    return Mapping(row.start, row.end, permissions, row.offset, device, row.inode, row.name, state, reason)


def excluded(row: Row, why: str) -> Mapping:
    """A mapping that was not chosen, and why."""
    return called(row, EXCLUDED, why)


def _patterns(given: Pattern | Iterable[Pattern], name: str) -> tuple[Pattern, ...]:
    listed: Any = (given,) if isinstance(given, (str, Run)) or _is_range(given) else given
    if not isinstance(listed, Iterable):
        raise InvalidMemory(f"{name} takes names, (start, end) pairs, or a list of these, not {given!r}")
    out: tuple[Any, ...] = tuple(listed)
    for pattern in out:
        if isinstance(pattern, str):
            continue
        if not _is_range(pattern) or not 0 <= pattern[0] < pattern[1]:
            raise InvalidMemory(f"{name} takes names and (start, end) pairs of addresses, not {pattern!r}")
    return out


def _is_range(given: object) -> bool:
    return isinstance(given, tuple) and len(given) == 2 and all(isinstance(number, int) for number in given)


def _matches(row: Row, pattern: Pattern) -> bool:
    if isinstance(pattern, str):
        return fnmatchcase(named(row.name), pattern.replace("[", "[[]"))
    return row.start < pattern[1] and pattern[0] < row.end


def is_anonymous(row: Row) -> bool:
    """Whether it is private memory without a file."""
    return not row.shared and (not row.inode or row.name.startswith(_NO_FILE))


class Filter:
    """Which mappings are chosen. ``[anon]`` is what has no name.

    Args:
        include: patterns; what is not private anonymous memory is chosen only where one of them matches it. None: all
            private anonymous memory.
        exclude: patterns; they win.
    """

    def __init__(
        self, include: Pattern | Iterable[Pattern] | None, exclude: Pattern | Iterable[Pattern] | None
    ) -> None:
        self._include = None if include is None else _patterns(include, "include")
        self._exclude = () if exclude is None else _patterns(exclude, "exclude")

    def excludes(self, row: Row) -> bool:
        """Whether one of the patterns of ``exclude`` matches it."""
        return any(_matches(row, pattern) for pattern in self._exclude)

    def refuses(self, row: Row) -> str:
        """Why a mapping is not chosen; empty where it is."""
        if not row.writable:
            return "not writable"
        if row.name.startswith(_KERNELS_OWN):
            return "the kernel's own"
        if self.excludes(row):
            return "excluded by exclude="
        if self._include is not None:
            return "" if any(_matches(row, pattern) for pattern in self._include) else "not in include="
        if row.shared:
            return "shared: name it in include= to track it (see docs/processes.md)"
        if not is_anonymous(row):
            return "a file's: name it in include= to track it (see docs/processes.md)"
        return ""

    def look(self, rows: list[Row]) -> list[tuple[Row, str]]:
        """Each mapping, and why it is not chosen. Of private anonymous memory what is read-only is chosen with its
        neighbour: it may be writable again soon, and the kernel joins only what is registered alike."""
        out = [(row, self.refuses(row)) for row in rows]
        for order in (1, -1):
            before: Row | None = None
            for i in range(len(out))[::order]:
                row, why = out[i]
                touches = before is not None and (before.end == row.start if order > 0 else row.end == before.start)
                if touches and why and row.readable and not row.writable and is_anonymous(row):
                    why = self.refuses(row._replace(writable=True))
                    out[i] = row, why
                before = row if not why and is_anonymous(row) else None
        return out

    def __str__(self) -> str:
        parts = [f"include={list(self._include)!r}"] if self._include is not None else []
        parts += [f"exclude={list(self._exclude)!r}"] if self._exclude else []
        return ", ".join(parts) or "private anonymous memory"

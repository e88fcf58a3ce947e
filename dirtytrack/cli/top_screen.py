# SPDX-License-Identifier: MIT
"""What `dirtytrack top` shows, and what its keys do: a table of processes, and one of a process's mappings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..observe import MappingSample, Sample
from ..observe.units import show_bytes
from ..process.mappings import named
from .strip import sparkline

__all__ = ["Line", "View"]

_SPARK = 16
_NAME_WIDTH = 18
_HEAD_LINES = 2  # the title and the names of the columns
_FOOT_LINES = 1
_PROCESS_KEYS = "↑↓ choose  enter mappings  s sort  r reverse  f freeze  q quit"
_MAPPING_KEYS = "↑↓ choose  tab next process  esc processes  s sort  r reverse  f freeze  q quit"


@dataclass(frozen=True)
class Line:
    """A process as of a moment: numbers of the last epoch that it was watched, and why it is not any more."""

    pid: int
    name: str
    rates: Sample | None
    problem: str = ""
    gone: bool = False

    @property
    def bytes_per_second(self) -> float:
        """What it writes now: nothing, if it has gone."""
        return self.rates.bytes_per_second if self.rates is not None and not self.problem else 0.0


Row = TypeVar("Row")


class _Column(NamedTuple, Generic[Row]):
    """A column: ``order`` is what it is sorted by, ``descending`` the way that one wants first. Where a terminal is too
    narrow for all, those with the highest ``spare`` are left out first, and those with 0 never."""

    title: str
    width: int
    cell: Callable[[Row, View], str]
    order: Callable[[Row], Any]
    descending: bool = True
    left: bool = False
    spare: int = 0


def _window(i: int) -> tuple[Callable[[Line, View], str], Callable[[Line], float]]:
    def order(line: Line) -> float:
        return line.rates.windows_bytes[i] if line.rates else -1

    def cell(line: Line, view: View) -> str:
        if line.rates is None:
            return ""
        return show_bytes(line.rates.windows_bytes[i]) + ("" if line.rates.windows_full[i] else "+")

    return cell, order


def _part(part: float) -> str:
    return f"{part:.1%}" if part < 0.9995 else "100%"


def _process_name(line: Line, view: View) -> str:
    if line.gone and line.rates is not None:
        return f"[gone] {line.name}"
    if line.problem:
        return f"{line.name.partition(' ')[0]} [{line.problem}]".lstrip()
    untracked = line.rates.untracked_bytes if line.rates is not None else 0
    return f"[{show_bytes(untracked)} untracked] {line.name}" if untracked else line.name


_NO_RATES = ""
_PROCESSES: tuple[_Column[Line], ...] = (
    _Column("PID", 8, lambda line, _: str(line.pid), lambda line: line.pid, descending=False),
    _Column(
        "DIRTY/S",
        10,
        lambda line, _: show_bytes(line.bytes_per_second) + "/s" if line.rates else _NO_RATES,
        lambda line: line.bytes_per_second,
    ),
    _Column("1 S", 9, *_window(0)),
    _Column("10 S", 9, *_window(1), spare=1),
    _Column("60 S", 9, *_window(2)),
    _Column(
        "COLLECT",
        9,
        lambda line, _: f"{line.rates.collect_seconds * 1e3:.2f} ms" if line.rates else _NO_RATES,
        lambda line: line.rates.collect_seconds if line.rates else -1,
        spare=3,
    ),
    _Column(
        "HISTORY",
        _SPARK,
        lambda line, view: sparkline(line.rates.history, _SPARK, plain=view.plain) if line.rates else _NO_RATES,
        lambda line: sum(line.rates.history) if line.rates else -1,
        spare=2,
    ),
    _Column("COMMAND", 0, _process_name, lambda line: line.name, descending=False, left=True),
)


def _mapping_window(i: int) -> tuple[Callable[[MappingSample, View], str], Callable[[MappingSample], int]]:
    return lambda row, _: show_bytes(row.windows_bytes[i]), lambda row: row.windows_bytes[i]


def _mapping_name(row: MappingSample, view: View) -> str:
    name = named(row.mapping.name)
    return f"{name} [untracked: {row.mapping.reason}]" if row.mapping.state == "untracked" else name


_MAPPINGS: tuple[_Column[MappingSample], ...] = (
    _Column("ADDRESS", 14, lambda row, _: f"{row.mapping.start:x}", lambda row: row.mapping.start, descending=False),
    _Column("SIZE", 8, lambda row, _: show_bytes(row.mapping.nbytes), lambda row: row.mapping.nbytes, spare=2),
    _Column("DIRTY/S", 10, lambda row, _: show_bytes(row.bytes_per_second) + "/s", lambda row: row.bytes_per_second),
    _Column("1 S", 8, *_mapping_window(0), spare=4),
    _Column("10 S", 8, *_mapping_window(1), spare=5),
    _Column("60 S", 8, *_mapping_window(2)),
    _Column("OF IT", 6, lambda row, _: _part(row.share), lambda row: row.share, spare=3),
    _Column("OF ALL", 6, lambda row, view: _part(view.share_of_all(row)), lambda row: row.dirty_bytes, spare=1),
    _Column(
        "HISTORY",
        _SPARK,
        lambda row, view: sparkline(row.history, _SPARK, plain=view.plain),
        lambda row: sum(row.history),
        spare=6,
    ),
    _Column(
        "MAPPING", 0, _mapping_name, lambda row: (row.mapping.name, row.mapping.start), descending=False, left=True
    ),
)


@dataclass
class _Table(Generic[Row]):
    """How one of the two tables is looked at: sorted by what, which way, what is chosen, what is scrolled away."""

    columns: tuple[_Column[Row], ...]
    name: Callable[[Row], object]
    sort: int
    reverse: bool = False
    chosen: object = None
    at: int = 0
    first: int = 0

    def sorted(self, rows: Sequence[Row]) -> list[Row]:
        column = self.columns[self.sort]
        out = sorted(rows, key=column.order, reverse=column.descending != self.reverse)
        places = [i for i, row in enumerate(out) if self.name(row) == self.chosen]
        self.at = places[0] if places else max(0, min(self.at, len(out) - 1))
        self.chosen = self.name(out[self.at]) if out else None
        return out

    def move(self, rows: Sequence[Row], by: int) -> None:
        out = self.sorted(rows)
        if out:
            self.chosen = self.name(out[max(0, min(len(out) - 1, self.at + by))])

    def sort_by(self, step: int) -> None:
        self.sort, self.reverse = (self.sort + step) % len(self.columns), False


@dataclass
class View:
    """What is on the screen. `press` changes how it is looked at, `update` what; `render` draws it.

    Args:
        every_seconds: what the title says of the epochs' length.
        plain: without characters beyond ASCII.
    """

    every_seconds: float
    plain: bool = False
    frozen: bool = False
    done: bool = False
    mappings_of: int | None = None
    """The process whose mappings are shown; None where processes are."""
    remark: str = ""
    """What else stands in the title."""
    page_rows: int = 10
    _lines: tuple[Line, ...] = ()
    _newest: tuple[Line, ...] = ()
    _processes: _Table[Line] = field(default_factory=lambda: _Table(_PROCESSES, lambda line: line.pid, sort=1))
    _mappings: _Table[MappingSample] = field(
        default_factory=lambda: _Table(_MAPPINGS, lambda row: row.mapping.start, sort=2)
    )

    def update(self, lines: Sequence[Line]) -> None:
        """What there is now; not shown while frozen."""
        self._newest = tuple(lines)
        if not self.frozen:
            self._lines = self._newest

    def press(self, key: str) -> None:
        """Do what a key is for; another key does nothing."""
        if key == "q":
            self.done = True
        elif key in ("f", "space"):
            self.frozen = not self.frozen
            self.update(self._newest)
        elif self.mappings_of is None:
            if key in ("enter", "right"):
                self._processes.sorted(self._lines)
                self._show(self._processes.chosen)
            else:
                self._press(self._processes, self._lines, key)
        elif key in ("escape", "left", "backspace"):
            self.mappings_of = None
        elif key in ("tab", "back tab"):
            pids = [line.pid for line in self._processes.sorted(self._lines)]
            at = pids.index(self.mappings_of) if self.mappings_of in pids else -1
            self._show(pids[(at + (1 if key == "tab" else -1)) % len(pids)] if pids else None)
        else:
            self._press(self._mappings, self._rows(), key)

    def _press(self, table: _Table[Any], rows: Sequence[Any], key: str) -> None:
        steps = {"up": -1, "k": -1, "down": 1, "j": 1, "page up": -self.page_rows, "page down": self.page_rows}
        steps |= {"home": -len(rows), "end": len(rows)}
        if key in steps:
            table.move(rows, steps[key])
        elif key in ("s", "S", ">", "<"):
            table.sort_by(1 if key in ("s", ">") else -1)
        elif key == "r":
            table.reverse = not table.reverse

    def _show(self, pid: Any) -> None:
        self._processes.chosen = self.mappings_of = pid
        self._mappings.chosen, self._mappings.at = None, 0

    def _line(self) -> Line | None:
        return next((line for line in self._lines if line.pid == self.mappings_of), None)

    def _rows(self) -> tuple[MappingSample, ...]:
        line = self._line()
        return line.rates.mappings if line is not None and line.rates is not None else ()

    def share_of_all(self, row: MappingSample) -> float:
        """The part of what its process wrote in the last epoch."""
        line = self._line()
        total = line.rates.dirty_bytes if line is not None and line.rates is not None else 0
        return row.dirty_bytes / total if total else 0.0

    # ---- drawing

    def render(self, columns: int, lines: int) -> RenderableType:
        """The whole screen, for a terminal of that size."""
        room = max(1, lines - _HEAD_LINES - _FOOT_LINES)
        self.page_rows = max(1, room - 1)
        table = (
            _draw(self._processes, self._lines, self, columns, room, lambda line: bool(line.problem))
            if self.mappings_of is None
            else _draw(self._mappings, self._rows(), self, columns, room, lambda row: not row.dirty_bytes)
        )
        keys = _PROCESS_KEYS if self.mappings_of is None else _MAPPING_KEYS
        foot = Text(keys.replace("↑↓", "j k") if self.plain else keys, style="dim", no_wrap=True, overflow="crop")
        line = self._line()
        if line is not None and line.problem and not table.row_count:
            problem = Text(line.problem).wrap(Console(width=columns), columns)[:room]
            return Group(self._title(), table, *problem, *[Text("")] * (room - len(problem)), foot)
        return Group(self._title(), table, *[Text("")] * (room - table.row_count), foot)

    def _title(self) -> Text:
        total = sum(line.bytes_per_second for line in self._lines)
        title = Text("dirtytrack top", style="bold", no_wrap=True, overflow="crop" if self.plain else "ellipsis")
        title.append(f"  {show_bytes(total)}/s", style="bold")
        watched = sum(not line.problem for line in self._lines)
        parts = [f"{watched} of {len(self._lines)} processes watched", f"every {self.every_seconds:g} s"]
        if self.mappings_of is not None:
            line = self._line()
            name = line.name if line is not None else ""
            parts = [f"mappings of {self.mappings_of} {name}".rstrip(), *parts[1:]]
            if line is not None and line.problem:
                parts.insert(0, "[gone]" if line.gone else "[not watched]")
        if self.frozen:
            title.append("  FROZEN", style="bold yellow")
        title.append("  " + "  ".join(filter(None, [*parts, self.remark])), style="not bold")
        return title


def _that_fit(table: _Table[Row], width: int) -> list[_Column[Row]]:
    """The columns that a terminal of that width has room for; what is sorted by stays."""
    out = list(table.columns)
    while sum((column.width or _NAME_WIDTH) + 1 for column in out) > width:
        spared = [column for column in out if column.spare and column is not table.columns[table.sort]]
        if not spared:
            break
        out.remove(max(spared, key=lambda column: column.spare))
    return out


def _draw(
    table: _Table[Row], rows: Sequence[Row], view: View, width: int, room: int, faint: Callable[[Row], bool]
) -> Table:
    out = Table(box=None, expand=True, padding=(0, 1, 0, 0), collapse_padding=True, header_style="bold")
    columns = _that_fit(table, width)
    for column in columns:
        mark = ("↓" if column.descending != table.reverse else "↑") if column is table.columns[table.sort] else ""
        if view.plain and mark:
            mark = "v" if mark == "↓" else "^"
        out.add_column(
            column.title + mark,
            justify="left" if column.left else "right",
            width=column.width or None,
            ratio=None if column.width else 1,
            no_wrap=True,
            overflow="ellipsis" if not view.plain else "crop",
            header_style="bold cyan" if mark else "bold",
        )
    shown = table.sorted(rows)
    table.first = max(0, min(table.first, table.at, len(shown) - room), table.at - room + 1)
    for i, row in enumerate(shown[table.first : table.first + room], table.first):
        style = "reverse" if i == table.at else "dim" if faint(row) else ""
        out.add_row(*(Text(column.cell(row, view)) for column in columns), style=style)
    return out

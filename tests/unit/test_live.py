# SPDX-License-Identifier: MIT
"""Sample, working sets and histories against a list of sets of page numbers; and the screen that shows them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from dirtytrack import DirtySet
from dirtytrack.cli.keys import names
from dirtytrack.cli.strip import sparkline
from dirtytrack.cli.top_screen import Line, View
from dirtytrack.kernel.core import PAGE_BYTES as PAGE
from dirtytrack.observe import windows
from dirtytrack.observe.live import HISTORY, Sample, Watch
from dirtytrack.observe.units import show_bytes
from dirtytrack.process import Mapping
from tests.unit.recordings import dirty_set, mapping

LOW, HIGH = mapping(0, 10, "[heap]"), mapping(20, 40, "")
BUSY = mapping(60, 64, "/lib/busy.so", state="untracked", reason="another has it")
LEFT_OUT = mapping(80, 90, "/lib/left.so", state="excluded", reason="a file's")
TABLE = (LOW, HIGH, BUSY, LEFT_OUT)
WRITTEN = st.frozensets(st.integers(0, 9) | st.integers(20, 39), max_size=12)


class Scripted:
    """A source whose epochs are written down beforehand, and the clock by which they take their time."""

    def __init__(self, epochs: Sequence[tuple[float, frozenset[int]]], mappings: tuple[Mapping, ...] = TABLE) -> None:
        self.epoch, self.now, self.mappings = 1, 100.0, mappings
        self._epochs = list(epochs)

    def collect(self) -> DirtySet:
        seconds, pages = self._epochs.pop(0)
        self.epoch += 1
        self.now += seconds
        return dirty_set(pages)


def watched(epochs: Sequence[tuple[float, frozenset[int]]], lengths: tuple[float, ...] = (1.0, 10.0)) -> list[Sample]:
    source = Scripted(epochs)
    watch = Watch(source, lengths, clock=lambda: source.now)
    return [watch.sample() for _ in epochs]


@given(st.lists(st.tuples(st.sampled_from((0.125, 0.5, 1.0, 3.0)), WRITTEN), min_size=1, max_size=40))
@settings(max_examples=60)
def test_rates_and_windows_are_those_of_the_sets(epochs: list[tuple[float, frozenset[int]]]) -> None:
    for n, told in enumerate(watched(epochs), 1):
        seconds, pages = epochs[n - 1]
        assert told.epoch == n
        assert told.seconds == pytest.approx(seconds)
        assert told.dirty_bytes == len(pages) * PAGE
        assert told.bytes_per_second == pytest.approx(len(pages) * PAGE / seconds)
        assert [row.mapping for row in told.mappings] == [LOW, HIGH, BUSY]
        for row, first, last in ((told.mappings[0], 0, 10), (told.mappings[1], 20, 40)):
            assert row.dirty_bytes == sum(first <= page < last for page in pages) * PAGE
            assert row.share == row.dirty_bytes / ((last - first) * PAGE)
            assert len(row.history) == min(n, HISTORY)
            assert row.history[-1] == row.bytes_per_second
        for length, nbytes, full in zip((1.0, 10.0), told.windows_bytes, told.windows_full, strict=True):
            # It reaches back to the begin of an epoch: at least so far as it should to within a 64th, at most an epoch
            # and a 64th further.
            must, may, back = set[int](), set[int](), 0.0
            for each, written in reversed(epochs[:n]):
                if back < length * 63 / 64 - 1e-9 or not back:
                    must |= written
                if back < length * 65 / 64 + 1e-9:
                    may |= written
                back += each
            assert len(must) * PAGE <= nbytes <= len(may) * PAGE
            assert full == (back >= length * 63 / 64)
        assert sum(row.windows_bytes[0] for row in told.mappings) == told.windows_bytes[0]


def test_windows_stay_small_and_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "_MOST_RUNS", 200)
    window = windows.Window(10.0)
    epochs = [{(i * 7 + k * 100) % 3000 for k in range(10)} for i in range(1000)]
    for i, pages in enumerate(epochs):
        window.add(dirty_set(pages), i * 0.01, (i + 1) * 0.01)
    assert len(window._parts) <= 2 * windows._FEWEST_PARTS
    assert window.full
    assert window.written() >= dirty_set(set().union(*epochs[16:]))
    window.add(dirty_set([7]), 30.0, 31.0)
    assert window.written() == dirty_set([7])


def test_a_mapping_keeps_its_history_while_it_is_there() -> None:
    grown = mapping(0, 15, "[heap]")
    source = Scripted([(1.0, frozenset({1})), (1.0, frozenset({12})), (1.0, frozenset()), (1.0, frozenset({2}))])
    watch = Watch(source, (), clock=lambda: source.now)
    watch.sample()
    source.mappings = (grown,)
    assert watch.sample().mappings[0].history == (PAGE, PAGE)
    source.mappings = (HIGH,)
    watch.sample()
    source.mappings = (grown,)
    assert watch.sample().mappings[0].history == (PAGE,)


@pytest.mark.parametrize(
    ("nbytes", "says"),
    [
        (0, "0"),
        (1, "1 B"),
        (999, "999 B"),
        (4096, "4.00 KiB"),
        (10 << 10, "10.0 KiB"),
        (1000 << 10, "0.98 MiB"),
        (130 << 20, "130 MiB"),
        (1 << 62, "4096 PiB"),
    ],
)
def test_amounts(nbytes: int, says: str) -> None:
    assert show_bytes(nbytes) == says


def test_sparklines() -> None:
    assert sparkline([0, 1, 4, 8], 6) == "   ▂▅█"
    assert sparkline([9, 9, 1, 0], 2) == "█ "
    assert sparkline([0, 1, 8], 3, plain=True).isascii()
    assert sparkline([], 3) == "   "


def test_keys_of_terminals() -> None:
    assert list(names(b"q\x1b[A\x1bOB\x1b[5~\r\x1b \t\x1b[Z\x03")) == [
        *("q", "up", "down", "page up", "enter", "escape", "space", "tab", "back tab", "interrupt")
    ]
    assert list(names("ä\x1b[38;5;7zx".encode())) == ["x"]
    assert list(names(b"\x1b[")) == []


# ---- the screen


def shown(view: View, columns: int = 140, lines: int = 9) -> list[str]:
    console = Console(width=columns, height=lines, legacy_windows=False)
    with console.capture() as captured:
        console.print(view.render(columns, lines))
    out = captured.get().splitlines()
    assert len(out) == lines and max(map(len, out)) <= columns
    return out


def view_of_three() -> View:
    rates = watched([(1.0, frozenset({1, 2})), (1.0, frozenset({1, 20, 21, 60, 61, 62, 63}))], (1.0, 10.0, 60.0))[-1]
    view = View(1.0)
    view.update(
        [
            Line(30, "writer --fast", rates),
            Line(10, "ended one", rates, "process 10 ended", gone=True),
            Line(20, "secret", None, "may not be traced: run as that user"),
        ]
    )
    return view


def test_processes_are_shown_sorted_and_chosen() -> None:
    view = view_of_three()
    title, head, first, second, third, *_, keys = shown(view)
    assert "28.0 KiB/s" in title and "1 of 3 processes watched" in title
    assert "DIRTY/S↓" in head and "q quit" in keys
    assert first.split()[:2] == ["30", "28.0"] and "32.0 KiB+" in first
    assert "[16.0 KiB untracked] writer --fast" in first
    assert "[gone] ended one" in second + third and "secret [may not be traced" in second + third
    view.press("<")
    assert [line.split()[0] for line in shown(view)[2:5]] == ["10", "20", "30"]
    view.press("r")
    assert [line.split()[0] for line in shown(view)[2:5]] == ["30", "20", "10"]
    for key, pid in (("down", 20), ("end", 10), ("home", 30), ("j", 20), ("enter", 20)):
        view.press(key)
        shown(view)
        assert (view._processes.chosen, key) == (pid, key)
    assert view.mappings_of == 20
    assert "may not be traced: run as that user" in shown(view)[2]


def test_mappings_of_a_process_are_shown() -> None:
    view = view_of_three()
    view.press("enter")
    title, head, *rows = shown(view)
    assert "mappings of 30 writer --fast" in title and "OF ALL" in head
    assert rows[0].split()[:2] == [f"{BUSY.start:x}", "16.0"]
    assert "100%" in rows[0] and "57.1%" in rows[0] and "/lib/busy.so [untracked: another has it]" in rows[0]
    assert "left.so" not in "".join(rows)
    view.press("tab")
    assert view.mappings_of in (10, 20)
    view.press("back tab")
    assert view.mappings_of == 30
    view.press("escape")
    assert view.mappings_of is None


def test_a_small_screen_scrolls_to_what_is_chosen() -> None:
    view = view_of_three()
    view.press("<")
    for _ in range(2):
        view.press("down")
    assert [line.split()[0] for line in shown(view, lines=4)[2:3]] == ["30"]
    narrow = shown(view, columns=60, lines=5)
    assert "HISTORY" not in narrow[1] and "60 S" in narrow[1] and "COMMAND" in narrow[1]
    view.plain = True
    assert all(line.isascii() for line in shown(view, columns=60))


def test_frozen_is_what_was() -> None:
    view = view_of_three()
    before = shown(view)
    view.press("f")
    view.update([])
    assert shown(view)[1:] == before[1:] and "FROZEN" in shown(view)[0]
    view.press("space")
    assert "0 of 0 processes" in shown(view)[0]
    view.press("enter")
    view.press("tab")
    view.press("x")
    view.press("q")
    assert view.done


def test_who_has_no_numpy_can_scan() -> None:
    code = (
        "import sys; sys.modules['numpy'] = None\n"
        "from dirtytrack.cli import scan, watching\n"
        "from dirtytrack import observe, UnsupportedKernel\n"
        "assert not hasattr(observe, 'nothing')\n"
        "try: observe.Recording\n"
        "except UnsupportedKernel as error: assert 'dirtytrack[observe]' in str(error), error\n"
        "else: sys.exit('NumPy is not needed')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

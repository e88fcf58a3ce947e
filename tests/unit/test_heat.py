# SPDX-License-Identifier: MIT
"""Heat maps against the obvious model, a set of page numbers an epoch: no written page is ever missing from one."""

from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dirtytrack import InvalidRecording, UnsupportedKernel
from dirtytrack.cli import main
from dirtytrack.kernel.core import PAGE_BYTES as PAGE
from dirtytrack.observe import Recording
from dirtytrack.observe.colours import LEVELS, PALETTE, levels
from dirtytrack.observe.heat import HeatMap, heat_map
from dirtytrack.observe.text import heat_text
from tests.unit.recordings import BASE, EPOCH_SECONDS, make_recording, mapping

LOW, HIGH, FAR = mapping(0, 400, "[heap]"), mapping(400, 1000, ""), mapping(5_000_000, 5_000_050, "/lib/far.so")
TABLE = (LOW, HIGH, FAR)
PAGES = st.integers(0, 999) | st.integers(5_000_000, 5_000_049)
EPOCHS = st.lists(st.frozensets(PAGES, max_size=30), min_size=1, max_size=9).filter(any)


def recorded(epochs: list[frozenset[int]]) -> Recording:
    with tempfile.TemporaryDirectory() as folder:
        return make_recording(Path(folder, "r.dtr"), epochs, [TABLE])


def row_of(heat: HeatMap, page: int) -> int:
    address = (BASE + page) * PAGE
    rows = [i for i, (start, end) in enumerate(heat.spans().tolist()) if start <= address < end]
    assert len(rows) == 1, "each page is in one row"
    return rows[0]


@given(EPOCHS, st.integers(1, 300), st.integers(1, 12))
@settings(max_examples=60)
def test_every_written_page_is_counted_where_and_when_it_was_written(
    epochs: list[frozenset[int]], rows: int, columns: int
) -> None:
    heat = heat_map(recorded(epochs), rows=rows, columns=columns)
    assert heat.counts.shape == (len(heat.columns), heat.rows)
    assert heat.rows <= max(rows, len(heat.stretches))
    assert len(heat.columns) <= min(columns, len(epochs))
    assert sum(column.epochs for column in heat.columns) == len(epochs)
    model = np.zeros_like(heat.counts)
    at = 0
    for i, column in enumerate(heat.columns):
        assert column.number == at + 1
        for pages in epochs[at : at + column.epochs]:
            for page in pages:
                model[i, row_of(heat, page)] += 1
        at += column.epochs
    assert (heat.counts == model).all()
    assert ((heat.shares() > 0) == (model > 0)).all()
    assert ((levels(heat.across(40)) > 0).any(axis=0) == (model > 0).any(axis=0)).all()


@given(EPOCHS)
@settings(max_examples=20)
def test_gaps_are_folded_and_the_rest_is_not(epochs: list[frozenset[int]]) -> None:
    heat = heat_map(recorded(epochs), rows=2000, columns=9)
    written = sorted(set().union(*epochs))
    shown = sum(stretch.end - stretch.start for stretch in heat.stretches) // PAGE
    gaps = [b.start - a.end for a, b in zip(heat.stretches, heat.stretches[1:], strict=False)]
    assert all(gap > 0 for gap in gaps)
    assert all(gap // PAGE > shown // 65 for gap in gaps)
    assert heat.row_bytes == PAGE
    assert (heat.stretches[0].start, heat.stretches[-1].end) == (
        (BASE + written[0]) * PAGE,
        (BASE + written[-1] + 1) * PAGE,
    )
    assert sum(stretch.rows for stretch in heat.stretches) == heat.rows


def test_what_was_coarsened_is_shown_no_less_than_it_was(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    epochs = [frozenset(rng.integers(0, 100_000, 150).tolist()) for _ in range(250)]
    recording = make_recording(tmp_path / "r.dtr", epochs, [[mapping(0, 100_000, "")]], size_budget=16 << 10)
    assert any(epoch.coarse > 1 for epoch in recording), "the budget is too large for this test"
    heat = heat_map(recording, rows=64, columns=50)
    assert max(column.coarse for column in heat.columns) > 1
    at = 0
    for i, column in enumerate(heat.columns):
        # An epoch of the recording may be several that were put together: which, only their times tell.
        first, last = round(column.begun / EPOCH_SECONDS), round(column.ended / EPOCH_SECONDS)
        assert first == at
        at = last
        rows = {row_of(heat, page) for page in set().union(*epochs[first:last])}
        assert all(heat.counts[i, row] > 0 for row in rows)
        assert int(heat.counts[i].sum()) >= len(set().union(*epochs[first:last]))
    assert at == len(epochs)
    assert heat.shares().max() <= 1


def test_time_in_which_nothing_was_recorded_is_told_apart(tmp_path: Path) -> None:
    recording = make_recording(tmp_path / "r.dtr", [{1}, {1}, {1}], [TABLE], pauses={2: 2.0})
    heat = heat_map(recording, rows=10, columns=100)
    across = heat.across(7)[:, 0]  # half a second each
    assert [math.isnan(share) for share in across.tolist()] == [False, False, True, True, True, True, False]
    assert levels(heat.across(7))[2, 0] == -1


def test_a_mapping_that_took_anothers_place_gives_its_name(tmp_path: Path) -> None:
    grown = mapping(0, 600, "[heap]")
    tables = [(LOW, FAR), (grown, FAR), (grown, mapping(5_000_000, 5_000_020, "/lib/other.so"))]
    heat = heat_map(
        make_recording(tmp_path / "r.dtr", [{1}, {599}, {5_000_010, 5_000_030}], tables), rows=100, columns=9
    )
    assert [(place.start // PAGE - BASE, place.end // PAGE - BASE, place.name) for place in heat.places] == [
        (0, 600, "[heap]"),
        (5_000_000, 5_000_020, "/lib/other.so"),
        (5_000_020, 5_000_050, "/lib/far.so"),
    ]


def test_text_shows_names_folds_and_time(tmp_path: Path) -> None:
    heat = heat_map(make_recording(tmp_path / "r.dtr", [range(400), {3}, {5_000_049}], [TABLE]), rows=8, columns=30)
    lines = list(heat_text(heat, 30, colour=False))
    assert "\x1b" not in "".join(lines)
    assert lines[0].split() == [f"{BASE * PAGE:x}", "[heap]", "██████████░░░░░░░░░░"]
    fold = next(i for i, line in enumerate(lines) if "not shown" in line)
    assert lines[fold].startswith(" " * 10) and f"{(5_000_049 - 400) * PAGE / 2**30:.1f} GiB" in lines[fold]
    assert lines[fold + 1].split() == [f"{(BASE + 5_000_049) * PAGE:x}", "/lib/far.so", "█" * 10]
    assert lines[-2].split() == ["0.0", "s", "1.5", "s"]
    assert all(line.isascii() for line in heat_text(heat, 30, colour=False, plain=True))
    coloured = list(heat_text(heat, 30, colour=True))
    assert len(coloured) < len(lines)
    assert "\x1b[0;38;5;229" in coloured[0]
    assert all(line.count("\x1b[") == 0 or line.rstrip().endswith("\x1b[0m") for line in coloured[:-2])


def test_png_has_the_colours_where_they_belong(tmp_path: Path) -> None:
    make_recording(tmp_path / "r.dtr", [range(100), set(), range(100)], [TABLE], pauses={2: 0.5})
    assert main(["heatmap", str(tmp_path / "r.dtr"), "-o", str(tmp_path / "r.png")]) == 0
    picture = Image.open(tmp_path / "r.png").convert("RGB")
    across = [picture.getpixel((250 + int(926 * part), 60)) for part in (0.1, 0.35, 0.6, 0.9)]
    assert across[0] == across[3] == PALETTE[LEVELS - 1]
    assert across[1] == PALETTE[0]
    assert across[2] not in PALETTE, "nothing was recorded then"
    assert {path.name for path in tmp_path.iterdir()} == {"r.dtr", "r.png"}


def test_the_command_prints_a_map_and_no_colour_into_a_pipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    make_recording(tmp_path / "r.dtr", [{1, 2}], [TABLE])
    assert main(["heatmap", str(tmp_path / "r.dtr")]) == 0
    out = capsys.readouterr().out
    assert "[heap]" in out and "█" in out and "\x1b" not in out
    assert max(map(len, out.splitlines()[:-1])) <= 80


def test_what_is_no_recording_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    page.write_text("<html>")
    whole = tmp_path / "whole.dtr"
    make_recording(whole, [{1}], [TABLE])
    (tmp_path / "old.dtr").write_bytes(b"DTR\x63" + whole.read_bytes()[4:])
    (tmp_path / "cut.dtr").write_bytes(whole.read_bytes()[:30])
    make_recording(tmp_path / "clean.dtr", [set(), set()], [TABLE])
    for name, says in {
        "page.html": "is no recording",
        "old.dtr": "version 99",
        "cut.dtr": "has no epoch",
        "clean.dtr": "2 epochs in which nothing was written",
        "none.dtr": "cannot be read",
        ".": "cannot be read",
    }.items():
        assert main(["heatmap", str(tmp_path / name), "-o", str(tmp_path / "x.html")]) == 1
        out, err = capsys.readouterr()
        assert says in err and not out and len(err.splitlines()) == 1
    assert main(["heatmap", str(whole), "-o", str(tmp_path / "x.gif")]) == 2
    assert "neither .png nor .html" in capsys.readouterr().err
    assert main(["heatmap", str(whole), "-o", str(tmp_path / "nowhere" / "x.html")]) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert not list(tmp_path.glob("x.*"))


def test_pages_smaller_than_ours_are_refused(tmp_path: Path) -> None:
    recording = make_recording(tmp_path / "r.dtr", [{1}], [TABLE])
    recording.page_bytes = PAGE // 2
    with pytest.raises(InvalidRecording, match="draw it where pages are as small"):
        heat_map(recording, rows=9, columns=9)


def test_without_pillow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_recording(tmp_path / "r.dtr", [{1}], [TABLE])
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert main(["heatmap", str(tmp_path / "r.dtr"), "-o", str(tmp_path / "r.png")]) == 1
    with pytest.raises(UnsupportedKernel, match=r"dirtytrack\[observe\]"):
        from dirtytrack.observe.picture import heat_png

        heat_png(heat_map(Recording.open(tmp_path / "r.dtr"), rows=9, columns=9), tmp_path / "r.png", title="")

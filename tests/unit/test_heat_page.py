# SPDX-License-Identifier: MIT
"""The page of a heat map, opened in a real browser without a window: what it shows, its pointer, zoom and drag."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dirtytrack.cli import main
from dirtytrack.kernel.core import PAGE_BYTES as PAGE
from dirtytrack.observe.colours import BACKGROUND, LEVELS, NOTHING, PALETTE
from tests.unit.browsing import BROWSERS
from tests.unit.recordings import BASE, EPOCH_SECONDS, make_recording, mapping

HEAP, FAR = mapping(0, 100, "[heap]"), mapping(5_000_000, 5_000_050, "/lib/</script><b>.so")
WIDTH, HEIGHT = 1000, 700
# What a person does, and what is then on the page, as JSON in its title.
PROBE = """
<script>
(async () => {
  while (!document.documentElement.dataset.ready) await new Promise(done => setTimeout(done, 5));
  const g = canvas.getContext("2d"), at = (x, y) => [...g.getImageData(x, y, 1, 1).data].slice(0, 3), out = {};
  const send = (kind, type, x, y, more = {}) =>
    canvas.dispatchEvent(new kind(type, { clientX: x, clientY: y + canvas.getBoundingClientRect().top, bubbles: true,
                                          cancelable: true, pointerId: 1, ...more }));
  const pointed = (t, v) => {
    send(PointerEvent, "pointermove", xOf(t), yOf(v));
    return [told.style.visibility, told.textContent, at(xOf(t), yOf(v))];
  };
  const redrawn = () => { draw(); return { ...view }; };
  out.ready = document.documentElement.dataset.ready;
  out.facts = document.getElementById("facts").textContent;
  out.heading = document.querySelector("h1").textContent;
  out.all = { ...view };
  out.points = POINTS.map(([t, v]) => pointed(t, v));
  send(WheelEvent, "wheel", xOf(0.25), yOf(10), { deltaY: -400 });
  out.zoomed = redrawn();
  out.zoomedPoint = pointed(0.25, 10);
  send(WheelEvent, "wheel", xOf(0.25), yOf(10), { deltaY: -400, shiftKey: true });
  out.zoomedTime = redrawn();
  const x = xOf(0.3), y = yOf(10), v = axisAt(y + 30), t = timeAt(x + 40);
  send(PointerEvent, "pointerdown", x + 40, y + 30); send(PointerEvent, "pointermove", x, y);
  send(PointerEvent, "pointerup", x, y);
  redrawn();
  out.dragged = [timeAt(x) - t, axisAt(y) - v];
  send(MouseEvent, "dblclick", x, y);
  out.again = redrawn();
  for (let i = 0; i < 200; i++) send(WheelEvent, "wheel", xOf(0.25), yOf(10), { deltaY: -400 });
  out.deepest = redrawn();
  out.requests = performance.getEntriesByType("resource").map(entry => entry.name);
  // How many separate bright spots there are, from the top of the picture to its bottom, in the middle of each column.
  look(all.t0, all.t1, all.y0, all.y1);
  draw();
  out.spots = columns.map(([begun, ended]) => {
    const x = xOf((begun + ended) / 2);
    let spots = 0, bright = false;
    for (let y = TOP; y < TOP + plot().h; y++) {
      const now = at(x, y).join() === palette.at(-1).join();
      spots += now && !bright;
      bright = now;
    }
    return spots;
  });
  document.title = JSON.stringify(out);
})().catch(error => { document.title = JSON.stringify({ error: String(error) }); });
</script>
"""
pytestmark = pytest.mark.browser


def opened(page: Path, points: list[tuple[float, float]], folder: Path) -> dict[str, Any]:
    """What the browser finds on the page."""
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    probed = folder / "probed.html"
    text = page.read_text(encoding="utf-8")
    assert text.count("</body>") == 1
    probe = PROBE.replace("POINTS", json.dumps(points))
    probed.write_text(text.replace("</body>", probe + "</body>"), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--virtual-time-budget=20000"]
    options += [f"--user-data-dir={folder / 'u'}", f"--window-size={WIDTH},{HEIGHT}", "--dump-dom", probed.as_uri()]
    done = subprocess.run([browser, *options], capture_output=True, text=True, check=True, timeout=110)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title, done.stdout[:2000] + done.stderr[-2000:]
    found: dict[str, Any] = json.loads(html.unescape(title[1]))
    assert "error" not in found, found
    return found


def test_the_page_shows_what_was_recorded(tmp_path: Path) -> None:
    epochs = [set(range(20)), {0, 5_000_049}, set(), set(range(0, 20, 2))]
    make_recording(tmp_path / "r.dtr", epochs, [[HEAP, FAR]], pauses={2: 1.0})
    assert main(["heatmap", str(tmp_path / "r.dtr"), "-o", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert not re.search(r"\b(src|href)=|https?:|@import|url\(", page), "the page needs nothing but itself"
    # Rows 0 to 19 are the heap's pages, row 20 is the page far away; half a second an epoch, one second of nothing.
    in_first, in_second, in_pause, in_last = 0.25, 0.75, 1.5, 2.75
    far_row = 20 + 0.5
    found = opened(
        tmp_path / "r.html",
        [(in_first, 10.5), (in_second, 10.5), (in_second, 0.5), (in_pause, 3.5), (in_last, 4.5), (in_last, 5.5),
         (in_second, far_row + 0.5), (in_first, 20.25)],
        tmp_path,
    )  # fmt: skip
    assert found["ready"] == "yes"
    assert found["heading"].startswith("a program, ")
    pages = sum(map(len, epochs))
    facts = f"{pages * PAGE / 1024:.0f} KiB written in 3.0 s · {21 * PAGE / 1024:.1f} KiB shown"
    assert found["facts"].startswith(facts)
    assert found["requests"] == []
    hot, clean = list(PALETTE[LEVELS - 1]), list(BACKGROUND)
    first, second_clean, second, pause, last, last_clean, far, fold = found["points"]
    row = (BASE + 10) * PAGE
    told = f"[heap]\n{row:x}-{row + PAGE:x}  4.00 KiB\n0.000-0.500 s  epoch 1\n"
    told += f"{PAGE / EPOCH_SECONDS / 1024:.2f} KiB/s  1 page  100.0 % of it"
    assert first == ["visible", told, hot]
    assert second_clean[2] == clean and "0 pages" in second_clean[1] and "epoch 2" in second_clean[1]
    assert second[2] == hot and second[1].startswith(f"[heap]\n{BASE * PAGE:x}-")
    assert pause[2] == list(NOTHING) and "nothing was recorded" in pause[1]
    assert last[2] == hot and "epoch 4" in last[1]
    assert last_clean[2] == clean
    assert far[2] == hot and far[1].startswith(f"{FAR.name}\n{(BASE + 5_000_049) * PAGE:x}-")
    assert fold[2] not in (hot, clean) and "GiB not shown" in fold[1]

    whole, zoomed, in_time = found["all"], found["zoomed"], found["zoomedTime"]
    factor = 1.0015**-400
    for low, high, kept in (("t0", "t1", 0.25), ("y0", "y1", 10)):
        assert zoomed[high] - zoomed[low] == pytest.approx((whole[high] - whole[low]) * factor)
        before, after = ((kept - each[low]) / (each[high] - each[low]) for each in (whole, zoomed))
        assert before == pytest.approx(after, abs=2 / WIDTH), "what is under the pointer stays there"
    assert found["zoomedPoint"][2] == hot
    assert in_time["t1"] - in_time["t0"] == pytest.approx((zoomed["t1"] - zoomed["t0"]) * factor)
    assert (in_time["y0"], in_time["y1"]) == (zoomed["y0"], zoomed["y1"])
    assert found["dragged"] == pytest.approx([0, 0], abs=1e-9), "what was seized stays under the pointer"
    assert found["again"] == whole
    deepest = found["deepest"]
    assert deepest["y1"] - deepest["y0"] == pytest.approx(2)
    assert deepest["t1"] - deepest["t0"] == pytest.approx(EPOCH_SECONDS / 2)


def test_what_is_smaller_than_a_pixel_shows(tmp_path: Path) -> None:
    """Forty pages, each far from everything, beside so much memory that a row is less than half a pixel high."""
    large, lonely = range(40_000), [1_000_000 + i * 100_000 for i in range(40)]
    table = [mapping(0, 40_000, "[heap]"), mapping(1_000_000, 6_000_000, "")]
    make_recording(tmp_path / "r.dtr", [large, lonely], [table])
    assert main(["heatmap", str(tmp_path / "r.dtr"), "-o", str(tmp_path / "r.html")]) == 0
    found = opened(tmp_path / "r.html", [(0.25, 10.5)], tmp_path)
    assert found["all"]["y1"] > 1.5 * HEIGHT
    assert found["spots"] == [1, 40]

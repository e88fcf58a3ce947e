# SPDX-License-Identifier: MIT
"""Draws docs/top.svg and docs/heatmap.png: a small program, watched and recorded while it runs.

Run it as ``python docs/draw_observe.py docs/top.svg docs/heatmap.png``; ``make draw-observe`` does. It takes the
packages of dirtytrack[observe], ten seconds, and a kernel that tracks.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from dirtytrack import process
from dirtytrack.cli.top_screen import Line, View
from dirtytrack.observe import Recording, RecordingWriter, Sample, Watch, heat_map, heat_png

COLUMNS, LINES = 116, 14
SECONDS, EVERY = 10.0, 0.05
# A queue that goes round in a buffer, a table that grows, and a sort now and then.
PROGRAM = """
import mmap, random, time
queue = mmap.mmap(-1, 12 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
table, at, numbers, began = {}, 0, [random.random() for _ in range(120_000)], time.monotonic()
print("ready", flush=True)
for step in range(1_000_000):
    for _ in range(6):
        queue[at : at + 8192] = bytes([step % 256]) * 8192
        at = (at + 8192) % len(queue)
    for _ in range(300):
        table[len(table)] = str(step)
    if step % 150 == 149:
        random.shuffle(numbers)
        numbers.sort()
    time.sleep(0.01)
"""


def watch(recording: Path) -> Sample:
    """Run the program, record it, and return its last rates."""
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE) as program:
        try:
            assert program.stdout is not None
            program.stdout.readline()
            with (
                process.attach(program.pid) as tracker,
                RecordingWriter(recording, command="a queue and a table") as to,
            ):
                observer, begun = Watch(tracker), time.monotonic()
                ended = due = begun
                while ended < begun + SECONDS:
                    due += EVERY
                    time.sleep(max(0.0, due - time.monotonic()))
                    number, last = tracker.epoch, ended
                    rates = observer.sample()
                    ended = time.monotonic()
                    to.write(observer.dirty.runs, tracker.mappings, number=number, begun=last, ended=ended)
                return rates
        finally:
            program.kill()


def screen(rates: Sample) -> str:
    """What `dirtytrack top` shows of it, as SVG, without the font that it would fetch."""
    view = View(EVERY)
    view.update([Line(4711, "queue-and-table", rates)])
    view.press("enter")
    console = Console(width=COLUMNS, height=LINES, record=True, file=io.StringIO(), force_terminal=True)
    console.print(view.render(COLUMNS, LINES))
    drawn = console.export_svg(title="dirtytrack top 4711", unique_id="top")
    drawn = re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL).replace("Fira Code", "ui-monospace")
    return drawn.replace("<svg ", "<!-- SPDX-License-Identifier: MIT; drawn by docs/draw_observe.py -->\n<svg ", 1)


def main() -> None:
    """Draw both."""
    with tempfile.TemporaryDirectory() as folder:
        recording = Path(folder, "recording")
        rates = watch(recording)
        heat = heat_map(Recording.open(recording), rows=400, columns=926)
    Path(sys.argv[1]).write_text(screen(rates), encoding="utf-8")
    heat_png(heat, sys.argv[2], title="a queue that goes round, a table that grows, a sort now and then", height=620)


if __name__ == "__main__":
    main()

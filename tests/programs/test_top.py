# SPDX-License-Identifier: MIT
"""`dirtytrack top` and `scan`, driven as a person does, over a program that writes what is known."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest

from dirtytrack import process
from dirtytrack.cli import main
from tests.programs.steady import PAGE, PAGES, Steady
from tests.programs.terminal import Terminal
from tests.sandbox import run_in_child
from tests.unit.recordings import make_recording, mapping

DIRTYTRACK = str(Path(sys.executable).parent / "dirtytrack")
EVERY = 0.5
MIB = 1 << 20
FACTOR = 4
"""The shown rate is within this factor of the true one: an epoch may last longer than it should on a busy machine."""
UNITS = {"B": 1, "KiB": 1 << 10, "MiB": MIB, "GiB": 1 << 30}


def amounts(line: str) -> list[float]:
    """The amounts of bytes in a line, in order."""
    found = re.findall(r"(?<![\w.])(?:([\d.]+) ([KMG]?i?B)|(0))(?=[\s/+]|$)", line)
    return [float(number) * UNITS[unit] if number else 0.0 for number, unit, _ in found]


def line_of(lines: list[str], begin: int | str) -> str:
    """The line of a table that begins so."""
    word = f"{begin:x}" if isinstance(begin, int) else begin
    return next((line for line in lines if line.split()[:1] == [word]), "")


def sizes(lines: list[str]) -> list[float]:
    """Of the mappings, from the top of the screen to the bottom."""
    return [amounts(line)[0] for line in lines[2:] if re.match(r" *[0-9a-f]{8,} ", line)]


def in_order(numbers: list[float]) -> bool:
    return len(numbers) > 2 and numbers == sorted(numbers)


def test_top_shows_the_rate_and_the_working_sets_that_are() -> None:
    with Steady() as steady:
        steady.writes(0, 512)
        command = [DIRTYTRACK, "top", str(steady.pid), "--every", str(EVERY)]
        with Terminal(command, columns=130) as terminal:
            true = 512 * PAGE / EVERY

            def right(lines: list[str]) -> bool:
                shown = amounts(line_of(lines, str(steady.pid)))
                return len(shown) >= 4 and true / FACTOR <= shown[0] <= true * FACTOR

            terminal.until(right, "the rate of the process, within its factor")
            terminal.press("\r")

            def of_mapping(lines: list[str]) -> list[float]:
                return amounts(line_of(lines, steady.address))

            # The size, the rate, what was written in 1, 10 and 60 seconds: the same pages, once each.
            terminal.until(lambda lines: of_mapping(lines)[2:] == [512 * PAGE] * 3, "2 MiB in each of the windows")
            lines = terminal.until(
                lambda lines: true / FACTOR <= (of_mapping(lines) or [0, 0])[1] <= true * FACTOR, "the mapping's rate"
            )
            assert of_mapping(lines)[0] == PAGES * PAGE
            mine = line_of(lines, steady.address)
            assert f"{512 / PAGES:.1%}" in mine, "the share of the mapping that is written"
            assert any(bar in mine for bar in "▁▂▃▄▅▆▇█")

            terminal.press("f")
            terminal.until(lambda lines: "FROZEN" in lines[0], "that it is frozen")
            frozen = terminal.settled()
            steady.writes(512, 1536)
            with pytest.raises(AssertionError, match="never seen"):
                terminal.until(lambda lines: lines != frozen, "a change while frozen", seconds=3 * EVERY)
            terminal.press("f")
            terminal.until(lambda lines: of_mapping(lines)[4:] == [1536 * PAGE], "what is written in a minute is more")
            terminal.until(lambda lines: of_mapping(lines)[2:3] == [1024 * PAGE], "what is written in a second is new")

            terminal.press("<")  # by size
            terminal.until(lambda lines: "SIZE↓" in lines[1] and in_order(sizes(lines)[::-1]), "the largest first")
            terminal.press("r")
            terminal.until(lambda lines: "SIZE↑" in lines[1] and in_order(sizes(lines)), "the smallest first")

            terminal.resize(70, 8)
            lines = terminal.until(lambda lines: "choose" in lines[7] and "SIZE↑" in lines[1], "a smaller screen")
            assert "HISTORY" not in lines[1] and len(lines) == 8

            steady.ends()
            terminal.until(lambda lines: "gone" in lines[0], "that it has gone")
            terminal.press("\x1b")
            lines = terminal.until(lambda lines: "0 of 1 processes" in lines[0], "the processes")
            assert "[gone]" in line_of(lines, str(steady.pid))
            terminal.press("q")
            assert terminal.ended() == 0
            assert terminal.settings() == terminal.before, "the terminal is as it was"
            assert terminal.raw.rstrip().count(b"\x1b[?1049h") == terminal.raw.count(b"\x1b[?1049l") == 1


def test_a_tree_is_followed_and_who_cannot_be_watched_is_told() -> None:
    with Steady() as steady:
        steady.writes(0, 64)
        first = steady.forks()
        nobody = 2**22 + 5
        command = [DIRTYTRACK, "top", str(steady.pid), str(nobody), "--tree", "--every", "0.2", "--metrics", ":0"]
        with Terminal(command, columns=160) as terminal:
            lines = terminal.until(lambda lines: amounts(line_of(lines, str(first))), "the child")
            assert "no process" in line_of(lines, str(nobody))
            second = steady.forks()
            terminal.until(lambda lines: amounts(line_of(lines, str(second))), "a child that is new")
            metrics = re.search(r"http://\S+", terminal.lines()[0])
            assert metrics
            with urlopen(metrics[0]) as answer:
                served = answer.read().decode()
            for pid in (steady.pid, first):
                number = re.search(rf'dirtytrack_dirty_bytes_per_second{{pid="{pid}"}} (\S+)', served)
                assert number and float(number[1]) >= 64 * PAGE / 2
            steady.ends()  # and the children end with it
            terminal.until(lambda lines: "0 of 4 processes" in lines[0], "that all have gone")
            terminal.program.send_signal(signal.SIGTERM)
            assert terminal.ended() == 128 + signal.SIGTERM
            assert terminal.settings() == terminal.before


def test_scan_tells_what_an_epoch_wrote() -> None:
    with Steady() as steady:
        steady.writes(0, 512)
        command = [DIRTYTRACK, "scan", str(steady.pid), "--seconds", "0.3"]
        told = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
        (mine,) = [each for each in told["mappings"] if each["start"] == steady.address]
        assert (mine["dirty_bytes"], mine["end"] - mine["start"]) == (512 * PAGE, PAGES * PAGE)
        assert told["dirty_bytes"] >= 512 * PAGE and told["seconds"] >= 0.3
        assert all(each["dirty_bytes"] for each in told["mappings"])
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        (line,) = [line for line in done.stdout.splitlines() if f" {steady.address:x}  " in line]
        assert amounts(line)[0] == 512 * PAGE
        assert "\x1b" not in done.stdout


def test_scan_watches_until_the_process_ends() -> None:
    with Steady() as steady:
        steady.writes(0, 16)
        command = [DIRTYTRACK, "scan", str(steady.pid), "--watch", "0.1", "--json", "--all"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as scan:
            assert scan.stdout is not None
            epochs = [json.loads(scan.stdout.readline()) for _ in range(3)]
            assert [epoch["epoch"] for epoch in epochs] == [1, 2, 3]
            assert all(not each["dirty_bytes"] for each in epochs[2]["mappings"] if each["state"] == "excluded")
            steady.ends()
            _, told = scan.communicate(timeout=60)
            assert scan.returncode == 0
            assert str(steady.pid) in told and len(told.splitlines()) == 1


@pytest.mark.parametrize(
    ("pid", "says"), [(os.getpid(), "track"), (2**22 + 5, "no process"), (2, "")], ids=["own", "none", "kernel"]
)
def test_whom_scan_cannot_watch(pid: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scan", str(pid), "--seconds", "0.1"]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("dirtytrack: ") and str(pid) in err and says in err


def test_a_choice_that_matches_nothing_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with Steady() as steady:
        assert main(["scan", str(steady.pid), "--include", "/no/such/*"]) == 1
        assert "/no/such/*" in capsys.readouterr().err
        assert main(["scan", str(steady.pid), "--every", "20ms", "--all", "--exclude", "[heap]"]) == 0
        out = capsys.readouterr().out
        assert "not watched, since not chosen" in out and "[heap]" in out.splitlines()[-1]


def test_what_another_tracks_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with Steady() as steady, process.attach(steady.pid):
        assert main(["scan", str(steady.pid), "--every", "20ms"]) == 0
        out = capsys.readouterr().out
        assert "counts as written because it is not tracked" in out.splitlines()[1]
        (line,) = [line for line in out.splitlines() if f" {steady.address:x}  " in line]
        assert amounts(line)[0] == PAGES * PAGE and "(not tracked: another userfaultfd has it)" in line


def as_nobody() -> None:
    assert main(["scan", "1", "--seconds", "0.1"]) == 1
    print("refused")


def test_without_permission_the_process_is_named() -> None:
    assert run_in_child(as_nobody, "nobody") == "refused\n"


@pytest.mark.parametrize(
    "words", [["scan", "abc"], ["scan", "-5"], ["scan", "0"], ["top"], ["top", "1", "--every", "0"]], ids=" ".join
)
def test_words_that_are_no_process(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_top_needs_a_terminal_and_says_what_does_not() -> None:
    done = subprocess.run(
        [DIRTYTRACK, "top", str(os.getpid())], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "scan PID --watch" in done.stderr


def test_top_tells_why_it_could_watch_nobody() -> None:
    with Terminal([DIRTYTRACK, "top", str(2**22 + 5), str(2**22 + 6)]) as terminal:
        assert terminal.ended() == 1
        shown = "\n".join(terminal.lines())
        assert f"{2**22 + 5}: " in shown and f"{2**22 + 6}: " in shown


def test_without_rich_the_extra_is_named() -> None:
    code = "import sys; sys.modules['rich'] = None; from dirtytrack.cli import main; sys.exit(main(sys.argv[1:]))"
    with Terminal([sys.executable, "-c", code, "top", str(os.getpid())]) as terminal:
        assert terminal.ended() == 1
        assert "dirtytrack[observe]" in "".join(terminal.lines())


def test_a_heat_map_is_coloured_in_a_terminal_that_wants_it(tmp_path: Path) -> None:
    make_recording(tmp_path / "r.dtr", [range(100), {1}], [[mapping(0, 100, "[heap]")]])
    command = [DIRTYTRACK, "heatmap", str(tmp_path / "r.dtr")]
    with Terminal(command) as terminal:
        assert terminal.ended() == 0
        assert "[heap]" in terminal.lines()[0] and "▀" in terminal.lines()[0]
        assert len(terminal.colours()) >= 3
    with Terminal(command, NO_COLOR="1") as terminal:
        assert terminal.ended() == 0
        assert "█" in terminal.lines()[0]
        assert terminal.colours() == {"default"}

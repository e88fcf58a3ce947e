# SPDX-License-Identifier: MIT
"""The support matrix is what the kept results make, and a machine's output is judged as it should be."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernels.archive import Kernel
from kernels.machine import Step, steps_of
from kernels.matrix import PAGE, page
from kernels.plan import DESELECTED, FIRST, KNOWN, OF_SOUND_KERNELS, WANTED
from kernels.results import Result, kept, result_of

ROOT = Path(__file__).parents[2]
KERNEL = Kernel("6.99.1", "amd64", "linux-image-6.99.1 6.99.1-1", Path("vmlinuz"), Path())
PROBED = "door 1, features 0x1ffff, categories 0xff, stores {}, discards {}, untouched {}\n12 passed, 0 failed"
PYTEST = """\
collected 9 items / 2 deselected / 7 selected

tests/kernel/test_a.py::test_one PASSED    [ 14%]
tests/kernel/test_a.py::test_two[x y] SKIPPED (no such memory)  [ 28%]
tests/kernel/test_a.py::test_three PASSED    [ 42%]
"""


def output(*steps: tuple[str, str, int]) -> str:
    return "".join(f"@@@ BEGIN {name}\n{text}\n\n@@@ END {name} {status} 150\n" for name, text, status in steps)


def judged(*steps: tuple[str, str, int], then: str = "") -> Result:
    return result_of(KERNEL, "tcg", steps_of(output(("uname", "6.99.1", 0), *steps) + then), why="")


def engine(*digits: int) -> tuple[str, str, int]:
    return "c:test_engine", PROBED.format(*digits), 0


def test_the_page_is_what_the_results_make() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(kept()), "run `python -m kernels.matrix`"


def test_each_kind_of_kernel_was_run_and_what_failed_is_explained() -> None:
    results = kept()
    assert {result["behaviour"] for result in results} == {"refused", "HOLEY", "SOUND"}
    assert {result["architecture"] for result in results} == {"amd64", "arm64"}
    assert not [problem for result in results for problem in result["problems"] if not problem.startswith(tuple(KNOWN))]


def test_what_is_chosen_and_what_is_not_is_there() -> None:
    for start in (*DESELECTED, *OF_SOUND_KERNELS, *FIRST):
        path, _, name = start.partition("::")
        assert list(ROOT.glob(f"{path}*")), start
        assert not name or f"def {name.partition('[')[0]}" in (ROOT / path).read_text(), start
    assert len({(wanted.version, wanted.architecture) for wanted in WANTED}) == len(WANTED)


@pytest.mark.parametrize(
    ("digits", "behaviour"),
    [((0, 0, 0), "refused"), ((1, 0, 0), "HOLEY"), ((1, 1, 0), "HOLEY"), ((1, 0, 1), "HOLEY"), ((1, 1, 1), "SOUND")],
)
def test_behaviour(digits: tuple[int, ...], behaviour: str) -> None:
    result = judged(engine(*digits))
    assert (result["behaviour"], result["problems"]) == (behaviour, [])
    assert result["c"]["test_engine"] == {
        "passed": 12,
        "failed": 0,
        "skipped": 0,
        "not_reached": 0,
        "expected": 0,
        "seconds": 1.5,
    }


def test_tests_are_counted_though_the_time_was_up() -> None:
    result = judged(engine(1, 1, 1), ("pytest", PYTEST, 137))
    assert result["python"] == {"passed": 2, "failed": 0, "skipped": 1, "not_reached": 4, "expected": 0, "seconds": 1.5}
    assert result["problems"] == []


def test_what_went_wrong_is_told() -> None:
    ended = (
        PYTEST + "tests/kernel/test_a.py::test_four FAILED  [ 57%]\nFAILED tests/kernel/test_a.py::test_four - Missed"
    )
    assert judged(engine(1, 1, 1), ("pytest", ended, 1))["problems"] == [
        "FAILED tests/kernel/test_a.py::test_four - Missed"
    ]
    assert judged(engine(1, 1, 1), ("doctor", "no", 1))["problems"] == ["doctor: status 1: no"]
    assert judged(("c:test_kinds", "...", 137))["problems"] != []
    (problem,) = judged(engine(1, 1, 1), then="@@@ BEGIN pytest\ncollected 7 items\n\ntests/a.py::test_hangs ")[
        "problems"
    ]
    assert problem == "pytest: did not end: tests/a.py::test_hangs"
    assert result_of(KERNEL, "tcg", {}, why="")["problems"] == ["did not boot"]


@pytest.mark.parametrize("summed_up", [True, False])
def test_what_only_sound_kernels_do_fails_on_others(summed_up: bool) -> None:
    (start, *_) = OF_SOUND_KERNELS
    text = f"collected 1 item\n\n{start}[x] FAILED   [100%]\n" + f"FAILED {start}[x] - AssertionError\n" * summed_up
    step = ("pytest", text, 1 if summed_up else 137)
    holey, sound = judged(engine(1, 0, 0), step), judged(engine(1, 1, 1), step)
    assert holey["python"] is not None
    assert sound["python"] is not None
    assert (holey["python"]["failed"], holey["python"]["expected"], holey["problems"]) == (0, 1, [])
    assert (sound["python"]["failed"], sound["python"]["expected"]) == (1, 0)
    assert len(sound["problems"]) == 1


def test_a_refusal_has_its_class() -> None:
    doctor = ("doctor", "NO asynchronous write protection", 1)
    right = ("track", "dirtytrack.errors.UnsupportedKernel: too old", 1)
    assert judged(engine(0, 0, 0), doctor, right)["problems"] == []
    assert judged(engine(0, 0, 0), doctor, ("track", "OSError", 1))["problems"] != []
    assert judged(engine(0, 0, 0), ("track", "", 0))["problems"] != []


def test_a_step_that_did_not_end_has_no_status() -> None:
    assert steps_of("@@@ BEGIN a\r\nx\r\n\r\n@@@ END a 0 20\r\n@@@ BEGIN b\r\ny\r\n") == {
        "a": Step("x", 0, 0.2),
        "b": Step("y", None, 0.0),
    }

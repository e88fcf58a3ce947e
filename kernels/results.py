# SPDX-License-Identifier: MIT
"""What came of the tests in one machine, and what of it is kept in kernels/results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TypedDict

from .archive import Kernel
from .machine import Step
from .plan import DESELECTED, OF_SOUND_KERNELS

__all__ = ["RESULTS", "Result", "keep", "kept", "one_line", "result_of"]

RESULTS = Path(__file__).parent / "results"

_KILLED = 137
REFUSED, HOLEY, SOUND = "refused", "HOLEY", "SOUND"


class Counts(TypedDict):
    """Of a test program or of pytest."""

    passed: int
    failed: int
    skipped: int
    not_reached: int
    """When the time was up."""
    expected: int
    """Failed, as a test of what only SOUND kernels do should on a HOLEY one; not among `failed`."""
    seconds: float


class Result(TypedDict):
    """Of one kernel."""

    release: str
    package: str
    architecture: str
    accelerator: str
    why: str
    behaviour: str
    """``refused``, ``HOLEY`` (the exact scan does not see freed page tables: remedy R1 runs), ``SOUND`` or ``?``."""
    c: dict[str, Counts]
    python: Counts | None
    skipped: dict[str, int]
    doctor: str
    refusal: str
    """The last line of what was raised."""
    truth: str
    """``ok``, ``a change is missed``, ``did not end``, or empty: not run."""
    problems: list[str]


def _number(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    return int(found[-1]) if found else 0


def _c_counts(step: Step) -> Counts:
    passed, failed = _number(r"(\d+) passed", step.output), _number(r"(\d+) failed", step.output)
    return {"passed": passed, "failed": failed, "skipped": 0, "not_reached": 0, "expected": 0, "seconds": step.seconds}


def _outcomes(step: Step) -> list[tuple[str, str]]:
    """What pytest said of each test; of those that should not have run, nothing."""
    found = re.findall(
        r"^(\S+::.*?) (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b.*\[ *\d+%\]$", step.output, re.MULTILINE
    )
    return [(test, outcome) for test, outcome in found if not test.startswith(tuple(DESELECTED))]


def _pytest_counts(step: Step, behaviour: str) -> Counts:
    outcomes = [outcome for _, outcome in _outcomes(step)]
    expected = _failures(step, behaviour)[1]
    selected = _number(r"(\d+) selected", step.output) or _number(r"collected (\d+) items", step.output)
    return {
        "passed": outcomes.count("PASSED") + outcomes.count("XFAIL"),
        "failed": outcomes.count("FAILED") + outcomes.count("ERROR") + outcomes.count("XPASS") - expected,
        "skipped": outcomes.count("SKIPPED"),
        "not_reached": max(0, selected - len(outcomes)),
        "expected": expected,
        "seconds": step.seconds,
    }


def _behaviour(output: str) -> str:
    """By what the C core's probe printed."""
    found = re.search(r"stores (\d), discards (\d), untouched (\d)", output)
    if not found:
        return "?"
    stores, discards, untouched = (digit == "1" for digit in found.groups())
    if not stores:
        return REFUSED
    return SOUND if discards and untouched else HOLEY


def _failures(step: Step, behaviour: str) -> tuple[list[str], int]:
    """Pytest's lines on what failed, and how many beside are as they should be."""
    told = re.findall(r"^(?:FAILED|ERROR) .*$", step.output, re.MULTILINE)
    if not told:  # it was killed before it summed up
        told = [f"{outcome} {test}" for test, outcome in _outcomes(step) if outcome in ("FAILED", "ERROR", "XPASS")]
    told = [line for line in told if not line.startswith(tuple(f"FAILED {start}" for start in DESELECTED))]
    should = tuple(f"FAILED {start}" for start in OF_SOUND_KERNELS) if behaviour == HOLEY else ()
    rest = [line for line in told if not line.startswith(should)]
    return rest, len(told) - len(rest)


def _late(step: Step) -> bool:
    """Whether pytest was stopped since its time was up."""
    return step.status == _KILLED or "! KeyboardInterrupt !" in step.output


def _problems(steps: dict[str, Step], behaviour: str) -> list[str]:
    found = []
    for name, step in steps.items():
        told = False
        if name == "pytest":
            failures, expected = _failures(step, behaviour)
            found += failures
            told = bool(failures or expected) and step.status == 1
        refused = behaviour == REFUSED and name in ("doctor", "doctor-json", "truth", "track") and step.status == 1
        late = name == "pytest" and _late(step)  # what was not reached is counted
        if step.status != 0 and not (refused or late or told):
            what = {None: "did not end", _KILLED: "took too long"}.get(step.status, f"status {step.status}")
            last = step.output.splitlines()[-1:] or ["nothing was printed"]
            found.append(f"{name}: {what}: {last[0].strip()}")
    return found


def _truth(step: Step) -> str:
    if step.status not in (0, 1):
        return "did not end"
    return "a change is missed" if step.status else "ok"


def result_of(kernel: Kernel, accelerator: str, steps: dict[str, Step], why: str) -> Result:
    """Put together what a machine told."""
    behaviour = _behaviour(steps["c:test_engine"].output) if "c:test_engine" in steps else "?"
    problems = _problems(steps, behaviour)
    if "uname" not in steps or steps["uname"].output != kernel.version:
        problems.insert(0, "did not boot")
    elif behaviour == "?" and "pytest" not in steps:
        problems.insert(0, "the C core's tests did not run")
    if behaviour == REFUSED and "track" in steps and "UnsupportedKernel" not in steps["track"].output:
        problems.append("tracking was not refused with UnsupportedKernel")
    skipped: dict[str, int] = {}
    python = None
    if "pytest" in steps:
        python = _pytest_counts(steps["pytest"], behaviour)
        for reason in re.findall(r" SKIPPED \((.*)\) *\[ *\d+%\]$", steps["pytest"].output, re.MULTILINE):
            skipped[reason] = skipped.get(reason, 0) + 1
    refusal = steps["track"].output.rpartition("\n")[2] if behaviour == REFUSED and "track" in steps else ""
    return {
        "release": kernel.version,
        "package": kernel.package,
        "architecture": kernel.architecture,
        "accelerator": accelerator,
        "why": why,
        "behaviour": behaviour,
        "c": {name[2:]: _c_counts(step) for name, step in steps.items() if name.startswith("c:")},
        "python": python,
        "skipped": skipped,
        "doctor": steps["doctor"].output if "doctor" in steps else "",
        "refusal": refusal,
        "truth": _truth(steps["truth"]) if "truth" in steps and behaviour != REFUSED else "",
        "problems": problems,
    }


def one_line(result: Result) -> str:
    """For a person who waits."""
    c = f"C {sum(one['passed'] for one in result['c'].values())} passed"
    python = result["python"]
    rest = f", Python {python['passed']} passed, {python['skipped']} skipped" if python else ""
    verdict = "NOT AS IT SHOULD BE" if result["problems"] else "ok"
    return f"{result['release']} {result['behaviour']}: {c}{rest}: {verdict}"


def keep(result: Result, steps: dict[str, Step]) -> None:
    """Write a result where the support matrix is made from, and beside it the kernel's table of truths."""
    path = RESULTS / f"{result['release']}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if result["truth"]:
        path.with_suffix(".md").write_text(steps["truth"].output + "\n", encoding="utf-8")


def kept() -> list[Result]:
    """All that are kept, by version."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")]
    return sorted(found, key=lambda one: [int(n) for n in re.findall(r"\d+", one["release"])])

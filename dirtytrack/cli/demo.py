# SPDX-License-Identifier: MIT
"""`dirtytrack demo`: the standard library's sources indexed in tracked memory, and mirrored epoch by epoch.

The work is real and so are the answers: an inverted index (demo_index) over every source file (demo_parse), in one
piece of memory. `tracker.collect_into(mirror)` ends each epoch; at the end the mirror must equal the memory byte for
byte, and it is the mirror that answers the questions. Then the same stores are repeated under what people use where no
kernel tells which pages were written (demo_replay).
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from mmap import PAGESIZE
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import DirtyTracker, LimitReached, PermissionDenied, Statistics, UnsupportedKernel, allocate, probe, track
from .demo_index import Index, IndexFull, WriteLog
from .demo_parse import parsing, source_files
from .demo_replay import ROUNDS, Cost, compare, new_mirror
from .strip import Screen, heat

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["add_arguments", "run"]

_TERMS = ("memoryview",)
_LINES = (("class", "OrderedDict"), ("except", "BlockingIOError"))
_SHOWN = 3
_VERIFY_BYTES = 1 << 20
_LEFT = "{:>5}  {:>5}  {:>7}  {:>9}  {:>9}  "  # what stands before the strip


class Epoch(NamedTuple):
    """What one epoch found."""

    epoch: int
    files: int
    dirty_pages: int
    dirty_bytes: int
    collect_seconds: float
    heat: list[float]


class Answer(NamedTuple):
    """What the index knows of a question."""

    question: str
    files: int
    places: int
    first: list[str]


class Work(NamedTuple):
    """All that the real run leaves: what each epoch found and stored, and what the mirror says of itself."""

    epochs: list[Epoch]
    logs: list[WriteLog]
    facts: dict[str, int]
    answers: list[Answer]
    statistics: Statistics


class Differs(Exception):
    """The mirror is not what it should be."""


def _at_least(least: int, what: str) -> Any:
    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} of at least {least}")
        return value

    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `dirtytrack demo` takes."""
    parser.add_argument(
        "--epochs", type=_at_least(1, "a number"), default=24, help="how many epochs to make of the work (24)"
    )
    parser.add_argument(
        "--size", type=_at_least(256, "a size in MiB"), default=256, metavar="MIB", help="size of the memory (256)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")


def run(args: argparse.Namespace) -> int:
    """Run the demo.

    Returns:
        0; 1 where the mirror differs, the sources do not fit, or memory or descriptors run out; 2 where this system
        cannot track; 130 after Ctrl-C.
    """
    screen = Screen(quiet=args.json)
    try:
        return _run(args, screen)
    except KeyboardInterrupt:
        screen.clear()
        print("interrupted", file=sys.stderr)
        return 130
    except (UnsupportedKernel, PermissionDenied) as error:
        screen.clear()
        print(f"dirtytrack demo: {error}", file=sys.stderr)
        for check in probe().checks():  # as `dirtytrack doctor` has it
            if check.needed and not check.ok:
                print(f"doctor: {check.name}: {check.detail}\n  to mend it: {check.remedy}", file=sys.stderr)
        return 2
    except (Differs, IndexFull, LimitReached) as error:
        screen.clear()
        print(f"dirtytrack demo: {error}", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace, screen: Screen) -> int:
    begin = perf_counter()
    root, paths = source_files()
    if not paths:
        raise IndexFull(f"no source files in {root}, so there is nothing to index")
    nbytes = args.size << 20
    work = _work(root, paths, args.epochs, nbytes, screen)
    _tell_index(screen, work, nbytes, perf_counter() - begin)
    _tell_answers(screen, work.answers)
    stores = sum(len(log.spans) // 2 for log in work.logs)
    untracked, costs = compare(
        work.logs, nbytes, lambda what: screen.progress(f"the same stores again: {what}", now=True)
    )
    seconds = perf_counter() - begin
    _tell_costs(screen, untracked, costs, args.epochs, stores)
    screen.line(
        f"  Of the {args.size} MiB, {work.facts['used_bytes'] / 2**20:.0f} are in use: "
        "a program that knows which could copy, compare or hash those alone.",
        "2",
    )
    screen.line(f"Done in {seconds:.1f} s.")
    screen.clear()
    if args.json:
        document = {
            "python": platform.python_version(),
            "kernel": platform.release(),
            "machine": platform.machine(),
            "memory_bytes": nbytes,
            "index": work.facts,
            "epochs": [epoch._asdict() for epoch in work.epochs],
            "mirror_verified": True,
            "statistics": work.statistics._asdict(),
            "answers": [answer._asdict() for answer in work.answers],
            "comparison": {
                "rounds": ROUNDS,
                "stores": stores,
                "untracked_write_seconds": untracked.write_seconds,
                "methods": [{**cost._asdict(), "cost_seconds": cost.over(untracked)} for cost in costs],
            },
            "seconds": seconds,
        }
        print(json.dumps(document, indent=1), flush=True)
    return 0


# ---- the work ----


def _work(root: str, paths: Sequence[str], epoch_count: int, nbytes: int, screen: Screen) -> Work:
    """Index every file, collecting at the end of each epoch; verify the mirror; ask it."""
    epochs: list[Epoch] = []
    logs: list[WriteLog] = []
    memory, mirror = allocate(nbytes, name="index"), new_mirror(nbytes)  # freed with the last reference
    with track(memory) as tracker:
        screen.line(
            f"Indexing Python {platform.python_version()}'s standard library, {len(paths):,} source files, "
            f"in {nbytes >> 20} MiB of tracked memory:",
            "1",
        )
        index = Index(memory)
        cells = max(16, min(64, screen.columns - len(_LEFT.format(*[""] * 5)) - 2))
        screen.line(_LEFT.format("epoch", "files", "pages", "dirty", "collect") + _ruler(index, cells, nbytes), "2")
        with parsing(root, paths) as documents:
            for done, document in enumerate(documents, 1):
                index.add(document)
                screen.progress(f"{done:,} of {len(paths):,} files")
                while done * epoch_count >= (len(epochs) + 1) * len(paths):
                    epochs.append(_collect(tracker, index, mirror, cells))
                    logs.append(index.start_log())
                    _tell_epoch(screen, epochs[-1])
        statistics = tracker.statistics()
        if index.files != len(paths):
            raise Differs(f"a worker ended early: {index.files} of {len(paths)} files came")
    screen.progress("verifying the mirror", now=True)
    _verify(memory, mirror)
    copy = Index(mirror)
    facts = {"files": copy.files, "terms": copy.terms, "postings": copy.postings, "used_bytes": copy.used_bytes}
    return Work(epochs, logs, facts, _ask(copy), statistics)


def _collect(tracker: DirtyTracker, index: Index, mirror: Buffer, cells: int) -> Epoch:
    begin = perf_counter()
    dirty = tracker.collect_into(mirror)
    seconds = perf_counter() - begin
    pages = index.areas[-1].end // PAGESIZE
    shares = heat(dirty.bitmap("index"), pages, cells)
    return Epoch(dirty.epoch, index.files, dirty.page_count, dirty.nbytes, seconds, shares)


def _verify(memory: Buffer, mirror: Buffer) -> None:
    with memoryview(memory).cast("B") as truth, memoryview(mirror).cast("B") as copy:
        for start in range(0, len(truth), _VERIFY_BYTES):
            if bytes(truth[start : start + _VERIFY_BYTES]) != bytes(copy[start : start + _VERIFY_BYTES]):
                raise Differs(f"the mirror differs from the memory within {_VERIFY_BYTES} bytes from offset {start}")


def _ask(index: Index) -> list[Answer]:
    answers = []
    for term in _TERMS:
        known = index.find(term)
        answers.append(Answer(term, known.files, known.occurrences, _first(index, dict(index.places(term)))))
    for terms in _LINES:
        found = index.together(*terms)
        question = " and ".join(terms) + " on one line"
        answers.append(Answer(question, len(found), sum(map(len, found.values())), _first(index, found)))
    return answers


def _first(index: Index, found: dict[int, set[int]]) -> list[str]:
    """The first places by path and line, as grep would show them."""
    documents = sorted((index.path(document), document) for document in found)[:_SHOWN]
    places = [(path, line, document) for path, document in documents for line in sorted(found[document])]
    return [f"{path}:{line}: {index.line(document, line)}" for path, line, document in places[:_SHOWN]]


# ---- what is shown ----


def _ruler(index: Index, cells: int, nbytes: int) -> str:
    """The areas' names, each above its part of the strips."""
    text = ""
    for area in index.areas[2:]:  # header and directory are less than a cell
        room = area.end * cells // nbytes - len(text)
        text += (("|" if text else "") + area.name)[:room].ljust(room)
    return f"|{text}|"


def _tell_epoch(screen: Screen, epoch: Epoch) -> None:
    left = _LEFT.format(
        epoch.epoch,
        epoch.files,
        f"{epoch.dirty_pages:,}",
        f"{epoch.dirty_bytes / 2**20:.1f} MiB",
        f"{epoch.collect_seconds * 1e3:.2f} ms",
    )
    screen.line(f"{left}|{screen.strip(epoch.heat)}|")


def _tell_index(screen: Screen, work: Work, nbytes: int, seconds: float) -> None:
    copied = sum(epoch.dirty_bytes for epoch in work.epochs)
    spent = sum(epoch.collect_seconds for epoch in work.epochs)
    screen.line(
        f"{work.facts['postings']:,} places of {work.facts['terms']:,} terms in "
        f"{work.facts['used_bytes'] / 2**20:.0f} MiB, indexed in {seconds:.1f} s; "
        f"{len(work.epochs)} collects copied {copied / 2**20:.0f} MiB in {spent * 1e3:.0f} ms."
    )
    _tell_adaptive(screen, work.statistics)
    screen.line(f"The mirror equals the memory: {nbytes:,} bytes compared.", "32")


def _tell_adaptive(screen: Screen, statistics: Statistics) -> None:
    if statistics.pages_assumed:
        screen.line(
            f"{statistics.pages_assumed:,} pages were assumed to be dirty, which spared about "
            f"{statistics.faults_avoided:,} faults: tracking cost {statistics.overhead_ns / 1e6:.1f} ms beside the "
            f"collects, {statistics.predicted_ns / 1e6:.1f} ms were predicted."
        )
    else:
        screen.line("Each page was watched in each epoch: none were rewritten so densely that assuming pays.")


def _tell_answers(screen: Screen, answers: list[Answer]) -> None:
    screen.line()
    screen.line("Asked of the mirror:", "1")
    for answer in answers:
        screen.line(f"  {answer.question}: {answer.places:,} places in {answer.files:,} files")
        for place in answer.first:
            screen.line(f"    {place}"[: max(screen.columns, 80)], "2")


def _tell_costs(screen: Screen, untracked: Cost, costs: list[Cost], epochs: int, stores: int) -> None:
    ours = costs[0].over(untracked)
    screen.line()
    screen.line(f"What it costs to keep the mirror, by the same {stores:,} stores in the same {epochs} epochs:", "1")
    screen.line(f"  {'':<32}{'writer':>10}{'start':>10}{'collect':>10}{'total':>10}", "2")
    for cost in costs:
        writer, total = cost.write_seconds - untracked.write_seconds, cost.over(untracked)
        numbers = "".join(
            f"{1e3 * value:>7.0f} ms" for value in (writer, cost.start_seconds, cost.collect_seconds, total)
        )
        ratio = "" if cost is costs[0] else f"  {total / ours:.1f}x" if ours > 0 else ""
        screen.line(f"  {cost.method:<32}{numbers}{ratio}", "32" if cost is costs[0] else "")
    screen.line(
        f"  (writer: over the {1e3 * untracked.write_seconds:.0f} ms that the stores take untracked; "
        f"collect: with copying; best of {ROUNDS})",
        "2",
    )

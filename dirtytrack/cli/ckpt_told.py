# SPDX-License-Identifier: MIT
"""What `dirtytrack ckpt` tells of a store and leaves as it is: ls, show, verify, diff."""

from __future__ import annotations

import json
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..checkpoint import compare, generations
from ..checkpoint import verify as verified
from ..checkpoint.ranked import Joined
from ..checkpoint.store import open_store
from ..observe.units import show_bytes

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence

    from ..checkpoint.listing import Summary

__all__ = ["diff", "ls", "progress", "show", "table", "verify", "when", "word"]


# ---- how it is told


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], object] | None]:
    """A bar that moves, where standard error is a terminal and the package rich is there to draw it."""
    if not sys.stderr.isatty():
        yield None
        return
    try:
        from rich import progress as bars
        from rich.console import Console
    except ImportError:
        yield None
        return
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.DownloadColumn(binary_units=True),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(what, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def when(seconds: float) -> str:
    """A time, in this place's."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def word(text: str) -> str:
    """A name that cannot upset a terminal."""
    return text if text.isprintable() else ascii(text)


def table(rows: Sequence[Sequence[str]], left: str) -> Iterator[str]:
    """Lines of aligned columns, of which those marked ``<`` in ``left`` begin at the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.ljust(width) if side == "<" else cell.rjust(width)
            for cell, width, side in zip(row, widths, left, strict=True)
        )
        yield "  ".join(cells).rstrip()


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=2))


# ---- ls and show


def ls(args: argparse.Namespace) -> int:
    """The generations of a store."""
    found = generations(args.store)
    if args.json:
        _print_json([each._asdict() for each in found])
        return 0
    if not found:
        print(f"{args.store} has no checkpoint yet")
        return 0
    head = ("GENERATION", "KIND", "PARENT", "CREATED", "STATE", "WRITTEN", "RESTORED FROM", "META")
    rows = [head, *map(_row, found)]
    width = max(80, shutil.get_terminal_size().columns) if sys.stdout.isatty() else 10_000
    for line in table(rows, "><><>>><"):
        print(line if len(line) <= width else f"{line[: width - 3]}...")
    for each in found:
        for damage in each.damage:
            print(f"generation {each.generation}: {damage}", file=sys.stderr)
    return 0


def _row(each: Summary) -> tuple[str, ...]:
    if each.kind is None or each.created is None:
        return (str(each.generation), "damaged", *[""] * 6)
    return (
        str(each.generation),
        each.kind + (", damaged" if each.damage else ""),
        str(each.parent or "-"),
        when(each.created),
        show_bytes(each.nbytes or 0),
        show_bytes(each.written_nbytes or 0),
        f"{show_bytes(each.stored_nbytes or 0)} in {each.segment_count}",
        "" if each.meta is None else json.dumps(each.meta),
    )


def show(args: argparse.Namespace) -> int:
    """A generation's manifest."""
    with open_store(args.store) as store, store.reading():
        manifest = store.manifest(args.generation)
    if args.json:
        _print_json(asdict(manifest))
        return 0
    parent = f"continues generation {manifest.parent}" if manifest.parent else "continues none"
    print(f"generation {manifest.generation} of {args.store}: {manifest.kind}, revision {manifest.revision}, {parent}")
    joined = manifest.ranks if isinstance(manifest.ranks, Joined) else None
    stored = sum(part.stored_nbytes for part in joined.parts if part) if joined else manifest.stored_nbytes
    print(f"created {when(manifest.created)}, {show_bytes(manifest.nbytes)} from {show_bytes(stored)}")
    if (program := manifest.threads) is not None:
        print(
            f"image of process {program['pid']} ({word(program['comm'])}): {len(program['threads'])} threads, "
            f"{len(program['mappings'])} mappings, stood still at {when(program['frozen_at'])}"
        )
    if manifest.meta is not None:
        print(f"meta {json.dumps(manifest.meta)}")
    rows = [("BUFFER", "SIZE", "TYPE", "SHAPE", "SINCE")]
    for region in manifest.regions:
        shape = "" if region.shape is None else " x ".join(map(str, region.shape)) or "scalar"
        rows.append(
            (word(region.name), show_bytes(region.nbytes), word(region.dtype or "bytes"), shape, str(region.since))
        )
    print()
    print("\n".join(table(rows, "<><<>")))
    if joined:
        print()
        print("\n".join(table(_parts(joined), "><>>>")))
        return 0
    segments = [("SEGMENT", "SIZE", "GENERATION")]
    segments += [(each.name, show_bytes(each.nbytes), str(each.generation)) for each in manifest.segments]
    print()
    print("\n".join(table(segments, "<>>")))
    return 0


def _parts(joined: Joined) -> list[tuple[str, ...]]:
    """What each rank has."""
    rows: list[tuple[str, ...]] = [("RANK", "BUFFERS", "SIZE", "WRITTEN", "RESTORED FROM")]
    names: dict[int, list[str]] = {}
    nbytes = dict.fromkeys(range(joined.size), 0)
    for region in joined.regions:
        for rank, low, high in region.pieces():
            names.setdefault(rank, []).append(word(region.name))
            nbytes[rank] += high - low
    for rank, part in enumerate(joined.parts):
        if part is None:
            rows.append((str(rank), "", "", "", ""))
            continue
        which = names[rank] if len(names[rank]) <= 4 else [*names[rank][:3], "..."]
        rows.append(
            (
                str(rank),
                " ".join(which),
                show_bytes(nbytes[rank]),
                show_bytes(part.written_nbytes),
                f"{show_bytes(part.stored_nbytes)} in {part.segment_count}",
            )
        )
    return rows


# ---- verify


def verify(args: argparse.Namespace) -> int:
    """Whether what is stored is what was written."""
    with progress("verifying") as tell:
        report = verified(args.store, args.generation, all=args.all, progress=tell)
    if args.json:
        _print_json(
            {
                "ok": report.ok,
                "whole": report.whole,
                "read_nbytes": report.read_nbytes,
                "checked": [each._asdict() for each in report.checked],
                "damage": report.damage,
                "strangers": report.strangers,
            }
        )
        return 0 if report.ok else 1
    for each in report.checked:
        which = f"generation {each.generation}" + (f", revision {each.revision}" if each.revision else "")
        if not each.damage:
            print(f"{which}: whole")
        for damage in each.damage:
            print(f"{which}: {damage}")
    for damage in report.damage:
        print(damage)
    for name in report.strangers:
        print(f"{word(name)}: belongs to no generation")
    print(f"{show_bytes(report.read_nbytes)} read, {'nothing' if report.ok else 'something'} is damaged")
    if not report.ok and report.whole is not None:
        print(f"the newest whole generation of these is {report.whole}")
    return 0 if report.ok else 1


# ---- diff


def diff(args: argparse.Namespace) -> int:
    """What two generations differ in."""
    with open_store(args.store) as store, store.reading():
        images = [store.manifest(generation).threads is not None for generation in (args.older, args.newer)]
    if all(images):
        from .ckpt_core import diff_images

        return diff_images(args)
    with progress("comparing") as tell:
        found = compare(args.store, args.older, args.newer, decrypt=args.decrypt, progress=tell)
    if args.json:
        regions = [each._asdict() for each in found.regions]
        _print_json(
            {
                "older": found.older,
                "newer": found.newer,
                "changed_nbytes": found.changed_nbytes,
                "regions": regions if args.runs else [{**each, "runs": len(each["runs"])} for each in regions],
            }
        )
        return 0
    rows = [("BUFFER", "", "SIZE", "BYTES CHANGED", "IN RUNS OF BLOCKS")]
    for each in found.regions:
        sizes = [None if n is None else show_bytes(n) for n in (each.older_nbytes, each.newer_nbytes)]
        size = sizes[1] or sizes[0] or ""
        if None not in sizes and each.older_nbytes != each.newer_nbytes:
            size = f"{sizes[0]} -> {sizes[1]}"
        rows.append((word(each.name), each.what, size, f"{each.changed_nbytes:,}", f"{len(each.runs):,}"))
    print("\n".join(table(rows, "<<>>>")))
    if args.runs:
        for each in found.regions:
            for offset, nbytes in each.runs:
                print(f"{word(each.name)} {offset:#x} {nbytes}")
    return 0

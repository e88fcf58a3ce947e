# SPDX-License-Identifier: MIT
"""What `dirtytrack ckpt` does with images of processes: core, and what diff tells of two."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.images import compare_images, write_core
from ..checkpoint.store import open_store
from ..observe.units import show_bytes
from .ckpt_told import progress, table, word

if TYPE_CHECKING:
    import argparse

    from ..checkpoint.images import ImageComparison, MappingDifference

__all__ = ["core", "diff_images"]


def core(args: argparse.Namespace) -> int:
    """Write the image of a process as a core file."""
    with open_store(args.store) as store, store.reading():
        generation = store.manifest(args.generation).generation
        path = args.output or f"core.{generation}"
        with progress("writing") as tell:
            made = write_core(store, path, generation, decrypt=args.decrypt, progress=tell)
    command = ["gdb", made.executable, made.path]
    if args.json:
        document = {**made._asdict(), "missing": [each._asdict() for each in made.missing], "command": command}
        print(json.dumps(document, indent=2))
        return 0
    print(
        f"generation {made.generation}: {made.thread_count} thread{'s' if made.thread_count > 1 else ''}, "
        f"{made.mapping_count} mappings, {show_bytes(made.written_nbytes)} in {made.path}"
    )
    for each in made.missing:
        print(f"not in it: {show_bytes(each.nbytes)} of {word(each.name)}: {each.why}")
    print(f"open it with: {shlex.join(command)}")
    return 0


# ---- diff


def diff_images(args: argparse.Namespace) -> int:
    """What two images of a process differ in."""
    with progress("comparing") as tell:
        found = compare_images(args.store, args.older, args.newer, decrypt=args.decrypt, progress=tell)
    if args.json:
        print(json.dumps(_document(found, runs=args.runs), indent=2))
        return 0
    rows: list[tuple[str, ...]] = [("MAPPING", "", "ADDRESS", "SIZE", "PAGES CHANGED", "BYTES CHANGED")]
    rows += [_row(each) for each in found.mappings if each.what != "same"]
    if len(rows) > 1:
        print("\n".join(table(rows, "<<<>>>")))
    same = len(found.mappings) - len(rows) + 1
    print(
        f"{found.changed_nbytes:,} bytes differ, in {found.changed_pages:,} pages; {same} mapping"
        f"{' is' if same == 1 else 's are'} the same"
    )
    for verb, tids in (("begun", found.threads_begun), ("ended", found.threads_ended)):
        if tids:
            print(f"threads that have {verb}: {' '.join(map(str, tids))}")
    if found.objects:
        objects = [("OBJECT", "OF", "ADDRESS", "SIZE", "BYTES CHANGED", "WAS", "IS")]
        objects += [
            (
                word(each.name),
                word(Path(each.module).name),
                f"{each.address:#x}",
                show_bytes(each.nbytes),
                f"{each.changed_nbytes:,}",
                _value(each.older),
                _value(each.newer),
            )
            for each in found.objects
        ]
        print()
        print("\n".join(table(objects, "<<<>>>>")))
    for note in found.notes:
        print(f"note: {note}")
    unknown = sum(each.unknown_nbytes for each in found.mappings)
    if unknown:
        print(f"note: {show_bytes(unknown)} could not be compared, since an image does not have them")
    if args.runs:
        for mapping in found.mappings:
            for address, nbytes in mapping.runs:
                print(f"{word(mapping.name)} {address:#x} {nbytes}")
    return 0


def _row(each: MappingDifference) -> tuple[str, ...]:
    place = each.newer or each.older
    assert place is not None
    address = f"{place.start:#x}-{place.end:#x}"
    if each.what == "moved" and each.older is not None:
        address = f"{each.older.start:#x} -> {address}"
    what: str = each.what
    if each.older and each.newer and each.older.permissions != each.newer.permissions:
        what += f", {each.older.permissions} -> {each.newer.permissions}"
    both = each.older is not None and each.newer is not None
    return (
        word(each.name),
        what,
        address,
        show_bytes(place.end - place.start),
        f"{each.changed_pages:,}" if both else "",
        f"{each.changed_nbytes:,}" if both else "",
    )


def _value(digits: str | None) -> str:
    """Bytes as a number, where they may be one."""
    if digits is None:
        return ""
    data = bytes.fromhex(digits)
    if len(data) not in (1, 2, 4, 8):
        return digits
    value = int.from_bytes(data, "little")
    return str(value) if value < 1 << 32 else f"{value:#x}"


def _document(found: ImageComparison, *, runs: bool) -> dict[str, Any]:
    def mapping(each: MappingDifference) -> dict[str, Any]:
        members = each._asdict()
        for name in ("older", "newer"):
            members[name] = members[name] and members[name]._asdict()
        members["runs"] = each.runs if runs else len(each.runs)
        return members

    return {
        "older": found.older,
        "newer": found.newer,
        "changed_pages": found.changed_pages,
        "changed_nbytes": found.changed_nbytes,
        "mappings": [mapping(each) for each in found.mappings],
        "objects": [each._asdict() for each in found.objects],
        "threads_begun": found.threads_begun,
        "threads_ended": found.threads_ended,
        "notes": found.notes,
    }

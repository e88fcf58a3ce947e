# SPDX-License-Identifier: MIT
"""What `dirtytrack ckpt` does with a store: compact and prune."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..checkpoint import Retention
from ..checkpoint import compact as compacted
from ..checkpoint import prune as pruned
from ..checkpoint.ranked import Joined
from ..observe.units import show_bytes
from .ckpt_told import progress

if TYPE_CHECKING:
    import argparse

__all__ = ["compact", "prune"]


def compact(args: argparse.Namespace) -> int:
    """Write a generation anew."""
    with progress("compacting") as tell:
        made = compacted(
            args.store,
            args.generation,
            compression=None if args.compression == "none" else args.compression,
            level=args.level,
            encrypt=args.encrypt,
            decrypt=args.decrypt,
            memory_bytes=args.memory,
            progress=tell,
        )
    if args.json:
        print(json.dumps(asdict(made), indent=2))
    elif isinstance(made.ranks, Joined):
        print(f"generation {made.generation}: the parts of {made.ranks.size} ranks, {show_bytes(made.nbytes)}")
    else:
        count = len(made.segments)
        print(
            f"generation {made.generation}: revision {made.revision}, {show_bytes(made.nbytes)} in "
            f"{show_bytes(made.stored_nbytes)}, {count} segment{'s' if count > 1 else ''}"
        )
    return 0


def prune(args: argparse.Namespace) -> int:
    """Remove what is not to be kept."""
    if args.last is args.every is args.age is None:
        args.refuse("one of --last, --every and --age says what is kept")
    found = pruned(args.store, Retention(args.last, args.every, args.age), dry_run=args.dry_run)
    if args.json:
        print(json.dumps({**found._asdict(), "dry_run": args.dry_run}, indent=2))
    else:
        what = "to be removed" if args.dry_run else "removed"
        print(f"{len(found.removed)} {what}: {_numbers(found.removed)}")
        print(f"{len(found.kept)} kept: {_numbers(found.kept)}")
    for why in found.unreadable:
        print(
            f"dirtytrack: {why}. Nobody knows which segments it names: as long as it is there none is removed, and the "
            "store does not become smaller. `dirtytrack ckpt verify` says which generations are whole",
            file=sys.stderr,
        )
    if found.put_off:
        print(
            f"dirtytrack: {len(found.put_off)} are put off, since somebody reads the store: prune again later",
            file=sys.stderr,
        )
        return 1
    return 0


def _numbers(generations: tuple[int, ...]) -> str:
    return " ".join(map(str, generations)) or "none"

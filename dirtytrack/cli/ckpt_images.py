# SPDX-License-Identifier: MIT
"""`dirtytrack ckpt save`: images of a running process, once or again and again."""

from __future__ import annotations

import json
import signal
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..checkpoint.chains import Retention
from ..checkpoint.images import ProcessCheckpointer
from ..errors import DirtyTrackError, TargetBusy, TargetGone
from ..observe.units import show_bytes

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from ..checkpoint.images import Image

__all__ = ["save"]


def save(args: argparse.Namespace) -> int:
    """Save a process; with --every again and again, until it ends or somebody says so."""
    saved = 0
    with _interrupted_by(signal.SIGTERM), _checkpointer(args) as ckpt:
        due = time.monotonic()
        try:
            while True:
                if (image := _saved(ckpt, retried=bool(args.every))) is not None:
                    saved += 1
                    _tell(image, args.json)
                if args.every is None or saved == args.count:
                    return 0
                now = time.monotonic()
                due = max(due + args.every, now)
                time.sleep(due - now)
        except TargetGone as error:
            if args.every is None or not saved:
                raise
            print(f"dirtytrack: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            if not saved:
                raise
        print(f"{saved} generations were saved, the last is {ckpt.generation}", file=sys.stderr)
    return 0


def _checkpointer(args: argparse.Namespace) -> ProcessCheckpointer:
    return ProcessCheckpointer(
        args.store,
        args.pid,
        exclude=args.exclude,
        compression=None if args.compression == "none" else args.compression,
        level=args.level,
        staging_bytes=args.staging,
        precopy_bytes=args.precopy,
        timeout=args.timeout,
        retain=None if args.last is None else Retention(last=args.last),
        encrypt=args.encrypt,
        seccomp=args.seccomp,
    )


def _saved(ckpt: ProcessCheckpointer, *, retried: bool) -> Image | None:
    """None where that is to be tried again: somebody has the process, or it does not stand still."""
    try:
        return ckpt.save()
    except TargetBusy as error:
        if not retried:
            raise
        _warn(error)
        return None


def _warn(error: DirtyTrackError) -> None:
    print(f"dirtytrack: not saved, tried again: {error}", file=sys.stderr)


def _tell(image: Image, as_json: bool) -> None:
    if as_json:
        print(json.dumps(image._asdict()), flush=True)
        return
    copied = show_bytes(image.bytes_frozen)
    if image.bytes_precopied:
        copied += f" after {show_bytes(image.bytes_precopied)} before"
    print(
        f"generation {image.generation}: {image.kind}, frozen {image.frozen_seconds * 1e3:.1f} ms for {copied}, "
        f"{show_bytes(image.bytes_written)} written in {image.seconds:.2f} s",
        flush=True,
    )


@contextmanager
def _interrupted_by(number: signal.Signals) -> Iterator[None]:
    """What ends this politely does as Ctrl-C does."""
    before = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(number, before)

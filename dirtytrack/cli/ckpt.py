# SPDX-License-Identifier: MIT
"""`dirtytrack ckpt`: what a store of checkpoints has, whether it is whole, and what becomes of it."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import quantities

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["add_arguments", "run"]

_MODULES = dict.fromkeys(("ls", "show", "verify", "diff"), "ckpt_told") | dict.fromkeys(
    ("compact", "prune"), "ckpt_done"
)
_MODULES |= {"restore": "ckpt_files", "save": "ckpt_images", "core": "ckpt_core", "export": "ckpt_export"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommands and their options."""
    commands = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    command = _action(commands, "ls", "say which generations a store has")
    command = _action(commands, "show", "say what a generation consists of")
    _add_generation(command, optional=True)
    _add_save(commands)
    command = _action(commands, "verify", "read what is stored and compare it with its checksums")
    _add_generation(command, optional=True)
    command.add_argument("--all", action="store_true", help="every generation, and all else that is there")
    command.epilog = "Exit status: 0 where all is as it was written, 1 where anything is damaged."

    command = _action(commands, "restore", "write the buffers of a generation into files: .npy, or .bin for mere bytes")
    _add_generation(command, optional=True)
    command.add_argument("-o", "--output", metavar="FOLDER", required=True, help="where to; not there yet, or empty")
    command.add_argument("--name", action="append", metavar="NAME", help="only this buffer; may be given several times")
    command.add_argument(
        "--fallback", action="store_true", help="where it is damaged, the newest older generation that is not"
    )
    _add_function(command, "--decrypt", "what undoes the encryption")

    command = _action(commands, "export", "write a generation in a format that other programs read")
    command.add_argument("path", metavar="PATH", help="where to; not there yet, or an empty folder")
    command.add_argument(
        "--to", choices=("zarr", "dcp"), required=True, help="a zarr group, or a torch.distributed.checkpoint"
    )
    command.add_argument("--generation", metavar="N", type=_generation, help="the newest where it is left out")
    command.add_argument("--name", action="append", metavar="NAME", help="only this buffer; may be given several times")
    command.add_argument("--as-bytes", action="store_true", help="write what the format has no type for as bytes")
    command.add_argument(
        "--chunk", type=quantities.nbytes, metavar="SIZE", help="of zarr's chunks, at most (1MiB to 64MiB)"
    )
    command.add_argument(
        "--memory", type=quantities.nbytes, default=128 << 20, metavar="SIZE", help="that it takes, about (128MiB)"
    )
    _add_function(command, "--decrypt", "what undoes the encryption")
    command.set_defaults(refuse=command.error)

    command = _action(commands, "core", "write the image of a process as an ELF core file, which gdb opens")
    command.add_argument(
        "--generation", metavar="N", type=_generation, help="its number; the newest where it is left out"
    )
    command.add_argument("-o", "--output", metavar="FILE", help="where to; not there yet (core.N)")
    _add_function(command, "--decrypt", "what undoes the encryption")

    command = _action(
        commands, "diff", "say which bytes differ between two generations; of images, which mappings and objects"
    )
    command.add_argument("older", metavar="A", type=_generation, help="a generation")
    command.add_argument("newer", metavar="B", type=_generation, help="another one")
    command.add_argument("--runs", action="store_true", help="where they are, in blocks of 4096 bytes")
    _add_function(command, "--decrypt", "what undoes the encryption")

    command = _action(commands, "compact", "write a generation anew as a full one, which needs no older segment")
    _add_generation(command, optional=True)
    command.add_argument(
        "--compression", choices=("same", "zstd", "none"), default="same", help="of what is written (same)"
    )
    command.add_argument("--level", type=int, default=1, help="of zstd (1)")
    command.add_argument(
        "--memory", type=quantities.nbytes, default=128 << 20, metavar="SIZE", help="that it takes, about (128MiB)"
    )
    _add_function(command, "--encrypt", "what encrypts what is written")
    _add_function(command, "--decrypt", "what undoes the encryption")

    command = _action(commands, "prune", "remove generations that are not to be kept; the newest always is")
    command.add_argument("--last", type=_generation, metavar="N", help="keep the N newest")
    command.add_argument("--every", type=_generation, metavar="N", help="keep those whose number is a multiple of N")
    command.add_argument(
        "--age", type=quantities.seconds, metavar="TIME", help="keep those that are not older: 12h, 7d"
    )
    command.add_argument("--dry-run", action="store_true", help="remove nothing, say what would be")
    command.epilog = "Exit status: 0; 1 where nothing could be removed since somebody reads."
    command.set_defaults(refuse=command.error)


def _add_save(commands: Any) -> None:
    says = "save a running process, which need not know of it: consistent, and from the second time on what it wrote"
    command: argparse.ArgumentParser = commands.add_parser(
        "save", help=says, description=says[0].upper() + says[1:] + "."
    )
    command.add_argument("pid", metavar="PID", type=_pid, help="a running process")
    command.add_argument("store", metavar="STORE", help="the folder of checkpoints; made where there is none")
    command.add_argument("--json", action="store_true", help="a line for machines for each generation")
    command.add_argument("--every", type=quantities.seconds, metavar="TIME", help="again and again: 5s, 500ms")
    command.add_argument("--count", type=_generation, metavar="N", help="end after so many; 1 without --every")
    command.add_argument(
        "--exclude",
        action="append",
        type=_pattern,
        metavar="GLOB",
        help="leave out mappings of this name, as /dev/shm/*, or at 0xSTART-0xEND; may be given several times",
    )
    command.add_argument("--last", type=_generation, metavar="N", help="remove all but the N newest generations")
    command.add_argument("--compression", choices=("zstd", "none"), default="zstd", help="(zstd)")
    command.add_argument("--level", type=int, default=1, help="of zstd (1)")
    command.add_argument(
        "--staging",
        type=quantities.nbytes,
        metavar="SIZE",
        help="of the buffer that is copied to while it stands still",
    )
    command.add_argument(
        "--precopy", type=quantities.nbytes, default=4 << 20, metavar="SIZE", help="more is copied before that (4MiB)"
    )
    command.add_argument(
        "--timeout", type=quantities.seconds, default=2.0, metavar="TIME", help="within which it must stand still (2s)"
    )
    command.add_argument("--seccomp", choices=("accepted",), help="attach though it has a seccomp filter")
    _add_function(command, "--encrypt", "what encrypts what is written")
    command.epilog = (
        "Exit status: 0; with --every also where the process ended, or Ctrl-C came, after a generation was saved. The "
        "process goes on unharmed whatever becomes of this command."
    )


def _action(commands: Any, name: str, says: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=says, description=says[0].upper() + says[1:] + "."
    )
    command.add_argument("store", metavar="STORE", help="the folder of checkpoints, or a URL as s3://bucket/prefix")
    command.add_argument("--json", action="store_true", help="for machines")
    return command


def _add_generation(command: argparse.ArgumentParser, *, optional: bool) -> None:
    command.add_argument(
        "generation",
        metavar="GENERATION",
        nargs="?" if optional else None,
        type=_generation,
        help="its number; the newest where it is left out",
    )


def _add_function(command: argparse.ArgumentParser, option: str, says: str) -> None:
    command.add_argument(
        option, type=_function, metavar="MODULE:NAME", help=f"{says}: a Python function, bytes to bytes"
    )


def _generation(words: str) -> int:
    if not words.isdecimal() or not int(words):
        raise argparse.ArgumentTypeError(f"{words!r} is not a number from 1 on")
    return int(words)


def _pid(words: str) -> int:
    if not words.isdecimal() or not int(words):
        raise argparse.ArgumentTypeError(f"{words!r} is not the number of a process")
    return int(words)


def _pattern(words: str) -> str | tuple[int, int]:
    """A mapping's name, or addresses as /proc/PID/maps has them, with 0x."""
    found = re.fullmatch(r"0x([0-9a-f]+)-0x([0-9a-f]+)", words.lower())
    if found is None:
        return words
    start, end = int(found[1], 16), int(found[2], 16)
    if start >= end:
        raise argparse.ArgumentTypeError(f"{words!r}: there is nothing between these addresses")
    return start, end


def _function(words: str) -> Callable[[bytes], bytes]:
    module, _, name = words.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{words!r} is no MODULE:NAME: {error}") from error
    if not callable(found):
        raise argparse.ArgumentTypeError(f"{words} is no function")
    return found  # type: ignore[no-any-return]


def run(args: argparse.Namespace) -> int:
    """Do what was asked for.

    Returns:
        0; 1 where `verify` finds damage, or `prune` has to come again.
    """
    module = importlib.import_module(f".{_MODULES[args.action]}", __package__)
    return int(getattr(module, args.action)(args))

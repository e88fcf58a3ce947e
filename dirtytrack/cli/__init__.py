# SPDX-License-Identifier: MIT
"""The `dirtytrack` command. Each subcommand is a module here, imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import DirtyTrackError

__all__ = ["main"]

COMMANDS = {
    "doctor": "say what tracking needs, whether it is there, and what mends it",
    "scan": "say what a process writes in one epoch, by its mappings",
    "top": "show live what processes write: rates and working sets, by process and by mapping",
    "record": "record which pages a program writes, epoch by epoch, into a file",
    "report": "say what a recording has: rates, mappings, hot pages, the written working set",
    "plan": "say what checkpoints and live migration of a recorded program would cost",
    "heatmap": "draw which memory was written when, of a recording: as text, a picture or a page",
    "migrate": "run a program whose memory is tracked, and move it to another process while it runs",
    "receive": "listen for a program that is moved here, and run it",
    "ckpt": "save a process, open it in gdb; list, verify, restore, export, compare, compact and prune checkpoints",
    "demo": "index the standard library in tracked memory, epoch by epoch, and compare the cost",
}
"""By name of the module, which has add_arguments(parser) and run(args) -> exit status."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        argv: the arguments after the program's name; left out, the process's own.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="dirtytrack", description="Which pages of memory were written since you last asked."
    )
    parser.add_argument("--version", action="version", version=f"dirtytrack {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    run = None
    for name, says in COMMANDS.items():
        command = commands.add_parser(name, help=says, description=says[0].upper() + says[1:] + ".")
        if name == chosen:
            module = importlib.import_module(f"{__name__}.{name}")
            module.add_arguments(command)
            run = module.run
    parsed = parser.parse_args(arguments)
    assert run is not None, "argparse takes known commands only"
    try:
        status = int(run(parsed))
        sys.stdout.flush()
    except DirtyTrackError as error:
        print(f"dirtytrack: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return status

# SPDX-License-Identifier: MIT
"""The guardian: a program of its own, which loads nothing but the core and does what csrc/guard.c says.

Run by `dirtytrack.kernel.targets`, never imported: the path of the extension, then the fields of dt_guard_wish.
"""

import sys
from importlib.machinery import ExtensionFileLoader, ModuleSpec

__all__ = ["main"]


def main(path: str, *numbers: str) -> int:
    """Do it and answer through the channel; the exit status."""
    name = "dirtytrack.kernel._taking"
    loader = ExtensionFileLoader(name, path)
    module = loader.create_module(ModuleSpec(name, loader, origin=path))
    loader.exec_module(module)
    return int(module.guard(*map(int, numbers)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

# SPDX-License-Identifier: MIT
"""``python -m dirtytrack.gc --cflags``: how a runtime in C or Rust compiles the same core in, without Python."""

from __future__ import annotations

import argparse
import sys

from ..kernel import sources


def main() -> int:
    """Print what is asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m dirtytrack.gc",
        description="Where the C core is, for a compiler's command line. What is asked for is printed in one line.",
        epilog="cc $(python -m dirtytrack.gc --cflags) runtime.c $(python -m dirtytrack.gc --sources --libs)",
    )
    parser.add_argument("--cflags", action="store_true", help="to compile what includes <dirtytrack.h>, and the core")
    parser.add_argument("--sources", action="store_true", help="the core's C files, all of which are to be compiled")
    parser.add_argument("--libs", action="store_true", help="to link with")
    options = parser.parse_args()
    words: list[str] = []
    if options.cflags:
        words += [f"-I{sources.headers()}", "-std=gnu11", "-pthread"]
    if options.sources:
        words += [str(path) for path in sources.sources()]
    if options.libs:
        words += ["-pthread", "-lm"]
    if not words:
        parser.error("say what: --cflags, --sources, --libs")
    print(" ".join(words))
    return 0


if __name__ == "__main__":
    sys.exit(main())

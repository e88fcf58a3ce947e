# SPDX-License-Identifier: MIT
"""`python -m dirtytrack` is the `dirtytrack` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())

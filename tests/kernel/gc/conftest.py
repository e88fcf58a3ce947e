# SPDX-License-Identifier: MIT
"""Where the extension is built with sanitizers, so are the C files of examples/heap."""

from __future__ import annotations

import os

if os.environ.get("DIRTYTRACK_SANITIZE") == "1":
    flags = "-O1 -fsanitize=address,undefined -fno-sanitize-recover=all"
    os.environ.setdefault("EXAMPLES_HEAP_CFLAGS", flags)

# SPDX-License-Identifier: MIT
"""The demo's rivals: what people do where no kernel tells which pages were written (csrc/baseline.c)."""

from __future__ import annotations

import os
from types import TracebackType
from typing import TYPE_CHECKING

from . import core

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self

__all__ = ["ProtectedPages", "compare_into", "replay"]


def _check(code: int) -> None:
    if code < 0:
        raise OSError(-code, os.strerror(-code))


def replay(memory: Buffer, spans: Buffer, data: Buffer) -> None:
    """Repeat stores, without the GIL.

    Args:
        memory: What to write to.
        spans: Pairs of native 64-bit numbers: offset into the memory, length in bytes.
        data: The bytes of all stores, one after the other.

    Raises:
        OSError: EINVAL where a store would leave the memory or the data.
    """
    core.load()
    with (
        core.ffi.from_buffer("uint8_t[]", memory, require_writable=True) as target,
        core.ffi.from_buffer("uint64_t[]", spans) as pairs,
        core.ffi.from_buffer("uint8_t[]", data) as stored,
    ):
        _check(core.lib.dt_baseline_replay(target, len(target), pairs, len(pairs) // 2, stored, len(stored)))


def compare_into(memory: Buffer, mirror: Buffer) -> int:
    """Compare each page with the mirror, copy those that differ, and return their number."""
    core.load()
    with core.ffi.from_buffer("uint8_t[]", memory) as source, core.ffi.from_buffer("uint8_t[]", mirror, True) as copy:
        if len(source) != len(copy):
            raise ValueError(f"the mirror has {len(copy)} bytes, the memory {len(source)}")
        pages = core.ffi.new("uint64_t *")
        core.lib.dt_baseline_compare(source, copy, len(source), pages)
        return int(pages[0])


class ProtectedPages:
    """Writes found by `mprotect` and a SIGSEGV handler. One at a time in a process.

    Args:
        memory: Whole pages. They are read-only for the kernel too while this is open: `read(2)` into them fails.
    """

    def __init__(self, memory: Buffer) -> None:
        core.load()
        self._memory = core.ffi.from_buffer("uint8_t[]", memory, require_writable=True)
        _check(core.lib.dt_baseline_protect(self._memory, len(self._memory)))
        self._open = True

    def collect_into(self, mirror: Buffer) -> int:
        """Protect again, copy the pages written since the last time, and return their number."""
        if not self._open:
            raise ValueError("closed")
        with core.ffi.from_buffer("uint8_t[]", mirror, require_writable=True) as copy:
            if len(copy) != len(self._memory):
                raise ValueError(f"the mirror has {len(copy)} bytes, the memory {len(self._memory)}")
            pages = core.ffi.new("uint64_t *")
            _check(core.lib.dt_baseline_collect(copy, pages))
            return int(pages[0])

    def close(self) -> None:
        """Make the memory writable and put the previous handler back."""
        if self._open:
            self._open = False
            core.lib.dt_baseline_unprotect()
            core.ffi.release(self._memory)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

# SPDX-License-Identifier: MIT
"""What `mmap.mmap` cannot say to the kernel: where a mapping belongs, and its name. By ctypes, loaded at need."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["aligned_hole", "name_mapping"]


def _libc() -> Any:
    import ctypes  # for those who name memory or align it, and for nobody else

    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 3, ctypes.c_char_p]
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mmap.restype = ctypes.c_void_p
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


def name_mapping(address: int, nbytes: int, name: str) -> None:
    """Have /proc/PID/maps show private anonymous memory as [anon:name]. As far as this kernel can; never fails."""
    allowed = bytes(c for c in name.encode(errors="replace") if 0x20 < c < 0x7F and c not in b"\\`$[]")[:79]
    pr_set_vma, pr_set_vma_anon_name = 0x53564D41, 0
    try:
        _libc().prctl(pr_set_vma, pr_set_vma_anon_name, address, nbytes, allowed)
    except (ImportError, OSError, AttributeError):
        return


@contextmanager
def aligned_hole(nbytes: int, alignment: int) -> Iterator[int]:
    """Inside, [address, address + nbytes) is free, its neighbourhood is taken, and the address is aligned.

    The kernel takes the highest gap that fits: mappings of so many bytes end up in this hole, as soon as the gaps above
    it that fit so many bytes but not a page more than their alignment are taken.
    """
    import mmap

    libc = _libc()
    no_access = 0
    whole = nbytes + alignment
    start = libc.mmap(None, whole, no_access, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if start is None or start == (1 << 64) - 1:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    address = -(-start // alignment) * alignment
    # SAFETY: all of [start, start + whole) is ours, and nobody else knows of it. The hole itself is anyone's from here
    # on, so it is never unmapped again.
    libc.munmap(address, nbytes)
    try:
        yield address
    finally:
        if address > start:
            libc.munmap(start, address - start)
        if start + whole > address + nbytes:
            libc.munmap(address + nbytes, start + whole - address - nbytes)

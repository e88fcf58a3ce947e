# SPDX-License-Identifier: MIT
"""What a machine short of memory or of speed does, brought about: swapping, compaction, merging, slow disks.

Each is put back afterwards.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests import oracle
from tests.kernel.host import NotHere, on_disk, setting
from tests.kernel.kinds import Area
from tests.oracle import PAGE

_libc = ctypes.CDLL(None, use_errno=True)
_PAGEOUT, _MERGEABLE = 21, 12
_SWAP_FLAG_PREFER = 0x8000
_KSM = Path("/sys/kernel/mm/ksm")


# ---- swap -----------------------------------------------------------------------------------------------------------


@contextmanager
def swap(folder: Path, pages: int = 4096, priority: int = 1000) -> Iterator[Path]:
    """A swap file on a disk, in use before those of a lower priority; `swap_off` ends its use before the end.

    Raises:
        NotHere: only root may, and not on every file system.
    """
    path = on_disk(folder) / "swap"
    header = bytearray(PAGE)
    struct.pack_into("3I", header, 1024, 1, pages - 1, 0)  # version, last page, bad pages
    header[-10:] = b"SWAPSPACE2"
    path.write_bytes(bytes(header) + bytes((pages - 1) * PAGE))
    path.chmod(0o600)
    os.sync()
    if _libc.swapon(os.fsencode(path), _SWAP_FLAG_PREFER | priority) != 0:
        number = ctypes.get_errno()
        path.unlink()
        raise NotHere(f"swapon: {os.strerror(number)}")
    try:
        yield path
    finally:
        swap_off(path)
        path.unlink()


def swap_off(path: Path) -> None:
    """Everything comes back into memory."""
    if _libc.swapoff(os.fsencode(path)) != 0 and ctypes.get_errno() != errno.EINVAL:
        number = ctypes.get_errno()
        raise OSError(number, f"swapoff: {os.strerror(number)}")


def swap_out(area: Area, units: range) -> None:
    oracle.discard(area.at(units.start), len(units) * area.granule, _PAGEOUT)


def swapped_bytes(area: Area) -> int:
    """Of the mappings that touch it, as /proc/self/smaps counts."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        word = line.split(None, 1)[0]
        if not word.endswith(":"):
            start, end = (int(part, 16) for part in word.split("-"))
            inside = start < area.end and end > area.address
        elif inside and word == "Swap:":
            total += int(line.split()[1]) << 10
    return total


# ---- where pages are ------------------------------------------------------------------------------------------------


def frames(area: Area) -> list[int]:
    """The page frame of each page; 0 where none is.

    Raises:
        NotHere: only root is told.
    """
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        raw = os.pread(fd, area.nbytes // PAGE * 8, area.address // PAGE * 8)
    finally:
        os.close(fd)
    found = [entry & (1 << 55) - 1 if entry >> 63 else 0 for (entry,) in struct.iter_unpack("Q", raw)]
    if not any(found):
        raise NotHere("page frames are shown to root alone")
    return found


def compact() -> None:
    """Move pages together, so that free memory comes in larger pieces.

    Raises:
        NotHere: only root may.
    """
    try:
        Path("/proc/sys/vm/compact_memory").write_text("1")
    except OSError as error:
        raise NotHere(f"compaction: {error}") from error


# ---- merging --------------------------------------------------------------------------------------------------------


@contextmanager
def merging() -> Iterator[None]:
    """The kernel merges equal pages, fast. Raises NotHere: it cannot, or this user may not."""
    if not _KSM.exists():
        raise NotHere("this kernel merges no pages")
    wanted = {"pages_to_scan": "100000", "sleep_millisecs": "1", "run": "1"}
    with ExitStack() as settings:
        for name, value in wanted.items():
            settings.enter_context(setting(_KSM / name, value))
        yield


def allow_merging(area: Area) -> None:
    oracle.discard(area.address, area.nbytes, _MERGEABLE)


def merged_pages() -> int:
    """Of this process."""
    return int(Path("/proc/self/ksm_merging_pages").read_text())


# ---- a slow disk ----------------------------------------------------------------------------------------------------


@contextmanager
def slow_disk(path: Path, bytes_per_second: int = 1024) -> Iterator[Callable[[], None]]:
    """Reads of this process from the disk that a file is on take their time, until what is given is called.

    Raises:
        NotHere: only root may, and by the block controller of control groups, version 1.
    """
    root = Path("/sys/fs/cgroup/blkio")
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    here = [line.split(":", 2)[2] for line in lines if "blkio" in line.split(":", 2)[1].split(",")]
    if not here or not (root / "blkio.throttle.read_bps_device").exists():
        raise NotHere(f"no disk can be slowed down here: {root} is no block controller")
    device = path.stat().st_dev
    group = root / f"slow-disk-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        raise NotHere(f"no disk can be slowed down here: {error}") from error
    home = root / here[0].lstrip("/") / "cgroup.procs"
    limit, number = group / "blkio.throttle.read_bps_device", f"{os.major(device)}:{os.minor(device)}"
    try:
        try:
            limit.write_text(f"{number} {bytes_per_second}")
            (group / "cgroup.procs").write_text(str(os.getpid()))
        except OSError as error:
            raise NotHere(f"the disk beneath {path} cannot be slowed down: {error}") from error
        yield lambda: _lift(limit, number)
    finally:
        _lift(limit, number)
        home.write_text(str(os.getpid()))
        group.rmdir()


def _lift(limit: Path, number: str) -> None:
    limit.write_text(f"{number} 0")

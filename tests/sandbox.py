# SPDX-License-Identifier: MIT
"""Runs a function of a test module in a process of its own, which takes things from itself first.

`run_in_child(function, "nobody", "no-device")` starts an interpreter, loads the function's module, applies the
restrictions in order, calls the function and fails with its output where it fails.
"""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import os
import platform
import resource
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dirtytrack.kernel import core

ROOT = Path(__file__).parents[1]
NOBODY = 65534
DEVICE = "/dev/userfaultfd"
PAGEMAP_SCAN, UFFDIO_API = 0xC0606610, 0xC018AA3F

_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 4, 38, 22, 2
_CLONE_NEWNS, _CLONE_NEWUSER = 0x20000, 0x10000000
_MS_NOSUID, _MS_REC, _MS_PRIVATE = 2, 1 << 14, 1 << 18
_USERFAULTFD = {"x86_64": 323, "aarch64": 282}
_IOCTL = {"x86_64": 16, "aarch64": 29}
_MADVISE = {"x86_64": 28, "aarch64": 233}
_PROCESS_VM_READV = {"x86_64": 310, "aarch64": 270}
_MADV_WIPEONFORK = 18

libc = ctypes.CDLL(None, use_errno=True)
libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mprotect.argtypes = libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def check(returned: int) -> None:
    if returned != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


# ---- what a process can take from itself -------------------------------------------------------------------------


def _filter(answer: int, system_call: int, request: int | None = None, argument: int = 1) -> None:
    """Have the kernel answer a system call (with this second or other argument) with an errno, for ever: seccomp."""

    def instruction(code: int, jump_true: int, jump_false: int, value: int) -> bytes:
        return struct.pack("HBBI", code, jump_true, jump_false, value)

    load, jump_equal, give_back = 0x20, 0x15, 0x06
    allow, fail = 0x7FFF0000, 0x00050000 | answer
    program = [instruction(load, 0, 0, 0), instruction(jump_equal, 0, 1 if request is None else 3, system_call)]
    if request is not None:
        program += [instruction(load, 0, 0, 16 + 8 * argument), instruction(jump_equal, 0, 1, request)]
    program += [instruction(give_back, 0, 0, fail), instruction(give_back, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(program))
    header = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(code)))
    check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    check(libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(header), 0, 0))


def forbid_userfaultfd(answer: int = errno.EPERM) -> None:
    _filter(answer, _USERFAULTFD[platform.machine()])


def forbid_ioctl(request: int, answer: int) -> None:
    _filter(answer, _IOCTL[platform.machine()], request)


def _hide(folder: str) -> None:
    """Put an empty folder over another, for this process only."""
    if libc.unshare(_CLONE_NEWNS) != 0:
        check(libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS))
    check(libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
    check(libc.mount(b"tmpfs", folder.encode(), b"tmpfs", _MS_NOSUID, b"size=4k"))


def become_nobody() -> None:
    """An ordinary user without a privilege; the real one where the tests are not run by root."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        check(libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0))  # as it is after an exec


def without_device() -> None:
    if os.access(DEVICE, os.R_OK | os.W_OK):
        _hide("/dev")


RESTRICTIONS: dict[str, Callable[[], None]] = {
    "nobody": become_nobody,
    "not-dumpable": lambda: check(libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)),
    "no-device": without_device,
    "no-proc": lambda: _hide("/proc"),
    "no-sys": lambda: _hide("/sys"),
    "seccomp-eperm": forbid_userfaultfd,
    "seccomp-enosys": lambda: forbid_userfaultfd(errno.ENOSYS),
    "seccomp-no-io-uring": lambda: _filter(errno.EPERM, 425),  # io_uring_setup, on each architecture
    "no-wp-async": lambda: forbid_ioctl(UFFDIO_API, errno.EINVAL),
    "no-pagemap-scan": lambda: forbid_ioctl(PAGEMAP_SCAN, errno.ENOTTY),
    "pagemap-scan-eperm": lambda: forbid_ioctl(PAGEMAP_SCAN, errno.EPERM),
    "no-vm-readv": lambda: _filter(errno.EPERM, _PROCESS_VM_READV[platform.machine()]),
    "no-wipe-on-fork": lambda: _filter(errno.EINVAL, _MADVISE[platform.machine()], _MADV_WIPEONFORK, argument=2),
    "64-descriptors": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)),
}


# ---- failures on purpose, at the border between the core and the kernel ---------------------------------------------


class Calls:
    """How many calls the sites saw; known after the `with`."""

    seen = 0


@contextmanager
def failing(*sites: str, number: int, nth: int = 1, times: int = 1, after: bool = False) -> Iterator[Calls]:
    """The nth call at any of these sites of the core, and the times - 1 after it, fail with this errno.

    Args:
        sites: names of `enum dt_site` without DT_SITE_.
        number: the errno.
        nth: from 1.
        times: 0: all of them.
        after: the call is made, then reported as failed.
    """
    core.load()
    calls = Calls()
    bits = sum(int(getattr(core.lib, f"DT_SITE_{site}")) for site in sites)
    core.lib.dt_fail(bits, nth, times, number, int(after))
    try:
        yield calls
    finally:
        calls.seen = core.lib.dt_fail(0, 0, 0, 0, 0)


# ---- the child -----------------------------------------------------------------------------------------------------


def run_in_child(function: Callable[[], object], *restrictions: str, status: int = 0, timeout: float = 60) -> str:
    """Call a module-level function in a process of its own, after these restrictions; returns what it printed.

    Args:
        function: what it returns, where it is a number, is the child's exit status.
        restrictions: names in RESTRICTIONS, in order.
        status: the expected exit status.
        timeout: in seconds.
    """
    where = [function.__code__.co_filename, function.__name__]
    command = [sys.executable, "-W", "error", __file__, *where, *restrictions]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=timeout)
    assert done.returncode == status, f"status {done.returncode}, expected {status}\n{done.stdout}{done.stderr}"
    return done.stdout


def main(path: str, name: str, *restrictions: str) -> object:
    sys.path.insert(0, str(ROOT))
    spec = importlib.util.spec_from_file_location("child", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["child"] = module
    spec.loader.exec_module(module)
    core.load()  # afterwards its files may be out of reach
    for restriction in restrictions:
        RESTRICTIONS[restriction]()
    return getattr(module, name)()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))  # type: ignore[arg-type]

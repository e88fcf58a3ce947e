# SPDX-License-Identifier: MIT
"""Each way by which bytes get into memory without a store of this thread: what is reported is that page, and no other.

Beside plain system calls: O_DIRECT and io_uring that begin and end within an epoch, a read that was blocked when its
memory was armed, a debugger, another process, signal frames. Takes about 3 s of CI's 20 min.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
import shlex
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dirtytrack import UffdSession
from tests import oracle
from tests.kernel.kinds import KINDS, Area, some
from tests.kernel.ring import Ring
from tests.kernel.watched import Watched
from tests.oracle import PAGE

UNIT = 3
DATA = b"\x5a" * 16
_CALLS = {
    "x86_64": {"clock_gettime": 228, "getitimer": 36, "gettimeofday": 96, "wait4": 61, "vmsplice": 278},
    "aarch64": {"clock_gettime": 113, "getitimer": 102, "gettimeofday": 169, "wait4": 260, "vmsplice": 75},
}[platform.machine()]
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.read.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
_libc.pread.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long]
_libc.recv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.getrandom.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]


def done(returned: int) -> int:
    if returned < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(returned)


def call(name: str, *arguments: int) -> int:
    return done(_libc.syscall(*[ctypes.c_long(number) for number in (_CALLS[name], *arguments)]))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    source = Path(__file__).with_name("kernel_writes.c")
    built = tmp_path_factory.mktemp("writes") / "kernel_writes.so"
    compiler = shlex.split(os.environ.get("CC") or "cc")
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([*compiler, *flags, str(source), "-o", str(built)], check=True, timeout=60)
    loaded = ctypes.CDLL(str(built))
    for name in ("write_thread_id", "clear_thread_id", "store_by_vfork", "set_by_futex"):
        getattr(loaded, name).argtypes = [ctypes.c_void_p]
    loaded.poke_by_debugger.argtypes = [ctypes.c_void_p, ctypes.c_long]
    loaded.take_a_signal_on.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return loaded


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


# ---- the ways -------------------------------------------------------------------------------------------------------


def read(at: int) -> None:
    with pipe() as (source, sink):
        os.write(sink, DATA)
        assert done(_libc.read(source, at, len(DATA))) == len(DATA)


def pread(at: int) -> None:
    with open(__file__, "rb") as file:
        assert done(_libc.pread(file.fileno(), at, 16, 0)) == 16


def receive(at: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(DATA)
        assert done(_libc.recv(ours.fileno(), at, 16, 0)) == 16


def random(at: int) -> None:
    assert done(_libc.getrandom(at, 16, 0)) == 16


def status(at: int) -> None:
    buffer = ctypes.create_string_buffer(str(__file__).encode())
    _libc.stat(buffer, ctypes.c_void_p(at))


def clock(at: int) -> None:
    call("clock_gettime", 1, at)


def timer(at: int) -> None:
    """The first of its four numbers is 0, as 3 is not."""
    call("getitimer", 0, at)


def time_of_day(at: int) -> None:
    call("gettimeofday", at, 0)


def wait_status(at: int) -> None:
    child = os.fork()
    if not child:
        os._exit(77)
    assert call("wait4", child, at, 0, 0) == child


def splice(at: int) -> None:
    """vmsplice out of a pipe: into memory."""
    with pipe() as (source, sink):
        os.write(sink, DATA)
        iovec = bytearray(struct.pack("2Q", at, 16))
        assert call("vmsplice", source, oracle.address_of(iovec), 1, 0) == 16


def thread(at: int) -> None:
    worker = threading.Thread(target=oracle.poke_bytes, args=(at, DATA))
    worker.start()
    worker.join()


def proc_mem(at: int) -> None:
    fd = os.open("/proc/self/mem", os.O_RDWR | os.O_CLOEXEC)
    try:
        assert os.pwrite(fd, DATA, at) == 16
    finally:
        os.close(fd)


def process_vm(at: int) -> None:
    oracle.write_process(os.getpid(), at, DATA)


def process_vm_by_another(at: int) -> None:
    oracle.allow_any_tracer()
    parent, child = os.getpid(), os.fork()
    if not child:
        try:
            oracle.write_process(parent, at, DATA)
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def ring_read(at: int) -> None:
    with pipe() as (source, sink), Ring() as ring:
        ring.submit(source, at, 16)
        os.write(sink, DATA)
        assert ring.wait() == 16


WAYS: dict[str, Callable[[int], None]] = {
    "a store": lambda at: oracle.poke_bytes(at, DATA),
    "a store by another thread": thread,
    "read": read,
    "pread of a file": pread,
    "recv": receive,
    "getrandom": random,
    "stat": status,
    "clock_gettime": clock,
    "gettimeofday": time_of_day,
    "getitimer": timer,
    "wait4": wait_status,
    "vmsplice": splice,
    "io_uring": ring_read,
}
BY_PINNING: dict[str, Callable[[int], None]] = {
    "/proc/self/mem": proc_mem,
    "process_vm_writev": process_vm,
    "process_vm_writev by another process": process_vm_by_another,
}

on_every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
on_pinnable_kinds = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.pinnable], ids=str)


def assert_exact(watched: Watched, way: Callable[[int], None]) -> None:
    """Twice: what was written is armed again, and seen again."""
    for offset in (0, 64):
        before = watched.area.content()[UNIT]
        way(watched.area.at(UNIT, offset))
        if not offset:
            assert watched.area.content()[UNIT] != before, "it was written"
        assert watched.collect() == {UNIT}
        assert watched.collect() == set()


@on_every_kind
@pytest.mark.parametrize("way", WAYS)
def test_the_page_is_reported_and_no_other(watched: Watched, way: str) -> None:
    assert_exact(watched, WAYS[way])


@on_pinnable_kinds
@pytest.mark.parametrize("way", BY_PINNING)
def test_the_page_is_reported_also_where_the_kernel_pins_it(watched: Watched, way: str) -> None:
    assert_exact(watched, BY_PINNING[way])


@on_every_kind
def test_a_store_of_what_is_there_already(watched: Watched) -> None:
    """EXTRA: the kernel sees stores, not differences."""
    watched.area.store(UNIT, watched.area.load(UNIT))
    assert watched.collect() == {UNIT}


@on_every_kind
@pytest.mark.parametrize("way", ["write_thread_id", "clear_thread_id", "store_by_vfork", "set_by_futex"])
def test_the_kernel_and_a_child_that_shares_the_memory(watched: Watched, way: str, library: ctypes.CDLL) -> None:
    for _ in range(2):
        assert getattr(library, way)(watched.area.at(UNIT, 16)) == 0
        assert watched.collect() == {UNIT}
    watched.area.load(UNIT)
    assert watched.collect() == set()


@on_pinnable_kinds
def test_a_debugger_changes_a_word(watched: Watched, library: ctypes.CDLL) -> None:
    oracle.allow_any_tracer()
    for word in (77, 78):
        assert library.poke_by_debugger(watched.area.at(UNIT), word) == 0
        assert struct.unpack("q", oracle.peek_bytes(watched.area.at(UNIT), 8)) == (word,)
        assert watched.collect() == {UNIT}


@on_every_kind
def test_the_frame_of_a_signal(watched: Watched, library: ctypes.CDLL) -> None:
    """The kernel puts it on a stack of 4 pages, from the top."""
    area = watched.area
    before = [oracle.peek_bytes(area.address + number * PAGE, PAGE) for number in range(8)]
    assert library.take_a_signal_on(area.at(4), 4 * PAGE) == 0
    now = [oracle.peek_bytes(area.address + number * PAGE, PAGE) for number in range(area.units)[:8]]
    changed = area.of_pages(number for number, (old, new) in enumerate(zip(before, now, strict=True)) if old != new)
    found = watched.collect()
    if area.granule == PAGE:
        assert 7 in changed
        assert changed <= found <= {4, 5, 6, 7}
    else:
        assert found == {4}


def overrides_rights() -> bool:
    """Whether /proc/self/mem does, of memory that nobody registered."""
    with oracle.mapped(PAGE) as at:
        oracle.protect(at, PAGE, mmap.PROT_READ)
        try:
            proc_mem(at)
        except OSError:
            return False
        return True


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.shared], ids=str)
def test_a_debugger_writes_to_memory_that_is_read_only(watched: Watched) -> None:
    """/proc/self/mem overrides the rights of private memory: it is a copy, seen like any other."""
    area = watched.area
    oracle.protect(area.address, area.nbytes, mmap.PROT_READ)
    try:
        proc_mem(area.at(UNIT))
    except OSError:  # huge pages of the pool on Linux 6.12, and all memory where proc_mem.force_override forbids it
        assert area.granule > PAGE or not overrides_rights()
        oracle.protect(area.address, area.nbytes, mmap.PROT_READ | mmap.PROT_WRITE)
        assert watched.collect() == set()
        return
    assert watched.collect() == {UNIT}
    oracle.protect(area.address, area.nbytes, mmap.PROT_READ | mmap.PROT_WRITE)
    assert watched.collect() == set()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.shared and kind.pinnable], ids=str)
def test_a_debugger_may_not_write_to_shared_memory_that_is_read_only(watched: Watched) -> None:
    area = watched.area
    oracle.protect(area.address, area.nbytes, mmap.PROT_READ)
    with pytest.raises(OSError, match="Input/output error"):
        proc_mem(area.at(UNIT))
    assert watched.collect() == set()


@pytest.mark.parametrize("kind", some("memfd private", "disk file private", "overlay file private"), ids=str)
def test_the_first_store_to_a_page_of_a_private_file(area: Area) -> None:
    """The page was the file's until then; only the copy is written."""
    for unit in range(area.units):
        area.load(unit)
    with Watched(area) as watched:
        area.store(UNIT)
        assert watched.collect() == {UNIT}
        assert os.pread(area.fd, 1, UNIT * PAGE + 8) == b"\1"
        area.store(UNIT)
        assert watched.collect() == {UNIT}


# ---- what began before ----------------------------------------------------------------------------------------------


@on_every_kind
def test_a_read_that_was_blocked_when_its_memory_was_armed(watched: Watched) -> None:
    area = watched.area
    with pipe() as (source, sink):
        reader = threading.Thread(target=_libc.read, args=(source, area.at(UNIT), 16))
        reader.start()
        assert watched.collect() == set()
        os.write(sink, DATA)
        reader.join()
    assert oracle.peek_bytes(area.at(UNIT), 16) == DATA
    assert watched.collect() == {UNIT}, "the copy is made when there is something to copy"


@on_every_kind
def test_an_io_uring_read_that_was_waiting_when_its_memory_was_armed(watched: Watched) -> None:
    area = watched.area
    with pipe() as (source, sink), Ring() as ring:
        ring.submit(source, area.at(UNIT), 16)
        assert watched.collect() == set()
        os.write(sink, DATA)
        assert ring.wait() == 16
    assert oracle.peek_bytes(area.at(UNIT), 16) == DATA
    assert watched.collect() == {UNIT}


# ---- devices that write to memory -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def direct(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A file of which reads go from the disk to memory, past the page cache."""
    path = tmp_path_factory.mktemp("direct") / "file"
    path.write_bytes(b"\x66" * 8 * PAGE)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    yield fd
    os.close(fd)


@on_pinnable_kinds
def test_a_direct_read_that_begins_and_ends_within_an_epoch(watched: Watched, direct: int) -> None:
    area = watched.area
    for unit in (UNIT, UNIT + 1):
        assert done(_libc.pread(direct, area.at(unit), PAGE, 0)) == PAGE
        assert area.load(unit) == b"\x66"
        assert watched.collect() == {unit}
    assert watched.collect() == set()


@on_pinnable_kinds
def test_a_direct_read_by_io_uring_within_an_epoch(watched: Watched, direct: int) -> None:
    area = watched.area
    with Ring() as ring:
        for unit in (UNIT, UNIT + 1):
            ring.submit(direct, area.at(unit), PAGE)
            assert ring.wait() == PAGE
            assert area.load(unit) == b"\x66"
            assert watched.collect() == {unit}


# ---- the userfaultfd itself -----------------------------------------------------------------------------------------


def place(session: UffdSession, number: int, *words: int) -> None:
    """An ioctl of the userfaultfd: UFFDIO_COPY (3), UFFDIO_ZEROPAGE (4), UFFDIO_MOVE (5)."""
    request = struct.pack(f"{len(words)}Q", *words)
    fcntl.ioctl(session.fileno(), 3 << 30 | len(request) << 16 | 0xAA << 8 | number, request)


@pytest.mark.parametrize("what", ["copy", "zero page", "move"])
def test_pages_that_a_userfaultfd_puts_in_place(what: str, tmp_path: Path) -> None:
    """Where nothing is; a copy also where an armed page was never populated."""
    [kind] = some("private anonymous")
    with kind.map(8, tmp_path) as area, kind.map(1, tmp_path) as source:
        source.fill(9)
        area.fill(3)
        arguments = {
            "copy": (3, area.at(UNIT), source.address, PAGE, 0, 0),
            "zero page": (4, area.at(UNIT), PAGE, 0, 0),
            "move": (5, area.at(UNIT), source.address, PAGE, 0, 0),
        }
        with Watched(area, compare=False) as watched:  # a look would put the zero page there
            with pytest.raises(FileExistsError):
                place(watched.session, *arguments[what])
            oracle.discard(area.at(UNIT), PAGE)
            if what == "copy":
                assert watched.collect() == {UNIT}
            place(watched.session, *arguments[what])
            assert watched.collect() == {UNIT}
            assert oracle.peek_bytes(area.at(UNIT), 1) == (b"\0" if what == "zero page" else b"\x09")
            assert watched.collect() == set()

# SPDX-License-Identifier: MIT
"""Every kind of buffer is tracked to the page, and whose bytes are whose on the pages that it shares.

By stores and by the kernel's own writes; a buffer that begins and ends anywhere has its boundary pages tracked and
every answer in bytes clipped to its own. Which buffers are refused is in failures/, but for a few. Takes about
2 s of CI's 20 min.
"""

from __future__ import annotations

import array
import ctypes
import io
import mmap
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dirtytrack
from dirtytrack import DirtyTracker, Memory, Region, UffdSession
from tests import oracle
from tests.oracle import PAGE
from tests.strategies import Kind

kinds = pytest.mark.parametrize("kind", Kind)


def allocate(nbytes: int, kind: Kind, name: str | None = None) -> Memory:
    shared, huge = kind.value
    return dirtytrack.allocate(nbytes, shared=shared, huge=huge, name=name)


# ---- every kind of buffer -------------------------------------------------------------------------------------------

NBYTES = 64 * PAGE + 123  # of what is tracked; odd, so that items of one byte end anywhere


def numpy_at_an_odd_offset() -> Any:
    return np.zeros(NBYTES + 4096, np.uint8)[1009 : 1009 + NBYTES]


def numpy_doubles() -> Any:
    return np.zeros(NBYTES // 8 + 10)[3 : 3 + NBYTES // 8].reshape(-1, 1)


def numpy_structures() -> Any:
    return np.zeros(NBYTES // 12, [("a", "i4"), ("b", "f8")])


def numpy_dates() -> Any:
    return np.zeros(NBYTES // 8, "datetime64[s]")


def part_of_an_array() -> Any:
    return np.zeros((300, 32, 64))[100:117]


def view_of_a_view() -> Any:
    return memoryview(memoryview(bytearray(2 * NBYTES))[777:])[33 : 33 + NBYTES].cast("b")


class Structure(ctypes.Structure):
    _fields_ = (("head", ctypes.c_int), ("body", ctypes.c_ubyte * (NBYTES - 4)))


BUFFERS: dict[str, Callable[[], Any]] = {
    "numpy, unaligned": numpy_at_an_odd_offset,
    "numpy, doubles": numpy_doubles,
    "numpy, structures": numpy_structures,
    "numpy, dates": numpy_dates,
    "numpy, one number": lambda: np.zeros(()),
    "numpy, part of an array": part_of_an_array,
    "numpy, one-dimensional in Fortran's order": lambda: np.zeros(NBYTES // 4, np.int32, order="F"),
    "bytearray": lambda: bytearray(NBYTES),
    "one byte": lambda: bytearray(1),
    "array.array": lambda: array.array("H", bytes(NBYTES // 2 * 2)),
    "mmap, private": lambda: mmap.mmap(-1, 64 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS),
    "mmap, shared": lambda: mmap.mmap(-1, 64 * PAGE),
    "SharedMemory": lambda: SharedMemory(create=True, size=64 * PAGE),
    "ctypes array": ctypes.c_double * (NBYTES // 8),
    "ctypes structure": Structure,
    "memoryview": view_of_a_view,
    "BytesIO": lambda: io.BytesIO(bytes(NBYTES)).getbuffer(),
    "Memory": lambda: dirtytrack.allocate(NBYTES),
    "Memory, shared": lambda: dirtytrack.allocate(NBYTES, shared=True),
    "Memory, transparent": lambda: dirtytrack.allocate(NBYTES, huge="transparent"),
}


@contextmanager
def tracked(buffer: Any) -> Iterator[tuple[DirtyTracker, Region]]:
    """In a session of its own, with nothing pending."""
    with UffdSession() as session:
        region = session.register(buffer, blind_spots="accepted")
        with DirtyTracker(session) as tracker:
            tracker.collect()
            yield tracker, region
    if isinstance(buffer, SharedMemory):
        buffer.close()
        buffer.unlink()


def writable_bytes(buffer: Any) -> Any:
    """A view of the buffer's bytes, through which a user of it would write."""
    if isinstance(buffer, SharedMemory):
        return buffer.buf
    if isinstance(buffer, np.ndarray):
        return buffer.reshape(-1).view(np.uint8)
    return memoryview(buffer).cast("B")


def own_pages(region: Region) -> set[int]:
    """Pages that have no byte of anybody else, who may write meanwhile."""
    return {
        page
        for page in range(region.page_count)
        if region.address <= region.start + page * PAGE
        and region.start + (page + 1) * PAGE <= region.address + region.nbytes
    }


def assert_exact(found: set[int], wanted: set[int], region: Region) -> None:
    assert wanted <= found, "none is missing"
    assert (found - wanted) & own_pages(region) == set(), "and none that was not written"


@pytest.mark.parametrize("kind", BUFFERS)
def test_each_kind_of_buffer_is_tracked_to_the_page(kind: str) -> None:
    buffer = BUFFERS[kind]()
    view = writable_bytes(buffer)
    with tracked(buffer) as (tracker, region):
        assert region.nbytes == len(view)
        base = region.address
        places = {0, len(view) - 1, len(view) // 2, *range(PAGE - base % PAGE, len(view), 7 * PAGE)}
        for offset in sorted(places):
            view[offset] = 1
            assert_exact(set(tracker.collect().pages()), {(base + offset - region.start) // PAGE}, region)
        for offset in places:
            view[offset] = 2
        wanted = {(base + offset - region.start) // PAGE for offset in places}
        assert_exact(set(tracker.collect().pages()), wanted, region)
        assert_exact(set(tracker.collect().pages()), set(), region)
        assert region.page_count == max(wanted) + 1, "the last byte is in the last page"
        del view


@pytest.mark.parametrize("kind", BUFFERS)
def test_each_kind_of_buffer_is_mirrored(kind: str) -> None:
    buffer = BUFFERS[kind]()
    view = writable_bytes(buffer)
    with tracked(buffer) as (tracker, region):
        mirror = bytearray(bytes(view))
        for offset in range(0, len(view), 5 * PAGE + 17):
            view[offset] = offset % 251 + 1
        dirty = tracker.collect_into(mirror)
        assert mirror == bytes(view)
        assert dirty.nbytes <= region.nbytes
        del view


def test_a_mirror_is_looked_at_in_each_epoch() -> None:
    """One that was good once is not taken for good, though it be where it was."""
    memory = dirtytrack.allocate(64 * PAGE)
    array = np.zeros(64 * PAGE, np.uint8)
    square = array.reshape(64, PAGE)
    read_only = array.view()
    read_only.flags.writeable = False
    bad: list[Any] = [read_only, array[:-1], array.reshape(64, PAGE, order="F"), {"x": array}, memory, 5]
    with tracked(memory) as (tracker, _):
        for epoch in range(3):
            memory[epoch * PAGE] = 1
            assert tracker.collect_into(array).page_count == 1
            assert array.tobytes() == memory[:]
            memory[40 * PAGE] = 2
            for refused in bad:
                with pytest.raises(dirtytrack.InvalidMemory):
                    tracker.collect_into(refused)
            memory[41 * PAGE] = 3
            assert tracker.collect_into(square).page_count == 2
            assert array.tobytes() == memory[:]
        other = bytearray(memory)
        memory[7] = 4
        tracker.collect_into(other)
        assert other == memory[:]
        other.clear()  # nobody holds it between two collects


def test_a_raw_range_is_tracked_to_the_page() -> None:
    with oracle.mapped(16 * PAGE) as address, tracked((address + 100, 10 * PAGE)) as (tracker, region):
        assert (region.address, region.nbytes, region.page_count) == (address + 100, 10 * PAGE, 11)
        for page in (0, 10, 11):
            oracle.poke_bytes(address + page * PAGE, b"\1")
        assert list(tracker.collect().pages()) == [0, 10], "page 11 is not in it"


def test_a_released_view_is_refused() -> None:
    view = memoryview(bytearray(PAGE))
    view.release()
    with UffdSession() as session, pytest.raises(dirtytrack.InvalidMemory):
        session.register(view)


def test_buffers_that_were_closed_are_refused() -> None:
    plain = mmap.mmap(-1, PAGE)
    plain.close()
    memory = dirtytrack.allocate(PAGE)
    memory.close()
    shared = SharedMemory(create=True, size=PAGE)
    shared.close()
    with UffdSession() as session:
        for buffer in (plain, memory, shared):
            with pytest.raises(dirtytrack.InvalidMemory):
                session.register(buffer)
    shared.unlink()


def test_two_dimensions_in_fortrans_order_are_refused() -> None:
    buffers = np.zeros((8, 8), order="F"), np.zeros((4, 4, 4)).transpose(0, 2, 1), np.zeros((8, 8))[:, 3:4]
    with UffdSession() as session:
        for buffer in buffers:
            with pytest.raises(dirtytrack.InvalidMemory, match=r"C-contiguous.*ascontiguousarray"):
                session.register(buffer)


# ---- whose bytes are whose ------------------------------------------------------------------------------------------

ARENA = 12 * PAGE


def numbers(view: memoryview) -> Any:
    """As lists of lists, which type checkers do not expect of a memoryview."""
    return view.tolist()


offsets = st.one_of(st.integers(0, ARENA - 1), st.sampled_from((0, 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE)))
lengths = st.one_of(st.integers(1, ARENA), st.sampled_from((1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE)))


@settings(max_examples=120)
@given(offsets, lengths, st.lists(st.tuples(offsets, st.integers(1, 2 * PAGE)), max_size=6), st.booleans())
def test_answers_in_bytes_are_clipped_to_the_buffer(
    offset: int, length: int, writes: list[tuple[int, int]], raw: bool
) -> None:
    arena = dirtytrack.allocate(ARENA)
    content = np.frombuffer(arena, np.uint8)
    content[:] = 0xEE
    length = min(length, ARENA - offset)
    buffer: Any = (arena.address + offset, length) if raw else memoryview(arena)[offset : offset + length]
    with UffdSession() as session:
        region = session.register(buffer, name="mine")
        with DirtyTracker(session) as tracker:
            tracker.collect()
            mirror = bytearray(content[offset : offset + length])
            spare = bytearray(mirror)
            touched = set[int]()
            for at, nbytes in writes:
                content[at : at + nbytes] = (content[at : at + nbytes] + 1) & 0xFF
                touched.update(range(at // PAGE, -(-min(at + nbytes, ARENA) // PAGE)))
            first, last = offset // PAGE, -(-(offset + length) // PAGE)
            dirty = tracker.collect_into(mirror)
            pages = sorted(touched & set(range(first, last)))
            assert [page + first for page in dirty.pages()] == pages, "boundary pages are tracked"
            assert bytes(mirror) == content[offset : offset + length].tobytes()

            # What the answers may have: the bytes of these pages that are the buffer's own.
            own = np.zeros(ARENA, bool)
            for page in pages:
                own[page * PAGE : (page + 1) * PAGE] = True
            own[:offset] = own[offset + length :] = False
            assert dirty.nbytes == own.sum()
            told = np.zeros(ARENA, bool)
            for start, end in numbers(dirty.offsets()):
                assert not told[offset + start : offset + end].any(), "each byte once"
                told[offset + start : offset + end] = True
            assert (told == own).all()
            assert bytes(dirty.gather()) == content[own].tobytes()
            dirty.copy_to(spare)
            assert spare == mirror
            if pages:
                spare[max(0, pages[0] * PAGE - offset)] ^= 1
                assert dirty.changed(spare).page_count == 1

            before = content.copy()
            dirty.scatter(bytes(int(own.sum())))
            assert not content[own].any(), "written"
            assert (content[~own] == before[~own]).all(), "and not one byte of anybody else"
            again = tracker.collect()
            assert again == dirty, "what is scattered is dirty again"
            assert region.nbytes == length


def test_neighbours_on_one_page_have_their_own_bytes() -> None:
    arena = dirtytrack.allocate(4 * PAGE)
    view = memoryview(arena)
    cuts = {"a": (0, PAGE + 100), "b": (PAGE + 100, PAGE + 300), "c": (PAGE + 300, 3 * PAGE + 5)}
    with UffdSession() as session:
        regions = {name: session.register(view[start:end], name=name) for name, (start, end) in cuts.items()}
        with DirtyTracker(session) as tracker:
            tracker.collect()
            mirrors = {name: bytearray(end - start) for name, (start, end) in cuts.items()}
            arena[PAGE + 150] = 7
            dirty = tracker.collect_into(mirrors)
            assert dirty.page_count == 1, "they share the page"
            assert dirty.nbytes == PAGE
            assert mirrors == {name: bytearray(view[start:end]) for name, (start, end) in cuts.items()}
            assert {name: dirty.in_region(region).nbytes for name, region in regions.items()} == {
                "a": 100,
                "b": 200,
                "c": PAGE - 300,
            }
            assert numbers(dirty.offsets("a")) == [[PAGE, PAGE + 100]]
            assert numbers(dirty.offsets("b")) == [[0, 200]]
            dirty.in_region("b").scatter(bytes(200))
            assert arena[PAGE + 150] == 0
            arena[PAGE + 99] = arena[PAGE + 300] = 9
            assert bytes(tracker.collect().in_region("b").gather()) == bytes(200)


# ---- the kernel writes ----------------------------------------------------------------------------------------------

FIRST, COUNT = 3, 3 * PAGE  # from the middle of page 3 into page 6


def by_read(view: memoryview) -> None:
    with open("/dev/zero", "rb", buffering=0) as source:
        assert source.readinto(view) == len(view)


def by_pread(view: memoryview) -> None:
    fd = os.memfd_create("source")
    os.pwrite(fd, bytes(len(view)), 5)
    assert os.preadv(fd, [view], 5) == len(view)
    os.close(fd)


def by_readv(view: memoryview) -> None:
    """In pieces, the last page's first."""
    middle = len(view) // 2
    with open("/dev/zero", "rb", buffering=0) as source:
        assert os.readv(source.fileno(), [view[middle:], view[:middle]]) == len(view)


def by_pipe(view: memoryview) -> None:
    source, sink = os.pipe()
    os.write(sink, bytes(len(view)))
    assert os.readv(source, [view]) == len(view)
    os.close(source)
    os.close(sink)


def by_recv(view: memoryview) -> None:
    here, there = socket.socketpair()
    with here, there:
        there.sendall(bytes(len(view)))
        assert here.recv_into(view, len(view), socket.MSG_WAITALL) == len(view)


def by_recvmsg(view: memoryview) -> None:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with here, there:
        there.send(bytes(len(view)))
        assert here.recvmsg_into([view])[0] == len(view)


def by_process_vm_writev(view: memoryview) -> None:
    oracle.write_process(os.getpid(), oracle.address_of(view), bytes(len(view)))


def by_proc_mem(view: memoryview) -> None:
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        memory.seek(oracle.address_of(view))
        assert memory.write(bytes(len(view))) == len(view)


def by_getrandom(view: memoryview) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    at, left = oracle.address_of(view), len(view)
    while left:
        done = libc.getrandom(ctypes.c_void_p(at), ctypes.c_size_t(left), 0)
        assert done > 0
        at, left = at + done, left - done


KERNEL_WRITES = (
    by_read,
    by_pread,
    by_readv,
    by_pipe,
    by_recv,
    by_recvmsg,
    by_process_vm_writev,
    by_proc_mem,
    by_getrandom,
)


@kinds
@pytest.mark.parametrize("write", KERNEL_WRITES)
def test_what_the_kernel_writes_is_seen(kind: Kind, write: Callable[[memoryview], None]) -> None:
    memory = allocate(16 * PAGE, kind)
    begin = FIRST * PAGE + PAGE // 2
    for populated in (False, True):
        if populated:
            memory[:] = bytes([0xEE]) * memory.nbytes
        with tracked(memory) as (tracker, region):
            write(memoryview(memory)[begin : begin + COUNT])
            found = set(tracker.collect().pages())
            wanted = {3, 4, 5, 6}
            assert wanted <= found
            if region.granule_bytes == PAGE and not (memory.huge and not populated):
                assert found == wanted
            assert not tracker.collect()
            if populated:
                assert memory[begin - 1] == memory[begin + COUNT] == 0xEE


def test_a_short_read_is_seen_as_far_as_it_went() -> None:
    memory = dirtytrack.allocate(16 * PAGE)
    source, sink = os.pipe()
    with tracked(memory) as (tracker, _):
        os.write(sink, bytes(2 * PAGE + 1))
        assert os.readv(source, [memory]) == 2 * PAGE + 1
        assert {0, 1, 2} <= set(tracker.collect().pages()) <= {0, 1, 2, 3}
        memory[9 * PAGE] = 1
        assert list(tracker.collect().pages()) == [9]
    os.close(source)
    os.close(sink)

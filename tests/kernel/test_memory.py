# SPDX-License-Identifier: MIT
"""What `allocate` makes: sizes, places and names, the buffer protocol, and how each kind is shared and let go of.

What it refuses is in failures/, how it is tracked in test_buffers.py. Takes about 1 s of CI's 20 min.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

import dirtytrack
from dirtytrack import DirtyTracker, Memory, UffdSession
from dirtytrack.kernel.mappings import thp_bytes
from tests import oracle
from tests.oracle import PAGE
from tests.strategies import Kind

kinds = pytest.mark.parametrize("kind", Kind)


def allocate(nbytes: int, kind: Kind, name: str | None = None) -> Memory:
    shared, huge = kind.value
    return dirtytrack.allocate(nbytes, shared=shared, huge=huge, name=name)


def mapping_of(address: int) -> str:
    """The line of /proc/self/maps that has it, or nothing."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            return line
    return ""


# ---- allocate -------------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("nbytes", [1, PAGE - 1, PAGE, PAGE + 1, (2 << 20) - 1, (2 << 20) + 1])
def test_rounded_up_aligned_and_zeroed(kind: Kind, nbytes: int) -> None:
    memory = allocate(nbytes, kind)
    shared, huge = kind.value
    page_bytes = thp_bytes() if huge else PAGE
    assert memory.page_bytes == page_bytes
    assert memory.nbytes == len(memory) == -(-nbytes // page_bytes) * page_bytes
    assert memory.address == oracle.address_of(memory)
    assert memory.address % page_bytes == 0
    assert memory[:] == bytes(memory.nbytes)
    assert (memory.shared, memory.huge, memory.name) == (shared, huge, None)
    rights, device = mapping_of(memory.address).split()[1:4:2]
    assert rights == ("rw-s" if shared else "rw-p")
    assert (device == "00:00") == (not shared), "private memory is of no file"


@pytest.mark.parametrize("nbytes", [np.int32(5), True])
def test_a_number_is_whatever_counts(nbytes: int) -> None:
    assert dirtytrack.allocate(nbytes).nbytes == PAGE


@pytest.mark.parametrize("shared", [False, True])
def test_many_at_once_are_all_aligned(shared: bool) -> None:
    """The kernel aligns large mappings by itself, but not each of them: between others, and of odd sizes."""
    kept: list[Any] = []
    for i in range(40):
        kept.append(mmap.mmap(-1, (i % 7 + 1) * PAGE))
        memory = dirtytrack.allocate(1 + (i % 3) * (2 << 20), huge="transparent", shared=shared)
        assert memory.address % memory.page_bytes == 0
        assert "hg" in vm_flags(memory.address), "and asks for huge pages"
        kept.append(memory)


@pytest.mark.parametrize("huge", [None, "transparent"])
def test_a_sparse_one_may_be_larger_than_the_machine(huge: Literal["transparent"] | None) -> None:
    total = os.sysconf("SC_PHYS_PAGES") * PAGE
    nbytes = 4 * total
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "0":
        with pytest.raises(dirtytrack.LimitReached, match=r"sparse=True"):
            dirtytrack.allocate(nbytes, huge=huge)
    memory = dirtytrack.allocate(nbytes, huge=huge, sparse=True, name="reservation")
    assert memory.nbytes == len(memory) >= nbytes
    assert memory.address % memory.page_bytes == 0
    assert "nr" in vm_flags(memory.address)
    for at in (0, total, memory.nbytes - 1):
        memory[at] = 7
        assert memory[at] == 7
    memory.discard(0, PAGE if huge is None else memory.page_bytes)
    assert memory[0] == 0
    with pytest.raises(dirtytrack.LimitReached) as caught:
        dirtytrack.allocate(1 << 62, sparse=True)
    assert "sparse" not in str(caught.value), "nobody is told to do what was done"
    memory.resize(2 * memory.nbytes)
    assert memory[total] == 7
    assert "nr" in vm_flags(memory.address)


def test_a_sparse_one_of_shared_memory() -> None:
    memory = dirtytrack.allocate(64 << 30, shared=True, sparse=True)
    memory[63 << 30] = 1
    assert memory[63 << 30] == 1


def vm_flags(address: int) -> list[str]:
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        word = line.split()[0]
        if "-" in word and not word.endswith(":"):
            start, end = (int(part, 16) for part in word.split("-"))
            here = start <= address < end
        elif here and word == "VmFlags:":
            return line.split()[1:]
    raise AssertionError("not mapped")


def kernel_names_anonymous_memory() -> bool:
    """Asked of the kernel, beside the library."""
    with oracle.mapped(PAGE) as address:
        name = ctypes.create_string_buffer(b"asked")
        oracle._libc.prctl(0x53564D41, 0, address, PAGE, ctypes.addressof(name))
        return mapping_of(address).endswith("[anon:asked]")


@kinds
def test_the_name_is_shown_in_proc_maps(kind: Kind) -> None:
    memory = allocate(3 * PAGE, kind, name="my-table")
    assert memory.name == "my-table"
    line = mapping_of(memory.address)
    if memory.shared:
        assert line.endswith("/memfd:my-table (deleted)")
    else:
        assert line.endswith("[anon:my-table]") == kernel_names_anonymous_memory()
    with UffdSession() as session:
        assert session.register(memory, blind_spots="accepted").name == "my-table"


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", ["", "two words", "[brackets]\\", "größe", "x" * 1000, "é" * 1000, "\n"])
def test_a_name_of_any_letters(shared: bool, name: str) -> None:
    memory = dirtytrack.allocate(PAGE, shared=shared, name=name)
    assert memory.name == name, "whole, whatever the kernel can show"
    shown = mapping_of(memory.address)
    if name == "x" * 1000 and (shared or kernel_names_anonymous_memory()):
        assert "x" * 79 in shown
    assert mapping_of(memory.address)


@pytest.mark.parametrize("name", ["nul\0", "\udcff"])
def test_a_name_that_a_file_cannot_have(name: str) -> None:
    assert dirtytrack.allocate(PAGE, shared=True, name=name).name == name


@kinds
def test_the_buffer_protocol(kind: Kind) -> None:
    memory = allocate(2 * PAGE, kind)
    assert isinstance(memory, mmap.mmap)
    view = memoryview(memory)
    assert (view.format, view.itemsize, view.ndim, view.readonly, view.c_contiguous) == ("B", 1, 1, False, True)
    assert view.nbytes == memory.nbytes
    memory[1:5] = b"abcd"
    memory[-1] = 255
    assert (memory[1], memory[0:6], memory[-1]) == (ord("a"), b"\0abcd\0", 255)
    assert memory[1:5:2] == b"ac"
    numbers = np.frombuffer(memory, np.uint32)
    numbers[1] = 0x01020304
    assert memory[4:8] == (0x01020304).to_bytes(4, "little")
    assert bytes(view[:2]) == b"\0a"
    with pytest.raises((ValueError, IndexError)):
        memory[0:4] = b"longer than that"
    with pytest.raises(IndexError):
        memory[memory.nbytes]


@kinds
def test_closing_waits_for_whoever_holds_it(kind: Kind) -> None:
    memory = allocate(PAGE, kind)
    address = memory.address
    view = memoryview(memory)
    with pytest.raises(BufferError):
        memory.close()
    view[0] = 1
    assert memory[0] == 1, "it is as it was"
    if memory.shared:
        os.fstat(memory.fileno())
    view.release()
    memory.close()
    memory.close()
    assert memory.closed
    assert not mapping_of(address)
    with pytest.raises(ValueError, match="closed"):
        memory[0]


@kinds
def test_the_last_reference_frees_it(kind: Kind) -> None:
    gc.collect()
    before = set(Path("/proc/self/fd").iterdir())
    memory = allocate(PAGE, kind)
    view, address = memoryview(memory), memory.address
    del memory
    gc.collect()
    view[0] = 1
    assert mapping_of(address), "a view keeps it"
    view.release()
    del view
    gc.collect()
    assert not mapping_of(address)
    assert set(Path("/proc/self/fd").iterdir()) == before


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_leaving_a_with_closes_the_descriptor_too() -> None:
    with dirtytrack.allocate(PAGE, shared=True) as memory:
        fd = memory.fileno()
    assert memory.closed
    assert not is_open(fd)


@kinds
@pytest.mark.parametrize("pages", [64, 4096])
def test_trackers_go_on_when_memory_grows(kind: Kind, pages: int) -> None:
    memory = allocate(4 * PAGE, kind)
    memory[PAGE] = 5
    with dirtytrack.track({"m": memory}, blind_spots="accepted") as tracker:
        (before,) = tracker.regions
        neighbour = mmap.mmap(-1, PAGE)  # whether it can grow in its place is the kernel's to say
        unit = memory.page_bytes
        memory.resize(pages * unit)
        (region,) = tracker.regions
        assert (
            (memory.nbytes, memory.address)
            == (len(memory), oracle.address_of(memory))
            == (pages * unit, region.address)
        )
        assert (region.name, region.nbytes) == ("m", pages * unit)
        assert not before.registered
        assert memory[PAGE] == 5, "its bytes went along"
        assert tracker.collect().nbytes == pages * unit, "nobody knows what happened meanwhile"
        assert not tracker.collect()
        memory[(pages - 1) * unit] = 1
        assert memory.address + (pages - 1) * unit in tracker.collect()
        neighbour.close()
    assert not region.registered


def test_trackers_go_on_when_memory_shrinks() -> None:
    memory = dirtytrack.allocate(64 * PAGE)
    with UffdSession() as session:
        session.register(memory, name="mine")
        tracker, idle = DirtyTracker(session), DirtyTracker(session)
        tracker.start()
        memory.resize(8 * PAGE)
        assert [region.nbytes for region in session.regions] == [8 * PAGE]
        idle.start()
        assert tracker.collect().page_count == 8
        memory[7 * PAGE] = 1
        assert list(tracker.collect().pages()) == list(idle.collect().pages()) == [7]


@kinds
def test_every_tracker_knows_of_a_discard_though_it_is_read_again(kind: Kind) -> None:
    memory = allocate(8 * PAGE, kind)
    memory[:] = b"x" * memory.nbytes
    with UffdSession() as session:
        region = session.register(memory, blind_spots="accepted")
        tracker = DirtyTracker(session)
        tracker.start()
        assert not tracker.collect()
        mirror = bytearray(memory)
        memory.discard(2 * PAGE, 3 * PAGE)
        assert memory[2 * PAGE : 6 * PAGE] == bytes(3 * PAGE) + b"x" * PAGE, "read, so that it is there again"
        assert {2, 3, 4} <= set(tracker.collect_into(mirror).pages(region))
        assert mirror == memory[:]
        memory.discard()
        assert memory[:1] == b"\0"
        assert tracker.collect_into(mirror).page_count == memory.nbytes // PAGE
        assert mirror == bytes(memory.nbytes)


def test_shared_memory_is_sealed_and_can_be_mapped_by_others() -> None:
    memory = dirtytrack.allocate(4 * PAGE, shared=True)
    fd = memory.fileno()
    assert not os.get_inheritable(fd)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, PAGE)
    with mmap.mmap(fd, memory.nbytes) as other:
        other[PAGE] = 7
        assert memory[PAGE] == 7
        memory[0] = 9
        assert other[0] == 9
    assert memory.fileno() == fd, "it stays this object's"
    memory.close()
    assert not is_open(fd)


def test_closed_shared_memory_is_not_called_private() -> None:
    memory = dirtytrack.allocate(PAGE, shared=True)
    memory.close()
    with pytest.raises((ValueError, dirtytrack.InvalidMemory), match="closed"):
        memory.fileno()


@kinds
def test_what_a_forked_child_writes(kind: Kind) -> None:
    memory = allocate(PAGE, kind)
    child = os.fork()
    if not child:
        memory[0] = 7
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert memory[0] == (7 if memory.shared else 0)


def test_repr() -> None:
    private = dirtytrack.allocate(5)
    assert repr(private) == f"<Memory of {PAGE} bytes at {private.address:#x}>"
    shared = dirtytrack.allocate(5, shared=True, name="it's")
    assert repr(shared) == f'<shared Memory "it\'s" of {PAGE} bytes at {shared.address:#x}>'

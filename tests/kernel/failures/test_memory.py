# SPDX-License-Identifier: MIT
"""Memory that cannot be had, held or registered, and what is no memory at all. Takes under 1 s of CI's 20 min."""

from __future__ import annotations

import errno
import mmap
from pathlib import Path

import numpy as np
import pytest

import dirtytrack
from dirtytrack import DirtyTracker, Memory, UffdSession
from dirtytrack.kernel import mappings
from tests import oracle
from tests.kernel.failures.world import PAGES, World, assert_finds_a_write, map_raw, unmap, write
from tests.oracle import PAGE

GUARD_INSTALL = 102


@pytest.mark.parametrize("nbytes", [0, -1, "4096", 1.5, None])
def test_allocate_no_number_of_bytes(nbytes: object) -> None:
    with pytest.raises(dirtytrack.InvalidMemory, match="number of bytes"):
        dirtytrack.allocate(nbytes)  # type: ignore[arg-type]


@pytest.mark.parametrize("huge", ["4K", "2m", True])
def test_allocate_a_kind_that_is_not_there(huge: object) -> None:
    with pytest.raises(dirtytrack.InvalidMemory, match="huge"):
        dirtytrack.allocate(PAGE, huge=huge)  # type: ignore[arg-type]


@pytest.mark.parametrize("shared", [False, True])
def test_allocate_sparse_huge_pages_of_the_pool(shared: bool) -> None:
    with pytest.raises(dirtytrack.InvalidMemory, match="leave out sparse="):
        dirtytrack.allocate(PAGE, huge="2M", sparse=True, shared=shared)


def test_a_kernel_without_transparent_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(self: Memory, advice: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(Memory, "madvise", refuses)
    with pytest.raises(dirtytrack.UnsupportedKernel, match="Leave out huge=") as caught:
        dirtytrack.allocate(PAGE, huge="transparent")
    assert caught.value.errno == errno.EINVAL
    monkeypatch.setattr(mappings, "_THP_SIZE", "/proc/there/is/none")
    with pytest.raises(dirtytrack.UnsupportedKernel, match="CONFIG_TRANSPARENT_HUGEPAGE") as caught:
        dirtytrack.allocate(PAGE, huge="transparent")
    assert caught.value.feature == "transparent huge pages"


def test_huge_pages_where_sys_is_not_mounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can tell whether this kernel has any, and how large they are."""
    monkeypatch.setattr(mappings, "_MEMORY_MANAGEMENT", "/proc/there/is/none")
    monkeypatch.setattr(mappings, "_THP_SIZE", "/proc/there/is/none")
    monkeypatch.setattr("dirtytrack.memory._pool", lambda _page_bytes: Path("/proc/there/is/none"))
    for huge, feature in (("transparent", "transparent huge pages"), ("2M", "hugetlb")):
        with pytest.raises(dirtytrack.UnsupportedKernel, match="/sys is not mounted here") as caught:
            dirtytrack.allocate(PAGE, huge=huge)  # type: ignore[arg-type]
        assert caught.value.feature == feature


def test_private_memory_has_no_descriptor(world: World) -> None:
    with pytest.raises(dirtytrack.InvalidMemory, match="shared=True"):
        world.memory.fileno()


def test_the_pool_of_huge_pages_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    for shared in (False, True):
        with pytest.raises(dirtytrack.LimitReached, match="nr_hugepages") as caught:
            dirtytrack.allocate(1 << 46, huge="2M", shared=shared)
        assert caught.value.errno == errno.ENOMEM
        assert caught.value.feature == "vm.nr_hugepages"
    monkeypatch.setattr("dirtytrack.memory._pool", lambda _: Path("/proc/there/is/none"))
    with pytest.raises(dirtytrack.UnsupportedKernel, match="no huge pages of 1G") as unsupported:
        dirtytrack.allocate(PAGE, huge="1G")
    assert unsupported.value.feature == "hugetlb"


@pytest.mark.parametrize(("offset", "nbytes"), [(1, PAGE), (0, 1), (-PAGE, PAGE), (0, (PAGES + 1) * PAGE), (0, -PAGE)])
def test_discarding_what_is_no_whole_pages(world: World, offset: int, nbytes: int) -> None:
    with pytest.raises(dirtytrack.InvalidMemory, match="whole pages"):
        world.memory.discard(offset, nbytes)
    assert not world.tracker.collect()


def test_resizing_to_what_cannot_be(world: World) -> None:
    for nbytes in (0, -1, "many"):
        with pytest.raises(dirtytrack.InvalidMemory, match="number of bytes"):
            world.memory.resize(nbytes)  # type: ignore[arg-type]
    assert not world.tracker.collect()
    with dirtytrack.allocate(2 * PAGE, shared=True) as shared:
        with pytest.raises(dirtytrack.InvalidMemory, match="does not shrink"):
            shared.resize(PAGE)
        assert len(shared) == 2 * PAGE


def test_resizing_memory_that_something_holds(world: World) -> None:
    write(world.memory, 3)
    array = np.frombuffer(world.memory, np.uint8)
    with pytest.raises(dirtytrack.InvalidMemory, match="holds it"):
        world.memory.resize(2 * PAGES * PAGE)
    assert array.nbytes == len(world.memory) == PAGES * PAGE
    assert world.tracker.collect().page_count == PAGES, "all of it counts as dirty"
    (world.region,) = world.tracker.regions


def refused(world: World, memory: object, match: str, **options: object) -> dirtytrack.InvalidMemory:
    """By each of the three ways in."""
    session, tracker = world.session, world.tracker
    known = session.regions, tracker.regions
    with pytest.raises(dirtytrack.InvalidMemory, match=match):
        tracker.add(memory, **options)  # type: ignore[arg-type]
    with pytest.raises(dirtytrack.InvalidMemory, match=match):
        dirtytrack.track(memory, session=session, **options)  # type: ignore[arg-type]
    with pytest.raises(dirtytrack.InvalidMemory, match=match) as caught:
        session.register(memory, **options)  # type: ignore[arg-type]
    assert (session.regions, tracker.regions) == known
    return caught.value


def test_register_a_read_only_buffer(world: World) -> None:
    array = np.zeros(PAGE, np.uint8)
    array.flags.writeable = False
    for memory in (bytes(PAGE), array, memoryview(bytearray(PAGE)).toreadonly()):
        refused(world, memory, "read-only")


def test_register_a_strided_array(world: World) -> None:
    array = np.zeros((64, 64))
    for memory in (array[:, ::2], array.T, array[::-1], memoryview(bytearray(PAGE))[::2]):
        refused(world, memory, "not C-contiguous")


def test_register_nothing(world: World) -> None:
    for memory in (bytearray(), np.zeros((0, 8)), (world.region.address, 0)):
        refused(world, memory, "empty")


def test_register_what_is_no_buffer(world: World) -> None:
    for memory in ("text", object(), 4096, None, [1, 2]):
        refused(world, memory, "no buffer protocol")


def test_register_what_was_closed(world: World) -> None:
    view, mapped, times = memoryview(bytearray(PAGE)), mmap.mmap(-1, PAGE), np.zeros(0, "M8[s]")
    view.release()
    mapped.close()
    refused(world, view, "cannot be used.*released")
    refused(world, mapped, "cannot be used.*closed")
    refused(world, times, "empty")


def test_register_what_is_no_range(world: World) -> None:
    for memory in ((0x1000,), ("a", 1), (1.5, 2), (0x1000, 1, 2)):
        refused(world, memory, r"\(address, nbytes\) pair")
    for memory in ((-PAGE, PAGE), (PAGE, -1), ((1 << 64) - PAGE, 2 * PAGE), (1 << 64, 1)):
        refused(world, memory, "address space")


def test_register_what_is_not_mapped(world: World) -> None:
    address = map_raw(4)
    unmap(address + 2 * PAGE, 1)
    for first, pages in ((2, 1), (0, 4), (1, 2)):
        error = refused(world, (address + first * PAGE, pages * PAGE), "nothing is mapped")
        assert error.start == address + 2 * PAGE
    refused(world, ((1 << 63) + PAGE, PAGE), "nothing is mapped")
    unmap(address, 2)
    unmap(address + 3 * PAGE, 1)


def special_mapping() -> tuple[int, int]:
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith("[vvar]"):
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            return start, end - start
    raise AssertionError("this process has no vvar")


def test_register_a_mapping_that_the_kernel_refuses(world: World) -> None:
    refused(world, special_mapping(), r"\[vvar\]")


def test_register_a_read_only_file_mapping(world: World, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(2 * PAGE))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 2 * PAGE, prot=mmap.PROT_READ) as mapped:
        address = np.frombuffer(mapped, np.uint8).ctypes.data
        error = refused(world, (address, 2 * PAGE), "read-only", blind_spots="accepted")
    assert error.errno == errno.EPERM


def test_register_memory_of_another_userfaultfd(world: World) -> None:
    with UffdSession() as other:
        for call in (other.register, lambda memory: dirtytrack.track(memory, session=other)):
            with pytest.raises(dirtytrack.RangeBusy, match="another userfaultfd") as caught:
                call(world.memory)
            assert caught.value.errno == errno.EBUSY
            assert (caught.value.start, caught.value.end) == (world.region.start, world.region.end)
        assert not other.regions
        write(world.memory, 3)
        assert list(world.tracker.collect().pages(world.region)) == [3]
        world.tracker.stop()
        world.session.unregister(world.region)
        with DirtyTracker(other, [other.register(world.memory)]) as tracker:
            assert_finds_a_write(tracker)
        other.close()
    world.region = world.session.register(world.memory)


def test_register_with_options_that_there_are_not(world: World) -> None:
    for options in ({"arm": "some"}, {"arm": ""}, {"blind_spots": "unknown"}):
        with pytest.raises(dirtytrack.InvalidMemory, match=next(iter(options))):
            world.session.register(bytearray(PAGE), **options)  # type: ignore[arg-type]


def test_register_as_present_what_is_not_private(world: World) -> None:
    shared = dirtytrack.allocate(4 * PAGE, shared=True)
    with pytest.raises(dirtytrack.InvalidMemory, match="private anonymous") as caught:
        world.session.register(shared, arm="present", blind_spots="accepted")
    assert caught.value.start == shared.address
    assert world.session.regions == (world.region,)


def test_memory_that_others_may_write(world: World) -> None:
    shared = dirtytrack.allocate(4 * PAGE, shared=True)
    with pytest.raises(dirtytrack.BlindSpotWarning, match="mark_dirty"):
        world.session.register(shared, strict=True)
    with pytest.warns(dirtytrack.BlindSpotWarning, match="mark_dirty"):
        region = world.session.register(shared)
    assert region.blind_spots
    world.session.unregister(region)


def test_memory_with_guard_pages(world: World) -> None:
    """Only told of where there may be a hang: files and shared memory. Nothing is armed here."""
    shared, private = dirtytrack.allocate(4 * PAGE, shared=True), dirtytrack.allocate(4 * PAGE)
    if not dirtytrack.probe().categories & dirtytrack.PageCategory.GUARD:  # nor has this kernel the call
        world.session.register(shared, blind_spots="accepted")
        return
    for memory in (shared, private):
        oracle.discard(oracle.address_of(memory) + PAGE, 2 * PAGE, GUARD_INSTALL)
    world.session.register(private, strict=True)
    before = len(world.session.regions)
    with pytest.raises(dirtytrack.GuardPageWarning, match="MADV_GUARD_INSTALL"):
        world.session.register(shared, blind_spots="accepted", strict=True)
    assert len(world.session.regions) == before
    with pytest.warns(dirtytrack.GuardPageWarning, match=", 2 of them,"):
        world.session.register(shared, blind_spots="accepted")


def test_track_nothing() -> None:
    with pytest.raises(dirtytrack.InvalidMemory, match="at least one"):
        dirtytrack.track()
    with pytest.raises(dirtytrack.InvalidMemory, match="at least one"):
        dirtytrack.track({})


def test_track_several_under_one_name() -> None:
    with pytest.raises(dirtytrack.InvalidMemory, match="name="):
        dirtytrack.track(bytearray(PAGE), bytearray(PAGE), name="both")


def test_declare_what_is_no_memory(world: World) -> None:
    for memory in ("text", None, object(), (0x1000,), (0, 0), dirtytrack.Run(8192, 4096), dirtytrack.Run(0, 0)):
        with pytest.raises(dirtytrack.InvalidMemory):
            world.session.mark_dirty(memory)  # type: ignore[arg-type]
        with pytest.raises(dirtytrack.InvalidMemory):
            world.session.in_flight(memory)  # type: ignore[arg-type]
    assert not world.tracker.collect()


def test_closing_memory_that_is_registered(world: World) -> None:
    with pytest.raises(BufferError):
        world.memory.close()


def test_resizing_a_buffer_that_is_registered(world: World) -> None:
    buffer = bytearray(2 * PAGE)
    region = world.session.register(buffer)
    with pytest.raises(BufferError):
        buffer.append(1)
    world.session.unregister(region)
    buffer.append(1)


def test_resume_while_somebody_else_has_the_memory(world: World) -> None:
    world.session.suspend()
    with UffdSession() as other:
        other.register(world.memory)
        with pytest.raises(dirtytrack.RangeBusy) as caught:
            world.session.resume()
        assert caught.value.errno == errno.EBUSY
        assert world.session.fileno() == -1
        assert world.tracker.collect().page_count == PAGES
    world.session.resume()
    assert world.tracker.collect().page_count == PAGES

# SPDX-License-Identifier: MIT
"""What nobody can see: each write that the exact scan misses really is missed, and what the documents advise helps.

The first half asks the kernel alone, by the oracle: should a row fail one day, that kernel sees such writes, and the
blind spot can be taken back. The second asks trackers: `mark_dirty`, `in_flight`, arming every mapping. The third is
of misuse: ways to lose what is pending, which the library never takes. Takes about 1 s of CI's 20 min.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from dirtytrack import DirtyTracker, UffdSession
from tests import oracle
from tests.kernel import pressure
from tests.kernel.kinds import KINDS, Area, Kind, some
from tests.kernel.ring import Ring
from tests.kernel.watched import Watched
from tests.kernel.ways import (
    BENEATH,
    DISCARDS,
    NEW,
    PRIVATE_FILES,
    SHARED_FILES,
    UNDECLARED,
    UNIT,
    Way,
    alias_of,
    discard,
    punch,
    rows,
    truncate_and_grow,
    write_to_file,
)
from tests.oracle import PAGE

# ---- the kernel alone -----------------------------------------------------------------------------------------------


def assert_missed(area: Area, way: Way) -> list[int]:
    """Armed with content, changed, and not in the exact scan; returns the categories of unit 3's first page."""
    area.fill(3)
    with oracle.userfaultfd() as uffd:
        oracle.register(uffd, area.address, area.end)
        oracle.arm(uffd, area.address, area.end)
        before = area.content()
        way(area)
        state = oracle.categories(area.at(UNIT), area.at(UNIT) + PAGE)
        found = oracle.exact(area.address, area.end)
        assert area.content()[UNIT] != before[UNIT], "it was changed"
        assert not found, "this kernel sees it: it is no blind spot any more"
    return state


@rows(UNDECLARED)
def test_the_exact_scan_misses_what_another_way_wrote(kind: Kind, way: Way, area: Area) -> None:
    assert_missed(area, way)


@pytest.mark.parametrize("kind", some(*PRIVATE_FILES), ids=str)
@pytest.mark.parametrize("way", BENEATH)
def test_the_exact_scan_misses_a_change_of_the_file_beneath_a_private_page(area: Area, way: str) -> None:
    area.load(UNIT)
    with oracle.userfaultfd() as uffd:
        oracle.register(uffd, area.address, area.end)
        oracle.arm(uffd, area.address, area.end)
        area.store(UNIT + 1)  # a copy, which is nobody else's
        os.pwrite(area.fd, b"\x99" * PAGE, (UNIT + 1) * PAGE)
        BENEATH[way](area)
        assert area.load(UNIT) != b"\1"
        assert area.load(UNIT + 1) == b"\7"
        assert oracle.exact(area.address, area.end) == {UNIT + 1}


@rows(DISCARDS)
def test_the_exact_scan_misses_a_discard(kind: Kind, way: Way, area: Area) -> None:
    [state] = assert_missed(area, way)
    assert not state & (oracle.PRESENT | oracle.WRITTEN)
    assert state & oracle.SWAPPED, "the marker of the armed page is still there: so R1 does not help, and R2 does"


@pytest.mark.parametrize("kind", some(*SHARED_FILES, "hugetlb memfd"), ids=str)
def test_of_two_pages_in_a_hole_the_one_that_is_stored_to_is_seen(area: Area) -> None:
    area.fill(3)
    with oracle.userfaultfd() as uffd:
        oracle.register(uffd, area.address, area.end)
        oracle.arm(uffd, area.address, area.end)
        punch(area, 2)
        area.store(UNIT)
        assert area.of_pages(oracle.exact(area.address, area.end)) == {UNIT}


@pytest.mark.parametrize(
    ("kind", "way"),
    [(*some("hugetlb private"), discard), (*some("hugetlb memfd"), truncate_and_grow)],
    ids=["discarded", "truncated"],
)
@pytest.mark.parametrize("dirty", [True, False])
def test_a_huge_page_that_is_gone_without_a_marker(kind: Kind, way: Way, dirty: bool, area: Area) -> None:
    """Neither written nor present nor swapped: remedy R1 asks for that. Discarded while armed, a marker stays."""
    area.fill(3)
    with oracle.userfaultfd() as uffd:
        oracle.register(uffd, area.address, area.end)
        oracle.arm(uffd, area.address, area.end)
        if dirty:
            area.store(UNIT)
        way(area)
        [state] = oracle.categories(area.at(UNIT), area.at(UNIT) + PAGE)
        assert area.of_pages(oracle.exact(area.address, area.end)) == set()
        assert not state & (oracle.WRITTEN | oracle.PRESENT)
        assert bool(state & oracle.SWAPPED) == (way is discard and not dirty)


def test_a_hole_where_a_page_was_swapped_out(tmp_path: Path) -> None:
    """Armed and out, punched: the marker is the same as before."""
    [kind] = some("memfd shared")
    with pressure.swap(tmp_path, 512), kind.map(8, tmp_path) as area:

        def page_out_and_punch(area: Area) -> None:
            pressure.swap_out(area, range(area.units))
            [before] = oracle.categories(area.at(UNIT), area.at(UNIT + 1))
            punch(area)
            assert oracle.categories(area.at(UNIT), area.at(UNIT + 1)) == [before]

        [state] = assert_missed(area, page_out_and_punch)
        assert state & oracle.SWAPPED


# ---- what the documentation advises ---------------------------------------------------------------------------------


@rows(UNDECLARED)
def test_a_declared_write_is_seen(kind: Kind, way: Way, watched: Watched) -> None:
    area = watched.area
    way(area)
    assert area.of_runs(watched.tracker.collect()) == set(), "nobody saw it"
    watched.session.mark_dirty((area.at(UNIT), area.granule))
    assert watched.collect() == {UNIT}
    area.fill(3)
    watched.collect()
    with watched.session.in_flight((area.at(UNIT), area.granule)):
        assert watched.collect() == {UNIT}
        way(area)
        assert watched.collect() == {UNIT}
    assert watched.collect() == {UNIT}, "once after"
    assert watched.collect() == set()


@pytest.mark.parametrize("kind", some(*PRIVATE_FILES), ids=str)
def test_a_declared_change_of_the_file_beneath_is_seen(area: Area) -> None:
    area.load(UNIT)
    with Watched(area) as watched:
        write_to_file(area)
        assert area.of_runs(watched.tracker.collect()) == set(), "nobody saw it"
        watched.session.mark_dirty((area.at(UNIT), PAGE))
        assert watched.collect() == {UNIT}
        area.store(UNIT)
        assert watched.collect() == {UNIT}
        write_to_file(area)
        assert watched.collect() == set(), "a page that was written once is a copy, and safe"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.shared], ids=str)
def test_with_every_mapping_armed_each_store_is_seen_somewhere(area: Area) -> None:
    area.fill(3)
    alias = alias_of(area)
    alias.content()  # looked at: of pages that a mapping never had nobody can say whether they lost anything
    with UffdSession() as session:
        regions = [session.register(each.memory, blind_spots="accepted") for each in (area, alias)]
        tracker = DirtyTracker(session, regions)
        tracker.start()
        for number, mapping in enumerate((area, alias, area, alias)):
            unit = number + 1
            mapping.store(unit, bytes([number + 77]))
            dirty = tracker.collect()
            told = [
                {page // each.unit_pages for page in dirty.pages(region)}
                for each, region in zip((area, alias), regions, strict=True)
            ]
            assert unit in told[number % 2], "by the mapping that it went through"
            assert told[0] | told[1] == {unit}, "and no other unit by either"
    oracle.unmap(alias.address, alias.nbytes)


# ---- devices --------------------------------------------------------------------------------------------------------

REGISTERABLE = [kind for kind in KINDS if kind.pinnable and kind.backing != "file"]


@pytest.mark.parametrize("kind", REGISTERABLE, ids=str)
def test_the_exact_scan_misses_a_read_into_a_registered_buffer(area: Area) -> None:
    area.fill(3)
    source, sink = os.pipe()
    with Ring((area.at(UNIT), area.granule)) as ring:

        def read_fixed(area: Area) -> None:
            ring.submit(source, area.at(UNIT, 8), 8)
            os.write(sink, NEW)
            assert ring.wait() == 8

        assert_missed(area, read_fixed)
    os.close(source)
    os.close(sink)


@pytest.mark.parametrize("kind", REGISTERABLE, ids=str)
def test_a_registered_buffer_that_is_in_flight_is_dirty(watched: Watched) -> None:
    area = watched.area
    source, sink = os.pipe()
    with Ring((area.at(UNIT), area.granule)) as ring:
        watched.collect()
        with watched.session.in_flight((area.at(UNIT), area.granule)):
            for number in range(2):
                ring.submit(source, area.at(UNIT, 8), 8)
                assert watched.collect() == {UNIT}
                os.write(sink, bytes([number]) * 8)
                assert ring.wait() == 8
        assert watched.collect() == {UNIT}
    assert watched.collect() == set()
    os.close(source)
    os.close(sink)


@pytest.mark.parametrize("kind", some("disk file shared"), ids=str)
def test_pages_of_a_disks_file_cannot_be_registered(area: Area) -> None:
    """So a registered buffer is no blind spot of theirs."""
    area.fill(3)
    with pytest.raises(OSError, match="Bad address"):
        Ring(area.memory)


# ---- misuse ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def kind() -> Kind:
    """For the tests that do not ask for one."""
    [kind] = some("private anonymous")
    return kind


def lost(area: Area, misuse: Callable[[int], object]) -> bool:
    """Whether a page that was stored to is in no scan after the misuse."""
    area.fill(3)
    with oracle.userfaultfd() as uffd:
        oracle.register(uffd, area.address, area.end)
        oracle.arm(uffd, area.address, area.end)
        area.store(UNIT)
        misuse(uffd)
        return oracle.exact(area.address, area.end) == set()


def test_arming_a_dirty_page_by_write_protection_erases_it(area: Area) -> None:
    assert lost(area, lambda uffd: oracle.arm(uffd, area.address, area.end))
    assert not lost(area, lambda _: None)


def test_a_forked_child_that_uses_an_inherited_descriptor_erases_what_is_the_parents(area: Area) -> None:
    def by_child(uffd: int) -> None:
        child = os.fork()
        if not child:
            with suppress(BaseException):
                oracle.arm(uffd, area.address, area.end)
            os._exit(0)
        os.waitpid(child, 0)

    assert lost(area, by_child)


@pytest.mark.parametrize("room", ["no vector", "a vector of nothing", "a vector that may not be written"])
def test_an_arming_scan_without_a_place_for_its_answer_erases_all(area: Area, room: str) -> None:
    """The last one fails, after the fact."""
    pages = area.nbytes // PAGE
    read_only = mmap.mmap(-1, pages * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    at = oracle.address_of(read_only)
    oracle.protect(at, pages * PAGE, mmap.PROT_READ)
    vector = {"no vector": (0, 0), "a vector of nothing": (at, 0), "a vector that may not be written": (at, pages)}[
        room
    ]

    def scan(_: int) -> None:
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        numbers = 96, 3, area.address, area.end, 0, *vector, 0, 0, oracle.WRITTEN, 0, oracle.WRITTEN
        request = bytearray(struct.pack("12Q", *numbers))
        try:
            fcntl.ioctl(fd, 3 << 30 | 96 << 16 | ord("f") << 8 | 16, request, True)
        except OSError as error:
            assert error.strerror == "Bad address"
            assert vector[1]
        else:
            assert not vector[1]
        finally:
            os.close(fd)

    assert lost(area, scan)
    oracle.protect(at, pages * PAGE, mmap.PROT_READ | mmap.PROT_WRITE)


def test_a_copy_put_in_place_armed_is_born_unseen(area: Area, tmp_path: Path) -> None:
    """UFFDIO_COPY with MODE_WP, which nothing here ever uses."""
    [anonymous] = some("private anonymous")
    with oracle.userfaultfd() as uffd, anonymous.map(1, tmp_path) as source:
        source.fill(9)
        area.fill(3)
        oracle.register(uffd, area.address, area.end)
        oracle.discard(area.at(UNIT), PAGE)
        oracle.arm(uffd, area.address, area.end)
        mode_wp = 2
        request = struct.pack("5Q", area.at(UNIT), source.address, PAGE, mode_wp, 0)
        fcntl.ioctl(uffd, 3 << 30 | 40 << 16 | 0xAA << 8 | 3, request)
        assert oracle.exact(area.address, area.end) == set()
        assert oracle.peek_bytes(area.at(UNIT), 1) == b"\x09"


def test_without_the_check_memory_that_is_not_registered_is_armed_in_silence(area: Area) -> None:
    """The scan says nothing and arms nothing; with CHECK_WPASYNC it fails, and the library never leaves that out."""
    area.fill(3)
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    for _ in range(2):
        area.store(UNIT)
        question = {"mask": oracle.WRITTEN, "returned": oracle.WRITTEN}
        assert oracle.scan_once(fd, area.address, area.end, **question, flags=oracle.WP_MATCHING) == []
        with pytest.raises(PermissionError):
            oracle.scan_once(fd, area.address, area.end, **question, flags=3)
    os.close(fd)


@pytest.mark.parametrize("kind", some("hugetlb private", "hugetlb memfd"), ids=str)
def test_a_limit_within_a_huge_page_passes_over_it(area: Area) -> None:
    """In silence: `Pagemap` refuses to ask so, and trackers ask without a limit."""
    area.fill(3)
    with oracle.userfaultfd() as uffd:
        oracle.register(uffd, area.address, area.end)
        oracle.arm(uffd, area.address, area.end)
        area.store(UNIT)
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        for limit in (1, area.unit_pages - 1):
            question = {"mask": oracle.WRITTEN, "returned": oracle.WRITTEN, "flags": 3, "max_pages": limit}
            assert oracle.scan_once(fd, area.address, area.end, **question) == []
        os.close(fd)
        assert area.of_pages(oracle.exact(area.address, area.end)) == {UNIT}, "not lost: only never returned"

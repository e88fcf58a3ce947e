# SPDX-License-Identifier: MIT
"""What may be asked and what is refused: the selftest's `sanity_tests`, on every kind; and memory without access.

Takes about 3 s of CI's 20 min.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

import dirtytrack
from dirtytrack import PageCategory, Pagemap, ScanFlag, UffdSession
from tests import oracle
from tests.kernel.kinds import KINDS, Area, Kind, some
from tests.kernel.watched import ARMING, EXACT, Bare, Watched
from tests.oracle import PAGE

EVERY = PageCategory(oracle.KNOWN)
WRITTEN, PRESENT, FILE = PageCategory.WRITTEN, PageCategory.PRESENT, PageCategory.FILE

on_every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


@on_every_kind
@pytest.mark.parametrize(
    "question",
    [
        {"flags": 1 << 63},
        {"flags": int(ARMING) | 0xFF},
        {"return_mask": 1 << 40},
        {"category_mask": 1 << 40},
        {"category_inverted": 1 << 40},
        {"category_anyof_mask": 1 << 40},
    ],
    ids=" ".join,
)
def test_bits_that_no_kernel_knows_are_refused(bare: Bare, question: dict[str, int]) -> None:
    bare.area.store(1)
    with pytest.raises(dirtytrack.InvalidMemory):
        bare.pagemap.scan(bare.area.address, bare.area.end, **{**EXACT, **question})
    assert bare.written() == {1}, "and nothing was armed"


@on_every_kind
def test_an_address_within_a_page_is_refused(bare: Bare) -> None:
    bare.area.store(0)
    for flags in (ScanFlag(0), ARMING):
        with pytest.raises(dirtytrack.InvalidMemory):
            bare.pagemap.scan(bare.area.address + 1, bare.area.end, **EXACT, flags=flags)
    assert bare.written() == {0}


def masks(**given: PageCategory) -> dict[str, int]:
    return {name: int(mask) for name, mask in given.items()}


QUESTIONS = {
    "nothing": {},
    "nothing but what is returned": masks(return_mask=WRITTEN),
    "required and any of it, nothing returned": masks(category_mask=WRITTEN, category_anyof_mask=WRITTEN),
    "all required": masks(category_mask=EVERY, return_mask=EVERY),
    "any of all": masks(category_anyof_mask=EVERY, return_mask=EVERY),
    "all inverted": masks(category_inverted=EVERY, return_mask=EVERY),
    "all required, and any of all": masks(category_mask=EVERY, category_anyof_mask=EVERY, return_mask=EVERY),
    "all required and inverted": masks(category_mask=EVERY, category_inverted=EVERY, return_mask=EVERY),
    "written, of what is present": masks(category_mask=WRITTEN, category_anyof_mask=PRESENT, return_mask=EVERY),
    "not written": masks(category_mask=WRITTEN, category_inverted=WRITTEN, return_mask=EVERY),
    "not present": masks(category_mask=PRESENT, category_inverted=PRESENT, return_mask=EVERY),
    "written or of a file": masks(category_anyof_mask=WRITTEN | FILE, return_mask=WRITTEN | FILE | PRESENT),
}


@on_every_kind
@pytest.mark.parametrize("asked", QUESTIONS)
def test_each_question_is_answered_as_page_by_page(bare: Bare, asked: str) -> None:
    """The oracle asks for the categories of one page at a time, and the documented rule picks."""
    question = QUESTIONS[asked]
    area = bare.area
    area.store(1)
    area.load(2)
    area.fill(5, range(4, 6))
    scan = bare.pagemap.scan(area.address, area.end, **question)
    mask, inverted, anyof, returned = (
        question.get(name, 0) for name in ("category_mask", "category_inverted", "category_anyof_mask", "return_mask")
    )
    told = {start + page: int(bits) for start, end, bits in scan for page in range(0, end - start, PAGE)}
    truth = enumerate(oracle.categories(area.address, area.end))
    wanted = {
        area.address + number * PAGE: bits & returned
        for number, bits in truth
        if oracle.matches(bits, mask, inverted, anyof)
    }
    assert told == wanted


@on_every_kind
def test_written_and_present_pages(bare: Bare, kind: Kind) -> None:
    area = bare.area
    area.fill(0)
    both = WRITTEN | PRESENT
    for question in (
        masks(category_anyof_mask=EVERY, return_mask=EVERY),
        masks(category_mask=both, return_mask=EVERY),
        masks(category_mask=WRITTEN, category_anyof_mask=PRESENT, return_mask=EVERY),
    ):
        [found] = bare.pagemap.scan(area.address, area.end, **question)
        assert found[:2] == (area.address, area.end)
        assert found.categories & both == both
        assert bool(found.categories & FILE) == (kind.shared or (kind.backing == "file" and kind.shared))
    assert len(bare.pagemap.scan(area.address, area.end, **QUESTIONS["not written"])) == 0
    assert len(bare.pagemap.scan(area.address, area.end, **QUESTIONS["not present"])) == 0


@on_every_kind
def test_arming_by_another_question_than_the_exact_one(bare: Bare, kind: Kind) -> None:
    """It takes what is written all the same; over hugetlb memory it is refused, for it can hang there for ever."""
    area = bare.area
    area.fill(0)
    question = masks(category_anyof_mask=EVERY, return_mask=WRITTEN)
    if kind.backing == "hugetlb":
        with pytest.raises(dirtytrack.InvalidMemory, match="hang"):
            bare.pagemap.scan(area.address, area.end, **question, flags=ARMING)
        assert bare.written() == set(range(area.units))
        return
    [found] = bare.pagemap.scan(area.address, area.end, **question, flags=ARMING)
    assert found == (area.address, area.end, WRITTEN)
    assert bare.written() == set()
    area.store(2)
    rich = masks(category_mask=WRITTEN, category_inverted=PageCategory.PFNZERO, return_mask=EVERY)
    [found] = bare.pagemap.scan(area.address, area.end, **rich, flags=ARMING)
    assert found[:2] == (area.at(2), area.at(3))
    assert bare.written() == set()


# ---- files ----------------------------------------------------------------------------------------------------------


def test_a_file_that_is_only_read(tmp_path: Path) -> None:
    """This one: mapped by a mapping that may not write, and that nobody registered."""
    with open(__file__, "rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapping:
        whole = bytes(mapping)
        assert whole.startswith(b"# SPDX")
        at = mapping_address(mapping)
        end = at + -(-len(whole) // PAGE) * PAGE
        without = EVERY & ~WRITTEN
        with Pagemap() as pagemap:
            found = list(pagemap.scan(at, end, category_anyof_mask=without, return_mask=without))
        assert [(found[0].start, found[-1].end)] == [(at, end)]
        assert all(part.categories & FILE for part in found)


def mapping_address(mapping: mmap.mmap) -> int:
    """Of a mapping that may not be written, which ctypes refuses to name."""
    import numpy as np

    return int(np.frombuffer(mapping, np.uint8).ctypes.data)


@pytest.mark.parametrize("kind", some("disk file private", "disk file shared", "tmpfs file", "memfd private"), ids=str)
def test_a_file_written_to_through_memory_and_synchronised(bare: Bare) -> None:
    area = bare.area
    area.fill(ord("z"))
    oracle.synchronise(area.address, area.nbytes)
    question = masks(
        category_mask=WRITTEN,
        category_anyof_mask=PRESENT | PageCategory.SWAPPED | FILE,
        return_mask=EVERY,
    )
    scan = bare.pagemap.scan(area.address, area.end, **question)
    assert area.of_runs(scan) == set(range(area.units))
    assert all(found.categories & WRITTEN for found in scan)
    assert bare.take() == set(range(area.units))
    oracle.synchronise(area.address, area.nbytes)
    area.store(3)
    assert bare.take() == {3}, "written back in between, and armed still"


# ---- memory that was never touched, and memory without access --------------------------------------------------------


@on_every_kind
def test_both_ways_of_the_scan_agree_on_what_was_never_touched(kind: Kind, area: Area) -> None:
    """The exact question goes another way through the kernel than all others: they may not differ, armed or not."""
    if kind.backing not in ("hugetlb", "secret"):  # which come empty, and cannot be discarded
        oracle.discard(area.address, area.nbytes)
    with Bare(area) as bare:
        exact = bare.pagemap.scan(area.address, area.end, **EXACT)
        rich = bare.pagemap.scan(area.address, area.end, category_mask=WRITTEN, return_mask=EVERY)
        assert area.of_runs(exact) == area.of_runs(rich) == set(), "armed"
        area.store(5)
        exact = bare.pagemap.scan(area.address, area.end, **EXACT)
        rich = bare.pagemap.scan(area.address, area.end, category_mask=WRITTEN, return_mask=EVERY)
        assert area.of_runs(exact) == area.of_runs(rich) == {5}


STRIPES = (3, 1, 3, 1, 3, 0, 3, 1)  # PROT_READ | PROT_WRITE, PROT_READ, PROT_NONE


def test_stripes_of_rights_in_memory_that_may_not_be_touched() -> None:
    """The selftest's `userfaultfd_tests`: no page of it was written, whatever may be done with it."""
    with oracle.apart(16 * PAGE) as at, oracle.userfaultfd() as uffd, Pagemap() as pagemap:
        oracle.protect(at, 16 * PAGE, 0)
        oracle.register(uffd, at, at + 16 * PAGE)
        oracle.arm(uffd, at, at + 16 * PAGE)
        for number, rights in enumerate(STRIPES):
            oracle.protect(at + number * 2 * PAGE, 2 * PAGE, rights)
        pagemap.scan(at + PAGE, at + 13 * PAGE, **EXACT, flags=ARMING)
        pagemap.scan(at, at + 16 * PAGE, **EXACT, flags=ARMING)
        assert len(pagemap.scan(at, at + 16 * PAGE, **EXACT, flags=ARMING, max_pages=14)) == 0
        for number, rights in enumerate(STRIPES):
            if rights == 3:
                oracle.poke_bytes(at + number * 2 * PAGE, b"\1")
        wanted = {number * 2 for number, rights in enumerate(STRIPES) if rights == 3}
        assert oracle.written(at, at + 16 * PAGE) == wanted
        scan = pagemap.scan(at, at + 16 * PAGE, **EXACT, flags=ARMING)
        assert {(start - at) // PAGE for start, _, _ in scan} == wanted


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_stripes_of_rights_by_a_tracker(kind: Kind, area: Area) -> None:
    area.fill(3)
    with Watched(area, compare=False) as watched:
        for number, rights in enumerate(STRIPES):
            oracle.protect(area.at(number), area.granule, rights)
        assert watched.collect() == set()
        open_to_stores = {number for number, rights in enumerate(STRIPES) if rights == 3}
        for number in open_to_stores:
            area.store(number)
        assert watched.collect() == open_to_stores
        oracle.protect(area.address, area.nbytes, 3)
        assert watched.collect() == set()
        area.store(5)
        assert watched.collect() == {5}, "armed all the while"


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_mapped_anew_and_with_other_rights(kind: Kind, bare: Bare) -> None:
    """The selftest's `mprotect_tests`: the second half of it is replaced, and the rights of both change to and fro."""
    area = bare.area
    area.fill(1)
    assert bare.take() == set(range(area.units))
    if area.granule == PAGE and not kind.kept:  # a page of another kind in the place of one
        oracle.map_at(area.at(1), PAGE)
        with UffdSession() as other:
            other.write_protect(other.register((area.at(1), PAGE), blind_spots="accepted"))
            for rights, units in ((0, 1), (1, 2), (3, 2)):
                oracle.protect(area.address, units * PAGE, rights)
            area.fill(2, range(2))
            for rights in (0, 1, 3):
                oracle.protect(area.address, PAGE, rights)
            assert bare.written() == {0, 1}
            assert bare.take() == {0, 1}
            area.fill(ord("A"), range(2))
            assert bare.take() == {0, 1}
        return
    for rights in (0, 1, 3):
        oracle.protect(area.address, area.granule, rights)
    area.fill(2, range(2))
    assert bare.take() == {0, 1}

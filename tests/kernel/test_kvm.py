# SPDX-License-Identifier: MIT
"""A virtual machine's stores into tracked memory: its pages and no others, held against KVM's own dirty log.

The processor writes a guest's memory by page tables of the guest's own, which the kernel has to protect whenever it
arms: with KVM's log page by page, without it, huge pages at once. Takes about 3 s of CI's 20 min.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

import dirtytrack
from dirtytrack import DirtySet, DirtyTracker, Memory, UffdSession
from dirtytrack.pagemap import huge as huge_pages
from tests.kernel.guest import Guest
from tests.kernel.host import HUGE_PAGE, POOLS, NotHere, machine_lock, setting
from tests.oracle import PAGE

EPOCHS, NBYTES = 6, 8 * HUGE_PAGE
PAGES, WORDS = NBYTES // PAGE, PAGE // 4


class Form(NamedTuple):
    """How a guest's memory is allocated."""

    name: str
    shared: bool
    huge: Literal["transparent", "2M"] | None = None
    granule: int = PAGE
    """What one store makes dirty."""

    def __str__(self) -> str:
        return self.name


FORMS = (
    Form("private", False),
    Form("shared", True),
    Form("transparent huge private", False, "transparent"),
    Form("transparent huge shared", True, "transparent"),
    Form("hugetlb private", False, "2M", HUGE_PAGE),
    Form("hugetlb shared", True, "2M", HUGE_PAGE),
)


@contextmanager
def allocated(form: Form) -> Iterator[Memory]:
    """Memory of that form which has content.

    Raises:
        NotHere: the machine has no such huge pages.
    """
    with ExitStack() as things:
        if form.huge == "2M":
            with machine_lock():
                POOLS[HUGE_PAGE].ensure(NBYTES // HUGE_PAGE)
                memory = dirtytrack.allocate(NBYTES, shared=form.shared, huge=form.huge)
        else:
            if form.huge:
                name, value = ("shmem_enabled", "advise") if form.shared else ("enabled", "madvise")
                things.enter_context(setting(Path("/sys/kernel/mm/transparent_hugepage") / name, value))
            memory = dirtytrack.allocate(NBYTES, shared=form.shared, huge=form.huge)
        things.enter_context(memory)
        memory[:] = b"\3" * NBYTES
        if form.huge == "transparent" and sum(end - start for start, end, _ in huge_pages(memory)) < NBYTES:
            raise NotHere("the kernel gave no transparent huge pages")
        yield memory


@pytest.fixture
def memory(form: Form) -> Iterator[Memory]:
    with allocated(form) as made:
        yield made


class Machine:
    """A guest, a tracker of its memory that has nothing pending, and a mirror that its sets alone keep."""

    def __init__(self, memory: Memory, form: Form, *, log: bool = False) -> None:
        self.memory, self.form = memory, form
        with ExitStack() as things:
            session = things.enter_context(UffdSession())
            self.region = session.register(memory, blind_spots="accepted")
            self.guest = things.enter_context(Guest(memory.address, memory.nbytes, log=log))
            self.tracker = DirtyTracker(session, [self.region])
            self.tracker.start()
            self.mirror = bytearray(memory)
            self._things = things.pop_all()

    def collect(self) -> set[int]:
        """The dirty pages of this epoch, without which the mirror would not be the memory."""
        dirty = self.tracker.collect_into(self.mirror)
        assert self.mirror == self.memory[:], "changed and not reported"
        return self.pages(dirty)

    def pages(self, dirty: DirtySet) -> set[int]:
        return set(dirty.pages(self.region))

    def around(self, pages: set[int]) -> set[int]:
        """These pages and what one store makes dirty together with them."""
        unit = self.form.granule // PAGE
        return {page // unit * unit + i for page in pages for i in range(unit)}

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *error: object) -> None:
        self._things.close()


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("log", [True, False], ids=["KVM's log", "no log"])
def test_exactly_what_the_guest_stored_to_is_dirty(form: Form, log: bool, memory: Memory) -> None:
    random = Random(5)
    with Machine(memory, form, log=log) as machine:
        assert machine.collect() == set()
        for epoch in range(EPOCHS):
            wanted = set(random.sample(range(PAGES), 1 + 40 * (epoch % 3)))
            machine.guest.run([page * PAGE + 4 * random.randrange(WORDS) for page in sorted(wanted)])
            if log:
                assert machine.guest.logged() == wanted, "what KVM saw itself"
            assert machine.pages(machine.tracker.peek()) == machine.around(wanted)
            assert machine.collect() == machine.around(wanted)
            assert machine.collect() == set(), "armed, for the guest too"


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_same_page_in_each_epoch(form: Form, memory: Memory) -> None:
    """The guest's page tables know the page already."""
    with Machine(memory, form, log=True) as machine:
        for _ in range(20):
            machine.guest.run([3 * PAGE])
            assert machine.guest.logged() == {3}
            assert machine.collect() == machine.around({3})


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_store_across_two_pages(form: Form, memory: Memory) -> None:
    boundary = 3 * HUGE_PAGE
    with Machine(memory, form, log=True) as machine:
        for offset in (boundary - 1, boundary - 2, 5 * PAGE - 3):
            machine.guest.run([offset])
            both = {offset // PAGE, offset // PAGE + 1}
            assert machine.guest.logged() == both
            assert machine.collect() == machine.around(both)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_host_and_its_guest_store_to_one_memory(form: Form, memory: Memory) -> None:
    """KVM's log knows the guest's stores alone; a tracker knows both."""
    with Machine(memory, form, log=True) as machine:
        for number in range(4):
            machine.guest.run([9 * PAGE, (PAGES - 1) * PAGE])
            memory[9 * PAGE + 100] = memory[2000 * PAGE] = number
            assert machine.guest.logged() == {9, PAGES - 1}
            assert machine.collect() == machine.around({9, 2000, PAGES - 1})


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_time_that_kvm_writes_for_its_guest(form: Form, memory: Memory) -> None:
    """Written by the kernel, through a mapping of the page that it keeps and does not look at each time."""
    with Machine(memory, form, log=True) as machine:
        machine.guest.keep_its_clock_at(6 * PAGE)
        for _ in range(4):
            before = memory[6 * PAGE : 6 * PAGE + 32]
            machine.guest.run([9 * PAGE])
            assert memory[6 * PAGE : 6 * PAGE + 32] != before
            assert machine.guest.logged() == {6, 9}
            assert machine.collect() == machine.around({6, 9})
            machine.guest.run([9 * PAGE])
            logged = machine.guest.logged()  # KVM may tell the time unasked, as when another processor runs the guest
            assert {9} <= logged <= {6, 9}
            assert machine.collect() == machine.around(logged)
            machine.guest.tell_the_time()


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("log", [True, False], ids=["KVM's log", "no log"])
def test_no_store_is_lost_while_the_guest_runs(form: Form, log: bool, memory: Memory) -> None:
    """Its stamps grow: after a collect the mirror is nowhere behind what was in memory before."""
    pages = range(0, PAGES, 61)

    def stamps(buffer: Memory | bytearray) -> npt.NDArray[np.uint32]:
        copied: npt.NDArray[np.uint32] = np.frombuffer(buffer, np.uint32)[:: WORDS * 61].copy()
        return copied

    with Machine(memory, form, log=log) as machine:
        offsets = [page * PAGE for page in pages]
        machine.guest.run(offsets)
        runs = threading.Thread(target=machine.guest.run, args=(offsets,), kwargs={"until_stopped": True})
        runs.start()
        collects, enough = 0, 10 * len(pages)
        try:
            while collects < 150 or stamps(memory).max() <= enough:
                collects += 1
                before = stamps(memory)
                machine.tracker.collect_into(machine.mirror)
                behind = np.flatnonzero(stamps(machine.mirror) < before)
                assert not len(behind), f"stored and not reported: pages {[pages[i] for i in behind]}"
        finally:
            machine.guest.stop()
            runs.join()
        assert machine.guest.stamp > enough, "it met pages that were armed again"
        machine.collect()
        dirty = machine.tracker.collect()
        assert dirty <= dirty.assumed, "hot pages may go unwatched for a while; all others are clean"

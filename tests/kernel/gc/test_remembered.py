# SPDX-License-Identifier: MIT
"""What a remembered set promises, one thing at a time: what is read, kept and refused, what a failure leaves."""

from __future__ import annotations

import gc
import linecache
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest

from dirtytrack import (
    DirtySet,
    DirtyTracker,
    InvalidMemory,
    Memory,
    NotRegistered,
    NotStarted,
    Region,
    RegionGone,
    SessionClosed,
    UffdSession,
    allocate,
)
from dirtytrack.gc import (
    BarrierBusy,
    InvalidNursery,
    InvalidPointerFormat,
    NurseryMoved,
    PointerFormat,
    RememberedSet,
)
from tests import oracle
from tests.kernel.gc.heaps import OLD, YOUNG, YOUNG_BYTES
from tests.kernel.kinds import some
from tests.oracle import PAGE

PAGES = 64
END = YOUNG + YOUNG_BYTES
WORDS = PAGE // 8


class Old(NamedTuple):
    """An old generation of one region."""

    memory: Memory
    words: memoryview
    session: UffdSession
    region: Region
    tracker: DirtyTracker
    remembered: RememberedSet

    def at(self, page: int) -> int:
        return self.region.address + page * PAGE

    def minor(self) -> list[int]:
        """The pages in which slots are."""
        return [(slot - self.region.address) // PAGE for slot in self.remembered.minor(YOUNG, END)]


@pytest.fixture
def old(session: UffdSession) -> Old:
    memory = allocate(PAGES * PAGE, name="old")
    region = session.register(memory)
    tracker = DirtyTracker(session, [region])
    tracker.start()
    remembered = RememberedSet(region, tracker, nursery=(YOUNG, END))
    return Old(memory, memoryview(memory).cast("Q"), session, region, tracker, remembered)


# ---- what is read, and what is kept


def test_the_first_call_reads_what_was_stored_before(session: UffdSession) -> None:
    memory = allocate(PAGES * PAGE)
    memoryview(memory).cast("Q")[5 * WORDS] = YOUNG
    region = session.register(memory)
    tracker = DirtyTracker(session, [region])
    tracker.start()
    slots = RememberedSet(region, tracker).minor(YOUNG, END)
    assert list(slots) == [memory.address + 5 * PAGE]
    assert slots.whole_heap
    assert slots.page_count == PAGES


def test_only_dirty_pages_and_those_with_slots_are_read(old: Old) -> None:
    assert old.minor() == []
    old.words[3 * WORDS], old.words[9 * WORDS] = YOUNG + 8, 1
    slots = old.remembered.minor(YOUNG, END)
    assert (list(slots), list(slots.targets), slots.page_count) == ([old.at(3)], [YOUNG + 8], 2)
    assert not slots.whole_heap
    assert slots.seconds > 0
    for _ in range(2):  # not written again, and there again
        slots = old.remembered.minor(YOUNG, END)
        assert (list(slots), slots.page_count) == ([old.at(3)], 1)
    old.words[3 * WORDS] = OLD
    assert [old.remembered.minor(YOUNG, END).page_count for _ in range(2)] == [1, 0]


def test_a_page_that_points_into_another_part_of_the_nursery_is_kept(old: Old) -> None:
    old.words[0], old.words[WORDS] = YOUNG, END - 8
    middle = YOUNG + YOUNG_BYTES // 2
    assert list(old.remembered.minor(YOUNG, middle)) == [old.at(0)]
    assert list(old.remembered.minor(middle, END)) == [old.at(1)]
    assert old.remembered.retained.page_count == 2


def test_redirecting_moves_all_slots_and_keeps_their_tags(session: UffdSession) -> None:
    memory = allocate(PAGES * PAGE)
    words = memoryview(memory).cast("Q")
    tracker = DirtyTracker(session, [session.register(memory)])
    tracker.start()
    remembered = RememberedSet(tracker.regions, tracker, pointers=PointerFormat.tagged(7))
    words[1], words[700] = YOUNG | 3, YOUNG + 64 | 5
    slots = remembered.minor(YOUNG, END)
    slots.redirect([OLD, OLD + 16])
    assert (words[1], words[700]) == (OLD | 3, OLD + 16 | 5)
    with pytest.raises(InvalidMemory, match="2 slots, and 1 targets"):
        slots.redirect([OLD])
    with pytest.raises(InvalidMemory, match="cannot hold"):
        slots.redirect([OLD, OLD + 1])
    with pytest.raises(InvalidMemory, match="64-bit"):
        slots.redirect(["x", "y"])  # type: ignore[list-item]
    remembered.minor(YOUNG, END).redirect([])


# ---- the collector's own stores


def test_own_writes_are_not_read_again(old: Old) -> None:
    old.minor()
    old.words[0] = YOUNG
    with old.remembered.forget_own_writes():
        slots = old.remembered.minor(YOUNG, END)
        slots.redirect([OLD])
        for page in range(10, 20):
            old.words[page * WORDS] = OLD
        old.words[30 * WORDS] = YOUNG  # a promoted object that points to a young one
    assert {run.start for run in old.remembered.retained} == {old.at(0), old.at(30)}
    slots = old.remembered.minor(YOUNG, END)
    assert (list(slots), slots.page_count) == ([old.at(30)], 2)


def test_mutators_writes_before_it_are_not_forgotten(old: Old) -> None:
    old.minor()
    old.words[7 * WORDS] = YOUNG
    with old.remembered.forget_own_writes(nursery_empty=True):
        pass  # no minor() read it
    assert old.minor() == [7]


def test_an_empty_nursery_leaves_nothing_to_read(old: Old) -> None:
    old.words[0] = YOUNG
    with old.remembered.forget_own_writes(nursery_empty=True):
        old.remembered.minor(YOUNG, END).redirect([OLD])
        old.words[WORDS] = OLD
    assert not old.remembered.retained
    assert old.remembered.minor(YOUNG, END).page_count == 0


def test_an_empty_nursery_is_told_at_the_end_and_its_slots_are_redirected_without_a_fault(old: Old) -> None:
    old.minor()
    old.words[: 20 * WORDS : WORDS] = memoryview(YOUNG.to_bytes(8, "little") * 20).cast("Q")
    with old.remembered.forget_own_writes(nursery_empty=True):
        assert old.minor() == list(range(20))
        assert old.minor() == list(range(20)), "nothing was taken"
        assert old.tracker.peek().page_count == 20, "nothing was armed"
        old.words[30 * WORDS] = YOUNG + 8
        assert old.minor() == [*range(20), 30]
        old.remembered.retain([old.at(7)])
        old.remembered.minor(YOUNG, END).redirect([OLD] * 21)
        old.remembered.retain([old.at(40)])
    assert not old.tracker.peek()
    slots = old.remembered.minor(YOUNG, END)
    assert (list(slots), slots.page_count) == ([], 1), "what was retained after it was read"


def test_an_exception_before_an_empty_nursery_forgets_nothing_that_was_retained(old: Old) -> None:
    old.words[2 * WORDS], old.words[3 * WORDS] = YOUNG, YOUNG
    old.minor()
    old.remembered.retain([old.at(9)])
    with pytest.raises(KeyError), old.remembered.forget_own_writes(nursery_empty=True):
        old.minor()
        raise KeyError
    slots = old.remembered.minor(YOUNG, END)
    assert list(slots) == [old.at(2), old.at(3)]
    assert slots.page_count == 3


def test_somebody_else_collects_while_the_nursery_is_emptied(old: Old) -> None:
    old.minor()
    old.words[5 * WORDS] = YOUNG
    with old.remembered.forget_own_writes(nursery_empty=True):
        old.tracker.collect()
        slots = old.remembered.minor(YOUNG, END)
        assert list(slots) == [old.at(5)]
        assert slots.whole_heap
        slots.redirect([OLD])
    assert old.remembered.minor(YOUNG, END).whole_heap
    old.words[6 * WORDS] = YOUNG
    with old.remembered.forget_own_writes(nursery_empty=True):
        old.remembered.minor(YOUNG, END).redirect([OLD])
        old.tracker.collect()
    assert old.remembered.minor(YOUNG, END).whole_heap


def test_an_exception_inside_forgets_nothing(old: Old) -> None:
    old.minor()
    with pytest.raises(ZeroDivisionError), old.remembered.forget_own_writes(nursery_empty=True):
        old.words[4 * WORDS] = YOUNG
        old.words[1 // 0] = 1
    assert old.minor() == [4]


def test_a_store_beside_it_is_not_lost_unless_the_nursery_is_said_to_be_empty(old: Old) -> None:
    old.minor()
    with old.remembered.forget_own_writes():
        old.minor()
        old.words[5 * WORDS] = YOUNG  # by a mutator that was not stopped
    assert old.minor() == [5]


def test_retained_pages_are_read(old: Old) -> None:
    old.minor()
    with old.remembered.forget_own_writes(nursery_empty=True):
        old.minor()
        old.words[6 * WORDS + 1], old.words[8 * WORDS] = YOUNG, YOUNG
    old.remembered.retain([old.at(6) + 8])
    assert old.minor() == [6]  # what was forgotten is
    old.remembered.retain(DirtySet.from_runs([(old.at(8), old.at(9))]))
    slots = old.remembered.minor(YOUNG, END)
    assert len(slots) == 2
    old.remembered.retain(slots)
    for beyond in (old.at(PAGES), old.at(0) - 8):
        with pytest.raises(InvalidMemory, match="no region of this heap"):
            old.remembered.retain([beyond])


# ---- other listeners


def test_whoever_collects_from_its_tracker_makes_it_read_everything(old: Old, caplog: pytest.LogCaptureFixture) -> None:
    old.minor()
    old.words[3 * WORDS] = YOUNG
    old.tracker.collect()
    slots = old.remembered.minor(YOUNG, END)
    assert list(slots) == [old.at(3)]
    assert slots.whole_heap
    assert "somebody else" in caplog.text
    old.tracker.stop()
    old.words[4 * WORDS] = YOUNG
    with pytest.raises(NotStarted):
        old.remembered.minor(YOUNG, END)
    old.tracker.start()
    assert old.minor() == [3, 4]


def test_two_listeners_do_not_disturb_each_other(old: Old) -> None:
    other = DirtyTracker(old.session, [old.region])
    other.start()
    old.minor()
    for turn in range(4):
        old.words[turn * WORDS] = YOUNG
        if turn % 2:
            assert old.minor() == list(range(turn + 1))
        else:
            assert other.collect().page_count == 1 + (turn > 0)
    with old.remembered.forget_own_writes(nursery_empty=True):
        old.remembered.minor(YOUNG, END).redirect([OLD] * 4)
    assert other.collect().page_count == 4, "the collector's writes are news to a checkpointer"


def test_other_regions_of_its_tracker_are_left_alone(session: UffdSession) -> None:
    memories = [allocate(8 * PAGE) for _ in range(2)]
    heap, rest = (session.register(memory) for memory in memories)
    tracker = DirtyTracker(session, [heap, rest])
    tracker.start()
    remembered = RememberedSet(heap, tracker, nursery=(YOUNG, END))
    remembered.minor(YOUNG, END)
    for memory in memories:
        memoryview(memory).cast("Q")[0] = YOUNG
    slots = remembered.minor(YOUNG, END)
    assert (list(slots), slots.page_count) == ([heap.address], 1)
    assert not slots.whole_heap
    assert tracker.collect(rest).page_count == 1


# ---- growing and shrinking


def test_a_heap_grows_and_shrinks(old: Old) -> None:
    old.minor()
    more = allocate(8 * PAGE, name="more")
    words = memoryview(more).cast("Q")
    words[0] = YOUNG
    region = old.remembered.add(more)
    assert old.remembered.regions == (old.region, region)
    old.words[0] = YOUNG
    assert sorted(old.remembered.minor(YOUNG, END)) == sorted([old.at(0), more.address])
    words[2 * WORDS] = YOUNG + 8
    assert len(old.remembered.minor(YOUNG, END)) == 3
    old.remembered.remove(region)
    words[3 * WORDS] = YOUNG
    assert list(old.remembered.minor(YOUNG, END)) == [old.at(0)]
    with pytest.raises(InvalidMemory, match="not part of this heap"):
        old.remembered.remove(region)
    again = old.remembered.add(region)
    assert len(old.remembered.minor(YOUNG, END)) == 4
    assert again is region


def test_removing_a_region_is_no_reason_to_read_the_whole_heap(old: Old) -> None:
    region = old.remembered.add(allocate(4 * PAGE))
    old.minor()
    old.words[WORDS] = YOUNG
    old.remembered.remove(region)
    slots = old.remembered.minor(YOUNG, END)
    assert list(slots) == [old.at(1)]
    assert not slots.whole_heap
    assert slots.page_count == 1


def test_what_cannot_be_added_leaves_the_heap_as_it_was(old: Old) -> None:
    young = allocate(4 * PAGE)
    remembered = RememberedSet(old.region, old.tracker, nursery=(young.address, young.address + young.nbytes))
    with pytest.raises(InvalidNursery, match="overlaps the old generation"):
        remembered.add(young)
    assert remembered.regions == (old.region,)


def test_empty_huge_pages_stay_empty(session: UffdSession, tmp_path: Path) -> None:
    (kind,) = some("hugetlb private")
    with kind.map(4, tmp_path) as area:
        oracle.poke_bytes(area.at(2, 16), YOUNG.to_bytes(8, "little"))
        tracker = DirtyTracker(session, [session.register(area.memory)])
        tracker.start()
        remembered = RememberedSet(tracker.regions, tracker)
        for _ in range(2):
            assert list(remembered.minor(YOUNG, END)) == [area.at(2, 16)]
        present = [oracle.categories(area.at(unit), area.at(unit, PAGE))[0] & oracle.PRESENT for unit in range(4)]
        assert [bool(each) for each in present] == [False, False, True, False]
        oracle.poke_bytes(area.at(1, 8), YOUNG.to_bytes(8, "little"))
        assert list(remembered.minor(YOUNG, END)) == [area.at(1, 8), area.at(2, 16)]


# ---- what is refused


def test_a_heap_is_registered_and_watched(old: Old, session: UffdSession) -> None:
    other = session.register(allocate(PAGE), name="other")
    with pytest.raises(NotRegistered, match=r"'other' is not one of the tracker's: tracker.add"):
        RememberedSet(other, old.tracker)
    session.unregister(other)
    with pytest.raises(NotRegistered, match="is not registered"):
        RememberedSet(other, old.tracker)
    with pytest.raises(InvalidMemory, match="one region at least"):
        RememberedSet((), old.tracker)
    with pytest.raises(TypeError, match="DirtyTracker"):
        RememberedSet(old.region, session)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Regions"):
        RememberedSet([b"x"], old.tracker)  # type: ignore[list-item]


@pytest.mark.parametrize(("low", "high"), [(YOUNG, YOUNG), (END, YOUNG), (-8, 8), (0, (1 << 64) + 1)])
def test_a_nursery_is_a_range_of_addresses(old: Old, low: int, high: int) -> None:
    with pytest.raises(InvalidNursery, match="empty or reversed"):
        RememberedSet(old.region, old.tracker).minor(low, high)


def test_a_nursery_is_apart_from_the_old_generation(old: Old) -> None:
    for low, high in ((old.at(0) - 8, old.at(0) + 8), (old.at(5), old.at(6)), (old.at(PAGES) - 1, old.at(PAGES) + 8)):
        with pytest.raises(InvalidNursery, match="overlaps the old generation: region 'old'"):
            RememberedSet(old.region, old.tracker, nursery=(low, high))
    RememberedSet(old.region, old.tracker, nursery=(old.at(PAGES), old.at(PAGES) + 8))


def test_a_nursery_that_moves_is_told_of(old: Old) -> None:
    old.minor()
    with pytest.raises(NurseryMoved, match="remember_all"):
        old.remembered.minor(YOUNG, END + 8)
    old.words[0] = END
    old.minor()
    old.remembered.remember_all((YOUNG, END + 4096))
    assert list(old.remembered.minor(END, END + 8)) == [old.at(0)]
    assert old.remembered.nursery == (YOUNG, END + 4096)
    with (
        pytest.raises(NurseryMoved, match="no nursery yet"),
        RememberedSet(old.region, old.tracker).forget_own_writes(),
    ):
        pass


def test_a_format_fits_the_heap_and_the_nursery(session: UffdSession) -> None:
    memory = allocate(2 * PAGE)
    region = session.register((memory.address + 4, PAGE))
    tracker = DirtyTracker(session, [region])
    tracker.start()
    with pytest.raises(InvalidPointerFormat, match="misaligned"):
        RememberedSet(region, tracker)
    narrow = RememberedSet(region, tracker, pointers=PointerFormat.compressed(YOUNG, 0))
    with pytest.raises(InvalidNursery, match="no slot of"):
        narrow.minor(YOUNG - 8, YOUNG)
    with pytest.raises(InvalidNursery, match="no slot of"):
        narrow.minor(YOUNG, YOUNG + (1 << 32) + 8)
    narrow.minor(YOUNG, YOUNG + (1 << 32))
    above = session.register((memory.address + PAGE, PAGE), name="above")
    tracker.add(above)
    tagged = RememberedSet(above, tracker, pointers=PointerFormat.tagged(0xFF << 24))
    with pytest.raises(InvalidNursery, match="takes for its tag"):
        tagged.minor(YOUNG, END)


def test_what_is_of_another_type_is_said_to_be(old: Old) -> None:
    make: Any = RememberedSet
    remembered: Any = old.remembered
    wrong: list[tuple[Any, str]] = [
        (lambda: make(old.memory, old.tracker), "not of Memory"),
        (lambda: make([old.memory], old.tracker), "not of Memory"),
        (lambda: make(None, old.tracker), "not of NoneType"),
        (lambda: make(old.region, old.session), "not a UffdSession"),
        (lambda: make(old.region, old.tracker, pointers="plain"), "takes a PointerFormat"),
        (lambda: make(old.region, old.tracker, nursery=(1, 2, 3)), "two addresses"),
        (lambda: remembered.minor(1.5, 2.5), "two addresses"),
        (lambda: remembered.minor(old.memory, END), "two addresses"),
        (lambda: remembered.remember_all("ab"), "two addresses"),
        (lambda: remembered.remove(old.memory), "not Memory"),
    ]
    for call, told in wrong:
        with pytest.raises(TypeError, match=told):
            call()


def test_a_set_of_a_closed_session_says_so(old: Old) -> None:
    old.words[0] = YOUNG
    slots = old.remembered.minor(YOUNG, END)
    old.session.close()
    with pytest.raises(SessionClosed):
        old.remembered.minor(YOUNG, END)
    with pytest.raises(SessionClosed):
        slots.redirect([OLD])
    assert list(slots) == [old.at(0)]


def test_a_set_is_not_pickled(old: Old) -> None:
    import pickle

    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(old.remembered)


# ---- what goes wrong


def test_a_mapping_that_went_away_is_told_and_nothing_else_is_forgotten(old: Old) -> None:
    with oracle.mapped(8 * PAGE) as at:
        region = old.remembered.add((at, 8 * PAGE), name="gone")
        old.minor()
        old.words[2 * WORDS] = YOUNG
        oracle.poke_bytes(at, YOUNG.to_bytes(8, "little"))
        oracle.unmap(at, 8 * PAGE)
        with pytest.raises(RegionGone) as caught:
            old.remembered.minor(YOUNG, END)
        assert caught.value.region is region
        old.remembered.remove(region)
        assert old.minor() == [2]


class Stop(Exception):
    """What a signal handler raises."""


@pytest.mark.parametrize("nursery_empty", [False, True])
def test_an_interrupt_at_any_line_forgets_nothing(old: Old, nursery_empty: bool) -> None:
    """By a tracer that raises at the n-th line of this package that is run, for every n."""
    folder = str(Path(sys.modules["dirtytrack.gc"].__file__ or "").parent)
    old.minor()
    ended, lines, where = False, 0, ""
    while not ended:
        lines += 1
        old.words[lines % PAGES * WORDS] = YOUNG
        left = lines

        def tracer(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal left, where
            if not frame.f_code.co_filename.startswith(folder):
                return None
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            if event == "line" and not line.startswith(("with ", "try:")):  # no signal is looked for there
                left -= 1
                if not left:
                    where = f"{frame.f_code.co_filename}:{frame.f_lineno} {line}"
                    raise Stop
            return tracer

        before = sys.gettrace()
        sys.settrace(tracer)
        try:
            with old.remembered.forget_own_writes(nursery_empty=nursery_empty):
                old.words[(lines * 7 + 3) % PAGES * WORDS + 1] = YOUNG
                slots = old.remembered.minor(YOUNG, END)
                if nursery_empty:
                    slots.redirect([OLD] * len(slots))
            ended = True
        except Stop:
            pass
        finally:
            sys.settrace(before)
        expected = [old.region.address + 8 * i for i, word in enumerate(old.words) if word == YOUNG]
        assert list(old.remembered.minor(YOUNG, END)) == expected, f"interrupted at {where}"
    assert lines > 60


def test_a_signal_handler_in_the_middle_of_it_is_refused(old: Old) -> None:
    told: list[BaseException] = []

    def handler(number: int, frame: FrameType | None) -> None:
        try:
            old.remembered.minor(YOUNG, END)
        except BarrierBusy as busy:
            told.append(busy)

    real, before = old.tracker.collect, signal.signal(signal.SIGUSR1, handler)

    def collect() -> DirtySet:
        os.kill(os.getpid(), signal.SIGUSR1)
        return real()

    old.tracker.collect = collect  # type: ignore[method-assign, assignment]
    try:
        old.words[0] = YOUNG
        assert old.minor() == [0]
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert "set a flag" in str(told[0])


def test_slots_outlive_what_found_them(old: Old) -> None:
    old.words[5], old.words[900] = YOUNG, YOUNG + 8
    slots = old.remembered.minor(YOUNG, END)
    addresses, targets = slots.addresses, slots.targets
    old.remembered.minor(YOUNG, END)
    del slots
    gc.collect()
    assert addresses.tolist() == [old.at(0) + 40, old.at(0) + 7200]
    assert targets.tolist() == [YOUNG, YOUNG + 8]
    assert addresses.readonly
    assert addresses.format == "Q"


@pytest.fixture(autouse=True)
def _nothing_is_left_in_the_way() -> Iterator[None]:
    yield
    gc.collect()

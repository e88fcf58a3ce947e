# SPDX-License-Identifier: MIT
"""A card table beside a copy of the heap: each card that changed is dirty, and with a mirror no other is."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dirtytrack import DirtyTracker, InvalidMemory, NotRegistered, SessionClosed, UffdSession, allocate
from dirtytrack.gc import CardsTooSmall, CardTable, CrossingMap
from dirtytrack.kernel import core
from tests.kernel.gc.heaps import write_by
from tests.oracle import PAGE
from tests.strategies import Kind, Span, Way, spans

PAGES = 16
COPY, SCAN = 1024, 2  # bits of enum dt_site


def started(session: UffdSession, *memories: object) -> DirtyTracker:
    regions = [session.register(memory, blind_spots="accepted") for memory in memories]  # type: ignore[arg-type]
    tracker = DirtyTracker(session, regions)
    tracker.start()
    return tracker


Step = tuple[str, Span, int, Way]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(("write", "write", "update", "clear", "own", "fail", "discard")),
        spans(PAGES * PAGE, 2 * PAGE),
        st.integers(0, 255),
        st.sampled_from(Way),
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=60)
@given(
    steps=STEPS,
    card_bytes=st.sampled_from((512, 1024, PAGE, 4 * PAGE)),
    mirror=st.booleans(),
    kind=st.sampled_from((Kind.PRIVATE, Kind.SHARED)),
)
def test_cards_are_dirty_where_the_heap_differs_from_what_it_was(
    steps: list[Step], card_bytes: int, mirror: bool, kind: Kind
) -> None:
    """The model: the bytes at the last update, and which cards differed at any update since they were cleaned."""
    mirror = mirror or card_bytes < PAGE
    memory = allocate(PAGES * PAGE, shared=kind.value[0])
    with UffdSession() as session:
        nbytes = PAGES * PAGE - 100
        tracker = started(session, (memory.address, nbytes) if mirror else memoryview(memory)[:nbytes])
        (region,) = tracker.regions
        cards = CardTable(region, tracker, card_bytes, mirror=mirror)
        first = memory.address & -card_bytes
        count = -(-(memory.address + nbytes - first) // card_bytes)

        def differing(before: bytes) -> set[int]:
            now = memory[:nbytes]
            edges = [max(0, first + i * card_bytes - memory.address) for i in range(count)] + [nbytes]
            return {i for i in range(count) if before[edges[i] : edges[i + 1]] != now[edges[i] : edges[i + 1]]}

        cards.update()
        assert bytes(cards.view()) == b"\1" * count, "nobody knows the past"
        cards.clear()
        model, before, loose = set[int](), memory[:nbytes], False
        for what, span, value, way in (*steps, ("update", Span(0, 1), 0, Way.STORE)):
            if what == "write":
                write_by(way, memory.address + span.start, bytes([value]) * (min(span.end, nbytes) - span.start or 1))
            elif what == "discard":
                memory.discard(span.pages.start * PAGE, PAGE)
            elif what == "clear":
                cards.clear(memory.address + span.start, memory.address + span.end)
                model -= {i for i in range(count) if span.start <= first + i * card_bytes - memory.address < span.end}
            elif what == "own":
                with cards.forget_own_writes():
                    model |= differing(before)
                    write_by(way, memory.address + min(span.start, nbytes - 3), b"own")
                before = memory[:nbytes]
            elif what == "fail":
                core.lib.dt_fail(COPY if mirror else SCAN, 1, 1, 14, 0)
                try:
                    cards.update()
                except Exception:  # what it found is in the next one; it may have been marked and copied already
                    loose = True
                else:
                    model |= differing(before)
                    before = memory[:nbytes]
                finally:
                    core.lib.dt_fail(0, 0, 0, 0, 0)
            else:
                cards.update()
                model |= differing(before)
                before = memory[:nbytes]
            dirty = {i for i, byte in enumerate(cards.view()) if byte}
            if what == "update":
                assert dirty >= model
                assert not mirror or loose or dirty == model
        assert cards.dirty_cards().tolist() == [first + i * card_bytes for i in sorted(dirty)]
        edges = iter(cards.dirty_ranges().cast("B").cast("Q") if dirty else ())
        runs = [range(start, end, card_bytes) for start, end in zip(edges, edges, strict=True)]
        assert {(at - first) // card_bytes for run in runs for at in run} == dirty


def test_a_pointer_that_the_collector_changed_and_the_program_changed_back_is_seen(session: UffdSession) -> None:
    memory = allocate(PAGES * PAGE)
    words = memoryview(memory).cast("Q")
    tracker = started(session, memory)
    cards = CardTable(tracker.regions, tracker, 512, mirror=True)
    words[100] = 0x1000  # a young object
    cards.update()
    cards.clear()
    with cards.forget_own_writes():
        words[100] = 0x2000  # it has moved
    assert not len(cards.dirty_cards())
    words[100] = 0x1000  # another object, where that one was
    cards.update()
    assert cards.dirty_cards().tolist() == [memory.address + 512]


def test_what_is_refused(session: UffdSession) -> None:
    tracker = started(session, allocate(PAGES * PAGE))
    (region,) = tracker.regions
    with pytest.raises(CardsTooSmall, match="pass mirror=True"):
        CardTable(region, tracker, 512)
    with pytest.raises(CardsTooSmall, match="512 bytes at least"):
        CardTable(region, tracker, 256, mirror=True)
    for odd in (0, -512, 513):
        with pytest.raises(InvalidMemory, match="power of two"):
            CardTable(region, tracker, odd, mirror=True)
    cards = CardTable(region, tracker)
    assert cards.card_bytes == PAGE
    with pytest.raises(InvalidMemory, match="in no region"):
        cards.index(region.address - 1)
    with pytest.raises(InvalidMemory, match="reversed"):
        cards.clear(8, 4)
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(cards)
    session.close()
    with pytest.raises(SessionClosed):
        cards.update()
    with pytest.raises(NotRegistered):
        CardTable(region, tracker)


def test_a_table_of_several_regions_and_the_objects_on_its_cards(session: UffdSession) -> None:
    memories = [allocate(PAGES * PAGE, name=name) for name in ("one", "two")]
    tracker = started(session, *memories)
    one, two = tracker.regions
    cards = CardTable(tracker.regions, tracker, 1024, mirror=True)
    cards.update()
    cards.clear()
    crossing = CrossingMap(two, 16)
    crossing.add([two.address + at for at in (0, 1008, 4096, 9000 // 16 * 16)])
    memories[1][1500], memories[0][0] = 1, 1
    cards.update()
    assert crossing.objects_on(cards.dirty_ranges(two)).tolist() == [two.address + 1008]
    assert cards.dirty_cards(one).tolist() == [one.address]
    assert cards.index(two.address + 1500) == (two, 1)
    assert cards.view(two)[1] == CardTable.DIRTY
    cards.view(two)[1] = CardTable.CLEAN
    assert not len(cards.dirty_cards(two))
    with pytest.raises(InvalidMemory, match="say which region"):
        cards.view()


def test_a_table_whose_tracker_was_collected_by_somebody_else_marks_everything(session: UffdSession) -> None:
    memory = allocate(PAGES * PAGE)
    tracker = started(session, memory)
    cards = CardTable(tracker.regions, tracker)
    cards.update()
    cards.clear()
    memory[3 * PAGE] = 1
    tracker.collect()
    cards.update()
    assert len(cards.dirty_cards()) == PAGES


def test_an_exception_among_own_writes_forgets_nothing(session: UffdSession) -> None:
    memory = allocate(PAGES * PAGE)
    tracker = started(session, memory)
    cards = CardTable(tracker.regions, tracker)
    cards.update()
    cards.clear()
    with pytest.raises(KeyError), cards.forget_own_writes():
        memory[3 * PAGE] = 1
        raise KeyError
    cards.update()
    assert cards.dirty_cards().tolist() == [memory.address + 3 * PAGE]


def test_what_cannot_be_added_leaves_the_table_as_it_was(session: UffdSession, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = started(session, allocate(PAGES * PAGE))
    cards = CardTable(tracker.regions, tracker, 512, mirror=True)
    cards.update()
    more, before = allocate(PAGES * PAGE), session.regions
    with monkeypatch.context() as patch:
        patch.setattr("dirtytrack.gc.cards.allocate", fail)
        with pytest.raises(MemoryError):
            cards.add(more)
    assert (cards.regions, tracker.regions, session.regions) == (before, before, before)
    cards.clear()
    more[0] = 1
    cards.update()
    assert not len(cards.dirty_cards())
    region = cards.add(more)
    cards.update()
    assert cards.dirty_cards(region)[0] == more.address


def fail(*arguments: object, **options: object) -> None:
    raise MemoryError

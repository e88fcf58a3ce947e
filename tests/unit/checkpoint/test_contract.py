# SPDX-License-Identifier: MIT
"""What every kind of store does, in a directory, in an object store in memory, and at a server that speaks S3."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from dirtytrack.checkpoint import Retention, compact, compare, generations, prune, restore, verify
from dirtytrack.checkpoint.coding import Encoder
from dirtytrack.checkpoint.manifests import Manifest, RegionEntry, SegmentEntry, segment_name
from dirtytrack.checkpoint.protocols import Kept
from dirtytrack.checkpoint.store import open_store
from dirtytrack.errors import (
    CheckpointerClosed,
    DamagedCheckpoint,
    InvalidCheckpoint,
    NoSuchGeneration,
    StoreBusy,
)
from tests.buckets import Place
from tests.generations import PAGE, History
from tests.storing import kept, read_back, save

CONTENTS = [{"a": bytes([i]) * 3 * PAGE, "ü": b"\x07" * 50, "c/../c": bytes(PAGE)} for i in range(1, 9)]


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_what_is_saved_comes_back(place: Place, compression: Any) -> None:
    with place.open() as store, store.writer() as writer:
        newest, before = None, None
        for i, contents in enumerate(CONTENTS):
            newest = save(writer, store, contents, before, newest, encoder=Encoder(compression), meta={"step": i})
            before = contents
        with open_store(store) as same:
            assert same is store
    with place.open(create=False) as again:
        assert again.catalog() == tuple(Kept(i, 0) for i in range(1, 9))
        for i, contents in enumerate(CONTENTS):
            assert read_back(again, i + 1) == contents
            assert again.manifest(i + 1).meta == {"step": i}
        assert again.manifest().parent == 7
        assert again.manifest(1).parent is None
        with pytest.raises(NoSuchGeneration, match="it has 1, 2, 3, 4, 5, 6, 7, 8"):
            again.manifest(9)
        with pytest.raises(NoSuchGeneration, match="revision 1"):
            again.manifest(8, 1)
    report = verify(place.open(create=False), all=True)
    assert report.ok and len(report.checked) == 8 and not report.strangers


def test_a_buffer_that_grows_goes_or_comes(place: Place) -> None:
    steps = [
        {"a": b"\x01" * 5000, "b": b"\x02" * 5000},
        {"a": b"\x03" * 9000, "b": b"\x02" * 5000},
        {"b": b"\x02" * 5000},
        {"a": b"\x04" * 100, "b": b"\x05" * 5000},
    ]
    with place.open() as store, store.writer() as writer:
        newest, before = None, None
        for contents in steps:
            newest = save(writer, store, contents, before, newest)
            before = contents
        assert [read_back(store, i + 1) for i in range(4)] == steps
        assert verify(store, all=True).ok
        # Siblings: another generation on the first.
        other = {"a": b"\x09" * 5000, "b": b"\x02" * 5000}
        sibling = save(writer, store, other, steps[0], store.manifest(1))
        assert (sibling.generation, sibling.parent) == (5, 1)
        assert read_back(store) == other
        # Whatever goes takes nothing with it that another one needs.
        assert writer.remove([Kept(1, 0), Kept(3, 0)])
        assert read_back(store) == other and read_back(store, 4) == steps[3] and read_back(store, 2) == steps[1]
        assert verify(store, all=True).ok


@pytest.mark.parametrize("meta", [object(), {1, 2}, float("nan"), [float("inf")], b"bytes", {(1, 2): 3}])
def test_meta_that_json_does_not_know(place: Place, meta: Any) -> None:
    with place.open() as store, store.writer() as writer:
        with pytest.raises(InvalidCheckpoint, match="JSON"):
            save(writer, store, CONTENTS[0], meta=meta)
        assert not store.catalog()
        assert not store.segments()


def test_meta_that_is_too_long(place: Place) -> None:
    with place.open() as store, store.writer() as writer:
        with pytest.raises(InvalidCheckpoint, match="keep less in meta"):
            save(writer, store, CONTENTS[0], meta="x" * (16 << 20))
        assert not store.segments()


def test_a_generation_is_published_once_and_only_with_segments_that_are_there(place: Place) -> None:
    with place.open() as store, store.writer() as writer:
        first = save(writer, store, CONTENTS[0])
        with pytest.raises(InvalidCheckpoint, match="nothing is overwritten"):
            writer.publish(first)
        missing = SegmentEntry(segment_name(2, b"12345678"), 2, 5000, 4500, 500, "0" * 64)
        with pytest.raises(InvalidCheckpoint, match="finished and there"):
            writer.publish(Manifest(**{**vars(first), "generation": 2, "segments": (missing,)}))
        segment = writer.create_segment(2)
        begun = SegmentEntry(segment.name, 2, 5000, 4500, 500, "0" * 64)
        with pytest.raises(InvalidCheckpoint, match="finished and there"):
            writer.publish(Manifest(**{**vars(first), "generation": 2, "segments": (begun,)}))
        with pytest.raises(InvalidCheckpoint, match="another store"):
            writer.publish(Manifest(**{**vars(first), "store_id": "0" * 32}))
        with pytest.raises(InvalidCheckpoint, match="from 1 to"):
            writer.create_segment(0)
        assert len(store.segments()) == (2 if place.kind == "directory" else 1)  # objects are there when they are whole
        segment.abandon()
        assert not store.strangers()
        assert len(store.segments()) == 1
        assert read_back(store) == CONTENTS[0]


def test_abandoning_what_was_published_removes_nothing(place: Place) -> None:
    with place.open() as store, store.writer() as writer:
        segment = writer.create_segment(1)
        segment.add(0, array("Q", [0, 5]), b"hello")
        entry = segment.finish()
        writer.publish(
            Manifest(store.store_id, 1, 0, None, 1.0, "full", PAGE, None, (RegionEntry(0, "a", 5),), (entry,))
        )
        segment.abandon()
    assert read_back(place.open(create=False)) == {"a": b"hello"}


def test_threads_save_and_read_at_once(place: Place) -> None:
    """One writer, two segments at a time, as saving and compacting do; readers beside them."""
    with place.open() as store, store.writer() as writer:
        first = save(writer, store, CONTENTS[0])
        errors: list[BaseException] = []
        times = 5 if place.kind == "s3" else 20

        def attempt(function: Callable[[], object]) -> None:
            try:
                for _ in range(times):
                    function()
            except BaseException as error:
                errors.append(error)

        revisions = iter(range(1, 1000))
        numbers = iter(range(2, 1000))
        work: list[Callable[[], object]] = [
            lambda: save(writer, store, CONTENTS[0], None, first, revision=next(revisions), generation=1),
            lambda: save(writer, store, CONTENTS[1], CONTENTS[0], first, generation=next(numbers)),
            writer.clean,
            lambda: read_back(store, 1),
        ]
        threads = [threading.Thread(target=attempt, args=(function,)) for function in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert len(store.catalog()) == 2 * times + 1
        assert verify(store, all=True).ok
        assert not store.strangers()


def test_two_writers_on_one_store(place: Place) -> None:
    with place.open() as store, place.open() as other:
        with store.writer() as writer:
            with pytest.raises(StoreBusy, match="this process writes to the store") as raised:
                other.writer()
            assert raised.value.pid == os.getpid()
            assert place.kind != "directory" or raised.value.errno == errno.EAGAIN
            save(writer, store, CONTENTS[0])
        with other.writer() as writer:
            save(writer, other, CONTENTS[1])
        assert read_back(store) == CONTENTS[1]


CHILD = """
import sys, time
from dirtytrack.checkpoint.store import store_of
store = store_of(sys.argv[1], create=True)
writer = store.writer()
segment = writer.create_segment(writer.next_generation())
print(flush=True)
time.sleep(60)
"""


def test_another_process_writes_and_is_killed(place: Place) -> None:
    if place.kind == "memory":
        return  # which no other process has
    with place.open() as store:
        child = subprocess.Popen([sys.executable, "-c", CHILD, place.url], stdout=subprocess.PIPE)
        assert child.stdout is not None
        try:
            child.stdout.readline()
            with pytest.raises(StoreBusy) as raised:
                store.writer()
            assert raised.value.pid in (child.pid, None)
            assert (f"process {child.pid} writes" in str(raised.value)) == (raised.value.pid is not None)
            assert len(store.segments()) == (
                1 if place.kind == "directory" else 0
            )  # objects are there when they are whole
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
        with store.writer() as writer:
            assert not store.segments()
            assert writer.next_generation() == 1


def test_what_is_removed_takes_nothing_with_it(place: Place) -> None:
    with place.open() as store, store.writer() as writer:
        first = save(writer, store, CONTENTS[0])
        save(writer, store, CONTENTS[1])
        assert writer.remove([kept(first)])
        assert writer.remove([kept(first)])  # it is gone already
        assert store.catalog() == (Kept(2, 0),)
        with pytest.raises(NoSuchGeneration):
            store.manifest(1)
        assert not store.strangers() and len(store.segments()) == 1
        assert read_back(store) == CONTENTS[1]
        assert writer.next_generation() == 3


def test_leftovers_go(place: Place) -> None:
    with place.open() as store:
        with store.writer() as writer:
            save(writer, store, CONTENTS[0])
            lost = writer.create_segment(9)
            lost.add(0, array("Q", [0, 5]), b"hello")
            lost.finish()
            assert store.strangers() == (f"segments/{lost.name}",)
            writer._pending.clear()  # as one who was killed
        with store.writer() as writer:
            assert len(store.segments()) == 1 and not store.strangers()
            assert writer.clean() == ()


def test_histories_are_restored_compacted_compared_and_pruned(place: Place) -> None:
    with place.open() as store:
        made = History(store, 3, compression="zstd")
        made.add("grid", 40 * PAGE + 5, "|u1", (40 * PAGE + 5,))
        made.add("table", 7 * PAGE)
        for step in range(6):
            made.write(12)
            made.save({"step": step})
    with place.open(create=False) as store:
        for generation, truth in made.truth.items():
            state = restore(store, generation=generation)
            assert {name: bytes(state[name]) for name in state} == truth
        assert [each.generation for each in generations(store)] == list(made.truth)
        into = np.empty(40 * PAGE + 5, np.uint8)
        restore(store, generation=2, into={"grid": into})
        assert bytes(into) == made.truth[2]["grid"]
        found = compare(store, 1, 6)
        assert found.changed_nbytes == sum(
            one != other
            for name in made.truth[1]
            for one, other in zip(made.truth[1][name], made.truth[6][name], strict=True)
        )
        assert compact(store).revision == 1
        assert prune(store, Retention(last=1)).kept == (6,)
        assert len(store.segments()) == 1 and not store.strangers()
        assert {name: bytes(array) for name, array in restore(store).items()} == made.truth[6]
        assert verify(store, all=True).ok


def test_each_rank_has_a_store_of_its_own_within(place: Place) -> None:
    with place.open() as store:
        assert store.parts() == ()
        with pytest.raises(InvalidCheckpoint):
            store.part(3)
        for rank in (0, 3):
            with closing(store.part(rank, create=True)) as part, part.writer() as writer:
                save(writer, part, CONTENTS[rank])
        assert store.parts() == (0, 3)
        assert not store.catalog() and not store.strangers()
        with store.writer() as writer:
            save(writer, store, CONTENTS[5])
            assert not writer.clean()
    with place.open(create=False) as store:
        assert read_back(store) == CONTENTS[5]
        for rank in store.parts():
            with closing(store.part(rank)) as part:
                assert read_back(part) == CONTENTS[rank] and not part.strangers()


def test_a_closed_store(place: Place) -> None:
    store = place.open()
    writer = store.writer()
    segment = writer.create_segment(1)
    writer.close()
    writer.close()
    assert not store.segments()
    calls: list[Callable[[], object]] = [writer.next_generation, writer.clean]
    calls += [lambda: writer.create_segment(1), lambda: writer.remove([])]
    for call in calls:
        with pytest.raises(CheckpointerClosed, match="is closed"):
            call()
    with pytest.raises(CheckpointerClosed, match="is closed"):
        segment.finish()
    store.close()
    store.close()
    calls = [store.catalog, store.manifest, store.writer, store.segments, store.strangers]
    for call in calls:
        with pytest.raises(CheckpointerClosed, match="is closed"):
            call()
    with pytest.raises(TypeError, match="cannot be pickled"):
        store.__reduce__()


def test_an_empty_store(place: Place) -> None:
    with pytest.raises(InvalidCheckpoint, match="no store of checkpoints"):
        place.open(create=False)
    with place.open() as store:
        with pytest.raises(NoSuchGeneration, match="no checkpoint yet"):
            store.manifest()
        with pytest.raises(InvalidCheckpoint, match="is no name of a segment"):
            store.open_segment("../dirtytrack-store")
        with pytest.raises(DamagedCheckpoint, match="is missing"):
            store.open_segment(segment_name(1, b"12345678"))
    with place.open(create=False) as store:
        assert not store.catalog() and verify(store, all=True).ok

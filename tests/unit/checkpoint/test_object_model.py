# SPDX-License-Identifier: MIT
"""Writers of one object store, any number, dead, stopped and alive, with requests that fail: against a plain model."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from obstore.store import MemoryStore

from dirtytrack.checkpoint import ObjectStore
from dirtytrack.checkpoint.manifests import Manifest, RegionEntry
from dirtytrack.checkpoint.objects import bucket as buckets
from dirtytrack.checkpoint.objects.lease import Lease
from dirtytrack.checkpoint.objects.writing import ObjectWriter
from dirtytrack.checkpoint.protocols import Kept
from dirtytrack.errors import NoSuchGeneration, StoreBusy, StoreFailed
from tests.buckets import Failing
from tests.storing import PAGE, read_back, save

FAULTS = st.sampled_from([None, None, None, "before", "after"])


class Somebody:
    """Who opened the store, and is the writer or was."""

    def __init__(self, memory: MemoryStore, *, by_force: bool) -> None:
        self.bucket = Failing(memory)
        self.store = ObjectStore(self.bucket, create=True, grace_seconds=0)
        with pytest.MonkeyPatch.context() as patched:
            if by_force:  # as if the lease of who has it had ended
                patched.setattr(Lease, "_require_over", lambda *_: None)
            self.writer = ObjectWriter(self.store)
        self.is_it = True
        self.contents: dict[str, bytes] | None = None
        self.manifest: Manifest | None = None
        self.begun: list[tuple[Any, Any, bytes]] = []

    def fail(self, what: str | None, nth: int) -> None:
        self.bucket.nth, self.bucket.after = (self.bucket.count + nth if what else 0), what == "after"


class Writers(RuleBasedStateMachine):
    """What was reported committed, and not removed, is there; who is not the writer any more commits nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = MemoryStore()
        self.people: list[Somebody] = []
        self.truth: dict[int, dict[str, bytes]] = {}
        self.perhaps: dict[int, list[dict[str, bytes]]] = {}  # by the number: what a save that failed may have left
        self.byte = 0

    @initialize()
    def begin(self) -> None:
        self.reader = ObjectStore(Failing(self.memory), create=True)

    @property
    def holder(self) -> Somebody | None:
        return next((each for each in self.people if each.is_it), None)

    def anybody(self, data: st.DataObject) -> Somebody:
        return self.people[data.draw(st.integers(0, len(self.people) - 1))]

    @rule(by_force=st.booleans())
    def come(self, by_force: bool) -> None:
        before = self.holder
        if before is not None and not by_force:
            with pytest.raises(StoreBusy, match="this process writes"):
                Somebody(self.memory, by_force=False)
            return
        somebody = Somebody(self.memory, by_force=by_force)
        if before is not None:
            before.is_it = False
        self.people.append(somebody)

    @precondition(lambda self: self.people)
    @rule(data=st.data(), fault=FAULTS, nth=st.integers(1, 6), whole=st.booleans())
    def save(self, data: st.DataObject, fault: str | None, nth: int, whole: bool) -> None:
        somebody = self.anybody(data)
        self.byte = (self.byte + 1) % 256
        contents = {"a": bytes([self.byte]) * 2 * PAGE, "b": b"same" * 100}
        number = somebody.writer.next_generation()
        there = somebody.manifest is not None and somebody.manifest.generation in self.truth  # nobody removed it
        base = (somebody.contents, somebody.manifest) if there and not whole else (None, None)
        somebody.fail(fault, nth)
        try:
            manifest = save(somebody.writer, somebody.store, contents, *base, generation=number)
        except StoreFailed:
            assert fault is not None
            if somebody.is_it:
                self.perhaps.setdefault(number, []).append(contents)
            return
        except StoreBusy:
            # Another may have saved that number between, where this one only failed to say so.
            assert not somebody.is_it or number in self.perhaps
            return
        finally:
            somebody.fail(None, 0)
        assert somebody.is_it, "who is not the writer any more committed"
        assert number not in self.truth
        self.truth[number] = contents
        somebody.contents, somebody.manifest = contents, manifest

    @precondition(lambda self: self.people)
    @rule(data=st.data())
    def upload(self, data: st.DataObject) -> None:
        """Begin a save, which is published later, by whoever is the writer then."""
        somebody = self.anybody(data)
        segment = somebody.writer.create_segment(somebody.writer.next_generation() + 10)
        self.byte = (self.byte + 1) % 256
        segment.add(0, array("Q", [0, 5]), bytes([self.byte]) * 5)
        somebody.begun.append((segment, segment.finish(), bytes([self.byte]) * 5))

    @precondition(lambda self: any(each.begun for each in self.people))
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        somebody = data.draw(st.sampled_from([each for each in self.people if each.begun]))
        segment, entry, what = somebody.begun.pop(0)
        number = entry.generation
        store_id = somebody.store.store_id
        manifest = Manifest(
            store_id, number, 0, None, 1.0, "full", PAGE, None, (RegionEntry(0, "a", 5, since=1),), (entry,)
        )
        if number in self.truth or number in self.perhaps:
            segment.abandon()
            return
        try:
            somebody.writer.publish(manifest)
        except StoreBusy:
            assert not somebody.is_it
            segment.abandon()
            return
        assert somebody.is_it
        self.truth[number] = {"a": what}

    @precondition(lambda self: self.people and self.truth)
    @rule(data=st.data(), fault=FAULTS, nth=st.integers(1, 8))
    def remove(self, data: st.DataObject, fault: str | None, nth: int) -> None:
        somebody = self.anybody(data)
        number = data.draw(st.sampled_from(sorted(self.truth)))
        somebody.fail(fault, nth)
        try:
            somebody.writer.remove([Kept(number, 0)])
        except StoreBusy:
            assert not somebody.is_it
            return
        except StoreFailed:
            assert fault is not None
            if somebody.is_it:  # gone or not
                self.perhaps.setdefault(number, []).append(self.truth.pop(number))
            return
        finally:
            somebody.fail(None, 0)
        assert somebody.is_it
        del self.truth[number]
        assert Kept(number, 0) not in self.reader.catalog()

    @precondition(lambda self: self.people)
    @rule(data=st.data(), how=st.sampled_from(["close", "die", "clean"]))
    def leave(self, data: st.DataObject, how: str) -> None:
        somebody = self.anybody(data)
        if how == "clean":
            try:
                somebody.writer.clean()
            except StoreBusy:
                assert not somebody.is_it
            return
        self.people.remove(somebody)
        if how == "close":
            somebody.writer.close()
        else:
            somebody.writer._lease.drop()

    @invariant()
    def what_was_told_is_there(self) -> None:
        there = {kept.generation for kept in self.reader.catalog()} if self.people or self.truth else set()
        assert self.truth.keys() <= there
        for number in there:
            found = read_back(self.reader, number)
            if number in self.truth:
                assert found == self.truth[number]
            else:
                assert found in self.perhaps[number]

    def teardown(self) -> None:
        for somebody in self.people:
            somebody.writer.close()
        if self.truth:
            last = Somebody(self.memory, by_force=True)
            last.writer.close()
            assert not last.store.strangers()
        else:
            with pytest.raises(NoSuchGeneration):
                self.reader.manifest(10**9)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "_PAUSE_SECONDS", 0.0)


class TestWriters(Writers.TestCase):  # type: ignore[misc,valid-type]
    settings = settings(max_examples=30, stateful_step_count=25)


@pytest.mark.soak
class TestWritersForLong(Writers.TestCase):  # type: ignore[misc,valid-type]
    settings = settings(max_examples=5000, stateful_step_count=60)

# SPDX-License-Identifier: MIT
"""`backend="compare"`: that it asks nothing of the kernel, where it differs, and how it is chosen.

What it has in common with the kernel is tested with the kernel: see tests/kernel/backends.py.
"""

from __future__ import annotations

import errno
import gc
import mmap
import os
import pickle
from collections.abc import Iterator
from contextlib import suppress

import pytest

import dirtytrack
from dirtytrack import CompareSession, DirtyTracker, Session
from dirtytrack.delta import diff
from dirtytrack.kernel import engine
from dirtytrack.region import REWRITTEN
from dirtytrack.session import default_session
from tests import oracle
from tests.opened import descriptors
from tests.oracle import PAGE
from tests.sandbox import failing, run_in_child

COMPARING = engine.BACKENDS[1:]


@pytest.fixture(params=COMPARING)
def session(request: pytest.FixtureRequest) -> Iterator[Session]:
    with CompareSession(hashes=request.param == "compare-hashes") as made:
        yield made


def armed(session: Session, *memories: object) -> DirtyTracker:
    tracker = DirtyTracker(session, [session.register(memory) for memory in memories])  # type: ignore[arg-type]
    tracker.start()
    return tracker


# ---- nothing is asked of the kernel ----------------------------------------------------------------------------------


def everything_works() -> None:
    with pytest.raises((dirtytrack.UnsupportedKernel, dirtytrack.PermissionDenied), match='backend="compare"'):
        dirtytrack.UffdSession()
    for backend in COMPARING:
        memory = dirtytrack.allocate(64 * PAGE, name="memory")
        with oracle.mapped(16 * PAGE) as raw, dirtytrack.track(memory, (raw, 16 * PAGE), backend=backend) as tracker:
            mirrors = {region: bytearray(region.nbytes) for region in tracker.regions}
            memory[5 * PAGE] = 1
            oracle.poke_bytes(raw + 3 * PAGE, b"\1")
            assert tracker.collect_into(mirrors).page_count == 2
            assert not tracker.collect()
            child = os.fork()
            if not child:
                with pytest.raises(dirtytrack.UsedAfterFork):
                    tracker.collect()
                with dirtytrack.track(memory, backend=backend) as own:
                    memory[6 * PAGE] = 2
                    assert own.collect().page_count == 1
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            memory[7 * PAGE] = 1
            assert tracker.collect().page_count == 1
            oracle.unmap(raw + 4 * PAGE, 2 * PAGE)
            with pytest.raises(dirtytrack.RegionGone) as gone:
                tracker.collect()
            assert (gone.value.start, gone.value.end) == (raw + 4 * PAGE, raw + 6 * PAGE)
            assert gone.value.region is tracker.regions[1]
            tracker.remove(gone.value.region)
            memory[8 * PAGE] = 1
            assert tracker.collect().page_count == 1


NOTHING = ("no-device", "seccomp-eperm", "no-pagemap-scan")


@pytest.mark.parametrize(
    "restrictions",
    [
        NOTHING,
        ("no-device", "seccomp-enosys", "pagemap-scan-eperm"),
        ("nobody", *NOTHING),
        (*NOTHING, "no-vm-readv"),
        (*NOTHING, "no-wipe-on-fork"),
        ("no-proc", *NOTHING),
    ],
    ids=lambda names: " ".join(names[-2:]),
)
def test_neither_door_nor_scan_is_needed(restrictions: tuple[str, ...]) -> None:
    run_in_child(everything_works, *restrictions)


def test_no_descriptor_is_kept(session: Session) -> None:
    gc.collect()
    before = descriptors()
    memory = dirtytrack.allocate(64 * PAGE)
    tracker = armed(session, memory)
    memory[0] = 1
    assert tracker.collect().page_count == 1
    assert descriptors() == before
    assert session.fileno() == -1
    assert session.opened_by == ""


# ---- where it differs -----------------------------------------------------------------------------------------------


def test_only_what_changed_is_reported(session: Session) -> None:
    memory = dirtytrack.allocate(8 * PAGE)
    tracker = armed(session, memory)
    memory[:] = bytes(8 * PAGE)
    memory[PAGE] = 1
    memory[PAGE] = 0
    assert not tracker.collect()
    memory[3 * PAGE - 1] = 1
    assert list(tracker.collect().pages(tracker.regions[0])) == [2]


def test_each_write_is_seen_whoever_made_it(session: Session) -> None:
    shared = dirtytrack.allocate(8 * PAGE, shared=True)
    tracker = armed(session, shared)  # without a warning
    (region,) = tracker.regions
    assert region.blind_spots == {REWRITTEN}
    with mmap.mmap(shared.fileno(), shared.nbytes) as later:
        later[PAGE] = 1
    os.pwrite(shared.fileno(), b"\1", 3 * PAGE)
    if not (child := os.fork()):
        shared[5 * PAGE] = 1
        os._exit(0)
    os.waitpid(child, 0)
    assert list(tracker.collect().pages(region)) == [1, 3, 5]


@pytest.mark.parametrize(
    "how", ["collect_into", "copy_to", "gather", "changed", "diff of a region", "diff of a buffer"]
)
def test_what_was_copied_and_taken_back_is_found(session: Session, how: str) -> None:
    """The one blind spot, and that whoever copies by the library has none."""
    memory = dirtytrack.allocate(4 * PAGE)
    tracker = armed(session, memory)
    mirror = bytearray(memory)
    memory[PAGE] = 1
    dirty = tracker.collect()
    memory[PAGE] = 2
    if how == "collect_into":
        tracker.put_back(dirty)
        tracker.collect_into(mirror)
    elif how == "copy_to":
        dirty.copy_to(mirror)
    elif how == "gather":
        mirror[PAGE : 2 * PAGE] = dirty.gather()
    elif how == "diff of a region":
        diff(tracker.regions[0], mirror, dirty, update=True)
    elif how == "diff of a buffer":
        diff(memory, mirror, dirty, update=True)
    elif dirty.changed(mirror):
        mirror[PAGE] = 2
    assert mirror[PAGE] == 2
    memory[PAGE] = 1
    tracker.collect_into(mirror)
    assert mirror == memory[:]


def test_what_the_program_itself_read_and_took_back_is_not(session: Session) -> None:
    memory = dirtytrack.allocate(4 * PAGE)
    tracker = armed(session, memory)
    tracker.collect()
    memory[PAGE] = 2
    mirror = bytearray(memory)
    memory[PAGE] = 0
    assert not tracker.collect()
    assert mirror != memory[:], "if it is found some day, the blind spot can be taken back"


def test_parts_of_a_page_and_sets_of_two_sessions(session: Session) -> None:
    buffer, other = bytearray(b"a" * (3 * PAGE + 77)), dirtytrack.allocate(4 * PAGE)
    tracker = armed(session, buffer)
    with CompareSession() as another:
        second = armed(another, other)
        buffer[:] = b"b" * len(buffer)
        other[2 * PAGE] = 7
        dirty, more = tracker.collect(), second.collect()
        assert bytes(dirty.gather()) == bytes(buffer)
        assert (dirty | more).nbytes == len(buffer) + PAGE
        assert sorted(bytes((dirty | more).gather())) == sorted(bytes(buffer) + bytes(other[2 * PAGE : 3 * PAGE]))
        both = {tracker.regions[0]: bytearray(len(buffer)), second.regions[0]: bytearray(4 * PAGE)}
        (dirty | more).copy_to(both)
        assert [*both.values()] == [buffer, other[:]]
        assert not (dirty | more).changed(both)
        dirty.scatter(b"c" * len(buffer))
        assert tracker.collect().nbytes == len(buffer)


@pytest.mark.tracking
def test_sessions_of_all_backends_track_the_same_memory() -> None:
    memory = dirtytrack.allocate(8 * PAGE)
    trackers = [dirtytrack.track(memory, backend=backend) for backend in engine.BACKENDS]
    assert [tracker.session.backend for tracker in trackers] == list(engine.BACKENDS)
    for tracker in trackers:
        tracker.start()
    memory[3 * PAGE] = 1
    assert [tracker.collect().page_count for tracker in trackers] == [1, 1, 1]
    assert [tracker.stop().page_count for tracker in trackers] == [0, 0, 0], "one that reads is no writer"


def test_memory_that_is_not_to_be_had_is_told(session: Session) -> None:
    memory = dirtytrack.allocate(8 * PAGE)
    tracker = DirtyTracker(session, [session.register(memory)])
    for nth in range(1, 20):
        with failing("ALLOCATE", number=errno.ENOMEM, nth=nth) as calls, suppress(MemoryError):
            tracker.start()
        if calls.seen < nth:
            break
        assert not tracker.epoch
    memory[PAGE] = 1
    session.suspend()
    session.resume()
    for nth in range(1, 20):
        with failing("ALLOCATE", number=errno.ENOMEM, nth=nth) as calls, suppress(MemoryError):
            tracker.collect()
        if calls.seen < nth:
            break
        tracker.put_back(tracker.collect())
        session.suspend()
        session.resume()
    assert nth > 2
    assert not tracker.collect()


# ---- how it is chosen -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", COMPARING)
def test_each_backend_has_a_shared_session_of_its_own(backend: str) -> None:
    first, second = (dirtytrack.track(bytearray(PAGE), backend=backend) for _ in range(2))
    assert first.session is second.session is default_session(backend)
    assert isinstance(first.session, CompareSession)
    assert first.session.backend == backend
    other = dirtytrack.track(bytearray(PAGE), backend=COMPARING[backend == COMPARING[0]])
    assert other.session is not first.session
    del first, second, other
    gc.collect()


def test_a_backend_that_is_not_there_is_refused_at_the_door() -> None:
    with pytest.raises(dirtytrack.InvalidMemory, match="'kernel', 'compare', 'compare-hashes', not 'soft-dirty'"):
        dirtytrack.track(bytearray(1), backend="soft-dirty")


def test_a_session_and_another_backend_do_not_go_together(session: Session) -> None:
    with pytest.raises(dirtytrack.InvalidMemory, match=f"backend is '{session.backend}'"):
        dirtytrack.track(bytearray(1), session=session, backend="kernel")
    assert dirtytrack.track(bytearray(1), session=session, backend=session.backend).session is session


def test_what_a_session_says_of_itself(session: Session) -> None:
    assert isinstance(session, CompareSession)
    memory = dirtytrack.allocate(64 * PAGE)
    region = session.register(memory, arm="present")
    assert region.arm == "all", "there is nothing to arm"
    assert region.granule_bytes == PAGE
    assert session.kept_bytes == 0
    DirtyTracker(session).start()
    each = 17 if session.backend == "compare-hashes" else PAGE + 1
    assert session.kept_bytes == 64 * each
    assert "1 regions, compared with" in repr(session)
    with pytest.raises(TypeError, match="a CompareSession cannot be pickled"):
        pickle.dumps(session)
    session.close()
    assert session.kept_bytes == 0
    assert "closed" in repr(session)

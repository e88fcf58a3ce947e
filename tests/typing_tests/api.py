# SPDX-License-Identifier: MIT
"""The public API as a user writes it, for the type checker alone: `make types` reads it, nothing runs it."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from typing import TYPE_CHECKING

import numpy as np

import dirtytrack
from dirtytrack import checkpoint, delta, gc, observe, pagemap, process
from dirtytrack.checkpoint import images

if TYPE_CHECKING:
    from typing_extensions import assert_type


def short_way(array: np.ndarray, shared: SharedMemory) -> None:
    memory = dirtytrack.allocate(1 << 20, shared=True, huge="transparent", name="table")
    assert_type(memory, dirtytrack.Memory)
    memory[0] = 1
    memory[4:6] = b"ab"
    dirtytrack.allocate(1, huge="4K")  # type: ignore[arg-type]
    with dirtytrack.track(array, bytearray(9), mmap.mmap(-1, 4096), shared, (4096, 10), memory) as tracker:
        assert_type(tracker, dirtytrack.DirtyTracker)
        dirty = tracker.collect()
        assert_type(dirty, dirtytrack.DirtySet)
    with dirtytrack.track({"weights": array, "state": bytearray(9)}, blind_spots="accepted", strict=True) as tracker:
        assert_type(tracker.collect("weights", budget_seconds=0.1).complete, bool)


def long_way(array: np.ndarray) -> None:
    with dirtytrack.UffdSession() as session:
        region = session.register(array, name="weights")
        assert_type(region, dirtytrack.Region)
        assert_type(region.blind_spots, frozenset[str])
        assert_type(session.regions, tuple[dirtytrack.Region, ...])
        assert_type(session.features, dirtytrack.UffdFeature)
        tracker = dirtytrack.DirtyTracker(session, regions=[region], audit=0.01)
        tracker.start()
        mirror = bytearray(array.nbytes)
        dirty = tracker.collect_into(mirror)
        tracker.collect_into({"weights": mirror})
        tracker.collect_into({region: mirror})
        tracker.collect(exact=True, mirror={region: mirror})
        tracker.put_back(dirty)
        assert_type(tracker.add(bytearray(5), name="more"), dirtytrack.Region)
        assert_type(tracker.remove("more"), dirtytrack.DirtySet)
        session.mark_dirty(region)
        session.mark_dirty((4096, 100))
        session.mark_dirty(dirty)
        with session.in_flight(array):
            pass
        session.suspend()
        session.resume()
        assert_type(tracker.statistics().collect_ns, int)
        assert_type(tracker.peek(region).page_count, int)
        assert_type(tracker.stop(), dirtytrack.DirtySet)
        session.unregister(region)


def by_comparing(array: np.ndarray) -> None:
    with dirtytrack.CompareSession(hashes=True) as session:
        assert_type(session.kept_bytes, int)
        assert_type(session.backend, str)
        tracker = dirtytrack.DirtyTracker(session, [session.register(array)])
        assert_type(tracker.session, dirtytrack.Session)
    either: dirtytrack.Session = dirtytrack.UffdSession()
    assert_type(dirtytrack.track(array, session=either), dirtytrack.DirtyTracker)
    assert_type(dirtytrack.track(array, backend="compare-hashes"), dirtytrack.DirtyTracker)


def sets(dirty: dirtytrack.DirtySet, region: dirtytrack.Region, array: np.ndarray) -> Iterator[int]:
    for run in dirty:
        assert_type(run, dirtytrack.Run)
        yield run.end - run.start
    for start, end in dirty:
        yield end - start
    assert_type(dirty.runs, memoryview)
    assert_type(dirty.assumed | dirty, dirtytrack.DirtySet)
    assert_type(dirty & dirty - dirty <= dirty, bool)
    assert_type(dirtytrack.DirtySet.union([dirty]), dirtytrack.DirtySet)
    assert_type(dirtytrack.DirtySet.from_runs(dirty.runs, epoch=3), dirtytrack.DirtySet)
    assert_type(dirtytrack.DirtySet.from_runs([(4096, 8192)]) | dirty, dirtytrack.DirtySet)
    assert_type(dirty.page_counts([(4096, 8192)]), memoryview)
    assert_type(dirty.page_counts(array), memoryview)
    assert_type(dirty.in_region("weights"), dirtytrack.DirtySet)
    assert_type(dirty.bitmap(region), bytes)
    assert_type(dirty.gather(out=bytearray(dirty.nbytes)), memoryview)
    assert_type(dirty.changed(array, granule=8192), dirtytrack.DirtySet)
    dirty.scatter(b"")
    dirty.copy_to({region: array})
    yield from dirty.rows(array)
    yield from dirty.pages("weights")


def raw(region: dirtytrack.Region) -> None:
    with dirtytrack.Pagemap(1) as map_of_init:
        scan = map_of_init.scan(0, 4096, category_mask=dirtytrack.PageCategory.PRESENT, max_pages=3)
        assert_type(scan, dirtytrack.Scan)
        assert_type([part.categories for part in scan], list[dirtytrack.PageCategory])
    assert_type(pagemap.written(region).walk_end, int)
    support = dirtytrack.probe()
    assert_type(support.tracking, bool)
    assert_type(support.remedies, tuple[str, ...])


def errors(memory: dirtytrack.Memory) -> int | None:
    try:
        dirtytrack.track(memory).start()
    except dirtytrack.RegionGone as gone:
        assert_type(gone.region, dirtytrack.Region | None)
        return gone.start
    except (dirtytrack.PermissionDenied, dirtytrack.UnsupportedKernel) as error:
        assert_type(error.feature, str | None)
        return error.errno
    return None


def deltas(array: np.ndarray, memory: dirtytrack.Memory, tracker: dirtytrack.DirtyTracker) -> Iterator[int]:
    mirror = bytearray(memory.nbytes)
    found = delta.diff(memory, mirror, tracker.collect(), granule=4, update=True, out=bytearray(10))
    assert_type(found, delta.Delta)
    delta.apply(found, mirror)
    delta.apply(found.compressed(), tracker.regions[0])
    assert_type(delta.compose(found, bytes(found)).nbytes, int)
    for offset, data in found:
        assert_type(data, memoryview)
        yield offset
    assert_type(found.changed(array, "rows"), memoryview)
    found.changed(array, "columns")  # type: ignore[arg-type]
    with delta.Mirror(array) as follower:
        assert_type(follower.update(), delta.Delta)
    delta.Mirror(tracker, "weights", granule=2)
    with delta.array_changes(array, name="weights") as changes:
        assert_type(changes(), memoryview)
        assert_type(changes.update(), delta.Delta)


def observing(array: np.ndarray) -> None:
    with dirtytrack.track(array) as tracker:
        with observe.Recorder(tracker, "run.dtr", every=0.05, size_budget=1 << 20, append=True) as recorder:
            array[0] = 1
        assert_type(recorder.statistics().cpu_share, float)
        source: observe.Source = observe.source_of(tracker)
        source.collect()
    recording = observe.Recording.open("run.dtr")
    assert_type(recording[0], observe.Epoch)
    assert_type(recording[1:], list[observe.Epoch])
    for epoch in observe.only(recording, "[heap]"):
        assert_type(epoch.runs, memoryview)
    assert_type(observe.Trace(recording).working_set()(0.5), float)
    assert_type(observe.precopy(recording, bandwidth=1e9, downtime=0.1).verdict, str)
    observe.precopy(recording)  # type: ignore[call-arg]

    @observe.dirtied({"array": array}, file=None)
    def step(at: int) -> str:
        array[at] += 1
        return "done"

    assert_type(step(1), str)
    with observe.dirtied(array) as block:
        pass
    assert_type(block.buffers, tuple[observe.DirtiedBuffer, ...])


def other_processes(pid: int) -> memoryview:
    with process.attach(pid, include=["[heap]", (4096, 8192)], exclude="[stack]", timeout=1.5) as tracker:
        assert_type(tracker, process.ProcessTracker)
        assert_type(tracker.mappings, tuple[process.Mapping, ...])
        assert_type(tracker.attach_stall, float)
        with tracker.frozen():
            dirty = tracker.collect()
        assert_type(dirty, dirtytrack.DirtySet)
        assert_type(tracker.statistics().seconds, float)
        assert_type(process.Workers([tracker], "/dev/shm/*").collect(), dirtytrack.DirtySet)
        return tracker.read(dirty)


def stores() -> None:
    with checkpoint.DirectoryStore("runs/a", create=True) as store:
        report = checkpoint.verify(store, all=True, progress=lambda done, total: print(done / total))
        assert_type(report, checkpoint.Report)
        assert_type(report.whole, int | None)
        assert_type([each.damage for each in report.checked], list[tuple[str, ...]])
    checkpoint.verify("runs/a", 17)


def collector(memory: dirtytrack.Memory, tracker: dirtytrack.DirtyTracker, low: int, high: int) -> None:
    remembered = gc.RememberedSet(tracker.regions, tracker, pointers=gc.PointerFormat.tagged(7, 1), nursery=(low, high))
    with remembered.forget_own_writes(nursery_empty=True):
        slots = remembered.minor(low, high)
        assert_type(slots, gc.Slots)
        assert_type(slots.addresses, memoryview)
        slots.redirect([target + 8 for target in slots.targets])
    assert_type(remembered.add(memory, name="more"), dirtytrack.Region)
    remembered.retain(slots)
    crossing = gc.CrossingMap(tracker.regions[0], alignment=16)
    crossing.add(range(low, high, 16))
    mark = gc.ConcurrentMark(tracker.regions, tracker, pause_seconds=0.001)
    mark.begin()
    for dirty in mark.rounds():
        assert_type(crossing.objects_on(dirty), memoryview)
    assert_type(mark.finish(), dirtytrack.DirtySet)
    assert_type(mark.history, tuple[gc.MarkRound, ...])
    cards = gc.CardTable(tracker.regions, tracker, 512, mirror=True)
    cards.update()
    assert_type(crossing.objects_on(cards.dirty_ranges()), memoryview)
    assert_type(cards.index(low), tuple[dirtytrack.Region, int])


def checkpoints() -> None:
    table = bytearray(4096)
    with checkpoint.Checkpointer("runs/a", {"table": table}, retain=checkpoint.Retention(last=3)) as ckpt:
        save = ckpt.save({"step": 1})
        assert_type(save, checkpoint.Save)
        assert_type(save.wait(), bool)
    state = checkpoint.restore("runs/a", into={"table": table}, generation=17, fallback=True, progress=print)
    assert_type(state, checkpoint.State)
    assert_type(state.generation, int)
    assert_type(state.regions[0], checkpoint.RegionEntry)
    assert_type(checkpoint.compact("runs/a", memory_bytes=16 << 20), checkpoint.Manifest)
    assert_type(checkpoint.prune("runs/a", checkpoint.Retention(age_seconds=3600)).removed, tuple[int, ...])
    assert_type(checkpoint.compare("runs/a", 1, 2).regions[0].runs, tuple[tuple[int, int], ...])
    assert_type(checkpoint.generations("runs/a"), tuple[checkpoint.Summary, ...])


def many_ranks(comm: checkpoint.Communicator, grid: np.ndarray) -> None:
    with checkpoint.coordinated(
        comm, "runs/a", {"grid": grid}, partition={"grid": 0}, replicated=["weights"], resume=True, compression=None
    ) as ckpt:
        assert_type(ckpt, checkpoint.Coordinated)
        assert_type(ckpt.resumed, checkpoint.State | None)
        assert_type(ckpt.save({"step": 1}), checkpoint.Save)
        assert_type(ckpt.rank, int)
    checkpoint.coordinated(comm, "runs/a", {"grid": grid}, when_busy="skip")  # type: ignore[arg-type]
    checkpoint.coordinated(comm, "runs/a", {"grid": grid}, colour=1)  # type: ignore[call-arg]
    assert_type(checkpoint.restore_share(comm, "runs/a", names=["grid"]), checkpoint.State)


def cores() -> None:
    made = images.write_core("images/redis", "core.3", 3, progress=lambda done, total: print(done / total))
    assert_type(made, images.Core)
    assert_type(made.missing, tuple[images.Missing, ...])
    found = images.compare_images("images/redis", 3, 7, objects=False)
    assert_type(found.changed_pages, int)
    assert_type(found.mappings[0].newer, images.MappedRange | None)
    assert_type(found.objects, tuple[images.ObjectDifference, ...])

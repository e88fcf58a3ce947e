# SPDX-License-Identifier: MIT
"""Deltas that cannot be made, read or applied. Nothing is written, and nothing is lost. Under 1 s of 20 min."""

from __future__ import annotations

import errno
import mmap
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

import dirtytrack
from dirtytrack.delta import Delta, Mirror, apply, array_changes, compose, diff
from tests.kernel.failures.world import PAGES, World, write
from tests.oracle import PAGE


def test_a_diff_that_does_not_fit(world: World) -> None:
    view, mirror = memoryview(world.memory), bytearray(PAGES * PAGE)
    write(world.memory, 3)
    dirty = world.tracker.collect()
    for granule in (0, 3, 8192):
        with pytest.raises(dirtytrack.InvalidMemory, match="power of two"):
            diff(view, mirror, dirty, granule)
        with pytest.raises(dirtytrack.InvalidMemory, match="power of two"):
            Mirror(bytearray(9), granule=granule)
    for wrong, update in ((bytearray(3), False), (bytes(mirror), True), (view, False)):
        with pytest.raises(dirtytrack.InvalidMemory, match=r"bytes|read-only|overlaps"):
            diff(view, wrong, dirty, update=update)
    for out in (bytearray(3), view, (world.memory.address, world.memory.nbytes)):
        with pytest.raises(dirtytrack.InvalidMemory, match="output"):
            diff(view, mirror, dirty, update=True, out=out)  # type: ignore[arg-type]
    assert mirror == bytes(PAGES * PAGE)
    with pytest.raises(dirtytrack.InvalidMemory, match="not C-contiguous"):
        array_changes(np.zeros((9, 9))[:, ::2])


def test_a_diff_of_pages_that_nobody_watched(world: World) -> None:
    other, mirror = bytearray(PAGE), bytearray(PAGE)
    with pytest.raises(dirtytrack.InvalidMemory, match="nobody watched"):
        diff(other, mirror, world.tracker.collect())


def test_bytes_that_are_no_delta() -> None:
    good, target = bytes(diff(b"new", b"old")), bytearray(b"old")
    for bad in (b"", b"anything else, as long as it likes", good[:-1], good[:-1] + b"?", good[:3] + b"\2" + good[4:]):
        with pytest.raises(dirtytrack.InvalidDelta):
            apply(bad, target)
        with pytest.raises(dirtytrack.InvalidDelta):
            compose(good, bad)
        with pytest.raises(dirtytrack.InvalidDelta):
            Delta.from_bytes(bad)
    assert target == b"old"
    apply(good, target)
    assert target == b"new"


def test_a_target_that_does_not_fit() -> None:
    delta, longer = diff(b"new", b"old"), diff(b"newer", b"older")
    for target in (bytearray(b"old!"), b"old"):
        with pytest.raises(dirtytrack.InvalidMemory, match=r"bytes|read-only"):
            apply(delta, target)
        assert target[:3] == b"old"
    with pytest.raises(dirtytrack.InvalidMemory, match="for a memory of"):
        compose(delta, longer)
    with pytest.raises(dirtytrack.InvalidMemory, match="for a memory of"):
        Delta.from_bytes(bytes(delta), target_nbytes=4)
    room = bytearray(8192)
    inside = diff(b"new", b"old", out=room)
    with pytest.raises(dirtytrack.InvalidMemory, match="lies in the memory"):
        apply(inside, memoryview(room)[:3])


def test_elements_that_a_delta_does_not_tell() -> None:
    array = np.zeros(100, np.float32)
    delta = diff(array, np.ones_like(array), granule=8)
    with pytest.raises(dirtytrack.InvalidMemory, match="granule=4"):
        delta.changed(array)
    with pytest.raises(dirtytrack.InvalidMemory, match="offset="):
        delta.changed(array[:50])
    with pytest.raises(dirtytrack.InvalidMemory, match="not 'columns'"):
        delta.changed(array.view("f8"), "columns")  # type: ignore[arg-type]


def test_a_mirror_of_no_region(world: World) -> None:
    with dirtytrack.track(bytearray(9), bytearray(9)) as tracker:
        for region in (None, "elsewhere"):
            with pytest.raises(dirtytrack.InvalidMemory, match="region"):
                Mirror(tracker, region)
    with pytest.raises(dirtytrack.InvalidMemory, match="region="):
        Mirror(bytearray(9), world.region)
    with pytest.raises(dirtytrack.InvalidMemory, match="exists already"):
        Mirror(world.tracker, blind_spots="accepted")


def test_a_mirror_whose_tracker_is_not_running(world: World) -> None:
    mirror = Mirror(world.tracker)
    world.tracker.stop()
    with pytest.raises(dirtytrack.NotStarted):
        mirror.update()
    with pytest.raises(dirtytrack.NotStarted):
        Mirror(world.tracker)
    write(world.memory, 2)
    world.tracker.start()
    write(world.memory, 1)
    assert [at // PAGE for at, _ in mirror.update()] == [1]


def test_a_page_that_vanishes_beneath_a_diff(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * PAGE))
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 4 * PAGE)
        mirror = Mirror(memory, blind_spots="accepted")
        memory[0] = memory[3 * PAGE] = 1
        os.truncate(path, 2 * PAGE)
        with pytest.raises(dirtytrack.RegionGone) as gone:
            mirror.update()
        assert gone.value.errno == errno.EFAULT
        assert gone.value.start is not None
        assert gone.value.end == gone.value.start + PAGE
        with pytest.raises(dirtytrack.RegionGone):
            diff(memory, bytes(4 * PAGE))
        with pytest.raises(dirtytrack.RegionGone):
            apply(diff(b"x" * 4 * PAGE, bytes(4 * PAGE)), memory)
        memory[0] = 1
        os.truncate(path, 4 * PAGE)
        assert mirror.data == bytes(4 * PAGE)
        mirror.update()
        assert mirror.data == memory[:]
        mirror.close()


def test_a_delta_of_a_region_that_is_gone(world: World) -> None:
    region = world.session.register(memory := bytearray(3 * PAGE), name="short-lived")
    delta = diff(region, b"x" * len(memory))
    world.session.unregister(region)
    with pytest.raises(dirtytrack.NotRegistered):
        diff(region, bytearray(len(memory)))
    with pytest.raises(dirtytrack.NotRegistered):
        apply(delta, region)
    with dirtytrack.UffdSession() as session:
        region = session.register(memory)
    with pytest.raises(dirtytrack.SessionClosed):
        apply(delta, region)


def test_a_compressed_delta_without_zstandard(monkeypatch: pytest.MonkeyPatch) -> None:
    delta = diff(bytes(PAGE), b"x" * PAGE)
    data = delta.compressed()
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(dirtytrack.UnsupportedKernel, match=r"dirtytrack\[zstd\]"):
        delta.compressed()
    with pytest.raises(dirtytrack.UnsupportedKernel, match=r"dirtytrack\[zstd\]"):
        Delta.from_bytes(data)
    assert Delta.from_bytes(bytes(delta)) == delta


def test_pickling_a_mirror(world: World) -> None:
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(Mirror(world.tracker))

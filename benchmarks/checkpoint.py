# SPDX-License-Identifier: MIT
"""Checkpoints: the stall against a bare collect and memcpy; a save against numpy.save; a full one against pwrite; and a
program that saves each second against the same one that does not."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from dirtytrack import allocate
from dirtytrack.checkpoint import Checkpointer, Retention

from .bare import PAGE, Bare, address_of
from .harness import (
    GIB,
    MIB,
    Arena,
    Pair,
    Row,
    Settings,
    arena,
    flat,
    paired,
    quartiles,
    rounds,
    scattered,
    show_bytes,
    show_ns,
)

SHARES = (0.001, 0.01, 0.1)
APP_SHARES = (0.001, 0.01, 0.1, 0.3)
STAGING_SHARE = 0.12  # of the memory: the dirty bytes fit
MOST_STALL, EXTRA_STALL_NS = 1.15, 100_000
LEAST_SPEED_UP, LEAST_FULL_SPEED = 20.0, 0.8
CHUNK = MIB
FEW_ROUNDS = 5  # of what writes all of the memory to a disk


@contextmanager
def saving(space: Arena, where: Path, **options: Any) -> Iterator[Checkpointer]:
    """A Checkpointer of the arena that has saved once; it keeps little."""
    track = {"session": space.trackers[0].session, "exact": True}
    staging_bytes = max(1 << 16, int(space.memory.nbytes * STAGING_SHARE))
    options = {"compression": None, "retain": Retention(last=1), "compact": None, "track": track, **options}
    with Checkpointer(where / "store", {"memory": space.memory}, staging_bytes=staging_bytes, **options) as ckpt:
        ckpt.save().wait()
        yield ckpt


@contextmanager
def directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="dirtytrack-benchmark-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def timed(run: Callable[[], object]) -> int:
    begin = time.perf_counter_ns()
    run()
    return time.perf_counter_ns() - begin


def synced(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file, or a directory of files, and wait until all of it and its name are durable."""
    write(path)
    for each in (path, *path.rglob("*"), path.parent):
        file = os.open(each, os.O_RDONLY)
        os.fsync(file)
        os.close(file)


@dataclass
class Weighed:
    """Nanoseconds of both sides, and what of the processors they took, all threads together."""

    ours: list[int]
    bare: list[int]
    ours_cpu: list[float]
    bare_cpu: list[float]

    def row(self, name: str, least_speed: float | None) -> Row:
        """By the best of all rounds: a disk that others use too is never quicker than it is."""
        ours, bare = min(self.ours), min(self.bare)
        speed, cpu = bare / ours, min(self.ours_cpu) / max(min(self.bare_cpu), 1e-9)
        result = f"{speed:.3g} of the speed, {cpu:.2g} of the CPU"
        target, ok = ("", True) if least_speed is None else (f">= {least_speed}", speed >= least_speed)
        spread = quartiles(self.ours), quartiles(self.bare)
        return Row(name, ours, bare, result, target, ok, len(self.ours), *spread)


def weighed(
    settings: Settings, prepare: Callable[[], None], ours: Callable[[], object], bare: Callable[[], object]
) -> Weighed:
    """In turn, on all processors: what a save does behind the program is to run beside it."""
    found = Weighed([], [], [], [])
    sides = [(ours, found.ours, found.ours_cpu), (bare, found.bare, found.bare_cpu)]
    for _ in rounds(settings):
        for run, times, cpu in sides:
            prepare()
            before = time.process_time()
            times.append(timed(run))
            cpu.append(time.process_time() - before)
        sides.reverse()
    return found


def stall(settings: Settings, bare: Bare, space: Arena, where: Path, nbytes: int) -> Iterator[Row]:
    staging = np.empty(max(1 << 16, int(nbytes * STAGING_SHARE)), np.uint8)
    bare.populate(address_of(staging), staging.nbytes)
    start, end, address = space.region.start, space.region.end, address_of(staging)
    with saving(space, where) as ckpt:
        for share in SHARES:
            pages = scattered(space.page_count, share)
            bare.write(start, pages)
            space.trackers[0].collect()  # what was written before
            bare.write(start, pages)
            runs = flat(space.trackers[0].collect().runs)

            def prepare(pages: Any = pages) -> None:
                ckpt.wait()
                bare.write(start, pages)
                space.rehearse()

            def ours(count: int = len(pages)) -> int:
                save = ckpt.save()
                assert save.kind == "increment"
                return int(save.stall_seconds * 1e9)

            def loop(runs: Any = runs) -> int:
                return bare.collect(start, end)[0] + bare.gather(runs, address)

            pair = paired(settings, prepare, ours, loop)
            yield pair.cost_row(f"stall {show_bytes(nbytes)}, {share:.4g} dirty", MOST_STALL, EXTRA_STALL_NS)


def others(where: Path, data: Any) -> Iterator[tuple[str, Callable[[], object]]]:
    """How else one saves an array, durably."""
    yield "numpy.save", lambda: synced(where / "all.npy", lambda path: np.save(path, data))
    if find_spec("zarr"):
        zarr = import_module("zarr")
        yield "zarr.save", lambda: synced(where / "all.zarr", lambda path: zarr.save(str(path), data))
    if find_spec("torch"):
        torch, saved = import_module("torch"), import_module("torch.distributed.checkpoint")
        tensor = torch.from_numpy(data)
        yield "torch.save", lambda: synced(where / "all.pt", lambda path: torch.save(tensor, path))

        def to_dcp(path: Path) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that there is one process only
                saved.save({"data": tensor}, checkpoint_id=str(path), no_dist=True)

        yield "torch DCP", lambda: synced(where / "all.dcp", to_dcp)


def end_to_end(settings: Settings, bare: Bare, space: Arena, where: Path, nbytes: int) -> Iterator[Row]:
    data = np.frombuffer(space.memory, np.uint8)
    pages = scattered(space.page_count, 0.01)
    with saving(space, where) as ckpt:

        def prepare() -> None:
            ckpt.wait()
            for old in where.glob("all.*"):
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            bare.write(space.region.start, pages)

        for name, save_all in others(where, data):
            aimed = name == "numpy.save"
            how_often = settings if aimed else replace(settings, least_rounds=1, most_rounds=1)  # minutes, some of them
            found = weighed(how_often, prepare, lambda: ckpt.save().wait(), save_all)
            title = f"{show_bytes(nbytes)}, 0.01 dirty, to {name}"
            yield found.row(title, LEAST_SPEED_UP if aimed else None)


def full(settings: Settings, bare: Bare, space: Arena, where: Path, nbytes: int) -> Iterator[Row]:
    view = memoryview(space.memory)

    def write(path: Path) -> None:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for at in range(0, nbytes, CHUNK):
            os.pwrite(file, view[at : at + CHUNK], at)
        os.close(file)

    def prepare() -> None:
        ckpt.wait()
        (where / "all").unlink(missing_ok=True)
        os.sync()

    with saving(space, where) as ckpt:
        found = weighed(settings, prepare, lambda: ckpt.save(full=True).wait(), lambda: synced(where / "all", write))
        yield found.row(f"full {show_bytes(nbytes)}", LEAST_FULL_SPEED)


def beside(settings: Settings, bare: Bare, where: Path, nbytes: int) -> Iterator[Row]:
    """A program that writes one word in each of its hot pages, over and over, as fast as it can: nothing that it does
    hides what a first write to a page costs. It saves a second after it last did. The same without saves is measured in
    memory that nobody watches."""
    seconds, every = (0.1, 0.05) if settings.tiny else (3.5, 1.0)
    watched, free = (allocate(nbytes) for _ in range(2))
    for memory in (watched, free):
        np.frombuffer(memory, np.uint64)[:] = np.arange(nbytes // 8, dtype=np.uint64)
    options: dict[str, Any] = {"compression": None, "retain": Retention(last=1)}
    for share in APP_SHARES:
        pages = scattered(nbytes // PAGE, share)

        def work(address: int, save: Callable[[], object], pages: Any = pages) -> float:
            """Nanoseconds for a page."""
            begin, passes, due = time.perf_counter(), 0, every
            while (now := time.perf_counter() - begin) < seconds:
                if now >= due:
                    save()
                    due = time.perf_counter() - begin + every
                bare.write(address, pages, 0, passes & 0x7F)
                passes += 1
            return (time.perf_counter() - begin) * 1e9 / (passes * len(pages))

        plain, saved, stalls = list[int](), list[int](), list[float]()
        with Checkpointer(where / f"{share}", {"memory": watched}, **options) as ckpt:
            ckpt.save().wait()

            def save(ckpt: Checkpointer = ckpt, stalls: list[float] = stalls) -> None:
                made = ckpt.save()
                stalls.append(made.stall_seconds + made.waited_seconds)

            for _ in range(1 if settings.tiny else 2):
                saved.append(int(1000 * work(watched.address, save)))
                ckpt.wait()
                plain.append(int(1000 * work(free.address, lambda: None)))
        ours, without = min(saved) / 1000, min(plain) / 1000
        result = f"{without / ours:.3g} of the speed, stalls {show_ns(median(stalls) * 1e9)}"
        name = f"each second {show_bytes(nbytes)}, {share:.4g} dirty"
        low, high = ((each[0] / 1000, each[1] / 1000) for each in (quartiles(saved), quartiles(plain)))
        yield Row(name, ours, without, result, "", True, len(saved), low, high, share=share)


def rested(settings: Settings, bare: Bare, nbytes: int) -> Iterator[Row]:
    """What the first stall after a second pays on this machine, whoever causes it: Python code that did not run for so
    long, against the same code once more."""
    memory, pages = allocate(nbytes), scattered(nbytes // PAGE, APP_SHARES[0])
    address = address_of(memory)
    bare.write(address, pages)

    def code() -> int:
        begin = time.perf_counter_ns()
        sum(len(str(number)) for number in range(2000))
        return time.perf_counter_ns() - begin

    cold, warm = list[int](), list[int]()
    for _ in range(1 if settings.tiny else 5):
        begin = time.perf_counter()
        while time.perf_counter() - begin < (0.05 if settings.tiny else 1.0):
            bare.write(address, pages)
        cold.append(code())
        warm.append(code())
    yield Pair(cold, warm).told_row("a loop of Python after a second, and again")


def checkpoint(settings: Settings, bare: Bare) -> Iterator[Row]:
    """Saves into a store on the disk of the temporary directory (TMPDIR), beside other ways, with the same fsyncs."""
    few = replace(settings, least_rounds=min(settings.least_rounds, FEW_ROUNDS), most_rounds=FEW_ROUNDS)
    for nbytes in settings.sizes(GIB):
        for measure, how_long in ((stall, settings), (end_to_end, few), (full, few)):
            with arena(bare, nbytes) as space, directory() as where:
                np.frombuffer(space.memory, np.uint64)[:] = np.arange(nbytes // 8, dtype=np.uint64) * 0x9E3779B97F4A7C15
                space.trackers[0].collect()
                yield from measure(how_long, bare, space, where, nbytes)


def checkpoint_beside(settings: Settings, bare: Bare) -> Iterator[Row]:
    """A program that saves each second, against the same one that does not, by how much it writes."""
    for nbytes in settings.sizes(GIB):
        with directory() as where:
            yield from beside(settings, bare, where, nbytes)
        yield from rested(settings, bare, nbytes)

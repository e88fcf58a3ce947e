# SPDX-License-Identifier: MIT
"""Deltas: nothing changed against memcmp, everything changed against memcpy, and one training step against zstd."""

from __future__ import annotations

import importlib.util
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import zstandard

import dirtytrack
from dirtytrack.delta import Delta, apply, diff

from .bare import PAGE, Bare, address_of
from .harness import (
    GIB,
    MIB,
    Arena,
    Pair,
    Row,
    Settings,
    alone,
    arena,
    flat,
    paired,
    rounds,
    scattered,
    show_bytes,
    undisturbed,
)

NBYTES = 256 * MIB
SHARES = (0.01, 0.1, 0.5, 1.0)
LEAST_COMPARE_SPEED, LEAST_COPY_SPEED = 0.9, 0.7
GRANULE = 8
ASIDE = PAGE
PROCESSORS = 2
"""For `diff`, which encodes two halves side by side; memcmp and memcpy run on one of them."""

Run = Callable[[], Delta]


class Sides:
    """A memory of which some pages were written, its mirror, and room for a delta; all of it populated."""

    def __init__(self, bare: Bare, space: Arena, share: float) -> None:
        self.memory, nbytes = space.memory, space.memory.nbytes
        self.out = dirtytrack.allocate(nbytes + nbytes // 64 + PAGE)
        # Where Mirror would have it: memories a multiple of 256 MiB apart are slow to compare, by memcmp too.
        self.mirror = memoryview(dirtytrack.allocate(nbytes + ASIDE))[ASIDE:]
        for other in (self.mirror, self.out):
            bare.populate(address_of(other), other.nbytes)
        self.bytes = np.frombuffer(self.memory, np.uint8)
        self.other = np.frombuffer(self.mirror, np.uint8)
        self.other[:] = self.bytes
        pages = scattered(space.page_count, share)
        space.trackers[0].collect()  # what was written before
        bare.write(space.region.address, pages)
        bare.write(address_of(self.mirror), pages)
        self.dirty = space.trackers[0].collect()
        self.runs = flat(self.dirty.runs)
        self.pages = np.frombuffer(pages, np.uint64).astype(np.intp)
        self.nbytes = self.dirty.nbytes
        self.rehearse_others = space.rehearse
        self.page, self.page_mirror, self.page_out = bytearray(PAGE), bytearray(PAGE), bytearray(3 * PAGE)

    def differ(self, step: int) -> None:
        """Make one byte in so many differ, in the dirty pages."""
        self.bytes.reshape(-1, PAGE)[self.pages, ::step] ^= 0xFF

    def rehearse(self) -> None:
        """As harness.Rehearsal: the calls that are measured, on a page of their own."""
        self.rehearse_others()
        apply(diff(self.page, self.page_mirror, None, GRANULE, out=self.page_out), self.page_mirror)

    def diff(self, granule: int = GRANULE, **options: Any) -> Delta:
        return diff(self.memory, self.mirror, self.dirty, granule, out=self.out, **options)


def timed(run: Callable[[], object], least_bytes: int = 0) -> int:
    begin = time.perf_counter_ns()
    result = run()
    elapsed = time.perf_counter_ns() - begin
    assert not isinstance(result, Delta) or result.nbytes >= least_bytes
    return elapsed


def none_changed(settings: Settings, bare: Bare, space: Arena, share: float) -> Pair:
    sides = Sides(bare, space, share)
    address, base = address_of(sides.mirror), space.region.start
    return paired(
        settings,
        sides.rehearse,
        lambda: timed(sides.diff),
        lambda: bare.changed(sides.runs, base, address)[0],
        processors=PROCESSORS,
    )


def all_changed(settings: Settings, bare: Bare, space: Arena, share: float, granule: int = GRANULE) -> Pair:
    sides = Sides(bare, space, share)
    sides.differ(1)
    address, run = address_of(sides.out), partial(sides.diff, granule)
    return paired(
        settings,
        sides.rehearse,
        lambda: timed(run, sides.nbytes),
        lambda: bare.gather(sides.runs, address),
        processors=PROCESSORS,
    )


def all_updated(settings: Settings, bare: Bare, space: Arena, granule: int) -> Pair:
    """With the mirror, which is read and written: as many streams as two copies, one of them to the mirror."""
    sides = Sides(bare, space, 1.0)
    sides.differ(1)
    before = sides.other.copy()

    def prepare() -> None:
        sides.other[:] = before
        sides.rehearse()

    run, places = partial(sides.diff, granule, update=True), (address_of(sides.out), address_of(sides.mirror))
    return paired(
        settings,
        prepare,
        lambda: timed(run, sides.nbytes),
        lambda: sum(bare.gather(sides.runs, place) for place in places),
        processors=PROCESSORS,
    )


def all_in_new_memory(settings: Settings, bare: Bare, space: Arena) -> Pair:
    """Where `out` is left out, beside a copy that takes memory too."""
    sides = Sides(bare, space, 1.0)
    sides.differ(1)

    def copied() -> int:
        begin = time.perf_counter_ns()
        memory = dirtytrack.allocate(sides.out.nbytes)
        bare.gather(sides.runs, address_of(memory))
        return time.perf_counter_ns() - begin

    run = partial(diff, sides.memory, sides.mirror, sides.dirty, GRANULE)
    return paired(settings, sides.rehearse, lambda: timed(run, sides.nbytes), copied, processors=PROCESSORS)


def some_changed(settings: Settings, bare: Bare, space: Arena, share: float, step: int) -> Pair:
    """A byte in `step` differs."""
    sides = Sides(bare, space, share)
    sides.differ(step)
    address = address_of(sides.out)
    return paired(
        settings,
        sides.rehearse,
        lambda: timed(sides.diff),
        lambda: bare.gather(sides.runs, address),
        processors=PROCESSORS,
    )


def applied(settings: Settings, bare: Bare, space: Arena, share: float) -> Pair:
    sides = Sides(bare, space, share)
    sides.differ(1)
    delta, spare = sides.diff(), dirtytrack.allocate(sides.nbytes)
    bare.populate(address_of(spare), spare.nbytes)
    address = address_of(spare)
    return paired(
        settings,
        sides.rehearse,
        lambda: timed(lambda: apply(delta, sides.mirror)),
        lambda: bare.gather(sides.runs, address),
    )


def delta(settings: Settings, bare: Bare) -> Iterator[Row]:
    """`diff` against memcmp and memcpy of the same pages; a bf16 training step (where PyTorch is) against zstd."""
    for nbytes in settings.sizes(NBYTES):
        with arena(bare, nbytes) as space:
            for share in SHARES:
                where = f"{show_bytes(nbytes)}, {share:.4g} dirty"
                pair = none_changed(settings, bare, space, share)
                yield pair.speed_row(f"delta of nothing, {where}", LEAST_COMPARE_SPEED)
                pair = all_changed(settings, bare, space, share)
                yield pair.speed_row(f"delta of everything, {where}", LEAST_COPY_SPEED)
            pair = all_in_new_memory(settings, bare, space)
            yield pair.told_row("delta of everything in new memory, beside memcpy there")
            for step in (PAGE, 512, 64, 16):
                name = f"delta of 1 granule in {step // GRANULE}, beside memcpy"
                yield some_changed(settings, bare, space, 1.0, step).told_row(name)
            yield applied(settings, bare, space, 1.0).told_row("apply everything, beside memcpy")
    for nbytes in settings.sizes(64 * MIB, GIB):
        with arena(bare, nbytes) as space:
            for granule in (1, 2, 4, 8):
                where = f"{show_bytes(nbytes)}, granule {granule}"
                pair = all_changed(settings, bare, space, 1.0, granule)
                yield pair.speed_row(f"delta of everything, {where}", LEAST_COPY_SPEED)
                pair = all_updated(settings, bare, space, granule)
                yield pair.speed_row(f"delta of everything and update, {where}", LEAST_COPY_SPEED)
    if importlib.util.find_spec("torch") is not None:
        yield from training(settings)


# ---- a training step -------------------------------------------------------------------------------------------------


@contextmanager
def trained(settings: Settings) -> Iterator[tuple[dirtytrack.Memory, bytes, dirtytrack.DirtySet]]:
    """The bf16 parameters of a model after some steps of Adam, what they were a step before, and its dirty pages."""
    torch: Any = importlib.import_module("torch")
    torch.manual_seed(0)
    words, width = (500, 32) if settings.tiny else (30_000, 256)
    model = torch.nn.Sequential(
        torch.nn.EmbeddingBag(words, width),
        *(layer for _ in range(4) for layer in (torch.nn.Linear(width, width), torch.nn.GELU())),
        torch.nn.Linear(width, 1000),
    ).to(torch.bfloat16)
    parameters = list(model.parameters())
    memory = dirtytrack.allocate(sum(-(-p.numel() * 2 // 64) * 64 for p in parameters), name="parameters")
    room, at = torch.frombuffer(memory, dtype=torch.bfloat16), 0
    for p in parameters:
        place = room[at : at + p.numel()].view(p.shape)
        place.copy_(p.data)
        p.data = place
        at += -(-p.numel() // 32) * 32
    optimizer = torch.optim.Adam(parameters, lr=1e-4)
    with dirtytrack.track(memory) as tracker:
        for _ in range(2 if settings.tiny else 20):
            before = bytes(memory)
            tracker.collect()
            text, labels = torch.randint(0, words, (64, 64)), torch.randint(0, 1000, (64,))
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(text).float(), labels).backward()
            optimizer.step()
        yield memory, before, tracker.collect()


def training(settings: Settings) -> Iterator[Row]:
    with trained(settings) as (memory, before, dirty):
        yield from compared(settings, memory, before, dirty)


def compared(settings: Settings, memory: dirtytrack.Memory, before: bytes, dirty: dirtytrack.DirtySet) -> Iterator[Row]:
    nbytes = dirty.page_span_bytes
    pages = bytearray(nbytes)
    out = dirtytrack.allocate(memory.nbytes + memory.nbytes // 64 + PAGE)
    old = np.frombuffer(before, np.uint8)
    coder = zstandard.ZstdCompressor(level=3)
    mirror = bytearray(before)
    found = array("Q", dirty.offsets().tobytes())
    was = np.concatenate([old[start:end] for start, end in zip(found[::2], found[1::2], strict=True)])

    def made() -> Delta:
        return diff(memory, mirror, dirty, 2, out=out)

    def pages_now() -> Any:
        return np.frombuffer(dirty.gather(pages), np.uint8)

    ways: dict[str, Callable[[], int]] = {
        "diff": lambda: made().nbytes,
        "diff, then zstd": lambda: len(made().compressed(3)),
        "zstd of the pages": lambda: len(coder.compress(pages_now())),
        "zstd of their XOR": lambda: len(coder.compress(pages_now() ^ was)),
    }
    for name, way in ways.items():
        samples, size = list[int](), way()
        with undisturbed(PROCESSORS):
            for _ in rounds(settings):
                begin = time.perf_counter_ns()
                way()
                samples.append(time.perf_counter_ns() - begin)
        rate = nbytes / median(samples)
        result = f"{size / nbytes:.4f} of {nbytes / MIB:.1f} MiB, {rate:.2f} GB/s"
        yield alone(samples, f"delta of a bf16 Adam step: {name}", result, "", True)

# SPDX-License-Identifier: MIT
"""A save that failed leaves what is whole in the store to the next one, which does not send it again."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from obstore.store import MemoryStore

import dirtytrack
from dirtytrack.checkpoint import Checkpointer, ObjectStore, Retention, restore, verify
from dirtytrack.checkpoint.objects.sink import ObjectSink
from dirtytrack.errors import StoreFailed
from tests.buckets import BUCKET, Failing, Proxy, Request, options
from tests.saving import paged, require_equal

KIB, MIB = 1 << 10, 1 << 20
PAGE = 4096


@pytest.fixture
def proxy(s3: str) -> Iterator[Proxy]:
    with Proxy(s3) as found:
        yield found


class Cut:
    """A line that is cut once so many bytes of segments have passed."""

    def __init__(self, after: int | None) -> None:
        self.left, self.nbytes = after, 0

    def __call__(self, request: Request) -> str:
        if request.method == "PUT" and request.key.rpartition("/")[0].endswith("segments"):
            if self.left is not None and self.nbytes + request.nbytes > self.left:
                return "cut"
            self.nbytes += request.nbytes
        return "cut" if self.left is not None and self.nbytes > self.left - 6 * MIB else "pass"


@pytest.mark.parametrize("staging_bytes", [None, 4 * MIB], ids=["at once", "waves"])
@pytest.mark.parametrize("first", [True, False], ids=["the first save", "an increment"])
def test_a_line_that_is_cut(
    s3: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, staging_bytes: int | None, first: bool
) -> None:
    monkeypatch.setattr(ObjectSink, "whole_nbytes", 6 * MIB)
    url = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    buffers = {"grid": paged(10_000, 1), "table": paged(300, 2)}
    grid: Any = buffers["grid"].reshape(10_000, PAGE)
    store = ObjectStore(url, create=True, part_bytes=5 * MIB, parts_in_flight=2, **options(proxy.address))
    with Checkpointer(store, buffers, compression=None, staging_bytes=staging_bytes) as ckpt:
        if not first:
            ckpt.save().wait()
            grid[1000:, 7] += 1
        proxy.meddle = cut = Cut(30 * MIB)
        failed = ckpt.save()
        with pytest.raises(StoreFailed):
            failed.wait()
        assert 18 * MIB < cut.nbytes <= 30 * MIB
        grid[[2000, 9000], 5] += 3  # one that is there already, one that is not
        proxy.meddle = again = Cut(None)
        save = ckpt.save()
        assert save.wait() and save.kind == ("full" if first else "increment")
        total = sum(map(len, map(bytes, buffers.values())))
        assert again.nbytes < total - 12 * MIB and save.bytes_written < total - 12 * MIB
        require_equal(ObjectStore(url, **options(s3)), {name: bytes(each) for name, each in buffers.items()})
        grid[5] = 9
        ckpt.save().wait()
        require_equal(ObjectStore(url, **options(s3)), {name: bytes(each) for name, each in buffers.items()})
    with ObjectStore(url, grace_seconds=0, **options(s3)) as opened, opened.writer() as writer:
        writer.clean()
        assert not opened.strangers() and verify(opened, all=True).ok


def test_what_is_left_goes_with_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ObjectSink, "whole_nbytes", 64 * KIB)
    bucket = Failing(MemoryStore())
    data = paged(200, 1)
    store = ObjectStore(bucket, create=True, grace_seconds=0)
    with Checkpointer(store, {"data": data}, compression=None, staging_bytes=128 * KIB) as ckpt:
        bucket.nth, bucket.for_ever = bucket.count + 6, True
        with pytest.raises(StoreFailed):
            ckpt.save().wait()
        bucket.nth = 0
        assert len(store.segments()) > 1
    assert not store.segments()


@pytest.mark.parametrize("seed", [*range(12), *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(12, 400))])
def test_whatever_fails_what_is_committed_is_what_was_there(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Buffers overlap, share pages, come, go and are replaced; saves fail at any request, one behind the other."""
    draw = random.Random(seed)
    monkeypatch.setattr(ObjectSink, "whole_nbytes", draw.choice([8, 40, 200]) * KIB)
    objects = MemoryStore()
    bucket = Failing(objects)
    memory = np.frombuffer(dirtytrack.allocate(120 * PAGE), np.uint8)
    memory[:] = np.frombuffer(draw.randbytes(memory.nbytes), np.uint8)

    def stretch() -> Any:
        start = draw.randrange(100 * PAGE)
        if draw.random() < 0.5:
            start = start // PAGE * PAGE
        return memory[start : start + draw.randrange(1, 20 * PAGE)]

    buffers: dict[str, Any] = {"whole": memory[: 60 * PAGE], **{f"b{i}": stretch() for i in range(3)}}
    truths: dict[int, dict[str, bytes]] = {}
    store = ObjectStore(bucket, create=True, grace_seconds=0)
    with Checkpointer(
        store,
        buffers,
        compression=draw.choice([None, "zstd"]),
        deltas=draw.random() < 0.2,
        staging_bytes=draw.choice([64 * KIB, 256 * KIB, None]),
        when_busy=draw.choice(["wait", "coalesce"]),
        retain=draw.choice([None, Retention(last=3)]),
        compact=draw.choice([None, 0.5]),
    ) as ckpt:
        for step in range(40):
            for _ in range(draw.choice([0, 1, 5, 40])):
                memory[draw.randrange(memory.nbytes)] = draw.randrange(256)
            what = draw.random()
            if what < 0.1:
                buffers[f"n{step}"] = stretch()
                ckpt.add(f"n{step}", buffers[f"n{step}"])
            elif what < 0.2 and len(buffers) > 1:
                name = draw.choice(list(buffers))
                del buffers[name]
                ckpt.remove(name)
            elif what < 0.3:
                name = draw.choice(list(buffers))
                buffers[name] = draw.choice([buffers[name], stretch()])
                ckpt.replace(name, buffers[name])
            fails = draw.random() < 0.6
            bucket.for_ever = draw.random() < 0.7
            bucket.nth = bucket.count + draw.randrange(1, 30) if fails else 0
            try:
                save = ckpt.save(full=draw.random() < 0.15)
            except StoreFailed:
                continue
            truths[save.generation or 0] = {name: bytes(buffer) for name, buffer in buffers.items()}
            if draw.random() < 0.5:
                with suppress(StoreFailed):
                    save.wait()
        bucket.nth = 0
        for _ in range(8):
            try:
                ckpt.wait()
                save = ckpt.save()
                truths[save.generation or 0] = {name: bytes(buffer) for name, buffer in buffers.items()}
                assert save.wait()
                break
            except StoreFailed:
                continue
        assert ckpt.generation == save.generation
    for kept in store.catalog():
        state = restore(store, generation=kept.generation)
        found = {name: bytes(memoryview(each).cast("B")) for name, each in state.items()}
        assert found == truths[kept.generation], (seed, kept)
    again = ObjectStore(bucket.again(), grace_seconds=0)
    assert verify(again, all=True).ok
    with again.writer() as writer:
        writer.clean()
    assert not again.strangers()

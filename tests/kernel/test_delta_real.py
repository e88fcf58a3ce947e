# SPDX-License-Identifier: MIT
"""Programs as they are, whose memory is followed by deltas: sqlite, a stencil, a hash table under a skewed load."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np

import dirtytrack
from dirtytrack.delta import Delta, Mirror, apply, compose, diff
from tests.databases import Sqlite
from tests.oracle import PAGE

ROUNDS = 40


def follow(memory: Any, load: Callable[[int], None], **options: Any) -> tuple[list[Delta], list[int]]:
    """Runs a load round by round. One replica follows each delta, as bytes; one gets several at once, composed.

    Returns the deltas, and the bytes of the pages that each was found in.
    """
    deltas, pages = list[Delta](), list[int]()
    with Mirror(memory, **options) as mirror:
        replica, lagging, owed = bytearray(mirror.data), bytearray(mirror.data), list[Delta]()
        for number in range(ROUNDS):
            load(number)
            pages.append(mirror.tracker.peek().page_span_bytes)
            delta = mirror.update()
            assert delta.nbytes <= pages[-1] * 1.01 or not delta
            apply(delta.compressed() if number % 2 else bytes(delta), replica)
            now = memoryview(memory).cast("B")
            assert replica == now
            assert mirror.data == now
            deltas.append(Delta.from_bytes(bytes(delta)))
            owed.append(delta)
            if number % 7 == 6 or number == ROUNDS - 1:
                while len(owed) > 1:
                    owed[-2:] = [compose(*owed[-2:])]
                apply(owed.pop(), lagging)
                assert lagging == now
    return deltas, pages


def test_an_in_memory_sqlite_database_under_load() -> None:
    random = Random(3)
    memory = dirtytrack.allocate(4 << 20, name="database")
    database = Sqlite(memory)
    database.run("PRAGMA page_size = 4096; CREATE TABLE t (id INTEGER PRIMARY KEY, name TEXT, n INTEGER);")
    database.run("CREATE INDEX i ON t (n);")
    rows = ",".join(f"({i}, 'name {i}', {i * 7919 % 10007})" for i in range(5000))
    database.run(f"INSERT INTO t VALUES {rows};")

    def load(number: int) -> None:
        sql = ["BEGIN;"]
        for _ in range(random.randrange(1, 30)):
            row = min(int(random.paretovariate(0.3)), 4999)
            sql.append(f"UPDATE t SET n = {random.randrange(10007)} WHERE id = {row};")
        if number % 5 == 0:
            sql.append(f"INSERT INTO t (name, n) VALUES ('more {number}', {number});")
            sql.append(f"DELETE FROM t WHERE id = {random.randrange(5000)};")
        database.run(" ".join([*sql, "COMMIT;"]))

    first = diff(memory, bytes(memory.nbytes))
    deltas, pages = follow(memory, load)
    database.close()
    assert all(deltas)
    assert sum(delta.nbytes for delta in deltas) < sum(pages) / 3  # the page filter alone would send these

    image = sqlite3.connect(":memory:")
    if hasattr(image, "deserialize"):  # since Python 3.11
        replica = bytearray(memory.nbytes)
        apply(first, replica)
        for delta in deltas:
            apply(delta, replica)
        image.deserialize(bytes(replica[: int.from_bytes(replica[28:32], "big") * 4096]))  # as its header says
        assert image.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert image.execute("SELECT count(*) FROM t").fetchone()[0] > 4900
    image.close()


def test_a_stencil() -> None:
    """Heat that spreads from a few points: whole rows are stored to, most of what is stored is what was there."""
    grid = np.zeros((400, 512), np.float32)
    random = Random(4)

    def load(number: int) -> None:
        if number % 10 == 0:
            grid[random.randrange(400), random.randrange(512)] = 1000
        inner = grid[1:-1, 1:-1]
        inner[:] = (grid[:-2, 1:-1] + grid[2:, 1:-1] + grid[1:-1, :-2] + grid[1:-1, 2:] + inner) / np.float32(5)

    before = grid.copy()
    deltas, pages = follow(grid, load)
    assert deltas[0].granule == 4
    first = sum(delta.nbytes for delta in deltas[:10])
    assert first < sum(pages[:10]) / 50
    changed = np.zeros(grid.shape, bool)
    for delta in deltas:
        changed |= np.asarray(delta.changed(grid, "mask"))
    assert changed[grid != before].all()
    assert not changed[grid == before].any() or np.count_nonzero(changed[grid == before]) < 100  # came and went


def test_a_hash_table_under_a_skewed_load() -> None:
    """Open addressing; few keys have most of the updates."""
    slots = 1 << 15
    memory = dirtytrack.allocate(slots * 16, name="table")
    table = np.frombuffer(memory, np.uint64).reshape(slots, 2)
    generator = np.random.default_rng(5)
    model = dict[int, int]()

    def load(number: int) -> None:
        for key in np.minimum(generator.zipf(1.2, 400), 15000):
            at = int(key) * 0x9E3779B97F4A7C15 % (1 << 64) >> 49
            while table[at, 0] not in (0, key):
                at = (at + 1) % slots
            table[at] = key, table[at, 1] + 1
            model[int(key)] = model.get(int(key), 0) + 1

    deltas, pages = follow(memory, load)
    assert {int(key): int(count) for key, count in table if key} == model
    assert sum(delta.nbytes for delta in deltas) < sum(pages) / 10
    assert pages[0] % PAGE == 0

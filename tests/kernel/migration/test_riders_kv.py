# SPDX-License-Identifier: MIT
"""The key-value service of examples/kv_service: what its clients see while it moves, and while either side is killed.

That it moves under load is run as its page says by tests/unit/test_docs.py too. Takes about 12 s of CI's 20 min.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dirtytrack
from examples.kv_service.client import Client
from examples.kv_service.cluster import Cluster, Load
from examples.kv_service.history import Operation, Wrong, check
from examples.kv_service.store import Refused, Store, Value
from examples.kv_service.table import ROOM, Table, TableFull

MIB = 1 << 20
BANDWIDTH = 20e6
DURATION = 0.3  # seconds that a move of 4 MiB takes, about


# ---- moving, and being killed


class Drama:
    """One service, whose processes come and go, and the clients that use it throughout."""

    def __init__(self, cluster: Cluster, load: Load) -> None:
        self.cluster, self.load = cluster, load
        self.spare: asyncio.Task[str]
        self.deaths: list[tuple[float, str, str]] = []
        self.names = iter("ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "".join(map(chr, range(0x3B1, 0x3C9))))

    async def start(self, count: int) -> list[str]:
        names = [next(self.names) for _ in range(count)]
        await asyncio.to_thread(self.cluster.start, *names)
        return names

    async def another(self) -> str:
        return (await self.start(1))[0]

    def kill(self, name: str) -> None:
        self.deaths.append((self.cluster.kill(name), name, "stands"))

    def said(self, name: str, *what: str) -> bool:
        return any(who == name and line.startswith(what) for _, who, line in self.cluster.registry.log())

    async def until(self, true: Callable[[], bool], seconds: float = 20.0) -> bool:
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end:
                return False
            await asyncio.sleep(0.001)
        return True

    async def served(self) -> None:
        """Each client has an answer to something that it asked from now on."""
        now, clients = time.monotonic(), {each.name for each in self.load.clients}

        def all_have() -> bool:
            self.load.look()
            late = (each for each in reversed(self.load.history[-2000:]) if each.requested > now)
            return {each.client for each in late if not math.isinf(each.answered)} == clients

        assert await self.until(all_have), f"nobody serves: {self.cluster.registry.log()}"

    def never_both(self) -> None:
        running = set[str]()
        for _, who, what in sorted(self.cluster.registry.log() + self.deaths):
            if what == "runs":
                running.add(who)
            elif what == "stands":
                running.discard(who)
            assert len(running) <= 1, f"both run: {self.cluster.registry.log()}"

    def pauses(self) -> list[tuple[float, float]]:
        """From when to when nobody ran."""
        changes = [(at, what) for at, _, what in self.cluster.registry.log() if what in ("runs", "stands")]
        assert [what for _, what in changes] == ["runs", "stands"] * (len(changes) // 2) + ["runs"]
        return [(at, changes[number + 1][0]) for number, (at, what) in enumerate(changes) if what == "stands"]

    async def move_and_kill(self, source: str, chance: random.Random) -> tuple[str, str | None]:
        """Move from that process to another, and kill either at some moment.

        Returns:
            What came of it, and who serves now, if anybody does.
        """
        destination = await self.spare
        self.spare = asyncio.create_task(self.another())
        victim = chance.choice([source, destination])
        with Client(self.cluster.registry, f"operator of {destination}") as operator:
            moving = asyncio.create_task(operator.migrate(destination, bandwidth=BANDWIDTH, max_downtime=0.02))
            if chance.random() < 0.4:
                await asyncio.sleep(chance.uniform(0, DURATION))
            else:  # the hand-over is where it matters
                standing = sum(who == source and what == "stands" for _, who, what in self.cluster.registry.log())
                await self.until(
                    lambda: (
                        standing
                        < sum(who == source and what == "stands" for _, who, what in self.cluster.registry.log())
                    )
                )
                await asyncio.sleep(chance.uniform(0, 0.015))
            self.kill(victim)
            try:
                await moving
            except Refused:
                return "destination killed, source runs on", source
            except ConnectionError:
                assert victim == source, "the source lives, and closed its connection"
            else:
                if victim == destination:
                    return "destination killed after it had all", None
                return "source killed after it had moved", destination
        if await self.until(lambda: self.said(destination, "runs", "waits"), 0.5) and self.said(destination, "runs"):
            return "source killed, destination runs", destination
        return "source killed with the service", None


async def storm(kills: int, seed: int) -> Counter[str]:
    outcomes, commands, chance = Counter[str](), 0, random.Random(seed)
    while (left := kills - outcomes.total()) > 0:
        with Cluster(mib=4) as cluster:
            load = Load(cluster.registry, seed=chance.randrange(1 << 30), patience=60)
            drama = Drama(cluster, load)
            serving, spare = await drama.start(2)
            drama.spare = asyncio.create_task(asyncio.sleep(0, spare))
            await drama.served()
            try:
                for _ in range(min(left, 40)):
                    outcome, now = await drama.move_and_kill(serving, chance)
                    outcomes[outcome] += 1
                    if now is None:
                        await asyncio.sleep(0.05)  # for somebody who serves and must not
                        break
                    serving = now
                    await drama.served()
                await asyncio.gather(drama.spare, load.end(answered=now is not None))
            except BaseException:
                await load.end(answered=False)
                raise
            drama.never_both()
            commands += check(load.history)
            if now is not None:
                with Client(cluster.registry, "reader") as reader:
                    counted = [await reader.get(f"counter-{number}") for number in range(4)]
                assert sum(value for value in counted if isinstance(value, int)) == load.counted
    assert commands > 50 * kills
    return outcomes


@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=[pytest.mark.soak, pytest.mark.timeout(900)])])
def test_either_side_is_killed_at_some_moment(kills: int) -> None:
    outcomes = asyncio.run(storm(kills, seed=kills))
    print(outcomes)
    assert len(outcomes) > 1


def test_it_moves_on_and_on_and_a_move_to_nobody_changes_nothing() -> None:
    async def play() -> None:
        with Cluster(mib=4) as cluster:
            drama = Drama(cluster, Load(cluster.registry))
            first, *others = await drama.start(3)
            await drama.served()
            with Client(cluster.registry, "operator") as operator:
                with pytest.raises(Refused, match="nobody is called"):
                    await operator.migrate("X")
                for name in others:
                    moved = await operator.migrate(name)
                    assert moved["rounds"] >= 2
                    await drama.served()
                with pytest.raises(Refused, match="it runs on here"):
                    await operator.migrate(others[0])  # which has moved, and listens no more
            await drama.served()
            await drama.load.end()
            drama.never_both()
            assert {each.moves for each in drama.load.clients} == {2}
            assert check(drama.load.history) > 100
            pauses = drama.pauses()
            assert len(pauses) == 2, "one for each move"
            for stood, ran in pauses:
                assert all(each.answered > ran for each in drama.load.history if stood < each.requested < ran)
            assert not drama.said(first, "waits")

    asyncio.run(play())


# ---- the checker can fail


def operation(
    who: str, command: str, *arguments: Value, at: tuple[float, float], result: Value = None, key: str = "k"
) -> Operation:
    return Operation(who, command, key, arguments, *at, result)


NEVER = math.inf


@pytest.mark.parametrize(
    "history",
    [
        pytest.param(
            [operation("a", "set", "x", at=(0, 1)), operation("b", "get", at=(2, 3))],
            id="a write is lost",
        ),
        pytest.param(
            [operation("a", "add", 1, at=(0, 1), result=1), operation("b", "add", 1, at=(2, 3), result=3)],
            id="a write is done twice",
        ),
        pytest.param(
            [
                operation("a", "add", 1, at=(0, 1), result=1),
                operation("a", "add", 1, at=(2, 5), result=2),
                operation("b", "add", 1, at=(3, 4), result=2),
            ],
            id="two serve",
        ),
        pytest.param(
            [
                operation("a", "set", "x", at=(0, 1)),
                operation("a", "set", "y", at=(2, 3)),
                operation("b", "get", at=(4, 5), result="x"),
            ],
            id="an old answer",
        ),
        pytest.param(
            [
                operation("a", "set", "x", at=(0, NEVER)),
                operation("b", "get", at=(1, 2), result="x"),
                operation("c", "get", at=(3, 4)),
            ],
            id="a write without an answer is seen, and gone",
        ),
        pytest.param(
            [
                operation("a", "cas", None, "x", at=(0, 3), result=True),
                operation("b", "cas", None, "y", at=(1, 2), result=True),
            ],
            id="two writes of which one must fail",
        ),
        pytest.param([operation("a", "get", at=(0, 1), result="x")], id="out of nowhere"),
    ],
)
def test_what_cannot_be_is_found(history: list[Operation]) -> None:
    with pytest.raises(Wrong, match="cannot be"):
        check(history)


@pytest.mark.parametrize(
    "history",
    [
        pytest.param(
            [
                operation("a", "set", "x", at=(0, 9)),
                operation("b", "get", at=(1, 2)),
                operation("c", "get", at=(3, 4), result="x"),
            ],
            id="done between two reads",
        ),
        pytest.param(
            [operation("a", "set", "x", at=(0, NEVER)), operation("b", "get", at=(5, 6), result="x")],
            id="done, and nobody said so",
        ),
        pytest.param(
            [operation("a", "set", "x", at=(0, NEVER)), operation("b", "get", at=(5, 6))],
            id="not done, and nobody said so",
        ),
        pytest.param(
            [
                operation("a", "add", 1, at=(0, 5), result=2),
                operation("b", "add", 1, at=(1, 6), result=1),
                operation("c", "cas", 2, "x", at=(2, 7), result=False),
            ],
            id="in another order than asked",
        ),
    ],
)
def test_what_can_be_passes(history: list[Operation]) -> None:
    assert check(history) == len(history)


# ---- the table, against a dict


KEYS = st.binary(min_size=1, max_size=12).map(lambda key: key[:2] if len(key) % 2 else key)


@given(
    st.lists(st.tuples(st.sampled_from(["put", "remove", "get", "again"]), KEYS, st.binary(max_size=40)), max_size=60)
)
@settings(max_examples=60)
def test_a_table_is_what_a_dict_is(steps: list[tuple[str, bytes, bytes]]) -> None:
    with dirtytrack.allocate(20 << 10) as memory:
        table, model, versions = Table(memory), dict[bytes, bytes](), dict[bytes, int]()
        for step, key, value in steps:
            if step == "put":
                try:
                    versions[key] = table.put(key, value)
                except TableFull:
                    assert key not in model
                    continue
                model[key] = value
            elif step == "remove":
                assert table.remove(key) == (model.pop(key, None) is not None)
            elif step == "again":
                table = Table(memory)
            entry = table.get(key)
            assert (entry.value if entry else None) == model.get(key)
            assert len(table) == len(model)
            assert set(table) == set(model)


def test_a_table_has_an_end_and_knows_its_memory() -> None:
    with dirtytrack.allocate(8 << 10) as memory:
        table = Table(memory)
        with pytest.raises(TableFull):
            for number in range(100):
                table.put(b"%d" % number, b"")
        table.put(b"3", b"x" * (ROOM - 1))
        with pytest.raises(ValueError, match="bytes together"):
            table.put(b"3", b"x" * ROOM)
        memory[0] ^= 1
        with pytest.raises(ValueError, match="something else"):
            Table(memory)
        with pytest.raises(ValueError, match="at least"):
            Table(dirtytrack.allocate(4096))


def test_a_write_that_is_sent_again_is_done_once() -> None:
    store = Store.allocate(MIB)
    assert store.do("a", 1, "add", "n", 5) == 5
    assert Store(store.memory).do("a", 1, "add", "n", 5) == 5, "as one that moved does"
    assert store.do("b", 1, "add", "n", 1) == 6
    assert store.do("a", 2, "cas", "n", 6, "x") is True
    with pytest.raises(Refused, match="does not follow"):
        store.do("a", 4, "set", "n", 1)
    with pytest.raises(Refused, match="no number"):
        store.do("a", 3, "add", "n", 1)
    with pytest.raises(Refused, match="no command"):
        store.do("a", 3, "drop", "n")
    with pytest.raises(Refused, match="bytes together"):
        store.do("a", 3, "set", "n", "x" * 300)
    assert store.do("a", 3, "set", "n", 1) == 4, "what was refused took no number"
    assert store.do("c", 0, "get", "n") == 1

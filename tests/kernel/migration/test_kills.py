# SPDX-License-Identifier: MIT
"""Either side is killed at each step of the protocol, and at random moments: never do both run, and nothing is lost."""

from __future__ import annotations

import random
import time

import pytest

from dirtytrack.migration import Goal
from dirtytrack.migration.wire import Kind
from tests.kernel.migration.conftest import Cast
from tests.kernel.migration.parties import MIB, Death

BEFORE_READY = (Kind.CHALLENGE, Kind.WELCOME, Kind.OPENED, Kind.ARRIVED)


def steps(*kinds: Kind) -> list[Death]:
    return [Death(kind, after=after) for kind in kinds for after in (False, True)]


@pytest.mark.parametrize("death", [*steps(*BEFORE_READY), Death(Kind.READY, after=False)], ids=repr)
def test_the_destination_is_killed_before_it_promised(cast: Cast, death: Death) -> None:
    receiving, address = cast.destination(death=death)
    sending = cast.source(2 * MIB)
    sending.tell("migrate", address)
    name, words = sending.hear("failed")
    assert name in ("PeerLost", "AddressUnusable"), words
    assert cast.log.never_both() == "source"
    sending.tell("alive?")
    assert sending.hear("alive") == (True,)
    receiving.process.join(10)
    _, address = (again := cast.destination())
    sending.tell("migrate", address)
    sending.hear("moved")
    assert again[0].hear("runs")[0]
    assert cast.log.never_both() == "destination"


@pytest.mark.parametrize("death", [Death(Kind.READY, after=True), Death(Kind.COMMITTED, after=False)], ids=repr)
def test_the_destination_is_killed_when_it_had_promised(cast: Cast, death: Death) -> None:
    receiving, address = cast.destination(death=death)
    sending = cast.source(2 * MIB)
    sending.tell("migrate", address)
    said = sending.hear("doubt", "failed")
    receiving.process.join(10)
    if said[0] == "doubt":  # the decision was sent, or might have been
        assert cast.log.never_both() is None
        sending.tell("resolve", "source")
        sending.hear("resolved")
    assert cast.log.never_both() == "source"
    sending.tell("alive?")
    assert sending.hear("alive") == (True,)


def test_the_destination_is_killed_when_it_has_answered(cast: Cast) -> None:
    _, address = cast.destination(death=Death(Kind.COMMITTED, after=True))
    sending = cast.source(2 * MIB)
    sending.tell("migrate", address)
    sending.hear("moved")
    assert cast.log.never_both() is None


BEFORE_FINISH = (Kind.HELLO, Kind.PROOF, Kind.OPEN, Kind.PAGES, Kind.ROUND, Kind.STATE)


@pytest.mark.parametrize("death", [*steps(*BEFORE_FINISH), Death(Kind.FINISH, after=False)], ids=repr)
def test_the_source_is_killed_before_it_finished(cast: Cast, death: Death) -> None:
    receiving, address = cast.destination()
    sending = cast.source(2 * MIB, death=death)
    sending.tell("migrate", address)
    sending.process.join(10)
    cast.log.say("source", "stands")
    if death.kind not in (Kind.HELLO, Kind.PROOF) and (death.kind, death.after) != (Kind.OPEN, False):
        assert receiving.hear("failed")[0] == "PeerLost"
    else:  # it never was one: another may come
        other = cast.source(2 * MIB)
        other.tell("migrate", address)
        other.hear("moved")
        assert receiving.hear("runs")[0]
        return
    assert cast.log.never_both() is None


@pytest.mark.parametrize(
    "death", [Death(Kind.FINISH, after=True), Death(Kind.COMMIT, after=False), Death(Kind.COMMIT, after=True)], ids=repr
)
@pytest.mark.parametrize("verdict", ["source", "destination"])
def test_the_source_is_killed_when_the_destination_is_bound(cast: Cast, death: Death, verdict: str) -> None:
    receiving, address = cast.destination()
    sending = cast.source(2 * MIB, death=death)
    sending.tell("migrate", address)
    sending.process.join(10)
    cast.log.say("source", "stands")
    said = receiving.hear("doubt", "runs")
    if said[0] == "runs":
        assert death.kind is Kind.COMMIT
        assert death.after
    else:
        assert cast.log.never_both() is None
        receiving.tell("resolve", verdict)
        said = receiving.hear("runs" if verdict == "destination" else "resolved", "runs")
    assert said[0] == "resolved" or said[1]  # whole, by the state that came with it
    assert cast.log.never_both() == ("destination" if said[0] == "runs" else None)


def test_an_arbiter_is_asked_by_both_sides(cast: Cast) -> None:
    receiving, address = cast.destination(death=Death(Kind.COMMITTED, after=False), verdict="source")
    sending = cast.source(2 * MIB, verdict="source")
    sending.tell("migrate", address)
    assert sending.hear("failed")[0] == "MigrationAborted"
    receiving.process.join(10)
    assert cast.log.never_both() == "source"


# ---- at random moments


def once(cast: Cast, chance: random.Random, victim: str, number: int) -> str:
    """One migration, in which one side is killed at some moment. What came of it."""
    log = cast.log.path
    log.write_text("")
    receiving, address = cast.destination(doubt_timeout=0.3, timeout=2.0)
    sending = cast.source(
        8 * MIB, doubt_timeout=0.3, timeout=2.0, bandwidth=200e6, connections=2, goal=Goal(max_downtime=0.05)
    )
    sending.tell("migrate", address)
    # The end of a migration is where it matters: most of the moments are around it.
    time.sleep(chance.choice([chance.uniform(0, 0.12), chance.gauss(0.075, 0.01)]) if number else 0)
    (sending if victim == "source" else receiving).kill()
    cast.log.say(victim, "stands")
    if victim == "destination":
        said = sending.hear("moved", "failed", "doubt")
        if said[0] == "doubt":
            assert not said[2]
            sending.tell("resolve", "source")
            sending.hear("resolved")
        if said[0] != "moved":
            assert cast.log.never_both() == "source"
            sending.tell("alive?")
            assert sending.hear("alive") == (True,)
        else:
            assert cast.log.never_both() is None
    else:
        if not receiving.pipe.poll(0.7):  # the source was killed before it was one
            receiving.kill()
            return "nobody came"
        said = receiving.hear("runs", "failed", "doubt")
        if said[0] == "doubt":
            receiving.tell("resolve", "destination")
            said = (said[0], *receiving.hear("runs"))
        if said[0] in ("runs", "doubt"):
            assert said[1], "what arrived is not what the source had"
            assert cast.log.never_both() == "destination"
        else:
            assert cast.log.never_both() is None
    return str(said[0])


@pytest.mark.parametrize("kills", [30, pytest.param(300, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])])
def test_either_side_is_killed_at_random_moments(cast: Cast, kills: int) -> None:
    chance = random.Random(20)
    outcomes = dict[str, int]()
    for number in range(kills):
        victim = "source" if number % 2 else "destination"
        outcome = once(cast, chance, victim, number)
        outcomes[f"{victim} killed: {outcome}"] = outcomes.get(f"{victim} killed: {outcome}", 0) + 1
        cast.end()
    print(outcomes)
    assert len(outcomes) > 2, outcomes

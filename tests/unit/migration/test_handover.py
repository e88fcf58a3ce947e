# SPDX-License-Identifier: MIT
"""The hand-over, in every order that a link, a crash and an arbiter can make of it: never both run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dirtytrack.errors import JournalUnusable
from dirtytrack.migration.handover import DestinationHandOver, DestinationState, Impossible, SourceHandOver, SourceState
from dirtytrack.migration.journal import Journal, add_verdict, read

ID = bytes(16)
State = tuple[SourceState | None, int, DestinationState, int, frozenset[tuple[str, int]], frozenset[tuple[int, str]]]
"""Source (None: it was killed), its attempt; destination, its attempt; what is on its way, or may come again; what the
arbiter said of which attempt."""


def source_in(state: SourceState, attempt: int) -> SourceHandOver:
    made = SourceHandOver(ID)
    made.state, made.attempt = state, attempt
    return made


def destination_in(state: DestinationState, attempt: int) -> DestinationHandOver:
    made = DestinationHandOver(ID)
    made.state, made.attempt = state, attempt
    return made


ATTEMPTS = 2
PREPARED, COMMITTED = DestinationState.PREPARED, DestinationState.COMMITTED


def attempted(side: SourceHandOver | DestinationHandOver, step: str, *arguments: int) -> bool:
    try:
        getattr(side, step)(*arguments)
    except Impossible:
        return False
    return True


def source_steps(now: State) -> Iterator[State]:
    src, tried, dst, served, wire, words = now
    if src is None:
        return

    def after(step: str, *arguments: int, sends: str = "") -> Iterator[State]:
        one = source_in(src, tried)
        if attempted(one, step, *arguments):
            more = {(sends, one.attempt)} if sends else set()
            yield one.state, one.attempt, dst, served, wire | more, words

    yield None, tried, dst, served, wire, words  # kill -9
    if tried < ATTEMPTS:
        yield from after("begin", tried + 1, sends="open")
    yield from after("stop", sends="finish")
    yield from after("back", sends="abort")
    if ("ready", tried) in wire:
        yield from after("decide", sends="commit")
    if ("committed", tried) in wire:
        yield from after("committed")
    if ("aborted", tried) in wire:  # told as an answer to ASK: by the destination, of this very attempt
        yield from after("aborted")
    if (tried, "destination") in words:
        yield from after("committed")
    # Told "source", it asks the destination first, which is then bound no more; or the arbiter knows that it is gone.
    if (tried, "source") in words and not (dst in (PREPARED, COMMITTED) and served == tried):
        yield from after("aborted")


def destination_steps(now: State) -> Iterator[State]:
    src, tried, dst, served, wire, words = now

    def after(step: str, *arguments: int, sends: str = "") -> Iterator[State]:
        two = destination_in(dst, served)
        if attempted(two, step, *arguments):
            more = {(sends, two.attempt)} if sends else set()
            yield src, tried, two.state, two.attempt, wire | more, words

    for kind, about in wire:
        if kind == "open":
            yield from after("begin", about)
        if kind == "finish" and about == served:
            yield from after("prepared", sends="ready")
        if kind == "commit":
            yield from after("commit", about, sends="committed")
        if kind == "abort" and about == served:
            yield from after("abort", sends="aborted")
    if dst is DestinationState.PREPARED and (served, "destination") in words:
        yield from after("commit", served)
    if dst is DestinationState.PREPARED and (served, "source") in words:
        yield from after("abort")


def verdicts(now: State) -> Iterator[State]:
    """What an arbiter may say who keeps to what the document asks of him: one word for an attempt, and "destination"
    only where the source was killed, or is in doubt and will be told the same."""
    src, tried, dst, served, wire, words = now
    bound = dst is DestinationState.PREPARED
    for about, side in ((tried, src is SourceState.COMMITTING), (served, bound)):
        if not side or any(about == said for said, _ in words):
            continue
        runs_there = dst is DestinationState.COMMITTED and served == about
        if not runs_there:
            yield src, tried, dst, served, wire, words | {(about, "source")}
        if src is None or (src is SourceState.COMMITTING and tried == about):
            yield src, tried, dst, served, wire, words | {(about, "destination")}


def explored(first: State) -> set[State]:
    seen, pending = {first}, [first]
    while pending:
        now = pending.pop()
        for after in (*source_steps(now), *destination_steps(now), *verdicts(now)):
            if after not in seen:
                seen.add(after)
                pending.append(after)
    return seen


FIRST: State = (SourceState.RUNNING, 0, DestinationState.RECEIVING, 0, frozenset(), frozenset())


def test_never_both_in_any_order_of_what_can_happen() -> None:
    seen = explored(FIRST)
    ends = set[tuple[bool, bool]]()
    for src, tried, dst, served, wire, words in seen:
        runs = src is not None and source_in(src, tried).may_run, destination_in(dst, served).may_run
        assert runs != (True, True), (src, tried, dst, served, wire, words)
        ends.add(runs)
    assert len(seen) > 1000
    assert ends >= {(True, False), (False, False), (False, True)}


def test_a_decision_is_for_one_attempt() -> None:
    made = destination_in(DestinationState.PREPARED, 2)
    with pytest.raises(Impossible):
        made.commit(1)
    assert not made.may_run


def test_what_cannot_be_journaled_is_not_decided(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal") as journal:
        made = SourceHandOver(ID, journal)
        made.begin(1)
        made.stop()
        journal.close()
        with pytest.raises(JournalUnusable):
            made.decide()
        assert made.state is SourceState.STOPPED


def test_a_journal_says_what_was_decided(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with Journal(path) as journal:
        made = SourceHandOver(ID, journal)
        made.begin(1)
        made.begin_journal(address="tcp://127.0.0.1:1", secret="ab")
        made.stop()
        made.decide()
        assert made.verdict() is None
        add_verdict(path, ID.hex(), 1, "source")
        assert made.verdict() == "source"
        add_verdict(path, ID.hex(), 2, "destination")
        assert made.verdict() == "source"
    assert [each.get("state") for each in read(path)] == [None, "committing", None, None]
    assert path.stat().st_mode & 0o077 == 0


def test_a_line_that_was_torn_was_never_acted_on(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with Journal(path) as journal:
        journal.add(state="prepared", id="x", attempt=1)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert read(path) in ([], [{"state": "prepared", "id": "x", "attempt": 1}])
        with Journal(path) as journal:
            journal.add(state="aborted", id="x", attempt=1)
        assert read(path)[-1]["state"] == "aborted"


def test_a_journal_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_text("something\nelse\naltogether\n")
    with pytest.raises(JournalUnusable, match="line 1"):
        Journal(path)
    with pytest.raises(JournalUnusable, match="No such file"):
        read(tmp_path / "none")


def test_a_journal_is_one_process_s(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal"), pytest.raises(JournalUnusable, match="a process that runs has it"):
        Journal(tmp_path / "journal")

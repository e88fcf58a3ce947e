# SPDX-License-Identifier: MIT
"""Whether what clients saw can be: a checker of linearizability, key by key.

A history is right if each command can be thought to have been done at one moment between its request and its answer, so
that all answers are those of one table that does one command after the other. A write that is lost, done twice, or done
by two servers at once leaves answers for which there are no such moments.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from .store import Value

Config = tuple[Value, frozenset[int]]
"""What the key has, and which of the commands under way have been done."""


@dataclass
class Operation:
    """One command of a client, and what it saw of it."""

    client: str
    command: str
    key: str
    arguments: tuple[Value, ...]
    requested: float
    answered: float = math.inf
    """When (time.monotonic). Infinite: never, so that it may have been done at any time since, or not at all."""
    result: Value = None

    def after(self, value: Value) -> tuple[bool, Value]:
        """Whether it could have been done on that, given its answer, and what there is then."""
        open_ = math.isinf(self.answered)
        if self.command == "get":
            return open_ or self.result == value, value
        if self.command == "set":
            return True, self.arguments[0]
        if self.command == "add":
            total = (value if isinstance(value, int) else 0) + int(self.arguments[0] or 0)
            return open_ or self.result == total, total
        done = self.arguments[0] == value  # cas
        return open_ or self.result is done, self.arguments[1] if done else value


class Wrong(Exception):
    """Answers that no table gives."""


def check(history: Iterable[Operation]) -> int:
    """Hold a history, which begins with no keys, against what a table could answer.

    Returns:
        How many commands there were.

    Raises:
        Wrong: with the first answer that cannot be, and what was before it.
    """
    by_key: dict[str, list[Operation]] = defaultdict(list)
    for operation in history:
        by_key[operation.key].append(operation)
    for operations in by_key.values():
        _check_key(operations)
    return sum(map(len, by_key.values()))


def _check_key(operations: list[Operation]) -> None:
    """Goes from event to event with all that may be, which is little: few clients have commands under way at once."""
    events = [(each.requested, 0, number) for number, each in enumerate(operations)]
    events += [(each.answered, 1, number) for number, each in enumerate(operations) if not math.isinf(each.answered)]
    configs: set[Config] = {(None, frozenset())}
    under_way: set[int] = set()
    for at, is_answer, number in sorted(events):
        if not is_answer:
            under_way.add(number)
            continue
        after: set[Config] = set()
        for config in configs:
            after |= {(value, done - {number}) for value, done in _until_done(config, number, under_way, operations)}
        if not after:
            before = [each for each in operations if each.answered <= at or each.requested < at][-12:]
            shown = "\n".join(f"  {each}" for each in before)
            raise Wrong(f"{operations[number]} cannot be: there was one of {sorted(map(str, configs))}, after\n{shown}")
        configs = after
        under_way.discard(number)


def _until_done(config: Config, wanted: int, under_way: set[int], operations: list[Operation]) -> Iterable[Config]:
    """All ways to do commands that are under way, one after the other, until that one is done."""
    seen, left = {config}, [config]
    while left:
        value, done = left.pop()
        if wanted in done:
            yield value, done
            continue
        for number in under_way - done:
            fits, then = operations[number].after(value)
            next_ = then, done | {number}
            if fits and next_ not in seen:
                seen.add(next_)
                left.append(next_)

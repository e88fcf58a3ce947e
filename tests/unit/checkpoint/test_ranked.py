# SPDX-License-Identifier: MIT
"""What a manifest says of ranks, and what it may not say."""

from __future__ import annotations

import json
import struct
from hashlib import sha256
from typing import Any

import pytest

from dirtytrack.checkpoint import Joined, JoinedRegion, Manifest, Part, PartEntry, RegionEntry
from dirtytrack.checkpoint.ranks.layout import divided, shares_of
from dirtytrack.errors import InvalidCheckpoint, InvalidMemory

ID, RUN = "ab" * 16, "cd" * 16
REGIONS = (
    RegionEntry(0, "grid", 80, "<f8", (10,), 3),
    RegionEntry(1, "table", 5, "|u1", (5,), 3),
    RegionEntry(2, "seed[1]", 16, None, None, 3),
)
JOINED = Joined(
    RUN,
    (PartEntry(ID, 100, 300, 2), PartEntry("ef" * 16, 0, 200, 1)),
    (
        JoinedRegion("grid", "partitioned", 0, (48, 32)),
        JoinedRegion("table", "replicated", 0, (5,)),
        JoinedRegion("seed", "own", 1, (16,)),
    ),
)


def manifest(ranks: Joined | Part | None = JOINED) -> Manifest:
    return Manifest(ID, 3, 0, 2, 1.0, "full", 4096, {"step": 7}, REGIONS, (), ranks)


def forged(ranks: Any) -> bytes:
    data = manifest().encode()
    members = json.loads(data[24:-32])
    members["ranks"] = ranks
    body = json.dumps(members).encode()
    head = struct.pack("<8sIIQ", b"DTMANIFS", 1, 0, len(body))
    return head + body + sha256(head + body).digest()


def plain() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(JOINED.plain()))
    return found


@pytest.mark.parametrize("ranks", [None, JOINED, Part(RUN, 1, 2), Part(RUN, 0, 10**6)], ids=str)
def test_what_is_said_comes_back(ranks: Joined | Part | None) -> None:
    made = manifest(ranks)
    assert Manifest.decode(made.encode()) == made
    assert Manifest.decode(forged(plain())) == manifest()


@pytest.mark.parametrize(
    "ranks",
    [
        [],
        7,
        {},
        {"run": RUN, "rank": 0},
        {"run": RUN, "rank": 2, "size": 2},
        {"run": RUN, "rank": -1, "size": 2},
        {"run": RUN, "rank": True, "size": 2},
        {"run": RUN, "rank": 0, "size": 10**6 + 1},
        {"run": "x", "rank": 0, "size": 1},
        {"run": RUN, "rank": 0, "size": 1, "colour": "red"},
    ],
    ids=str,
)
def test_what_ranks_may_not_be(ranks: Any) -> None:
    with pytest.raises(InvalidCheckpoint, match="cannot be"):
        Manifest.decode(forged(ranks))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("run",), None),
        (("run",), "0" * 31),
        (("parts",), {}),
        (("parts",), []),
        (("parts", 1), None),  # which has the own buffer
        (("parts", 0), {}),
        (("parts", 0, "store_id"), "../.."),
        (("parts", 0, "stored_nbytes"), -1),
        (("parts", 0, "segment_count"), 1.5),
        (("regions",), []),
        (("regions", 0, "how"), "divided"),
        (("regions", 0, "how"), "own"),
        (("regions", 1, "how"), "partitioned"),
        (("regions", 0, "name"), ""),
        (("regions", 0, "name"), 7),
        (("regions", 0, "nbytes"), [48, 31]),
        (("regions", 0, "nbytes"), [80, 0]),
        (("regions", 0, "nbytes"), [48, 16, 16]),
        (("regions", 0, "nbytes"), []),
        (("regions", 0, "nbytes"), [True, 79]),
        (("regions", 2, "first"), 2),
        (("regions", 2, "first"), -1),
        (("regions", 2, "colour"), "red"),
    ],
    ids=str,
)
def test_what_the_whole_may_not_say(path: tuple[Any, ...], value: Any) -> None:
    ranks = plain()
    within: Any = ranks
    for each in path[:-1]:
        within = within[each]
    within[path[-1]] = value
    with pytest.raises(InvalidCheckpoint, match="cannot be"):
        Manifest.decode(forged(ranks))


# ---- who is to have what


@pytest.mark.parametrize(("size", "parts"), [(1, [80]), (2, [40, 40]), (3, [32, 24, 24]), (10, [8] * 10)])
def test_rows_are_divided_evenly(size: int, parts: list[int]) -> None:
    assert divided(REGIONS[0], size) == parts
    found = [shares_of(manifest(), rank, size, None, {"grid", "table"}) for rank in range(size)]
    assert [share["grid"].entry.shape for share in found] == [(nbytes // 8,) for nbytes in parts]
    assert all((share["table"].low, share["table"].high) == (0, 5) for share in found)
    assert found[-1]["grid"].high == 80


def test_rows_as_they_are_given() -> None:
    given = [{"grid": 16}, {"grid": 8}, {"grid": 56}]
    share = shares_of(manifest(), 2, 3, given, {"grid"})["grid"]
    assert (share.low, share.high, share.entry.shape) == (24, 80, (7,))
    with pytest.raises(InvalidMemory, match="together have room for 72"):
        shares_of(manifest(), 0, 3, [{"grid": 16}, {"grid": 0}, {"grid": 56}], {"grid"})
    with pytest.raises(InvalidCheckpoint, match="10 rows, which cannot be divided among 11"):
        shares_of(manifest(), 0, 11, None, {"grid"})


def test_what_is_each_ranks_own() -> None:
    assert "seed" not in shares_of(manifest(), 0, 2, None, None)
    assert shares_of(manifest(), 1, 2, None, None)["seed"].entry.nbytes == 16
    with pytest.raises(InvalidCheckpoint, match=r"'seed' is each rank's own .* 3 ranks cannot divide it"):
        shares_of(manifest(), 0, 3, None, None)

# SPDX-License-Identifier: MIT
"""Frames that are made are read again, and whatever else comes is refused by name, without being believed."""

from __future__ import annotations

import json
import struct

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from dirtytrack.errors import InvalidMemory, ProtocolViolated
from dirtytrack.migration import page_digest, wire
from dirtytrack.migration.packing import compressor, decompress
from dirtytrack.migration.wire import Codec, Frame, Kind

U64 = st.integers(0, 2**64 - 1)


def read(data: bytes, *, welcome: bool = True) -> Frame:
    """As a link does it."""
    head = wire.header(data[:32], welcome=welcome)
    body = data[32 : 32 + head.body_bytes]
    wire.require_checksum(data[:32], body, head)
    return Frame(head, body)


@given(st.sampled_from(Kind), st.binary(max_size=300), U64, st.integers(0, 65535))
def test_what_is_made_is_read(kind: Kind, body: bytes, number: int, region: int) -> None:
    head, same = wire.frame(kind, body, number=number, region=region)
    assert len(head) == 32
    found = read(head + same)
    assert (found.kind, found.body, found.header.number, found.header.region) == (kind, body, number, region)


def test_a_frame_is_as_the_document_says() -> None:
    head, body = wire.frame(Kind.COMMIT, b"abc", number=7, region=2)
    first = struct.pack("<4sBBHIIQ", b"DTMF", 14, 0, 2, 3, 0, 7)
    assert head[:24] == first
    assert head[24:] == struct.pack("<Q", xxhash.xxh64_intdigest(body, xxhash.xxh64_intdigest(first, 0)))


@given(st.binary(max_size=100), st.integers(0, 8 * 132 - 1))
def test_each_bit_of_a_frame_is_looked_at(body: bytes, bit: int) -> None:
    head, body = wire.frame(Kind.STATE, body, number=5)
    data = bytearray(head + body)
    bit %= 8 * len(data)
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ProtocolViolated):
        # A length that grew is waited for, and what is behind it is not ours: here it is a frame cut short.
        found = wire.header(bytes(data[:32]))
        if found.body_bytes != len(body) or found.data_bytes:
            raise ProtocolViolated("cut short")
        wire.require_checksum(data[:32], data[32:], found)


@given(st.binary(min_size=32, max_size=32))
def test_garbage_is_no_frame(data: bytes) -> None:
    with pytest.raises(ProtocolViolated):
        wire.header(data)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.sampled_from(Kind), st.booleans())
def test_lengths_are_looked_at_before_anything_is_read(body: int, data: int, kind: Kind, welcome: bool) -> None:
    head = struct.pack("<4sBBHIIQQ", b"DTMF", kind, 0, 0, body, data, 0, 0)
    fits = body <= ((1 << 20) if welcome else 4096) and data <= ((1 << 20) if welcome and kind == Kind.PAGES else 0)
    if fits:
        assert wire.header(head, welcome=welcome).body_bytes == body
    else:
        with pytest.raises(ProtocolViolated, match="longer"):
            wire.header(head, welcome=welcome)


NESTED = b"[" * 100_000


@pytest.mark.parametrize("body", [b"", b"[]", b"7", b"{", b"\xff\xfe", b'{"a":}', NESTED], ids=range(7))
def test_bodies_that_are_no_json_object(body: bytes) -> None:
    head, body = wire.frame(Kind.OPEN, body)
    with pytest.raises(ProtocolViolated, match="JSON"):
        wire.json_of(read(head + body))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda part: st.lists(part) | st.dictionaries(st.text(), part),
)


@given(st.dictionaries(st.sampled_from(["regions", "name", "nbytes", "phase", "x"]), ANYTHING))
def test_openings_that_are_none(said: dict[str, object]) -> None:
    with pytest.raises(ProtocolViolated):
        wire.region_list(said, 4096)


@pytest.mark.parametrize(
    "regions",
    [
        [],
        [{"name": "a", "nbytes": 0, "phase": 0}],
        [{"name": "a", "nbytes": 1 << 60, "phase": 0}],
        [{"name": "a", "nbytes": True, "phase": 0}],
        [{"name": "a", "nbytes": 10, "phase": 4096}],
        [{"name": "a", "nbytes": 10, "phase": 0}] * 2,
        [{"name": "a" * 2000, "nbytes": 10, "phase": 0}],
        [{"name": str(i), "nbytes": 10, "phase": 0} for i in range(5000)],
    ],
    ids=range(8),
)
def test_regions_that_cannot_be(regions: list[object]) -> None:
    with pytest.raises(ProtocolViolated):
        wire.region_list({"regions": regions}, 4096)
    assert wire.region_list({"regions": [{"name": "a", "nbytes": 10, "phase": 4095}]}, 4096)


@given(st.binary(max_size=400))
def test_stretches_and_digests_fit_each_other_or_are_refused(body: bytes) -> None:
    head, body = wire.frame(Kind.PAGES, body)
    try:
        stretches, pages = wire.pages_of(wire.header(head), body, 4096)
    except ProtocolViolated:
        return
    assert stretches * 16 + pages * 16 == len(body)
    assert pages * 4096 <= 1 << 20


@pytest.mark.parametrize("data", [b"DTMIGR\x02\0", b"HTTP/1.1", bytes(8)])
def test_other_protocols_and_versions(data: bytes) -> None:
    with pytest.raises(ProtocolViolated, match=r"version 2|another protocol"):
        wire.preamble_of(data, "the peer")


def test_a_proof_is_of_everything_that_is_said() -> None:
    one = (b"key", b"source", "pages", bytes(16), 1, bytes(64))
    others = [
        (b"Key", *one[1:]),
        (one[0], b"destination", *one[2:]),
        (*one[:2], "ask", *one[3:]),
        (*one[:3], b"\1" * 16, *one[4:]),
        (*one[:4], 2, one[5]),
        (*one[:5], b"\1" * 64),
    ]
    assert len({wire.mac(*each) for each in [one, *others]}) == 7


@given(st.sampled_from([Codec.ZSTD, Codec.LZ4]), st.binary(min_size=2, max_size=5000), st.binary(max_size=50))
def test_what_is_compressed_comes_back_and_nothing_else(codec: Codec, data: bytes, garbage: bytes) -> None:
    packed = compressor(codec)(data)
    assert decompress(codec, memoryview(packed), len(data)) == data
    for wrong, nbytes in ((packed, len(data) + 1), (packed[:-1], len(data)), (garbage, 100), (packed, len(data) // 2)):
        if nbytes == len(data) and wrong == packed:
            continue
        with pytest.raises(ProtocolViolated):
            decompress(codec, memoryview(wrong), nbytes)


@pytest.mark.parametrize("codec", [Codec.ZSTD, Codec.LZ4])
def test_a_bomb_is_not_unpacked(codec: Codec) -> None:
    import tracemalloc

    packed = compressor(codec)(bytes(256 << 20))
    tracemalloc.start()
    with pytest.raises(ProtocolViolated):
        decompress(codec, memoryview(packed), 1 << 20)
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


@given(st.binary(min_size=32, max_size=32), st.integers(0, 8 * 4096 - 1), st.integers(0, 3))
def test_pages_that_differ_have_other_digests(seed: bytes, bit: int, kind: int) -> None:
    page = bytearray({0: bytes(4096), 1: b"\xff" * 4096}.get(kind, bytes(range(256)) * 16))
    before = page_digest(page, seed)
    page[bit // 8] ^= 1 << bit % 8
    assert page_digest(page, seed) != before


def test_digests_are_of_pages() -> None:
    with pytest.raises(InvalidMemory):
        page_digest(bytes(100), bytes(32))
    assert json.dumps(len(page_digest(bytes(65536), bytes(32)))) == "16"

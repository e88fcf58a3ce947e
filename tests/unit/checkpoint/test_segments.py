# SPDX-License-Identifier: MIT
"""Segments and what is done to frames: what goes in comes out, what cannot be is not written. Packed runs, too."""

from __future__ import annotations

import os
import sys
from array import array
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dirtytrack.checkpoint.coding import Decoder, Encoder
from dirtytrack.checkpoint.manifests import segment_name
from dirtytrack.checkpoint.segments import MOST_INDEX_NBYTES, Codec, Frame, FrameKind, SegmentReader, SegmentWriter
from dirtytrack.delta import diff
from dirtytrack.errors import InvalidCheckpoint, InvalidMemory, UnsupportedKernel
from dirtytrack.kernel import core
from dirtytrack.kernel.packing import all_zero, pack, runs_nbytes, unpack, xxh64


class InMemory:
    """A sink and a source."""

    name = segment_name(3, b"\x01" * 8)
    most_nbytes = 1 << 56

    def will_read(self, spans: Any) -> None: ...

    def __init__(self) -> None:
        self.data = bytearray()

    @property
    def nbytes(self) -> int:
        return len(self.data)

    whole_nbytes = 0

    def write(self, data: Any, lent_nbytes: int = 0) -> None:
        self.data += data

    def finish(self) -> None: ...

    def abandon(self) -> None: ...

    def close(self) -> None: ...

    def read_into(self, buffers: Any, offset: int) -> None:
        for buffer in buffers:
            buffer[:] = self.data[offset : offset + len(buffer)]
            offset += len(buffer)

    def read_summed(self, room: Any, offset: int) -> int:
        self.read_into([memoryview(room)], offset)
        return xxh64(room)


STORE_ID = "ab" * 16


@st.composite
def frames(draw: st.DrawFn) -> tuple[int, FrameKind, array[int], bytes]:
    runs, at = array("Q"), 0
    for gap, nbytes in draw(st.lists(st.tuples(st.integers(0, 9000), st.integers(1, 9000)), min_size=1, max_size=5)):
        runs.extend((at + gap, nbytes))
        at += gap + nbytes
    kind = draw(st.sampled_from(FrameKind))
    total = sum(runs[1::2])
    seed = draw(st.binary(min_size=1, max_size=8))
    plain = (seed * total)[:total]
    if kind == FrameKind.DELTA:
        plain = bytes(diff(plain, bytes(total)))
    return draw(st.integers(0, 2**32 - 1)), kind, runs, b"" if kind == FrameKind.ZEROS else plain


CIPHERS: dict[str, tuple[Callable[[bytes], bytes] | None, Callable[[bytes], bytes] | None]] = {
    "plain": (None, None),
    "encrypted": (lambda data: data[::-1] + b"tag", lambda data: data[:-3][::-1]),
}


@pytest.mark.parametrize("cipher", CIPHERS)
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_frames_come_back(compression: Any, cipher: str) -> None:
    encrypt, decrypt = CIPHERS[cipher]
    encoder, decoder = Encoder(compression, 3, encrypt), Decoder(decrypt)

    @given(st.lists(frames(), max_size=6))
    @settings(max_examples=60)
    def attempt(given_frames: list[tuple[int, FrameKind, array[int], bytes]]) -> None:
        sink = InMemory()
        writer = SegmentWriter(sink, STORE_ID)
        written = list[Frame]()
        for region, kind, runs, plain in given_frames:
            if kind == FrameKind.ZEROS:
                written.append(writer.add(region, runs, kind=kind))
                continue
            stored, codec, encrypted = encoder.encode(plain)
            written.append(
                writer.add(region, runs, stored, kind=kind, codec=codec, encrypted=encrypted, plain_nbytes=len(plain))
            )
        assert writer.nbytes == len(sink.data) + 8 + sum(48 + 16 * len(frame.runs) for frame in written)
        entry = writer.finish()
        assert (entry.nbytes, entry.generation, entry.name) == (len(sink.data), 3, sink.name)
        with SegmentReader(sink, entry, STORE_ID) as reader:
            found = list(reader.frames())
            assert found == written
            for frame, (region, kind, runs, plain) in zip(found, given_frames, strict=True):
                assert (frame.region, frame.kind, frame.encrypted) == (region, kind, bool(encrypt) and bool(plain))
                assert frame.runs.tobytes() == runs.tobytes()
                if kind != FrameKind.ZEROS:
                    assert decoder.decode(frame, reader.read(frame)) == plain
            limits = {frame.region: frame.runs.tolist()[-1][0] for frame in found}  # type: ignore[index]
            if found:
                with pytest.raises(InvalidCheckpoint, match="does not lie in its region"):
                    list(reader.frames(limits))

    attempt()


@pytest.mark.parametrize(
    ("region", "runs", "stored", "options"),
    [
        (0, [], b"", {}),
        (0, [0, 0], b"", {}),
        (0, [8, 8, 0, 8], b"x" * 16, {}),
        (0, [0, 8], b"x" * 9, {}),
        (2**32, [0, 8], b"x" * 8, {}),
        (-1, [0, 8], b"x" * 8, {}),
        (0, [0, 8], b"x", {"kind": FrameKind.ZEROS}),
        (0, [0, 8], b"x", {"codec": Codec.ZSTD, "plain_nbytes": 9}),
        (0, [0, 65 << 20], b"x", {"codec": Codec.ZSTD}),
        (0, [0, 8], b"x" * 9999, {"kind": FrameKind.DELTA, "plain_nbytes": 9999}),
        (0, [2**56, 8], b"x" * 8, {}),
    ],
)
def test_frames_that_cannot_be_written(region: int, runs: list[int], stored: bytes, options: dict[str, Any]) -> None:
    sink = InMemory()
    writer = SegmentWriter(sink, STORE_ID)
    with pytest.raises(InvalidCheckpoint):
        writer.add(region, array("Q", runs), stored, **options)
    assert len(sink.data) == 4096
    writer.add(0, array("Q", [0, 8]), b"x" * 8)
    with SegmentReader(sink, writer.finish(), STORE_ID) as reader:
        assert len(list(reader.frames({0: 8}))) == 1


def test_an_index_has_room_for_so_many_runs() -> None:
    writer = SegmentWriter(InMemory(), STORE_ID)
    most = (MOST_INDEX_NBYTES - 8 - 48) // 16
    assert writer.has_room(most)
    assert not writer.has_room(most + 1)


def test_compression_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidCheckpoint, match="compression="):
        Encoder("lzma")  # type: ignore[arg-type]
    with pytest.raises(InvalidCheckpoint, match="level="):
        Encoder("zstd", 99)
    with pytest.raises(InvalidCheckpoint, match="returns bytes"):
        Encoder(None, encrypt=lambda _: "text").encode(b"x")  # type: ignore[arg-type, return-value]
    noise = os.urandom(500)
    assert Encoder("zstd").encode(noise) == (noise, Codec.NONE, False)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UnsupportedKernel, match=r"dirtytrack\[checkpoint\]") as raised:
        Encoder()
    assert raised.value.feature == "zstandard"
    Encoder(None).encode(b"x")


# ---- packed runs


def test_packed_runs() -> None:
    memory = bytearray(os.urandom(5000))
    address = core.address_of(core.pin(memory, writable=True))
    runs = array("Q", [0, 10, 100, 1, 4990, 10])
    packed, other = bytearray(21), bytearray(5000)
    there = core.address_of(core.pin(other, writable=True))
    for unpinned in (False, True):
        pack(address, 5000, runs, packed, unpinned=unpinned)
        assert packed == memory[:10] + memory[100:101] + memory[4990:]
        unpack(there, 5000, runs, packed, unpinned=unpinned)
        assert other[:10] == memory[:10] and other[4990:] == memory[4990:] and all_zero(other[101:4990])
        unpack(there, 5000, runs, None, unpinned=unpinned)
        assert all_zero(other)
    assert runs_nbytes(runs, 5000) == 21
    assert runs_nbytes(runs, 4999) is None
    assert xxh64(b"abc") == 0x44BC2CF5AD770999
    for bad, room in ((runs, 20), (array("Q", [5, 0]), 0), (array("Q", [0, 5001]), 5001), (array("Q", [1]), 1)):
        with pytest.raises(InvalidMemory):
            pack(address, 5000, bad, bytearray(room))
        with pytest.raises(InvalidMemory):
            unpack(there, 5000, bad, bytes(room))
    with pytest.raises(InvalidMemory):
        unpack(there, 5000, array("Q", [5000, 1]), None)
    assert all_zero(other)

# SPDX-License-Identifier: MIT
"""docs/checkpoint-format.md says what there is: its reader, which shares no code with the library, reads stores."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dirtytrack.checkpoint import verify
from dirtytrack.checkpoint.coding import Decoder, Encoder
from dirtytrack.checkpoint.segments import FrameKind
from dirtytrack.delta import diff
from tests.storing import PAGE, read_back, save, store_at
from tests.unit.test_docs import blocks

DOCS = Path(__file__).parents[3] / "docs"


def reader_of(page: str) -> Callable[..., Any]:
    """The function `read` of a page, and nothing else of it but imports."""
    text = next(block.text for block in blocks(DOCS / page) if "def read(" in block.text)
    start = text.index("def read(")
    end = next(at for at in range(start, len(text)) if text[at] == "\n" and text[at + 1 : at + 2].strip())
    names: dict[str, Any] = {}
    imports = "".join(line + "\n" for line in text[:start].splitlines() if line.startswith(("import ", "from ")))
    assert "dirtytrack" not in imports
    exec(imports + text[start:end], names)
    return names["read"]  # type: ignore[no-any-return]


READ = reader_of("checkpoint-format.md")
READ_DELTA = reader_of("delta-format.md")
STEPS = [
    {"a": bytes([i]) * 3 * PAGE + bytes(PAGE), "b": b"\x07" * (50 + i // 3), "c": b"word " * 900} for i in range(6)
]


def rotated(data: bytes) -> bytes:
    return data[1:] + data[:1]


def rotated_back(data: bytes) -> bytes:
    return data[-1:] + data[:-1]


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_its_reader_reads_each_generation(where: Path, compression: Any, encrypted: bool) -> None:
    encoder = Encoder(compression, 1, rotated if encrypted else None)
    decrypt = rotated_back if encrypted else None
    with store_at(where / "store") as store, store.writer() as writer:
        newest, before = None, None
        for i, contents in enumerate(STEPS):
            newest = save(writer, store, contents, before, newest, encoder=encoder, meta={"step": i})
            before = contents
        save(writer, store, STEPS[2], None, store.manifest(3), revision=1, generation=3, encoder=encoder)
        for i, contents in enumerate(STEPS):
            manifest, found = READ(where / "store", i + 1, decrypt=decrypt)
            assert found == contents == read_back(store, i + 1, Decoder(decrypt))
            assert manifest["kind"] == ("full" if not i else "compacted" if i == 2 else "increment")
        assert READ(where / "store", decrypt=decrypt)[1] == STEPS[-1]


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_its_reader_reads_deltas(where: Path, compression: Any) -> None:
    before, after = bytearray(b"text " * 4000), bytearray(b"text " * 4000)
    after[10:12], after[9000:9100], after[17_000] = b"XY", b"Z" * 100, 1
    runs = array("Q", [0, PAGE, 2 * PAGE, PAGE, 4 * PAGE, 20_000 - 4 * PAGE])
    old, new = (
        b"".join(data[at : at + n] for at, n in zip(runs[::2], runs[1::2], strict=True)) for data in (before, after)
    )
    encoder = Encoder(compression)
    with store_at(where / "store") as store, store.writer() as writer:
        first = save(writer, store, {"a": bytes(before)}, encoder=encoder)
        segment = writer.create_segment(2)
        plain = bytes(diff(new, bytearray(old), granule=8))
        stored, codec, _ = encoder.encode(plain)
        segment.add(0, runs, stored, kind=FrameKind.DELTA, codec=codec, plain_nbytes=len(plain))
        changes = {"generation": 2, "parent": 1, "segments": (*first.segments, segment.finish())}
        writer.publish(first.__class__(**{**vars(first), **changes}))
        assert READ(where / "store", read_delta=READ_DELTA)[1] == {"a": bytes(after)} == read_back(store)
        assert verify(store, all=True).ok

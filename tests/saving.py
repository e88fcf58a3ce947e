# SPDX-License-Identifier: MIT
"""Programs that save what they have: with a full copy at each save, which each generation is compared with."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from dirtytrack import allocate
from dirtytrack.checkpoint import Checkpointer, Save, Store, restore
from dirtytrack.checkpoint.coding import Decoder
from dirtytrack.checkpoint.store import DirectoryStore
from tests.storing import read_back

__all__ = ["PAGE", "Program", "bytes_of", "paged", "require_equal", "scribble"]

PAGE = 4096
Decrypt = Callable[[bytes], bytes]


def paged(pages: int, seed: int | None = None) -> Any:
    """Bytes that have their pages for themselves; zeros, or random ones."""
    found = np.frombuffer(allocate(pages * PAGE), np.uint8)
    if seed is not None:
        found[:] = np.frombuffer(random.Random(seed).randbytes(found.nbytes), np.uint8)
    return found


def bytes_of(buffer: Any) -> np.ndarray[Any, Any]:
    """The bytes of a buffer, to be read and written."""
    if isinstance(buffer, np.ndarray):
        return buffer.reshape(-1).view(np.uint8)
    if hasattr(buffer, "untyped_storage"):
        torch: Any = import_module("torch")

        found: np.ndarray[Any, Any] = buffer.detach().reshape(-1).view(torch.uint8).numpy()
        return found
    return np.frombuffer(getattr(buffer, "buf", buffer), np.uint8)


def scribble(buffer: Any, draw: random.Random, share: float = 0.1) -> None:
    """Write to some of its pages: a few bytes, a whole page, the same again, or zeros."""
    data = bytes_of(buffer)
    pages = -(-len(data) // PAGE)
    for page in draw.sample(range(pages), max(1, int(pages * share))):
        part = data[page * PAGE : (page + 1) * PAGE]
        match draw.randrange(4):
            case 0:
                part[draw.randrange(len(part))] ^= 1 + draw.randrange(255)
            case 1:
                part[:] = np.frombuffer(draw.randbytes(len(part)), np.uint8)
            case 2:
                part[0] = part[0]
            case _:
                part[:] = 0


def require_equal(
    where: Path | Store,
    expected: Mapping[str, bytes],
    generation: int | None = None,
    decrypt: Decrypt | None = None,
) -> None:
    """The generation is these bytes: by `restore`, and by the plainest way to put frames together."""
    store: Store = DirectoryStore(where) if isinstance(where, Path) else where
    plain = read_back(store, generation, Decoder(decrypt))
    state = restore(store, generation=generation, decrypt=decrypt, threads=1)
    assert plain.keys() == expected.keys() == state.keys()
    for name, data in expected.items():
        assert plain[name] == data, name
        assert bytes(bytes_of(state[name])) == data, name


class Program:
    """Buffers, and what each generation of them is."""

    def __init__(
        self, where: Path | DirectoryStore, buffers: Mapping[str, Any], *, seed: int = 1, **options: Any
    ) -> None:
        self.where, self.buffers, self.draw = where, dict(buffers), random.Random(seed)
        self.decrypt: Decrypt | None = options.get("decrypt")
        self.truth: dict[int, dict[str, bytes]] = {}
        self.ckpt = Checkpointer(where, self.buffers, **options)

    def copy(self) -> dict[str, bytes]:
        return {name: bytes(bytes_of(buffer)) for name, buffer in self.buffers.items()}

    def scribble(self, share: float = 0.1) -> None:
        for buffer in self.buffers.values():
            scribble(buffer, self.draw, share)

    def save(self, *, full: bool = False, wait: bool = True) -> Save:
        """Save, and wait until it is durable; note what it is to be."""
        now = self.copy()
        made = self.ckpt.save({"number": len(self.truth)}, full=full)
        if made.generation is not None:
            self.truth[made.generation] = now
        if wait:
            assert made.wait(20)
        return made

    def check(self, *generations: int) -> None:
        for generation in generations or self.truth:
            require_equal(self.where, self.truth[generation], generation, self.decrypt)

    def close(self) -> None:
        self.ckpt.close()

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

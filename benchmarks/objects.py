# SPDX-License-Identifier: MIT
"""Object stores: a full save against the library's own bare put of the same bytes, and a restore against its get."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import dirtytrack
from dirtytrack.checkpoint import Checkpointer, ObjectStore, Retention, restore

from .bare import Bare
from .checkpoint import FEW_ROUNDS, weighed
from .harness import MIB, Row, Settings, show_bytes

LEAST_SPEED = 0.8
LINE = 125_000_000


@contextmanager
def server(bytes_per_second: int | None = None) -> Iterator[dict[str, Any]]:
    """A server on this machine, as if behind a line of some speed; what it takes to use it."""
    words = [] if bytes_per_second is None else [str(bytes_per_second)]
    process = subprocess.Popen([sys.executable, str(Path(__file__).with_name("s3.py")), *words], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield {
            "endpoint": f"http://127.0.0.1:{int(process.stdout.readline())}",
            "region": "us-east-1",
            "access_key_id": "benchmark",
            "secret_access_key": "benchmark",
            "client_options": {"allow_http": True},
        }
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def measured(few: Settings, nbytes: int, options: dict[str, Any], line: str) -> Iterator[Row]:
    import obstore

    data: Any = np.frombuffer(dirtytrack.allocate(nbytes), np.uint64)
    data[:] = np.arange(nbytes // 8, dtype=np.uint64) * 0x9E3779B97F4A7C15
    store = ObjectStore("s3://benchmark/store", create=True, grace_seconds=0, **options)
    plain: Any = obstore.store.from_url("s3://benchmark/plain", **options)
    view = memoryview(data).cast("B")
    saving: dict[str, Any] = {"compression": None, "retain": Retention(last=1), "compact": None}
    with Checkpointer(store, {"memory": data}, **saving) as ckpt:

        def prepare() -> None:
            ckpt.wait()

        found = weighed(few, prepare, lambda: ckpt.save(full=True).wait(), lambda: obstore.put(plain, "all", view))
        yield found.row(f"upload {show_bytes(nbytes)}{line}", LEAST_SPEED)
    if line:
        return
    found = weighed(few, lambda: None, lambda: restore(store), lambda: bytes(obstore.get(plain, "all").bytes()))
    yield found.row(f"download {show_bytes(nbytes)}", None)


def objects(settings: Settings, bare: Bare) -> Iterator[Row]:
    """Checkpoints in an object store, at a server beside it that does next to nothing."""
    few = replace(settings, least_rounds=min(settings.least_rounds, FEW_ROUNDS), most_rounds=FEW_ROUNDS)
    for nbytes in settings.sizes(256 * MIB):
        with server() as options:
            yield from measured(few, nbytes, options, "")
        with server(LINE) as options:
            yield from measured(few, nbytes, options, ", 1 Gbit/s")

# SPDX-License-Identifier: MIT
"""One process of the service: the first has the keys, each other waits until the service moves to it."""

from __future__ import annotations

import asyncio
import os
import threading
from multiprocessing.connection import Connection

from .registry import Registry
from .server import Server
from .store import Store

MIB = 1 << 20


def run(role: str, name: str, directory: str, mib: int, parent: Connection | None = None) -> None:
    """Run until the parent is gone, where there is one.

    Args:
        role: "serve" or "receive".
        name: of this process, and of no other.
        directory: the registry's.
        mib: of the table, for "serve".
        parent: nothing comes from there; it closes when the parent ends.
    """
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    asyncio.run(_run(role, Registry(directory, name), mib))


def _end_with(parent: Connection) -> None:
    parent.poll(None)
    os._exit(0)


async def _run(role: str, registry: Registry, mib: int) -> None:
    server = Server(registry)
    await server.listen()
    if role == "serve":
        store = Store.allocate(mib * MIB)
        for number in range(mib * MIB // 1024):  # a quarter of its slots
            store.table.put(b"old-%d" % number, b'"%d"' % number)
        await server.begin(store)
    else:
        await server.take_over()
    await asyncio.Event().wait()

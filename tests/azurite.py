# SPDX-License-Identifier: MIT
"""Azurite, Microsoft's emulator of Azure Blob Storage, for the tests of every kind of store (``make azurite``)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate

from tests.buckets import BUCKET

__all__ = ["ACCOUNT", "KEY", "served"]

ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="  # known to everybody


@contextmanager
def served() -> Iterator[str]:
    """Its address, with a container for the tests."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    where = ["--blobHost", "127.0.0.1", "--blobPort", str(port)]
    others = ["--inMemoryPersistence", "--skipApiVersionCheck", "--silent", "--disableTelemetry"]
    server = subprocess.Popen(
        [os.environ["DIRTYTRACK_AZURITE"], *where, *others], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(300):
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.1)
        _make_container(f"http://127.0.0.1:{port}/{ACCOUNT}/{BUCKET}")
        yield f"http://127.0.0.1:{port}/{ACCOUNT}"
    finally:
        server.kill()
        server.wait()


def _make_container(url: str) -> None:
    date = formatdate(usegmt=True)
    told = f"x-ms-date:{date}\nx-ms-version:2021-08-06\n/{ACCOUNT}/{ACCOUNT}/{BUCKET}\nrestype:container"
    signed = hmac.new(base64.b64decode(KEY), ("PUT" + "\n" * 12 + told).encode(), hashlib.sha256).digest()
    headers = {
        "x-ms-date": date,
        "x-ms-version": "2021-08-06",
        "Authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(signed).decode()}",
        "Content-Length": "0",
    }
    with urllib.request.urlopen(urllib.request.Request(f"{url}?restype=container", method="PUT", headers=headers)):
        pass

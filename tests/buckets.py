# SPDX-License-Identifier: MIT
"""Object stores under test: a server that speaks S3, a proxy before it that does what networks do, requests that fail.

`served` runs moto's server in a process of its own. `Proxy` knows HTTP: it stalls, cuts, throttles, refuses, loses
answers that the server gave, and tears uploads in the middle. `Failing` fails single requests without any network.
"""

from __future__ import annotations

import errno
import http.client
import os
import re
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import obstore
from obstore.store import MemoryStore

from dirtytrack.checkpoint import DirectoryStore, ObjectStore
from dirtytrack.checkpoint.objects.bucket import Bucket
from dirtytrack.errors import StoreFailed

__all__ = [
    "BUCKET",
    "CREDENTIALS",
    "Answer",
    "Failing",
    "Memory",
    "Place",
    "Proxy",
    "Request",
    "answered",
    "options",
    "served",
]

BUCKET = "dirtytrack-tests"
CREDENTIALS = {"access_key_id": "tests", "secret_access_key": "of-dirtytrack"}
_SCHEMES = {"s3": "s3", "memory": "s3", "azure": "az", "google": "gs"}
QUICK: dict[str, Any] = {
    "max_retries": 6,
    "backoff": {"init_backoff": timedelta(milliseconds=5), "max_backoff": timedelta(milliseconds=50), "base": 2},
    "retry_timeout": timedelta(seconds=20),
}


# ---- a server


@contextmanager
def served() -> Iterator[str]:
    """moto's server, in a process of its own; its address. It keeps all in memory."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    code = f"import sys; sys.argv[1:] = ['-H', '127.0.0.1', '-p', '{port}']; from moto.server import main; main()"
    server = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "S3_IGNORE_SUBDOMAIN_BUCKETNAME": "true"},
    )
    try:
        _make_bucket(port, server)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def _make_bucket(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert server.poll() is None, "moto's server ended: run `python -m moto.server` to see why"
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            connection.request("PUT", f"/{BUCKET}")
            assert connection.getresponse().status == 200
            connection.close()
            return
        except OSError:
            time.sleep(0.05)
    raise AssertionError("moto's server does not answer")


def options(endpoint: str, **others: Any) -> dict[str, Any]:
    """For an `ObjectStore` at an endpoint: quick to try again, quick to give up."""
    client = {
        "allow_http": True,
        "timeout": timedelta(seconds=others.pop("timeout", 20)),
        **others.pop("client_options", {}),
    }
    return {
        "endpoint": endpoint,
        "region": "us-east-1",
        **CREDENTIALS,
        "retry_config": QUICK,
        "client_options": client,
        **others,
    }


class Place:
    """Where stores of one kind are; each test has one of its own."""

    def __init__(self, kind: str, directory: Path, endpoint: Callable[[], str]) -> None:
        self.kind, self.directory, self._endpoint = kind, directory, endpoint
        self.prefix = uuid.uuid4().hex
        self._memory = MemoryStore()

    @property
    def url(self) -> str:
        if self.kind == "directory":
            return str(self.directory / "store")
        return f"{_SCHEMES[self.kind]}://{BUCKET}/{self.prefix}/store"

    @property
    def endpoint(self) -> str:
        return self._endpoint()

    def environment(self) -> dict[str, str]:
        """With which a URL alone is enough."""
        if self.kind == "google":
            from tests.gcs import account

            return {"GOOGLE_SERVICE_ACCOUNT_KEY": account(self.endpoint), "GOOGLE_ALLOW_HTTP": "true"}
        if self.kind == "azure":
            from tests.azurite import ACCOUNT, KEY

            return {
                "AZURE_STORAGE_ENDPOINT": self.endpoint,
                "AZURE_ALLOW_HTTP": "true",
                "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
                "AZURE_STORAGE_ACCOUNT_KEY": KEY,
            }
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": CREDENTIALS["access_key_id"],
            "AWS_SECRET_ACCESS_KEY": CREDENTIALS["secret_access_key"],
        }

    def open(self, *, create: bool = True, **others: Any) -> Any:
        """The store; in an object store what is removed goes at once, where nothing else is said."""
        if self.kind == "directory":
            return DirectoryStore(self.directory / "store", create=create)
        others.setdefault("grace_seconds", 0)
        if self.kind == "memory":
            return ObjectStore(self._memory, create=create, **others)
        if self.kind in ("azure", "google"):
            return ObjectStore(self.url, create=create, **others)  # by the environment
        return ObjectStore(self.url, create=create, **options(self.endpoint, **others))


# ---- a proxy that knows HTTP


class Request(NamedTuple):
    """A request that comes by."""

    number: int
    method: str
    key: str
    """Of the object, within the bucket."""
    query: str
    headers: dict[str, str]
    nbytes: int


@dataclass
class Answer:
    """What the proxy answers by itself."""

    status: int
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)


def answered(status: int, code: str, message: str = "") -> Answer:
    """As S3 says no."""
    body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
    return Answer(status, body, {"Content-Type": "application/xml"})


Meddle = Callable[[Request], "str | Answer"]
_LENGTH = re.compile(rb"content-length:\s*([0-9]+)", re.IGNORECASE)


class Proxy:
    """Listens, and passes requests on to a server.

    Args:
        to: the server's address.
        meddle: called with each request; says what becomes of it: "pass"; "cut", before it; "tear", in the middle of
            its body; "stall", never answered; "lose", done by the server, and the answer lost; "tear answer", in its
            middle; "without the condition", as a server does that knows of none; or an `Answer`.
        bytes_per_second: how slowly bodies pass, both ways; None for at once.
    """

    def __init__(self, to: str, meddle: Meddle = lambda _: "pass", *, bytes_per_second: float | None = None) -> None:
        host, _, port = to.removeprefix("http://").partition(":")
        self._to = host, int(port)
        self.meddle, self.rate = meddle, bytes_per_second
        self.seen: list[Request] = []
        self.at_once = self.most_at_once = 0
        """Uploads of parts that are under way."""
        self._mutex = threading.Lock()
        self._over = threading.Event()
        self._sockets: list[socket.socket] = []
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.address = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for each in tuple(self._sockets):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(20)
        for each in self._sockets:
            each.close()

    def keys(self, method: str) -> list[str]:
        """Of the requests of that kind, in order."""
        return [each.key for each in self.seen if each.method == method]

    def _accept(self) -> None:
        while not self._over.is_set():
            try:
                near = self._listening.accept()[0]
            except OSError:
                return
            self._sockets.append(near)
            thread = threading.Thread(target=self._serve, args=(near,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, near: socket.socket) -> None:
        incoming = near.makefile("rb")
        try:
            while not self._over.is_set() and self._one(near, incoming):
                pass
        except (OSError, ValueError, http.client.HTTPException):
            pass
        finally:
            incoming.close()
            with suppress(OSError):
                near.shutdown(socket.SHUT_RDWR)

    def _one(self, near: socket.socket, incoming: Any) -> bool:
        """Whether the connection goes on."""
        head = _head(incoming)
        if not head:
            return False
        method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ", 2)
        length = int(found[1]) if (found := _LENGTH.search(head)) else 0
        path, _, query = target.partition("?")
        headers = {
            name.strip().lower(): value.strip()
            for line in head.decode("latin-1").split("\r\n")[1:]
            if line
            for name, value in [line.split(":", 1)]
        }
        with self._mutex:
            key = unquote(path).removeprefix(f"/{BUCKET}").lstrip("/")
            request = Request(len(self.seen), method, key, query, headers, length)
            self.seen.append(request)
        return self._do(request, self.meddle(request), head, near, incoming)

    @contextmanager
    def _under_way(self, request: Request) -> Iterator[None]:
        """Until it is answered: the client may send the next as soon as it has the answer."""
        part = request.method == "PUT" and "partNumber" in request.query
        with self._mutex:
            self.at_once += part
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            yield
        finally:
            with self._mutex:
                self.at_once -= part

    def _do(self, request: Request, what: str | Answer, head: bytes, near: socket.socket, incoming: Any) -> bool:
        if what == "cut":
            return False
        if what == "without the condition":
            head = re.sub(rb"(?i)\r\nif-none-match:[^\r]*", b"", head)
        if what == "stall":
            self._over.wait(60)
            return False
        if isinstance(what, Answer):
            _exactly(incoming, request.nbytes)
            body = what.body.encode()
            lines = [f"HTTP/1.1 {what.status} as-told", f"Content-Length: {len(body)}"]
            lines += [f"{name}: {value}" for name, value in what.headers.items()]
            near.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + (b"" if request.method == "HEAD" else body))
            return True
        far = socket.create_connection(self._to)
        self._sockets.append(far)
        try:
            with self._under_way(request):
                answer = self._answer(request, what, head, far, incoming)
            if not answer:
                return False
            if what == "lose":
                return False
            if what == "tear answer":
                near.sendall(answer[: (answer.index(b"\r\n\r\n") + 4 + len(answer)) // 2])
                return False
            for at in range(0, len(answer), 1 << 16):
                near.sendall(answer[at : at + (1 << 16)])
                self._slowly(min(len(answer) - at, 1 << 16))
            return False  # the server closed, and so do we: the client sees its header
        finally:
            far.close()
            self._sockets.remove(far)

    def _answer(self, request: Request, what: str, head: bytes, far: socket.socket, incoming: Any) -> bytes:
        """The server's, to all of the request; empty where it is torn."""
        far.sendall(re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", head).rstrip(b"\r\n") + b"\r\nConnection: close\r\n\r\n")
        left = request.nbytes // 2 if what == "tear" else request.nbytes
        while left:
            some = incoming.read(min(left, 1 << 16))
            if not some:
                return b""
            far.sendall(some)
            self._slowly(len(some))
            left -= len(some)
        answer = b""
        while what != "tear" and (some := far.recv(1 << 18)):
            answer += some
        return answer

    def _slowly(self, nbytes: int) -> None:
        if self.rate is not None:
            self._over.wait(nbytes / self.rate)


def _head(incoming: Any) -> bytes:
    head = b""
    while line := incoming.readline():
        head += bytes(line)
        if line == b"\r\n":
            return head
    return b""


def _exactly(incoming: Any, nbytes: int) -> bytes:
    found: bytes = incoming.read(nbytes)
    if len(found) != nbytes:
        raise ConnectionError
    return found


# ---- requests that fail without a network


class Memory(Bucket):
    """A bucket in this process's memory, whose requests are counted; `ask` may be overridden."""

    def __init__(self, store: MemoryStore | None = None) -> None:
        super().__init__(obstore, MemoryStore() if store is None else store, "memory")
        self.count = 0

    def again(self) -> Memory:
        """The same objects, through another client that does nothing special."""
        return Memory(self._store)


class Failing(Memory):
    """The ``nth`` request from now on (from 1) fails, or all that follow too.

    Args:
        nth: which; 0 for none.
        after: it is done, and its answer lost.
        for_ever: all that follow fail too, before they are done.
    """

    def __init__(self, store: MemoryStore, nth: int = 0, *, after: bool = False, for_ever: bool = False) -> None:
        super().__init__(store)
        self.nth, self.after, self.for_ever = nth, after, for_ever
        self.failed: list[str] = []

    def _ask(self, doing: str, run: Callable[..., Any], *args: Any, again: bool = True, **options: Any) -> Any:
        self.count += 1
        fails = self.nth and (self.count == self.nth or (self.for_ever and self.count > self.nth))
        if not fails:
            return super()._ask(doing, run, *args, **options)
        self.failed.append(doing)
        if self.after and self.count == self.nth:
            super()._ask(doing, run, *args, **options)
        raise StoreFailed(f"cannot {doing}: as the test wants it", errno=errno.EREMOTEIO)

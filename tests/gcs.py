# SPDX-License-Identifier: MIT
"""A small server that speaks Google Cloud Storage's XML API, for the tests of every kind of store.

**It is ours, and no emulator of Google's.** Those that the registries have (fake-gcs-server, gcp-storage-emulator) know
its JSON API, while obstore uses the XML API: they refuse its puts. What is here follows Google's documentation: request
headers (``x-goog-if-generation-match: 0`` puts an object unless there is one, else 412 PreconditionFailed), lists of
the second version, uploads in parts, errors. So a test at it shows that what this library asks of obstore for ``gs://``
becomes the requests that are documented, and what it makes of the documented answers; not what Google's servers do.

``python -m tests.gcs PORT``: keeps all in memory, and never ends by itself.
"""

from __future__ import annotations

import itertools
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.buckets import BUCKET

__all__ = ["account", "served"]


def account(endpoint: str) -> str:
    """A service account's key, as obstore takes it, for a server that asks for no credentials."""
    return json.dumps(
        {"gcs_base_url": endpoint, "disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
    )


@contextmanager
def served() -> Iterator[str]:
    """Its address, with a bucket for the tests."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    server = subprocess.Popen([sys.executable, "-m", "tests.gcs", str(port)])
    try:
        for _ in range(600):
            assert server.poll() is None, "the server ended: run `python -m tests.gcs 0` to see why"
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


class _Object(NamedTuple):
    data: bytes
    generation: int
    modified: datetime

    @property
    def headers(self) -> dict[str, str]:
        return {
            "ETag": f'"{self.generation:x}"',
            "Last-Modified": format_datetime(self.modified, usegmt=True),
            "x-goog-generation": str(self.generation),
            "Accept-Ranges": "bytes",
        }


class _Bucket:
    """What is stored. Each method is one step, as a request to the store is."""

    def __init__(self) -> None:
        self.objects: dict[str, _Object] = {}
        self.uploads: dict[str, tuple[str, dict[int, bytes]]] = {}
        self.mutex = threading.Lock()
        self._generations = itertools.count(1_700_000_000_000_000)

    def put(self, key: str, data: bytes, wanted: str | None) -> _Object | None:
        """None where a condition does not hold: ``x-goog-if-generation-match``, 0 for "there is none"."""
        with self.mutex:
            there = self.objects.get(key)
            if wanted is not None and int(wanted) != (0 if there is None else there.generation):
                return None
            made = self.objects[key] = _Object(data, next(self._generations), datetime.now(timezone.utc))
            return made

    def begin(self, key: str) -> str:
        with self.mutex:
            upload = f"upload-{next(self._generations)}"
            self.uploads[upload] = key, {}
            return upload


_bucket = _Bucket()
_MOST_LISTED = 1000


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16

    def log_message(self, *_: object) -> None:
        pass

    # ---- what came, and what goes

    def _come(self) -> tuple[str, dict[str, str], bytes]:
        """Key, query and body; an empty key is the bucket."""
        parts = urlsplit(self.path)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if bucket != BUCKET:
            raise _Refused(404, "NoSuchBucket", "The specified bucket does not exist.")
        return key, query, body

    def _go(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _answer(self) -> None:
        try:
            getattr(self, f"_{self.command.lower()}")(*self._come())
        except _Refused as why:
            text = (
                f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{why.code}</Code><Message>{why}</Message></Error>"
            )
            self._go(why.status, text.encode(), {"Content-Type": "application/xml; charset=UTF-8"})

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer  # noqa: N815 - as the base class looks for them

    # ---- one kind of request each

    def _put(self, key: str, query: dict[str, str], body: bytes) -> None:
        if "uploadId" in query:
            _, parts = self._upload(query["uploadId"], key)
            parts[int(query["partNumber"])] = body
            self._go(200, headers={"ETag": f'"{len(body):x}-{query["partNumber"]}"'})
            return
        made = _bucket.put(key, body, self.headers.get("x-goog-if-generation-match"))
        if made is None:
            raise _Refused(412, "PreconditionFailed", "At least one of the pre-conditions you specified did not hold.")
        self._go(200, headers=made.headers)

    @staticmethod
    def _upload(upload: str, key: str) -> tuple[str, dict[int, bytes]]:
        found = _bucket.uploads.get(upload)
        if found is None or found[0] != key:
            raise _Refused(404, "NoSuchUpload", "The requested upload was not found.")
        return found

    def _post(self, key: str, query: dict[str, str], body: bytes) -> None:
        if "uploads" in query:
            upload = _bucket.begin(key)
            told = f"<Bucket>{BUCKET}</Bucket><Key>{escape(key)}</Key><UploadId>{upload}</UploadId>"
            self._go(200, f"<InitiateMultipartUploadResult>{told}</InitiateMultipartUploadResult>".encode())
            return
        _, parts = self._upload(query["uploadId"], key)
        named = [int(number) for number in re.findall(rb"<PartNumber>([0-9]+)</PartNumber>", body)]
        if not named or named != sorted(named) or not set(named) <= parts.keys():
            raise _Refused(400, "InvalidPart", "One or more of the specified parts could not be found.")
        if any(len(parts[number]) < 5 << 20 for number in named[:-1]):
            raise _Refused(
                400, "EntityTooSmall", "Your proposed upload is smaller than the minimum allowed object size."
            )
        made = _bucket.put(key, b"".join(parts[number] for number in named), None)
        assert made is not None
        _bucket.uploads.pop(query["uploadId"], None)
        told = f"<Key>{escape(key)}</Key><ETag>{made.headers['ETag']}</ETag>"
        self._go(200, f"<CompleteMultipartUploadResult>{told}</CompleteMultipartUploadResult>".encode(), made.headers)

    def _delete(self, key: str, query: dict[str, str], body: bytes) -> None:
        if "uploadId" in query:
            self._upload(query["uploadId"], key)
            _bucket.uploads.pop(query["uploadId"], None)
        elif _bucket.objects.pop(key, None) is None:
            raise _Refused(404, "NoSuchKey", "The specified key does not exist.")
        self._go(204)

    def _head(self, key: str, query: dict[str, str], body: bytes) -> None:
        self._get(key, query, body)

    def _get(self, key: str, query: dict[str, str], body: bytes) -> None:
        if not key:
            self._list(query)
            return
        found = _bucket.objects.get(key)
        if found is None:
            raise _Refused(404, "NoSuchKey", "The specified key does not exist.")
        asked = re.fullmatch(r"bytes=([0-9]+)-([0-9]*)", self.headers.get("Range") or "")
        if asked is None:
            self._go(200, found.data, found.headers)
            return
        first, end = int(asked[1]), min(int(asked[2]) + 1 if asked[2] else len(found.data), len(found.data))
        if first >= len(found.data):
            raise _Refused(416, "InvalidRange", "The requested range cannot be satisfied.")
        within = {"Content-Range": f"bytes {first}-{end - 1}/{len(found.data)}"}
        self._go(206, found.data[first:end], {**found.headers, **within})

    def _list(self, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = max(query.get("continuation-token", ""), query.get("start-after", ""))
        lines: list[str] = []
        folders: set[str] = set()
        last, left = "", min(int(query.get("max-keys", _MOST_LISTED)), _MOST_LISTED)
        with _bucket.mutex:
            found = sorted(item for item in _bucket.objects.items() if item[0].startswith(prefix) and item[0] > after)
        for key, each in found:
            rest = key[len(prefix) :]
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.partition(delimiter)[0] + delimiter)
                continue
            if not left:
                lines.append(
                    f"<IsTruncated>true</IsTruncated><NextContinuationToken>{escape(last)}</NextContinuationToken>"
                )
                break
            modified = each.modified.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            lines.append(
                f"<Contents><Key>{escape(key)}</Key><Generation>{each.generation}</Generation><LastModified>{modified}"
                f"</LastModified><ETag>{each.headers['ETag']}</ETag><Size>{len(each.data)}</Size></Contents>"
            )
            last, left = key, left - 1
        lines += [f"<CommonPrefixes><Prefix>{escape(each)}</Prefix></CommonPrefixes>" for each in sorted(folders)]
        self._go(200, f"<ListBucketResult><Name>{BUCKET}</Name>{''.join(lines)}</ListBucketResult>".encode())


class _Refused(Exception):
    """Answered as an error."""

    def __init__(self, status: int, code: str, says: str) -> None:
        super().__init__(says)
        self.status, self.code = status, code


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), _Handler).serve_forever()

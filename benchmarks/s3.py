# SPDX-License-Identifier: MIT
"""A server that speaks as much S3 as the benchmarks need and does as little as it can: what is measured is the client.

``python -m benchmarks.s3 [BYTES_PER_SECOND]``: prints its port. It keeps objects in memory, checks nothing and never
ends by itself; where a speed is given, what is sent to it comes no faster than over a line of that.
"""

from __future__ import annotations

import itertools
import socket
import sys
import threading
import time
from datetime import datetime, timezone
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

objects: dict[str, tuple[list[bytearray], datetime]] = {}  # in parts, as they came
uploads: dict[str, dict[int, bytearray]] = {}
numbers = itertools.count(1)
mutex = threading.Lock()
bytes_per_second = float(sys.argv[1]) if len(sys.argv) > 1 else 0.0
line_is_free = 0.0  # when what came so far has come over the line


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    rbufsize, wbufsize = 0, 1 << 16  # bodies are read into their place, by few calls
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, status: int, body: bytes | memoryview = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def asked(self) -> tuple[str, dict[str, str]]:
        parts = urlsplit(self.path)
        key = unquote(parts.path).lstrip("/").partition("/")[2]
        return key, {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}

    def body(self) -> bytearray:
        data = bytearray(int(self.headers.get("Content-Length") or 0))
        rest = memoryview(data)
        while rest:
            rest = rest[self.connection.recv_into(rest, 0, socket.MSG_WAITALL) :]
        if bytes_per_second:
            wait_for_the_line(len(data))
        return data

    def keep(self, key: str, *parts: bytearray) -> None:
        objects[key] = [*parts], datetime.now(timezone.utc)

    def do_PUT(self) -> None:
        (key, query), data = self.asked(), self.body()
        if "partNumber" in query:
            uploads[query["uploadId"]][int(query["partNumber"])] = data
        else:
            with mutex:
                if self.headers.get("If-None-Match") == "*" and key in objects:
                    self.reply(412, b"<Error><Code>PreconditionFailed</Code></Error>")
                    return
                self.keep(key, data)
        self.reply(200, ETag='"1"')

    def do_POST(self) -> None:
        (key, query), data = self.asked(), self.body()
        if "uploads" in query:
            number = str(next(numbers))
            uploads[number] = {}
            text = f"<InitiateMultipartUploadResult><UploadId>{number}</UploadId></InitiateMultipartUploadResult>"
        elif "uploadId" in query:
            parts = uploads.pop(query["uploadId"])
            self.keep(key, *(parts[each] for each in sorted(parts)))
            text = "<CompleteMultipartUploadResult><ETag>1</ETag></CompleteMultipartUploadResult>"
        else:  # ?delete
            keys = [part.partition("</Key>")[0] for part in data.decode().split("<Key>")[1:]]
            for each in keys:
                objects.pop(each, None)
            gone = "".join(f"<Deleted><Key>{each}</Key></Deleted>" for each in keys)
            text = f"<DeleteResult>{gone}</DeleteResult>"
        self.reply(200, text.encode())

    def do_DELETE(self) -> None:
        key, _ = self.asked()
        objects.pop(key, None)
        self.reply(204)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        key, query = self.asked()
        if not key:
            self.listing(query.get("prefix", ""))
            return
        if key not in objects:
            self.reply(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        parts, modified = objects[key]
        if len(parts) > 1:
            parts[:] = [bytearray().join(parts)]
        data = memoryview(parts[0])
        headers = {"ETag": '"1"', "Last_Modified": format_datetime(modified, usegmt=True)}
        if (asked := self.headers.get("Range")) is None:
            self.reply(200, data, **headers)
            return
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last) + 1 if last else len(data), len(data))
        self.reply(206, data[start:end], Content_Range=f"bytes {start}-{end - 1}/{len(data)}", **headers)

    def listing(self, prefix: str) -> None:
        found = [
            f"<Contents><Key>{key}</Key><LastModified>{modified.isoformat(timespec='milliseconds')}</LastModified>"
            f"<Size>{sum(map(len, parts))}</Size></Contents>"
            for key, (parts, modified) in sorted(objects.items())
            if key.startswith(prefix)
        ]
        self.reply(200, f"<ListBucketResult>{''.join(found)}</ListBucketResult>".encode())


def wait_for_the_line(nbytes: int) -> None:
    global line_is_free
    with mutex:
        line_is_free = until = max(line_is_free, time.monotonic()) + nbytes / bytes_per_second
    time.sleep(max(0.0, until - time.monotonic()))


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()

# SPDX-License-Identifier: MIT
"""Ceph's S3 server on a cluster of one monitor and one OSD in memory, for tests against a real object store.

Unlike moto's it checks signatures, clocks and rights, and is what people run. ``make radosgw`` installs what it takes
on Debian, and runs the tests of object stores against it.
"""

from __future__ import annotations

import http.client
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.buckets import BUCKET, CREDENTIALS

__all__ = ["served"]

_CONF = """
[global]
fsid = {fsid}
mon host = 127.0.0.1:{mon}
run dir = {where}
log file = {where}/$name.log
admin socket = {where}/$name.asok
pid file = {where}/$name.pid
auth cluster required = none
auth service required = none
auth client required = none
osd crush chooseleaf type = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pg autoscale mode = off
mon allow pool size one = true
mon max pg per osd = 2000
ms bind ipv6 = false
public addr = 127.0.0.1
cluster addr = 127.0.0.1
[mon.a]
mon data = {where}/mon
mon data avail crit = 0
mon data avail warn = 0
mon cluster log file = {where}/cluster.log
mon warn on pool no redundancy = false
[osd.0]
osd data = {where}/osd
osd objectstore = memstore
memstore device bytes = 4294967296
osd class load list = *
osd class default list = *
[client.rgw]
rgw data = {where}/rgw
rgw frontends = beast endpoint=127.0.0.1:{rgw}
rgw enable usage log = false
rgw run sync thread = false
ms mon client mode = crc
"""


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def served() -> Iterator[str]:
    """Its address, with a bucket for the tests."""
    where = Path(tempfile.mkdtemp(prefix="dirtytrack-ceph-"))
    mon, rgw, fsid = _free_port(), _free_port(), str(uuid.uuid4())
    conf = where / "ceph.conf"
    conf.write_text(_CONF.format(fsid=fsid, where=where, mon=mon, rgw=rgw), encoding="utf-8")
    running: list[subprocess.Popen[bytes]] = []

    def run(*words: str) -> None:
        done = subprocess.run(
            [words[0], "-c", str(conf), *words[1:]], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"

    def start(*words: str) -> None:
        log = (where / f"{words[0]}.out").open("wb")
        running.append(subprocess.Popen([words[0], "-c", str(conf), "-f", *words[1:]], stdout=log, stderr=log))
        log.close()

    try:
        for name in ("mon", "osd", "rgw"):
            (where / name).mkdir()
        subprocess.run(
            ["monmaptool", "--create", "--fsid", fsid, "--add", "a", f"127.0.0.1:{mon}", str(where / "monmap")],
            capture_output=True,
            check=True,
        )
        run("ceph-mon", "--id", "a", "--mkfs", "--monmap", str(where / "monmap"), "--keyring", "/dev/null")
        (where / "mon" / "keyring").touch()
        start("ceph-mon", "--id", "a")
        run("ceph", "--connect-timeout", "60", "osd", "create")
        run("ceph", "osd", "crush", "add", "osd.0", "1", "root=default", "host=localhost")
        run("ceph-osd", "--id", "0", "--mkfs")
        start("ceph-osd", "--id", "0")
        run(
            "radosgw-admin", "user", "create", "--uid", "tests", "--display-name", "tests",
            "--access-key", CREDENTIALS["access_key_id"], "--secret-key", CREDENTIALS["secret_access_key"],
        )  # fmt: skip
        start("radosgw", "-n", "client.rgw")
        _make_bucket(rgw)
        yield f"http://127.0.0.1:{rgw}"
    finally:
        for process in reversed(running):
            process.kill()
            process.wait()
        shutil.rmtree(where, ignore_errors=True)


def _make_bucket(port: int) -> None:
    import boto3  # comes with moto

    for _ in range(600):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            connection.request("GET", "/")
            connection.getresponse().read()
            connection.close()
            break
        except OSError:
            time.sleep(0.1)
    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        region_name="us-east-1",
        aws_access_key_id=CREDENTIALS["access_key_id"],
        aws_secret_access_key=CREDENTIALS["secret_access_key"],
    )
    client.create_bucket(Bucket=BUCKET)

# SPDX-License-Identifier: MIT
"""Programs that save to an object store, through a network that fails; they are killed, and go on."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dirtytrack.checkpoint import Checkpointer, ObjectStore, restore, verify
from dirtytrack.cli import main
from dirtytrack.errors import StoreBusy, StoreFailed
from tests.buckets import BUCKET, CREDENTIALS, Proxy, options
from tests.saving import paged, require_equal, scribble

PART = 5 << 20


@pytest.fixture
def url(s3: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in environment(s3).items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


def environment(endpoint: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": CREDENTIALS["access_key_id"],
        "AWS_SECRET_ACCESS_KEY": CREDENTIALS["secret_access_key"],
    }


@pytest.fixture
def proxy(s3: str) -> Iterator[Proxy]:
    with Proxy(s3) as found:
        yield found


def test_a_url_is_enough(url: str, capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    """For a Checkpointer, for restoring, and for each command."""
    buffers = {"grid": paged(30, 1), "table": paged(5, 2)}
    truth = []
    with Checkpointer(url, buffers) as ckpt:
        for step in range(4):
            scribble(buffers["grid"], random.Random(step), 0.2)
            truth.append({name: bytes(buffer) for name, buffer in buffers.items()})
            ckpt.save({"step": step})
        with pytest.raises(StoreBusy, match="this process writes to the store"):
            Checkpointer(url, {"other": paged(1)})
    for generation, contents in enumerate(truth, 1):
        require_equal(ObjectStore(url), contents, generation)
    again = {"grid": paged(30), "table": paged(5)}
    with Checkpointer(url, again, resume=True) as ckpt:
        assert {name: bytes(buffer) for name, buffer in again.items()} == truth[-1]
        again["table"][7] = 9
        save = ckpt.save()
        assert save.wait() and save.kind == "increment"

    def run(*words: str) -> str:
        assert main(["ckpt", words[0], url, *words[1:]]) == 0
        return capsys.readouterr().out

    assert run("ls").count("increment") == 4
    assert f"generation 5 of {url}" in run("show")
    assert "nothing is damaged" in run("verify", "--all")
    assert "table" in run("diff", "4", "5")
    run("restore", "-o", str(tmp_path / "out"))
    assert (np.load(tmp_path / "out" / "table.npy") == again["table"]).all()
    assert "revision 1" in run("compact")
    assert "4 removed: 1 2 3 4" in run("prune", "--last", "1")
    require_equal(ObjectStore(url), {name: bytes(buffer) for name, buffer in again.items()})


def test_a_save_that_fails_loses_no_page(url: str, proxy: Proxy) -> None:
    buffers = {"grid": paged(1500, 1)}  # more than one part
    store = ObjectStore(url, create=True, part_bytes=PART, **options(proxy.address))
    with Checkpointer(store, buffers, compression=None) as ckpt:
        first = ckpt.save()
        assert first.wait()
        require_equal(ObjectStore(url), {"grid": bytes(buffers["grid"])})
        scribble(buffers["grid"], random.Random(1), 0.01)
        proxy.meddle = lambda request: "cut" if request.method in ("PUT", "POST") else "pass"
        with pytest.raises(StoreFailed):
            ckpt.save().wait()
        with pytest.raises(StoreFailed):
            ckpt.save(full=True).wait()
        proxy.meddle = lambda _: "pass"
        buffers["grid"][5] += 1
        save = ckpt.save()
        assert save.wait() and save.kind == "increment"
        require_equal(ObjectStore(url), {"grid": bytes(buffers["grid"])})
    assert verify(url, all=True).ok


@pytest.mark.parametrize("staging_bytes", [20 << 20, 8 << 20], ids=["lent", "copied"])
def test_what_is_sent_from_where_it_is_staged(url: str, proxy: Proxy, staging_bytes: int) -> None:
    """Parts that are slow, out of order and sent twice have their bytes for as long as they need them."""
    draw = random.Random(3)
    kinds = ["pass"] * 6 + ["cut", "tear", "lose"]
    proxy.meddle = lambda request: draw.choice(kinds) if "partNumber" in request.query else "pass"
    proxy.rate = 150e6
    buffers = {"grid": paged(7000, 1), "table": np.frombuffer(bytearray(random.Random(4).randbytes(9001)), np.uint8)}
    store = ObjectStore(url, create=True, part_bytes=PART, parts_in_flight=3, **options(proxy.address))
    with Checkpointer(store, buffers, compression=None, staging_bytes=staging_bytes) as ckpt:
        for step in range(3):
            scribble(buffers["grid"], random.Random(step), 0.7)
            save = ckpt.save(full=step == 2)
            truth = {name: bytes(buffer) for name, buffer in buffers.items()}
            scribble(buffers["grid"], random.Random(-step), 0.9)  # what is staged is not the program's memory
            assert save.wait()
            require_equal(ObjectStore(url), truth, save.generation)
    assert verify(url, all=True).ok


# ---- killed

PROGRAM = """
import hashlib, os, random, sys
import numpy as np
from dirtytrack import allocate
from dirtytrack.checkpoint import Checkpointer, ObjectStore, Retention
url, endpoint, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
sys.path.insert(0, sys.argv[4])
from tests.buckets import options
draw = random.Random(seed)
grid = np.frombuffer(allocate(1400 * 4096), np.uint8)
store = ObjectStore(url, create=True, part_bytes=5 << 20, grace_seconds=0, **options(endpoint))

def say(word, generation):  # in one write: a kill must not find half a line
    os.write(1, f"{word} {generation} {hashlib.sha1(grid).hexdigest()}\\n".encode())

with Checkpointer(store, {"grid": grid}, resume=True, compression=None, retain=Retention(last=2), compact=0.5) as ckpt:
    say("resumed", ckpt.generation or 0)
    while True:
        for _ in range(draw.choice([1, 300])):
            grid[draw.randrange(len(grid))] = draw.randrange(256)
        say("next", 0)
        save = ckpt.save(full=draw.random() < 0.3)
        say("saving", save.generation)
        if draw.random() < 0.6:
            save.wait()
            say("committed", save.generation)
"""


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(2, 60))])
def test_it_is_killed_at_random_moments(url: str, s3: str, proxy: Proxy, seed: int) -> None:
    """What was reported committed is there, as it was, and nothing that is not whole; the next goes on at once."""
    draw = random.Random(seed)
    kinds = draw.choice([["pass"], ["pass"] * 9 + ["cut", "lose", "tear", "tear answer"]])
    proxy.meddle = lambda request: draw.choice(kinds) if request.method in ("PUT", "POST") else "pass"
    digests, committed = dict[int, str](), 0
    for _ in range(2):
        command = [sys.executable, "-c", PROGRAM, url, proxy.address, str(draw.randrange(1 << 30)), str(Path.cwd())]
        program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert program.stdout is not None and program.stderr is not None
        line = program.stdout.readline()
        assert line.startswith("resumed"), line + program.stderr.read()
        number, digest = int(line.split()[1]), line.split()[2]
        assert number >= committed and (not number or digests[number] == digest)
        time.sleep(draw.uniform(0, 0.7))
        program.send_signal(signal.SIGKILL)
        for line in program.communicate()[0].splitlines():
            word, told, digest = line.split()
            if word != "next":
                digests[int(told)] = digest
            if word == "committed":
                committed = max(committed, int(told))
        with ObjectStore(url, create=False, **options(s3)) as store:
            there = sorted({kept.generation for kept in store.catalog()})
            assert not committed or there[-1] >= committed
            for generation in there:
                found = hashlib.sha1(restore(store, generation=generation)["grid"]).hexdigest()
                # One that was not told of yet is of the moment after "next".
                assert found == digests.get(generation, found)
            assert verify(store, all=True).ok
    with ObjectStore(url, grace_seconds=0, **options(s3)) as store, store.writer():
        assert not store.strangers()

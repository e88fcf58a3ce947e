# SPDX-License-Identifier: MIT
"""Real programs: each page of them that changed was reported, and they do not notice."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dirtytrack import process
from tests.kernel import host
from tests.programs import truth
from tests.programs.heap_class import HEAP_CLASS
from tests.programs.targets import HERE, is_unharmed, python, running

INCLUDES = pytest.mark.parametrize("include", [None, "*"], ids=["anonymous", "all"])

BUSY = 30.0  # seconds: on a machine with much else to do, the threads of a large program wait for its disk


@pytest.fixture(params=[1, pytest.param(10, marks=pytest.mark.soak)], ids=["once", "ten times"])
def times(request: pytest.FixtureRequest) -> int:
    """How often all of it is done."""
    return int(request.param)


def needs(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed: make programs installs it, as root on Debian")
    return path


# ---- redis


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[tuple[int, list[str]]]:
    socket = tmp_path / "redis"
    server = subprocess.Popen(
        [needs("redis-server"), "--save", "", "--port", "0", "--unixsocket", socket, "--dir", tmp_path],
        stdout=subprocess.DEVNULL,
    )
    client = [needs("redis-cli"), "-s", str(socket)]
    try:
        while subprocess.run([*client, "ping"], capture_output=True, check=False).stdout != b"PONG\n":
            time.sleep(0.02)
        yield server.pid, client
    finally:
        server.terminate()
        assert server.wait(30) == 0


@INCLUDES
def test_redis_under_its_benchmark(redis: tuple[int, list[str]], include: str | None, times: int) -> None:
    pid, client = redis

    def ask(*words: str, lines: str = "") -> str:
        done = subprocess.run([*client, *words], input=lines, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    keep = "".join(f"set kept:{i} {i * i}\n" for i in range(500))
    assert ask(lines=keep).count("OK") == 500
    bench = [needs("redis-benchmark"), "-s", client[2], "-q", "-t", "set,lpush,hset,incr", "-r", "20000", "-d", "300"]
    load = subprocess.Popen([*bench, "-n", "100000000", "-c", "8"], stdout=subprocess.DEVNULL)
    try:
        time.sleep(0.3)
        with process.attach(pid, include=include, timeout=BUSY) as tracker:
            assert truth.rounds(tracker, 2 * times, 0.1) > 100
    finally:
        load.kill()
        load.wait()
    assert ask("ping") == "PONG"
    numbers = ask(lines="".join(f"get kept:{i}\n" for i in range(500))).split()
    assert [int(number) for number in numbers] == [i * i for i in range(500)]


# ---- programs that check themselves

NODE = """
const crypto = require("crypto"), kept = new Map(), big = Buffer.alloc(1 << 20);
let rounds = 0, wrong = 0;
function work() {
    for (let i = 0; i < 200; i++) {
        const key = rounds++ % 500, old = kept.get(key);
        if (old && crypto.createHash("md5").update(old.text).digest("hex") !== old.sum) wrong++;
        const text = "x".repeat(key) + Math.random();
        kept.set(key, {text, sum: crypto.createHash("md5").update(text).digest("hex")});
        big[(rounds * 7919) % big.length] += 1;
    }
    setImmediate(work);
}
work();
console.log("up");
process.stdin.on("data", () => console.log(wrong ? "wrong" : "well"));
process.stdin.on("end", () => process.exit(0));
"""

SQLITE = """
import random, sqlite3, sys, threading
db = sqlite3.connect(":memory:", check_same_thread=False)
db.execute("create table t (k integer primary key, v text, n integer)")
db.executemany("insert into t values (?, ?, 0)", ((i, "v%d" % i) for i in range(3000)))
lock, done = threading.Lock(), 0
def work():
    global done
    while True:
        with lock, db:
            for _ in range(20):
                k = random.randrange(3000)
                db.execute("update t set n = n + 1, v = ? where k = ?", ("v%d" % k + "x" * random.randrange(300), k))
                done += 1
threading.Thread(target=work, daemon=True).start()
print("up")
for line in sys.stdin:
    with lock:
        (total,) = db.execute("select sum(n) from t").fetchone()
        (check,) = db.execute("pragma integrity_check").fetchone()
        print("well" if total == done and check == "ok" else "wrong")
"""

FORKING = """
import os, sys, threading, time
data, made = bytearray(4 << 20), 0
def work():
    global made
    while True:
        data[made * 4096 % len(data)] = made % 256
        child = os.fork()
        if not child:
            for at in range(0, len(data), 4096): data[at] = 1
            os._exit(7)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 7: os._exit(9)
        made += 1
threading.Thread(target=work, daemon=True).start()
print("up")
for line in sys.stdin:
    then, end = made, time.monotonic() + 20
    while made < then + 3 and time.monotonic() < end: time.sleep(0.001)
    print("well" if made >= then + 3 else "wrong")
"""

HUGE = """
import mmap, random, sys, threading
small = mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
small.madvise(mmap.MADV_HUGEPAGE)
memory = [small]
memory.append(mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000))
for m in memory: m[:: 4096] = bytes(len(m) // 4096)
counts, wrong = {}, 0
def work():
    global wrong
    while True:
        m = random.randrange(len(memory)); at = random.randrange(len(memory[m]) // 4096) * 4096
        if memory[m][at] != counts.get((m, at), 0): wrong += 1
        counts[m, at] = memory[m][at] = random.randrange(256)
threading.Thread(target=work, daemon=True).start()
print("up")
for line in sys.stdin: print("wrong" if wrong else "well")
"""


def test_a_java_virtual_machine(tmp_path: Path, times: int) -> None:
    java = needs("java")
    (tmp_path / "Heap.class").write_bytes(HEAP_CLASS)
    with running(java, "-Xmx64m", "-XX:-UsePerfData", "-cp", tmp_path, "Heap") as program:
        with process.attach(program.pid, include="*", timeout=BUSY) as tracker:
            assert truth.rounds(tracker, 2 * times, 0.1) > 100
            assert program.ask() == "well"
        is_unharmed(program)


@INCLUDES
def test_node(tmp_path: Path, include: str | None, times: int) -> None:
    node = needs("node")
    with running(node, "-e", NODE) as program:
        with process.attach(program.pid, include=include, timeout=BUSY) as tracker:
            assert truth.rounds(tracker, 2 * times, 0.1) > 100
            assert program.ask() == "well"
        is_unharmed(program)


def test_sqlite_on_a_memory_database(times: int) -> None:
    with running(*python(SQLITE)) as program:
        with process.attach(program.pid, include="*", timeout=BUSY) as tracker:
            assert truth.rounds(tracker, 3 * times, 0.1) > 100
            assert program.ask() == "well"
        is_unharmed(program)


def test_a_program_that_forks(times: int) -> None:
    with running(*python(FORKING)) as program:
        with process.attach(program.pid, include="*", timeout=BUSY) as tracker:
            assert truth.rounds(tracker, 3 * times, 0.1) > 3
            assert program.ask() == "well"
        is_unharmed(program)


def test_a_program_that_maps_and_unmaps_all_the_time(times: int) -> None:
    with running("mapper") as program:
        with process.attach(program.pid, timeout=BUSY) as tracker:
            for _ in range(50):
                tracker.collect()
            assert truth.rounds(tracker, 5 * times, 0.03) > 50
            assert tracker.statistics().refreshes > 5
            assert program.ask() == "well"
        is_unharmed(program)


def test_a_program_with_huge_pages(times: int) -> None:
    pool = host.Pool(host.HUGE_PAGE)
    with host.machine_lock():
        try:
            pool.ensure(6)
            with running(*python(HUGE)) as program:
                with process.attach(program.pid, include="*", timeout=BUSY) as tracker:
                    assert truth.rounds(tracker, 3 * times, 0.1) > 100
                    assert program.ask() == "well"
                is_unharmed(program)
        finally:
            pool.put_back()


def test_a_program_with_thousands_of_threads(times: int) -> None:
    with running("threads", 2000) as program:
        with process.attach(program.pid, timeout=BUSY) as tracker:
            assert truth.rounds(tracker, 2 * times, 0.05) > 100
            assert program.ask() == "well"
        is_unharmed(program)


def test_the_sources_are_here() -> None:
    assert (HERE / "Heap.java").exists()

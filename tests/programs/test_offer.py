# SPDX-License-Identifier: MIT
"""Processes that offer their memory themselves; and several that write one shared memory."""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Iterator
from multiprocessing import shared_memory

import pytest

from dirtytrack import process
from dirtytrack.errors import InvalidMemory, PermissionDenied, RegionGone
from tests.programs.targets import Program, descriptors, is_unharmed, python, running
from tests.sandbox import NOBODY, ROOT, run_in_child

WORKER = f"""
import socket, sys
sys.path.insert(0, {str(ROOT)!r})
from multiprocessing import shared_memory, resource_tracker
from dirtytrack import process
shared = shared_memory.SharedMemory(name="NAME")
resource_tracker.unregister(shared._name, "shared_memory")
channel = socket.socket(fileno=FD)
import mmap
own = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
own[:] = b"x" * len(own)
print("up")
for line in sys.stdin:
    words = line.split()
    if words and words[0] == "offer": process.offer(channel)
    elif words and words[0] == "shared": shared.buf[int(words[1]) * 4096] = 7
    elif words and words[0] == "drop": del own
    elif words and words[0] == "own": own[int(words[1]) * 4096] = 7
    print("well")
sys.stdout.flush()
import os
os._exit(0)
"""
PAGES = 64


@pytest.fixture
def shared() -> Iterator[shared_memory.SharedMemory]:
    memory = shared_memory.SharedMemory(create=True, size=PAGES * 4096)
    yield memory
    memory.close()
    memory.unlink()


class Worker:
    def __init__(self, shared: shared_memory.SharedMemory) -> None:
        self.channel, theirs = socket.socketpair()
        code = WORKER.replace("NAME", shared.name).replace("FD", str(theirs.fileno()))
        self.context = running(*python(code), pass_fds=[theirs.fileno()])
        self.program: Program = self.context.__enter__()
        theirs.close()
        self.before = descriptors(self.program)

    def accept(self, **options: object) -> process.ProcessTracker:
        assert self.program.ask("offer") == "well"
        return process.accept(self.channel, **options)  # type: ignore[arg-type]

    def close(self) -> None:
        if self.program.process.returncode is not None:  # it was killed
            self.program.process.communicate()
            self.channel.close()
            return
        self.context.__exit__(None, None, None)
        self.channel.close()


@pytest.fixture
def workers(shared: shared_memory.SharedMemory) -> Iterator[list[Worker]]:
    made = [Worker(shared) for _ in range(3)]
    yield made
    for worker in made:
        worker.close()


def test_an_offer(workers: list[Worker]) -> None:
    worker = workers[0]
    with worker.accept() as tracker:
        assert tracker.pid == worker.program.pid
        assert tracker.attach_stall == 0
        tracker.collect()
        worker.program.ask("own 100")
        dirty = tracker.collect()
        assert dirty
        assert b"\x07" in bytes(tracker.read(dirty))
        with tracker.frozen():
            tracker.collect()
    is_unharmed(worker.program, fds=worker.before)


def test_workers_that_write_one_memory(workers: list[Worker], shared: shared_memory.SharedMemory) -> None:
    name = f"/dev/shm/{shared.name}"
    trackers = [worker.accept(include=name) for worker in workers]
    united = process.Workers(trackers, name)
    united.collect()
    for i, worker in enumerate(workers):
        worker.program.ask(f"shared {10 * i}")
    assert [run.start // 4096 for run in united.collect()] == [0, 10, 20]
    assert not united.collect()
    workers[1].program.ask("shared 63")
    assert [(run.start // 4096, run.nbytes) for run in united.collect()] == [(63, 4096)]

    workers[2].program.process.kill()  # nobody knows what it wrote last
    workers[2].program.process.wait()
    assert united.collect().page_count == PAGES
    assert len(united.trackers) == 2
    workers[0].program.ask("shared 5")
    assert [run.start // 4096 for run in united.collect()] == [5]
    for tracker in trackers:
        tracker.detach()


def test_workers_that_are_none(workers: list[Worker], shared: shared_memory.SharedMemory) -> None:
    with workers[0].accept() as tracker:
        with pytest.raises(InvalidMemory, match="include="):
            process.Workers([tracker], f"/dev/shm/{shared.name}")
        with pytest.raises(InvalidMemory, match="no tracker"):
            process.Workers([], "x")


def test_a_page_that_is_gone(workers: list[Worker]) -> None:
    with workers[0].accept() as tracker:
        workers[0].program.ask("own 3")
        nowhere = pickle.loads(pickle.dumps(tracker.collect()))
        workers[0].program.ask("drop")
        with pytest.raises(RegionGone):
            tracker.read(nowhere)


def test_what_is_no_offer() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"hello, this is no offer")
        with pytest.raises(InvalidMemory, match="no offer"):
            process.accept(ours)
        theirs.close()
        with pytest.raises(InvalidMemory, match="no offer"):
            process.accept(ours)
    with socket.socket(socket.AF_INET) as internet, pytest.raises(InvalidMemory, match="UNIX"):
        process.offer(internet)


def offer_to_another() -> None:
    ours, theirs = socket.socketpair()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("")  # the kernel chooses a name
        listening.listen()
        child = os.fork()
        if not child:
            os.setresuid(NOBODY, NOBODY, NOBODY)
            mine = socket.socket(socket.AF_UNIX)
            mine.connect(listening.getsockname())
            theirs.recv(1)
            os._exit(0)
        connection, _ = listening.accept()
        try:
            process.offer(connection)
        except PermissionDenied as error:
            print("denied", error)
        process.offer(connection, trust=NOBODY)
        ours.send(b"x")
        connection.close()
    os.waitpid(child, 0)


def test_an_offer_to_another_user() -> None:
    if os.geteuid() != 0:
        return
    told = run_in_child(offer_to_another)
    assert f"denied the peer of this socket is user {NOBODY}" in told
    assert f"trust={NOBODY}" in told

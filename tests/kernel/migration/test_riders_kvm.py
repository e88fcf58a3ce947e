# SPDX-License-Identifier: MIT
"""The virtual machine of examples/kvm_guest: that it moves, and that its checks can fail.

What is run as its page says (256 MiB, at a rate) is run by tests/unit/test_docs.py. Takes about 9 s of CI's 20 min.
"""

from __future__ import annotations

import json
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import dirtytrack
from dirtytrack.errors import MigrationFailed, PeerLost
from dirtytrack.migration import Arrival, Destination, Goal, Migrated, Progress, Source
from examples.kvm_guest import __main__ as example
from examples.kvm_guest import guest
from examples.kvm_guest.kvm import PAGE, NoKvm
from examples.kvm_guest.vmm import GuestLost, Vmm
from examples.kvm_guest.witness import Disagreement, WitnessedTracker
from tests.kernel.host import NotHere

ROOT = Path(__file__).parents[3]
MIB = 1 << 20


@contextmanager
def machine(nbytes: int) -> Iterator[Vmm]:
    try:
        made = Vmm(dirtytrack.allocate(nbytes, name="ram"))
    except NoKvm as why:
        raise NotHere(str(why)) from why
    with made:
        yield made


@pytest.fixture
def vmm() -> Iterator[Vmm]:
    with machine(32 * MIB) as made:
        yield made


@pytest.fixture
def tracker(vmm: Vmm) -> Iterator[WitnessedTracker]:
    with dirtytrack.UffdSession() as session:
        session.register(vmm.machine.ram, name="ram")
        yield WitnessedTracker(session, vmm.machine)


def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.005)


class Host(threading.Thread):
    """A destination in this process."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.receiving = example.Receiving()
        self.listening = Destination(memory=self.receiving.memory, prepare=self.receiving.prepare)
        self.arrival: Arrival | None = None
        self.start()

    def run(self) -> None:
        with suppress(MigrationFailed):
            self.arrival = self.listening.receive(timeout=60)

    def arrived(self) -> Vmm:
        self.join(20)
        assert self.arrival is not None
        assert isinstance(self.arrival.prepared, Vmm)
        return self.arrival.prepared

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *error: object) -> None:
        self.listening.close()
        self.receiving.abandon()


def move(vmm: Vmm, tracker: WitnessedTracker, to: str, goal: Goal, **options: float) -> tuple[Migrated, list[Progress]]:
    told: list[Progress] = []
    hooks = {"pause": vmm.pause, "resume": vmm.resume, "state": vmm.state, "slow": vmm.slow}
    with Source(tracker, progress=told.append, **hooks, **options) as source:  # type: ignore[arg-type]
        return source.migrate(to, goal), told


def numbers(ram: dirtytrack.Memory) -> set[int]:
    """All that stand in the memory, where each page keeps those of its walks."""
    found = set[int]()
    for at in range(guest.DATA, ram.nbytes, PAGE):
        found.update(struct.unpack_from("<256Q", ram, at))
    return found - {0}


# ---- the example, as it is run


def test_the_example_moves_a_guest_that_runs_as_fast_as_it_can() -> None:
    options = ["--rate", "0", "--on-divergence", "slow", "--seconds", "0.2", "--mib", "64", "--downtime", "0.05"]
    command = [sys.executable, "-W", "error", "-m", "examples.kvm_guest", *options]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=100)
    if done.returncode == example.NOT_HERE:
        raise NotHere(done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith("and 67,108,864 bytes of memory are identical")
    assert (found := re.search(r"KVM logged ([\d,]+) pages before (\d+) collects", done.stdout))
    assert int(found[1].replace(",", "")) > 1000
    assert int(found[2]) >= 2


def test_snapshots_of_a_guest_that_runs_bring_it_back() -> None:
    options = ["--mib", "32", "--snapshots", "3", "--seconds", "0.15", "--rate", "8000"]
    command = [sys.executable, "-W", "error", "-m", "examples.kvm_guest.snapshots", *options]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=100)
    if done.returncode == example.NOT_HERE:
        raise NotHere(done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "3 snapshots, each of which is identical to what it is of, and runs on"
    kinds = [line.split()[0] for line in done.stdout.splitlines()[:-1]]
    assert kinds[0] == "full"
    assert set(kinds[1:]) <= {"increment", "full"}  # what is cheaper: on a machine with other work that may be either


def test_the_program_is_what_its_assembly_says(tmp_path: Path) -> None:
    source, out = tmp_path / "guest.s", tmp_path / "guest.o"
    source.write_text(".intel_syntax noprefix\n" + guest.ASSEMBLY)
    subprocess.run(["gcc", "-c", source, "-o", out], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", out], check=True)
    assert out.read_bytes() == guest.PROGRAM


def test_the_guest_is_moved_by_the_commands(vmm: Vmm, tmp_path: Path) -> None:
    commands = [sys.executable, "-m", "dirtytrack"]
    receive = [*commands, "receive", "examples.kvm_guest.commands:prepare", "--journal", str(tmp_path / "r")]
    migrate = [*commands, "migrate", "examples.kvm_guest.commands:start"]
    with subprocess.Popen(receive, cwd=ROOT, stdout=subprocess.PIPE, text=True) as receiving:
        try:
            assert receiving.stdout is not None
            where = [receiving.stdout.readline().split()[-1], "--journal", str(tmp_path / "m")]
            done = subprocess.run([*migrate, *where], check=False, cwd=ROOT, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stdout + done.stderr
            told = [receiving.stdout.readline() for _ in range(3)]
            receiving.send_signal(signal.SIGINT)
            assert receiving.wait(10) == 0
        finally:
            receiving.kill()
    went_on, at = (int(line.split()[-1].replace(",", "")) for line in told[1:])
    assert told[0] == "runs here\n"
    assert at > went_on


# ---- its parts


def test_many_rounds_and_each_agrees_with_kvm(vmm: Vmm, tracker: WitnessedTracker) -> None:
    vmm.boot(numbers_per_second=6000, burst=50)
    vmm.resume()
    with Host() as host:
        goal = Goal(max_downtime=0.012)
        moved, _ = move(vmm, tracker, host.listening.address, goal, bandwidth=60e6)
        collects, logged = tracker.check()
        assert collects == len(moved.rounds) >= 4
        assert logged > 1000
        there = host.arrived()
        here = guest.written(guest.State.unpack(vmm.state()))
        assert memoryview(there.machine.ram) == memoryview(vmm.machine.ram)
        there.resume()
        until(lambda: there.told > here + 10_000)
        there.pause()
        end = guest.written(guest.State.unpack(there.state()))
        guest.replay(vmm.machine.ram, here, end)
        assert memoryview(there.machine.ram) == memoryview(vmm.machine.ram)
        assert numbers(there.machine.ram) == set(range(1, end + 1)), "of both hosts, without a gap"


def test_a_guest_that_is_faster_than_the_link_is_slowed() -> None:
    with machine(4 * MIB) as vmm, dirtytrack.UffdSession() as session, Host() as host:
        session.register(vmm.machine.ram, name="ram")
        tracker = WitnessedTracker(session, vmm.machine)
        vmm.boot(numbers_per_second=10_000, burst=50)  # 40 MB of pages a second
        vmm.resume()
        goal = Goal(max_downtime=0.03, on_divergence="slow")
        _, told = move(vmm, tracker, host.listening.address, goal, bandwidth=20e6)
        tracker.check()
        assert any("is slowed by" in each.reason for each in told)
        there = host.arrived()
        there.resume()
        until(lambda: there.told > vmm.told + 1000)


def test_a_guest_whose_destination_dies_runs_on_and_moves_again(vmm: Vmm, tracker: WitnessedTracker) -> None:
    vmm.boot(numbers_per_second=6000, burst=50)
    vmm.resume()
    command = [sys.executable, "-m", "examples.kvm_guest", "receive"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as victim:
        assert victim.stdout is not None
        address = json.loads(victim.stdout.readline())["address"]
        threading.Timer(0.2, victim.kill).start()
        with pytest.raises(PeerLost) as lost:
            move(vmm, tracker, address, Goal(max_downtime=0.001), bandwidth=30e6)
    assert lost.value.running == "source"
    before = vmm.told
    until(lambda: vmm.told > before + 500)
    with Host() as host:
        move(vmm, tracker, host.listening.address, Goal(max_downtime=0.1))
        tracker.check()
        there = host.arrived()
        assert memoryview(there.machine.ram) == memoryview(vmm.machine.ram)
        there.resume()
        until(lambda: there.told > vmm.told + 1000)


# ---- that what checks can fail


def test_the_guest_says_when_a_page_is_lost() -> None:
    with machine(4 * MIB) as vmm:
        vmm.boot(burst=10)
        vmm.resume()
        until(lambda: vmm.told > 2000)
        vmm.pause()
        at = guest.DATA + 7 * PAGE
        vmm.machine.ram[at : at + guest.HALF] = bytes(guest.HALF)
        vmm.resume()
        with pytest.raises(GuestLost, match="was not what the guest had written"):
            while True:
                vmm.pause()
                vmm.resume()
                time.sleep(0.01)


def test_the_witness_says_when_a_page_is_missing(vmm: Vmm, tracker: WitnessedTracker) -> None:
    vmm.boot(numbers_per_second=6000, burst=50)
    tracker.start()
    vmm.resume()
    until(lambda: vmm.told >= 300)
    vmm.pause()
    tracker.collect()
    start, only = tracker.rounds
    assert only.before.bit_count() >= 300
    assert only.ours == only.before
    tracker.check()
    one = only.ours & -only.ours
    tracker.rounds[1] = only._replace(ours=only.ours ^ one)
    with pytest.raises(Disagreement, match="misses page"):
        tracker.check()
    tracker.rounds[1] = only._replace(ours=only.ours | 1 << 8000)
    assert not start.behind >> 8000 & 1
    with pytest.raises(Disagreement, match="KVM saw no write to page 8000"):
        tracker.check()


def test_what_is_no_state_is_refused(vmm: Vmm) -> None:
    vmm.boot()
    for blob in (b"", vmm.state()[:-1], b"x" + vmm.state()[1:]):
        with pytest.raises(ValueError, match="no state of a guest"):
            vmm.load(blob)

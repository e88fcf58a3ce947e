# SPDX-License-Identifier: MIT
"""Images of processes that do not stand still for us, and whoever saves or is saved is killed meanwhile."""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dirtytrack.checkpoint import generations, verify
from dirtytrack.checkpoint.images import ProcessCheckpointer
from dirtytrack.errors import TargetGone
from tests.programs.imaged import Imaged, Witness
from tests.programs.targets import Program, built, is_unharmed, protected, running, tracers
from tests.sandbox import libc

_SEIZE, _INTERRUPT, _GETREGSET, _GETSIGMASK, _DETACH, _WALL = 0x4206, 0x4207, 0x4204, 0x420A, 17, 0x40000000


@contextmanager
def redis(folder: Path) -> Iterator[tuple[int, int]]:
    """(pid, port) of one under load."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["redis-server", "--port", str(port), "--save", "", "--appendonly", "no", "--dir", str(folder)]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    load = None
    try:
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.02)
        words = ["redis-benchmark", "-p", str(port), "-t", "set,lpush,hset", "-n", "100000000", "-r", "20000"]
        load = subprocess.Popen([*words, "-d", "400", "-c", "8", "-q"], stdout=subprocess.DEVNULL)
        time.sleep(0.5)
        yield server.pid, port
        assert load.poll() is None
        assert server.poll() is None
    finally:
        for process in (load, server):
            if process is not None:
                process.terminate()
                process.wait()


def test_redis_under_load(tmp_path: Path) -> None:
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed: make programs")
    store = tmp_path / "store"
    with redis(tmp_path) as (pid, _), ProcessCheckpointer(store, pid, precopy_bytes=4 << 20) as ckpt:
        witness, compared = Witness(ckpt._watched.tracker), 0
        for _ in range(4):
            image = ckpt.save()
            compared += witness.agrees_with(Imaged(store, image.generation))
            time.sleep(0.1)
        assert compared > 5000
        assert image.kind == "increment"
    assert verify(store, all=True).ok


@pytest.mark.parametrize("name", ["mapper", "consistent"])
def test_a_program_that_never_waits(name: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with running(name, 2) as program:
        with ProcessCheckpointer(store, program.pid, precopy_bytes=256 << 10, compact=0.5) as ckpt:
            witness = Witness(ckpt._watched.tracker)
            for _ in range(6):
                image = ckpt.save()
                assert witness.agrees_with(Imaged(store, image.generation))
        if name == "consistent":
            program.answer()
        is_unharmed(program)


# ---- registers


def by_ptrace(tid: int) -> tuple[dict[str, bytes], int]:
    """The register sets of a thread, and its signal mask, without any of ours."""
    ptrace = libc.ptrace
    ptrace.restype = ctypes.c_long
    ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    assert ptrace(_SEIZE, tid, None, None) == 0
    try:
        assert ptrace(_INTERRUPT, tid, None, None) == 0
        os.waitpid(tid, _WALL)
        found = {}
        for name, number in (("prstatus", 1), ("fpregset", 2), ("xstate", 0x202)):
            room = ctypes.create_string_buffer(64 << 10)
            vector = (ctypes.c_size_t * 2)(ctypes.addressof(room), len(room))
            if ptrace(_GETREGSET, tid, number, vector) == 0:
                found[name] = room.raw[: vector[1]]
        mask = ctypes.c_uint64()
        assert ptrace(_GETSIGMASK, tid, 8, ctypes.byref(mask)) == 0
        return found, mask.value
    finally:
        ptrace(_DETACH, tid, None, None)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the program fills the registers of x86-64")
def test_registers_of_all_threads(tmp_path: Path) -> None:
    with running("registers", 3) as program:
        with ProcessCheckpointer(tmp_path / "store", program.pid) as ckpt:
            assert ckpt.save().threads == 4
        image = Imaged(tmp_path / "store")
        threads = image.program["threads"]
        assert threads[0]["tid"] == image.program["pid"] == program.pid
        assert [each["name"] for each in threads] == ["registers", "full 1", "full 2", "full 3"]
        for i, thread in enumerate(threads):
            sets = {name: bytes.fromhex(data) for name, data in thread["registers"].items()}
            true, mask = by_ptrace(thread["tid"])
            assert sets == true
            assert bytes.fromhex(thread["signal_mask"]) == mask.to_bytes(8, "little")
            if i:
                r15, r14, r13, r12, _, rbx = struct.unpack_from("<6Q", sets["prstatus"])
                assert [rbx, r12, r13, r14, r15] == [0x1000 * i + n for n in range(5)]
                xmm1, xmm9 = (struct.unpack_from("<Q", sets["fpregset"], 160 + 16 * n)[0] for n in (1, 9))
                assert (xmm1, xmm9) == (0x1000 * i + 1, 0x1000 * i + 4)
                assert mask == 1 << signal.SIGUSR1 - 1
        program_of = image.program
        assert program_of["executable"] == str(built("registers"))
        assert program_of["arguments"] == [str(built("registers")), "3"]
        assert program_of["comm"] == "registers"
        assert program_of["machine"] == "x86_64"
        assert bytes.fromhex(program_of["auxv"]) == Path(f"/proc/{program.pid}/auxv").read_bytes()
        assert 0 <= time.time() - program_of["frozen_at"] < 60
        is_unharmed(program)


# ---- killed


def command(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dirtytrack", "ckpt", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("moments", [3, pytest.param(150, marks=pytest.mark.soak)])
def test_who_saves_is_killed_at_any_moment(moments: int, tmp_path: Path) -> None:
    chance, store = random.Random(5), tmp_path / "store"
    with running("consistent", 2) as program:
        program.answer()
        for _ in range(moments):
            saver = command("save", program.pid, store, "--every", "10ms", "--json")
            assert saver.stdout is not None
            assert json.loads(saver.stdout.readline())["kind"] == "full"
            time.sleep(chance.random() * 0.2)
            saver.kill()
            saver.communicate()
            is_settled(program)
        with ProcessCheckpointer(store, program.pid) as ckpt:
            ckpt.save()
        is_settled(program)
    report = verify(store, all=True)
    assert report.ok
    assert not report.strangers
    assert len(report.checked) > moments


def is_settled(program: Program) -> None:
    """A guardian whose tracker was killed lets go a moment later; one that was not begun yet closes what it has."""
    until = time.monotonic() + 20
    while tracers(program.pid) != {"0"} or protected(program.pid):
        assert time.monotonic() < until
        time.sleep(0.01)
    is_unharmed(program)


@pytest.mark.parametrize("moments", [4, pytest.param(200, marks=pytest.mark.soak)])
def test_the_process_is_killed_at_any_moment(moments: int, tmp_path: Path) -> None:
    chance, store = random.Random(6), tmp_path / "store"
    for _ in range(moments):
        program = Program([built("consistent"), 2])
        ckpt = ProcessCheckpointer(store, program.pid, precopy_bytes=64 << 10)
        ckpt.save()
        timer = threading.Timer(chance.random() * 0.15, program.process.kill)
        timer.start()
        with pytest.raises(TargetGone, match=str(program.pid)):
            while True:
                ckpt.save()
        with pytest.raises(TargetGone):
            ckpt.save()
        ckpt.close()
        timer.join()
        program.process.communicate()
    report = verify(store, all=True)
    assert report.ok
    assert not report.strangers
    assert report.checked


# ---- the command


def test_the_command(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with running("target", 1) as program:
        once = command("save", program.pid, store)
        told, said = once.communicate(timeout=30)
        assert once.returncode == 0, said
        assert told.startswith("generation 1: full, frozen ")
        shown, _ = command("show", store).communicate(timeout=30)
        assert f"image of process {program.pid} (target): " in shown
        again = command("save", program.pid, store, "--every", "20ms", "--count", 3, "--json", "--last", 2)
        told, said = again.communicate(timeout=30)
        assert again.returncode == 0, said
        assert [json.loads(line)["kind"] for line in told.splitlines()] == ["full", "increment", "increment"]
        assert [each.generation for each in generations(store)] == [3, 4]
        for number in (signal.SIGINT, signal.SIGTERM):
            until = command("save", program.pid, store, "--every", "10ms")
            assert until.stdout is not None
            assert until.stdout.readline()
            until.send_signal(number)
            _, said = until.communicate(timeout=30)
            assert until.returncode == 0, said
            assert "generations were saved, the last is" in said
        is_unharmed(program)
    assert verify(store, all=True).ok


def test_the_command_outlives_its_process(tmp_path: Path) -> None:
    with running("target", 1) as program:
        saver = command("save", program.pid, tmp_path / "store", "--every", "10ms")
        assert saver.stdout is not None
        assert saver.stdout.readline()
    _, said = saver.communicate(timeout=30)
    assert saver.returncode == 0
    assert f"process {program.pid} ended" in said


def test_what_the_command_refuses(tmp_path: Path) -> None:
    store = tmp_path / "store"
    for words, status, why in (
        (("save", 1 << 30, store), 1, "there is no process"),
        (("save", "nobody", store), 2, "is not the number of a process"),
        (("save", os.getpid(), tmp_path / "file"), 1, "is no directory"),
        (("save", os.getpid(), store, "--exclude", "0x20-0x10"), 2, "nothing between"),
        (("save", os.getpid(), store, "--count", "0"), 2, "not a number from 1 on"),
    ):
        (tmp_path / "file").touch()
        refused = command(*words)
        _, said = refused.communicate(timeout=30)
        assert refused.returncode == status, said
        assert why in said
        assert "Traceback" not in said

# SPDX-License-Identifier: MIT
"""`dirtytrack demo` and its parts: the index tells the truth, the rivals do their work, the ways to end."""

from __future__ import annotations

import argparse
import json
import mmap
import os
import signal
import subprocess
import sys
import textwrap
import time
from array import array
from pathlib import Path

import pytest

from dirtytrack import KernelSupport, PermissionDenied
from dirtytrack.cli import demo, demo_parse, demo_replay
from dirtytrack.cli.demo_index import Index, IndexFull, WriteLog
from dirtytrack.cli.strip import Screen, heat
from dirtytrack.kernel.baseline import ProtectedPages, compare_into, replay
from dirtytrack.kernel.support import Check

PAGE = mmap.PAGESIZE
FILES = 60


@pytest.fixture
def few_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    root, paths = demo_parse.source_files()
    monkeypatch.setattr(demo, "source_files", lambda: (root, paths[:FILES]))
    monkeypatch.setattr(demo_replay, "ROUNDS", 1)
    return paths[:FILES]


def run(*options: str) -> int:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return demo.run(parser.parse_args(options))


def test_json_is_one_document_with_every_epoch(few_files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--json", "--epochs", "20") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["memory_bytes"] == 256 << 20
    assert document["mirror_verified"] is True
    assert document["index"]["files"] == FILES
    assert [epoch["epoch"] for epoch in document["epochs"]] == list(range(1, 21))
    assert all(epoch["dirty_bytes"] == epoch["dirty_pages"] * PAGE > 0 for epoch in document["epochs"])
    assert all(any(epoch["heat"]) for epoch in document["epochs"])
    costs = {cost["method"]: cost for cost in document["comparison"]["methods"]}
    assert len(costs) == 5
    # A hash finds changes of content only; the other two find every page that was stored to. What dirtytrack has beyond
    # these it assumed.
    assert costs["copy everything"]["pages_copied"] == 20 * (256 << 20) // PAGE
    assert costs["mprotect + SIGSEGV"]["pages_copied"] <= costs["dirtytrack"]["pages_copied"]
    assert document["statistics"]["pages_assumed"] <= sum(epoch["dirty_pages"] for epoch in document["epochs"])
    assert costs["hash every page (zlib.crc32)"]["pages_copied"] <= costs["dirtytrack"]["pages_copied"]


def test_text_has_a_strip_an_epoch_and_no_colour(few_files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--epochs", "3") == 0
    out, err = capsys.readouterr()
    assert sum(line.endswith("|") for line in out.splitlines()) == 1 + 3
    assert "The mirror equals the memory: 268,435,456 bytes" in out
    assert "\x1b" not in out
    assert err == ""


def test_mirror_that_differs_fails_the_demo(
    few_files: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verify = demo._verify

    def spoil(memory: memoryview, mirror: mmap.mmap) -> None:
        mirror[200 << 20] ^= 1
        verify(memory, mirror)

    monkeypatch.setattr(demo, "_verify", spoil)
    assert run("--epochs", "1") == 1
    assert "differs from the memory within 1048576 bytes from offset 209715200" in capsys.readouterr().err


def test_without_tracking_it_says_what_the_doctor_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def forbidden(memory: object) -> None:
        raise PermissionDenied("userfaultfd is forbidden here")

    found = Check("userfaultfd", False, "EPERM: Operation not permitted", "allow it")
    monkeypatch.setattr(demo, "track", forbidden)
    monkeypatch.setattr(KernelSupport, "checks", lambda _: [found])
    assert run() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "userfaultfd is forbidden here" in err
    assert "doctor: userfaultfd: EPERM" in err
    assert "allow it" in err


@pytest.mark.parametrize("options", [("--size", "255"), ("--epochs", "0"), ("--epochs", "x")])
def test_arguments_are_checked(options: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(*options)
    assert "at least" in capsys.readouterr().err


def test_ctrl_c_leaves_no_process_behind() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "dirtytrack", "demo"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        for _ in range(4):  # into the work, workers running
            process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
        _, errors = process.communicate(timeout=20)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert errors == "interrupted\n"
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:  # the session's last members (multiprocessing's own helper) end by themselves
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("processes of the demo are still there")


# ---- the index ----


def small_index() -> tuple[Index, list[demo_parse.Document]]:
    root, paths = demo_parse.source_files()
    documents = [demo_parse.parse(root, path) for path in paths[:FILES]]
    index = Index(bytearray(64 << 20))
    for document in documents:
        index.add(document)
    return index, documents


def test_index_knows_every_line_of_every_term() -> None:
    index, documents = small_index()
    truth: dict[str, dict[str, set[int]]] = {}
    for document in documents:
        for term, lines in document.terms.items():
            truth.setdefault(term.decode(), {})[document.path] = set(memoryview(lines).cast("I"))
    assert index.terms == len(truth) > 1000
    for word, places in truth.items():
        assert {index.path(place): lines for place, lines in index.places(word)} == places
    assert index.find("no such term") == (0, 0, 0)
    both = {index.path(place): lines for place, lines in index.together("def", "self").items()}
    assert both == {
        path: lines & truth["self"][path]
        for path, lines in truth["def"].items()
        if lines & truth["self"].get(path, set())
    }


def test_lines_are_the_files_lines() -> None:
    index, documents = small_index()
    of_path = {document.path: document.text.split(b"\n") for document in documents}
    for place, lines in index.places("import"):
        for number in lines:
            assert index.line(place, number).encode() == of_path[index.path(place)][number - 1].strip()
            assert b"import" in of_path[index.path(place)][number - 1]


def test_stores_that_are_replayed_make_the_same_index() -> None:
    index, _ = small_index()
    log = index.start_log()
    again = bytearray(64 << 20)
    replay(again, log.spans, log.data)
    other = Index(again)
    assert (other.files, other.terms, other.postings) == (index.files, index.terms, index.postings)
    assert list(other.places("self")) == list(index.places("self"))


def test_full_index_says_so() -> None:
    index = Index(bytearray(1 << 20))
    with pytest.raises(IndexFull, match="no room"):
        index.add(demo_parse.Document("a.py", bytes(1 << 20), {}, valid=True))


def test_what_does_not_tokenise_is_parsed_up_to_there(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("first = 'two words'\n  = (\n")
    document = demo_parse.parse(str(tmp_path), "bad.py")
    assert not document.valid
    assert set(document.terms) >= {b"first", b"=", b"two", b"words"}


# ---- the rivals ----


@pytest.mark.parametrize("name", list(demo_replay._METHODS))
def test_each_method_keeps_a_mirror(name: str) -> None:
    logs = []
    for epoch in range(3):
        log = WriteLog()
        for page in (epoch, 5, 700 + epoch, 1023):
            log.spans.extend((page * PAGE + 4090, 6))
            log.data += bytes((epoch + 1, page % 251, 1, 2, 3, 4))
        logs.append(log)
    cost = demo_replay._measure(name, demo_replay._METHODS[name], logs, 4 << 20)
    expected = {"untracked": 0, "copy everything": 3 * 1024}
    assert cost.pages_copied == expected.get(name, 12)


def test_replay_stays_within_the_memory() -> None:
    memory = bytearray(PAGE)
    for spans in ((PAGE - 1, 2), (2**64 - 1, 2), (0, 3)):
        with pytest.raises(OSError, match="Invalid argument"):
            replay(memory, array("Q", spans), b"ab")
    assert not any(memory)


def pages() -> mmap.mmap:
    return mmap.mmap(-1, 64 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def test_protected_pages_are_found_one_by_one() -> None:
    memory, mirror = pages(), pages()
    with ProtectedPages(memory) as protected:
        assert protected.collect_into(mirror) == 0
        for page in (0, 1, 2, 9, 62, 63):
            memory[page * PAGE + 7] = page + 1
        assert protected.collect_into(mirror) == 6
        assert protected.collect_into(mirror) == 0
        memory[9 * PAGE] = 1
        assert protected.collect_into(mirror) == 1
        with pytest.raises(OSError, match="busy"):
            ProtectedPages(pages())
    assert compare_into(memory, mirror) == 0
    memory[5 * PAGE] = 1
    assert compare_into(memory, mirror) == 1
    assert compare_into(memory, mirror) == 0


@pytest.mark.unsanitized("its handler of SIGSEGV is in the way")
def test_foreign_fault_goes_to_the_handler_before() -> None:
    program = """
        import faulthandler, mmap, ctypes
        from dirtytrack.kernel.baseline import ProtectedPages
        {enable}
        memory = mmap.mmap(-1, 64 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        ProtectedPages(memory)
        memory[0] = 1
        ctypes.string_at(8)
    """
    for enable, said in (("", ""), ("faulthandler.enable()", "Segmentation fault")):
        code = textwrap.dedent(program.format(enable=enable))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False)
        assert done.returncode == -signal.SIGSEGV
        assert said in done.stderr


# ---- the strip ----


def test_heat_counts_every_page_once() -> None:
    assert heat(bytes((0b00001111, 0b10000000)), 16, 4) == [1.0, 0.0, 0.0, 0.25]
    assert heat(b"\x07", 3, 10) == [1.0, 1.0, 1.0]
    shares = heat(b"\xff" * 125, 1000, 7)
    assert shares == [1.0] * 7


@pytest.mark.parametrize("no_colour", [False, True])
def test_colour_only_on_a_terminal_that_wants_it(
    no_colour: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_colour:
        monkeypatch.setenv("NO_COLOR", "1")
    screen = Screen()
    screen.line(screen.strip([0.0, 0.001, 1.0]), "1")
    assert ("\x1b[31m" in capsys.readouterr().out) is not no_colour

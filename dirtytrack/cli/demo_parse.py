# SPDX-License-Identifier: MIT
"""The demo's input: every source file of the Python standard library, read and tokenised by worker processes."""

from __future__ import annotations

import io
import os
import re
import signal
import sysconfig
import tokenize
import warnings
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection, get_context, resource_tracker
from pathlib import Path
from typing import NamedTuple

__all__ = ["Document", "parse", "parsing", "source_files"]

_LAYOUT = frozenset(
    (tokenize.ENCODING, tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
)
# Strings and comments are prose: their words are indexed, each on its own line. (Python 3.12 splits f-strings.)
_PROSE = frozenset((tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)))
_WORD = re.compile(r"\w+")


class Document(NamedTuple):
    """One source file.

    Attributes:
        path: relative to the standard library.
        text: the file's bytes.
        terms: each token that occurs, with the lines it is on: native unsigned 32-bit numbers, ascending.
        valid: False where the tokeniser gave up; `terms` has what came before.
    """

    path: str
    text: bytes
    terms: dict[bytes, bytes]
    valid: bool


def source_files() -> tuple[str, list[str]]:
    """The standard library's directory, and its source files relative to that, sorted."""
    root = sysconfig.get_path("stdlib")
    found = []
    for directory, below, names in os.walk(root):
        below[:] = [name for name in below if name not in ("__pycache__", "site-packages", "dist-packages")]
        for name in names:
            path = Path(directory, name)
            if name.endswith(".py") and path.is_file() and os.access(path, os.R_OK):
                found.append(str(path.relative_to(root)))
    return root, sorted(found)


def parse(root: str, path: str) -> Document:
    """Read and tokenise one file. What does not tokenise (the test suite has some) is parsed up to there."""
    text = Path(root, path).read_bytes()
    lines_of: dict[str, list[int]] = {}
    valid = True
    try:
        for kind, string, (line, _), _, _ in tokenize.tokenize(io.BytesIO(text).readline):
            if kind in _LAYOUT:
                continue
            if kind in _PROSE:
                for number, part in enumerate(string.split("\n"), line):
                    for word in _WORD.findall(part):
                        lines_of.setdefault(word, []).append(number)
            else:
                lines_of.setdefault(string, []).append(line)
    except (tokenize.TokenError, SyntaxError, ValueError):
        valid = False
    terms = {term.encode("utf-8", "replace"): array("I", lines).tobytes() for term, lines in lines_of.items()}
    return Document(path, text, terms, valid)


def _work(results: connection.Connection, root: str, paths: Sequence[str]) -> None:
    """A worker's life: its share of the files, one message each. It ends when nobody reads any more."""
    os.nice(5)  # The process that writes the index comes first.
    warnings.simplefilter("ignore")  # Invalid escapes in the standard library's tests.
    try:
        for path in paths:
            results.send(tuple(parse(root, path)))
    except BrokenPipeError:
        pass
    finally:
        results.close()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Children started here ignore Ctrl-C for good; this process gets it a moment later."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def parsing(root: str, paths: Sequence[str], workers: int | None = None) -> Iterator[Iterator[Document]]:
    """Parse files in processes of their own; yields the documents in whatever order they are ready.

    Processes, not threads: tokenising holds the GIL. Spawned, not forked: they inherit neither the tracked memory nor
    its userfaultfd.
    """
    context = get_context("spawn")
    resource_tracker.ensure_running()  # Starting it lets go of the signals that are held below (CPython 3.10-3.13).
    count = max(1, min(workers or os.cpu_count() or 1, 8, len(paths)))
    processes = []
    readers: list[connection.Connection] = []
    try:
        for share in range(count):
            reader, writer = context.Pipe(duplex=False)
            readers.append(reader)
            process = context.Process(target=_work, args=(writer, root, paths[share::count]), daemon=True)
            with _interrupts_held():
                process.start()
            processes.append(process)
            writer.close()  # Else the end of a worker is never seen.
        yield _receive(list(readers))
    finally:
        for reader in readers:
            reader.close()
        for process in processes:
            process.terminate()
            process.join()
            process.close()


def _receive(readers: list[connection.Connection]) -> Iterator[Document]:
    while readers:
        for ready in connection.wait(readers):
            assert isinstance(ready, connection.Connection)
            try:
                yield Document(*ready.recv())
            except EOFError:
                readers.remove(ready)

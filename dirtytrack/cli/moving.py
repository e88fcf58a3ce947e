# SPDX-License-Identifier: MIT
"""What `dirtytrack migrate` and `dirtytrack receive` have in common: targets, secrets, the progress line."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..errors import InvalidMemory, NotTrusted

if TYPE_CHECKING:
    import ssl

    from ..migration import Progress

__all__ = ["ProgressLine", "add_trust", "target", "tls_of", "token_of"]

_LINE_SECONDS = 0.2


def target(words: str) -> Callable[..., Any]:
    """The function that ``module:function`` names; modules of the current folder too.

    Raises:
        InvalidMemory: there is none.
    """
    module, colon, name = words.partition(":")
    if not (module and colon and name):
        raise InvalidMemory(f"a target is module:function, not {words!r}")
    here = str(Path.cwd())
    if "" not in sys.path and here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise InvalidMemory(f"the module of {words!r} cannot be imported: {error}") from error
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise InvalidMemory(f"{words!r} names no function: {module} has no {name} that can be called")
    return found  # type: ignore[no-any-return]


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Declare the options that say who may."""
    parser.add_argument("--token-file", metavar="FILE", help="a file with a secret that both sides have")
    parser.add_argument("--tls-cert", metavar="FILE", help="TLS: this side's certificate (PEM)")
    parser.add_argument("--tls-key", metavar="FILE", help="TLS: its key")
    parser.add_argument("--tls-ca", metavar="FILE", help="TLS: who signs the other side's certificate")


def token_of(args: argparse.Namespace) -> bytes | None:
    """The secret, or None.

    Raises:
        NotTrusted: it cannot be read, or is empty.
    """
    if args.token_file is None:
        return None
    try:
        with open(args.token_file, "rb") as file:
            token = file.read().strip()
    except OSError as error:
        raise NotTrusted(f"the token's file {args.token_file} cannot be read: {error.strerror}") from error
    if not token:
        raise NotTrusted(f"the token's file {args.token_file} is empty")
    return token


def tls_of(args: argparse.Namespace, *, server: bool) -> ssl.SSLContext | None:
    """TLS in which both sides have certificates, or None.

    Raises:
        NotTrusted: a file is missing, or is none.
    """
    given = args.tls_cert, args.tls_key, args.tls_ca
    if not any(given):
        return None
    if not all(given):
        raise NotTrusted("TLS takes all of --tls-cert, --tls-key and --tls-ca: both sides show who they are")
    import ssl

    try:
        context = ssl.create_default_context(
            ssl.Purpose.CLIENT_AUTH if server else ssl.Purpose.SERVER_AUTH, cafile=args.tls_ca
        )
        context.load_cert_chain(args.tls_cert, args.tls_key)
        context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ValueError) as error:
        raise NotTrusted(f"the certificates cannot be used ({error}): look at {', '.join(given)}") from error
    return context


class ProgressLine:
    """Tells how it goes: on a terminal one line that is written over, else a line for each step.

    Args:
        out: where to.
        doubt: what to say of an ambiguous moment.
    """

    def __init__(self, out: TextIO, doubt: str) -> None:
        self._out, self._doubt = out, doubt
        self._live = out.isatty()
        self._wide = 0
        self._at = 0.0
        self._said = ("", -1)

    def __call__(self, told: Progress) -> None:
        """Tell."""
        step = told.phase, told.round
        now = time.monotonic()
        if self._live:
            if step == self._said and now - self._at < _LINE_SECONDS:
                return
            line = self._line(told)
            self._out.write(f"\r{line:<{self._wide}}")
            self._wide = len(line)
        elif step != self._said:
            self._out.write(self._line(told) + "\n")
        self._out.flush()
        self._said, self._at = step, now

    def end(self) -> None:
        """End the line."""
        if self._live and self._wide:
            self._out.write("\n")
            self._wide = 0

    def _line(self, told: Progress) -> str:
        from ..observe.units import show_bytes, show_seconds

        if told.phase == "in doubt":
            return f"in doubt: neither side runs. {self._doubt}"
        words = [f"{told.phase}, round {told.round}" if told.phase in ("rounds", "receiving") else told.phase]
        if told.remaining_bytes:
            words.append(f"{show_bytes(told.remaining_bytes)} remain")
        if told.dirty_bytes_per_second:
            words.append(f"written {show_bytes(told.dirty_bytes_per_second)}/s")
        if told.bytes_per_second:
            words.append(f"moved {show_bytes(told.bytes_per_second)}/s")
        if told.predicted_downtime is not None:
            words.append(f"downtime {show_seconds(told.predicted_downtime)}")
        if told.total_bytes:
            words.append(f"{show_bytes(told.total_bytes)} in {show_seconds(told.seconds)}")
        return ", ".join(words)

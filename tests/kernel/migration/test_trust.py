# SPDX-License-Identifier: MIT
"""Who may: TLS on both sides, tokens, and addresses that others could reach."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import ssl
import subprocess
from pathlib import Path

import numpy as np
import pytest

import dirtytrack
from dirtytrack import AddressUnusable, MigrationFailed, NotTrusted
from dirtytrack.migration import Destination, Source
from dirtytrack.migration.joining import Address
from tests.kernel.migration.parties import MIB
from tests.kernel.migration.test_moves import here_both

OPENSSL = shutil.which("openssl")


class Authority:
    """Signs certificates: made by openssl, for this test run only."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self.name = folder, name
        self.cert, self._key = folder / f"{name}.pem", folder / f"{name}.key"
        self._openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
                      "-subj", f"/CN={name}", "-keyout", self._key, "-out", self.cert)  # fmt: skip

    @staticmethod
    def _openssl(*words: str | Path) -> None:
        assert OPENSSL is not None
        subprocess.run([OPENSSL, *words], check=True, capture_output=True)

    def signed(self, who: str, address: str = "127.0.0.1") -> tuple[Path, Path]:
        cert, key, request = (self._folder / f"{self.name}-{who}.{end}" for end in ("pem", "key", "csr"))
        names = self._folder / f"{who}.names"
        names.write_text(f"subjectAltName=IP:{address}\n")
        self._openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={who}",
                      "-keyout", key, "-out", request)  # fmt: skip
        self._openssl("x509", "-req", "-in", request, "-CA", self.cert, "-CAkey", self._key, "-CAcreateserial",
                      "-days", "2", "-extfile", names, "-out", cert)  # fmt: skip
        return cert, key


@pytest.fixture(scope="module")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authority, Authority]:
    folder = tmp_path_factory.mktemp("certificates")
    return Authority(folder, "ours"), Authority(folder, "theirs")


def context(trusts: Authority, mine: tuple[Path, Path] | None, *, server: bool) -> ssl.SSLContext:
    made = ssl.create_default_context(
        ssl.Purpose.CLIENT_AUTH if server else ssl.Purpose.SERVER_AUTH, cafile=str(trusts.cert)
    )
    made.verify_mode = ssl.CERT_REQUIRED
    if mine is not None:
        made.load_cert_chain(*mine)
    return made


def test_tls_on_both_sides(authorities: tuple[Authority, Authority]) -> None:
    ours, _ = authorities
    here, there = context(ours, ours.signed("source"), server=False), context(ours, ours.signed("dest"), server=True)
    memory = dirtytrack.allocate(8 * MIB, name="m")
    memory[:] = np.random.default_rng(3).bytes(len(memory))
    state = os.urandom(3 * MIB)
    with here_both(tls=there, timeout=2) as (receiving, arrivals):
        with Source(memory, tls=here, state=lambda: state, timeout=2, connections=3) as source:
            source.migrate(receiving.address)
        (arrival,) = arrivals()
    assert arrival.memory["m"][:] == memory[:]
    assert arrival.state == state


@pytest.mark.parametrize("wrong", ["the server's", "the client's", "no client's", "for another name", "none at all"])
def test_certificates_that_are_wrong(authorities: tuple[Authority, Authority], wrong: str) -> None:
    ours, theirs = authorities
    server = theirs.signed("dest") if wrong == "the server's" else ours.signed("dest")
    if wrong == "for another name":
        server = ours.signed("other", "127.0.0.9")
    client = {"the client's": theirs.signed("source"), "no client's": None}.get(wrong, ours.signed("source"))
    here = None if wrong == "none at all" else context(ours, client, server=False)
    there = context(ours, server, server=True)
    memory = dirtytrack.allocate(MIB, name="m")
    with Destination(tls=there) as receiving, Source(memory, tls=here, timeout=2) as source:
        with pytest.raises(MigrationFailed) as caught:
            source.migrate(receiving.address)
        assert source.may_run
        told = isinstance(caught.value, NotTrusted) or "certificate" in str(caught.value)
        assert told or wrong == "none at all", caught.value
        with pytest.raises(TimeoutError):
            receiving.receive(timeout=0.05)


@pytest.mark.parametrize(("mine", "theirs"), [("right", "wrong"), (None, "right"), ("right", None)])
def test_tokens_that_differ(mine: str | None, theirs: str | None) -> None:
    memory = dirtytrack.allocate(MIB, name="m")
    with Destination(token=theirs) as receiving, Source(memory, token=mine, timeout=2) as source:
        with pytest.raises(NotTrusted, match="does not know the token"):
            source.migrate(receiving.address)
        with pytest.raises(TimeoutError):
            receiving.receive(timeout=0.05)


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:0", "tcp://:0", "tcp://[::]:0"])
def test_who_listens_to_everybody_must_know_whom_to_trust(address: str) -> None:
    with pytest.raises(NotTrusted, match="could put memory into this process"):
        Destination(address)
    bare = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    with pytest.raises(NotTrusted):  # TLS that asks for no certificate trusts everybody
        Destination(address, tls=bare)
    if address == "tcp://0.0.0.0:0":
        with Destination(address, token="secret") as receiving:
            assert receiving.address.startswith("tcp://0.0.0.0:")


def test_memory_is_not_sent_beyond_this_machine_to_anybody() -> None:
    with Source(dirtytrack.allocate(4096, name="m")) as source, pytest.raises(NotTrusted, match="beyond this machine"):
        source.migrate("tcp://192.0.2.1:7070")


def test_a_port_that_is_taken() -> None:
    with Destination() as one, pytest.raises(AddressUnusable, match="choose another port") as caught:
        Destination(one.address)
    assert caught.value.errno == errno.EADDRINUSE


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with Source(dirtytrack.allocate(4096, name="m")) as source:
        for address in (f"tcp://127.0.0.1:{port}", f"unix://{tmp_path}/none"):
            with pytest.raises(AddressUnusable, match="start the destination first"):
                source.migrate(address)
        assert source.may_run


@pytest.mark.parametrize(
    "text", ["", "localhost:1", "tcp://host", "tcp://host:x", "tcp://h:99999", "unix://", "udp://h:1"]
)
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(AddressUnusable, match="an address is tcp://"):
        Address.of(text)


def test_a_socket_s_file_is_its_owner_s_and_goes_with_it(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()
    with Destination(f"unix://{path}"):
        assert path.stat().st_mode & 0o077 == 0
        with pytest.raises(AddressUnusable):
            Destination(f"unix://{path}")
    assert not path.exists()
    path.write_text("something else")
    with pytest.raises(AddressUnusable):
        Destination(f"unix://{path}")
    assert path.read_text() == "something else"


def test_layouts_that_differ() -> None:
    memory = dirtytrack.allocate(MIB, name="m")
    for there, words in (({"n": bytearray(MIB)}, "name them alike"), ({"m": bytearray(4096)}, "of one length")):
        with Destination(memory=there) as receiving, Source(memory, timeout=2) as source:
            import threading

            def receive(receiving: Destination = receiving) -> None:
                with pytest.raises((dirtytrack.NotStarted, TimeoutError)):
                    receiving.receive(timeout=2)

            thread = threading.Thread(target=receive)
            thread.start()
            with pytest.raises(dirtytrack.LayoutDiffers, match=words):
                source.migrate(receiving.address)
            assert source.may_run
            receiving.close()
            thread.join()

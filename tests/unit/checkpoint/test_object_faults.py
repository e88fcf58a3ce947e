# SPDX-License-Identifier: MIT
"""Object stores behind a network that stalls, cuts, refuses, loses answers and tears uploads; and wrong credentials."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import tracemalloc
import uuid
from array import array
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from dirtytrack.checkpoint import ObjectStore, restore, verify
from dirtytrack.checkpoint.manifests import Manifest, RegionEntry
from dirtytrack.checkpoint.objects import bucket as buckets
from dirtytrack.checkpoint.objects import lease as leases
from dirtytrack.checkpoint.protocols import Kept
from dirtytrack.checkpoint.store import open_store, store_of
from dirtytrack.errors import (
    DirtyTrackError,
    InvalidCheckpoint,
    NoSuchGeneration,
    PermissionDenied,
    StoreBusy,
    StoreFailed,
    UnsupportedKernel,
    UsedAfterFork,
)
from tests.buckets import BUCKET, QUICK, Answer, Proxy, Request, answered, options
from tests.storing import PAGE, kept, read_back, save

MIB = 1 << 20
PART = 5 * MIB  # the least that S3 takes
CONTENTS = [{"a": bytes([i]) * 3 * PAGE, "b": b"\x07" * 50} for i in range(1, 9)]
BIG = {"big": bytes(range(1, 255)) * (6 * MIB // 254)}  # two parts


@pytest.fixture
def url() -> str:
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture
def proxy(s3: str) -> Iterator[Proxy]:
    with Proxy(s3) as found:
        yield found


def opened(url: str, endpoint: str, *, create: bool = True, **others: Any) -> ObjectStore:
    return ObjectStore(
        url,
        create=create,
        **{"grace_seconds": 0, "part_bytes": PART, "parts_in_flight": 3, **options(endpoint, **others)},
    )


def kind_of(request: Request) -> str:
    """What a request is for: its method, the folder, and which step of an upload."""
    folder = request.key.partition("/")[2].partition("/")[0] if request.key else "listing"
    step = "?partNumber" if "partNumber" in request.query else "?upload" if "upload" in request.query else ""
    return f"{request.method} {folder}{step}"


class Once:
    """Meddles with the first request of each kind."""

    def __init__(self, what: str | Answer, *, only: Callable[[Request], bool] = lambda _: True) -> None:
        self.what, self.only, self.kinds = what, only, dict[str, int]()

    def __call__(self, request: Request) -> str | Answer:
        kind = kind_of(request)
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
        return self.what if self.kinds[kind] == 1 and self.only(request) else "pass"


def session(url: str, endpoint: str, **others: Any) -> None:
    """Saves, small and large, are read, and some removed."""
    after = {"big": b"\xff" + BIG["big"][1:]}
    with opened(url, endpoint, **others) as store:
        with store.writer() as writer:
            first = save(writer, store, CONTENTS[0])
            big = save(writer, store, BIG, frame_pages=256)
            save(writer, store, after, BIG, big, frame_pages=256)
            assert read_back(store, 1) == CONTENTS[0]
            assert writer.remove([kept(first)])
        assert read_back(store) == after
        assert store.catalog() == (Kept(2, 0), Kept(3, 0))


# ---- what networks do


@pytest.mark.parametrize(
    "what",
    ["cut", "tear", "lose", "tear answer", answered(500, "InternalError"), answered(503, "SlowDown")],
    ids=lambda what: what if isinstance(what, str) else str(what.status),
)
def test_each_kind_of_request_goes_wrong_once(s3: str, proxy: Proxy, url: str, what: str | Answer) -> None:
    proxy.meddle = once = Once(what)
    session(url, proxy.address)
    assert {"PUT manifests", "PUT segments?partNumber", "POST segments?upload", "GET segments"} <= once.kinds.keys()
    with opened(url, s3, create=False) as store:  # without the proxy: nothing is there twice, or half
        assert [each.generation for each in store.catalog()] == [2, 3]
        assert verify(store, all=True).ok
        assert not store.strangers() and len(store.segments()) == 2


def test_what_stalls_is_asked_for_again(s3: str, proxy: Proxy, url: str) -> None:
    stalled = ("PUT manifests", "PUT segments?partNumber", "POST segments?upload", "GET segments")
    proxy.meddle = Once("stall", only=lambda request: kind_of(request) in stalled)
    session(url, proxy.address, timeout=0.5)
    with opened(url, s3, create=False) as store:
        assert verify(store, all=True).ok and not store.strangers()


def test_an_answer_that_is_lost_is_no_other_writers(proxy: Proxy, url: str) -> None:
    """The server committed; the library asks again, and is told that it is there."""
    committed = 0

    def meddle(request: Request) -> str | Answer:
        nonlocal committed
        if request.method == "PUT" and "/manifests/" in request.key:
            committed += 1
            return "lose" if committed == 1 else answered(500, "InternalError") if committed == 2 else "pass"
        return "pass"

    proxy.meddle = meddle
    with opened(url, proxy.address) as store, store.writer() as writer:
        save(writer, store, CONTENTS[0])
        assert store.catalog() == (Kept(1, 0),)
        save(writer, store, CONTENTS[1])
        assert store.catalog() == (Kept(1, 0), Kept(2, 0))


def test_a_conflict_without_an_object_is_no_other_writer(proxy: Proxy, url: str) -> None:
    """S3 answers 409 where a conflicting request was under way, and wants to be asked again."""
    proxy.meddle = Once(
        answered(409, "ConditionalRequestConflict"), only=lambda request: kind_of(request) == "PUT manifests"
    )
    with opened(url, proxy.address) as store, store.writer() as writer:
        save(writer, store, CONTENTS[0])
        assert read_back(store) == CONTENTS[0]


def test_the_store_goes_away_and_comes_back(s3: str, proxy: Proxy, url: str) -> None:
    with opened(url, proxy.address) as store, store.writer() as writer:
        first = save(writer, store, CONTENTS[0])
        for down in ("PUT segments", "PUT manifests"):
            proxy.meddle = lambda request, down=down: "cut" if kind_of(request) == down else "pass"  # type: ignore[misc]
            with pytest.raises(StoreFailed):
                save(writer, store, CONTENTS[1])
            proxy.meddle = lambda _: "pass"
            assert store.catalog() == (Kept(1, 0),)
        save(writer, store, CONTENTS[2], CONTENTS[0], first)
        assert read_back(store) == CONTENTS[2]
        writer.clean()
    with opened(url, s3, create=False) as store:
        with store.writer():
            pass
        assert not store.strangers() and len(store.segments()) == 2
        assert verify(store, all=True).ok


def test_an_upload_that_fails_is_aborted(s3: str, proxy: Proxy, url: str) -> None:
    with opened(url, proxy.address) as store, store.writer() as writer:
        proxy.meddle = lambda request: "tear" if "partNumber=2" in request.query else "pass"
        with pytest.raises(StoreFailed):
            save(writer, store, BIG, frame_pages=256)
        proxy.meddle = lambda _: "pass"
        aborted = [each for each in proxy.seen if each.method == "DELETE" and "uploadId" in each.query]
        assert len(aborted) == 1
        assert not store.segments() and not store.catalog()
        save(writer, store, BIG, frame_pages=256)
        assert read_back(store) == BIG


def test_parts_go_out_in_parallel_in_bounded_memory(proxy: Proxy, url: str) -> None:
    proxy.rate = 100 * MIB  # so that there is a queue
    frame = bytes(range(256)) * 4096
    with opened(url, proxy.address) as store, store.writer() as writer:
        segment = writer.create_segment(1)
        tracemalloc.start()
        try:
            for at in range(30):
                segment.add(0, array("Q", [at * MIB, MIB]), frame)
            entry = segment.finish()
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert 2 <= proxy.most_at_once <= 3
        assert most < (3 + 3) * PART
        region = RegionEntry(0, "a", 30 * MIB)
        writer.publish(Manifest(store.store_id, 1, 0, None, 1.0, "full", PAGE, None, (region,), (entry,)))
        before = len(proxy.seen)
        tracemalloc.start()
        try:
            found = restore(store, threads=2)
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert bytes(found["a"]) == frame * 30
        ranges = [each for each in proxy.seen[before:] if "/segments/" in each.key]
        assert len(ranges) <= 3 + 30 // 4 + 1 and all("range" in each.headers for each in ranges)


def test_the_index_is_read_without_the_bytes(proxy: Proxy, url: str) -> None:
    with opened(url, proxy.address) as store, store.writer() as writer:
        save(writer, store, BIG, frame_pages=256)
    with opened(url, proxy.address, create=False) as store:
        before = len(proxy.seen)
        segment = store.manifest().segments[0]
        from dirtytrack.checkpoint.segments import SegmentReader

        with SegmentReader(store.open_segment(segment.name), segment, store.store_id) as reader:
            assert len(list(reader.frames())) == 6
        ranges = [each.headers["range"] for each in proxy.seen[before:] if "/segments/" in each.key]
        assert ranges == ["bytes=0-65535", f"bytes={segment.index_offset}-{segment.nbytes - 1}"]


# ---- two who write


def test_many_race_for_one_store(s3: str, url: str) -> None:
    """One at a time has the right, and what each was told is there is there."""
    told = list[tuple[int, bytes]]()
    busy, errors, at_once = [0], list[BaseException](), [0, 0]
    opened(url, s3).close()

    def attempt(who: int) -> None:
        try:
            with opened(url, s3, create=False) as store:
                done = 0
                while done < 2:
                    try:
                        with store.writer() as writer:
                            at_once[0] += 1
                            at_once[1] = max(at_once)
                            number = save(writer, store, {"a": bytes([who, done]) * PAGE}).generation
                            told.append((number, bytes([who, done])))
                            done += 1
                            at_once[0] -= 1
                    except StoreBusy:
                        busy[0] += 1
                        time.sleep(0.02)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=attempt, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert at_once == [0, 1]
    assert sorted(number for number, _ in told) == list(range(1, 9))
    with opened(url, s3, create=False) as store:
        for number, what in told:
            assert read_back(store, number) == {"a": what * PAGE}
        assert verify(store, all=True).ok and not store.strangers()


def test_one_who_was_thought_dead_publishes_nothing(s3: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lease ended, another became the writer: whatever it does then is refused, and leaves nothing."""
    monkeypatch.setattr(leases, "_boot", lambda: "")  # as on two machines
    with opened(url, s3, lease_seconds=1) as store, opened(url, s3) as other:
        late = store.writer()
        late._lease._over.set()  # it is stopped, and renews nothing
        save(late, store, CONTENTS[0])
        segment = late.create_segment(2)
        segment.add(0, array("Q", [0, 5]), b"hello")
        entry = segment.finish()
        with pytest.raises(StoreBusy, match="its lease ends in"):
            other.writer()
        time.sleep(2.1)  # what the server says of times is in whole seconds
        with other.writer() as writer:
            save(writer, other, CONTENTS[1])
            region = RegionEntry(0, "a", 5)
            lost = Manifest(store.store_id, 3, 0, None, 1.0, "full", PAGE, None, (region,), (entry,))
            with pytest.raises(StoreBusy, match="somebody else became the writer"):
                late.publish(lost)
            with pytest.raises(StoreBusy):
                late.remove([Kept(1, 0)])
            # And had it looked just before the other began: it finds out behind it, and takes it back.
            late._lease._lost = None
            asked = list[int]()
            require = late._lease.require
            monkeypatch.setattr(
                late._lease,
                "require",
                lambda: asked.append(1) if not asked else require(),
            )
            with pytest.raises(StoreBusy, match="somebody else became the writer"):
                late.publish(lost)
            assert other.catalog() == (Kept(1, 0), Kept(2, 0))
            save(writer, other, CONTENTS[2])
        late.close()
        with other.writer():
            assert not other.strangers()
        assert [read_back(other, each) for each in (1, 2, 3)] == CONTENTS[:3]


def test_two_publish_one_generation(s3: str, url: str) -> None:
    """Should both think that they write: one put wins, the other is told, and nothing is overwritten."""
    with opened(url, s3) as store, store.writer() as writer:
        made = [writer.create_segment(1) for _ in range(2)]
        entries = []
        for i, segment in enumerate(made):
            segment.add(0, array("Q", [0, 5]), b"hell%d" % i)
            entries.append(segment.finish())
        region = RegionEntry(0, "a", 5)
        manifests = [
            Manifest(store.store_id, 1, 0, None, 1.0, "full", PAGE, None, (region,), (entry,)) for entry in entries
        ]
        writer.publish(manifests[0])
        writer._named.clear()  # as another writer, who knows nothing of it
        with pytest.raises(StoreBusy, match="somebody else saved generation 1"):
            writer.publish(manifests[1])
        assert read_back(store) == {"a": b"hell0"}


# ---- readers, and what is removed


def test_what_is_removed_can_be_read_until_its_grace_is_over(s3: str, url: str) -> None:
    careful = opened(url, s3, grace_seconds=3600)
    with careful as store, opened(url, s3, create=False) as reader, store.writer() as writer:
        first = save(writer, store, CONTENTS[0])
        save(writer, store, CONTENTS[1])
        with reader.reading():
            manifest = reader.manifest(1)
            assert writer.remove([kept(first)])
            assert store.catalog() == (Kept(2, 0),)
            assert reader.open_segment(manifest.segments[0].name).nbytes == manifest.segments[0].nbytes
        assert len(store.segments()) == 2 and not store.strangers()
        assert writer.next_generation() == 3
    with opened(url, s3, create=False) as store, opened(url, s3, create=False) as reader:
        manifest = reader.manifest(2)
        with store.writer() as writer:  # this one has no grace
            assert len(store.segments()) == 1
            save(writer, store, CONTENTS[2])
            writer.remove([Kept(2, 0)])
        with pytest.raises(NoSuchGeneration, match="was removed while it was read"):
            reader.open_segment(manifest.segments[0].name)


def test_a_young_orphan_is_left_alone(s3: str, url: str) -> None:
    """It may be of a save that goes on."""
    with opened(url, s3) as store:
        with store.writer() as writer:
            segment = writer.create_segment(1)
            segment.add(0, array("Q", [0, 5]), b"hello")
            segment.finish()
            writer._pending.clear()  # as one who was killed
        with opened(url, s3, create=False, grace_seconds=60) as careful, careful.writer() as writer:
            assert writer.clean() == () and len(store.segments()) == 1
            assert writer.next_generation() == 2
        with store.writer():
            assert not store.segments()


# ---- bad input


REFUSED: list[tuple[Answer, type[DirtyTrackError], str]] = [
    (
        answered(403, "InvalidAccessKeyId", "The AWS Access Key Id does not exist"),
        PermissionDenied,
        "credentials are wrong",
    ),
    (answered(403, "SignatureDoesNotMatch", "signature"), PermissionDenied, "credentials are wrong"),
    (answered(400, "ExpiredToken", "The provided token has expired."), PermissionDenied, "have expired"),
    (answered(403, "AccessDenied", "Access Denied"), PermissionDenied, "do not allow it"),
    (answered(403, "RequestTimeTooSkewed", "The difference between the request time…"), StoreFailed, "set the clock"),
    (
        answered(400, "AuthorizationHeaderMalformed", "the region 'us-east-1' is wrong; expecting 'eu-west-1'"),
        StoreFailed,
        "another region: set AWS_REGION.*expecting 'eu-west-1'",
    ),
    (
        answered(301, "PermanentRedirect", "must be addressed using the specified endpoint"),
        StoreFailed,
        "another region",
    ),
    (
        answered(404, "NoSuchBucket", "The specified bucket does not exist"),
        InvalidCheckpoint,
        "no such bucket. Make it",
    ),
    (answered(501, "NotImplemented", "A header you provided"), StoreFailed, "cannot do that"),
]


@pytest.mark.parametrize(("answer", "kind", "says"), REFUSED, ids=lambda each: getattr(each, "body", "")[50:75] or None)
def test_what_the_store_refuses_is_said(
    proxy: Proxy, url: str, answer: Answer, kind: type[DirtyTrackError], says: str
) -> None:
    quick: dict[str, Any] = {"retry_config": {**QUICK, "max_retries": 0}}
    proxy.meddle = lambda _: answer
    for create in (True, False):
        with pytest.raises(kind, match=says):
            opened(url, proxy.address, create=create, **quick)
    proxy.meddle = lambda _: "pass"
    with opened(url, proxy.address, **quick) as store, store.writer() as writer:
        first = save(writer, store, CONTENTS[0])
        proxy.meddle = lambda request: answer if request.method in ("PUT", "POST") else "pass"
        with pytest.raises(kind, match=says):
            save(writer, store, CONTENTS[1])
        proxy.meddle = lambda _: "pass"
        assert store.catalog() == (kept(first),)
        assert read_back(store) == CONTENTS[0]


@pytest.mark.radosgw
def test_a_server_that_checks_says_what_is_wrong(s3: str, url: str) -> None:
    opened(url, s3).close()
    for wrong in ({"secret_access_key": "another"}, {"access_key_id": "nobody"}):
        with pytest.raises(PermissionDenied, match="the credentials are wrong"):
            ObjectStore(url, **{**options(s3), **wrong})
    with pytest.raises(PermissionDenied, match="the credentials do not allow it"):
        ObjectStore(url, **options(s3, skip_signature=True))
    with pytest.raises(InvalidCheckpoint, match=r"no such bucket\. Make it"):
        opened("s3://no-such-bucket/x", s3)


SAVING = """
import sys
from dirtytrack.checkpoint import Checkpointer, ObjectStore
from dirtytrack.errors import StoreFailed
from tests.buckets import options
try:
    with Checkpointer(ObjectStore(sys.argv[1], create=True, **options(sys.argv[2])), {"x": bytearray(9000)}) as ckpt:
        print("committed" if ckpt.save().wait() else "not committed")
except StoreFailed as error:
    print(error)
"""


@pytest.mark.radosgw
@pytest.mark.parametrize("shift", ["+10m", "-10m", "+1h", "-1h", "+2d"])
def test_a_clock_that_is_wrong(s3: str, url: str, shift: str) -> None:
    """By libfaketime. A store allows a quarter of an hour, within which all goes as ever."""
    command = ["faketime", "-f", shift, sys.executable, "-c", SAVING, url, s3]
    environment = {**os.environ, "DONT_FAKE_MONOTONIC": "1"}
    told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    if shift.endswith("10m"):
        assert told.stdout == "committed\n", told
        assert ObjectStore(url, **options(s3)).catalog() == (Kept(1, 0),)
    else:
        assert "this machine's clock and the store's differ" in told.stdout, told
        assert "it says RequestTimeTooSkewed" in told.stdout


@pytest.mark.moto
def test_a_store_that_ignores_the_condition_is_refused(proxy: Proxy, url: str) -> None:
    proxy.meddle = lambda _: "without the condition"
    with opened(url, proxy.address) as store:
        with pytest.raises(StoreFailed, match="honours conditional puts") as raised:
            store.writer()
        assert raised.value.feature == "conditional put"
        assert not store.strangers()


def test_no_credentials(monkeypatch: pytest.MonkeyPatch, proxy: Proxy) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    proxy.meddle = lambda _: "cut"  # as where no metadata service is
    with pytest.raises(PermissionDenied, match="there are no credentials: set them"):
        ObjectStore(
            f"s3://{BUCKET}/x",
            region="us-east-1",
            metadata_endpoint=proxy.address,
            retry_config={**QUICK, "max_retries": 0},
            client_options={"allow_http": True},
        )


def test_urls_and_options_that_make_no_sense(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidCheckpoint, match="begins with one of s3, "):
        store_of("ftp://host/there")
    with pytest.raises(InvalidCheckpoint, match="pass it as a string"):
        store_of(Path("s3://bucket/there"))
    with pytest.raises(InvalidCheckpoint, match="begins with file:///"):
        store_of("file://host/there")
    with pytest.raises(InvalidCheckpoint, match="cannot be opened so"):
        ObjectStore(f"s3://{BUCKET}/x", no_such_option=1)
    for wrong in ({"part_bytes": 4096}, {"parts_in_flight": 0}, {"lease_seconds": 0}, {"grace_seconds": "long"}):
        with pytest.raises(InvalidCheckpoint, match=next(iter(wrong))):
            ObjectStore(f"s3://{BUCKET}/x", **{**options(s3), **wrong})
    with pytest.raises(InvalidCheckpoint, match="plain HTTP: set AWS_ALLOW_HTTP"):
        ObjectStore(f"s3://{BUCKET}/x", **{**options(s3), "client_options": {}})
    with pytest.raises(InvalidCheckpoint, match="a URL or a store of the package obstore"):
        ObjectStore(3)
    with open_store(f"file://{tmp_path}/a%20b", create=True) as store, store.writer() as writer:
        save(writer, store, CONTENTS[0])
    assert read_back(store_of(tmp_path / "a b")) == CONTENTS[0]
    monkeypatch.setattr(buckets, "_obstore", _not_installed)
    with pytest.raises(UnsupportedKernel, match="pip install"):
        store_of(f"s3://{BUCKET}/x")


def _not_installed() -> Any:
    raise UnsupportedKernel("pip install dirtytrack[objects]", feature="obstore")


def test_a_forked_child_is_told(s3: str, url: str) -> None:
    with opened(url, s3) as store, store.writer() as writer:
        save(writer, store, CONTENTS[0])
        pid = os.fork()
        if not pid:
            try:
                writer.close()
                store.catalog()
            except UsedAfterFork:
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        save(writer, store, CONTENTS[1])
        assert read_back(store) == CONTENTS[1]


def test_something_else_is_there(s3: str, url: str) -> None:
    with opened(url, s3) as store:
        store.bucket.put("below/thesis.tex", b"x")
    for create in (False, True):
        with pytest.raises(InvalidCheckpoint, match="no store of checkpoints"):
            opened(f"{url}/below", s3, create=create)


def test_nobody_is_there() -> None:
    began = time.monotonic()
    with pytest.raises(StoreFailed, match="cannot be reached"):
        opened(
            f"s3://{BUCKET}/x",
            "http://127.0.0.1:9",
            retry_config={"max_retries": 1, "retry_timeout": timedelta(seconds=1)},
        )
    assert time.monotonic() - began < 20

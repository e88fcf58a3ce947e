# SPDX-License-Identifier: MIT
"""Ranks that save to an object store: each its part, below a prefix of its own."""

from __future__ import annotations

import uuid
from typing import Any

import numpy as np
import pytest

from dirtytrack.checkpoint import (
    ObjectStore,
    Retention,
    coordinated,
    generations,
    prune,
    restore,
    restore_share,
    verify,
)
from dirtytrack.errors import DamagedCheckpoint
from tests.buckets import BUCKET, CREDENTIALS
from tests.ranking import ThreadRank, ranks
from tests.saving import paged


@pytest.fixture
def url(s3: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in {
        "AWS_ENDPOINT_URL": s3,
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": CREDENTIALS["access_key_id"],
        "AWS_SECRET_ACCESS_KEY": CREDENTIALS["secret_access_key"],
    }.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


def test_ranks_save_to_a_bucket(url: str) -> None:
    def work(comm: ThreadRank) -> Any:
        rows = paged(3 if comm.size == 2 else 6).reshape(-1, 4096)
        with coordinated(
            comm, url, {"grid": rows}, partition={"grid": 0}, resume=comm.size == 1, retain=Retention(last=2)
        ) as ckpt:
            for step in range(3):
                rows[step, :100] += comm.rank + step + 1
                save = ckpt.save(step)
                assert save.wait(60)
                assert save.kind == "full" if not step else "increment"
        return rows.copy()

    grid = np.concatenate(ranks(2, work))
    assert (restore(url)["grid"] == grid).all()
    assert [each.generation for each in generations(url)] == [2, 3]
    with ObjectStore(url) as store:
        assert store.parts() == (0, 1)
        assert [each.generation for each in generations(store.part(1))] == [2, 3]
    assert np.concatenate([each["grid"] for each in ranks(3, lambda comm: restore_share(comm, url))]).tobytes() == (
        grid.tobytes()
    )
    (after,) = ranks(1, work)
    assert (restore(url)["grid"] == after).all()
    report = verify(url, all=True)
    assert report.ok
    assert not report.strangers
    assert prune(url, Retention(last=1)).removed == (5,)
    with ObjectStore(url) as store:
        assert [each.generation for each in generations(store.part(0))] == [6]
        assert not generations(store.part(1))
        part = store.part(0)
        part.bucket.delete([each.key for each in part.bucket.list("segments")])
    with pytest.raises(DamagedCheckpoint, match="rank 0"):
        restore(url)

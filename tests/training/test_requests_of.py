"""A batch's requests are named by their keys in the shards, and the days of a holdout can be chosen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from roo_ray.config import Holdout, Ingest
from roo_ray.errors import DataError
from roo_ray.ingest.holdout import select_files
from roo_ray.ingest.stream import RankStream, StreamSettings
from roo_ray.training.requests_of import request_ids
from tests.ingest import shard_maker
from tests.ingest.shard_maker import random_rows, request_key, write_data_set

SCHEMA = shard_maker.schema()


def test_the_requests_of_every_step_are_named(tmp_path: Path) -> None:
    rows = random_rows([3, 1, 4, 1, 5] * 12, seed=1, days=3)
    manifest = write_data_set(tmp_path / "data", rows, SCHEMA)
    names = {request_key(row, SCHEMA): "/".join(f"{k}={row[k]}" for k in SCHEMA.keys.request) for row in rows}
    ingest = Ingest(lanes=3, batch_impressions=8, window_units=2, reader="thread")
    holdout = Holdout(days=1)
    settings = StreamSettings(str(tmp_path / "data"), 1, SCHEMA, ingest, holdout, "train", 5, (0,), "shuffled")
    named: list[str] = []
    for step in RankStream(settings, 0, 2).epoch(0):
        if not step.lanes_alive:
            break
        found = request_ids(settings, 0, step)
        assert sorted(found) == sorted(names[int(key)] for key in step.batch.request_key)
        named += found
        last = step
    assert len(named) == len(set(named)) > 10
    missing = replace(settings, data_set=str(tmp_path / "gone"))
    unnamed = request_ids(missing, 0, last)
    assert len(unnamed) == last.requests
    assert all(name.startswith("hash ") for name in unnamed)

    days = sorted({file.day for file in manifest.files})
    one = Holdout(by="all", only_days=[days[1]])
    assert {file.day for file in select_files(manifest, one, "evaluation")} == {days[1]}
    two = Holdout(by="day", days=1, only_days=days[:2])
    assert {file.day for file in select_files(manifest, two, "train")} == {days[0]}
    assert {file.day for file in select_files(manifest, two, "evaluation")} == {days[1]}
    with pytest.raises(DataError, match="only_days names 1999-01-01"):
        select_files(manifest, Holdout(by="request", only_days=["1999-01-01"]), "train")

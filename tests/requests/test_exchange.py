"""The plan of the exchange: requests whole, sizes bounded under skew, and independent of the input's order."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from roo_ray.config import Build
from roo_ray.errors import DataError
from roo_ray.requests.exchange import Exchange, Survey, add_surveys, plan_exchange, survey_rows
from roo_ray.requests.plan import Joined
from roo_ray.requests.stages import scatter_tasks
from roo_ray.sources.base import ReadUnit
from roo_ray.sources.hashing import mix64


def log_of(seed: int, requests: int, users: int, days: int, heavy: float = 0.0) -> tuple[Any, Any, Any]:
    """(days, user hashes, request hashes) of the rows; ``heavy``: one user's share of the requests."""
    rng = np.random.default_rng(seed)
    user = np.where(rng.random(requests) < heavy, 0, rng.integers(0, users, requests)).astype(np.uint64)
    day = rng.integers(19_000, 19_000 + days, requests)
    rows = np.repeat(np.arange(requests), rng.integers(1, 6, requests))
    rng.shuffle(rows)
    return day[rows], mix64(user)[rows], mix64(np.arange(requests).astype(np.uint64) + np.uint64(10**9))[rows]


def survey_of(log: tuple[Any, Any, Any], bytes_per_row: int, tables: int = 3) -> Survey:
    parts = np.array_split(np.arange(len(log[0])), tables)
    return add_surveys(survey_rows(*(c[part] for c in log), len(part) * bytes_per_row) for part in parts)


def shard_of(exchange: Exchange, buckets: Any) -> Any:
    return np.searchsorted([shard.first for shard in exchange.shards], buckets, side="right") - 1


@given(
    st.integers(0, 99),
    st.integers(1, 300),
    st.integers(1, 40),
    st.integers(1, 4),
    st.floats(0, 1),
    st.one_of(st.none(), st.integers(1, 5)),
    st.integers(50, 100_000),
)
def test_every_request_is_whole_in_one_bucket_of_its_day(
    seed: int, requests: int, users: int, days: int, heavy: float, buckets: int | None, bucket_bytes: int
) -> None:
    log = log_of(seed, requests, users, days, heavy)
    survey = survey_of(log, 100)
    assert survey.total_rows == len(log[0])
    exchange = plan_exchange(survey, Build(buckets=buckets, bucket_bytes=bucket_bytes, file_bytes=10_000), True)
    bucket = exchange.bucket_of(*log)
    assert (np.diff(exchange.starts.astype(object)) > 0).all()
    shards = exchange.shards
    assert [shard.first for shard in shards] == [0, *(shard.last for shard in shards[:-1])]
    assert shards[-1].last == exchange.buckets
    assert (np.array([shards[i].day for i in shard_of(exchange, bucket)]) == log[0]).all()
    for request in np.unique(log[2]):
        assert len(np.unique(bucket[log[2] == request])) == 1
    names = [(shard.day, shard.number) for shard in shards]
    assert names == sorted(set(names))
    if buckets:
        again = plan_exchange(survey_of(tuple(c[::-1] for c in log), 100, 7), Build(buckets=buckets), True)
        assert (shard_of(again, again.bucket_of(*log)) == shard_of(exchange, bucket)).all()


def test_a_heavy_user_is_spread_and_buckets_stay_small() -> None:
    log = log_of(0, 20_000, 3000, 1, heavy=0.3)
    build = Build(bucket_bytes=60_000, file_bytes=15_000)
    exchange = plan_exchange(survey_of(log, 20, tables=40), build, True)
    bucket = exchange.bucket_of(*log)
    heavy = log[1] == mix64(np.zeros(1, np.uint64))[0]
    assert 0.2 < heavy.mean() < 0.4
    assert len(np.unique(shard_of(exchange, bucket[heavy]))) > 5
    rows = np.bincount(bucket, minlength=exchange.buckets)
    assert rows.max() * 20 < 2 * build.bucket_bytes
    per_shard = np.bincount(shard_of(exchange, bucket), minlength=len(exchange.shards))
    assert per_shard.max() < 2 * per_shard.mean()
    light = np.unique(log[1][~heavy])[:300]
    whole = [len(np.unique(shard_of(exchange, bucket[log[1] == user]))) == 1 for user in light]
    assert np.mean(whole) > 0.95  # others stay together


def test_requests_are_estimated() -> None:
    for requests in (10, 900, 50_000):
        found = survey_of(log_of(1, requests, 100, 2), 100).requests
        assert found == pytest.approx(requests, rel=0.1 if requests > 1000 else 0)


def test_rows_of_one_table_share_copies() -> None:
    days, users = np.zeros(6, np.int64), np.zeros(6, np.uint64)
    hashes = np.array([1, 1, 2, 1, 2, 3], np.uint64)
    together = survey_rows(days, users, hashes, 60)
    assert (together.rows.tolist(), together.copies.tolist()) == ([6], [3])
    apart = add_surveys(survey_rows(days[part], users[part], hashes[part], 30) for part in (slice(3), slice(3, 6)))
    assert (apart.rows.tolist(), apart.copies.tolist(), apart.bytes) == ([6], [5], 60)


def test_what_cannot_be() -> None:
    days = np.arange(70_000)
    zeros = np.zeros(len(days), np.uint64)
    with pytest.raises(DataError, match=r"times span 70,000 days; correct the column that keys\.time names"):
        plan_exchange(survey_rows(days, zeros, zeros, 1), Build(), True)
    some = survey_of(log_of(0, 10, 3, 1), 100)
    with pytest.raises(DataError, match="source's files changed during the build"):
        plan_exchange(some, Build(), True).bucket_of(np.array([5]), zeros[:1], zeros[:1])


@given(st.lists(st.integers(1, 900_000_000), max_size=60))
def test_a_task_deals_neighbouring_units(sizes: list[int]) -> None:
    units = [ReadUnit(number, "", "", (0,), "impressions", 1, size) for number, size in enumerate(sizes)]
    tasks = scatter_tasks(units, "impressions")
    assert [unit for some in tasks for unit in some] == units  # each once, in order
    most = min(sum(sizes) / 4, 1_000_000_000)
    for some in tasks:
        assert sum(unit.bytes for unit in some[:-1]) + some[-1].bytes / 2 <= max(most, some[0].bytes)
    assert scatter_tasks(units, "requests") == [[unit] for unit in units]
    joined = [Joined(str(number), add_surveys([])) for number in range(3)]
    assert scatter_tasks(joined, "impressions") == [[unit] for unit in joined]

"""The planner gets what a data set was measured to have: each feature's own ids per request, of both levels."""

from __future__ import annotations

import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa
import pytest
import torch

from roo_ray.config import Config, Ingest, Model
from roo_ray.models.cost import training_megaflops
from roo_ray.models.ranking import RankingModel
from roo_ray.requests.manifest import load_manifest
from roo_ray.schema import parse_schema
from roo_ray.training.job import WorkerJob
from roo_ray.training.launch import make_job
from roo_ray.training.sharding import embedding_collections, table_constraints
from tests.requests.data_sets import publish

SCHEMA = parse_schema("""
name: measured
keys: {request: rid, user: user, time: time, impression: item}
tables: {item: {rows: 500, dim: 8}, query: {rows: 90, dim: 8}, tag: {rows: 30, dim: 4}, country: {rows: 9, dim: 8}}
features:
  - {name: country, level: request, kind: ids, columns: country, table: country}
  - {name: interests, level: request, kind: ids, columns: interests, table: tag, pooling: mean, max_length: 3}
  - {name: clicks, level: request, kind: sequence, max_length: 12, sequence: [{column: c_item, table: item}]}
  - name: searches
    level: request
    kind: sequence
    max_length: 100
    sequence: [{column: s_query, table: query}, {column: s_item, table: item}]
  - {name: item, level: impression, kind: ids, columns: item, table: item}
  - {name: tags, level: impression, kind: ids, columns: tags, table: tag, pooling: sum}
labels: [{name: click, column: click}]
""")
MODEL = Model(dim=8, layers=1, heads=2, user_dim=8, cross_layers=1, cross_rank=4, tower=[8])
REQUESTS = range(30)


def rows() -> list[dict[str, Any]]:
    """Requests of 1 to 4 impressions on three days: 0 to 20 clicks, one or two searches, 0 to 4 interests, 0 to 5
    tags."""
    start = datetime.datetime(2024, 5, 1)
    found = []
    for n in REQUESTS:
        request = {
            "rid": n,
            "user": n % 7,
            "time": start + datetime.timedelta(hours=2 * n),
            "country": n % 9,
            "interests": list(range(n % 5)),
            "c_item": list(range(n % 21)),
            "s_query": [1] * (1 + n % 2),
            "s_item": [2] * (1 + n % 2),
        }
        found += [request | {"item": i, "tags": list(range((n + i) % 6)), "click": i % 2} for i in range(1 + n % 4)]
    return found


IMPRESSIONS = fmean(1 + n % 4 for n in REQUESTS)
MEANS = {
    "country": 1.0,
    "interests": fmean(min(n % 5, 3) for n in REQUESTS),
    "clicks.c_item": fmean(min(n % 21, 12) for n in REQUESTS),
    "searches.s_query": 1.5,
    "searches.s_item": 1.5,
    "item": IMPRESSIONS,
    "tags": sum((n + i) % 6 for n in REQUESTS for i in range(1 + n % 4)) / len(REQUESTS),
}


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured")
    publish(folder, pa.Table.from_pylist(rows()), SCHEMA, shards=2)
    return folder


def job_on(data_set: Path, **ingest: Any) -> WorkerJob:
    config = Config(name="x", schema=SCHEMA, requests=str(data_set), model=MODEL, ingest=Ingest(lanes=4, **ingest))
    nowhere: Any = None
    return make_job(config, load_manifest(str(data_set)), "train", nowhere, nowhere)


def test_pooling_factors_of_both_levels_apart(data_set: Path) -> None:
    """Two sequences of different lengths, a bag per request and one per impression: each has its own mean, also
    where two of them read one table."""
    assert len(load_manifest(str(data_set)).days) == 3
    job = job_on(data_set, batch_impressions=50)
    assert job.ids.how == "counted when the data set was built"
    model = RankingModel(SCHEMA, MODEL, torch.device("meta"))
    constraints = table_constraints(model, 20, round(job.requests_per_step), job.ids.per_request)
    planned: dict[str, float] = {}
    for collection in embedding_collections(model):
        for table in collection.embedding_configs():
            given = constraints[table.name]
            planned |= dict(zip(table.feature_names, given.pooling_factors or [], strict=True))
            assert given.batch_sizes == [round(4 * 50 / IMPRESSIONS)] * len(table.feature_names)
    assert planned == pytest.approx(MEANS)
    assert len(set(planned.values())) == len(MEANS) - 1  # those of one sequence alone are equal


def test_batches_by_cost_know_each_sequence(data_set: Path) -> None:
    """The kept clicks and a search or two do not cost what as many events of two equal sequences would."""
    one, t, tt, n, nt = training_megaflops(SCHEMA, MODEL)
    clicks, searches = MEANS["clicks.c_item"], MEANS["searches.s_item"]
    events, squares = clicks + searches, clicks**2 + searches**2
    cost = one + t * events + tt * squares + n * IMPRESSIONS + nt * IMPRESSIONS * events
    job = job_on(data_set, batch_impressions=None, batch_cost=9 * cost)
    assert job.requests_per_step == pytest.approx(4 * 9)

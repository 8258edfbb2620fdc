"""Dedup ratios of a training against a count by hand over single requests."""

from __future__ import annotations

import numpy as np
import pytest

from roo_ray.config import Embeddings, Model
from roo_ray.models.cost import cost_coefficients
from roo_ray.review.sample import RequestSample, training_ratios
from roo_ray.schema import parse_schema

SCHEMA = parse_schema("""
name: sample
keys: {request: r, user: u, time: t}
tables: {item: {rows: 50, dim: 8}, country: {rows: 9, dim: 4}}
features:
  - {name: country, level: request, kind: ids, columns: c, table: country}
  - {name: history, level: request, kind: sequence, max_length: 10, sequence: [{column: h, table: item}]}
  - {name: item, level: impression, kind: ids, columns: i, table: item}
labels: [{name: click, column: clicked}]
""")
MODEL = Model(dim=8, layers=1, heads=2, user_dim=8, cross_layers=1, cross_rank=4, tower=[8])


def test_ratios_are_those_of_a_count_by_hand() -> None:
    counts, events = [3, 1, 5], [4, 25, 0]  # 25 events are cut to 10
    sample = RequestSample(np.array(counts), {"history": np.array(events)}, 3)
    lookups, sent, flops = np.zeros(2), np.zeros(2), np.zeros(2)
    cost = cost_coefficients(SCHEMA, MODEL)

    def dense(t: int, n: int) -> float:
        return cost["1"] + cost["t"] * t + cost["t2"] * t * t + cost["n"] * n + cost["nt"] * n * t

    for n, stored in zip(counts, events, strict=True):
        t = min(stored, 10)
        for side, times in enumerate((n, 1)):
            lookups[side] += times * (1 + t) + n
            sent[side] += times * ((8 + 2 * 4 * 4) + t * (8 + 2 * 8 * 4)) + n * (8 + 2 * 8 * 4)
        flops += (n * dense(t, 1), dense(t, n))
    found = training_ratios(sample, SCHEMA, MODEL)
    assert found["dedup_ratio_lookups"] == pytest.approx(lookups[0] / lookups[1])
    assert found["dedup_ratio_all_to_all_bytes"] == pytest.approx(sent[0] / sent[1])
    assert found["dedup_ratio_flops"] == pytest.approx(flops[0] / flops[1])


def test_single_impressions_save_nothing() -> None:
    sample = RequestSample(np.ones(5, np.int64), {"history": np.arange(5)}, 5)
    assert set(training_ratios(sample, SCHEMA, MODEL).values()) == {1.0}


def test_bags_of_requests_that_are_looked_up_per_impression_send_as_much_in_both_forms() -> None:
    schema = parse_schema("""
name: bags
keys: {request: r, user: u, time: t}
tables: {word: {rows: 50, dim: 8}}
features:
  - {name: asked, level: request, kind: ids, columns: a, table: word, pooling: mean}
  - {name: shown, level: impression, kind: ids, columns: s, table: word, pooling: mean}
labels: [{name: click, column: clicked}]
""")
    sample = RequestSample(np.array([3, 1, 5]), {}, 3)
    model = MODEL.model_copy(update={"kind": "dcn"})
    embedding = 2 * 8 * 4
    after = training_ratios(sample, schema, model)["dedup_ratio_all_to_all_bytes"]
    assert after == pytest.approx(2 * 9 / (9 + 3))
    pooled = model.model_copy(update={"embeddings": Embeddings(pooled=["word"])})
    found = training_ratios(sample, schema, pooled)["dedup_ratio_all_to_all_bytes"]
    assert found == pytest.approx((2 * 9 * 8 + 2 * 9 * embedding) / ((9 + 3) * 8 + 2 * 9 * embedding))

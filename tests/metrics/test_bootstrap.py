"""Paired bootstrap: point figures against scikit-learn and our metrics, intervals that cover and that see."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from roo_ray.errors import DataError
from roo_ray.metrics.bootstrap import Scored, paired_bootstrap, request_aucs
from tests.metrics.reference import pair_auc


def made(seed: int, requests: int = 300, noise: float = 1.0, levels: int | None = None) -> Scored:
    """Labels drawn from the first model's probabilities; the second has ``noise`` added."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 8, requests)
    request = np.repeat(np.arange(requests), counts)
    first = rng.normal(-1, 1, len(request))
    if levels:
        first = np.round(first * levels) / levels
    labels = (rng.random(len(request)) < 1 / (1 + np.exp(-first))).astype(float)
    users = rng.integers(0, requests // 3, requests)
    unit = np.unique(users, return_inverse=True)[1][request]
    return Scored(unit, request, labels, first, first + noise * rng.normal(size=len(request)))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), levels=st.sampled_from([1, 2, None]))
def test_request_aucs_equal_pair_counting(seed: int, levels: int | None) -> None:
    rows = made(seed, 12, levels=levels)
    order = np.random.default_rng(seed).permutation(len(rows.request))
    aucs, sizes = request_aucs(rows.request[order], rows.first[order], rows.labels[order], 12)
    for request in range(12):
        mine = rows.request == request
        brute = pair_auc(rows.first[mine].tolist(), rows.labels[mine].astype(int).tolist())
        assert (sizes[request] == 0) == math.isnan(brute)
        if not math.isnan(brute):
            assert aucs[request] == pytest.approx(brute)
            assert sizes[request] == mine.sum()


def test_point_figures() -> None:
    rows = made(3, levels=3)
    found = {d.metric: d for d in paired_bootstrap(rows, replicates=5)}
    for side, logits in (("first", rows.first), ("second", rows.second)):
        probability = 1 / (1 + np.exp(-logits))
        rate = rows.labels.mean()
        entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
        assert getattr(found["auc"], side) == pytest.approx(roc_auc_score(rows.labels, logits), rel=1e-12)
        assert getattr(found["ne"], side) == pytest.approx(log_loss(rows.labels, probability) / entropy, rel=1e-9)
    assert found["ne"].difference == found["ne"].second - found["ne"].first


def test_a_worse_model_is_seen_and_an_equal_one_is_not() -> None:
    worse = {d.metric: d for d in paired_bootstrap(made(1, 600), replicates=300)}
    assert worse["ne"].low > 0
    assert worse["auc"].high < 0
    assert worse["gauc"].is_significant
    assert worse["ne"].share_better < 0.01
    same = made(1, 100, noise=0.0)
    assert all(d.low == d.high == d.difference == 0 and not d.is_significant for d in paired_bootstrap(same, 50))


def test_intervals_widen_where_units_are_whole_clusters() -> None:
    """Copies of an impression within its unit carry no news: the interval is that of the units."""
    one = made(5, 200)
    copies = Scored(*(np.repeat(part, 9) for part in (one.unit, one.request, one.labels, one.first, one.second)))
    widths = [
        {d.metric: d.high - d.low for d in paired_bootstrap(rows, replicates=300, seed=1)} for rows in (one, copies)
    ]
    assert widths[1]["ne"] == pytest.approx(widths[0]["ne"], rel=1e-9)
    assert widths[1]["auc"] == pytest.approx(widths[0]["auc"], rel=1e-9)


def test_the_interval_covers() -> None:
    """Two models with independent errors of one size: the true difference is 0, and 95 % intervals hold it."""
    covered = 0
    for seed in range(40):
        rows = made(seed, 150, noise=0.7)
        rng = np.random.default_rng(10_000 + seed)
        other = rows.first + 0.7 * rng.normal(size=len(rows.first))
        ne = paired_bootstrap(Scored(rows.unit, rows.request, rows.labels, other, rows.second), 120, seed)[0]
        covered += ne.low <= 0 <= ne.high
    assert covered >= 30  # of 40: the true coverage of percentile intervals is about 92 % here (measured on 200 seeds)


def test_nothing_to_resample_is_refused() -> None:
    one = np.zeros(3, np.int64)
    with pytest.raises(DataError, match="evaluate on more requests"):
        paired_bootstrap(Scored(one, one, np.array([0.0, 1, 0]), np.zeros(3), np.ones(3)))

"""The histogram's AUC within its stated error, and the exact AUC against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import auc as area
from sklearn.metrics import roc_auc_score

from roo_ray.errors import RooError
from roo_ray.metrics.auc import (
    BINS,
    add_to_histogram,
    auc_error_bound,
    bin_of,
    empty_histogram,
    exact_auc,
    histogram_auc,
    roc_curve,
)


def histogram_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    histogram = empty_histogram(1)
    add_to_histogram(histogram, logits[:, None], labels[:, None], torch.ones(len(logits), 1))
    return histogram


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(st.floats(width=32, allow_nan=False), st.integers(0, 1)), min_size=2, max_size=40).filter(
        lambda rows: len({label for _, label in rows}) == 2
    )
)
def test_error_stays_within_the_bound_for_any_logits(rows: list[tuple[float, int]]) -> None:
    logits = torch.tensor([x for x, _ in rows], dtype=torch.float32)
    labels = torch.tensor([float(y) for _, y in rows])
    histogram = histogram_of(logits, labels)
    error = abs(float(histogram_auc(histogram)[0]) - exact_auc(logits, labels))
    assert error <= float(auc_error_bound(histogram)[0]) + 1e-12


def test_an_adverse_order_reaches_the_bound() -> None:
    """All logits in one bin, ordered against their labels: the error is the bound, one half."""
    logits, labels = torch.tensor([1.0, 1.00001]), torch.tensor([1.0, 0.0])
    histogram = histogram_of(logits, labels)
    assert float(histogram_auc(histogram)[0]) == float(auc_error_bound(histogram)[0]) == 0.5
    assert exact_auc(logits, labels) == 0


@pytest.mark.parametrize("base", [-4.0, 0.0])
def test_error_on_scores_as_models_give_them_is_far_below_the_sampling_error(base: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = base + torch.randn(500_000, generator=generator)
    labels = (torch.rand(500_000, generator=generator) < torch.sigmoid(logits)).float()
    histogram = histogram_of(logits, labels)
    sampling_error = 0.28 / math.sqrt(float(min(labels.sum(), (1 - labels).sum())))
    assert abs(float(histogram_auc(histogram)[0]) - exact_auc(logits, labels)) < sampling_error / 100
    assert float(auc_error_bound(histogram)[0]) < 1e-3


def test_bins_are_monotone_and_have_the_stated_width() -> None:
    logits = torch.cat([-torch.logspace(6, -9, 4000), torch.zeros(1), torch.logspace(-9, 6, 4000)])
    bins = bin_of(logits)
    assert (bins.diff() >= 0).all()
    assert bin_of(torch.tensor([-math.inf, math.inf, -1e30, 1e30])).tolist() == [0, BINS - 1, 0, BINS - 1]
    assert bin_of(torch.tensor([-59_000.0, 59_000.0])).tolist() != [0, BINS - 1]
    apart = torch.tensor([0.0, 0.0003, 1.0, 1.003, 50.0, 50.2, 1e4, 1.004e4])
    assert bin_of(apart).unique().numel() == apart.numel()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(2, 300), levels=st.sampled_from([2, 5, 10**6]))
def test_exact_auc_equals_scikit_learn(seed: int, rows: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    scores = (rng.integers(0, levels, rows) - levels // 2).astype(np.float32)
    labels, weights = rng.integers(0, 2, rows), rng.integers(0, 2, rows)
    seen = weights > 0
    both = len(set(labels[seen])) == 2
    expected = roc_auc_score(labels[seen], scores[seen]) if both else math.nan
    result = exact_auc(torch.tensor(scores), torch.tensor(labels), torch.tensor(weights))
    assert result == pytest.approx(expected, rel=1e-12, nan_ok=True)


def test_exact_auc_edges() -> None:
    zeros = torch.tensor([0.0, -0.0])
    assert exact_auc(zeros, torch.tensor([1.0, 0.0])) == 0.5  # the zeros tie
    assert exact_auc(torch.tensor([math.inf, -math.inf]), torch.tensor([1.0, 0.0])) == 1
    assert math.isnan(exact_auc(torch.zeros(0), torch.zeros(0)))
    nan = torch.tensor([0.0, math.nan])
    with pytest.raises(RooError, match="1 of 2 scores are NaN"):
        exact_auc(nan, torch.tensor([1.0, 0.0]))
    assert math.isnan(exact_auc(nan, torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])))


def test_roc_curve_has_the_histograms_area() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2000, generator=generator).round(decimals=1)
    labels = (torch.rand(2000, generator=generator) < torch.sigmoid(logits)).float()
    histogram = histogram_of(logits, labels)
    false_rate, true_rate = roc_curve(histogram, 0)
    assert (false_rate[0], true_rate[0], false_rate[-1], true_rate[-1]) == (0, 0, 1, 1)
    assert len(false_rate) == logits.unique().numel() + 1
    assert area(false_rate, true_rate) == pytest.approx(float(histogram_auc(histogram)[0]), rel=1e-12)

"""The reliability table against a count by NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from roo_ray.metrics.calibration import BINS, batch_reliability, bin_edges, reliability_table
from tests.metrics.reference import random_batch


def test_table_equals_a_numpy_histogram() -> None:
    logits, labels, weights, _ = random_batch(4, requests=500)
    logits = logits * 4
    sums = batch_reliability(logits, labels, weights)
    assert sums.shape == (3, 2, BINS)
    for task in range(2):
        table = reliability_table(sums, task)
        seen = (weights[:, task] > 0).numpy()
        p = torch.sigmoid(logits[:, task].double()).numpy()[seen]
        y = labels[:, task].numpy()[seen]
        edges = bin_edges().numpy()
        counts, _ = np.histogram(p, edges)
        held = counts > 0
        assert table.impressions.tolist() == counts[held].tolist()
        assert table.lower.tolist() == edges[:-1][held].tolist()
        for mean, values in ((table.mean_prediction, p), (table.mean_label, y)):
            expected = np.histogram(p, edges, weights=values)[0][held] / counts[held]
            assert mean.numpy() == pytest.approx(expected, rel=1e-12)
        assert ((table.lower <= table.mean_prediction) & (table.mean_prediction <= table.upper)).all()


def test_extreme_logits_fall_into_the_open_bins() -> None:
    logits = torch.tensor([[-1e4], [1e4], [-torch.inf], [torch.inf], [torch.nan]])
    known = torch.tensor([[1.0], [1.0], [1.0], [1.0], [0.0]])
    table = reliability_table(batch_reliability(logits, torch.ones(5, 1), known), 0)
    assert table.impressions.tolist() == [2, 2]
    assert table.mean_prediction.tolist() == [0, 1]
    assert (table.lower[0], table.upper[-1]) == (0, 1)
    empty = reliability_table(torch.zeros(3, 1, BINS, dtype=torch.float64), 0)
    assert empty.impressions.numel() == 0

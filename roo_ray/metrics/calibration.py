"""Calibration: predicted over observed positives, in all (1 is right) and by bins of the prediction."""

from __future__ import annotations

import torch
from torch import Tensor

from roo_ray.metrics.normalized_entropy import LABELS, PREDICTIONS

BINS = 50


def calibration(state: Tensor) -> Tensor:
    """(K,) sum of predictions / sum of labels from a normalised-entropy state (4, K); NaN without positives."""
    return torch.where(state[LABELS] > 0, state[PREDICTIONS] / state[LABELS], torch.nan)


def empty_reliability(tasks: int) -> Tensor:
    """(3, K, BINS) float64 zeros: predictions, labels and impressions by bin of the predicted probability."""
    return torch.zeros(3, tasks, BINS, dtype=torch.float64)


def batch_reliability(logits: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    """The reliability sums of a batch: (N, K) each -> (3, K, BINS) float64; bins split [0, 1] evenly."""
    tasks = logits.shape[1]
    probability = torch.sigmoid(torch.where(known > 0, logits, 0).double())  # (N, K)
    bins = (probability * BINS).long().clamp_max(BINS - 1) + torch.arange(tasks, device=logits.device) * BINS
    seen = known.double()
    sums = torch.zeros(3, tasks * BINS, dtype=torch.float64, device=logits.device)
    values = (probability * seen, torch.where(known > 0, labels, 0).double(), seen)
    for row, value in enumerate(values):
        sums[row].index_add_(0, bins.flatten(), value.flatten())
    return sums.view(3, tasks, BINS)

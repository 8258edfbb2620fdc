"""Calibration: predicted over observed positives, in all (1 is right) and by bins of the prediction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from roo_ray.metrics.normalized_entropy import LABELS, PREDICTIONS

# Bins of fixed probabilities, even in their logit: a click model's predictions, mostly below 5 %, would all
# lie in the first few of bins that were even in probability. The outer two are open-ended (0.00005, 0.99995).
BINS = 50
_REACH = 10.0  # logit


def calibration(state: Tensor) -> Tensor:
    """(K,) sum of predictions / sum of labels from a normalised-entropy state (4, K); NaN without positives."""
    return torch.where(state[LABELS] > 0, state[PREDICTIONS] / state[LABELS], torch.nan)


def empty_reliability(tasks: int) -> Tensor:
    """(3, K, BINS) float64 zeros: predictions, labels and impressions by bin of the predicted probability."""
    return torch.zeros(3, tasks, BINS, dtype=torch.float64)


def bin_edges() -> Tensor:
    """(BINS + 1,) float64 probabilities from 0 to 1: bin i holds predictions in [edge i, edge i + 1)."""
    edges = torch.sigmoid(torch.linspace(-_REACH, _REACH, BINS + 1, dtype=torch.float64))
    edges[0], edges[-1] = 0.0, 1.0
    return edges


def batch_reliability(logits: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    """The reliability sums of a batch: (N, K) each -> (3, K, BINS) float64."""
    tasks = logits.shape[1]
    x = torch.where(known > 0, logits, 0).double()  # (N, K)
    bins = ((x.clamp(-_REACH, _REACH) + _REACH) * (BINS / (2 * _REACH))).long().clamp_max(BINS - 1)
    bins += torch.arange(tasks, device=logits.device) * BINS
    seen = known.double()
    sums = torch.zeros(3, tasks * BINS, dtype=torch.float64, device=logits.device)
    values = (torch.sigmoid(x) * seen, torch.where(known > 0, labels, 0).double(), seen)
    for row, value in enumerate(values):
        sums[row].index_add_(0, bins.flatten(), value.flatten())
    return sums.view(3, tasks, BINS)


@dataclass(frozen=True)
class ReliabilityTable:
    """One task's calibration by bin, the bins that hold impressions only, by rising probability.

    lower, upper     (P,) the bin's edges. mean_prediction, mean_label (P,) of its impressions; equal where
                     calibrated. impressions (P,) counts. All float64.
    """

    lower: Tensor
    upper: Tensor
    mean_prediction: Tensor
    mean_label: Tensor
    impressions: Tensor


def reliability_table(reliability: Tensor, task: int) -> ReliabilityTable:
    """The table of one task from the sums (3, K, BINS)."""
    predictions, labels, impressions = reliability[:, task].cpu()  # (BINS,) each
    held = impressions > 0
    edges = bin_edges()
    return ReliabilityTable(
        lower=edges[:-1][held],
        upper=edges[1:][held],
        mean_prediction=(predictions / impressions)[held],
        mean_label=(labels / impressions)[held],
        impressions=impressions[held],
    )

"""AUC: streaming from a histogram of logits, and exact from all scores.

Streaming: logits fall into 16,384 bins, two of them open-ended; pairs within a bin count one half, as ties
do. So the error is at most half the share of (positive, negative) pairs that share a bin (``auc_error_bound``).
Bins are spaced evenly in ``asinh(8 x)``: width 0.0002 around logit 0, 0.2 % of the logit far from it, over
|x| <= 60,000; beyond, an order is not seen. The state is a count, so it merges by addition.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BINS = 16_384
_SHARPNESS = 8.0
_REACH = math.asinh(_SHARPNESS * 6e4)


def empty_histogram(tasks: int) -> Tensor:
    """(2, K, BINS) float64 zeros: negatives, positives."""
    return torch.zeros(2, tasks, BINS, dtype=torch.float64)


def bin_of(logits: Tensor) -> Tensor:
    """The bin of each logit, int64, same shape; monotone, infinities fall into the outermost bins."""
    squeezed = torch.asinh(logits.double() * _SHARPNESS) / _REACH  # [-1, 1] within reach
    return ((squeezed.clamp(-1, 1) + 1) * (BINS / 2)).long().clamp_max(BINS - 1)


def add_to_histogram(histogram: Tensor, logits: Tensor, labels: Tensor, known: Tensor) -> None:
    """Adds a batch, (N, K) each, to the (2, K, BINS) counts in place."""
    tasks = logits.shape[1]
    bins = bin_of(torch.where(known > 0, logits, 0))  # (N, K)
    task = torch.arange(tasks, device=logits.device)
    side = torch.where(known > 0, labels, 0).long()
    index = (side * tasks + task) * BINS + bins
    histogram.view(-1).index_add_(0, index.flatten(), known.double().flatten())


def histogram_auc(histogram: Tensor) -> Tensor:
    """(K,) AUC from (2, K, BINS) counts; NaN where a class is missing."""
    negatives, positives = histogram[0], histogram[1]  # (K, BINS)
    below = negatives.cumsum(1) - negatives
    wins = (positives * (below + 0.5 * negatives)).sum(1)
    pairs = positives.sum(1) * negatives.sum(1)
    return torch.where(pairs > 0, wins / pairs, torch.nan)


def auc_error_bound(histogram: Tensor) -> Tensor:
    """(K,) the most by which ``histogram_auc`` can differ from the exact AUC: half the share of pairs that
    fall into one bin."""
    negatives, positives = histogram[0], histogram[1]
    pairs = positives.sum(1) * negatives.sum(1)
    return torch.where(pairs > 0, 0.5 * (positives * negatives).sum(1) / pairs, torch.nan)


def exact_auc(scores: Tensor, labels: Tensor) -> float:
    """AUC of (N,) scores and 0/1 labels with ties counting one half; NaN where a class is missing."""
    values, inverse, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    positives = torch.zeros(values.numel(), dtype=torch.float64).index_add_(0, inverse, labels.double())
    negatives = counts.double() - positives
    wins = (positives * (negatives.cumsum(0) - 0.5 * negatives)).sum()
    pairs = positives.sum() * negatives.sum()
    return float(wins / pairs) if pairs > 0 else math.nan

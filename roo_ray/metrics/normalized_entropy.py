"""Normalised entropy (NE): mean log loss over the entropy of the same set's mean label (He et al., ADKDD 2014).

1 is what predicting the base rate gives; lower is better. The state is a sum, so it merges by addition.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of the state, per task: sums of log losses (nats), labels and predictions, and the number of impressions.
LOSS, LABELS, PREDICTIONS, COUNT = range(4)
ROWS = 4


def empty_state(tasks: int) -> Tensor:
    """(4, K) float64 zeros."""
    return torch.zeros(ROWS, tasks, dtype=torch.float64)


def batch_state(logits: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    """The state of a batch: logits, labels, known (N, K), known 0 or 1 -> (4, K) float64.

    Log loss from logits is ``max(x, 0) - x y + log(1 + exp(-|x|))``, which neither overflows nor rounds to
    infinity; an infinite logit counts as 1e30. Where ``known`` is 0, logits and labels are not looked at.
    """
    x = torch.where(known > 0, logits, 0).double().clamp(-1e30, 1e30)  # (N, K)
    y = torch.where(known > 0, labels, 0).double()
    seen = known.double()
    loss = x.clamp_min(0) - x * y + torch.log1p(torch.exp(-x.abs()))
    return torch.stack([(loss * seen).sum(0), y.sum(0), (torch.sigmoid(x) * seen).sum(0), seen.sum(0)])


def log_loss(state: Tensor) -> Tensor:
    """(K,) mean log loss in nats; NaN without impressions."""
    return state[LOSS] / state[COUNT]


def base_rate(state: Tensor) -> Tensor:
    """(K,) mean label; NaN without impressions."""
    return state[LABELS] / state[COUNT]


def normalized_entropy(state: Tensor) -> Tensor:
    """(K,) NE; NaN without impressions or where all labels are equal (their entropy is 0)."""
    rate = base_rate(state)
    entropy = -(torch.xlogy(rate, rate) + torch.xlogy(1 - rate, 1 - rate))
    return torch.where(entropy > 0, log_loss(state) / entropy, torch.nan)

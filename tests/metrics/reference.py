"""Brute-force references: slow, obvious, and independent of the code they check."""

from __future__ import annotations

import math

import numpy as np
import torch


def pair_auc(scores: list[float], labels: list[int]) -> float:
    """AUC by counting all (positive, negative) pairs; ties count one half."""
    wins, pairs = 0.0, 0
    for score, label in zip(scores, labels, strict=True):
        if label == 1:
            for other, other_label in zip(scores, labels, strict=True):
                if other_label == 0:
                    pairs += 1
                    wins += 1.0 if score > other else 0.5 if score == other else 0.0
    return wins / pairs if pairs else math.nan


def pair_gauc(
    logits: np.ndarray, labels: np.ndarray, known: np.ndarray, num_impressions: list[int]
) -> tuple[float, int, int]:
    """(GAUC, requests with an AUC, requests skipped) by a loop over requests; 1-D inputs."""
    total, weight, used, skipped, start = 0.0, 0, 0, 0, 0
    for count in num_impressions:
        rows = [i for i in range(start, start + count) if known[i] > 0]
        start += count
        value = pair_auc([float(logits[i]) for i in rows], [int(labels[i]) for i in rows])
        if math.isnan(value):
            skipped += bool(rows)
        else:
            total, weight, used = total + value * len(rows), weight + len(rows), used + 1
    return (total / weight if weight else math.nan), used, skipped


def random_batch(
    seed: int, requests: int, tasks: int = 2, levels: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits, labels, weights (N, K) and num_impressions (B_RO,); ``levels`` distinct logits make ties."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 9, requests)
    shape = (int(counts.sum()), tasks)
    logits = rng.normal(size=shape) if levels is None else rng.integers(0, levels, shape) - levels / 2
    return (
        torch.tensor(logits, dtype=torch.float32),
        torch.tensor(rng.random(shape) < 0.3, dtype=torch.float32),
        torch.tensor(rng.random(shape) < 0.8, dtype=torch.float32),
        torch.tensor(counts, dtype=torch.int64),
    )

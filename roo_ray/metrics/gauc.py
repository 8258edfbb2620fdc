"""GAUC: the AUC within each request, averaged with the number of its known impressions as weight (Zhu et al.,
KDD 2017, there by user). A request whose known labels are all equal has no AUC: it is skipped and counted."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of the state, per task: sum of weight x AUC, sum of weights, requests with an AUC, requests skipped.
WEIGHTED_AUC, WEIGHT, REQUESTS, SKIPPED = range(4)
ROWS = 4


def empty_state(tasks: int) -> Tensor:
    """(4, K) float64 zeros."""
    return torch.zeros(ROWS, tasks, dtype=torch.float64)


def batch_state(logits: Tensor, labels: Tensor, known: Tensor, num_impressions: Tensor) -> Tensor:
    """The state of a batch: (N, K) each, num_impressions (B_RO,) int64 -> (4, K) float64.

    Exact and tie-aware. Within a request sorted by logit, the sum of the positives' mid-ranks gives the number
    of pairs won (Mann-Whitney); requests are told apart by sorting on (request, logit).
    """
    return torch.stack(
        [
            _task_state(logits[:, task], labels[:, task], known[:, task], num_impressions)
            for task in range(logits.shape[1])
        ],
        dim=1,
    )


def _task_state(logits: Tensor, labels: Tensor, known: Tensor, num_impressions: Tensor) -> Tensor:
    requests = num_impressions.numel()
    device = logits.device
    request = torch.repeat_interleave(torch.arange(requests, device=device), num_impressions)  # (N,)
    seen = known > 0
    request, scores, positive = request[seen], logits[seen], labels[seen].double()  # (M,)
    order = torch.argsort(scores)
    order = order[torch.argsort(request[order], stable=True)]
    request, scores, positive = request[order], scores[order], positive[order]

    count = torch.zeros(requests, dtype=torch.float64, device=device).index_add_(0, request, torch.ones_like(positive))
    positives = torch.zeros_like(count).index_add_(0, request, positive)
    first = count.cumsum(0) - count  # (B_RO,) rank before each request
    # ties: a run of equal (request, score) shares the mean of its ranks
    new_run = torch.ones_like(request, dtype=torch.bool)
    new_run[1:] = (request[1:] != request[:-1]) | (scores[1:] != scores[:-1])
    run = new_run.cumsum(0) - 1  # (M,)
    sizes = torch.bincount(run, minlength=0).double()
    mid_rank = sizes.cumsum(0) - (sizes - 1) / 2  # 1-based, over the batch
    rank = mid_rank[run] - first[request]  # within the request
    rank_sum = torch.zeros_like(count).index_add_(0, request, rank * positive)
    pairs = positives * (count - positives)
    valid = pairs > 0
    auc = (rank_sum - positives * (positives + 1) / 2)[valid] / pairs[valid]
    weight = count[valid]
    skipped = ((count > 0) & ~valid).sum().double()
    return torch.stack([(auc * weight).sum(), weight.sum(), valid.sum().double(), skipped])


def gauc(state: Tensor) -> Tensor:
    """(K,) GAUC from a state (4, K); NaN where no request has both classes."""
    return torch.where(state[WEIGHT] > 0, state[WEIGHTED_AUC] / state[WEIGHT], torch.nan)

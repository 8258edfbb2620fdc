"""GAUC: the AUC within each group, averaged with the number of its known impressions as weight (Zhu et al.,
KDD 2017, there by user). Groups are the requests of a batch, or, in evaluation, users gathered to one rank
(a request of a null user is a user of its own).

A group whose known labels are all equal has no AUC: it is skipped and counted. A group without any known
impression (a dummy, an empty request) is neither used nor counted. A group must lie within one call: two
halves of a request would give two AUCs.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of the state, per task: sum of weight x AUC, sum of weights, groups with an AUC, groups skipped.
WEIGHTED_AUC, WEIGHT, REQUESTS, SKIPPED = range(4)
ROWS = 4

# Bits of the sort key beside the group: 32 for the logit, 1 for the label.
_GROUP_SHIFT = 33
MAX_GROUPS = 2**30


def empty_state(tasks: int) -> Tensor:
    """(4, K) float64 zeros."""
    return torch.zeros(ROWS, tasks, dtype=torch.float64)


def batch_state(logits: Tensor, labels: Tensor, known: Tensor, num_impressions: Tensor) -> Tensor:
    """GAUC by request: logits, labels, known (B_NRO, K), num_impressions (B_RO,) int64 -> (4, K) float64."""
    requests = num_impressions.numel()
    request = torch.repeat_interleave(
        torch.arange(requests, device=logits.device), num_impressions, output_size=logits.shape[0]
    )  # (B_NRO,)
    return grouped_state(logits, labels, known, request, requests)


def grouped_state(logits: Tensor, labels: Tensor, known: Tensor, group: Tensor, groups: int) -> Tensor:
    """The state of rows in any order: logits float32, labels and known 0 or 1, (N, K); group (N,) int64 below
    ``groups`` -> (4, K) float64.

    Exact and tie-aware: pairs are counted in int64 (a tie as half a won pair), and one sort of a packed key
    (group, logit, label) puts every group's negatives below each of its positives before it. Reads nothing
    back from the device. Raises ValueError where K x (groups + 1) passes 2^30.
    """
    rows, tasks = logits.shape
    slots = groups + 1  # the last one of each task takes the unknown rows
    if tasks * slots > MAX_GROUPS:
        raise ValueError(f"{tasks} tasks x {slots} groups is over {MAX_GROUPS}: give fewer groups at a time")
    device = logits.device
    seen = known > 0  # (N, K)
    slot = torch.where(seen, group[:, None], groups) + torch.arange(tasks, device=device) * slots  # (N, K)
    label = (torch.where(seen, labels, 0) > 0).long()
    key = (slot << _GROUP_SHIFT) | (_ordered(torch.where(seen, logits, 0)) << 1) | label
    key = key.flatten().sort().values  # (M,), M = N * K

    label = key & 1
    negatives = (1 - label).cumsum(0)  # up to and with this row
    before = negatives - (1 - label)
    new_run = torch.ones(rows * tasks, dtype=torch.bool, device=device)  # a run: one group, one logit
    new_run[1:] = (key[1:] >> 1) != (key[:-1] >> 1)
    below = torch.where(new_run, before, 0).cummax(0).values if rows else before  # negatives before the run
    # A run's negatives come before its positives, so ``negatives`` holds all of them: twice the pairs won is
    # twice the negatives below plus the ties, or below + negatives, less twice those of earlier groups.
    starts = torch.searchsorted(key >> _GROUP_SHIFT, torch.arange(tasks * slots + 1, device=device))  # (K * slots + 1,)
    won = _between(label * (below + negatives), starts)
    positives = _between(label, starts)
    count = starts.diff()
    earlier = starts[:-1] - (positives.cumsum(0) - positives)
    won = won - 2 * earlier * positives

    won, positives, count = (x.view(tasks, slots)[:, :groups] for x in (won, positives, count))
    pairs = positives * (count - positives)
    valid = pairs > 0
    auc = torch.where(valid, 0.5 * won.double() / pairs.clamp_min(1), 0)  # (K, groups)
    weight = torch.where(valid, count, 0).double()
    skipped = (count > 0) & ~valid
    return torch.stack([(auc * weight).sum(1), weight.sum(1), valid.sum(1).double(), skipped.sum(1).double()])


def _ordered(logits: Tensor) -> Tensor:
    """int64 in [0, 2^32) in the order of the float32 logits; -0 and 0 are equal."""
    bits = (logits.float() + 0.0).contiguous().view(torch.int32).long()
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) + 2**31


def _between(values: Tensor, starts: Tensor) -> Tensor:
    """Sums of int64 values (M,) from each start to the next: (S + 1,) -> (S,)."""
    total = torch.cat([values.new_zeros(1), values.cumsum(0)])
    return total[starts].diff()


def gauc(state: Tensor) -> Tensor:
    """(K,) GAUC from a state (4, K); NaN where no group has both classes."""
    return torch.where(state[WEIGHT] > 0, state[WEIGHTED_AUC] / state[WEIGHT], torch.nan)

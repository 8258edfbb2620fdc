"""Reductions of jagged values: one row per segment, nothing padded. Deterministic on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from roo_ray.models.precision import at_least_float32


def segment_sum(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums each segment: values (T, D), lengths (B,) int64 with sum T -> (B, D). An empty segment gives 0."""
    values = at_least_float32(values)  # sums of many terms want it
    return torch.segment_reduce(values, "sum", lengths=lengths, axis=0, unsafe=True)


def segment_mean(values: Tensor, lengths: Tensor) -> Tensor:
    """Means of the segments: values (T, D), lengths (B,) int64 -> (B, D). An empty segment gives 0."""
    return mean_of_sums(segment_sum(values, lengths), lengths)


def mean_of_sums(sums: Tensor, lengths: Tensor) -> Tensor:
    """Means of segments from their sums (B, D), lengths (B,) int64 -> (B, D). An empty segment gives 0."""
    return sums / lengths.clamp(min=1).unsqueeze(1).to(sums.dtype)


def segment_last(values: Tensor, lengths: Tensor) -> Tensor:
    """The last row of each segment: values (T, D), lengths (B,) int64 -> (B, D). An empty segment gives 0."""
    rows = torch.where(lengths > 0, lengths.cumsum(0) - 1, values.shape[0])  # (B,)
    return torch.cat([values, values.new_zeros(1, values.shape[1])]).index_select(0, rows)


def sum_lengths(lengths: Tensor, groups: Tensor) -> Tensor:
    """Lengths of each group's segments joined: lengths (N,), groups (B,) int64 with sum N -> (B,) int64."""
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).index_select(
        0, torch.cat([groups.new_zeros(1), groups.cumsum(0)])
    )  # (B + 1,)
    return ends.diff()


def segment_softmax(scores: Tensor, lengths: Tensor) -> Tensor:
    """Softmax within each segment: scores (T,), lengths (B,) int64 -> (T,) float32 or wider."""
    scores = at_least_float32(scores)
    top = torch.segment_reduce(scores.detach(), "max", lengths=lengths, axis=0, unsafe=True)  # (B,)
    weights = torch.exp(scores - torch.repeat_interleave(top, lengths, output_size=scores.numel()))
    totals = segment_sum(weights.unsqueeze(1), lengths).squeeze(1)  # (B,)
    return weights / torch.repeat_interleave(totals, lengths, output_size=scores.numel())

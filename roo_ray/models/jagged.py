"""Reductions of jagged values: one row per segment, nothing padded. Deterministic on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums each segment: values (T, D), lengths (B,) int64 with sum T -> (B, D). An empty segment gives 0."""
    return torch.segment_reduce(values, "sum", lengths=lengths, axis=0, unsafe=True)


def segment_mean(values: Tensor, lengths: Tensor) -> Tensor:
    """Means of the segments: values (T, D), lengths (B,) int64 -> (B, D). An empty segment gives 0."""
    return segment_sum(values, lengths) / lengths.clamp(min=1).unsqueeze(1).to(values.dtype)


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

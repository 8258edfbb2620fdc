"""FLOPs that the matrix products of a model's step need, the same on every device: attention by its pairs of a query
and a key that it sees, all else as torch counts it.

torch's counter knows nothing of a Triton kernel, and counts the scores of padding and those that are computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from roo_ray.models import attention, target_attention
from roo_ray.models.attention_layout import Layout
from roo_ray.models.precision import at_least_float32
from roo_ray.models.target_attention import TargetLayout

_PRODUCTS = 6  # of a pair: two forward, four backward


def attention_flops(lengths: Tensor, width: int) -> float:
    """Of one layer of causal self-attention, forward and backward: lengths (B,) of the sequences; ``width`` is that of
    all heads."""
    events = lengths.double()
    return _PRODUCTS * 2 * width * float((events * (events + 1) / 2).sum())


def target_attention_flops(layout: TargetLayout, width: int) -> float:
    """Of one layer of candidates' attention to their request's history, forward and backward."""
    pairs = 0
    for bucket in layout.buckets:
        targets = torch.bincount(bucket.target_slots // bucket.count, minlength=bucket.rows)  # (R,)
        pairs += int((bucket.known.sum(1) * targets).sum())
    return float(_PRODUCTS * 2 * width * pairs)


def step_flops(step: Callable[[], object]) -> float:
    """Of what ``step`` does, a forward and a backward pass. Attention is left out while it runs, so that its results
    mean nothing."""
    found = 0.0

    def by_pairs(
        qkv: Tensor, layout: Layout, heads: int, normaliser: int, position: Tensor, time: Tensor | None
    ) -> Tensor:
        nonlocal found
        width = qkv.shape[1] // 3
        found += attention_flops(layout.lengths, width)
        return qkv[:, :width] + position.sum() + (0.0 if time is None else time.sum())

    def targets_by_pairs(
        query: Tensor, memory: Tensor, bias: Tensor | None, layout: TargetLayout, heads: int, softmax: bool
    ) -> Tensor:
        nonlocal found
        found += target_attention_flops(layout, query.shape[1])
        return at_least_float32(query + memory.sum() + (0.0 if bias is None else bias.sum()))

    counter = FlopCounterMode(display=False)
    with (
        mock.patch.object(attention, "attention", by_pairs),
        mock.patch.object(target_attention, "_attend", targets_by_pairs),
        counter,
    ):
        step()
    return found + float(counter.get_total_flops())

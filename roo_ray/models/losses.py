"""The ranking loss: normalised by the global sums of weights, so that its gradient is that of the loss over
all impressions of the global batch, however they are spread over requests and ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from roo_ray.models.precision import at_least_float32


def task_loss_sums(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of the binary cross-entropy per task, over this rank's impressions: (K,) float32.

    logits, labels, weights: (B_NRO, K). An impression of weight 0 has no part in the sum nor in the gradient.
    """
    losses = functional.binary_cross_entropy_with_logits(at_least_float32(logits), labels, reduction="none")
    return (losses * weights).sum(0)


def ranking_loss(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    task_weights: Tensor,
    global_weights: Tensor,
    world_size: int,
) -> Tensor:
    """``sum_k task_weight_k * sum_i w_ik bce_ik / global_sum(w_k) * world_size``, a scalar float32.

    logits, labels, weights: (B_NRO, K) of this rank. task_weights (K,): the schema's. global_weights (K,): sum
    of ``weights`` over the impressions of all ranks; a task where it is 0 contributes 0. The factor world_size
    undoes the division of gradients by the number of ranks in DDP and TorchRec: the mean over ranks of this
    loss is the loss of the global batch.
    """
    scale = torch.where(global_weights > 0, task_weights / global_weights.clamp(min=1e-12), 0.0)  # (K,)
    return (task_loss_sums(logits, labels, weights) * scale).sum() * world_size

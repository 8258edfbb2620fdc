"""Normalisation that survives request order. LayerNorm and RMSNorm look at one row; batch statistics are taken
over the impressions of the global batch, whatever the form of the batch and the number of ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from roo_ray.models.precision import at_least_float32


class GlobalBatchNorm(nn.Module):
    """BatchNorm over the global batch, as SyncBatchNorm but on every device, each row weighted by the impressions that
    it stands for: a request counts as often as its impressions would; a dummy request, or an impression of which no
    label is known, does not count."""

    running_mean: Tensor
    running_variance: Tensor

    def __init__(self, width: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_variance", torch.ones(width))

    def forward(self, values: Tensor, weights: Tensor) -> Tensor:
        """values (B, D), weights (B,) -> (B, D)."""
        if not self.training:
            mean, variance = self.running_mean, self.running_variance
        else:
            values = at_least_float32(values)
            weights = weights.to(values.dtype).unsqueeze(1)  # (B, 1)
            first = _over_ranks(torch.cat([(values * weights).sum(0), weights.sum(0)]))  # (D + 1,)
            count = first[-1]  # impressions
            total = count.clamp(min=1.0)
            mean = first[:-1] / total
            variance = _over_ranks(((values - mean).square() * weights).sum(0)) / total
            with torch.no_grad():
                # as BatchNorm: the variance without bias. A batch of dummies alone says nothing, one impression
                # nothing of the variance
                unbiased = variance * (total / (count - 1.0).clamp(min=1.0))
                self.running_mean.lerp_(mean, self.momentum * (count > 0))
                self.running_variance.lerp_(unbiased, self.momentum * (count > 1))
        return (values - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias


def _over_ranks(values: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return all_reduce(values)  # type: ignore[no-any-return]
    return values


def make_norm(kind: str, width: int) -> nn.Module:
    """'layer', 'rms', 'batch' or 'none'."""
    if kind == "layer":
        return nn.LayerNorm(width)
    if kind == "rms":
        return nn.RMSNorm(width)
    if kind == "batch":
        return GlobalBatchNorm(width)
    return nn.Identity()


def plain_batch_norms(model: nn.Module) -> list[str]:
    """A line for each BatchNorm of a team's own model that has the statistics of one rank's rows: request-sorted
    batches skew them, user-side rows do not count their impressions, and a dummy request has a part in them."""
    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return [
        f"the towers' module {name} is {type(module).__name__}: its statistics are skewed by request-sorted batches "
        "and see the dummy request of a rank without data; take LayerNorm, RMSNorm or "
        "roo_ray.models.normalise.GlobalBatchNorm"
        for name, module in model.named_modules()
        if isinstance(module, plain)
    ]

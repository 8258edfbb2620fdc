"""Feature interaction: DCNv2 cross layers and the MLP tower."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from roo_ray.models.normalise import GlobalBatchNorm, make_norm


def symmetric_log(values: Tensor) -> Tensor:
    """sign(x) log(1 + |x|): compresses dense features of unknown scale without statistics of the batch."""
    return torch.sign(values) * torch.log1p(values.abs())


class LowRankCross(nn.Module):
    """DCNv2's low-rank cross layers (arXiv 2008.13535, section 3.3): x <- x0 * (U V x + b) + x.

    ``width``: of the input; ``rank``: of U (width, rank) and V (rank, width).
    """

    def __init__(self, width: int, layers: int, rank: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(width, rank, bias=False) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(rank, width) for _ in range(layers))

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, width) -> (B, width)."""
        crossed = inputs
        for down, up in zip(self.down, self.up, strict=True):
            crossed = torch.addcmul(crossed, inputs, up(down(crossed)))
        return crossed


class Tower(nn.Module):
    """Linear layers of the given widths, each followed by a norm ('none', or of ``make_norm``) and SiLU."""

    def __init__(self, inputs: int, widths: Sequence[int], normalisation: str = "layer") -> None:
        super().__init__()
        self.linears, self.norms = nn.ModuleList(), nn.ModuleList()
        for width in widths:
            self.linears.append(nn.Linear(inputs, width))
            self.norms.append(make_norm(normalisation, width))
            inputs = width
        self.width = inputs

    def forward(self, values: Tensor, weights: Tensor) -> Tensor:
        """(B, inputs) -> (B, width). weights (B,) float32: real impressions that a row stands for."""
        for linear, norm in zip(self.linears, self.norms, strict=True):
            values = linear(values)
            values = norm(values, weights) if isinstance(norm, GlobalBatchNorm) else norm(values)
            values = functional.silu(values)
        return values

"""Feature interaction at impression level: DCNv2 cross layers and the MLP tower."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


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


class Tower(nn.Sequential):
    """Linear layers of the given widths with SiLU after each, and LayerNorm before it if ``normalise``."""

    def __init__(self, inputs: int, widths: Sequence[int], normalise: bool = True) -> None:
        layers: list[nn.Module] = []
        for width in widths:
            layers += [nn.Linear(inputs, width), *([nn.LayerNorm(width)] if normalise else []), nn.SiLU()]
            inputs = width
        super().__init__(*layers)
        self.width = inputs

"""In which precision sums and scores are computed: float32 under bfloat16 autocast, float64 for a model in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """Values of half precision as float32, others as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values

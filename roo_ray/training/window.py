"""What a rank measures from one line of the log to the next."""

from __future__ import annotations

import torch
import torch.distributed as dist

from roo_ray.metrics.collection import RankingMetrics
from roo_ray.training.order import OrderStats
from roo_ray.training.throughput import Throughput
from roo_ray.training.timing import StepTimes


class Window:
    """The metrics, losses, throughput, order and times of some steps."""

    def __init__(self, tasks: list[str], device: torch.device) -> None:
        self.device = device
        self.metrics, self.losses = RankingMetrics(tasks), list[tuple[int, torch.Tensor]]()
        self.throughput, self.order, self.times = Throughput(), OrderStats(), StepTimes(device)

    def over_ranks(
        self, lifetime: RankingMetrics, interleaved: bool
    ) -> tuple[list[tuple[int, float]], dict[str, float]]:
        """(step, loss of the global batch) of each step, and the metrics under their names (collective; at least one
        step). What was measured is added to ``lifetime``, the same on all ranks."""
        curve = torch.stack([loss for _, loss in self.losses]).double()  # (steps,)
        dist.all_reduce(curve)
        merged = self.metrics.merge()
        lifetime.add(merged)
        values = {f"train/{name}": value for name, value in merged.compute().items()}
        values |= {f"train_lifetime/{name}": value for name, value in lifetime.compute().items()}
        values |= self.throughput.over_ranks(self.device, "train")
        values |= self.order.over_ranks(self.device, "train", interleaved)
        values |= self.times.over_ranks(self.device)
        return [(step, loss) for (step, _), loss in zip(self.losses, curve.tolist(), strict=True)], values
